"""Measures the memory of a plan for a video by running the real model on fake tensors and fake ranks, to check the prediction."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pkgutil import resolve_name
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_leaves

from sonic.families import FAMILIES
from sonic.geometry import FRAMES_PER_LATENT, PIXELS_PER_LATENT, BlockSpan
from sonic.model.dit import AvatarDiT
from sonic.model.execution import LOCAL, Execution
from sonic.model.kv_cache import KVCache
from sonic.parallel.mesh import World, make_world
from sonic.parallel.parallel_config import MESSAGES, PLANS, ParallelConfig
from sonic.parallel.parallelize import parallelizer_of
from sonic.parallel.ulysses import sequence_parallel
from sonic.planner.extrapolate import of_all_layers
from sonic.planner.fake_gpu import FakeGpuMode, fake_gpu
from sonic.planner.ledger import Ledger
from sonic.planner.memory import GIB, PAST_LATENTS, encoder_bytes, frame_bytes, memory_bytes, model_bytes, ring_bytes, vae_bytes
from sonic.planner.plans import Plan
from sonic.planner.search import PlanResult, Tracked
from sonic.planner.window_workload import WindowWorkload
from sonic.planner.workload import Workload
from sonic.types import Conditions
from sonic.vae.wan_vae import WanAutoencoder

DTYPES = {4: torch.float32, 2: torch.bfloat16}
WARM_LATENTS = 7  # latent frames decoded before the first block
RUNNING = 2  # layers of an offloading plan that run
OTHERS = {WindowWorkload: "sonic.planner.track_windows:track_windows"}  # what measures videos of other types, by type


class Footprint(NamedTuple):
    """Memory of a part of a job in bytes: `stays` before it runs, `peak` while it runs."""

    stays: float
    peak: float

    def with_more(self, size: float) -> Footprint:
        """The same with `size` more bytes all the time."""
        return Footprint(self.stays + size, self.peak + size)


def track(found: PlanResult) -> Tracked:
    """The memory of the chosen plan of a video."""
    work, plan = found.work, found.chosen
    if type(work) in OTHERS:
        return resolve_name(OTHERS[type(work)])(found)
    if not (tracker := PLANS[plan.parallel.name].tracker):
        return Tracked(reason=f"{plan.name} is predicted only, because DeepSpeed does not run on fake ranks")
    with fake_gpu(), FakeGpuMode(), torch.no_grad(), made_in(DTYPES[work.dtype_bytes]):
        transformer, vae = resolve_name(f"{__name__}:{tracker}")(work, plan), _vae(work)
    encode, reserve = sum(encoder_bytes(work).values()) / GIB, found.hardware.reserve_gib
    ranks = []
    for rank, part in zip(plan.ranks, transformer, strict=True):
        generate = _combined_peak(work, part, vae) if rank["generate"]["vae"] else part.peak
        ranks.append({"encode": encode * bool(rank["encode"]["speech_encoder"]) + reserve, "generate": generate / GIB + reserve})
    return Tracked(ranks)


@contextmanager
def made_in(dtype: torch.dtype) -> Iterator[None]:
    """Context in which new tensors have this dtype by default; modules of fake tensors cannot be converted later."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def equal_ranks(work: Workload, plan: Plan) -> list[Footprint]:
    """Memory of one rank, which has all layers or a shard of each; all ranks are equal."""
    parallel, parallelizer = plan.parallel, parallelizer_of(plan.parallel.name)

    def measure(part: Workload) -> Footprint:
        with fake_world(parallel, len(plan.ranks)) as world:
            model = AvatarDiT(part.model)
            parallelizer.cut(model, world, parallel)
            started = parallelizer.start(model, world, parallel)
            return _transformer(model, part, replace(started, sequence=sequence_parallel(world, part.model.trunk.num_heads)))

    return [_of_all_layers(work, measure)] * len(plan.ranks)


