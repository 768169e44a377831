"""Measures the memory of a plan for a video by running the real model on fake tensors and fake ranks, to check the prediction."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from sonic.geometry import FRAMES_PER_LATENT, PIXELS_PER_LATENT, BlockSpan
from sonic.model.dit import AvatarDiT
from sonic.model.execution import LOCAL, Execution
from sonic.model.kv_cache import KVCache
from sonic.parallel.fsdp import prefetch_in_order, shard
from sonic.parallel.layer_ranges import resident_layers
from sonic.parallel.mesh import World, make_world
from sonic.parallel.parallel_config import HardwareConfig
from sonic.planner.extrapolate import of_all_layers
from sonic.planner.ledger import Ledger, total_bytes
from sonic.planner.memory import GIB, PAST_LATENTS, VAE_NUMBERS, encoder_bytes, frame_bytes, vae_bytes
from sonic.planner.plans import MESSAGES, Plan, token_ranks
from sonic.planner.workload import Workload
from sonic.types import Conditions
from sonic.vae.wan_vae import WanAutoencoder

DTYPES = {4: torch.float32, 2: torch.bfloat16}
FEW_LAYERS = 5  # layers that run; the published models have two audio injectors among them
WARM_LATENTS = 7  # latent frames decoded before the first block


class Footprint(NamedTuple):
    """Memory of a part of a job in bytes: `stays` before it runs, `peak` while it runs."""

    stays: float
    peak: float


def track(work: Workload, hardware: HardwareConfig, plan: Plan) -> list[dict[str, float]] | None:
    """GiB of every rank of a plan by phase; None for a plan that cannot be tracked."""
    if untracked(hardware, plan):
        return None
    with fake(work):
        transformer = TRACKERS[plan.parallel.name](work, hardware, plan)
        vae = _vae(work)
    first = sum(encoder_bytes(work).values())
    found = []
    for rank, part in zip(plan.ranks, transformer, strict=True):
        sizes = {
            "encode": first * bool(rank["encode"]["speech_encoder"]),
            "generate": _combined_peak(work, part, vae) if rank["generate"]["vae"] else part.peak,
        }
        found.append({phase: size / GIB + hardware.reserve_gib for phase, size in sizes.items()})
    return found


def untracked(hardware: HardwareConfig, plan: Plan) -> str:
    """The reason why a plan cannot be tracked; "" when it can."""
    if plan.parallel.name == "zero3":
        return "zero3 is predicted only, because DeepSpeed does not run on fake ranks"
    return f"{plan.name} is predicted only: ranks share tokens, which fake ranks do not" if token_ranks(plan.parallel, hardware) > 1 else ""


@contextmanager
def fake(work: Workload) -> Iterator[None]:
    """Context in which new tensors are fake, have the job's precision, and record no gradients."""
    with FakeTensorMode(), torch.no_grad(), _made_in(DTYPES[work.dtype_bytes]):
        yield


