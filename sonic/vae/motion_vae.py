"""The preview model's streaming autoencoder: its latents encode how a picture moves; zero latents are a picture at rest.

Latents have the geometry of the Wan VAE: 16 channels, one latent for 8x8 pixels and 4 frames.  The encoder and decoder map motion: a
displacement, an opacity and a small picture of the inside of the mouth, which warp.py applies to the photograph at its full
resolution.  The decoder also gets the reference picture, so that it can place edges at the lips.
Shapes: R the side of the face crop in pixels, h and w the rows and columns of latents.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from sonic.geometry import FRAMES_PER_LATENT
from sonic.types import MotionLayers

LATENT_CHANNELS = 16
LAYERS = 6  # channels: displacement x, y; opacity; red, green, blue of the inside of the mouth
FLOW_SCALE = 0.05  # one unit of the decoder's displacement, in widths of the crop
WIDTH = 64


@dataclass(frozen=True)
class Reference:
    """What the autoencoder computes once from a portrait.

    picture [B,3,R,R] in [-1,1]; latents [B,16,1,R/8,R/8] for the DiT; for the decoder, look [B,16,R/8,R/8], detail [B,32,R/4,R/4],
    and resting [B,4,6,R/2,R/2], its output for zero latents, which is subtracted from every other output.
    """

    picture: Tensor
    latents: Tensor
    look: Tensor
    detail: Tensor
    resting: Tensor


class Residual(nn.Module):
    """x + conv(relu(conv(relu(x)))), the last convolution initialised to zero."""

    def __init__(self, channels: int):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.last = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.last.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(F.relu(self.first(F.relu(x))))


class PortraitEncoder(nn.Sequential):
    """Latents of a portrait for the DiT: where the lips are, and how far open.  [B,3,R,R] -> [B,16,R/8,R/8]

    They are separate from what the decoder uses, because the decoder needs edges only, and the DiT needs more than that.
    """

    def __init__(self, latent_channels: int):
        conv = partial(nn.Conv2d, kernel_size=3, padding=1)
        halve = nn.Conv2d(48, 96, 4, stride=2, padding=1)
        stem = (nn.PixelUnshuffle(4), conv(16 * 5, 48), Residual(48), nn.ReLU())
        super().__init__(*stem, halve, Residual(96), Residual(96), nn.ReLU(), conv(96, latent_channels))

    def forward(self, picture: Tensor) -> Tensor:
        return super().forward(torch.cat([picture, _positions(picture)], 1))


class WarpAutoencoder(nn.Module):
    """Encodes motion to latents and decodes it with a reference picture; `decode` returns the cache that the next chunk needs."""

    def __init__(self, latent_channels: int = LATENT_CHANNELS):
        super().__init__()
        conv = partial(nn.Conv2d, kernel_size=3, padding=1)
        halve = nn.Conv2d(32, WIDTH, 4, stride=2, padding=1)
        self.detail = nn.Sequential(nn.PixelUnshuffle(4), conv(16 * 5, 48), Residual(48), nn.ReLU(), conv(48, 32))
        self.appearance = nn.Sequential(halve, Residual(WIDTH), Residual(WIDTH), nn.ReLU(), conv(WIDTH, latent_channels))
        self.portrait = PortraitEncoder(latent_channels)
        self.squeeze = nn.Conv2d(16 * LAYERS, WIDTH, 1)
        self.merge = nn.Sequential(conv(FRAMES_PER_LATENT * WIDTH, 96), Residual(96), conv(96, latent_channels))
        self.unfold = nn.Sequential(conv(3 * latent_channels, 96), Residual(96), Residual(96), nn.ReLU())
        self.split = nn.Conv2d(96, FRAMES_PER_LATENT * 4 * 32, 1)
        self.render = nn.Sequential(conv(32 + 32, 48), nn.ReLU(), Residual(48), nn.ReLU(), conv(48, 4 * LAYERS), nn.PixelShuffle(2))
        self.register_buffer("latent_scale", torch.ones(latent_channels))

    def reference(self, picture: Tensor) -> Reference:
        """What encoding and decoding need of a portrait.  picture [B,3,R,R] in [-1,1], R a multiple of 8, else ValueError"""
        batch, _, height, width = picture.shape
        if height % 8 or width % 8:
            raise ValueError(f"a reference of {width}x{height} px cannot be encoded: both sides must be multiples of 8")
        detail = self.detail(torch.cat([picture, _positions(picture)], 1))
        look = self.appearance(detail)
        zeros = torch.zeros_like(look)
        resting = self._layers(zeros, zeros, look=look, detail=detail)
        return Reference(picture, rearrange(self.portrait(picture), "b c h w -> b c 1 h w"), look, detail, resting)

    def encode(self, layers: MotionLayers) -> Tensor:
        """The motion of F frames, F a multiple of 4 -> latents [B,16,F/4,h,w]; zero, but for rounding, where nothing moves.

        Raises ValueError when F is not a multiple of 4.
        """
        batch, count = layers.flow.shape[:2]
        if count % FRAMES_PER_LATENT:
            raise ValueError(f"{count} frames cannot be encoded: every latent holds {FRAMES_PER_LATENT}; give a multiple of it")
        small = F.pixel_unshuffle(rearrange(_as_layers(layers), "b f c h w -> (b f) c h w"), 4)
        moved = self._compress(small) - self._compress(torch.zeros_like(small[:FRAMES_PER_LATENT]))
        return rearrange(moved, "(b t) c h w -> b c t h w", b=batch) / rearrange(self.latent_scale, "c -> c 1 1 1")

    def _compress(self, small: Tensor) -> Tensor:
        """Latents of groups of four frames.  [B·T·4,96,h,w] -> [B·T,16,h,w]"""
        return self.merge(rearrange(self.squeeze(small), "(bt f) c h w -> bt (f c) h w", f=FRAMES_PER_LATENT))

    def decode(self, latents: Tensor, reference: Reference, cache: Tensor | None = None) -> tuple[MotionLayers, Tensor]:
        """latents [B,16,T,h,w] -> the motion of 4T frames, and the cache to pass with the latents that follow.

        Each latent is decoded from itself and the one before it.  They are decoded one at a time, so that chunks of any length give
        the same bits as one call: the rounding of a convolution depends on its batch size.
        """
        latents = latents * rearrange(self.latent_scale, "c -> c 1 1 1").to(latents.dtype)
        previous = torch.zeros_like(latents[:, :, 0]) if cache is None else cache
        look, parts = reference.look, []
        for latent in latents.unbind(2):
            parts.append(self._layers(latent, previous, look=look, detail=reference.detail) - reference.resting)
            previous = latent
        return _as_motion(torch.cat(parts, 1)), previous

    def _layers(self, latents: Tensor, previous: Tensor, *, look: Tensor, detail: Tensor) -> Tensor:
        """The decoder's output for one latent of each video.  latents, previous, look [B,16,h,w], detail [B,32,2h,2w] -> [B,4,6,4h,4w]"""
        features = self.split(self.unfold(torch.cat([latents, previous, look], 1)))
        features = F.pixel_shuffle(rearrange(features, "b (f c) h w -> (b f) c h w", f=FRAMES_PER_LATENT), 2)
        detail = detail.repeat_interleave(FRAMES_PER_LATENT, 0)
        return rearrange(self.render(torch.cat([features, detail], 1)), "(b f) c h w -> b f c h w", f=FRAMES_PER_LATENT)


