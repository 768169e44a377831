"""Runs a published model with random weights under a plan, and compares memory and time with the planner's estimate."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sonic.config import ModelConfig, Ranks
from sonic.families import FAMILIES
from sonic.families.wan import Wan, vae_dtype
from sonic.geometry import FRAMES_PER_LATENT, GIB, PIXELS_PER_LATENT
from sonic.inference.batch import open_components
from sonic.inference.components import Components, find_device
from sonic.inference.generate_wan import EncodedInputs
from sonic.inference.infer_config import BenchConfig, FitConfig, InferConfig, PlanChoiceConfig
from sonic.inference.inputs import Settings
from sonic.inference.report import StageTimer
from sonic.parallel.context import DistributedContext
from sonic.planner.step_time import TERA
from sonic.planner.workload import Workload, size_for, workload
from sonic.system.device_stream import HOST, DeviceStream
from sonic.types import Inputs, Portrait, Speech
from sonic.vae.wan_vae import WanAutoencoder

PRODUCT_S = 0.5  # seconds for which the plain matrix product is repeated


def bench_fit(config: BenchConfig, begun: float, *, ranks: Ranks) -> dict:
    """Estimate and measurement of `config.fit.blocks` blocks or clips after `config.fit.warm_blocks`; {} on all ranks but the first.

    `seconds_per_step` is one forward pass of a block. TFLOP/s are the sum over all ranks, of denoising alone; the share is relative
    to a plain matrix product of the model's MLP shape on the first rank in the same run.
    """
    if not FAMILIES[config.model.family].times_transformer:
        raise ValueError(
            f"bench fit times published transformers, not model={config.model.name}; use model=live_avatar_14b, or bench preview"
        )
    device = find_device(config.run.device, ranks.local_rank if ranks.world > 1 else None)
    _cap(config.fit.cap_gib, device)
    same = {name: getattr(config, name) for name in ("run", "model", "sampler", "video", "parallel", "hardware")}
    asked = InferConfig(**same, decode=replace(config.decode, online=True), plan=PlanChoiceConfig(config.fit.force))
    family = RandomWan(decodes=config.fit.vae)
    with open_components(asked, ranks, family=family) as opened:
        opened.components.load()
        loaded = time.perf_counter() - begun
        opened.serve()
        work = workload(opened.estimate.config)
        figures = _figures(family, opened.components, asked, work=work, fit=config.fit) if opened.world.leads else {}
    if not figures:
        return {}
    return {**opened.estimate.as_json(), **figures, "load_s": round(loaded, 2), "ranks": ranks.world, "device": _name(device)}


def _figures(family: RandomWan, components: Components, config: InferConfig, *, work: Workload, fit: FitConfig) -> dict:
    """Times of the blocks or clips, as measured on the first rank."""
    timer, warm = HandOverTimer(components.device), fit.warm_blocks
    ends = hand_overs(family, components, config, num_frames=work.frames * (warm + fit.blocks), timer=timer)
    seconds = (ends[-1] - ends[warm - 1]) / fit.blocks
    step = sum(timer.denoised[warm : warm + fit.blocks]) / fit.blocks / (work.steps * work.passes)
    rate, product = work.forward_flops / step / TERA, product_tflops(work, components.device)
    numbers = f"{warm} + {fit.blocks} times {work.frames} frames"
    return {
        "seconds_per_block": round(seconds, 4),
        "seconds_per_step": round(step, 5),
        "frames_per_second": round(work.frames / seconds, 3),
        "tflops": float(f"{rate:.4g}"),
        "product_tflops": float(f"{product:.4g}"),
        "gemm_share": round(rate / product, 3),
        "video": f"{work.width}x{work.height}, {work.steps} steps, {numbers}",
    }


def hand_overs(family: RandomWan, components: Components, config: InferConfig, *, num_frames: int, timer: StageTimer) -> list[float]:
    """The time.perf_counter() at which the frames of each block or clip of a video of random inputs were in host memory."""
    settings, (width, height) = Settings(config), size_for(config.model, config.video)
    inputs = Inputs(Portrait(np.zeros((height, width, 3), np.uint8)), Speech(np.zeros(0, np.float32)), num_frames)
    encoded = family.condition(inputs, components, settings)
    return [time.perf_counter() for _ in family.generate(inputs, encoded, components, settings=settings, timer=timer)]


class RandomWan(Wan):
    """The published models with random weights and random encoded inputs; with `decodes=False` without a VAE, otherwise with one of the
    shape `vae` (diffusers' names; empty = the published one)."""

    def __init__(self, *, decodes: bool, vae: Mapping[str, Any] | None = None) -> None:
        self.decodes, self.vae = decodes, vae

    def settled_model(self, config: ModelConfig) -> ModelConfig:
        """The config itself."""
        return config

    def transformer_weights(self, config: ModelConfig) -> None:
        """None: the weights are random."""

    def weights_in_words(self, config: ModelConfig, steps: int) -> str:
        """The word that stands for the files."""
        return "random"

    def components(self, config: ModelConfig, context: DistributedContext, dtype: torch.dtype) -> Components:
        """The VAE with random weights, or its placeholder."""

        def make_autoencoder() -> WanAutoencoder | Undecoded:
            return WanAutoencoder(self.vae).to(context.world.device, vae_dtype(config, dtype)) if self.decodes else Undecoded()

        return Components(config, context, make_autoencoder, dtype=dtype)

    def condition(self, inputs: Inputs, components: Components, settings: Settings) -> EncodedInputs:
        """Random features of text and audio, and a grey portrait."""
        rng, text, audio = torch.Generator().manual_seed(0), components.config.text, components.config.audio
        words = torch.randn(1, text.text_len, text.text_dim, generator=rng).to(components.device)
        features = torch.randn(1, audio.num_audio_layers, audio.audio_dim, inputs.num_frames, generator=rng).to(components.device)
        picture = torch.zeros(1, 3, *inputs.portrait.pixels.shape[:2], device=components.device)
        return EncodedInputs(picture, words, torch.zeros_like(words), features, clip_frames=settings.config.video.infer_frames)


class HandOverTimer(StageTimer):
    """A timer that waits for the device at the end of every stage, and keeps the seconds of each block or clip in `denoised`."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.denoised = device, []

    @contextmanager
    def stage(self, name: str, stream: DeviceStream = HOST) -> Iterator[None]:
        """Add the time inside the `with` block, and what the device does after it, to a stage."""
        before = self.seconds[name]
        with super().stage(name, stream):
            yield
            _settle(self.device)
        if name == "denoise":
            self.denoised.append(self.seconds[name] - before)


class Undecoded(nn.Module):
    """Placeholder for the VAE when the transformer is timed alone: encodes to zeros and decodes to frames of one pixel."""

    def encode(self, frames: Tensor, cache: object = None) -> tuple[Tensor, object]:
        """Frames [B,3,1+4k,H,W] -> latents [B,16,1+k,H/8,W/8]"""
        batch, _, count, height, width = frames.shape
        rows, columns = height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT
        return frames.new_zeros(batch, 16, 1 + (count - 1) // FRAMES_PER_LATENT, rows, columns), cache

    def decode(self, latents: Tensor, cache: object = None) -> tuple[Tensor, object]:
        """Latents [B,16,T,h,w] -> frames [B,3,4T,1,1]"""
        return latents.new_zeros(len(latents), 3, FRAMES_PER_LATENT * latents.shape[2], 1, 1), cache


def product_tflops(work: Workload, device: torch.device) -> float:
    """TFLOP/s of the MLP's first matrix product on the tokens of a block or clip; of random numbers, because ones take a GPU less power."""
    trunk, dtype = work.model.trunk, {2: torch.bfloat16, 4: torch.float32}[work.dtype_bytes]
    left = torch.randn(work.tokens, trunk.hidden_dim, device=device, dtype=dtype)
    right = torch.randn(trunk.hidden_dim, trunk.ffn_dim, device=device, dtype=dtype)
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