def stages(work: Workload, plan: Plan) -> list[Footprint]:
    """Memory of every rank of a pipeline: the first stage is a complete model with fewer blocks, the others are blocks alone."""
    vae_apart, frames = bool(plan.parallel.vae_rank), frame_bytes(work)
    ranges = plan.ranges[: len(plan.ranges) - vae_apart]
    with fake_world(plan.parallel, len(plan.ranks)) as world:
        execution = Execution(sequence_parallel(world, work.model.trunk.num_heads))
        share = world.size("cp")
        incoming = MESSAGES * work.stream_bytes / share * (len(ranges) > 1)
        first = _of_all_layers(work.with_layers(ranges[0]), lambda part: _transformer(AvatarDiT(part.model), part, execution))
        found = [first.with_more(incoming + frames * vae_apart)]
        known: dict[tuple[int, int], Footprint] = {}  # equal stages run once

        def blocks(part: Workload) -> Footprint:
            kind = part.model.trunk.num_layers, len(part.model.audio.inject_layers)
            if kind not in known:
                known[kind] = _blocks(part, execution)
            return known[kind]

        for layers in ranges[1:]:
            one = _of_all_layers(work.with_layers(layers), blocks) if layers else Footprint(0, work.stream_bytes / share)
            found.append(one.with_more(incoming))
    last = [Footprint(MESSAGES * frames, MESSAGES * frames)] * vae_apart  # the autoencoder's rank, which sends frames to the first
    return [stage for stage in found for _ in range(share)] + last


def offloaded(work: Workload, plan: Plan) -> list[Footprint]:
    """Memory of a model of RUNNING layers, with the weights, KV rings and waiting forwards of the plan in place of its own."""
    part, items = work.with_layers(range(RUNNING)), plan.ranks[0]["generate"]
    own = model_bytes(part) + RUNNING * (ring_bytes(work) + memory_bytes(work))
    waiting = (plan.parallel.offload.inflight - 1) * work.stream_bytes
    whole = sum(items[name] for name in ("weights", "kv_rings", "memory_tokens")) + waiting
    return [_transformer(AvatarDiT(part.model), part).with_more(whole - own)]


def _of_all_layers(work: Workload, measure: Callable[[Workload], Footprint]) -> Footprint:
    """Memory of a part with all its layers, extrapolated from runs with few layers."""
    return Footprint(**of_all_layers(work.model, lambda model: measure(replace(work, model=model))._asdict()))


def _transformer(model: AvatarDiT, work: Workload, execution: Execution = LOCAL) -> Footprint:
    """Memory of a complete transformer that generates a block after prefill, or a clip. It runs twice: prefetching starts at the second."""
    latents, timestep, conditions = inputs_of(work)
    caches = caches_of(model, work, conditions=conditions, execution=execution)

    def run() -> None:
        for cache in caches[:1]:
            model.prefill(conditions, cache, execution=execution)
        for _ in range(2):
            if work.clip_frames:
                model(latents, timestep, conditions, execution=execution)
            else:
                inputs, cache = model.prepare_block(conditions, _span(work)), caches[0]
                model.denoise_block(latents, timestep, inputs, cache=cache, ring=cache.rings[0], execution=execution)

    return tracked(model, [latents, timestep, *_tensors(conditions), *_buffers(caches)], run)


def _blocks(work: Workload, execution: Execution) -> Footprint:
    """Memory of blocks alone, without embeddings and head, that run on the memory and then on a block."""
    model, (latents, timestep, conditions) = AvatarDiT(work.model), inputs_of(work)
    caches = caches_of(model, work, conditions=conditions, execution=execution)
    memory = model.embed_memory(conditions, execution.sequence)
    block = model.embed_block(latents, timestep, model.prepare_block(conditions, _span(work)), sequence=execution.sequence)

    def run() -> None:
        model.run_blocks([memory], [model.memory_context(caches[0])])
        model.run_blocks([block], [model.block_context(_span(work), caches[0], caches[0].rings[0])])

    inputs = [leaf for leaf in tree_leaves((memory, block)) if isinstance(leaf, Tensor)]
    return tracked(nn.ModuleList([model.blocks, model.audio_injectors]), [*inputs, *_buffers(caches)], run)


