"""One's own videos in takes: as many frames as a clip has, framed as the model sees them, and what speaks against each."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from sonic.config import parse_size
from sonic.data.audio import SAMPLE_RATE, envelope, frame_levels
from sonic.data.data_config import PrecomputeConfig
from sonic.data.image import covering, cut, face_crop
from sonic.data.landmarks import find_face, locate_mouth
from sonic.data.pixels import to_bytes
from sonic.data.video import frames_at
from sonic.evaluation import metrics
from sonic.geometry import FRAMES_PER_LATENT, MOUTH_ANCHOR, MOUTH_UNIT
from sonic.types import Portrait, pick

SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
WATCHED = 96  # side of the face crop in which the mouth is watched
SMOOTH, SLOW = 3, 25  # frames over which its track and the sound are smoothed, and those whose mean counts as a change of posture
DARK = 0.05  # share of the mouth's pixels that its inside, when it can be seen, is darker than
CUT = 25.0  # mean change of the face crop from one frame to the next, in grey levels, that only another scene makes
BETTER, ENOUGH_S = 0.15, 5.0  # how much better another lag has to fit to be clear, and seconds below which it has to fit better still
MOVES = 0.01  # least change of the mouth's pixels, of black to white = 2, that is not the noise of a still picture
SPAN_S = 1.0  # lags that are tried either way


@dataclass(frozen=True)
class Take:
    """Frames first .. first+F-1 of a video at the model's rate, if nothing speaks against them.

    pixels uint8 [1+F,h,w,3] as the model sees them, one frame of the past in front; `mouth` [F] how open it is and `level` [F] how
    loud the sound, both about their means over a second; sync and lag_s as `aligned` found them.
    """

    first: int
    frames: int
    fault: str = ""
    pixels: Tensor | None = None
    mouth: np.ndarray | None = None
    level: np.ndarray | None = None
    sync: float | None = None
    lag_s: float | None = None

    @property
    def rest(self) -> int:
        """The frame (0..F-1) whose mouth is closed most."""
        return int(self.mouth.argmin())


def find_videos(source: Path) -> list[Path]:
    """The videos in a folder and in those inside it. Raises ValueError when there is no folder or no video."""
    if not source.is_dir():
        raise ValueError(f"data.source={source} is no folder; name one with videos of people who speak")
    found = sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not found:
        raise ValueError(f"data.source={source} holds no video ({', '.join(SUFFIXES)}); name a folder with videos of people who speak")
    return found


def takes(path: Path, samples: np.ndarray, config: PrecomputeConfig, *, fps: int) -> Iterator[Take]:
    """The video from its second frame on, take by take, each with the first fault that was found.

    Raises ValueError when it cannot be decoded.
    """
    length, first, held = FRAMES_PER_LATENT * config.latent_frames, 1, []
    for frame in frames_at(path, fps):
        held.append(frame)
        if len(held) == 1 + length:
            yield _look(held, samples, first=first, config=config, fps=fps)
            first, held = first + length, held[-1:]
    if len(held) > 1 or first == 1:
        yield Take(first, max(0, len(held) - 1), f"shorter than a clip of {length / fps:.1f} s")


def aligned(passage: list[Take], config: PrecomputeConfig, fps: int) -> list[Take]:
    """Takes that follow each other, with the fault of mouth and sound that do not belong together or come apart in time.

    The lag is that of the mouth behind the sound. It is read from all of them at once, since a clip alone says little.
    """
    good = [take for take in passage if not take.fault]
    if not good:
        return passage
    mouth, level = (np.concatenate([getattr(take, name) for take in good]) for name in ("mouth", "level"))
    reach, allowed = (min(round(seconds * fps), len(mouth) // 3) for seconds in (SPAN_S, config.data.most_lag_s))
    (best, lag), (near, near_lag) = (metrics.best_lag(mouth, level, reach) for reach in (reach, allowed))
    fault, found = "", {"sync": near, "lag_s": near_lag / fps}
    clear = BETTER * max(1.0, ENOUGH_S * fps / len(mouth))
    if np.std(mouth) < MOVES:
        fault = "the mouth does not move"
    elif abs(lag) > allowed and best > near + clear:
        fault, found = "sound and mouth are apart in time", {"sync": best, "lag_s": lag / fps}
    elif near < config.data.least_sync:
        fault = "the mouth does not follow the sound"
    return [take if take.fault else replace(take, fault=fault, **found) for take in passage]


def _look(held: list[np.ndarray], samples: np.ndarray, *, first: int, config: PrecomputeConfig, fps: int) -> Take:
    """A take of these frames (the first is the past), with the first fault there is."""
    frames = len(held) - 1
    sound = samples[first * SAMPLE_RATE // fps : (first + frames) * SAMPLE_RATE // fps]
    if not len(sound) or frame_levels(sound).max() < config.data.least_level_db:
        return Take(first, frames, "silent")
    middle = held[1 + frames // 2]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of several faces the one is taken that the photograph's finder would take
            face = find_face(middle)
    except ValueError:
        return Take(first, frames, "no face")
    portrait = Portrait(middle, face, locate_mouth(middle, face))
    watched = torch.stack([cut(frame, face_crop(portrait, resolution=WATCHED)) for frame in held])
    if float((watched[1:] - watched[:-1]).abs().mean((1, 2, 3)).max()) * 127.5 > CUT:
        return Take(first, frames, "another scene begins")
    pixels = pick(FRAMINGS, config.model.autoencoder, "model.autoencoder")(held, portrait, config)
    if pixels is None:
        return Take(first, frames, f"the face does not fit into data.size={config.data.size}")
    level = quick(_smooth(envelope(sound, SAMPLE_RATE, frames, fps=fps)))
    return Take(first, frames, "", pixels, mouth_opening(watched[1:]), level)


def mouth_opening(frames: Tensor) -> np.ndarray:
    """How open the mouth is in each frame of a face crop, about its mean over a second: what its pixels do most (their first
    principal component, as the change of a pixel), upwards where dark shows.  [F,3,R,R] -> [F]"""
    side = frames.shape[-1]
    x, y, unit = (side * share for share in (*MOUTH_ANCHOR, MOUTH_UNIT))
    mouth = frames[..., int(y - 0.7 * unit) : int(y + 1.3 * unit), int(x - 1.2 * unit) : int(x + 1.2 * unit)].mean(1).flatten(1).numpy()
    changes = quick(_smooth(mouth))
    ways, sizes, _ = np.linalg.svd(changes - changes.mean(0), full_matrices=False)
    dark = quick(_smooth(np.quantile(mouth, DARK, axis=1)))
    opening = ways[:, 0] * sizes[0] / np.sqrt(mouth.shape[1])
    return -opening if metrics.correlation(opening, dark) > 0 else opening


def _face_framing(held: list[np.ndarray], portrait: Portrait, config: PrecomputeConfig) -> Tensor:
    """The face crop as infer has it."""
    crop = face_crop(portrait, resolution=config.model.resolution)
    shown = torch.stack([cut(frame, crop) for frame in held])
    return rearrange(to_bytes(shown), "f c h w -> f h w c")


def _whole_framing(held: list[np.ndarray], portrait: Portrait, config: PrecomputeConfig) -> Tensor | None:
    """The middle of the picture at data.size; None when that cuts the face."""
    width, height = parse_size(config.data.size, "data.size")
    high, wide = held[0].shape[:2]
    scale, face = max(width / wide, height / high), portrait.face
    across, down = (wide - width / scale) / 2, (high - height / scale) / 2  # that are lost at each side
    if face.x < across or face.y < down or face.x + face.width > wide - across or face.y + face.height > high - down:
        return None
    return torch.stack([torch.from_numpy(covering(frame, width, height)) for frame in held])


FRAMINGS = {"warp": _face_framing, "wan": _whole_framing}  # by model.autoencoder


def _smooth(track: np.ndarray, frames: int = SMOOTH) -> np.ndarray:
    """A running mean over an odd number of frames.  [F,...] -> [F,...]"""
    ends = [(frames // 2, frames // 2), *[(0, 0)] * (track.ndim - 1)]
    sums = np.cumsum(np.pad(np.pad(track, ends, mode="edge"), [(1, 0), *ends[1:]]), axis=0, dtype=np.float64)
    return (sums[frames:] - sums[:-frames]) / frames


def quick(track: np.ndarray) -> np.ndarray:
    """What changes faster than posture does."""
    return track - _smooth(track, SLOW)
