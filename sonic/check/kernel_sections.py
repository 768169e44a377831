"""Sections of the device check about parts: what is installed, what a forward computes, its kernels, the VAE."""

from __future__ import annotations

import shutil
import subprocess
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sonic.check.figures import Figures
from sonic.check.measure import best_seconds, kernels_of, peak_gib
from sonic.check.random_video import forward_of, random_model, release
from sonic.check.shapes import Case
from sonic.geometry import GIB, PIXELS_PER_LATENT
from sonic.inference.report import versions
from sonic.model.attention import sdpa
from sonic.model.embed import grid_positions, rotate, rotation
from sonic.planner.memory import vae_bytes
from sonic.planner.step_time import TERA
from sonic.vae.wan_vae import WanAutoencoder

LAYERS = 4  # of the model whose forward is compared with other kinds of numbers
PORTION = (384, 256)  # width and height of that forward, which a CPU computes too
NO_GPU = "this is a CPU"
BACKENDS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
WAYS = {  # of the VAE: precision, TF32 in its convolutions, layout of weights and frames
    "bfloat16": (torch.bfloat16, False, torch.contiguous_format),
    "bfloat16_channels_last": (torch.bfloat16, False, torch.channels_last_3d),
    "float32_tf32": (torch.float32, True, torch.contiguous_format),
    "float32": (torch.float32, False, torch.contiguous_format),
}


def env(case: Case, figures: Figures) -> None:
    """Versions, the device, and the switches that change numbers or speed."""
    for name, version in versions().items():
        figures.add(name, version)
    figures.add("device", figures.device)
    if not case.on_gpu:
        figures.skip(NO_GPU, "driver", "cuda", "cudnn", "memory", "tf32")
        return
    figures.add("cuda", torch.version.cuda)
    figures.add("cudnn", torch.backends.cudnn.version())
    figures.add("memory", torch.cuda.get_device_properties(case.device).total_memory / GIB, "GiB")
    figures.add("tf32", f"products {torch.backends.cuda.matmul.allow_tf32}, convolutions {torch.backends.cudnn.allow_tf32}")
    if shutil.which("nvidia-smi"):
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        figures.add("driver", subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split("\n")[0])
    else:
        figures.skip("nvidia-smi is not here", "driver")


def numerics(case: Case, figures: Figures) -> None:
    """A forward of a few layers in float32 on the CPU, and on the device in float32 and bfloat16."""
    work = case.work(LAYERS)
    work = work.resized(*(min(sides) for sides in zip(PORTION, (work.width, work.height), strict=True)))
    model = random_model(work, case.device, torch.float32)
    here = forward_of(model, work)().cpu()
    half = forward_of(model.to(torch.bfloat16), work)().float().cpu()
    figures.add("bfloat16_error", _error(half, here))
    if not case.on_gpu:
        figures.skip(NO_GPU, "float32_error")
        return
    model = random_model(work, case.device, torch.float32).cpu()
    figures.add("float32_error", _error(here, forward_of(model, work)()))


