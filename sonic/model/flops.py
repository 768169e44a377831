"""How much arithmetic a forward takes, counted from the config, and how fast this machine does it."""

from __future__ import annotations

import time
from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

from sonic.config import ModelConfig
from sonic.geometry import FRAMES_PER_LATENT
from sonic.model.dit import AvatarDiT
from sonic.model.embed import motion_places
from sonic.types import Conditions

Grid = tuple[int, int]  # rows and columns of patches


def forward_multiply_adds(config: ModelConfig, latent_frames: int, grid: Grid, *, motion: bool = False) -> int:
    """Multiply-adds of `AvatarDiT.forward` on one clip with pose and audio; norms and activations are not counted."""
    noisy, memory = latent_frames * prod(grid), memory_tokens(config, grid, motion=motion)
    text, dim = config.text, config.trunk.hidden_dim
    every = noisy + memory
    layers = config.trunk.num_layers * (_layer(config, every, keys=every) + 2 * text.text_len * dim**2)
    embedding = text.text_len * dim * (text.text_dim + dim) + _time(config, levels=2) + _memory_embedding(config, grid, motion=motion)
    patches = 2 * noisy * _patch(config)  # latents and pose
    return patches + embedding + layers + _audio(config, latent_frames) + _injectors(config, latent_frames, grid) + noisy * _patch(config)


def block_multiply_adds(config: ModelConfig, grid: Grid, *, blocks: int, motion: bool = False) -> int:
    """Multiply-adds of one `denoise_block` with `blocks` blocks in its ring (itself included)."""
    frames = config.rollout.block_frames
    noisy = frames * prod(grid)
    keys = memory_tokens(config, grid, motion=motion) + blocks * noisy
    layers = config.trunk.num_layers * _layer(config, noisy, keys=keys)
    return 2 * noisy * _patch(config) + _time(config, levels=1) + layers + _injectors(config, frames, grid)


def memory_tokens(config: ModelConfig, grid: Grid, *, motion: bool) -> int:
    """Tokens of the reference, and of the past when there is one."""
    return prod(grid) + (len(motion_places(config.motion.buckets, *grid)[0]) if motion else 0)


@torch.no_grad()
def gemm_fraction(config: ModelConfig, dtype: torch.dtype, *, latent_frames: int = 12, side: int = 24, repeats: int = 8) -> float:
    """The rate of one `AvatarDiT.forward` on a clip, as a share of a plain matrix product's in the same dtype and run.

    The clip is `side` latents high and wide. Best of `repeats` for both, taken in turns; the product is the faster of a
    square one and one of the forward's own shape.
    """
    grid = tuple(side // step for step in config.trunk.patch_size[1:])
    forward = _clip_forward(config, dtype, shape=(latent_frames, side, side))
    shapes = [(2048, 2048, 2048), (latent_frames * prod(grid), config.trunk.hidden_dim, config.trunk.ffn_dim)]
    products = [_product(*shape, dtype=dtype) for shape in shapes]
    forward_s, product_s = [], [[] for _ in products]
    for _ in range(repeats):
        forward_s.append(_seconds(forward))
        for times, product in zip(product_s, products, strict=True):
            times.append(_seconds(product))
    fastest = max(prod(shape) / min(times) for shape, times in zip(shapes, product_s, strict=True))
    return forward_multiply_adds(config, latent_frames, grid) / min(forward_s) / fastest


def _clip_forward(config: ModelConfig, dtype: torch.dtype, *, shape: tuple[int, int, int]) -> Callable[[], Tensor]:
    """A forward of a model of random weights on a clip of zeros."""
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


def _layer(config: ModelConfig, tokens: int, *, keys: int) -> int:
    """One block without the prompt's keys and values."""
    dim = config.trunk.hidden_dim
    projections = 6 * tokens * dim**2  # self q, k, v, out; text q, out
    return projections + 2 * tokens * dim * (keys + config.text.text_len) + 2 * tokens * dim * config.trunk.ffn_dim


def _injectors(config: ModelConfig, frames: int, grid: Grid) -> int:
    dim, heard = config.trunk.hidden_dim, config.audio.num_audio_token + 1
    noisy = frames * prod(grid)
    one = 2 * noisy * dim**2 + 2 * frames * heard * dim**2 + 2 * noisy * heard * dim + 2 * frames * dim**2
    return len(config.audio.inject_layers) * one


def _audio(config: ModelConfig, frames: int) -> int:
    """The audio encoder on one clip, its one repeated column in front included."""
    dim, audio = config.trunk.hidden_dim, config.audio
    columns = [1 + FRAMES_PER_LATENT * frames]
    columns += [-(-columns[-1] // 2)]
    columns += [-(-columns[-1] // 2)]
    branches = audio.num_audio_token + 1
    first = columns[0] * 3 * audio.audio_dim * branches * (dim // 4)
    shrink = branches * 3 * (columns[1] * (dim // 4) * (dim // 2) + columns[2] * (dim // 2) * dim)
    return first + shrink + columns[2] * dim**2


def _time(config: ModelConfig, *, levels: int) -> int:
    dim = config.trunk.hidden_dim
    return levels * (config.trunk.freq_dim * dim + 7 * dim**2)


def _patch(config: ModelConfig) -> int:
    """Embedding one patch, or projecting it back."""
    return config.trunk.latent_channels * prod(config.trunk.patch_size) * config.trunk.hidden_dim


def _memory_embedding(config: ModelConfig, grid: Grid, *, motion: bool) -> int:
    packed = 0
    if motion:
        for bucket, scale in zip(config.motion.buckets, (1, 2, 4), strict=True):
            tokens = (bucket // scale) * (grid[0] // scale) * (grid[1] // scale)
            packed += tokens * scale**3 * _patch(config)
    return prod(grid) * _patch(config) + packed
