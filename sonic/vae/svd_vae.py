"""The VAE of Stable Video Diffusion: encodes one picture, and decodes the latents of a clip in chunks of frames."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

PUBLISHED = {  # sizes of SVD-XT's autoencoder, under diffusers' names
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
}


class SvdAutoencoder(nn.Module):
    """diffusers' AutoencoderKLTemporalDecoder; the frames of a chunk are decoded together and see each other in time."""

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        from diffusers import AutoencoderKLTemporalDecoder

        self.blocks = AutoencoderKLTemporalDecoder.from_config(dict(config or PUBLISHED)).eval()

    @property
    def scaling_factor(self) -> float:
        """The number by which the encoder's latents are multiplied for the sampler."""
        return self.blocks.config.scaling_factor

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """The mean of the posterior, not scaled.  pixels [B,3,H,W] in [-1,1] -> [B,4,H/8,W/8]"""
        return self.blocks.encode(pixels.to(self._like())).latent_dist.mode()

    @torch.no_grad()
    def decode(self, latents: Tensor, *, chunk: int = 8, overlap: int = 0) -> Iterator[Tensor]:
        """Yield the frames [f,3,8h,8w] of each `chunk` of latents [n,4,h,w], about in [-1,1], not clamped.

        Each chunk is decoded with up to `overlap` frames before and after it, which are thrown away: without them the temporal
        convolutions see zeros at both ends of every chunk. The latents may be in other memory than the weights.
        """
        assert chunk >= 1 and overlap >= 0
        for start in range(0, len(latents), chunk):
            first = max(0, start - overlap)
            seen = latents[first : start + chunk + overlap].to(self._like()) / self.scaling_factor
            yield self.blocks.decode(seen, num_frames=len(seen)).sample[start - first :][:chunk]

    def _like(self) -> Tensor:
        return next(self.blocks.parameters())
