"""Scores the whole main job on drawn people: what the video shows is read back from its pixels and held against the truth.

The video comes from the same functions as in infer: crop, rollout, decode, put-back. Beside it stand the true video and a
video in which nothing moves, scored by the same reader.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sonic.config import PHOTO_SIZE, parse_size, settled_video
from sonic.data.image import MOUTH_IN_CROP, MOUTH_IN_FACE
from sonic.data.pixels import to_bytes, to_signed
from sonic.data.video import Coding, VideoWriter
from sonic.evaluation import metrics
from sonic.geometry import FPS, FRAMES_PER_LATENT
from sonic.inference.infer_config import InferConfig
from sonic.parallel.parallel_config import SINGLE_RANK_PLANS, HardwareConfig
from sonic.pipeline import AvatarPipeline
from sonic.synthetic import draw_face, puppet, voices
from sonic.system.program import written
from sonic.training.train_config import EvalConfig, EvaluateConfig
from sonic.types import FaceBox, Inputs, Mouth, Portrait, Speech

LOG = logging.getLogger(__name__)
GOALS = {
    "sync_correlation": "≥ 0.90", "offset_within_1_frame": "≥ 0.95", "control_correlation": "≤ 0.30", "dynamics_ratio": "0.85 to 1.15",
    "silent_motion_ratio": "≤ 0.10", "identity_psnr_db": "≥ 26", "block_join_ratio": "≤ 1.2",
}  # fmt: skip
EXTRAS = ("flicker", "reader_correlation", "seconds_per_frame")


@dataclass(frozen=True)
class Case:
    """A person, what is said, and what the mouth truly does: `track` [F] is the lower lip's way from rest in mouth units, `other`
    the same for another sentence."""

    person: draw_face.Identity
    samples: np.ndarray
    track: np.ndarray
    other: np.ndarray
    truth: Tensor

    @property
    def rest(self) -> Tensor:
        """The person before speaking, [3,R,R] in [-1,1]."""
        return to_signed(rearrange(torch.from_numpy(self.person.picture), "h w c -> c h w"))

    @property
    def mouth_geometry(self) -> metrics.MouthGeometry:
        """Where the reader has to look."""
        shape = self.person.mouth
        return metrics.MouthGeometry(shape.x, shape.y, shape.unit, shape.roll, lower=shape.curve + 0.65 * shape.gap, curve=shape.curve)


FrameGenerator = Callable[[Case, np.ndarray], Tensor]  # (case, samples) -> frames [F,3,R,R] in [-1,1]


def evaluate(config: EvaluateConfig, pipe: AvatarPipeline | None = None) -> dict[str, dict]:
    """Score as configured, show the table, write the JSON. Gives {figure: {mean, ci95, clips}}."""
    side = portrait_side(config)
    pipe = pipe or _pipeline(config)
    rows: dict[str, list[dict[str, float]]] = {"model": [], "true video": [], "nothing moves": []}
    openings: list[list[float]] = []
    start = time.perf_counter()
    for number, case in enumerate(cases(config.eval, side)):
        generators = {
            "model": lambda case, samples, seed=number: generated_frames(case, samples, pipe, seed=seed),
            "true video": lambda case, samples: case.truth if samples.any() else case.rest.expand_as(case.truth),
            "nothing moves": lambda case, samples: case.rest.expand_as(case.truth),
        }
        block = FRAMES_PER_LATENT * pipe.config.model.rollout.block_frames
        for name, make in generators.items():
            clip = scored(case, make, block)
            rows[name].append(clip.figures)
            if name == "model":
                openings.append(clip.opening.round(4).tolist())
        r = rows["model"][-1]["sync_correlation"]
        LOG.info("clip %d of %d: sync %.3f, %.0f s so far", number + 1, config.eval.clips, r, time.perf_counter() - start)
        if config.eval.videos:
            _keep(case, generators["model"], Path(config.eval.videos) / f"clip_{number:03d}.png")
            if number < config.eval.num_videos:
                path = Path(config.eval.videos) / f"clip_{number:03d}.mp4"
                save_video(path, generators["model"](case, case.samples), Speech(case.samples.astype(np.float32)))
    figures = {name: {key: metrics.interval([clip[key] for clip in clips]) for key in clips[0]} for name, clips in rows.items()}
    show(figures)
    found = {**figures["model"], "baselines": {name: figures[name] for name in ("true video", "nothing moves")}}
    found["openings"] = openings  # of the mouth, frame by frame, to be held against those of other runs
    found["peak_rss_gib"] = metrics.peak_rss_gib()
    if config.json:
        Path(config.json).parent.mkdir(parents=True, exist_ok=True)
        Path(config.json).write_text(json.dumps(found, indent=1) + "\n")
    return found


def portrait_side(config: EvaluateConfig) -> int:
    """Side of the drawn portraits in pixels: that of the face crop, or as large in area as video.size says.

    Raises ValueError for a model that is not scored here, and for options of the video that no figure depends on.
    """
    model, video = config.model, config.video
    if not model.resolution:
        raise ValueError(
            f"model={model.name} generates whole pictures, and drawn people know the truth of a face crop only; leave model= out to score "
            f"the preview, or judge a video of any model with {written('judge')}"
        )
    for name in ("infer_frames", "num_clip", "compat"):
        if getattr(video, name):
            raise ValueError(
                f"video.{name}={getattr(video, name)} changes no figure; eval.clips and eval.seconds say how much is generated"
            )
    settled_video(video, model)  # says which rate it has
    if video.size == PHOTO_SIZE:
        return model.resolution
    width, height = parse_size(video.size)
    return round(math.sqrt(width * height) / 2) * 2


def _pipeline(config: EvaluateConfig) -> AvatarPipeline:
    plan = "single" if config.parallel.name == "auto" else config.parallel.name
    if plan not in SINGLE_RANK_PLANS:
        raise ValueError(f"parallel={plan}: figures are made on one device; use {' or '.join(SINGLE_RANK_PLANS)}")
    asked = InferConfig(
        run=config.run,
        model=config.model,
        sampler=config.sampler,
        decode=config.decode,
        parallel=replace(config.parallel, name=plan),
        hardware=HardwareConfig("here"),
    )
    return AvatarPipeline(asked)


def cases(config: EvalConfig, resolution: int) -> Iterator[Case]:
    """People and sentences of the test split, as functions of the seed and their number alone."""
    frames = round(config.seconds * FPS)
    for number in range(config.clips):
        rng = np.random.default_rng((config.seed, number, 2))
        utterance, other = (voices.say(rng, split="test", seconds=frames / FPS) for _ in range(2))
        person = draw_face.draw_identity(rng, resolution, split="test", photographs=0)
        visemes, others = (torch.from_numpy(voices.viseme_track(each, frames)) for each in (utterance, other))
        truth, _ = draw_face.animate(person, visemes)
        samples = voices.augment(utterance.samples, rng) if config.noisy else utterance.samples
        track, control = (puppet.lip_displacement(person.mouth, each).numpy() for each in (visemes, others))
        yield Case(person, samples, track, control, truth)


def generated_frames(case: Case, samples: np.ndarray, pipe: AvatarPipeline, *, seed: int) -> Tensor:
    """The main job on a drawn portrait, whose whole picture is the face crop.  -> [F,3,R,R] in [-1,1]"""
    side = float(case.person.picture.shape[0])
    size = side / pipe.config.face.expand_ratio
    face = FaceBox((side - size) / 2, (side - size) / 2, size, size)
    mouth = Mouth(MOUTH_IN_CROP[0] * side, MOUTH_IN_CROP[1] * side, MOUTH_IN_FACE * size)
    inputs = Inputs(Portrait(case.person.picture, face, mouth), Speech(samples.astype(np.float32)), len(case.track), seed)
    with closing(pipe.generate(inputs)) as chunks:
        pixels = torch.cat([torch.as_tensor(chunk.pixels) for chunk in chunks])
    return to_signed(rearrange(pixels, "f h w c -> f c h w"))


class Scored(NamedTuple):
    """Every figure of one clip, and how far its mouth is open in each frame [F]."""

    figures: dict[str, float]
    opening: np.ndarray


def scored(case: Case, make: FrameGenerator, block: int) -> Scored:
    """Generate a case, once with its sound and once in silence, and read what there is to see."""
    start = time.perf_counter()
    frames = make(case, case.samples)
    seconds = time.perf_counter() - start
    silent = make(case, np.zeros_like(case.samples))
    read = lambda some: metrics.mouth_opening(some, case.rest, case.mouth_geometry)  # noqa: E731
    found, true, hushed = read(frames), read(case.truth), read(silent)
    _, lag = metrics.best_lag(found, case.track)
    mask = metrics.mouth_mask(case.mouth_geometry, *frames.shape[-2:])
    size = lambda track: float(np.sqrt(np.mean(np.square(track))))  # noqa: E731 - about rest, so that a mouth left open counts
    figures = {
        "sync_correlation": metrics.correlation(found, case.track),
        "offset_within_1_frame": float(abs(lag) <= 1.0 and np.std(found) > 1e-6),
        "control_correlation": metrics.correlation(found, case.other),
        "dynamics_ratio": metrics.dynamics_ratio(found, true),
        "silent_motion_ratio": size(hushed) / max(size(found), 0.01),
        "identity_psnr_db": metrics.psnr(frames, case.truth, mask),
        "block_join_ratio": metrics.join_ratio(frames, block),
        "flicker": metrics.flicker(frames),
        "reader_correlation": metrics.correlation(true, case.track),
        "seconds_per_frame": seconds / len(frames),
    }
    return Scored(figures, found)


def show(figures: dict[str, dict]) -> None:
    """The table: every figure of the model beside those of the true video and of nothing moving, and what is asked for."""
    table = Table(title="drawn people never trained on")
    for name in ("figure", *figures, "asked for"):
        table.add_column(name, justify="left" if name == "figure" else "right")
    for key in (*GOALS, *EXTRAS):
        values = [f"{rows[key]['mean']:.3f} ± {rows[key]['ci95']:.3f}" for rows in figures.values()]
        table.add_row(key, *values, GOALS.get(key, ""))
    Console(width=120).print(table)


def _keep(case: Case, make: FrameGenerator, path: Path) -> None:
    """Eight moments of a clip, the video above the truth."""
    from skimage.io import imsave

    path.parent.mkdir(parents=True, exist_ok=True)
    chosen = np.linspace(0, len(case.track) - 1, 8).astype(int)
    rows = [rearrange(frames[chosen], "f c h w -> h (f w) c") for frames in (make(case, case.samples), case.truth)]
    imsave(path, to_bytes(torch.cat(rows)).numpy(), check_contrast=False)


def save_video(path: Path, frames: Tensor, speech: Speech, *, fps: int = FPS) -> None:
    """A clip with its sound.  frames [F,3,H,W] in [-1,1]"""
    pixels = rearrange(to_bytes(frames), "f c h w -> f h w c").numpy()
    with VideoWriter(path, *pixels.shape[2:0:-1], num_frames=len(pixels), speech=speech, coding=Coding(fps=fps)) as writer:
        writer.write(pixels)
