"""Times a forward pass of the transformer beside the matrix products and attentions that it consists of, and beside a plain product."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from math import prod
from timeit import timeit
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sonic.config import AudioConfig, ModelConfig, TextConfig, TrunkConfig
from sonic.evaluation.metrics import peak_rss_gib
from sonic.geometry import FRAMES_PER_LATENT
from sonic.inference.infer_config import BenchConfig
from sonic.model.attention import sdpa
from sonic.model.blocks import set_attention
from sonic.model.counts import forward_multiply_adds, memory_tokens, weights
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
CLIP, PAST_LATENTS = (8, 24, 32), 19  # latent frames, height and width; latent frames of the past
THREADS = 2
ROUNDS = 3  # of dit_medium, per repeat
GEMM_ROUNDS, GEMM_S = 8, 6.0  # long enough for some undisturbed forward passes on a shared machine
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Work = Callable[[], object]


def fastest(jobs: Mapping[str, Work], rounds: int, least_s: float = 0.0) -> dict[str, float]:
    """Seconds of the fastest run of each job, in at least `rounds` rounds that take `least_s` seconds together.

    The jobs run in turns, so that another user of the machine slows all of them, and none finds its data in the cache.
    torch.utils.benchmark repeats one job at a time instead, from which a lone product gains more than a forward.
    """
    best, begun, finished = dict.fromkeys(jobs, float("inf")), time.perf_counter(), 0
    while finished < rounds or time.perf_counter() - begun < least_s:
        for name, job in jobs.items():
            best[name] = min(best[name], timeit(job, number=1))
        finished += 1
    return best


def bench_dit(config: BenchConfig, begun: float) -> dict:
    """Milliseconds of a forward pass and of its floor (its bare matrix products and attentions) in both precisions on 2 threads, and
    the process's peak memory."""
    torch.set_num_threads(config.run.threads or THREADS)
    grid = _grid(MEDIUM, CLIP)
    forwards = {name: ClipForward(MEDIUM, dtype, CLIP, past=PAST_LATENTS) for name, dtype in DTYPES.items()}
    for forward in forwards.values():
        forward()
    memory = peak_rss_gib()  # before the floor allocates its matrices
    jobs = {f"{name}_ms": forward for name, forward in forwards.items()}
    jobs |= {f"{name}_floor_ms": forward.floor() for name, forward in forwards.items()}
    rounds = ROUNDS * config.repeats
    found = {name: round(1000 * seconds, 1) for name, seconds in fastest(jobs, rounds).items()}
    ratios = {f"{name}_over_floor": round(found[f"{name}_ms"] / found[f"{name}_floor_ms"], 3) for name in DTYPES}
    tokens = CLIP[0] * prod(grid) + memory_tokens(MEDIUM, grid, motion=True)
    model = f"{weights(MEDIUM) / 1e6:.1f} M weights, {tokens} tokens, {rounds} rounds"
    return {**found, **ratios, "peak_rss_gib": round(memory, 3), "model": model, "seconds": round(time.perf_counter() - begun, 1)}


def gemm_fraction(config: ModelConfig, dtype: torch.dtype, clip: tuple[int, int, int] = (12, 24, 24)) -> float:
    """Throughput of a forward pass on a clip, as a share of that of a plain matrix product in the same dtype and run.

    The product is the faster of a square one and one of the model's MLP shape.
    """
    grid = _grid(config, clip)
    shapes = [(2048, 2048, 2048), (clip[0] * prod(grid), config.trunk.hidden_dim, config.trunk.ffn_dim)]
    jobs: dict[str, Work] = {"forward": ClipForward(config, dtype, clip)}
    for shape in shapes:
        rows, inner, columns = shape
        jobs[str(shape)] = partial(torch.matmul, torch.randn(rows, inner, dtype=dtype), torch.randn(inner, columns, dtype=dtype))
    seconds = fastest(jobs, GEMM_ROUNDS, GEMM_S)
    rate = max(prod(shape) / seconds[str(shape)] for shape in shapes)
    return forward_multiply_adds(config, clip[0], grid) / seconds["forward"] / rate


class ClipForward:
    """A forward pass on a clip with pose, audio, text, and with `past` latent frames of motion; weights and inputs are random."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, clip: tuple[int, int, int], *, past: int = 0) -> None:
        """`clip` is latent frames, height and width."""
        rng = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(*shape, generator=rng).to(dtype)  # noqa: E731
        self.model = AvatarDiT(config).to(dtype).eval().requires_grad_(False)
        for weight in self.model.parameters():
            weight.add_(0.02 * draw(*weight.shape))
        frames, *size = clip
        channels, audio, text = config.trunk.latent_channels, config.audio, config.text
        self.latents, self.timestep = draw(1, channels, *clip), torch.full((1,), 500.0)
        self.conditions = Conditions(
            ref=draw(1, channels, 1, *size),
            motion=draw(1, channels, past, *size) if past else None,
            pose=draw(1, channels, *clip),
            audio=draw(1, audio.num_audio_layers, audio.audio_dim, FRAMES_PER_LATENT * frames),
            text=draw(1, text.text_len, text.text_dim),
        )

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """The velocity.  -> [1,C,T,H,W]"""
        return self.model(self.latents, self.timestep, self.conditions)

    def floor(self) -> Work:
        """A function that runs all matrix products and attentions of the forward, and nothing else."""
        with Recorder() as recorder:
            set_attention(self.model, recorder.attention)
            self()
            set_attention(self.model, sdpa)
        return torch.no_grad()(lambda: [call() for call in recorder.calls])


class Recorder(TorchFunctionMode):
    """Records the linear layers and attentions that run while it is active. All calls of a shape get the same random input, but each has
    its own weights."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Work] = []
        self._inputs: dict[tuple[int, ...], Tensor] = {}

    def __torch_function__(self, function: Callable, _types: object, *call: Any) -> object:
        args, kwargs = call if len(call) == 2 else (*call, {})  # torch leaves out keywords where there are none
        if function in (F.linear, torch.ops.mkldnn._linear_pointwise):
            x, weight, bias, *_ = args
            self.calls.append(partial(linear, self._like(x), weight, bias))
        return function(*args, **(kwargs or {}))

    def attention(self, *qkv: Tensor) -> Tensor:
        """Torch's attention, recorded.  [B,N,heads,d] -> [B,N,heads,d]"""
        self.calls.append(partial(sdpa, *map(self._like, qkv)))
        return sdpa(*qkv)

    def _like(self, x: Tensor) -> Tensor:
        return self._inputs.setdefault((*x.shape, x.dtype), torch.rand(x.shape, dtype=x.dtype))


def _grid(config: ModelConfig, clip: tuple[int, int, int]) -> tuple[int, int]:
    """Rows and columns of patches."""
    _, rows, columns = config.trunk.patch_size
    return clip[1] // rows, clip[2] // columns
