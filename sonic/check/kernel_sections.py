"""Sections of the device check about parts: what is installed, what a forward computes, kernels, and the VAE."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sonic.check.case import CheckCase, random_conditions
from sonic.check.figures import Figures
from sonic.check.measure import best_seconds, error_of
from sonic.geometry import GIB, PIXELS_PER_LATENT, BlockSpan
from sonic.inference.components import set_tf32
from sonic.inference.report import versions
from sonic.inference.rollout import seeded
from sonic.model.attention import kernel_of, sdpa
from sonic.model.dit import AvatarDiT
from sonic.model.embed import TimeEmbed
from sonic.planner.memory import vae_bytes
from sonic.planner.step_time import TERA
from sonic.planner.workload import Workload
from sonic.system.nvidia import driver_version
from sonic.vae.wan_vae import WanAutoencoder

LAYERS, PORTION = 4, (384, 256)  # of the forward that is computed with several kinds of numbers: layers, width and height
PAST = 73  # video frames that the VAE encodes before a stream
BACKENDS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
VAE_WAYS = {  # precision, TF32 in convolutions, layout of weights and frames
    "bfloat16": (torch.bfloat16, False, torch.contiguous_format),
    "float32": (torch.float32, False, torch.contiguous_format),
    "bfloat16_channels_last": (torch.bfloat16, False, torch.channels_last_3d),
    "float32_tf32": (torch.float32, True, torch.contiguous_format),
}


def env(case: CheckCase, figures: Figures) -> None:
    """Versions, the device, and the switches that change numbers or speed."""
    for name, version in {**versions(), "device": figures.device}.items():
        figures.add(name, version)
    if not case.on_gpu:
        return
    figures.add("cuda", f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
    figures.add("memory", torch.cuda.get_device_properties(case.device).total_memory / GIB, "GiB")
    figures.add("tf32", f"products {torch.backends.cuda.matmul.allow_tf32}, convolutions {torch.backends.cudnn.allow_tf32}")
    figures.add("driver", driver_version())


def numerics(case: CheckCase, figures: Figures) -> None:
    """A forward of a few layers in float32 and bfloat16 on the device, and in float32 on the CPU."""
    set_tf32(torch.float32)
    work, model = case.work(LAYERS), case.model(LAYERS, torch.float32)
    work = work.resized(min(PORTION[0], work.width), min(PORTION[1], work.height))
    here = _prediction(model, work)
    figures.add("bfloat16_error", error_of(_prediction(model.to(torch.bfloat16), work), here))
    if case.on_gpu:
        figures.add("float32_error", error_of(here, _prediction(case.model(LAYERS, torch.float32).cpu(), work)))


@torch.no_grad()
def _prediction(model: AvatarDiT, work: Workload) -> Tensor:
    """The prediction for the first block of a random video, in host memory.  -> [1,C,T,h,w]"""
    like, span = model.patch_embed.weight, BlockSpan(0, 0, work.latent_frames)
    conditions = random_conditions(work, 1).to(device=like.device, dtype=like.dtype)
    cache = model.prefill(conditions, model.new_cache(conditions, steps=1))
    latents = torch.randn(1, *conditions.ref.shape[1:2], span.latent_frames, *conditions.ref.shape[3:], generator=seeded(1))
    timestep, inputs = torch.full((1,), 500.0, device=like.device), model.prepare_block(conditions, span)
    return model.denoise_block(latents.to(like.device), timestep, inputs, cache=cache, ring=cache.rings[0]).cpu()


@torch.no_grad()
def kernels(case: CheckCase, figures: Figures) -> None:
    """Attention on the true shapes, by torch's choice and by each kernel; matrix products; the time embedding."""
    work, device, trunk = case.work(), case.device, case.bench.model.trunk
    tokens, keys, dim = work.query_tokens, work.window + work.memory, trunk.hidden_dim
    draw = lambda *shape: torch.randn(*shape, device=device, dtype=case.dtype)  # noqa: E731
    attend = partial(sdpa, *(draw(1, count, trunk.num_heads, dim // trunk.num_heads) for count in (tokens, keys, keys)))
    seconds = [best_seconds(attend, device)]
    figures.add("attention", 1000 * seconds[0], "ms")
    figures.add("attention_rate", 4 * tokens * keys * dim / seconds[0] / TERA, "TFLOP/s")
    for backend in BACKENDS if case.on_gpu else ():
        try:
            with sdpa_kernel(backend):
                seconds.append(best_seconds(attend, device))
        except RuntimeError as error:  # as torch says that it has no such kernel here
            figures.skip(backend.name.lower(), str(error).split("\n")[0])
        else:
            figures.add(backend.name.lower(), 1000 * seconds[-1], "ms")
    if case.on_gpu:
        figures.add("attention_over_best", seconds[0] / min(seconds))
        figures.add("attention_kernel", kernel_of(draw(1, trunk.num_heads, keys, dim // trunk.num_heads)).name)
    for name, outer in (("square", dim), ("mlp_in", trunk.ffn_dim)):
        product = best_seconds(partial(F.linear, draw(tokens, dim), draw(outer, dim)), device)
        figures.add(f"product_{name}", 2 * tokens * dim * outer / product / TERA, "TFLOP/s")
    embed = TimeEmbed(trunk.freq_dim, dim).to(device, case.dtype)
    run = partial(embed, torch.full((1, work.latent_frames), 500.0, device=device))
    figures.add("time_embed", 1000 * best_seconds(run, device), "ms")
    if case.on_gpu:
        case.release()
        held = torch.cuda.memory_allocated(device)
        run()
        figures.add("time_embed_peak", (torch.cuda.max_memory_allocated(device) - held) / GIB, "GiB beside its weights")


@torch.no_grad()
def vae(case: CheckCase, figures: Figures) -> None:
    """Encoding the past of a stream, and decoding a block of it, with every precision and layout."""
    work, device = case.work(), case.device
    for name, (dtype, tf32, layout) in list(VAE_WAYS.items())[: None if case.on_gpu else 2]:
        torch.backends.cudnn.allow_tf32 = tf32
        autoencoder = WanAutoencoder(case.vae).requires_grad_(False).to(device, dtype)
        for module in autoencoder.modules():
            if isinstance(module, nn.Conv3d) and layout is torch.channels_last_3d:
                module.to(memory_format=layout)
        size = work.height // PIXELS_PER_LATENT, work.width // PIXELS_PER_LATENT
        shapes = (1, 3, PAST if case.on_gpu else 5, work.height, work.width), (1, 16, work.latent_frames, *size)
        past, block = (torch.randn(shape, device=device, dtype=dtype).contiguous(memory_format=layout) for shape in shapes)
        figures.add(f"encode_{name}", 1000 * best_seconds(partial(autoencoder.encode, past), device, rounds=1), "ms")
        _, cache = autoencoder.decode(block)
        figures.add(f"decode_{name}", 1000 * best_seconds(partial(autoencoder.decode, block, cache), device), "ms")
        if case.on_gpu and dtype == case.dtype and layout is torch.contiguous_format:
            figures.add("peak_over_plan", torch.cuda.max_memory_reserved(device) / vae_bytes(work))
        del autoencoder, past, block, cache
        case.release()
