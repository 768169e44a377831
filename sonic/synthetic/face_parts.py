"""The parts of a drawn face, drawn as soft masks in mouth units (x right, y down, the middle of the mouth is 0,0)."""

from dataclasses import dataclass, replace

import numpy as np
from scipy.ndimage import gaussian_filter

from sonic.geometry import smoothstep
from sonic.synthetic.puppet import BELOW_LINE, JAW, REVEALED, MouthShape


@dataclass(frozen=True)
class Traits:
    """What is asked of a drawn person: chances of beard, moustache and glasses (1: one that shows), and gap and curve of the lips as in
    `MouthShape`, None = left to chance.  A gap that is asked for shows teeth, tongue and gums as photographs do; with `jaw` the chin is
    lower by as much as speech lowers it to open the lips so far."""

    beard: float = 0.22
    moustache: float = 0.15
    glasses: float = 0.15
    gap: float | None = None
    curve: float | None = None
    jaw: bool = False

    @property
    def jaw_drop(self) -> float:
        """How far the open mouth lowers the chin, in mouth units."""
        return JAW * BELOW_LINE * self.gap if self.jaw else 0.0


EVERYBODY = Traits()


class Painter:
    """A canvas float [R,R,3] in [0,1] with the coordinates `x`, `y` of every pixel in mouth units."""

    def __init__(self, rng: np.random.Generator, resolution: int, *, shape: MouthShape, background: np.ndarray, traits: Traits):
        self.rng, self.shape, self.canvas, self.traits = rng, shape, background.astype(np.float32), traits
        ys, xs = np.mgrid[0:resolution, 0:resolution].astype(np.float32) + 0.5
        dx, dy = (xs - shape.x) / shape.unit, (ys - shape.y) / shape.unit
        cos, sin = np.cos(shape.roll), np.sin(shape.roll)
        self.x, self.y = dx * cos + dy * sin, dy * cos - dx * sin
        self.photo = background.mean(-1)
        self.softness = float(rng.uniform(0.6, 1.6)) / shape.unit  # edges one to two px wide

    def soften_background(self) -> None:
        """Blur the background, or replace it by a plain wall."""
        if self.rng.random() < 0.4:
            self.canvas[:] = self.rng.uniform(0.05, 1, 3) * (1 + self.rng.uniform(-0.15, 0.15) * self.y[..., None] / 4)
        blur = self.rng.uniform(1, 7)
        self.canvas = gaussian_filter(self.canvas, (blur, blur, 0))

    def mask(self, distance: np.ndarray, softness: float = 1.0) -> np.ndarray:
        """Soft mask: 1 where distance > 0, with an edge of `softness` times the drawing's edge width."""
        return np.clip(distance / (self.softness * softness) + 0.5, 0, 1)

    def ellipse(self, middle: tuple[float, float], radii: tuple[float, float], softness: float = 1.0) -> np.ndarray:
        """Soft mask: 1 inside an ellipse, 0 outside."""
        distance = 1 - np.sqrt(((self.x - middle[0]) / radii[0]) ** 2 + ((self.y - middle[1]) / radii[1]) ** 2)
        distance = distance * min(radii)
        return self.mask(distance, softness)

    def spot(self, middle: tuple[float, float], radii: tuple[float, float]) -> np.ndarray:
        """Gaussian mask: 1 in the middle, 1/e at the radii."""
        return np.exp(-(((self.x - middle[0]) / radii[0]) ** 2) - ((self.y - middle[1]) / radii[1]) ** 2)

    def lay(self, mask: np.ndarray, colour: np.ndarray, strength: float = 1.0) -> None:
        """Blend `colour` over the canvas by the mask."""
        self.canvas += (mask * strength)[..., None] * (np.clip(colour, 0, 1) - self.canvas)

    def shade(self, mask: np.ndarray, factor: float) -> None:
        """Multiply the brightness by `factor` where the mask is 1."""
        self.canvas *= 1 + mask[..., None] * (factor - 1)

    def noise(self, sigma: float, along: float | None = None) -> np.ndarray:
        """Smooth noise of unit standard deviation; correlation length `sigma` px, or `along` px in y."""
        field = gaussian_filter(self.rng.normal(0, 1, self.x.shape), (along or sigma, sigma))
        return field / (field.std() + 1e-6)


