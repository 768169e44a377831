"""bench faces: which faces are found, how exactly their mouths, and what is taken for a face where there is none.

Drawn people have known mouths; portraits in `timing.portraits`, and the bundled one, are varied in ways that leave them portraits, and
the mouth must be found where the unvaried one has it.
"""

from __future__ import annotations

import io
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image
from scipy.ndimage import gaussian_filter
from skimage import data

from sonic.data.faces import CONFIDENT, Face, FaceFinder, find_speaker
from sonic.data.image import image_in_memory, load_image
from sonic.inference.infer_config import BenchConfig
from sonic.inference.inputs import PORTRAITS
from sonic.synthetic.draw_face import TEXTURES, draw_identity

LOG = logging.getLogger(__name__)
PEOPLE, VARIATIONS, EMPTY, SIDE = 500, 40, 200, 192
EXACT, NEAR = 0.04, 0.1  # errors of the mouth's middle, in widths of the face, that count as exact and as the same mouth
WIDTH = 5.0  # of a drawn face, in mouth units: the mouth is a fifth of the face box on either side
WITHOUT_FACES = [name for name in TEXTURES if name != "camera"]  # the bundled photographs; the cameraman has a face


@dataclass(frozen=True)
class VariedPortrait:
    """A picture with a face: where its mouth is [2] and how wide the face is, in px."""

    picture: Image.Image
    mouth: np.ndarray
    width: float


def bench_faces(config: BenchConfig, begun: float) -> dict:
    """Figures of the face finder, and the constants of faces.py as drawn people of the training split give them."""
    finder = FaceFinder()
    portraits, figures = partial(varied_portraits, folder=config.timing.portraits), {}
    sections = {"drawn": drawn_people, "portraits": portraits, "without faces": empty_pictures, "fitted": fitted_constants}
    for name, measure in sections.items():
        figures[name] = measure(finder)
        LOG.info("%s: %s, %.0f s so far", name, figures[name], time.perf_counter() - begun)
    return figures


def drawn_people(finder: FaceFinder) -> dict:
    """How many drawn people of the test split are found, and the error of their mouths in widths of the face."""
    errors, seconds = [], []
    for number in range(PEOPLE):
        person, begun = _person("test", number), time.perf_counter()
        face = _speaker(finder, person.picture)
        seconds.append(time.perf_counter() - begun)
        if face is not None:
            off = math.dist((face.mouth.x, face.mouth.y), (person.mouth.x, person.mouth.y))
            errors.append(off / (WIDTH * person.mouth.unit))
    exact = sum(error <= EXACT for error in errors)
    return {
        "found": f"{len(errors)} of {PEOPLE}",
        f"mouth within {EXACT:.0%}": f"{exact / PEOPLE:.1%}",
        "mouth off, median and 98 %": " ".join(f"{value:.4f}" for value in np.quantile(errors, (0.5, 0.98))),
        "seconds a picture, median": f"{np.median(seconds):.3f}",
    }


def varied_portraits(finder: FaceFinder, folder: str) -> dict:
    """How many variations of each portrait have their mouth found, and which have not."""
    figures, found, tried = {}, 0, 0
    for path in [*PORTRAITS.values(), *(sorted(Path(folder).glob("*.[jp][pn]*g")) if folder else [])]:
        pixels = load_image(path)
        face, missed = _speaker(finder, pixels), []
        if face is None:
            figures[path.name], tried = "not found", tried + VARIATIONS
            continue
        sample = VariedPortrait(Image.fromarray(pixels), np.array([face.mouth.x, face.mouth.y]), face.box.width)
        for name, varied in variations(sample):
            upright = image_in_memory if "exif" in varied.picture.info else np.array  # which takes smaller pictures too
            seen = _speaker(finder, upright(varied.picture))
            if seen is None or math.dist((seen.mouth.x, seen.mouth.y), varied.mouth) > NEAR * varied.width:
                missed.append(name)
        found, tried = found + VARIATIONS - len(missed), tried + VARIATIONS
        figures[path.name] = f"{VARIATIONS - len(missed)} of {VARIATIONS}" + (f", not: {'; '.join(missed)}" if missed else "")
    return {"found": f"{found / tried:.1%} of {tried}", **figures}


def empty_pictures(finder: FaceFinder) -> dict:
    """How many pictures without a face have one found in them, and the largest confidence."""
    surest = {}
    for name, pixels in pictures_without_faces():
        found = finder.faces(pixels)
        surest[name] = found[0].confidence if found else 0.0
    wrong = [name for name, confidence in surest.items() if confidence >= CONFIDENT]
    return {
        "found": f"{len(wrong)} of {len(surest)}",
        "largest confidence": f"{max(surest.values()):.2f}",
        **({"in": "; ".join(wrong)} if wrong else {}),
    }


