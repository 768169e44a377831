"""The Wan VAE as a stream: diffusers' blocks, with what they remember handed in and out as a value."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor, nn

from sonic.geometry import FRAMES_PER_LATENT

T = TypeVar("T")

# where published files keep their tensors, and what a place may hold
PLACES = ["conv1", "conv2"] + [
    f"{side}.{place}"
    for side, ladder in (("encoder", "downsamples"), ("decoder", "upsamples"))
    for place in ("conv1", "head.0", "head.2", *(f"middle.{i}" for i in range(3)), *(f"{ladder}.{i}" for i in range(15)))
]
PARTS = ["", *(f"residual.{i}." for i in (0, 2, 3, 6)), "shortcut.", "resample.1.", "time_conv.", "norm.", "to_qkv.", "proj."]
Cache = tuple  # what each causal convolution saw last; opaque


class WanAutoencoder(nn.Module):
    """Pixels to normalised latents and back, chunk by chunk; chunks of any allowed length give what one call gives."""

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        from diffusers import AutoencoderKLWan

        self.blocks = AutoencoderKLWan(**(config or {})).eval()
        for name in ("latents_mean", "latents_std"):
            self.register_buffer(name, torch.tensor(getattr(self.blocks.config, name)), persistent=False)

    def load(self, path: str | Path) -> None:
        """Take the weights of a published file, .pth or .safetensors.

        Raises ValueError when the file cannot be read safely, or a tensor is missing or has no place.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"{path} does not exist; give the published Wan2.1_VAE.pth")
        try:
            found = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
            self.take(found)
        except Exception as error:  # torch and diffusers name each kind of damage by another kind of error
            first = str(error).strip().splitlines()[0]
            raise ValueError(f"{path} is damaged or not a Wan VAE ({type(error).__name__}: {first}); fetch it again") from error

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Take weights by their published names. Raises RuntimeError unless all of them fit."""
        self.blocks.load_state_dict(to_diffusers(tensors))

    def encode(self, frames: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        """frames [B,3,F,H,W] in [-1,1] -> latents [B,16,T,H/8,W/8] and the cache for the frames that follow.

        The first frame makes a latent of its own, every four after it another one: F = 1 + 4k at first, then 4k. Frames are rounded
        to the weights' precision, latents come in it.
        Raises ValueError for other lengths.
        """
        first = 1 if cache is None else 0
        if frames.shape[2] < 1 or (frames.shape[2] - first) % FRAMES_PER_LATENT:
            rule = f"1 + {FRAMES_PER_LATENT}k at the beginning" if first else f"{FRAMES_PER_LATENT}k after the beginning"
            raise ValueError(f"{frames.shape[2]} frames cannot be encoded: give {rule}")
        memory, frames = self._memory("encoder", cache), frames.to(self.latents_mean.dtype)
        head, rest = frames[:, :, :first], frames[:, :, first:]
        chunks = [*head.split(1, dim=2)] * first + [*rest.split(FRAMES_PER_LATENT, dim=2)] * bool(rest.shape[2])
        # the last convolution too sees one chunk at a time: what it rounds depends on the length, and differs between processors
        found = [self.blocks.quant_conv(self.blocks.encoder(chunk, feat_cache=memory, feat_idx=[0])) for chunk in chunks]
        mean, _ = torch.cat(found, dim=2).chunk(2, dim=1)
        return (mean - self._wide("latents_mean")) / self._wide("latents_std"), tuple(memory)

    def decode(self, latents: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        """latents [B,16,T,h,w] -> frames [B,3,F,8h,8w] in [-1,1] and the cache for the latents that follow.

        The first latent of all makes one frame, every other one four.
        """
        memory = self._memory("decoder", cache)
        frames = []
        for index, latent in enumerate(latents.split(1, dim=2)):
            first = cache is None and index == 0
            plain = self.blocks.post_quant_conv(latent * self._wide("latents_std") + self._wide("latents_mean"))
            frames.append(self.blocks.decoder(plain, feat_cache=memory, feat_idx=[0], first_chunk=first))
        return torch.cat(frames, dim=2).clamp(-1, 1), tuple(memory)

    def _memory(self, side: str, cache: Cache | None) -> list:
        """A list that the blocks may overwrite, so that the value handed in stays as it is."""
        return [None] * self.blocks._cached_conv_counts[side] if cache is None else list(cache)

    def _wide(self, name: str) -> Tensor:
        return rearrange(getattr(self, name), "c -> 1 c 1 1 1")


def to_diffusers(tensors: Mapping[str, T]) -> dict[str, T]:
    """The same values by diffusers' names instead of the published ones."""
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    return convert_wan_vae_to_diffusers(dict(tensors))


def from_diffusers(name: str) -> str:
    """The published name of one of diffusers' tensors."""
    leaves = [f"{part}{leaf}" for part in PARTS for leaf in ("weight", "bias", "gamma")]
    known = to_diffusers({f"{place}.{leaf}": f"{place}.{leaf}" for place in PLACES for leaf in leaves})
    return known.get(name, name)
