"""Holds a finished film against its photograph and its recording, pixels and sound alone: what is left of the person, and
whether the mouth follows the speech.

A person is judged by what a viewer sees, so the figures come from the file, compression included.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from sonic import metrics
from sonic.config import JudgeConfig
from sonic.data.portrait import load_portrait
from sonic.data.speech import envelope, load_speech
from sonic.data.video import timed_frames
from sonic.geometry import FPS
from sonic.infer.conditions import fit_portrait
from sonic.infer.report import mouth_window
from sonic.infer.scene import PORTRAITS, RECORDINGS
from sonic.types import Portrait

QUIET_DB = -38.0  # below the loud parts: nobody speaks
REST_FRAMES = 5  # a pause this long lets the mouth come to rest
REACH = 12  # frames of lag that are tried either way


def judge(config: JudgeConfig) -> dict[str, float]:
    """Judge as configured, show the table, write the JSON.

    photo_psnr_db outside the lower half of the face; speech_correlation, the mouth's motion against the speech envelope at
    the best lag; lag_frames (above zero: the mouth is late); rest_ratio, the mouth's motion in pauses against speech.
    Raises ValueError when the film does not have the photograph's size.
    """
    portrait = load_portrait(PORTRAITS.get(config.image, config.image), config.face.box, config.face.mouth)
    portrait = fit_portrait(portrait, config.size)
    speech = load_speech(RECORDINGS.get(config.audio, config.audio))
    motion, photo_psnr, fps = watch(Path(config.film), portrait)
    level = envelope(speech.samples, speech.sample_rate, len(motion), fps=fps)
    best, lag = metrics.best_lag(motion, level, reach=REACH)
    rests, speaks = pauses(level), level > np.median(level)
    found = {
        "photo_psnr_db": photo_psnr,
        "speech_correlation": best,
        "lag_frames": lag,
        "rest_ratio": float(motion[rests].mean() / motion[speaks].mean()) if rests.any() else 0.0,
        "frames": float(len(motion)),
    }
    show(found)
    if config.json:
        Path(config.json).parent.mkdir(parents=True, exist_ok=True)
        Path(config.json).write_text(json.dumps({**found, "mouth_motion": motion.tolist()}, indent=1) + "\n")
    return found


def watch(video: Path, portrait: Portrait) -> tuple[np.ndarray, float, int]:
    """Mean change of the mouth region from the photograph in each frame [F], in grey levels, the PSNR in dB outside the lower half
    of the face over all frames, and the frames per second."""
    still = portrait.pixels.astype(np.int16)
    mouth, kept = mouth_window(portrait), outside_lower_face(portrait)
    motion, error, times = [], 0.0, []
    for time, frame in timed_frames(video):
        if frame.shape != still.shape:
            found, given = (f"{shape[1]}x{shape[0]}" for shape in (frame.shape, still.shape))
            raise ValueError(f"film={video} is {found}, the photograph {given}; give image= and size= that it was made with")
        change = frame.astype(np.int16) - still
        motion.append(np.abs(change[mouth]).mean())
        error += float(np.square(change[kept], dtype=np.float32).mean())
        times.append(time)
    if not times:
        raise ValueError(f"film={video} holds no frames")
    fps = round((len(times) - 1) / (times[-1] - times[0])) if times[-1] > times[0] else FPS
    return np.array(motion), float(10 * np.log10(255**2 / max(error / len(times), 1e-9))), max(1, fps)


def outside_lower_face(portrait: Portrait) -> np.ndarray:
    """True where speech has no business: everything but the face from its middle down to below the chin.  -> bool [H,W]"""
    face, (height, width) = portrait.face, portrait.pixels.shape[:2]
    rows, columns = np.ogrid[:height, :width]
    lower = (rows > face.y + face.height / 2) & (rows < face.y + 1.45 * face.height)
    return ~(lower & (columns > face.x - 0.1 * face.width) & (columns < face.x + 1.1 * face.width))


def pauses(level: np.ndarray) -> np.ndarray:
    """True in the quiet frames that are at least REST_FRAMES after the last sound and before the next.  -> bool [F]"""
    loud = level > np.percentile(level, 95) * 10 ** (QUIET_DB / 20)
    near = np.convolve(loud, np.ones(2 * REST_FRAMES + 1), mode="same") > 0
    return ~near


def show(found: dict[str, float]) -> None:
    """The figures beside what a good film reaches."""
    goals = {"photo_psnr_db": "≥ 33", "speech_correlation": "≥ 0.5", "lag_frames": "-2 to 2", "rest_ratio": "≤ 0.2"}
    table = Table("figure", "found", "good")
    for name, value in found.items():
        table.add_row(name, f"{value:.3f}", goals.get(name, ""))
    Console(width=80).print(table)
