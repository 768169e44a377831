"""Measures the memory of a plan for a video in windows: UNet, VAE and RIFE run on fake tensors and fake ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sonic.config import DecodeConfig
from sonic.geometry import PIXELS_PER_LATENT
from sonic.inference.decode_windows import decode_clip
from sonic.inference.denoise_windows import ClipConditions, SamplingStep, WindowSampling, denoise_clip, row_weights
from sonic.inference.report import StageTimer
from sonic.model.svd_unet import SvdUNet, move_blend_factors
from sonic.parallel.parallelize_unet import PARALLELIZERS, shard
from sonic.planner.fake_gpu import FakeGpuMode, fake_gpu
from sonic.planner.memory import GIB
from sonic.planner.plans import Plan
from sonic.planner.search import PlanResult, Tracked
from sonic.planner.track import DTYPES, Footprint, fake_world, made_in, tracked
from sonic.planner.window_workload import WindowWorkload, unet_bytes
from sonic.sampling.windows import Spread
from sonic.vae.rife import Rife
from sonic.vae.svd_vae import SvdAutoencoder

SCALES = {1: (1.0, 1.0), 2: (2.0, 2.0), 3: (2.0, 7.5)}  # guidance towards picture and sound by its number of rows


class OneWindow(Spread):
    """Evaluates the first window of a step, whose result stands for those of all."""

    def __init__(self, windows: int) -> None:
        self.windows = windows

    def mine(self, windows: int) -> list[int]:
        """The first window."""
        return [0]

    def exchange(self, own: list[Tensor]) -> list[Tensor]:
        """Its result for every window."""
        return own * self.windows


@dataclass(frozen=True)
class TwoSteps(WindowSampling):
    """Two steps between noise levels that are known, since fake tensors have no values; weights are prefetched from the second on."""

    def plan(self) -> list[SamplingStep]:
        """The steps."""
        weights = row_weights(self.sample_guide_scale[0], self.audio_guide_scale[0])
        return [SamplingStep(2.0, 1.0, weights), SamplingStep(1.0, 0.5, weights)]


def track_windows(found: PlanResult) -> Tracked:
    """The memory of every rank in each phase of the chosen plan."""
    work, plan, reserve = found.work, found.chosen, found.hardware.reserve_gib
    with fake_gpu(), FakeGpuMode(), torch.no_grad(), made_in(DTYPES[work.dtype_bytes]):
        denoise, decode = _denoising(work, plan), _decoding(work)
    weights = plan.ranks[0]["decode"]["weights"]
    leader = {"encode": sum(plan.ranks[0]["encode"].values()) / GIB, "denoise": (denoise.peak + decode.stays) / GIB + reserve}
    leader["decode"] = (decode.peak + weights + plan.ranks[0]["decode"]["audio_tokens"]) / GIB + reserve
    return Tracked([leader, *[{"denoise": denoise.peak / GIB + reserve}] * (len(plan.ranks) - 1)])


def _denoising(work: WindowWorkload, plan: Plan) -> Footprint:
    """Memory of two steps of a clip, in each of which one window is evaluated while the results of the rank's others are there."""
    parallel, config, frames = plan.parallel, work.model.unet, work.frames
    rows, columns = work.height // PIXELS_PER_LATENT, work.width // PIXELS_PER_LATENT
    tokens, width = config.audio_tokens, config.cross_attention_dim
    count = -(-work.windows // len(plan.ranks))
    waits = parallel.name == "offload" or (parallel.name == "windows" and parallel.cpu_offload)  # weights, on the host
    with fake_world(parallel, len(plan.ranks)) as world:
        unet = SvdUNet(config).eval().requires_grad_(False)
        if parallel.name == "fsdp":
            shard(unet, world, parallel)
        if not waits:
            PARALLELIZERS[parallel.name].start(unet, world, parallel)
        whole = {"dtype": torch.float32}
        conditions = ClipConditions(
            torch.empty(4, rows, columns, **whole),
            torch.empty(frames, tokens, width),
            torch.empty(tokens, width),
            torch.empty(frames, 2, **whole),
            torch.empty(width, **whole),
            torch.empty(1, 1, work.height, work.width),
        )
        noise = torch.empty(frames, 4, rows, columns, **whole)
        others = torch.empty((count - 1) * config.window_frames, 4, rows, columns, **whole)
        picture, sound = SCALES[work.rows]
        sampling = TwoSteps(sample_guide_scale=(picture, picture), audio_guide_scale=(sound, sound), windows=config)

        def run() -> None:
            denoise_clip(unet, conditions, noise, sampling=sampling, spread=OneWindow(work.windows))

        given = [each for each in vars(conditions).values() if each is not None]
        found = tracked(unet, [*given, noise, others], run)
    if not waits:
        return found
    return found.with_more(plan.ranks[0]["denoise"]["weights"] - unet_bytes(work))


def _decoding(work: WindowWorkload) -> Footprint:
    """Memory of the first chunks of a clip that are decoded and interpolated."""
    vae = SvdAutoencoder()
    move_blend_factors(vae, fake_gpu())
    with made_in(torch.float32):
        rife = Rife() if work.doubled else None
        rows, columns = work.height // PIXELS_PER_LATENT, work.width // PIXELS_PER_LATENT
        latents, noise = (torch.empty(work.frames, 4, rows, columns) for _ in range(2))
    decode = DecodeConfig(online=False, chunk_frames=work.chunk, overlap_frames=work.overlap)
    first = latents[: 3 * work.chunk + work.overlap]

    def run() -> None:
        for _ in decode_clip(first, vae, rife, decode=decode, timer=StageTimer()):
            pass

    found = tracked(torch.nn.ModuleList([vae, *[rife] * work.doubled]), [latents, noise], run)
    return found._replace(stays=sum(weight.nbytes for weight in vae.parameters()))
