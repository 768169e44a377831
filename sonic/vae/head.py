"""Moves the head of a photograph as a rigid body about its neck, and blinks its eyes, at its own resolution.  No networks."""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor

from sonic.geometry import MOUTH_UNIT, NECK, smoothstep
from sonic.types import Crop, Portrait
from sonic.vae.eyelids import close_eyes

# Of the head, in mouth units: an ellipse from below the chin to above the hair moves as one, around it the motion fades to zero
CENTRE, RADII = torch.tensor([0.0, -4.2]), torch.tensor([3.2, 4.2])  # the centre is given from the neck
FADED = 1.6  # radii at which nothing moves any more
BORDER = 1.0  # width of the photograph's border in which motion fades, so that nothing comes in from outside


class MovingHead:
    """The head of a photograph in each frame of a video.

    poses [F,4]: roll in radians (+ = clockwise), shift x and y in widths of the crop, blink 0..1.
    """

    def __init__(self, portrait: Portrait, crop: Crop, poses: Tensor):
        sin, cos = math.sin(crop.angle), math.cos(crop.angle)
        self.poses, self.eyes, self.unit = poses, portrait.eyes, MOUTH_UNIT * crop.side
        self.turn = torch.tensor([[cos, -sin], [sin, cos]])  # rotates the head's axes to those of the photograph
        mouth = torch.tensor([portrait.mouth.x, portrait.mouth.y])
        self.neck = mouth + self.turn @ torch.tensor([portrait.head_offset, NECK * self.unit])
        self.size = torch.tensor(portrait.pixels.shape[1::-1])

    @property
    def area(self) -> tuple[slice, slice]:
        """The rows and columns of the photograph that may move."""
        corners = CENTRE + FADED * RADII * torch.tensor([[x, y] for x in (-1.0, 1.0) for y in (-1.0, 1.0)])
        photo = self.unit * corners @ self.turn.T + self.neck
        low, high = photo.amin(0).floor().clamp(min=0).int(), torch.minimum(photo.amax(0).ceil(), self.size).int()
        return slice(int(low[1]), int(high[1])), slice(int(low[0]), int(high[0]))

    def rest(self, points: Tensor, frames: slice) -> Tensor:
        """Where what is at some points in some frames is in the photograph.  [h,w,2] (x, y) px of the photo -> [F,h,w,2]"""
        position = (points - self.neck) @ self.turn / self.unit  # in mouth units
        roll, shift = self.poses[frames, 0], self.poses[frames, 1:3] / MOUTH_UNIT
        back = rearrange(torch.stack([roll.cos(), -roll.sin(), roll.sin(), roll.cos()]), "(i j) f -> f i j", i=2)
        still = torch.einsum("fhwi,fij->fhwj", position - rearrange(shift, "f i -> f 1 1 i"), back)
        weight = self._weight(points, position).unsqueeze(-1)
        return points + weight * (still - position) @ self.turn.T * self.unit

    def _weight(self, points: Tensor, position: Tensor) -> Tensor:
        """Share of the head's motion that each point takes part in: 1 in the head, 0 away from it and at the photo's border.  -> [h,w]"""
        radius = torch.linalg.vector_norm((position - CENTRE) / RADII, dim=-1)
        inside = torch.minimum(points, self.size - points).amin(-1) / (BORDER * self.unit)
        return smoothstep(torch.minimum((FADED - radius) / (FADED - 1), inside))

    def blinking(self, picture: Tensor, corner: Tensor, frames: slice) -> Tensor:
        """A part of the photograph whose upper left corner is given, with the eyes as they are in some frames.  [1,3,h,w] -> [F,3,h,w]"""
        blinks = self.poses[frames, 3]
        if self.eyes is None or not blinks.any():
            return picture.expand(len(blinks), -1, -1, -1)
        eyes = self.eyes - corner.numpy()
        return torch.cat([close_eyes(picture, eyes, blink) if blink else picture for blink in blinks.tolist()])
