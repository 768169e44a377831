"""Denoises a clip in windows of frames by the UNet that Sonic is published with: guidance, shifted windows, and one exchange a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor

from sonic.config import UNetConfig
from sonic.geometry import PIXELS_PER_LATENT
from sonic.model.svd_unet import SvdUNet, UNetConditions
from sonic.sampling.karras import clean_from, euler_step, flow_sigma, karras_sigmas, network_input, noisy_start, timestep_of
from sonic.sampling.windows import ALONE, CACHED_FRAMES, Spread, windows_of
from sonic.system.heartbeat import heartbeat

TIMESTEPS = 1000  # a callback is given 1000 times the share of noise, as those of other models
NOTHING, SILENT, SOUND = "nothing", "silent", "sound"  # rows of guidance by what they are given; all but the first have the picture
OnClipStep = Callable[[int, float, Tensor], None]  # called after a step with (step, timestep 0..1000, latents of the whole clip)


@dataclass(frozen=True)
class ClipConditions:
    """What a clip of n frames is conditioned on.

    image_latents [4,h,w] posterior mean of the picture, unscaled float32; tokens [n,T,D] of the sound and silence [T,D] in the network's
    precision; buckets [n,2] motion of each frame; image_embed [D]; face_mask [1,1,H,W], None = the audio acts everywhere. `start` [4,h,w]
    is the picture that lies below the first noise, where image_latents are those of a noisy one.
    """

    image_latents: Tensor
    tokens: Tensor
    silence: Tensor
    buckets: Tensor
    image_embed: Tensor
    face_mask: Tensor | None = None
    start: Tensor | None = None

    def to(self, device: torch.device) -> ClipConditions:
        """The conditions on another device."""
        given = {each.name: getattr(self, each.name) for each in fields(self)}
        return ClipConditions(**{name: value if value is None else value.to(device) for name, value in given.items()})

    @cached_property
    def tokens_and_silence(self) -> Tensor:
        """The tokens of all frames, and behind them those of silence.  -> [n+1,T,D]"""
        return torch.cat([self.tokens, self.silence[None]])


class SamplingStep(NamedTuple):
    """A step from noise level `sigma` to the `following` one, and the weights of the rows of guidance in its prediction: their sum is 1."""

    sigma: float
    following: float
    weights: dict[str, float]

    def after(self, x: Tensor, predictions: Tensor) -> Tensor:
        """The latents [F,4,h,w] after the step, from those before it and the v that each row predicts [B,F,4,h,w]."""
        v = sum(weight * prediction for weight, prediction in zip(self.weights.values(), predictions, strict=True))
        return euler_step(x, clean_from(x, v, self.sigma), sigma=self.sigma, following=self.following)


@dataclass(frozen=True)
class WindowSampling:
    """How a clip is sampled: each guidance scale runs evenly over the steps, from its first value to its last.

    sample_guide_scale leads towards the picture, audio_guide_scale from silence to the sound; dynamic_scale multiplies both motion
    buckets, audio_scale what the audio attention adds; `fps` is the frame rate that the network is given. With strength < 1 that share of
    the steps is run, from the picture at their first noise level. `windows` has their length, overlap and shift.
    """

    steps: int = 25
    sample_guide_scale: tuple[float, float] = (2.0, 2.0)
    audio_guide_scale: tuple[float, float] = (7.5, 7.5)
    dynamic_scale: float = 1.0
    audio_scale: float = 1.0
    fps: float = 12.5
    strength: float = 1.0
    windows: UNetConfig = field(default_factory=UNetConfig)

    def plan(self) -> list[SamplingStep]:
        """The steps that are run. Rows of guidance whose weight is 0 are left out."""
        sigmas = karras_sigmas(self.steps).tolist()[self.steps - int(self.steps * self.strength) :]
        steps = len(sigmas) - 1
        picture, sound = torch.linspace(*self.sample_guide_scale, steps), torch.linspace(*self.audio_guide_scale, steps)
        scales = zip(picture.tolist(), sound.tolist(), strict=True)
        return [SamplingStep(*levels, row_weights(*scale)) for levels, scale in zip(pairwise(sigmas), scales, strict=True)]


def row_weights(picture: float, sound: float) -> dict[str, float]:
    """The weights of the rows in u + picture·(s - u) + sound·(c - s), without those of 0: u nothing, s the silent picture, c with sound."""
    weights = {NOTHING: 1 - picture, SILENT: picture - sound, SOUND: sound}
    return {row: weight for row, weight in weights.items() if weight}


def clip_noise(generator: torch.Generator, frames: int, *, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Noise for a picture of height and width, and for the latents of `frames` frames, float32 in the published order of draws.

    Both are drawn on the CPU, to be the same everywhere.  -> [3,H,W], [n,4,h,w]
    """
    picture = torch.randn(3, height, width, generator=generator)
    return picture, torch.randn(frames, 4, height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT, generator=generator)