def draw_head(p: Painter, tone: np.ndarray, hair: np.ndarray) -> None:
    """Draw back hair, neck, clothes, ears and the shaded head."""
    rng, chin = p.rng, p.shape.chin
    cheek, jaw, top = rng.uniform(2.45, 3.0), rng.uniform(1.75, 2.4), rng.uniform(4.9, 5.8)
    if rng.random() < 0.6:
        p.lay(p.ellipse((0, -2.4), (cheek * rng.uniform(1.15, 1.45), rng.uniform(3.2, 6.5)), 4), hair * 0.75)
    p.lay(p.mask(rng.uniform(1.1, 1.7) - np.abs(p.x)) * p.mask(p.y - 0.5), tone * rng.uniform(0.6, 0.85))
    shoulder = chin - p.traits.jaw_drop + rng.uniform(0.7, 1.6) + 0.25 * np.abs(p.x) ** 1.3 * rng.uniform(-0.2, 0.6)
    p.lay(p.mask(p.y - shoulder), rng.uniform(0.05, 1, 3))
    ear = rng.uniform(-2.6, -1.8)
    for side in (-1, 1):
        p.lay(p.ellipse((side * cheek, ear), (0.45, 0.75)), tone * 0.85)
    # half the width of the face at height y: a round skull down to the cheeks, then the jaw closes towards the chin
    skull = cheek * np.sqrt(np.clip(1 - (np.clip(p.y + 2.2, None, 0) / (top - 2.2)) ** 2, 0, 1))
    lower = jaw * np.clip(1 - (np.clip(p.y, 0, None) / chin) ** rng.uniform(2.0, 3.2), 0, 1) ** 0.5
    blend = smoothstep((p.y + 2.2) / 2.2)
    half = np.where(p.y > 0, lower, skull * (1 - blend) + jaw * blend)
    inside = p.mask(np.minimum(half - np.abs(p.x), chin - p.y), 1.5)
    p.lay(inside, tone)
    before = p.canvas.copy()
    light = rng.uniform(-1, 1)
    p.shade(np.clip(light * p.x / cheek, 0, 1), rng.uniform(0.45, 0.95))
    p.shade(np.clip(-light * p.x / cheek, 0, 1) * 0.5, rng.uniform(1.0, 1.2))
    p.shade(np.clip(1 - (half - np.abs(p.x)) / 0.8, 0, 1), rng.uniform(0.55, 0.95))
    p.shade(p.spot((0, chin * 0.98), (1.6, 0.35)), rng.uniform(0.7, 1.0))
    p.shade(p.spot((0, chin * 0.72), (0.5, 0.3)), rng.uniform(1.0, 1.12))
    p.shade(p.spot((0, 0.55), (0.6, 0.14)), rng.uniform(0.75, 1.0))
    fold = rng.uniform(0.7, 1.0)
    for side in (-1, 1):
        p.shade(np.exp(-((np.abs(p.x - side * (1.0 + 0.35 * (p.y + 0.9))) / 0.13) ** 2)) * p.spot((side * 1.15, -0.45), (0.8, 0.6)), fold)
        p.lay(p.spot((side * 1.6, -1.1), (0.7, 0.5)), tone * np.array([1.05, 0.75, 0.72]), rng.uniform(0, 0.4))
    texture = p.photo - gaussian_filter(p.photo, p.x.shape[0] / 16)
    grain = rng.uniform(0.05, 0.7) * texture + rng.uniform(0.0, 0.04) * p.noise(1.2) + rng.uniform(0, 0.06) * p.noise(9)
    p.canvas *= (1 + grain)[..., None]
    p.canvas = before + inside[..., None] * (p.canvas - before)
    _draw_beard(p, hair, inside)


def _draw_beard(p: Painter, hair: np.ndarray, inside: np.ndarray) -> None:
    rng = p.rng
    if rng.random() < p.traits.beard:
        stubble = np.clip(0.6 + 0.4 * p.noise(1.0), 0, 1) * inside * np.clip((p.y + 0.9 - 0.15 * p.x**2) / 0.5, 0, 1)
        p.lay(stubble * (1 - p.spot((0, 0.05), (0.95, 0.32))), hair * 0.8, max(rng.uniform(0.15, 0.85), 0.6 * (p.traits.beard == 1)))
    if rng.random() < p.traits.moustache:
        cover = p.spot((0, -0.5), (1.0, 0.16)) * np.clip(0.7 + 0.3 * p.noise(1.0), 0, 1)
        p.lay(cover, hair * 0.8, max(rng.uniform(0.3, 0.9), 0.7 * (p.traits.moustache == 1)))