def kernels(case: Case, figures: Figures) -> None:
    """Attention on the true shapes, the products of a layer, and rotary positions as part of a forward."""
    work, device, trunk = case.work(LAYERS), case.device, case.bench.model.trunk
    heads, tokens, keys = trunk.num_heads, work.query_tokens, work.window + work.memory
    draw = lambda *shape: torch.randn(*shape, device=device, dtype=case.dtype)  # noqa: E731
    query, key, value = (draw(1, count, heads, trunk.hidden_dim // heads) for count in (tokens, keys, keys))
    attend = torch.no_grad()(partial(sdpa, query, key, value))
    seconds = best_seconds(attend, device)
    figures.add("attention", 1000 * seconds, "ms")
    figures.add("attention_rate", 4 * tokens * keys * trunk.hidden_dim / seconds / TERA, "TFLOP/s")
    if case.on_gpu:
        _backends(figures, attend, seconds)
    else:
        figures.skip(NO_GPU, "attention_kernel", "attention_over_best")
    for name, inner, outer in (("square", trunk.hidden_dim, trunk.hidden_dim), ("mlp_in", trunk.hidden_dim, trunk.ffn_dim)):
        product = best_seconds(partial(F.linear, draw(tokens, inner), draw(outer, inner)), device)
        figures.add(f"product_{name}", 2 * tokens * inner * outer / product / TERA, "TFLOP/s")
    times = torch.arange(work.latent_frames, dtype=torch.float64, device=device)
    positions = rotation(grid_positions(times, *work.grid), trunk.hidden_dim // heads)
    turning = best_seconds(partial(rotate, query, positions), device)
    figures.add("rotate", 1000 * turning, "ms")
    model = random_model(work, device, case.dtype)
    forward = best_seconds(forward_of(model, work, blocks=work.model.rollout.window_blocks), device)
    figures.add("forward", 1000 * forward, f"ms for {work.model.trunk.num_layers} layers")
    moments = torch.full((1, work.latent_frames), 500.0, device=device)
    figures.add("time_embed", 1000 * best_seconds(torch.no_grad()(partial(model.time_embed, moments)), device), "ms")
    if case.on_gpu:
        figures.add("rotate_share", 2 * work.model.trunk.num_layers * turning / forward)
    else:
        figures.skip(NO_GPU, "rotate_share")


def _backends(figures: Figures, attend: partial, default: float) -> None:
    """The kernel that torch takes, and the seconds of each that it could take."""
    found = kernels_of(attend)
    if found:
        figures.add("attention_kernel", found.most_common(1)[0][0])
    else:
        figures.skip("the profiler sees no kernels", "attention_kernel")
    seconds = [default]
    for backend in BACKENDS:
        try:
            with sdpa_kernel(backend):
                seconds.append(best_seconds(attend, attend.args[0].device))
        except RuntimeError as error:  # as torch says that a kernel is not there
            figures.skip(str(error).split("\n")[0], backend.name.lower())
        else:
            figures.add(backend.name.lower(), 1000 * seconds[-1], "ms")
    figures.add("attention_over_best", default / min(seconds))


@torch.no_grad()
def vae(case: Case, figures: Figures) -> None:
    """Encoding the past and decoding a block, with every precision and layout."""
    work = case.work()
    for name, (dtype, tf32, layout) in WAYS.items():
        if not case.on_gpu and (tf32 or layout is torch.channels_last_3d):
            figures.skip(NO_GPU, f"encode_{name}", f"decode_{name}")
            continue
        torch.backends.cudnn.allow_tf32 = tf32
        autoencoder = WanAutoencoder(case.vae).requires_grad_(False).to(case.device, dtype)
        for module in autoencoder.modules():
            if isinstance(module, nn.Conv3d):
                module.to(memory_format=layout)
        past = torch.randn(1, 3, 73 if case.on_gpu else 5, work.height, work.width, device=case.device, dtype=dtype)
        size = work.height // PIXELS_PER_LATENT, work.width // PIXELS_PER_LATENT
        block = torch.randn(1, 16, work.latent_frames, *size, device=case.device, dtype=dtype)
        past, block = (each.contiguous(memory_format=layout) for each in (past, block))
        figures.add(f"encode_{name}", 1000 * best_seconds(lambda: autoencoder.encode(past), case.device, rounds=1), "ms")
        _, cache = autoencoder.decode(block)
        figures.add(f"decode_{name}", 1000 * best_seconds(lambda: autoencoder.decode(block, cache), case.device), "ms")
        if case.on_gpu and name == "bfloat16":
            figures.add("peak", peak_gib(case.device), "GiB")
            figures.add("peak_over_plan", peak_gib(case.device) * GIB / vae_bytes(work))
        del autoencoder, past, block, cache
        release(case)
    if not case.on_gpu:
        figures.skip(NO_GPU, "peak_over_plan")


def _error(found: Tensor, true: Tensor) -> float:
    """Relative error of a tensor."""
    return float((found - true).norm() / true.norm())