@contextmanager
def _made_in(dtype: torch.dtype) -> Iterator[None]:
    """Context in which new tensors have this dtype by default; modules of fake tensors cannot be converted later."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class HandOver(nn.Module):
    """Runs prefill and one forward of a block, or the forward of a clip; the forward is repeated `times` times."""

    def __init__(self, model: AvatarDiT, work: Workload, times: int = 1, *, execution: Execution = LOCAL):
        super().__init__()
        self.model, self.work, self.times, self.execution = model, work, times, execution

    def forward(self, latents: Tensor, timestep: Tensor, conditions: Conditions, *, cache: KVCache | None) -> None:
        if cache is not None:
            self.model.prefill(conditions, cache, execution=self.execution)
        for _ in range(self.times):
            if cache is None:
                self.model(latents, timestep, conditions, execution=self.execution)
            else:
                inputs = self.model.prepare_block(conditions, _span(self.work))
                self.model.denoise_block(latents, timestep, inputs, cache=cache, ring=cache.rings[0], execution=self.execution)


def _single(work: Workload, hardware: HardwareConfig, plan: Plan) -> list[Footprint]:
    return [_of_all_layers(work, _whole)]


def _of_all_layers(work: Workload, measure: Callable[[Workload], Footprint]) -> Footprint:
    """Memory of a part with all its layers, extrapolated from runs with few layers."""
    return Footprint(**of_all_layers(work.model, lambda model: measure(replace(work, model=model))._asdict()))


def _whole(work: Workload) -> Footprint:
    """Memory of a complete transformer, with embeddings and head."""
    model = AvatarDiT(work.model)
    latents, timestep, conditions = _inputs(work, like=model.head.modulation)
    caches = [_cache(model, work, like=model.head.modulation) for _ in range(work.passes)]
    stays = [latents, timestep, *_tensors(conditions), *_held(*caches)]
    hand_over = HandOver(model, work)
    return _tracked(model, stays, lambda: hand_over(latents, timestep, conditions, cache=caches[0]))


def _pipeline(work: Workload, hardware: HardwareConfig, plan: Plan) -> list[Footprint]:
    """Memory of every stage: the first is a complete model with fewer blocks, the others are blocks alone. Equal stages run once."""
    incoming = MESSAGES * work.activation_bytes * (len(plan.parallel.layers) > 1)
    parts = [work.with_layers(layers) for layers in plan.ranges]
    known: dict[tuple[int, int], Footprint] = {}

    def middle(part: Workload) -> Footprint:
        kind = part.model.trunk.num_layers, len(part.model.audio.inject_layers)
        if kind not in known:
            known[kind] = _blocks(part)
        return known[kind]

    stages = [_of_all_layers(parts[0], _whole)]
    for layers, part in zip(plan.ranges[1:], parts[1:], strict=True):
        stages.append(_of_all_layers(part, middle) if layers else Footprint(0, work.activation_bytes))
    found = [Footprint(stage.stays + incoming, stage.peak + incoming) for stage in stages]
    if plan.parallel.vae_rank:  # the last rank has no layers; it sends frames to the first rank
        frames = frame_bytes(work)
        first, *others = found[:-1]
        return [Footprint(first.stays + frames, first.peak + frames), *others, Footprint(MESSAGES * frames, MESSAGES * frames)]
    return found


def _offload(work: Workload, hardware: HardwareConfig, plan: Plan) -> list[Footprint]:
    """Memory of two running layers and of everything else on the device: resident weights, KV rings, activations of waiting forwards."""
    options, part = plan.parallel.offload, work.with_layers(range(2))
    model, whole = AvatarDiT(part.model), AvatarDiT(work.model)
    like, inject = model.head.modulation, work.model.audio.inject_layers
    modules = [
        [block] + ([whole.audio_injectors[inject.index(layer)]] if layer in inject else []) for layer, block in enumerate(whole.blocks)
    ]
    sizes = [sum(_bytes(module) for module in layer) for layer in modules]
    number = int(options.resident_gib * GIB // max(sizes))
    stay = sum(sizes[layer] for layer in resident_layers(len(sizes), number)) + options.slots * max(sizes) * (number < len(sizes))
    weights = like.new_empty(max(0, stay - _bytes(model.blocks) - _bytes(model.audio_injectors)), dtype=torch.uint8)
    waiting = [like.new_empty(work.tokens, work.model.trunk.hidden_dim) for _ in range(options.inflight - 1)]
    if work.clip_frames:
        latents, timestep, conditions = _inputs(part, like=like)
        return [_tracked(model, [weights, *waiting], lambda: model(latents, timestep, conditions))]
    if options.kv == "host":  # rings of one layer for the current forward and for the next
        cache = _cache(AvatarDiT(work.with_layers(range(1)).model), work, like=like, steps=2)
    else:
        cache = _cache(whole, work, like=like)
    run = _through_blocks(model, part, cache=cache, layer_of=lambda layer: min(layer, len(cache.ref_keys) - 1))
    return [_tracked(model, [weights, *waiting, *_held(cache)], run)]


def _bytes(module: nn.Module) -> int:
    return sum(weight.numel() * weight.element_size() for weight in module.parameters())


def _fsdp(work: Workload, hardware: HardwareConfig, plan: Plan) -> list[Footprint]:
    """Memory of one rank of a fake group; all ranks are equal. Two forwards run, because prefetching starts with the second.

    Layers run one after the other, so only a few are run; buffers stand for the weight shards and KV rings of the others.
    """
    few = range(min(FEW_LAYERS, work.model.trunk.num_layers))
    part, dtype = work.with_layers(few), DTYPES[work.dtype_bytes]
    with fake_world(plan, hardware.devices) as world:
        whole, model = AvatarDiT(work.model), AvatarDiT(part.model)
        latents, timestep, conditions = _inputs(part, like=model.head.modulation)
        caches = [_cache(whole, work, like=latents.to(dtype)) for _ in range(work.passes)]
        elsewhere = [parameter for layer in (*whole.blocks, *whole.audio_injectors) for parameter in layer.parameters()]
        here = [parameter for layer in (*model.blocks, *model.audio_injectors) for parameter in layer.parameters()]
        slices = latents.new_empty(_slices(elsewhere, world) - _slices(here, world), dtype=dtype)
        cache = _cache(model, part, like=latents.to(dtype))
        rings = _bytes_of(_held(*caches)) - _bytes_of(_held(cache))
        prompts = 2 * work.model.text.text_len * work.token_bytes * (work.passes * work.model.trunk.num_layers - len(few)) * bool(caches[0])
        held = [slices, latents.new_empty(rings + prompts, dtype=torch.uint8)]
        shard(model, world, plan.parallel)
        waiting = _bytes_of([slices, *_local_parts(model)]) if plan.parallel.cpu_offload else 0  # in host memory
        hand_over = HandOver(model, part, times=2, execution=prefetch_in_order(model, world, plan.parallel))
        fully_shard(hand_over, mesh=world.rollout_mesh)  # has no parameters of its own; FSDPMemTracker requires an FSDP root
        tracker = FSDPMemTracker(hand_over)
        tracker.track_inputs((latents, timestep, *_tensors(conditions), *held, *_held(cache)))
        with tracker:
            before = total_bytes(tracker, "current")
            hand_over(latents, timestep, conditions, cache=cache)
        return [Footprint(before - waiting, total_bytes(tracker, "peak") - waiting)] * len(plan.ranks)


def _slices(parameters: Sequence[nn.Parameter], world: World) -> int:
    """Number of elements that one rank stores of parameters that are sharded along their first axis."""
    ranks = world.rollout_mesh.size()
    return sum(-(-parameter.shape[0] // ranks) * (parameter.numel() // parameter.shape[0]) for parameter in parameters)


def _local_parts(model: nn.Module) -> list[Tensor]:
    """This rank's shards of a model's sharded parameters."""
    return [parameter.to_local() for parameter in model.parameters() if isinstance(parameter, DTensor)]


TRACKERS: dict[str, Callable[[Workload, HardwareConfig, Plan], list[Footprint]]] = {
    "single": _single,
    "fsdp": _fsdp,
    "pipeline": _pipeline,
    "offload": _offload,
}


@contextmanager
def fake_world(plan: Plan, ranks: int) -> Iterator[World]:
    """Context with a fake process group of `ranks` ranks, of which this process is rank 0. Yields its World."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        with unset_fake_temporarily():
            world = make_world(plan.parallel, plan.parallel.name, torch.device("cpu"))
        yield world
    finally:
        dist.destroy_process_group()