def draw_nose(p: Painter) -> None:
    """Draw bridge, tip and nostrils of the nose, with their shadows."""
    rng, y, width = p.rng, -p.rng.uniform(0.9, 1.2), p.rng.uniform(0.42, 0.68)
    side = rng.choice((-1, 1))
    p.shade(p.spot((side * 0.3, y - 0.8), (0.22, 0.9)), rng.uniform(0.7, 0.98))
    p.shade(p.spot((0, y - 0.6), (0.16, 0.9)), rng.uniform(1.0, 1.2))
    p.shade(p.spot((0, y + 0.22), (width * 1.1, 0.13)), rng.uniform(0.6, 0.95))
    for s in (-1, 1):
        p.shade(p.ellipse((s * width * 0.55, y + 0.1), (0.15, 0.08), 2), rng.uniform(0.3, 0.6))
        p.shade(p.spot((s * width, y), (0.12, 0.22)), rng.uniform(0.75, 0.95))


def draw_brows_and_eyes(p: Painter, hair: np.ndarray) -> None:
    """Draw eyes, brows and sometimes glasses; stores the eyes' positions in the painter's mouth shape."""
    rng = p.rng
    y, apart, rx, ry = -rng.uniform(2.45, 3.0), rng.uniform(1.15, 1.42), rng.uniform(0.5, 0.68), rng.uniform(0.15, 0.32)
    iris, gaze = rng.uniform(0.08, 0.55, 3), rng.uniform(-0.2, 0.2)
    brow_height, brow_width = rng.uniform(0.3, 0.5), rng.uniform(0.06, 0.16)
    cos, sin, eyes = np.cos(p.shape.roll), np.sin(p.shape.roll), []
    for side in (-1, 1):
        x = side * apart
        p.shade(p.spot((x, y - 0.1), (0.85, 0.55)), rng.uniform(0.72, 0.95))
        white = p.ellipse((x, y), (rx, ry))
        p.lay(white, np.array([0.95, 0.94, 0.92]) * rng.uniform(0.8, 1.0))
        for colour, radius in ((iris, 0.27), (np.array([0.03, 0.03, 0.04]), 0.13)):
            p.lay(white * p.ellipse((x + gaze, y - 0.02), (radius, radius)), colour)
        p.lay(white * p.ellipse((x + gaze - 0.08, y - 0.1), (0.06, 0.06)), np.ones(3))
        rim = np.exp(-(((p.y - y + ry * np.sqrt(np.clip(1 - ((p.x - x) / rx) ** 2, 0, 1))) / 0.07) ** 2)) * (np.abs(p.x - x) < rx)
        p.lay(rim, hair * 0.3, rng.uniform(0.4, 0.95))
        arc = y - ry - brow_height + 0.25 * ((p.x - x) / 0.8) ** 2
        p.lay(np.exp(-(((p.y - arc) / brow_width) ** 2)) * p.mask(0.8 - np.abs(p.x - x), 4), hair * 0.8, rng.uniform(0.4, 0.95))
        unit = p.shape.unit
        eyes.append((p.shape.x + (x * cos - y * sin) * unit, p.shape.y + (x * sin + y * cos) * unit, rx * unit, ry * unit))
    if rng.random() < p.traits.glasses:
        frame = rng.uniform(0, 0.5, 3)
        for side in (-1, 1):
            radius = np.sqrt(((p.x - side * apart) / 0.95) ** 2 + ((p.y - y) / rng.uniform(0.6, 0.85)) ** 2)
            p.lay(np.exp(-(((radius - 1) / 0.07) ** 2)), frame)
        p.lay(np.exp(-(((p.y - y) / 0.06) ** 2)) * (np.abs(p.x) < apart - 0.9), frame)
    p.shape = replace(p.shape, eyes=tuple(eyes))