def _throat(like: Tensor) -> Tensor:
    """The colour of the mouth's inside that zero stands for: a dim red.  -> [3,1,1]"""
    return torch.tensor([0.30, 0.12, 0.11]).to(like, non_blocking=True).reshape(3, 1, 1)


def _as_motion(layers: Tensor) -> MotionLayers:
    """The network's six channels as motion in its units.  [B,F,6,rows,columns]"""
    flow, opacity, colour = layers.split([2, 1, 3], dim=2)
    return MotionLayers(flow * FLOW_SCALE, opacity, _throat(layers) + 0.5 * colour)


def _as_layers(motion: MotionLayers) -> Tensor:
    """Motion as the network's six channels; colours are weighted by their opacity.  -> [B,F,6,rows,columns]"""
    colour = 2 * (motion.interior - _throat(motion.interior)) * motion.opacity
    return torch.cat([motion.flow / FLOW_SCALE, motion.opacity, colour], 2)


def _positions(picture: Tensor) -> Tensor:
    """The coordinates x, y of each pixel of the crop in [-1,1].  [B,3,R,R] -> [B,2,R,R]"""
    ys = torch.linspace(-1, 1, picture.shape[2], device=picture.device, dtype=picture.dtype)
    xs = torch.linspace(-1, 1, picture.shape[3], device=picture.device, dtype=picture.dtype)
    grid = torch.stack(torch.meshgrid(xs, ys, indexing="xy"))
    return grid.expand(picture.shape[0], -1, -1, -1)
