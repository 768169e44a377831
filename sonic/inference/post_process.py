"""Smooths and interpolates a video over time as `post` asks: motion layers before they are rendered, generated pixels after decoding.

Smoothing delays a stream by three frames and interpolation by one or two more; memory does not grow with the length.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from einops import rearrange
from scipy.signal import firwin
from skimage.registration import optical_flow_ilk
from torch import Tensor
from torch.nn import functional as F

from sonic.inference.post_config import PostConfig
from sonic.inference.stabilize import stabilize
from sonic.inference.stream import windows
from sonic.types import FrameChunk, Inputs, MotionLayers
from sonic.vae.warp import unit_grid

JITTER_HZ = 7.3  # motion above this is taken for jitter: most of speech is slower, and lips still close for m, b and p
TAPS = 7  # frames in the smoothing kernel
HALFWAY = ((0, 0, 1, 0, 0), (0, -1 / 16, 9 / 16, 9 / 16, -1 / 16))  # weights for a frame itself, and for halfway to the next: cubic
FLOW_RADIUS, FLOW_SIDE = 15, 512  # px: window of the optical flow, and the longer side of the frames that it is computed from
AVERAGED = 7  # px: side of the square over which the error of a pixel is averaged
DOUBT = 1.0  # grey levels of error that hardly count when frames are blended


def as_displayed(inputs: Inputs, post: PostConfig) -> Inputs:
    """The inputs with the number of frames and the frame rate of the finished video, which are `post.interpolate` times the model's."""
    return replace(inputs, num_frames=inputs.num_frames * post.interpolate, fps=inputs.fps * post.interpolate)


def process_motion(motion: Iterator[MotionLayers], post: PostConfig, fps: float) -> Iterator[MotionLayers]:
    """The motion layers of a video at `fps`, smoothed and interpolated as `post` says, in chunks as they come."""
    if post.smooth_motion:
        motion = _weighted(motion, [smoothing_kernel(post.smooth_motion, fps)])
    return _weighted(motion, HALFWAY) if post.interpolate == 2 else motion


def process_pixels(chunks: Iterator[Tensor], post: PostConfig, fps: float) -> Iterator[Tensor]:
    """The frames of a video at `fps`, uint8 [F,H,W,3], smoothed and interpolated as `post` says, in chunks as they come."""
    if post.smooth_motion:
        chunks = stabilize(chunks, smoothing_kernel(post.smooth_motion, fps))
    return _doubled(chunks) if post.interpolate == 2 else chunks


def smoothing_kernel(strength: float, fps: float) -> np.ndarray:
    """Weights of TAPS frames that leave slow motion as it is and take out the share `strength` of what is faster than JITTER_HZ."""
    weights = strength * firwin(TAPS, JITTER_HZ, window=("kaiser", 2.0), fs=fps)
    weights[TAPS // 2] += 1 - strength
    return weights


def numbered(chunks: Iterable[Tensor]) -> Iterator[FrameChunk]:
    """The chunks of frames with the index of their first frames."""
    start = 0
    for pixels in chunks:
        yield FrameChunk(pixels, start)
        start += len(pixels)


def _weighted(motion: Iterator[MotionLayers], kernels: Sequence[Sequence[float]]) -> Iterator[MotionLayers]:
    """For every frame the weighted sums of the frames around it, one for each kernel: as many times the frames as there are kernels."""
    frames = (zip(*(track.unbind(1) for track in layers), strict=True) for layers in motion)
    for group in windows(frames, len(kernels[0]) // 2):
        sums = [
            [sum(weight * track for weight, track in zip(kernel, tracks, strict=True)) for tracks in zip(*window, strict=True)]
            for window in group
            for kernel in kernels
        ]
        yield MotionLayers(*(torch.stack(tracks, dim=1) for tracks in zip(*sums, strict=True)))


def _doubled(chunks: Iterator[Tensor]) -> Iterator[Tensor]:
    """Every frame followed by the one halfway to the next; the last frame is shown twice."""
    for group in windows(chunks, 1):
        yield torch.stack([frame for _, now, after in group for frame in (now, halfway(now, after))])


def halfway(before: Tensor, after: Tensor) -> Tensor:
    """The frame between two frames, uint8 [H,W,3]: both warped by half the optical flow between them, and neither, blended
    by how well each explains the other frame.

    Source: Le Besnerais and Champagnat, Dense Optical Flow by Iterative Local Window Registration, 2005, as in scikit-image. A learned
    interpolator, such as IFNet of RIFE where its weights are there, would be chosen here.
    """
    if torch.equal(before, after):
        return before
    pair = rearrange([before, after], "f h w c -> f c h w").float()
    shrunk = min(1.0, FLOW_SIDE / max(pair.shape[-2:]))
    grey = pair.mean(1, keepdim=True)
    if shrunk < 1:
        grey = F.interpolate(grey, scale_factor=shrunk, mode="bilinear", antialias=True, align_corners=False)
    first, second = grey[:, 0].numpy() / 255
    flows = np.stack([optical_flow_ilk(second, first, radius=FLOW_RADIUS), optical_flow_ilk(first, second, radius=FLOW_RADIUS)])
    flow = torch.from_numpy(flows[:, ::-1].copy())  # of each frame: where its content is in it, from where that is in the other
    flow = (flow - flow.flip(0)) / 2  # there and back are the same way
    relative = flow / rearrange(torch.tensor(flow.shape[:1:-1]), "n -> n 1 1") * 2
    relative = F.interpolate(relative, pair.shape[-2:], mode="bilinear", align_corners=False)
    steps = rearrange(relative, "f n h w -> f h w n")
    grid = unit_grid(*pair.shape[-2:], pair)

    def warped(share: float) -> Tensor:
        return F.grid_sample(pair, grid + share * steps, mode="bicubic", padding_mode="border", align_corners=False)

    choices = torch.cat([warped(0.5), pair.mean(0, keepdim=True)])  # what flow cannot follow, as lips that part, is blended
    errors = torch.cat([warped(1.0) - pair.flip(0), pair[:1] - pair[1:]]).abs().mean(1, keepdim=True)
    weights = 1 / (F.avg_pool2d(errors, AVERAGED, 1, AVERAGED // 2, count_include_pad=False) + DOUBT)
    found = (choices * weights).sum(0) / weights.sum(0)
    return rearrange(found, "c h w -> h w c").round().clamp(0, 255).to(torch.uint8)