def draw_mouth(p: Painter, tone: np.ndarray, strength: float = 1.0) -> None:
    """Draw both lips at rest, the gap between them, and the line where they meet."""
    rng, shape = p.rng, p.shape
    inner = np.clip(1 - (p.x / 0.97) ** 2, 0, 1)
    arch, line = inner**0.7, shape.curve * (1 - np.minimum(p.x**2, 2))
    upper, lower = line - 0.35 * shape.gap * arch, line + 0.65 * shape.gap * arch
    outer = np.clip(1 - p.x**2, 0, 1) ** 0.6
    bow = 1 - rng.uniform(0.1, 0.35) * np.exp(-((p.x / 0.16) ** 2))
    top, bottom = upper - rng.uniform(0.14, 0.4) * outer * bow, lower + rng.uniform(0.2, 0.52) * outer
    lip = np.clip(tone * np.array([0.98, 0.64, 0.62]) * rng.uniform(0.7, 1.08) * rng.normal(1, 0.05, 3), 0, 1)
    if rng.random() < 0.15:
        lip = np.array([0.75, 0.12, 0.2]) * rng.uniform(0.6, 1.1)
    lips = p.mask(np.minimum(p.y - top, bottom - p.y), 1.5) * (np.abs(p.x) < 1)
    faint = strength * rng.uniform(0.35, 1.0)
    p.lay(lips * (p.y < line), lip * rng.uniform(0.75, 0.95), faint)
    p.lay(lips * (p.y >= line), lip, faint)
    p.lay(p.spot((rng.uniform(-0.2, 0.2), 0.15 + 0.65 * shape.gap + shape.curve), (0.4, 0.09)), np.ones(3), rng.uniform(0, 0.3) * strength)
    if shape.gap >= REVEALED:
        interior = _draw_smile if p.traits.gap is None else _draw_interior
        interior(p, upper, lower, strength=strength)
    crease = np.exp(-(((p.y - (upper if shape.gap >= REVEALED else line)) / rng.uniform(0.03, 0.07)) ** 2)) * (np.abs(p.x) < 0.98)
    p.lay(crease, lip * rng.uniform(0.2, 0.45), strength * rng.uniform(0.45, 1.0))
    for side in (-1, 1):
        p.shade(p.spot((side * 1.02, shape.curve * 0.1), (0.12, 0.1)), rng.uniform(0.6, 1.0))


def _draw_smile(p: Painter, upper: np.ndarray, lower: np.ndarray, *, strength: float) -> None:
    """Draw the teeth, and the dark below or beside them, of a mouth that is open at rest."""
    rng, look = p.rng, p.shape.inside
    between = p.mask(np.minimum(p.y - upper, lower - p.y)) * (np.abs(p.x) < 0.97)
    p.lay(between, np.array(look["throat"]) * 1.1, strength)
    height = p.shape.gap * (1.2 if rng.random() < 0.6 else rng.uniform(0.35, 0.9))
    seams = 1 - rng.uniform(0.05, 0.25) * np.exp(-(((np.abs(np.mod(p.x / 0.2 + 0.5, 1) - 0.5)) / 0.09) ** 2))
    row = between * p.mask(upper + height - p.y) * p.mask(rng.uniform(0.7, 0.95) - np.abs(p.x), 3)
    enamel = np.array(look["teeth"]) * (1 - 0.35 * p.x**2)[..., None] * seams[..., None]
    p.canvas += (row * strength)[..., None] * (np.clip(enamel, 0, 1) - p.canvas)


