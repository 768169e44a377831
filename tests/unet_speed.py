"""Prints the seconds of a window call of SvdUNet beside those of diffusers' classes wired as published.

PYTHONPATH=. python tests/unet_speed.py"""

from __future__ import annotations

import argparse
from statistics import median
from time import process_time

import torch
from plain_sonic_unet import PlainUNet

from sonic.config import UNetConfig
from sonic.model.svd_unet import SvdUNet, UNetConditions

WIDE = UNetConfig([64, 128, 256, 256], [1, 2, 4, 4], cross_attention_dim=208)  # a fifth of the published widths


def measure(frames: int, height: int, turns: int) -> tuple[list[float], list[float], float]:
    """Seconds of the CPU of both in turns, and their largest difference, of a call with three rows of guidance."""
    torch.manual_seed(0)
    unet = SvdUNet(WIDE).eval()
    plain = PlainUNet(WIDE, unet).eval()
    sample, ids = torch.randn(3, frames, 8, height // 8, 64), torch.tensor([[12.5, 30.0, 20.0]] * 3)
    tokens, embed, mask = torch.randn(frames + 1, 32, 208), torch.randn(2, 1, 1, 208), torch.ones(1, 1, height, 512)
    rows = [[0] * frames, [0] * frames, list(range(1, frames + 1))]
    ours = UNetConditions(embed, tokens, ids, mask, frames=rows, cache={})
    theirs = UNetConditions(torch.cat((0 * embed[:1], embed)), tokens[torch.tensor(rows)], ids, mask)
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(turns):
        results = []
        for model, given, taken in ((unet, ours, seconds[0]), (plain, theirs, seconds[1])):
            start = process_time()
            results.append(model(sample, 0.5, given))
            taken.append(process_time() - start)
    return *seconds, (results[0] - results[1]).abs().max().item()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=25)
    parser.add_argument("--height", type=int, default=128, help="of pictures 512 pixels wide")
    parser.add_argument("--turns", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)  # so that the time of the CPU is that of a call, whatever else the machine does
    with torch.no_grad():
        ours, theirs, difference = measure(args.frames, args.height, args.turns)
    print(f"{args.frames} frames of 512x{args.height} pixels, 3 rows, channels {WIDE.block_out_channels}")
    print(f"SvdUNet {median(ours):.2f} s, as published {median(theirs):.2f} s: {median(theirs) / median(ours):.2f} times faster")
    print(f"each turn {[f'{b / a:.2f}' for a, b in zip(ours, theirs, strict=True)]}; largest difference {difference:.1e}")


if __name__ == "__main__":
    main()
