"""The Wan VAE as a stream: diffusers' blocks, whose cache between chunks is an argument and a result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from einops import rearrange
from torch import Tensor, nn

from sonic.geometry import FRAMES_PER_LATENT

T = TypeVar("T")

Cache = tuple  # the last input of each causal convolution; its contents are diffusers' own


class WanAutoencoder(nn.Module):
    """Encodes pixels to normalised latents and decodes them, chunk by chunk; the lengths of the chunks do not change the result."""

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        from diffusers import AutoencoderKLWan

        self.blocks = AutoencoderKLWan(**(config or {})).eval()
        for name in ("latents_mean", "latents_std"):
            self.register_buffer(name, torch.tensor(getattr(self.blocks.config, name)), persistent=False)

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Load weights by their published names. Raises RuntimeError when one is missing, unknown, or of another shape."""
        self.blocks.load_state_dict(to_diffusers(tensors))

    def encode(self, frames: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        """frames [B,3,F,H,W] in [-1,1] -> latents [B,16,T,H/8,W/8] and the cache for the frames that follow.

        The first frame of a video gives one latent frame, every four after it give another: F = 1 + 4k in the first chunk, 4k in later
        ones. Frames are rounded to the precision of the weights, and latents have it. Raises ValueError for other lengths.
        """
        first, count = 1 if cache is None else 0, frames.shape[2]
        if count < 1 or (count - first) % FRAMES_PER_LATENT:
            rule = f"1 + {FRAMES_PER_LATENT}k at the beginning" if first else f"{FRAMES_PER_LATENT}k after the beginning"
            raise ValueError(f"{count} frames cannot be encoded: give {rule}")
        kept, frames = self._as_list("encoder", cache), frames.to(self.latents_mean.dtype)
        chunks = [frames[:, :, :1]] if first else []
        chunks += [frames[:, :, start : start + FRAMES_PER_LATENT] for start in range(first, count, FRAMES_PER_LATENT)]
        # the last convolution also runs on one chunk at a time: its rounding depends on the length, differently on each processor
        moments = [self.blocks.quant_conv(self.blocks.encoder(chunk, feat_cache=kept, feat_idx=[0])) for chunk in chunks]
        mean, _ = torch.cat(moments, dim=2).chunk(2, dim=1)
        return (mean - _per_channel(self.latents_mean)) / _per_channel(self.latents_std), tuple(kept)

    def decode(self, latents: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        """latents [B,16,T,h,w] -> frames [B,3,F,8h,8w] in [-1,1] and the cache for the latents that follow.

        The first latent frame of a video gives one frame, every other one four.
        """
        kept = self._as_list("decoder", cache)
        frames = []
        for index, latent in enumerate(latents.split(1, dim=2)):
            first = cache is None and index == 0
            unnormalised = self.blocks.post_quant_conv(latent * _per_channel(self.latents_std) + _per_channel(self.latents_mean))
            frames.append(self.blocks.decoder(unnormalised, feat_cache=kept, feat_idx=[0], first_chunk=first))
        return torch.cat(frames, dim=2).clamp(-1, 1), tuple(kept)

    def _as_list(self, side: str, cache: Cache | None) -> list:
        """A copy of the cache as a list, which the blocks overwrite; the cache that was passed does not change."""
        return [None] * self.blocks._cached_conv_counts[side] if cache is None else list(cache)


def _per_channel(values: Tensor) -> Tensor:
    return rearrange(values, "c -> 1 c 1 1 1")


def to_diffusers(tensors: Mapping[str, T]) -> dict[str, T]:
    """The values under diffusers' names instead of the published ones."""
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    return convert_wan_vae_to_diffusers(dict(tensors))
