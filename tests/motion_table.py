"""Figures of post.smooth_motion and post.interpolate on drawn people: `python tests/motion_table.py [clips] [seconds]` prints both tables.

The motion of the mouth is read in the pixels of the preview's videos, that of the head of jittered videos by phase correlation.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import torch
from einops import rearrange
from rich.console import Console
from rich.table import Table
from scipy.ndimage import laplace, shift
from skimage.registration import phase_cross_correlation

from sonic.data.pixels import to_bytes
from sonic.evaluation import metrics
from sonic.evaluation.evaluate import drawn_cases, generate_frames
from sonic.evaluation.evaluate_config import EvalConfig
from sonic.inference.post_config import PostConfig
from sonic.inference.post_process import process_motion, process_pixels
from sonic.pipeline import AvatarPipeline
from sonic.synthetic import draw_face, voices
from sonic.synthetic.drawn_people import motion_targets
from sonic.types import Crop, MotionLayers, Portrait
from sonic.vae.warp import Canvas

FPS, JITTER_PX, BORDER = 25, 0.5, 12


def visemes_at(fps: int, frames: int, seed: int) -> torch.Tensor:
    """Visemes [frames,5] of a sentence at `fps`; the first is that of the first frame at 25 fps, 20 ms after the start."""
    utterance = voices.say(np.random.default_rng(seed), split="test", seconds=frames / fps + 0.1)
    with patch.object(voices, "FPS", 200):
        return torch.from_numpy(voices.viseme_track(utterance, 200 * frames // fps + 8)[4 :: 200 // fps][:frames].copy())


def person_of(seed: int, resolution: int) -> draw_face.Identity:
    """A drawn person of the test split."""
    return draw_face.draw_identity(np.random.default_rng(seed), resolution, split="test", photographs=0)


def speaking_face(seed: int, *, frames: int, resolution: int, head: bool = False) -> np.ndarray:
    """Frames of a drawn person who speaks, at 50 fps, uint8 [F,H,W,3]; with `head` the head moves too."""
    visemes = visemes_at(2 * FPS, frames + 20, seed)[-frames:]
    pose = draw_face.head_motion(np.random.default_rng(seed), frames) if head else None
    pixels, _ = draw_face.animate(person_of(seed, resolution), visemes, pose)
    return to_bytes(rearrange(pixels, "f c h w -> f h w c")).numpy()


def jittered_face(seed: int, *, frames: int, resolution: int) -> np.ndarray:
    """Frames of a drawn person who speaks and moves the head, at 25 fps, each displaced by a random part of a pixel."""
    rng, pad = np.random.default_rng(seed), ((BORDER, BORDER), (BORDER, BORDER), (0, 0))
    moved = []
    for frame in speaking_face(seed, frames=2 * frames, resolution=resolution, head=True)[::2].astype(float):
        displaced = shift(np.pad(frame, pad, mode="edge"), (*rng.normal(0, JITTER_PX, 2), 0), order=5)
        moved.append(displaced[BORDER:-BORDER, BORDER:-BORDER])
    return np.stack(moved).round().clip(0, 255).astype(np.uint8)


def face_positions(frames: np.ndarray) -> np.ndarray:
    """Displacement of the eyes and the nose of a drawn face against the first frame, in px, by phase correlation.  -> [F,2]"""
    side = frames.shape[1]
    part = frames[:, round(0.2 * side) : round(0.48 * side), round(0.25 * side) : round(0.75 * side)].mean(-1)
    window = np.outer(np.hanning(part.shape[1]), np.hanning(part.shape[2]))
    seen = (part - part.mean((1, 2), keepdims=True)) * window
    return np.array([phase_cross_correlation(seen[0], each, upsample_factor=50)[0] for each in seen])


def acceleration(track: np.ndarray, fps: int, above_hz: float = 6.0) -> float:
    """Root mean square of the acceleration above a frequency, per s².  track [F] or [F,n]"""
    bent = np.diff(track.reshape(len(track), -1), 2, axis=0) * fps**2
    spectrum = np.fft.rfft(bent * np.hanning(len(bent))[:, None], axis=0)
    return float(np.sqrt(np.square(np.abs(spectrum[np.fft.rfftfreq(len(bent), 1 / fps) >= above_hz])).mean()))


def sharpness(frames: np.ndarray) -> float:
    """Variance of the Laplacian of the grey levels, without the border that jitter brought in."""
    inside = frames[:, BORDER:-BORDER, BORDER:-BORDER].mean(-1)
    return float(np.mean([laplace(frame).var() for frame in inside]))


def psnr(found: np.ndarray, truth: np.ndarray) -> float:
    """PSNR in dB of bytes."""
    return float(10 * np.log10(255**2 / np.square(found.astype(float) - truth).mean()))


def smoothed_previews(clips: int, seconds: float, strength: float) -> list[list[float]]:
    """For each clip of the preview: acceleration of the lower lip above 6 Hz, sync and sharpness, each as a ratio to the clip without
    smoothing, and the opening of the mouth in closures (mouth units) without and with it."""
    pipe, rows = AvatarPipeline.from_pretrained("preview", device="cpu"), []
    for number, case in enumerate(drawn_cases(EvalConfig(clips=clips, seed=77, seconds=seconds), pipe.config.model.resolution)):
        figures, openings = [], []
        for share in (0.0, strength):
            pipe.config = replace(pipe.config, post=PostConfig(smooth_motion=share))
            frames = generate_frames(case, case.samples, pipe, seed=number)
            opening = metrics.mouth_opening(frames, case.rest, case.person.mouth)
            pixels = to_bytes(rearrange(frames, "f c h w -> f h w c")).numpy()
            figures.append((acceleration(opening, FPS), metrics.correlation(opening, case.track), sharpness(pixels)))
            openings.append(opening)
        plain = openings[0]
        shut = [
            k for k in range(3, len(plain) - 3) if plain[k] < 0.05 and plain[k - 3 : k].max() > 0.12 and plain[k + 1 : k + 4].max() > 0.12
        ]
        closed = [float(opening[shut].mean()) if shut else float("nan") for opening in openings]
        rows.append([after / before for before, after in zip(*figures, strict=True)] + closed)
    return rows


def steadied_videos(clips: int, frames: int) -> list[list[float]]:
    """For each jittered drawn clip: acceleration of the face above 6 Hz and sharpness, as ratios to the clip without smoothing."""
    rows = []
    for seed in range(clips):
        jittered = jittered_face(seed, frames=frames, resolution=256)
        steady = torch.cat(list(process_pixels(iter(torch.from_numpy(jittered).split(12)), PostConfig(smooth_motion=1.0), FPS))).numpy()
        before, after = (acceleration(face_positions(video), FPS) for video in (jittered, steady))
        rows.append([after / before, sharpness(steady) / sharpness(jittered)])
    return rows


def odd_frames(seed: int, frames: int) -> dict[str, float]:
    """PSNR of the odd frames against the truth at 50 fps: of the preview's way with motion layers, and with pixels of a moving head."""
    resolution, even, odd = 192, slice(0, None, 2), slice(1, -1, 2)
    person, visemes = person_of(seed, resolution), visemes_at(2 * FPS, frames, seed)
    canvas = Canvas(Portrait(person.picture), Crop(resolution / 2, resolution / 2, resolution, 0.0, resolution))
    targets = motion_targets(person.mouth, visemes, None, resolution=resolution)
    layers = MotionLayers(*(targets[name][None] for name in MotionLayers._fields))
    truth = canvas.render(layers).numpy()
    half = MotionLayers(*(track[:, even] for track in layers))
    motion = np.concatenate([canvas.render(part) for part in process_motion(iter([half]), PostConfig(interpolate=2), FPS)])
    pixels = speaking_face(seed, frames=frames, resolution=resolution, head=True)
    flow = torch.cat(list(process_pixels(iter([torch.from_numpy(pixels[even])]), PostConfig(interpolate=2), FPS))).numpy()
    found = {}
    for kind, true, ours in (("motion", truth, motion), ("pixels", pixels, flow)):
        wanted, first, second = true[odd], true[even][: len(true[odd])].astype(float), true[even][1 : len(true[odd]) + 1]
        found[f"{kind}: repeated"] = psnr(first, wanted)
        found[f"{kind}: blended"] = psnr((first + second) / 2, wanted)
        found[f"{kind}: post.interpolate=2"] = psnr(ours[odd][: len(wanted)], wanted)
    return found


def show(title: str, names: list[str], rows: list[list[float]]) -> None:
    """Print the mean and the range of each figure."""
    table = Table("figure", "mean", "least", "most", title=title)
    for name, values in zip(names, zip(*rows, strict=True), strict=True):
        table.add_row(name, *(f"{of(values):.3f}" for of in (np.nanmean, np.nanmin, np.nanmax)))
    Console(width=100).print(table)


def main(clips: int = 8, seconds: float = 6.0) -> None:
    """Print the tables."""
    odd = [odd_frames(seed, 2 * round(12 * seconds) + 1) for seed in range(clips)]
    show("odd frames, PSNR in dB", list(odd[0]), [list(row.values()) for row in odd])
    show("generated pixels with jitter, smooth_motion=1", ["acceleration", "sharpness"], steadied_videos(clips, round(12 * seconds)))
    names = ["acceleration", "sync", "sharpness", "closures before", "closures after"]
    show("preview, smooth_motion=1", names, smoothed_previews(clips, seconds, 1.0))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*(kind(text) for kind, text in zip((int, float), sys.argv[1:], strict=False)))