def fitted_constants(finder: FaceFinder) -> dict:
    """SIZE, WIDTH and INNER of faces.py as the drawn people give them: medians, and the least squares of INNER."""
    size, width, inner = [], [], []
    for number in range(PEOPLE):
        person = _person("train", number)
        face = _speaker(finder, person.picture)
        if face is None:
            continue
        found, truth = face.landmarks, np.array([person.mouth.x, person.mouth.y])
        eyes, corners = found.eye_centres, found.corners.mean(axis=0)
        down = math.dist(eyes.mean(axis=0), truth)
        size.append(WIDTH * person.mouth.unit / math.sqrt(math.dist(*eyes) * down))
        width.append(2 * person.mouth.unit / math.dist(*found.corners))
        inner.append((found.inner_edges.mean(axis=0) - corners, truth - corners))
    towards, wanted = (np.stack(part)[:, 1] for part in zip(*inner, strict=True))  # the faces are upright
    rows = {"SIZE": np.array(size), "WIDTH": np.array(width)}
    words = {name: f"{np.median(values):.3f} ± {values.std() / values.mean():.1%}" for name, values in rows.items()}
    return {**words, "INNER": f"{towards @ wanted / (towards @ towards):.2f}"}


def variations(sample: VariedPortrait) -> Iterator[tuple[str, VariedPortrait]]:
    """VARIATIONS of a portrait by name: each of CHANGES, then random pairs of them."""
    rng, names = np.random.default_rng(0), list(CHANGES)
    for number in range(VARIATIONS):
        first = int(rng.integers(len(names) - 3))  # the last three, by EXIF, need to come last
        chosen = [names[number]] if number < len(names) else [names[first], names[rng.integers(first + 1, len(names))]]
        varied = sample
        for name in chosen:
            varied = CHANGES[name](varied)
        yield " + ".join(chosen), varied


def _turned(sample: VariedPortrait, degrees: float) -> VariedPortrait:
    """Turn a portrait clockwise."""
    picture = sample.picture.rotate(-degrees, Image.Resampling.BICUBIC, expand=True, fillcolor=(120, 120, 120))
    angle, old, new = math.radians(degrees), np.array(sample.picture.size) / 2, np.array(picture.size) / 2
    x, y = sample.mouth - old
    return replace(
        sample,
        picture=picture,
        mouth=np.array([math.cos(angle) * x - math.sin(angle) * y, math.sin(angle) * x + math.cos(angle) * y]) + new,
    )


def _by_exif(sample: VariedPortrait, tag: int, turn: Image.Transpose) -> VariedPortrait:
    """The same portrait, stored turned, with the EXIF orientation that undoes it."""
    picture = sample.picture.transpose(turn)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = tag
    picture.info["exif"] = exif.tobytes()
    return replace(sample, picture=picture)


def _mirrored(sample: VariedPortrait) -> VariedPortrait:
    picture = sample.picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return replace(sample, picture=picture, mouth=np.array([picture.width - sample.mouth[0], sample.mouth[1]]))


def _sized(sample: VariedPortrait, longest: int) -> VariedPortrait:
    """Scale a portrait to this longer side in px."""
    scale = longest / max(sample.picture.size)
    size = [max(1, round(length * scale)) for length in sample.picture.size]
    return VariedPortrait(sample.picture.resize(size, Image.Resampling.LANCZOS), sample.mouth * scale, sample.width * scale)


def _near_head(sample: VariedPortrait, margins: tuple[float, float, float, float]) -> VariedPortrait:
    """Cut a portrait at these distances from the mouth to the left, top, right and bottom, in widths of the face."""
    left, top, right, bottom = (margin * sample.width for margin in margins)
    x, y = sample.mouth
    low = np.maximum(0, [x - left, y - top]).astype(int)
    high = np.minimum(sample.picture.size, [x + right, y + bottom]).astype(int)
    return VariedPortrait(sample.picture.crop((*low.tolist(), *high.tolist())), sample.mouth - low, sample.width)


def _pixelwise(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[VariedPortrait], VariedPortrait]:
    """A change of all pixels, float [H,W,3] in 0..255."""

    def changed(sample: VariedPortrait) -> VariedPortrait:
        pixels = change(np.asarray(sample.picture, np.float32)).clip(0, 255).astype(np.uint8)
        return replace(sample, picture=Image.fromarray(pixels))

    return changed


def _compressed(sample: VariedPortrait, quality: int) -> VariedPortrait:
    file = io.BytesIO()
    sample.picture.save(file, "JPEG", quality=quality)
    return replace(sample, picture=Image.open(file).convert("RGB"))


