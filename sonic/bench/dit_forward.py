"""Times one forward pass of a medium model on a whole clip, beside the matrix products and attentions that it consists of."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from sonic.config import AudioConfig, ModelConfig, TextConfig, TrunkConfig
from sonic.evaluation.metrics import peak_rss_gib
from sonic.geometry import FRAMES_PER_LATENT
from sonic.inference.infer_config import BenchConfig
from sonic.model.attention import sdpa
from sonic.model.counts import PACK_SCALES, Grid, memory_tokens, packed_tokens, weights
from sonic.model.cpu import linear
from sonic.model.dit import AvatarDiT
from sonic.types import Conditions

# 8·192 noisy tokens, 192 of the reference, 288 of the past: 2016; 49.5 M weights
MEDIUM = ModelConfig(
    name="dit_medium",
    trunk=TrunkConfig(hidden_dim=512, ffn_dim=2048, num_heads=8, num_layers=8, patch_size=[1, 2, 2]),
    audio=AudioConfig(audio_dim=1024, num_audio_layers=25, num_audio_token=4, inject_layers=[0, 2, 4, 6]),
    text=TextConfig(4096, 512),
)
LATENT_FRAMES, LATENT_SIZE, PAST_LATENTS = 8, (24, 32), 19
THREADS = 2
ROUNDS = 3  # forward passes per repeat
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Work = Callable[[], object]


class Product(NamedTuple):
    """A linear layer on `rows` rows."""

    rows: int
    inner: int
    outer: int

    @property
    def multiply_adds(self) -> int:
        """Number of multiply-adds."""
        return prod(self)


class AttentionProduct(NamedTuple):
    """Attention of `queries` to `keys`: `dim` channels in `heads` heads, `batch` times."""

    batch: int
    queries: int
    keys: int
    dim: int
    heads: int

    @property
    def multiply_adds(self) -> int:
        """Number of multiply-adds of both products."""
        return 2 * self.batch * self.queries * self.keys * self.dim


def bench_dit(config: BenchConfig, begun: float) -> dict:
    """Milliseconds of a forward pass and of its floor (its bare matrix products and attentions) in both precisions on 2 threads, and
    the process's peak memory.

    Forward and floor are timed in turns; the fastest round of each counts.
    """
    torch.set_num_threads(config.run.threads or THREADS)
    grid = tuple(side // step for side, step in zip(LATENT_SIZE, MEDIUM.trunk.patch_size[1:], strict=True))
    forwards = {name: medium_forward(dtype) for name, dtype in DTYPES.items()}
    for forward in forwards.values():
        forward()
    memory = peak_rss_gib()  # before the floor allocates its matrices
    floors = {name: floor(MEDIUM, LATENT_FRAMES, grid, dtype=dtype) for name, dtype in DTYPES.items()}
    jobs = {f"{name}{kind}_ms": made[name] for kind, made in (("", forwards), ("_floor", floors)) for name in DTYPES}
    spent: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(ROUNDS * config.repeats):
        for name, job in jobs.items():
            spent[name].append(_milliseconds(job))
    fastest = {name: round(min(times), 1) for name, times in spent.items()}
    ratios = {f"{name}_over_floor": round(fastest[f"{name}_ms"] / fastest[f"{name}_floor_ms"], 3) for name in DTYPES}
    tokens = LATENT_FRAMES * prod(grid) + memory_tokens(MEDIUM, grid, motion=True)
    model = f"{weights(MEDIUM) / 1e6:.1f} M weights, {tokens} tokens, {len(spent['fp32_ms'])} rounds"
    return {**fastest, **ratios, "peak_rss_gib": round(memory, 3), "model": model, "seconds": round(time.perf_counter() - begun, 1)}


def medium_forward(dtype: torch.dtype) -> Work:
    """A forward pass with motion, pose, audio and text; weights and inputs are random."""
    rng = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float32).to(dtype)  # noqa: E731
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AvatarDiT(MEDIUM).to(dtype).eval().requires_grad_(False)
    for weight in model.parameters():
        weight.add_(0.02 * draw(*weight.shape))
    channels, audio, text = MEDIUM.trunk.latent_channels, MEDIUM.audio, MEDIUM.text
    latents, timestep = draw(1, channels, LATENT_FRAMES, *LATENT_SIZE), torch.full((1,), 500.0)
    conditions = Conditions(
        ref=draw(1, channels, 1, *LATENT_SIZE),
        motion=draw(1, channels, PAST_LATENTS, *LATENT_SIZE),
        pose=draw(*latents.shape),
        audio=draw(1, audio.num_audio_layers, audio.audio_dim, FRAMES_PER_LATENT * LATENT_FRAMES),
        text=draw(1, text.text_len, text.text_dim),
    )
    return torch.no_grad()(lambda: model(latents, timestep, conditions))


def floor(config: ModelConfig, latent_frames: int, grid: Grid, *, dtype: torch.dtype) -> Work:
    """A function that runs all matrix products and attentions of such a forward pass, and nothing else."""
    ones: dict[tuple[int, ...], Tensor] = {}
    jobs: list[Work] = []
    for job in needed(config, latent_frames, grid):
        if isinstance(job, Product):
            rows = ones.setdefault((job.rows, job.inner), torch.rand(job.rows, job.inner, dtype=dtype))
            weight, bias = torch.rand(job.outer, job.inner, dtype=dtype), torch.rand(job.outer, dtype=dtype)  # one each, as in a model
            jobs.append(lambda rows=rows, weight=weight, bias=bias: linear(rows, weight, bias))
        else:
            sides = [(job.batch, length, job.heads, job.dim // job.heads) for length in (job.queries, job.keys)]
            queries, keys = (ones.setdefault(side, torch.rand(side, dtype=dtype)) for side in sides)
            jobs.append(lambda queries=queries, keys=keys: sdpa(queries, keys, keys))

    @torch.no_grad()
    def run() -> None:
        for job in jobs:
            job()

    return run


def needed(config: ModelConfig, latent_frames: int, grid: Grid) -> Iterator[Product | AttentionProduct]:
    """Products and attentions of a forward pass on a clip with motion, pose, audio and text, as counted by
    `counts.forward_multiply_adds`."""
    trunk, text, audio, dim = config.trunk, config.text, config.audio, config.trunk.hidden_dim
    frame, patch = prod(grid), trunk.latent_channels * prod(trunk.patch_size)
    query_tokens = latent_frames * frame
    tokens = query_tokens + memory_tokens(config, grid, motion=True)
    yield from [Product(query_tokens, patch, dim)] * 2
    yield Product(frame, patch, dim)
    for count, scale in zip(packed_tokens(config, grid), PACK_SCALES, strict=True):
        yield Product(count, patch * scale**3, dim)
    yield from (Product(2, trunk.freq_dim, dim), Product(2, dim, dim), Product(2, dim, 6 * dim))
    yield from (Product(text.text_len, text.text_dim, dim), Product(text.text_len, dim, dim))
    yield from _audio_products(config, latent_frames)
    for layer in range(trunk.num_layers):
        yield from [Product(tokens, dim, dim)] * 4
        yield AttentionProduct(1, tokens, tokens, dim, trunk.num_heads)
        yield from [Product(tokens, dim, dim)] * 2
        yield from [Product(text.text_len, dim, dim)] * 2
        yield AttentionProduct(1, tokens, text.text_len, dim, trunk.num_heads)
        yield from (Product(tokens, dim, trunk.ffn_dim), Product(tokens, trunk.ffn_dim, dim))
        if layer in audio.inject_layers:
            audio_tokens = audio.num_audio_token + 1
            yield from [Product(query_tokens, dim, dim)] * 2
            yield from [Product(latent_frames * audio_tokens, dim, dim)] * 2
            yield Product(latent_frames, dim, 2 * dim)
            yield AttentionProduct(latent_frames, frame, audio_tokens, dim, trunk.num_heads)
    yield Product(query_tokens, dim, patch)


def _audio_products(config: ModelConfig, latent_frames: int) -> Iterator[Product]:
    """Products of the audio encoder: two branches, each downsampled twice."""
    dim, audio = config.trunk.hidden_dim, config.audio
    columns = [1 + FRAMES_PER_LATENT * latent_frames]
    for _ in range(2):
        columns.append(-(-columns[-1] // 2))
    for branches in (audio.num_audio_token, 1):
        yield Product(columns[0], 3 * audio.audio_dim, branches * dim // 4)
        yield Product(branches * columns[1], 3 * dim // 4, dim // 2)
        yield Product(branches * columns[2], 3 * dim // 2, dim)
    yield Product(columns[2], dim, dim)


def _milliseconds(job: Work) -> float:
    start = time.perf_counter()
    job()
    return 1000 * (time.perf_counter() - start)
