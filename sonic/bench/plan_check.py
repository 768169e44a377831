"""Runs a published model with random weights under a plan, and compares memory and time with the planner's estimate."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sonic.checkpoint.lora import NO_LORA
from sonic.config import Ranks, precision_of
from sonic.families import FAMILIES
from sonic.geometry import FRAMES_PER_LATENT, GIB, PIXELS_PER_LATENT
from sonic.inference.choose_plan import Estimate, choose_plan
from sonic.inference.components import DTYPES, find_device
from sonic.inference.distributed_rollout import shutdown, worker_loop
from sonic.inference.generate_wan import EncodedInputs, Vae, WanNetworks, generate_blocks, generate_clips
from sonic.inference.infer_config import BenchConfig, InferConfig, PlanChoiceConfig
from sonic.inference.stream import prefetch
from sonic.model.dit import AvatarDiT
from sonic.parallel.context import DistributedContext, context_of
from sonic.parallel.mesh import open_world
from sonic.parallel.parallelize import build_parallel_model
from sonic.parallel.vae_rank import RemoteAutoencoder, serve_vae
from sonic.planner.step_time import TERA
from sonic.planner.workload import Workload, workload
from sonic.types import LatentBlock
from sonic.vae.wan_vae import WanAutoencoder

PRODUCT_S = 0.5  # seconds for which the plain matrix product is repeated


def bench_fit(config: BenchConfig, begun: float, *, ranks: Ranks) -> dict:
    """Estimate and measurement of `config.fit.blocks` blocks or clips after `config.fit.warm_blocks`; {} on all ranks but the first.

    `seconds_per_step` is one forward pass of a block. TFLOP/s are the sum over all ranks, of denoising alone; the share is relative
    to a plain matrix product of the model's MLP shape on the first rank in the same run.
    """
    if FAMILIES[config.model.family].moves_portrait:
        raise ValueError(f"bench fit times published models, not model={config.model.name}; use model=live_avatar_14b, or bench preview")
    device = find_device(config.run.device, ranks.local_rank if ranks.world > 1 else None)
    _cap(config.fit.cap_gib, device)
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    asked = InferConfig(run=config.run, model=config.model, sampler=config.sampler, video=config.video, decode=config.decode,
                        parallel=config.parallel, hardware=config.hardware, plan=PlanChoiceConfig(config.fit.force))  # fmt: skip
    estimated = choose_plan(asked, ranks, device, trained=False)
    with open_world(estimated.plan.parallel, ranks, device) as world:
        dtype, context = _dtype(config), context_of(world, estimated.plan.parallel)
        model = build_parallel_model(config.model, None, context, lora=NO_LORA, dtype=dtype)
        loaded = time.perf_counter() - begun
        if world.leads:
            vae = RemoteAutoencoder(context.vae_channel) if world.vae_rank else _vae(config, device)
            figures = _figures(config, model, vae, estimated=estimated, context=context)
            shutdown(context)
        elif world.holds_vae:
            serve_vae(_vae(config, device), context.vae_channel)
        else:
            worker_loop(model, context, dtype)
        estimated.measure(world)
        if not world.leads:
            return {}
    return {**estimated.as_json(), **figures, "load_s": round(loaded, 2), "ranks": ranks.world, "device": _name(device)}


def _vae(config: BenchConfig, device: torch.device) -> WanAutoencoder | Undecoded:
    """The VAE that decodes on this rank, or the placeholder."""
    return WanAutoencoder().to(device, _dtype(config)) if config.fit.vae else Undecoded()


def _dtype(config: BenchConfig) -> torch.dtype:
    return DTYPES[precision_of(config.run.dtype, config.model)]


def _figures(config: BenchConfig, model: AvatarDiT, vae: Vae | Undecoded, *, estimated: Estimate, context: DistributedContext) -> dict:
    """Times of the blocks or clips, as measured on the first rank."""
    work, device = workload(estimated.config), context.world.device
    denoised: list[float] = []  # seconds of each block or clip
    ends = [time.perf_counter() for _ in _hand_overs(config, model, vae, work=work, denoised=denoised, context=context)]
    seconds = (ends[-1] - ends[config.fit.warm_blocks - 1]) / config.fit.blocks
    step = sum(denoised[config.fit.warm_blocks :]) / config.fit.blocks / (work.steps * work.passes)
    rate, product = work.forward_flops / step / TERA, product_tflops(work, device)
    numbers = f"{config.fit.warm_blocks} + {config.fit.blocks} times {work.frames} frames"
    return {
        "seconds_per_block": round(seconds, 4),
        "seconds_per_step": round(step, 5),
        "frames_per_second": round(work.frames / seconds, 3),
        "tflops": float(f"{rate:.4g}"),
        "product_tflops": float(f"{product:.4g}"),
        "gemm_share": round(rate / product, 3),
        "video": f"{work.width}x{work.height}, {work.steps} steps, {numbers}",
    }


def _hand_overs(
    config: BenchConfig, model: AvatarDiT, vae: Vae | Undecoded, *, work: Workload, denoised: list[float], context: DistributedContext
) -> Iterator[Tensor]:
    """Generate all blocks or clips from random inputs as inference does; yields frames and appends the seconds of each to `denoised`."""
    device, networks = context.world.device, WanNetworks(model, vae, context)
    encoded = _random_inputs(work, config.fit.blocks + config.fit.warm_blocks, device=device)

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        _settle(device)
        if name == "denoise":
            denoised.append(time.perf_counter() - begun)

    def timed(blocks: Iterator[LatentBlock]) -> Iterator[LatentBlock]:
        begun = time.perf_counter()
        for block in blocks:
            _settle(device)
            denoised.append(time.perf_counter() - begun)
            yield block
            begun = time.perf_counter()

    if work.clip_frames:
        return generate_clips(networks, encoded, sampler=config.sampler, stage=stage)
    online = lambda blocks: prefetch(timed(blocks), config.decode.queue, name="denoise")  # noqa: E731
    return generate_blocks(networks, encoded, sampler=config.sampler, hand_over=online)


class Undecoded(nn.Module):
    """Placeholder for the VAE when the transformer is timed alone: encodes to zeros and decodes to no frames."""

    def encode(self, frames: Tensor, cache: object = None) -> tuple[Tensor, object]:
        """Frames [B,3,1+4k,H,W] -> latents [B,16,1+k,H/8,W/8]"""
        batch, _, count, height, width = frames.shape
        rows, columns = height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT
        return frames.new_zeros(batch, 16, 1 + (count - 1) // FRAMES_PER_LATENT, rows, columns), cache

    def decode(self, latents: Tensor, cache: object = None) -> tuple[Tensor, object]:
        """Zero frames."""
        return latents[:, :, :0], cache


def _random_inputs(work: Workload, hand_overs: int, *, device: torch.device) -> EncodedInputs:
    """Random inputs for a model of this size."""
    rng, model = torch.Generator().manual_seed(0), work.model
    drawn = lambda *shape: torch.randn(*shape, generator=rng).to(device)  # noqa: E731
    text = drawn(1, model.text.text_len, model.text.text_dim)
    audio = drawn(1, model.audio.num_audio_layers, model.audio.audio_dim, work.frames * hand_overs)
    picture = drawn(1, 3, work.height, work.width).tanh()
    return EncodedInputs(picture, text, torch.zeros_like(text), audio, clip_frames=work.clip_frames or work.frames)


def product_tflops(work: Workload, device: torch.device) -> float:
    """TFLOP/s of the MLP's first matrix product on the tokens of a block or clip."""
    trunk, dtype = work.model.trunk, {2: torch.bfloat16, 4: torch.float32}[work.dtype_bytes]
    left = torch.ones(work.tokens, trunk.hidden_dim, device=device, dtype=dtype)
    right = torch.ones(trunk.hidden_dim, trunk.ffn_dim, device=device, dtype=dtype)
    best, until = float("inf"), time.perf_counter() + PRODUCT_S
    while time.perf_counter() < until:
        start = time.perf_counter()
        left @ right
        _settle(device)
        best = min(best, time.perf_counter() - start)
    return 2 * work.tokens * trunk.hidden_dim * trunk.ffn_dim / best / TERA


def _cap(gib: float, device: torch.device) -> None:
    """Limit this process to `gib` of its GPU's memory, which it may share with other ranks."""
    if gib and device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory / GIB
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib / whole), device)


def _settle(device: torch.device) -> None:
    """Wait until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
