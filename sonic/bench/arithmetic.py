"""Arithmetic throughput of a forward pass on this machine, relative to a plain matrix product."""

from __future__ import annotations

import time
from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

from sonic.config import ModelConfig
from sonic.geometry import FRAMES_PER_LATENT
from sonic.model.counts import forward_multiply_adds
from sonic.model.dit import AvatarDiT
from sonic.types import Conditions

SETTLED = 6.0  # seconds of measuring, long enough for some undisturbed forward passes on a shared machine


@torch.no_grad()
def gemm_fraction(config: ModelConfig, dtype: torch.dtype, *, latent_frames: int = 12, side: int = 24, repeats: int = 8) -> float:
    """Throughput of `AvatarDiT.forward` on a clip, as a share of that of a plain matrix product in the same dtype and run.

    The clip is `side` latents high and wide. Both are timed in turns, at least `repeats` times and for SETTLED seconds, and the best
    time of each counts; the product is the faster of a square one and one of the model's MLP shape.
    """
    grid = tuple(side // step for step in config.trunk.patch_size[1:])
    forward = _clip_forward(config, dtype, shape=(latent_frames, side, side))
    shapes = [(2048, 2048, 2048), (latent_frames * prod(grid), config.trunk.hidden_dim, config.trunk.ffn_dim)]
    products = [_product(*shape, dtype=dtype) for shape in shapes]
    forward_s, product_s = [], [[] for _ in products]
    begun = time.perf_counter()
    while len(forward_s) < repeats or time.perf_counter() - begun < SETTLED:
        forward_s.append(_seconds(forward))
        for times, product in zip(product_s, products, strict=True):
            times.append(_seconds(product))
    fastest = max(prod(shape) / min(times) for shape, times in zip(shapes, product_s, strict=True))
    return forward_multiply_adds(config, latent_frames, grid) / min(forward_s) / fastest


def _clip_forward(config: ModelConfig, dtype: torch.dtype, *, shape: tuple[int, int, int]) -> Callable[[], Tensor]:
    """A forward pass of a model with random weights on a clip of zeros."""
    model = AvatarDiT(config).to(dtype).eval()
    latents = torch.zeros(1, config.trunk.latent_channels, *shape, dtype=dtype)
    audio = torch.zeros(1, config.audio.num_audio_layers, config.audio.audio_dim, FRAMES_PER_LATENT * shape[0])
    conditions = Conditions(ref=latents[:, :, :1], text=torch.zeros(1, 1, config.text.text_dim), audio=audio, pose=latents)
    return lambda: model(latents, torch.full((1,), 500.0), conditions)


def _product(rows: int, inner: int, columns: int, *, dtype: torch.dtype) -> Callable[[], Tensor]:
    left, right = torch.ones(rows, inner, dtype=dtype), torch.ones(inner, columns, dtype=dtype)
    return lambda: left @ right


def _seconds(work: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