def _draw_interior(p: Painter, upper: np.ndarray, lower: np.ndarray, *, strength: float) -> None:
    """Draw what a photograph of an open mouth shows: the dark, the tongue, lower and upper teeth, the gums and the lip's shadow.

    Its random numbers are not those of the rest of the face, which therefore looks the same with closed lips.
    """
    rng, look, gap, curve = p.rng.spawn(1)[0], p.shape.inside, p.shape.gap, p.shape.curve
    between = p.mask(np.minimum(p.y - upper, lower - p.y)) * (np.abs(p.x) < 0.97)
    before = p.canvas.copy()
    depth = np.clip((p.y - upper) / np.maximum(lower - upper, 0.02), 0, 1)
    p.canvas[:] = np.array(look["throat"]) * (1.4 - 0.8 * np.sin(np.pi * depth))[..., None]
    floor = curve + 0.65 * gap
    tongue = p.mask(1 - (p.x / rng.uniform(0.55, 0.75)) ** 2 - ((p.y - floor) / (rng.uniform(0.35, 0.65) * gap)) ** 2, 3)
    p.lay(tongue, np.array(look["tongue"]), rng.uniform(0.7, 1))
    p.shade(tongue * np.exp(-((p.x / 0.06) ** 2)), rng.uniform(0.75, 0.95))
    p.shade(tongue * p.spot((rng.uniform(-0.25, 0.25), floor - 0.25 * gap), (0.15, 0.05)), rng.uniform(1.1, 1.5))
    if gap > 0.3 and rng.random() < 0.5:
        _draw_teeth(p, rng, (floor + rng.uniform(0.02, 0.08) - 0.3 * gap * p.x**2 - p.y) / rng.uniform(0.16, 0.26), reach=0.7)
    base = curve * (1 - 0.6 * p.x**2) - 0.35 * gap + rng.uniform(-0.1, 0.05)
    _draw_teeth(p, rng, (p.y - base) / (rng.uniform(1.1, 1.5) * look["teeth_height"][0]), reach=rng.uniform(0.75, 0.95))
    p.shade(np.exp(-np.clip(p.y - upper, 0, None) / 0.09), rng.uniform(0.4, 0.8))
    p.canvas = before + (between * strength)[..., None] * (p.canvas - before)


def _draw_teeth(p: Painter, rng: np.random.Generator, along: np.ndarray, *, reach: float) -> None:
    """Draw a row of teeth from the gums to their edges: `along` [R,R] is 0 where they leave the gums and 1 at the edge of the longest."""
    ends = np.cumsum((0.25, 0.2, 0.19, 0.15, 0.12, 0.1)) * rng.uniform(0.85, 1.1)
    number = np.minimum(np.searchsorted(ends, np.abs(p.x)), len(ends) - 1)
    widths = np.diff(ends, prepend=0)
    across = 2 * (ends[number] - np.abs(p.x)) / widths[number] - 1  # of each tooth, -1..1
    length = (np.array((1, 0.88, 0.97, 0.85, 0.78, 0.7)) * rng.uniform(0.94, 1.03, len(ends)))[number]
    row = np.clip((length * (1 - 0.15 * across**4) - along) * 5 + 0.5, 0, 1) * p.mask(reach - np.abs(p.x), 3)
    p.lay(row * (along < 0), np.array((0.72, 0.42, 0.42)) * rng.uniform(0.8, 1.1))
    seams = 1 - rng.uniform(0.15, 0.45) * np.exp(-(((1 - np.abs(across)) / 0.2) ** 2))
    light = seams * (1 - 0.4 * p.x**2) * (0.85 + 0.15 * np.clip(along, 0, 1))
    gleam = rng.uniform(0, 0.25) * np.exp(-((across / 0.35) ** 2) - ((along - 0.5) / 0.25) ** 2)
    enamel = np.array(p.shape.inside["teeth"]) * light[..., None] + gleam[..., None]
    p.canvas += (row * np.clip(along * 8, 0, 1))[..., None] * (np.clip(enamel, 0, 1) - p.canvas)


def draw_hair(p: Painter, hair: np.ndarray) -> None:
    """Draw the hair in front: a fringe or a parting above the brows, sometimes long at the sides."""
    rng = p.rng
    if rng.random() < 0.08:
        return
    line = -rng.uniform(3.7, 4.8) + rng.uniform(-0.25, 0.25) * p.x + rng.uniform(-0.02, 0.16) * p.x**2
    cover = p.mask(line - p.y, 6)
    if rng.random() < 0.5:
        edge = rng.uniform(2.3, 2.9) + 0.25 * np.sin(p.y * rng.uniform(0.8, 2) + rng.uniform(0, 6))
        cover = np.maximum(cover, p.mask(np.abs(p.x) - edge, 6) * p.mask(rng.uniform(-2, 3.5) - p.y, 8))
    strands = 1 + rng.uniform(0.05, 0.35) * p.noise(0.9, along=rng.uniform(4, 12))
    p.canvas += (cover * 0.97)[..., None] * (np.clip(hair * strands[..., None], 0, 1) - p.canvas)
