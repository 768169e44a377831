"""Judges a finished video against its photograph and its recording: likeness outside the mouth, sync of the mouth with the speech,
and whether the video's sound track is that recording.

All metrics are computed from the decoded file, so they include the losses of compression.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from sonic.config import VideoConfig
from sonic.data.audio import envelope, load_soundtrack, load_speech
from sonic.data.audio_decode import NoSound, track_seconds
from sonic.data.faces import CONFIDENT, FaceFinder, portrait_of
from sonic.data.image import load_image
from sonic.data.video import timed_frames
from sonic.evaluation import metrics
from sonic.evaluation.judge_config import JudgeConfig
from sonic.geometry import FPS
from sonic.inference.fit_picture import fit_portrait
from sonic.inference.inputs import PORTRAITS, RECORDINGS
from sonic.inference.post_config import MOST_OFFSET_S
from sonic.inference.report import mouth_window
from sonic.system.files import write_json
from sonic.system.paths import file_key
from sonic.types import Portrait, Speech

LOG = logging.getLogger(__name__)
QUIET_DB = -38.0  # level relative to the loud parts below which there is no speech
REST_S = 0.2  # time after which the mouth is at rest in a pause
AT_REST = 5  # per cent of the frames have a mouth at rest, at least
MAX_LAG_S = 0.48  # largest lag that is tried, in both directions
SOUND_REACH_S = 2.0  # largest offset of the sound that is tried, in both directions
LARGEST_OFFSET_MS, LEAST_CORRELATION = 10.0, 0.8  # limits for a sound track that matches its recording
ABOVE_MOUTH, BELOW_MOUTH, BESIDE_MOUTH = -1.5, 3.25, 3.0  # what speech may move, from the mouth, in halves of its width
_BLOCK = 1 << 16  # samples of the recording that are correlated at a time


def judge(config: JudgeConfig) -> dict[str, float]:
    """Judge a video by `config`, print the table, write the JSON, and return the metrics.

    photo_psnr_db: PSNR outside the lower half of the face; speech_correlation: of the mouth's motion with the speech envelope at the
    best lag; lag_frames: that lag (positive = the mouth is late); rest_ratio: the mouth's motion in pauses relative to speech; and
    those of `sound_figures`. Raises ValueError when video and photograph differ in size.
    """
    _refuse_overwriting(config)
    portrait = portrait_of(load_image(PORTRAITS.get(config.image, config.image)), config.face.box, config.face.mouth)
    portrait = fit_portrait(portrait, VideoConfig(config.size, min_resolution=config.min_resolution))
    speech = load_speech(RECORDINGS.get(config.audio, config.audio))
    motion, photo_psnr, times = measure_video(Path(config.mp4), portrait)
    mouth = np.abs(motion)
    fps = frame_rate(times)
    level = envelope(speech.samples, speech.sample_rate, len(motion), fps=fps)
    best, lag = metrics.best_lag(motion, level, max_lag=round(MAX_LAG_S * fps))
    rests, speaks = pauses(level, fps), level > np.median(level)
    figures = {
        "photo_psnr_db": photo_psnr,
        "speech_correlation": best,
        "lag_frames": lag,
        "rest_ratio": float(mouth[rests].mean() / mouth[speaks].mean()) if rests.any() else 0.0,
        "frames": float(len(motion)),
        "frame_ms": 1000 / fps,
        **sound_figures(Path(config.mp4), speech, times),
    }
    show(figures)
    if config.json:
        write_json({**figures, "mouth_motion": motion.tolist()}, config.json)
    return figures


def _refuse_overwriting(config: JudgeConfig) -> None:
    """Raise ValueError when the JSON would overwrite one of the judged files, by whatever path."""
    for option in ("mp4", "image", "audio"):
        name = getattr(config, option)
        if config.json and file_key(name) == file_key(config.json):
            raise ValueError(f"json={config.json} is the file {option}={name} that is judged; choose another json")


def sound_figures(video: Path, recording: Speech, times: np.ndarray) -> dict[str, float]:
    """Compare the video's sound track with its frames, which appear at `times` [F] in seconds, and with the recording.

    sound_length_ms: by how much the track is longer than the frames; sound_offset_ms: delay of the recording in the track;
    sound_correlation: of the two at that offset. Without a sound track there is no offset, and the correlation is 0.
    """
    pictures = times[-1] - times[0] + 1 / frame_rate(times)
    try:
        sound, seconds = load_soundtrack(video), track_seconds(video)
    except NoSound:
        return {"sound_length_ms": -1000 * pictures, "sound_correlation": 0.0}
    first = round(times[0] * recording.sample_rate)
    offset, correlation = sound_offset(sound[first:], recording.samples, round(SOUND_REACH_S * recording.sample_rate))
    return {
        "sound_length_ms": 1000 * (seconds - pictures),
        "sound_offset_ms": 1000 * offset / recording.sample_rate,
        "sound_correlation": correlation,
    }


def sound_offset(found: np.ndarray, truth: np.ndarray, reach: int) -> tuple[int, float]:
    """Delay of `found` behind `truth` in samples (at most ±`reach`) with the highest correlation, and that correlation.

    The cross-correlation is summed over blocks, so that its memory does not grow with the length of the sound.
    """
    truth = truth[: len(found)]
    found = np.pad(found[: len(truth) + reach], (reach, reach + max(0, len(truth) - len(found))))
    size = 1 << (_BLOCK + 2 * reach - 1).bit_length()
    spectrum = np.zeros(size // 2 + 1, np.complex128)
    for start in range(0, len(truth), _BLOCK):
        later = np.fft.rfft(found[start : start + _BLOCK + 2 * reach], size)
        spectrum += later * np.fft.rfft(truth[start : start + _BLOCK], size).conj()
    products = np.fft.irfft(spectrum, size)[: 2 * reach + 1]
    best = int(np.abs(products).argmax())
    power = float(np.square(found, dtype=np.float64).sum() * np.square(truth, dtype=np.float64).sum())
    return best - reach, float(abs(products[best]) / np.sqrt(power)) if power else 0.0


def sound_fault(figures: dict[str, float]) -> str:
    """A sentence about what is wrong with the sound track of a judged video; empty when it matches the recording."""
    if "sound_offset_ms" not in figures:
        return f"the video has no sound track: sound_length_ms is {figures['sound_length_ms']:.1f}"
    limits = {"sound_length_ms": figures["frame_ms"], "sound_offset_ms": LARGEST_OFFSET_MS}
    faults = [f"{name} is {figures[name]:.1f}, allowed are ±{most:.0f}" for name, most in limits.items() if abs(figures[name]) > most + 0.5]
    if figures["sound_correlation"] < LEAST_CORRELATION:
        faults.append(f"sound_correlation is {figures['sound_correlation']:.2f}, at least {LEAST_CORRELATION} is expected")
    meant = LARGEST_OFFSET_MS < abs(figures["sound_offset_ms"]) <= 2000 * MOST_OFFSET_S  # a given offset and a measured one
    options = "; post.alignment_offset or post.lip_align moves the sound like this" if meant else ""
    return f"the video's sound does not match: {', '.join(faults)}{options}" if faults else ""


def frame_rate(times: np.ndarray) -> int:
    """Frames per second, from the times of the frames in seconds [F]."""
    return max(1, round((len(times) - 1) / (times[-1] - times[0]))) if times[-1] > times[0] else FPS


def measure_video(video: Path, portrait: Portrait) -> tuple[np.ndarray, float, np.ndarray]:
    """Compare a video with its photograph: motion of the mouth in each frame [F], PSNR in dB outside the lower half of the face over
    all frames, and the time in seconds of each frame [F].

    The motion is by how much further the mouth is open than at rest, in distances of the eyes; at rest it is in the frames in which it is
    most closed, because an open mouth of the photograph closes in pauses. Where the landmarks of the photograph's face cannot be read,
    as in a cartoon, the motion is the mean change of the mouth region in grey levels.
    """
    still, mouth, kept = portrait.pixels.astype(np.int16), mouth_window(portrait), outside_lower_face(portrait)
    finder = FaceFinder()
    face = finder.face_in(portrait.pixels, portrait.face)
    last = face.landmarks if face and face.confidence >= CONFIDENT else None
    changes, openings, error, times = [], [], 0.0, []
    for time, frame in timed_frames(video):
        if frame.shape != still.shape:
            found, given = (f"{shape[1]}x{shape[0]}" for shape in (frame.shape, still.shape))
            raise ValueError(f"mp4={video} is {found}, the photograph {given}; give image= and size= that it was made with")
        change = frame.astype(np.int16) - still
        changes.append(np.abs(change[mouth]).mean())
        if last is not None:
            last = finder.follow(frame, last) or last
            openings.append(last.opening)
        error += float(np.square(change[kept], dtype=np.float32).mean())
        times.append(time)
    if not times:
        raise ValueError(f"mp4={video} holds no frames")
    if last is None:
        LOG.warning("no face is seen in the photograph: the motion of the mouth is the change of its pixels")
    motion = np.array(changes) if last is None else np.array(openings) - np.percentile(openings, AT_REST)
    return motion, float(10 * np.log10(255**2 / max(error / len(times), 1e-9))), np.array(times)


def outside_lower_face(portrait: Portrait) -> np.ndarray:
    """Mask that excludes what speech may move: the face from its middle down to below the chin.  -> bool [H,W]"""
    mouth, (height, width) = portrait.mouth, portrait.pixels.shape[:2]
    rows, columns = np.ogrid[:height, :width]
    cos, sin = math.cos(mouth.angle) / mouth.half_width, math.sin(mouth.angle) / mouth.half_width
    x, y = columns - mouth.x, rows - mouth.y
    across, down = cos * x + sin * y, cos * y - sin * x
    return ~((down > ABOVE_MOUTH) & (down < BELOW_MOUTH) & (np.abs(across) < BESIDE_MOUTH))


def pauses(level: np.ndarray, fps: int) -> np.ndarray:
    """Mask of the quiet frames that are at least REST_S away from any sound.  -> bool [F]"""
    loud = level > np.percentile(level, 95) * 10 ** (QUIET_DB / 20)
    near = np.convolve(loud, np.ones(2 * round(REST_S * fps) + 1), mode="same") > 0
    return ~near


def show(figures: dict[str, float]) -> None:
    """Print the metrics beside the values of a good video."""
    goals = {"photo_psnr_db": "≥ 33", "speech_correlation": "≥ 0.5", "lag_frames": "-2 to 2", "rest_ratio": "≤ 0.2"}
    frame = figures["frame_ms"]
    goals |= {"sound_length_ms": f"{-frame:.0f} to {frame:.0f}", "sound_offset_ms": f"{-LARGEST_OFFSET_MS:.0f} to {LARGEST_OFFSET_MS:.0f}"}
    goals["sound_correlation"] = f"≥ {LEAST_CORRELATION}"
    table = Table("figure", "found", "good")
    for name, value in figures.items():
        table.add_row(name, f"{value:.3f}", goals.get(name, ""))
    Console(width=80).print(table)
