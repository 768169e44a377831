"""Applies motion layers to a photograph: displaces its pixels and blends in the inside of the mouth.  No networks.

Shapes: H and W the rows and columns of the photograph, h and w those of the motion layers.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from sonic.geometry import pixels_around, smoothstep
from sonic.types import Crop, MotionLayers, Portrait
from sonic.vae.head import MovingHead

BORDER = 0.08  # width of the border of the crop in which motion fades to zero, as a share of its side, so that no seam shows
NOISE_FLOOR = 0.0006  # displacements below this share of the crop's side are treated as zero

LIPS = 0.2  # opacity above which the inside of the mouth is seen, whose own displacement is not read
SPREADS, SPREAD = 20, 5  # means over SPREAD x SPREAD values that fill it from its surroundings
SOLVER_STEPS = 8  # of an equation that is solved to a fraction of a pixel

PIXELS_AT_ONCE = 2_000_000  # pixels, frames times area, that are composed at a time, which limits memory


def unit_grid(height: int, width: int, like: Tensor) -> Tensor:
    """Coordinates of the pixel centres in [-1,1], in the form of grid_sample.  -> [height,width,2] (x, y)"""
    ys = (torch.arange(height, device=like.device, dtype=like.dtype) + 0.5) / height * 2 - 1
    xs = (torch.arange(width, device=like.device, dtype=like.dtype) + 0.5) / width * 2 - 1
    return torch.stack(torch.meshgrid(xs, ys, indexing="xy"), -1)


def fade(height: int, width: int, like: Tensor) -> Tensor:
    """A weight of 1 inside the crop that falls smoothly to 0 at its border.  -> [height,width]"""
    return smoothstep((1 - unit_grid(height, width, like).abs().amax(-1)) / (2 * BORDER))


def settle(layers: MotionLayers) -> MotionLayers:
    """The layers as they are applied to the photograph: faded out at the border, with displacements below NOISE_FLOOR set to zero."""
    window = fade(*layers.flow.shape[-2:], layers.flow)
    flow = layers.flow * window
    length = torch.linalg.vector_norm(flow, dim=2, keepdim=True)
    flow = flow * ((length - NOISE_FLOOR) / NOISE_FLOOR).clamp(0, 1)
    return MotionLayers(flow, ((layers.opacity - 0.04) / 0.92).clamp(0, 1) * window, layers.interior.clamp(0, 1))


def scale_mouth(layers: MotionLayers, scale: float) -> MotionLayers:
    """The layers of a mouth that moves `scale` times as far: each frame as it is spoken, displaced by scale - 1 times its own motion.

    The displacement is smooth across the inside of the mouth, which stretches with the lips; so nothing tears.
    layers of one person [1,F,...]
    """
    points, grid = move_further(_smooth_flow(layers)[0], scale), unit_grid(*layers.flow.shape[-2:], layers.flow)
    sampled = F.grid_sample(torch.cat(layers, 2)[0], points, padding_mode="border", align_corners=False)
    flow, opacity, interior = rearrange(sampled, "f c h w -> 1 f c h w").split([2, 1, 3], dim=2)
    return MotionLayers(flow + rearrange(points - grid, "f h w c -> 1 f c h w") / 2, opacity, interior)


def move_further(flow: Tensor, scale: float) -> Tensor:
    """Where frames are sampled for motion that goes `scale` times as far, in the form of grid_sample.  flow [F,2,h,w] -> [F,h,w,2]

    What is at q came from q + flow(q) and shall go to p = q - (scale - 1) * flow(q), which is solved for q by damped iteration.
    """
    grid = unit_grid(*flow.shape[-2:], flow)
    extra, points = 2 * (scale - 1) * flow, grid.expand(len(flow), -1, -1, -1)
    for _ in range(SOLVER_STEPS):
        found = F.grid_sample(extra, points, padding_mode="border", align_corners=False)
        points = (points + grid + rearrange(found, "f c h w -> f h w c")) / 2
    return points


def _smooth_flow(layers: MotionLayers) -> Tensor:
    """The displacement of the face, with that of the lips spread over the inside of the mouth.  -> [1,F,2,h,w]"""
    inside, filled = (layers.opacity / LIPS).clamp(0, 1), layers.flow
    for _ in range(SPREADS):
        filled = torch.lerp(layers.flow, _local_mean(filled, SPREAD), inside)
    return _local_mean(filled, 3)


def _local_mean(tracks: Tensor, size: int) -> Tensor:
    """Means over size x size values.  [1,F,C,h,w] -> [1,F,C,h,w]"""
    return F.avg_pool2d(tracks[0], size, stride=1, padding=size // 2, count_include_pad=False).unsqueeze(0)


class Canvas:
    """A photograph to which motion layers are applied; pixels that do not move stay exactly the same.

    `crop` is the square of the photograph that the layers cover; `head` moves the whole head besides; the mouth moves `dynamic_scale`
    times as far as the layers say. What the portrait itself shows inside its mouth keeps its place in the head and covers the layers'
    interior.
    """

    def __init__(self, portrait: Portrait, crop: Crop, head: MovingHead | None = None, *, dynamic_scale: float = 1.0):
        self.pixels, self.crop, self.head = torch.from_numpy(portrait.pixels), crop, head
        self.dynamic_scale = dynamic_scale
        sin, cos = math.sin(crop.angle), math.cos(crop.angle)
        self.turn = torch.tensor([[cos, -sin], [sin, cos]])  # rotates crop axes to photograph axes
        self.centre = torch.tensor([crop.center_x, crop.center_y])
        radius = crop.side * (abs(sin) + abs(cos)) / 2
        height, width = portrait.pixels.shape[:2]
        rows, columns = pixels_around(crop.center_y, radius, height), pixels_around(crop.center_x, radius, width)
        if head is not None:
            rows, columns = (slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in zip((rows, columns), head.area, strict=True))
        self.top, self.left = rows.start, columns.start
        self.source = rearrange(self.pixels[rows, columns], "h w c -> 1 c h w").float()
        self.inside = None
        if portrait.inside is not None:
            self.inside = rearrange(torch.from_numpy(portrait.inside[rows, columns]), "h w c -> 1 c h w").float()

    def render(self, layers: MotionLayers, first: int = 0) -> Tensor:
        """The frames of the photograph in motion, of which `first` is the number of the first one in the video.

        layers of one person [1,F,...] -> uint8 [F,H,W,3]
        """
        if self.dynamic_scale != 1:
            layers = scale_mouth(layers, self.dynamic_scale)
        layers = settle(layers)
        stacked = torch.cat([layers.flow, layers.opacity, layers.interior], 2)[0]
        frames = self.pixels.expand(stacked.shape[0], -1, -1, -1).clone()
        box = self._moving_box(stacked)
        if box is None:
            return frames
        top, bottom, left, right = box
        share = max(1, PIXELS_AT_ONCE // max(1, (bottom - top) * (right - left)))
        for start in range(0, stacked.shape[0], share):
            part = stacked[start : start + share]
            frames[start : start + share, top:bottom, left:right] = self._compose(part, box, first + start)
        return frames

    def _moving_box(self, stacked: Tensor) -> tuple[int, int, int, int] | None:
        """(top, bottom, left, right) in photo pixels of all that moves in any frame; None when nothing does.  stacked [F,6,h,w]"""
        moved = (stacked[:, :3] != 0).any(0).any(0)
        if self.head is not None:
            return self.top, self.top + self.source.shape[2], self.left, self.left + self.source.shape[3]
        if not moved.any():
            return None
        height, width = moved.shape
        rows, columns = moved.any(1).nonzero().flatten(), moved.any(0).nonzero().flatten()
        low = torch.stack([columns[0] - 1, rows[0] - 1]) / torch.tensor([width, height])
        high = torch.stack([columns[-1] + 2, rows[-1] + 2]) / torch.tensor([width, height])
        corners = torch.tensor([[x, y] for x in (low[0], high[0]) for y in (low[1], high[1])])
        photo = (corners - 0.5) * self.crop.side @ self.turn.T + self.centre
        left, top = photo.amin(0).floor().int().tolist()
        right, bottom = photo.amax(0).ceil().int().tolist()
        top, left = max(top, self.top), max(left, self.left)
        bottom, right = min(bottom, self.top + self.source.shape[2]), min(right, self.left + self.source.shape[3])
        return (top, bottom, left, right) if bottom > top and right > left else None

    def _compose(self, stacked: Tensor, box: tuple[int, int, int, int], first: int) -> Tensor:
        """The part of the frames from `first` on inside the box.  stacked [F,6,h,w] -> uint8 [F,bottom-top,right-left,3]"""
        top, bottom, left, right = box
        ys, xs = torch.arange(top, bottom) + 0.5, torch.arange(left, right) + 0.5
        points, corner = torch.stack(torch.meshgrid(xs, ys, indexing="xy"), -1), torch.tensor([self.left, self.top])
        source = self.source
        if self.head is not None:
            frames = slice(first, first + stacked.shape[0])
            points, source = self.head.rest(points, frames), self.head.blinking(self.source, corner, frames)
        inside = (points - self.centre) @ self.turn * (2 / self.crop.side)
        sampled = F.grid_sample(stacked, inside.expand(stacked.shape[0], -1, -1, -1), padding_mode="zeros", align_corners=False)
        flow, opacity, interior = sampled.split([2, 1, 3], dim=1)
        moved = rearrange(flow, "f c h w -> f h w c") @ self.turn.T * self.crop.side
        warped = _at(source, points - corner + moved, mode="bicubic")
        edge = min(max(self.crop.side / stacked.shape[-1] / 2, 1.0), 4.0)  # sharpens the lip line to the photograph's resolution
        opacity = ((opacity - 0.5) * edge + 0.5).clamp(0, 1)
        interior = interior * 255
        if self.inside is not None:
            own = _at(self.inside, (points - corner).expand(*moved.shape), mode="bilinear")
            interior = torch.lerp(interior, own[:, :3], own[:, 3:] / 255)
        composed = torch.lerp(warped, interior, opacity)
        return rearrange(composed, "f c h w -> f h w c").round().clamp(0, 255).to(torch.uint8)


def _at(picture: Tensor, points: Tensor, *, mode: str) -> Tensor:
    """The colours of a picture [1 or F,C,h,w] at points [F,rows,columns,2] in its px.  -> [F,C,rows,columns]"""
    size = torch.tensor([picture.shape[3], picture.shape[2]])
    picture = picture.expand(len(points), -1, -1, -1)
    return F.grid_sample(picture, points / size * 2 - 1, mode=mode, padding_mode="border", align_corners=False)