HEAD = (1.6, 2.2, 1.6, 1.4)  # margins around the head
CHANGES: dict[str, Callable[[VariedPortrait], VariedPortrait]] = {
    "mirrored": _mirrored,
    "grey": _pixelwise(lambda pixels: pixels.mean(-1, keepdims=True).repeat(3, -1)),
    "3 stops darker": _pixelwise(lambda pixels: 255 * (((pixels / 255) ** 2.2 / 8) ** (1 / 2.2))),
    "face at the left border": lambda sample: _near_head(sample, (0.55, 9, 9, 9)),
    "face at the right border": lambda sample: _near_head(sample, (9, 9, 0.55, 9)),
    "face at the upper border": lambda sample: _near_head(sample, (9, 0.9, 9, 9)),
    "face at the lower border": lambda sample: _near_head(sample, (9, 9, 9, 0.5)),
    "the head alone": lambda sample: _near_head(sample, HEAD),
    "head of 128 px": lambda sample: _sized(_near_head(sample, HEAD), 128),
    "1000 px": lambda sample: _sized(sample, 1000),
    "2000 px": lambda sample: _sized(sample, 2000),
    "4000 px": lambda sample: _sized(sample, 4000),
    "head of 64 px": lambda sample: _sized(_near_head(sample, HEAD), 64),
    "25 degrees clockwise": lambda sample: _turned(sample, 25),
    "25 degrees the other way": lambda sample: _turned(sample, -25),
    "12 degrees clockwise": lambda sample: _turned(sample, 12),
    "JPEG of quality 20": lambda sample: _compressed(sample, 20),
    "by EXIF on its head": lambda sample: _by_exif(sample, 3, Image.Transpose.ROTATE_180),
    "by EXIF to the left": lambda sample: _by_exif(sample, 6, Image.Transpose.ROTATE_90),
    "by EXIF to the right": lambda sample: _by_exif(sample, 8, Image.Transpose.ROTATE_270),
}


def pictures_without_faces() -> Iterator[tuple[str, np.ndarray]]:
    """EMPTY pictures, uint8 [H,W,3]: parts of bundled photographs, textures, drawn landscapes, and lips drawn on a photograph."""
    kinds = {"photograph": _photograph, "texture": _texture, "landscape": _landscape, "lips on a photograph": _lips}
    for number in range(EMPTY):
        name = list(kinds)[number % len(kinds)]
        rng = np.random.default_rng([5, number])
        yield f"{name} {number // len(kinds)}", (kinds[name](rng).clip(0, 1) * 255).astype(np.uint8)


def _photograph(rng: np.random.Generator) -> np.ndarray:
    picture = np.asarray(getattr(data, WITHOUT_FACES[rng.integers(len(WITHOUT_FACES))])(), np.float32) / 255
    picture = np.repeat(picture[..., None], 3, -1) if picture.ndim == 2 else picture[..., :3]
    height, width = (int(length * rng.uniform(0.4, 1)) for length in picture.shape[:2])
    top, left = (int(rng.integers(0, whole - part + 1)) for whole, part in zip(picture.shape, (height, width), strict=False))
    return picture[top : top + height, left : left + width]


def _texture(rng: np.random.Generator) -> np.ndarray:
    """Smooth noise of two sizes in two colours."""
    coarse, fine = (gaussian_filter(rng.normal(size=(360, 480)), rng.uniform(*sigma)) for sigma in ((6, 40), (0.5, 5)))
    share = 0.5 + coarse / coarse.std() / 4 + fine / fine.std() / 10
    low, high = rng.uniform(0, 1, (2, 3))
    return low + share.clip(0, 1)[..., None] * (high - low)


def _landscape(rng: np.random.Generator) -> np.ndarray:
    """A sky, a sun, and three ridges of hills."""
    rows, columns = np.mgrid[:400, :600] / 400
    picture = np.array([0.45, 0.65, 0.95]) + rows[..., None] * rng.uniform(-0.1, 0.5, 3)
    x, y, radius = rng.uniform(0.1, 1.4), rng.uniform(0.05, 0.4), rng.uniform(0.02, 0.1)
    picture[np.hypot(columns - x, rows - y) < radius] = (1, 0.95, 0.75)
    for ridge in range(3):
        line = rng.uniform(0.4, 0.6) + 0.15 * ridge
        line = line + sum(rng.uniform(0, 0.08 / k) * np.sin(k * 3 * columns + rng.uniform(0, 6)) for k in range(1, 6))
        grain = gaussian_filter(rng.normal(size=rows.shape), rng.uniform(0.5, 3)) * 0.3
        picture = np.where((rows > line)[..., None], rng.uniform(0.1, 0.6, 3) + grain[..., None], picture)
    return picture


def _lips(rng: np.random.Generator) -> np.ndarray:
    return draw_identity(rng, SIDE, photographs=1).picture / 255


def _person(split: str, number: int):
    return draw_identity(np.random.default_rng([17, number]), SIDE, split=split, photographs=0)


def _speaker(finder: FaceFinder, pixels: np.ndarray) -> Face | None:
    """The face of a picture that would speak, or None."""
    try:
        return find_speaker(pixels, finder)
    except ValueError:
        return None