@torch.no_grad()
def denoise_clip(
    unet: SvdUNet,
    conditions: ClipConditions,
    noise: Tensor,
    *,
    sampling: WindowSampling,
    spread: Spread = ALONE,
    on_step: OnClipStep | None = None,
) -> Tensor:
    """The clean latents of a clip from noise [n,4,h,w], in float32: they begin at 700 times the noise, too coarse in half precision.

    Every window of a step reads the latents before the step; frames in several windows get the mean.  -> [n,4,h,w]
    """
    plan, start = sampling.plan(), conditions.image_latents if conditions.start is None else conditions.start
    latents = noisy_start(start.float(), noise.float(), plan[0].sigma)
    cache = {} if len(noise) <= CACHED_FRAMES else None
    for number, step in enumerate(plan):
        windows = windows_of(len(latents), number, sampling.windows)
        own = []
        for window in (windows[index] for index in spread.mine(len(windows))):
            heartbeat()
            x = latents[window]
            batch, given = guidance_batch(conditions, x, window, step=step, sampling=sampling, cache=cache)
            predictions = unet(batch, timestep_of(step.sigma), given).float()
            own.append(step.after(x, predictions))
        latents = mean_of_windows(windows, spread.exchange(own), len(latents))
        if on_step:
            on_step(number, TIMESTEPS * flow_sigma(step.sigma), latents)
    return latents


def guidance_batch(
    given: ClipConditions, x: Tensor, window: list[int], *, step: SamplingStep, sampling: WindowSampling, cache: dict | None = None
) -> tuple[Tensor, UNetConditions]:
    """The rows of guidance for the latents x [F,4,h,w] of one window as a batch: the network's input [B,F,8,h,w], and its conditions.

    With a `cache` of keys and values the tokens are those of the whole clip, else those of the window; silence follows them.
    """
    rows, frames, dtype = step.weights, len(x), given.tokens.dtype
    pictured = torch.tensor([row != NOTHING for row in rows], device=x.device)
    picture = rearrange(pictured, "b -> b 1 1 1 1") * given.image_latents
    noisy = network_input(x, step.sigma).expand(len(rows), -1, -1, -1, -1)
    batch = torch.cat([noisy, picture.expand(-1, frames, -1, -1, -1)], dim=2)
    ids = torch.cat([x.new_tensor([sampling.fps]), sampling.dynamic_scale * given.buckets[window].float().mean(0)])
    tokens, own = given.tokens_and_silence, window
    if cache is None:
        tokens, own = tokens[[*window, -1]], list(range(frames))
    conditions = UNetConditions(
        image_embeds=repeat(given.image_embed.to(dtype), "d -> b 1 1 d", b=len(rows) - (NOTHING in rows)),
        audio_tokens=tokens,
        added_ids=repeat(ids, "i -> b i", b=len(rows)),
        face_mask=given.face_mask,
        audio_scale=sampling.audio_scale,
        frames=[own if row == SOUND else [len(tokens) - 1] * frames for row in rows],
        cache=cache,
    )
    return batch.to(dtype), conditions


def mean_of_windows(windows: Sequence[list[int]], results: Sequence[Tensor], frames: int) -> Tensor:
    """The mean of the results [F,4,h,w] for each frame of the clip, summed window by window, and position by position within one.

    Several processes that sum in this order get the same bits.  -> [n,4,h,w]
    """
    total, hits = torch.zeros_like(results[0][:1]).repeat(frames, 1, 1, 1), torch.zeros(frames)
    for window, result in zip(windows, results, strict=False):  # behind the results of all windows there may be repeated ones
        for first in range(0, len(window), frames):  # within `frames` positions no frame comes twice
            part = window[first : first + frames]
            total[part] += result[first : first + frames]
            hits[part] += 1
    return total / rearrange(hits.to(total.device), "n -> n 1 1 1")