def _blocks(work: Workload) -> Footprint:
    """Memory of blocks alone, without embeddings and head."""
    model = AvatarDiT(work.model)
    cache = _cache(model, work, like=model.head.modulation)
    run = _through_blocks(model, work, cache=cache, layer_of=lambda layer: layer)
    parts = nn.ModuleList([model.blocks, model.audio_injectors])
    return _tracked(parts, _held(cache), run)


def _through_blocks(model: AvatarDiT, work: Workload, *, cache: KVCache, layer_of: Callable[[int], int]) -> Callable[[], object]:
    """A function that runs the model's blocks on the tokens of one block; layer i uses the KV rings of layer `layer_of(i)`."""
    latents, timestep, conditions = _inputs(work, like=model.head.modulation)
    inputs = model.prepare_block(conditions, _span(work))
    trunk_inputs, _ = model.embed_block(latents, timestep, inputs, sequence=LOCAL.sequence)
    heads = (work.model.trunk.num_heads, work.model.trunk.hidden_dim // work.model.trunk.num_heads)
    for layer in cache.ref_keys:
        cache.text[layer] = tuple(latents.new_empty(1, work.model.text.text_len, *heads, dtype=DTYPES[work.dtype_bytes]) for _ in range(2))
    context = model.block_context(_span(work), cache, cache.rings[0])
    return lambda: model.run_blocks([trunk_inputs], [lambda layer: context(layer_of(layer))])


def _vae(work: Workload) -> Footprint:
    """Memory of the autoencoder: it decodes a block of a stream with a full cache, or a clip and its motion frames in float32."""
    if work.model.autoencoder != "wan":
        return Footprint(VAE_NUMBERS[work.model.autoencoder] * work.dtype_bytes, vae_bytes(work))
    with _made_in(torch.float32 if work.clip_frames else DTYPES[work.dtype_bytes]):
        model = WanAutoencoder()
    rows, columns = work.height // PIXELS_PER_LATENT, work.width // PIXELS_PER_LATENT
    latents = lambda frames: torch.empty(1, 16, frames, rows, columns)  # noqa: E731
    if work.clip_frames:
        return _tracked(model, [], lambda: model.decode(latents(PAST_LATENTS + work.latent_frames).float()))
    _, cache = model.decode(latents(WARM_LATENTS))
    held = [each for each in cache if isinstance(each, Tensor)]
    return _tracked(model, held, lambda: model.decode(latents(work.latent_frames), cache))


def _combined_peak(work: Workload, transformer: Footprint, vae: Footprint) -> float:
    """Peak bytes of transformer and autoencoder: a stream is decoded while later blocks are denoised, a clip after its denoising."""
    if work.clip_frames:
        return max(transformer.peak + vae.stays, transformer.stays + vae.peak)
    return transformer.peak + vae.peak


def _span(work: Workload) -> BlockSpan:
    return BlockSpan(0, 0, work.latent_frames)


def _inputs(work: Workload, *, like: Tensor) -> tuple[Tensor, Tensor, Conditions]:
    """Inputs of a forward: latents, timestep, conditions."""
    rows, columns = work.height // PIXELS_PER_LATENT, work.width // PIXELS_PER_LATENT
    channels, model = work.model.trunk.latent_channels, work.model
    conditions = Conditions(
        ref=like.new_empty(1, channels, 1, rows, columns),
        text=like.new_empty(1, model.text.text_len, model.text.text_dim),
        audio=like.new_empty(1, model.audio.num_audio_layers, model.audio.audio_dim, FRAMES_PER_LATENT * work.latent_frames),
        motion=like.new_empty(1, channels, PAST_LATENTS, rows, columns) if work.motion else None,
    )
    return torch.empty(1, channels, work.latent_frames, rows, columns, dtype=torch.float32), torch.zeros(1), conditions


def _cache(model: AvatarDiT, work: Workload, *, like: Tensor, steps: int | None = None) -> KVCache | None:
    """The KV cache of a stream; None for clips."""
    if work.clip_frames:
        return None
    return model.cache_of((1, *work.grid), steps=steps or work.steps, motion=work.motion, like=like)


def _bytes_of(tensors: Sequence[Tensor]) -> int:
    """Bytes of the tensors' storages; a storage that several tensors share counts once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _held(*caches: KVCache | None) -> list[Tensor]:
    """Every buffer of these KV caches."""
    rings = [buffers for cache in caches if cache for ring in cache.rings for buffers in (ring.keys, ring.values)]
    return [buffer for buffers in (*rings, *(cache.ref_keys for cache in caches if cache)) for buffer in buffers.values()]


def _tensors(conditions: Conditions) -> list[Tensor]:
    return [value for value in vars(conditions).values() if value is not None]


class Job(nn.Module):
    """A function with the module whose weights it uses, as one root module for the tracker."""

    def __init__(self, module: nn.Module, run: Callable[[], object]):
        super().__init__()
        self.module, self.run = module, run

    def forward(self) -> object:
        return self.run()


def _tracked(module: nn.Module, stays: Sequence[Tensor], run: Callable[[], object]) -> Footprint:
    """Memory of a module, of the tensors `stays`, and of a call of `run`."""
    tracker, job = Ledger(), Job(module, run)
    tracker.track_external(job, *stays)
    with tracker:
        before = total_bytes(tracker, "current")
        job()
    return Footprint(before, total_bytes(tracker, "peak"))
