"""Segments of the user's own videos: as many frames as a clip has, cropped as the model needs them, and the fault of each, if any."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import uniform_filter1d
from torch import Tensor

from sonic.config import parse_size
from sonic.data.audio import SAMPLE_RATE, envelope, frame_levels
from sonic.data.data_config import PrecomputeConfig
from sonic.data.face_detector import Landmarks
from sonic.data.faces import Face, FaceFinder, find_speaker
from sonic.data.image import covering, cut, face_crop
from sonic.data.video import frames_at
from sonic.evaluation import metrics
from sonic.geometry import FRAMES_PER_LATENT
from sonic.types import Portrait

SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
FACE_CROP = 96  # side of the face crop in which changes of the scene are measured
SMOOTH, SLOW = 3, 25  # frames of the running mean over the tracks, and of the one that is subtracted to remove changes of posture
CUT = 25.0  # mean change of the face crop between frames, in grey levels, above which a new scene begins
BETTER, ENOUGH_S = 0.25, 5.0  # by how much another lag must correlate better; more is asked of less than ENOUGH_S seconds
MOVES = 0.004  # standard deviation of the mouth's opening, in distances of the eyes, below which the mouth is still
SPAN_S = 1.0  # largest lag that is tried, in seconds, in both directions

Framing = Callable[[list[np.ndarray], Portrait, PrecomputeConfig], Tensor | None]  # frames as the model needs them; None = the face is cut


@dataclass(frozen=True)
class Segment:
    """Frames first .. first+F-1 of a video at the model's frame rate, and the fault that keeps them from being a clip ("" = none).

    pixels uint8 [1+F,h,w,3] as the model needs them, with one past frame in front; `mouth` [F] opening of the mouth and `level` [F]
    loudness of the sound, both minus their running mean over a second; `landmarks` of the face in each frame, in pixels of the video,
    which is `size` (width, height); sync and lag_s as measured by `checked_sync`.
    """

    first: int
    frames: int
    fault: str = ""
    pixels: Tensor | None = None
    mouth: np.ndarray | None = None
    level: np.ndarray | None = None
    landmarks: list[Landmarks] | None = None
    size: tuple[int, int] | None = None
    sync: float | None = None
    lag_s: float | None = None

    @property
    def rest(self) -> int:
        """The frame (0..F-1) in which the mouth is most closed."""
        return int(self.mouth.argmin())


def find_videos(source: Path) -> list[Path]:
    """The videos in a folder and its subfolders. Raises ValueError when there is no folder or no video."""
    if not source.is_dir():
        raise ValueError(f"data.source={source} is no folder; name one with videos of people who speak")
    videos = sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not videos:
        raise ValueError(f"data.source={source} holds no video ({', '.join(SUFFIXES)}); name a folder with videos of people who speak")
    return videos


def read_segments(path: Path, samples: np.ndarray, config: PrecomputeConfig, *, fps: int, frame: Framing) -> Iterator[Segment]:
    """Cut a video, from its second frame on, into segments, each with the first fault found.

    Raises ValueError when the video cannot be decoded.
    """
    length, first, pictures = FRAMES_PER_LATENT * config.latent_frames, 1, []
    for picture in frames_at(path, fps):
        pictures.append(picture)
        if len(pictures) == 1 + length:
            yield _inspect(pictures, samples, config, first=first, fps=fps, frame=frame)
            first, pictures = first + length, pictures[-1:]
    if len(pictures) > 1 or first == 1:
        yield Segment(first, max(0, len(pictures) - 1), f"shorter than a clip of {length / fps:.1f} s")


def checked_sync(group: list[Segment], config: PrecomputeConfig, fps: int) -> list[Segment]:
    """Consecutive segments with their audio-visual sync, and a fault where mouth and sound are unrelated or out of sync.

    The lag is the mouth's delay behind the sound, measured over all of them together, since one segment is too short.
    """
    good = [segment for segment in group if not segment.fault]
    if not good:
        return group
    mouth, level = (np.concatenate([getattr(segment, name) for segment in good]) for name in ("mouth", "level"))
    max_lag, allowed = (min(round(seconds * fps), len(mouth) // 3) for seconds in (SPAN_S, config.data.most_lag_s))
    (best, lag), (near, near_lag) = (metrics.best_lag(mouth, level, max_lag) for max_lag in (max_lag, allowed))
    fault, measured = "", {"sync": near, "lag_s": near_lag / fps}
    clear = BETTER * max(1.0, ENOUGH_S * fps / len(mouth))
    if np.std(mouth) < MOVES:
        fault = "the mouth does not move"
    elif abs(lag) > allowed and best > near + clear:
        fault, measured = "sound and mouth are apart in time", {"sync": best, "lag_s": lag / fps}
    elif near < config.data.least_sync:
        fault = "the mouth does not follow the sound"
    return [segment if segment.fault else replace(segment, fault=fault, **measured) for segment in group]


def _inspect(pictures: list[np.ndarray], samples: np.ndarray, config: PrecomputeConfig, *, first: int, fps: int, frame: Framing) -> Segment:
    """The segment of these frames (the first is the past frame), with the first fault found."""
    frames = len(pictures) - 1
    sound = samples[first * SAMPLE_RATE // fps : (first + frames) * SAMPLE_RATE // fps]
    if not len(sound) or frame_levels(sound).max() < config.data.least_level_db:
        return Segment(first, frames, "silent")
    middle, finder = pictures[1 + frames // 2], FaceFinder()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about several faces: the same one is taken as in a photograph
            face = find_speaker(middle, finder)
    except ValueError:
        return Segment(first, frames, "no face")
    portrait = Portrait(middle, face.box, face.mouth)
    faces = torch.stack([cut(picture, face_crop(portrait, resolution=FACE_CROP)) for picture in pictures])
    if float((faces[1:] - faces[:-1]).abs().mean((1, 2, 3)).max()) * 127.5 > CUT:
        return Segment(first, frames, "another scene begins")
    pixels = frame(pictures, portrait, config)
    if pixels is None:
        return Segment(first, frames, f"the face does not fit into data.size={config.data.size}")
    landmarks = follow_face(pictures[1:], face, finder)
    if None in landmarks:
        return Segment(first, frames, "no face")
    level = minus_running_mean(smoothed(envelope(sound, SAMPLE_RATE, frames, fps=fps)))
    return Segment(first, frames, "", pixels, mouth_opening(landmarks), level, landmarks, middle.shape[1::-1])


def covering_frames(pictures: list[np.ndarray], portrait: Portrait, config: PrecomputeConfig) -> Tensor | None:
    """The frames scaled and centrally cropped to data.size; None when that would cut the face."""
    width, height = parse_size(config.data.size, "data.size")
    high, wide = pictures[0].shape[:2]
    scale, face = max(width / wide, height / high), portrait.face
    across, down = (wide - width / scale) / 2, (high - height / scale) / 2  # px lost at each side
    if face.x < across or face.y < down or face.x + face.width > wide - across or face.y + face.height > high - down:
        return None
    return torch.stack([torch.from_numpy(covering(frame, width, height)) for frame in pictures])


def follow_face(frames: Sequence[np.ndarray], face: Face, finder: FaceFinder) -> list[Landmarks | None]:
    """The landmarks in each frame of the face of the middle one; None where it is not seen.  frames uint8 [H,W,3]"""
    middle, found = len(frames) // 2, [None] * len(frames)
    for order in (range(middle, len(frames)), range(middle - 1, -1, -1)):
        last = face.landmarks
        for index in order:
            found[index] = finder.follow(frames[index], last)
            last = found[index] or last
    return found


def mouth_opening(landmarks: Sequence[Landmarks | None]) -> np.ndarray:
    """Opening of the mouth in each frame, in distances of the eyes, minus its running mean over a second; nan around frames without
    landmarks.  -> [F]"""
    return minus_running_mean(smoothed(np.array([np.nan if seen is None else seen.opening for seen in landmarks])))


def smoothed(track: np.ndarray, frames: int = SMOOTH) -> np.ndarray:
    """A running mean over an odd number of frames.  [F,...] -> [F,...]"""
    return uniform_filter1d(track.astype(np.float64), frames, axis=0, mode="nearest")


def minus_running_mean(track: np.ndarray) -> np.ndarray:
    """The track minus its running mean over a second: removes slow changes of posture."""
    return track - smoothed(track, SLOW)