@contextmanager
def fake_world(parallel: ParallelConfig, ranks: int) -> Iterator[World]:
    """Context with a fake process group of `ranks` ranks, of which this process is rank 0. Yields its World."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        with unset_fake_temporarily(), torch.device("cpu"):  # where a mesh counts its ranks
            world = make_world(parallel, parallel.name, fake_gpu())
        yield world
    finally:
        dist.destroy_process_group()


def _vae(work: Workload) -> Footprint:
    """Memory of the autoencoder: it decodes a block of a stream with a full cache, or a clip and its motion frames in float32."""
    family = FAMILIES[work.model.family]
    if family.moves_portrait:
        return Footprint(family.parameters * work.dtype_bytes, vae_bytes(work))
    with made_in(torch.float32 if work.clip_frames else DTYPES[work.dtype_bytes]):
        model = WanAutoencoder()
    rows, columns = work.height // PIXELS_PER_LATENT, work.width // PIXELS_PER_LATENT
    latents = lambda frames: torch.empty(1, 16, frames, rows, columns)  # noqa: E731
    if work.clip_frames:
        return tracked(model, [], lambda: model.decode(latents(PAST_LATENTS + work.latent_frames).float()))
    _, cache = model.decode(latents(WARM_LATENTS))
    held = [each for each in cache if isinstance(each, Tensor)]
    return tracked(model, held, lambda: model.decode(latents(work.latent_frames), cache))


def _combined_peak(work: Workload, transformer: Footprint, vae: Footprint) -> float:
    """Peak bytes of transformer and autoencoder: a stream is decoded while later blocks are denoised, a clip after its denoising."""
    if work.clip_frames:
        return max(transformer.peak + vae.stays, transformer.stays + vae.peak)
    return transformer.peak + vae.peak


def _span(work: Workload) -> BlockSpan:
    return BlockSpan(0, 0, work.latent_frames)


def inputs_of(work: Workload) -> tuple[Tensor, Tensor, Conditions]:
    """Inputs of a forward: latents, timestep, conditions."""
    rows, columns = work.height // PIXELS_PER_LATENT, work.width // PIXELS_PER_LATENT
    channels, model = work.model.trunk.latent_channels, work.model
    conditions = Conditions(
        ref=torch.empty(1, channels, 1, rows, columns),
        text=torch.empty(1, model.text.text_len, model.text.text_dim),
        audio=torch.empty(1, model.audio.num_audio_layers, model.audio.audio_dim, FRAMES_PER_LATENT * work.latent_frames),
        motion=torch.empty(1, channels, PAST_LATENTS, rows, columns) if work.motion else None,
    )
    return torch.empty(1, channels, work.latent_frames, rows, columns, dtype=torch.float32), torch.zeros(1), conditions


def caches_of(model: AvatarDiT, work: Workload, *, conditions: Conditions, execution: Execution) -> list[KVCache]:
    """The KV caches of a stream, one for each guidance pass; none for clips."""
    passes = 0 if work.clip_frames else work.passes
    return [model.new_cache(conditions, steps=work.steps, execution=execution) for _ in range(passes)]


def _buffers(caches: Sequence[KVCache]) -> list[Tensor]:
    """Every buffer of these KV caches."""
    rings = [part for cache in caches for ring in cache.rings for part in (ring.keys, ring.values)]
    return [buffer for by_layer in (*rings, *(cache.ref_keys for cache in caches)) for buffer in by_layer.values()]


def _tensors(conditions: Conditions) -> list[Tensor]:
    return [value for value in vars(conditions).values() if value is not None]


def tracked(module: nn.Module, stays: Sequence[Tensor], run: Callable[[], object]) -> Footprint:
    """Memory of a module, of the tensors `stays`, and of a call of `run`."""
    ledger = Ledger()
    ledger.track_external(module, *stays)
    with ledger:
        before = ledger.total("current")
        run()
    return Footprint(before, ledger.total("peak"))
