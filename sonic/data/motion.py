"""Motion estimation from video frames of a face crop: the displacement and mouth interior that the preview's autoencoder encodes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from sonic.geometry import FRAMES_PER_LATENT, MOUTH_ANCHOR, MOUTH_UNIT, NECK, smoothstep
from sonic.synthetic.puppet import warped
from sonic.types import MotionLayers

STILL = 0.001  # displacements below this share of the picture are camera noise
HIDDEN = (0.04, 0.12)  # error of the warped picture (black to white = 1): explained by motion below, hidden content above
BORDER = 0.08  # share of the crop over which motion fades to zero, as when a video is composed
POSE_SIDE, POSE_BLUR = 160, 2.0  # where the motion of drawn poses is estimated: about the longer side, and the blur of the lines, in px
GREY = torch.tensor([0.299, 0.587, 0.114])


@torch.no_grad()
def encode_motion(autoencoder: Any, frames: Tensor, rest: Tensor) -> dict[str, Tensor]:
    """Encode 4T frames: `latents` [C,T,h,w], `ref` [C,1,h,w] of the resting picture, and the `head` pose [4T,4].

    frames [4T,3,R,R], rest [3,R,R], both in [-1,1].
    """
    motion = estimate_motion(frames, rest)
    head = head_pose(motion.flow)
    parts = []
    for start in range(0, len(frames), 2 * FRAMES_PER_LATENT):  # small enough for the CPU cache
        window = slice(start, start + 2 * FRAMES_PER_LATENT)
        layers = (value[window].unsqueeze(0) for value in (motion.flow, motion.opacity, motion.interior))
        parts.append(autoencoder.encode(MotionLayers(*layers))[0])
    return {"latents": torch.cat(parts, 1), "ref": autoencoder.reference(rest.unsqueeze(0)).latents[0], "head": head}


def estimate_motion(frames: Tensor, rest: Tensor) -> MotionLayers:
    """Motion of each frame relative to the resting picture, at half its resolution: TV-L1 optical flow, and around the mouth the
    pixels that warping the picture cannot show, with their opacity.  frames [F,3,R,R], rest [3,R,R]

    Source: Zach, Pock and Bischof, A Duality Based Approach for Realtime TV-L1 Optical Flow, 2007, as in scikit-image.
    """
    from skimage.registration import optical_flow_tvl1

    small, still = (F.interpolate(picture, scale_factor=0.5, mode="area") for picture in (frames, rest.unsqueeze(0)))
    before = _grey(still)[0]
    flows = [optical_flow_tvl1(after, before) for after in _grey(small)]
    side = small.shape[-1]
    flow = torch.from_numpy(np.stack(flows)[:, ::-1].copy()).float() / side  # rows and columns -> x and y
    flow = flow * _inside_border(side)
    length = torch.linalg.vector_norm(flow, dim=1, keepdim=True)
    flow = flow * ((length - STILL) / STILL).clamp(0, 1)
    error = (small - warped(still[0], flow)).abs().mean(1, keepdim=True) / 2
    opacity = ((error - HIDDEN[0]) / (HIDDEN[1] - HIDDEN[0])).clamp(0, 1) * _around_mouth(side)
    opacity = F.avg_pool2d(opacity, 3, stride=1, padding=1)
    interior = (small + 1) / 2 * (opacity / 1e-3).clamp(max=1)
    return MotionLayers(flow * ((1 - opacity) / 1e-3).clamp(max=1), opacity, interior)


def head_pose(flow: Tensor) -> Tensor:
    """Head pose from the flow of the upper face, which speech does not move.  [F,2,h,w] -> [F,4] roll, shift x, shift y and zero
    blink, as in draw_face.head_motion.
    """
    side = flow.shape[-1]
    centres = (torch.arange(side) + 0.5) / side
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    dx, dy = x - MOUTH_ANCHOR[0], y - MOUTH_ANCHOR[1] - NECK * MOUTH_UNIT
    face = (dx.abs() < 2 * MOUTH_UNIT) & (y < MOUTH_ANCHOR[1] - MOUTH_UNIT) & (y > 2 * BORDER)
    dx, dy, one, zero = dx[face], dy[face], torch.ones(int(face.sum())), torch.zeros(int(face.sum()))
    rows = torch.cat([torch.stack([dy, -one, zero], 1), torch.stack([-dx, zero, -one], 1)])  # linearised small rotation, as backward flow
    displacements = rearrange(flow[:, :, face], "f c n -> (c n) f")
    pose = torch.linalg.lstsq(rows, displacements).solution.T
    return torch.cat([pose, torch.zeros(len(flow), 1)], 1)


def pose_motion(pose: np.ndarray, first: np.ndarray) -> Tensor:
    """Where what is drawn in a pose is in the first one, by TV-L1 optical flow, in widths and heights of the picture.

    uint8 [H,W,3] of lines on black -> [2,h,w]
    """
    from scipy.ndimage import gaussian_filter
    from skimage.registration import optical_flow_tvl1

    size = max(1, round(max(pose.shape) / POSE_SIDE))
    small = (F.avg_pool2d(torch.from_numpy(each.max(-1)).float().unsqueeze(0), size)[0] / 255 for each in (pose, first))
    here, before = (gaussian_filter(each.numpy(), POSE_BLUR) for each in small)
    brightest = max(before.max(), 1e-3)
    rows, columns = optical_flow_tvl1(here / brightest, before / brightest)
    return torch.from_numpy(np.stack([columns / here.shape[1], rows / here.shape[0]])).float()


def _grey(pictures: Tensor) -> np.ndarray:
    """Luminance.  [F,3,h,w] in [-1,1] -> [F,h,w] in [0,1]"""
    return ((torch.einsum("nchw,c->nhw", pictures, GREY) + 1) / 2).numpy()


def _inside_border(side: int) -> Tensor:
    """Mask that is 1 inside the crop and falls smoothly to 0 at its border.  -> [h,w]"""
    centres = (torch.arange(side) + 0.5) / side
    edge = smoothstep(torch.minimum(centres, 1 - centres) / BORDER)
    return torch.minimum(edge.unsqueeze(0), edge.unsqueeze(1))


def _around_mouth(side: int) -> Tensor:
    """Soft mask: 1 where the inside of an open mouth can be visible, 0 elsewhere.  -> [h,w]"""
    centres = (torch.arange(side) + 0.5) / side
    y, x = torch.meshgrid((centres - MOUTH_ANCHOR[1]) / MOUTH_UNIT, (centres - MOUTH_ANCHOR[0]) / MOUTH_UNIT, indexing="ij")
    return torch.exp(-((x / 1.5) ** 6) - ((y - 0.45) / 1.4) ** 6)
