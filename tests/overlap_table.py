"""Prints by how much a clip decoded in chunks differs from one decoded at once, for each overlap of the chunks.

A network of the published depth with random weights decodes latents that change slowly; numbers are shares of the standard deviation of
the pixels.  python tests/overlap_table.py
"""

from __future__ import annotations

import torch
from torch import Tensor

from sonic.vae.svd_vae import SvdAutoencoder

SIZES = {"block_out_channels": (64, 64, 128, 128), "down_block_types": ("DownEncoderBlock2D",) * 4, "layers_per_block": 2}
FRAMES, CHUNK, SIDE = 40, 8, 8
KEPT = 0.9  # share of the changing part of the latents that stays from one frame to the next


def latents() -> Tensor:
    """A still picture, and half as much that changes slowly.  -> [n,4,h,w]"""
    changing = torch.randn(FRAMES, 4, SIDE, SIDE)
    for now, before in zip(changing[1:], changing, strict=False):
        now.mul_((1 - KEPT**2) ** 0.5).add_(before, alpha=KEPT)
    return 0.9 * (torch.randn(1, 4, SIDE, SIDE) + 0.5 * changing)


def rms(frames: Tensor) -> Tensor:
    return frames.square().mean((1, 2, 3)).sqrt()


def main() -> None:
    torch.manual_seed(0)
    autoencoder, given = SvdAutoencoder({**SIZES, "latent_channels": 4}), latents()
    (whole,) = autoencoder.decode(given, chunk=FRAMES)
    seams = list(range(CHUNK - 1, FRAMES - 1, CHUNK))
    print("overlap  all frames  worst frame  step at seams")
    for overlap in (0, 1, 2, 3, 4, 6, 8):
        error = torch.cat(list(autoencoder.decode(given, chunk=CHUNK, overlap=overlap))) - whole
        shares = torch.stack([rms(error).mean(), rms(error).max(), rms(error.diff(dim=0))[seams].mean()]) / whole.std()
        print(f"{overlap:7d}  {shares[0]:10.3f}  {shares[1]:11.3f}  {shares[2]:13.3f}")


if __name__ == "__main__":
    main()
