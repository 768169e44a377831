"""Recordings: any audio file as 16 kHz mono speech, and the log-mel columns that the preview's speech encoder reads.

The only module that imports librosa. Files are processed as streams or in chunks: only the samples themselves are held whole.
"""

from __future__ import annotations

import logging
import math
from array import array
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np

from sonic.data.audio_decode import ClockReport, decode_sound, mix_down, soundtrack
from sonic.data.audio_decode import NoSound as NoSound
from sonic.geometry import FPS
from sonic.system.caches import make_room_for_caches
from sonic.types import Speech

LOG = logging.getLogger(__name__)

SAMPLE_RATE = 16_000
SHORTEST_S = 0.2
SILENCE_DBFS = -80.0  # a recording whose loudest 20 ms are below this is refused as silent

COLUMNS_PER_FRAME = 2
MELS = 40
_HOP = SAMPLE_RATE // (FPS * COLUMNS_PER_FRAME)  # 320 samples, 20 ms
_WINDOW = 640  # 40 ms
_CHUNK_COLUMNS = 512

_LOUDNESS_DBFS = -20.0  # level to which the loud part of every recording is scaled
_QUIETEST_DBFS = -50.0  # quieter recordings are amplified no more than this one, since they hold noise only
_AUDIBLE_DBFS = -65.0  # white noise up to this level, before any gain, counts as silence
_FLOOR = 1e-7  # mel power of silence
_MEAN, _SPREAD = -5.8, 1.4  # of log10 mel power over synthesised speech


def load_speech(path: str | Path) -> Speech:
    """Load a recording as 16 kHz mono samples: wav, mp3, flac, m4a, ogg, any sample rate, mono or stereo.

    Raises ValueError when the path is missing or a folder, when the file is empty, damaged, a video, without sound or shorter
    than 0.2 s, when samples are not finite, or when all of it is silent.
    """
    path = Path(path)
    _check_file(path)
    store, report = array("f"), ClockReport()
    for mono in mix_down(decode_sound(path, rate=SAMPLE_RATE, report=report), SAMPLE_RATE):
        store.frombytes(mono.tobytes())
    samples = np.frombuffer(store, np.float32) if store else np.zeros(0, np.float32)
    seconds = len(samples) / SAMPLE_RATE
    if seconds == 0:
        raise ValueError(f"audio={path} holds no sound that can be decoded; give an undamaged recording with speech in it")
    check_length(seconds, f"audio={path}")
    check_level(samples, f"audio={path}")
    np.clip(samples, -1, 1, out=samples)
    if sentence := report.sentence(f"audio={path}"):
        LOG.warning(sentence)
    return Speech(samples, SAMPLE_RATE, path)


def load_soundtrack(path: str | Path) -> np.ndarray:
    """Load the sound of a video as 16 kHz mono samples, float32 [n]; sample 0 is at second 0 of the pictures.

    Raises NoSound when the video has no sound, ValueError when it cannot be decoded.
    """
    path, report = Path(path), ClockReport()
    try:
        pieces = list(mix_down(decode_sound(path, rate=SAMPLE_RATE, choose=soundtrack, report=report), SAMPLE_RATE))
    except NoSound:
        raise
    except ValueError as error:
        raise ValueError(f"video={path}: its sound cannot be decoded; give an undamaged video") from error
    if not pieces:
        raise NoSound(f"video={path} holds no sound that can be decoded; give one whose sound can be heard")
    late = round((report.start_s or 0.0) * SAMPLE_RATE)
    samples = np.clip(np.concatenate(pieces), -1, 1)
    return np.pad(samples, (late, 0)) if late > 0 else samples[-late:]


def check_length(seconds: float, called: str) -> None:
    """Raise ValueError when a recording is too short; `called` names it."""
    if seconds < SHORTEST_S:
        raise ValueError(f"{called} lasts {seconds:.2f} s, the shortest recording is {SHORTEST_S} s; give a longer one")


def check_level(samples: np.ndarray, called: str) -> None:
    """Raise ValueError when a recording at 16 kHz is silent throughout; `called` names it."""
    if frame_levels(samples).max() < SILENCE_DBFS:
        raise ValueError(f"{called} is silent throughout (below {SILENCE_DBFS:.0f} dBFS); give a recording with speech in it")


def envelope(samples: np.ndarray, sample_rate: int, frames: int, *, fps: int = FPS) -> np.ndarray:
    """Root mean square of the samples during each video frame.  -> [frames]"""
    edges = np.arange(frames + 1) * sample_rate // fps
    parts = (samples[a:b] for a, b in zip(edges, edges[1:], strict=False))
    return np.array([np.sqrt(np.mean(np.square(part))) if len(part) else 0.0 for part in parts])


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise ValueError(f"audio={path} is a folder; give one recording, such as {path / 'speech.wav'}")
    if not path.exists():
        raise ValueError(f"audio={path} does not exist; give the path of a recording (wav, mp3, flac, m4a or ogg)")
    if path.stat().st_size == 0:
        raise ValueError(f"audio={path} is an empty file; give a recording with speech in it")


def resample(samples: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    """Resample float32 [n] to another sample rate in Hz."""
    return _librosa().resample(samples, orig_sr=rate, target_sr=new_rate).astype(np.float32)


def frame_levels(samples: np.ndarray) -> np.ndarray:
    """Level of every 20 ms in dBFS (mean square; a full-scale square wave is 0)."""
    whole = np.pad(samples, (0, -len(samples) % _HOP)).reshape(-1, _HOP)
    power = np.einsum("nt,nt->n", whole, whole, dtype=np.float32) / _HOP
    return 10 * np.log10(power + 1e-12)


def loudness_gain(samples: np.ndarray) -> float:
    """Factor that scales the loud part of a recording to -20 dBFS; noise or silence is not amplified to the level of speech.

    The loud part is the 90th percentile of the frames within 30 dB of the loudest, so that pauses do not count.
    """
    levels = frame_levels(samples)
    if not len(levels):
        return 1.0
    loud = np.percentile(levels[levels >= levels.max() - 30], 90)
    return 10 ** ((_LOUDNESS_DBFS - max(float(loud), _QUIETEST_DBFS)) / 20)


def log_mel(samples: np.ndarray, num_frames: int, *, gain: float | None = None) -> np.ndarray:
    """Log-mel columns float32 [2·F, 40] of 16 kHz speech: two per video frame, centred at 1/4 and 3/4 of its 40 ms.

    The recording is scaled to a common loudness; silence gives `SILENT_COLUMN`, as do frames after the last sample.
    """
    librosa = _librosa()
    columns = COLUMNS_PER_FRAME * num_frames
    out = np.full((columns, MELS), SILENT_COLUMN, np.float32)
    gain = loudness_gain(samples) if gain is None else gain  # of a part of a recording that of the whole is given
    bank = _mel_bank()
    unheard = _unheard_power()
    lead = (_WINDOW - _HOP) // 2  # the window of column j is centred on sample (j + 1/2) · hop
    for first in range(0, columns, _CHUNK_COLUMNS):
        count = min(_CHUNK_COLUMNS, columns - first)
        begin, end = first * _HOP - lead, (first + count - 1) * _HOP - lead + _WINDOW
        piece = samples[max(0, begin) : max(0, end)]
        if not len(piece):
            break
        piece = np.pad(piece, (max(0, -begin), end - max(0, begin) - len(piece)))
        spectrum = librosa.stft(piece, n_fft=_WINDOW, hop_length=_HOP, center=False)
        power = np.maximum(bank @ np.square(np.abs(spectrum)) - unheard[:, None], 0) * gain**2
        out[first : first + count] = (np.log10(power.T + _FLOOR) - _MEAN) / _SPREAD
    return out


SILENT_COLUMN = (math.log10(_FLOOR) - _MEAN) / _SPREAD


@cache
def _mel_bank() -> np.ndarray:
    """Triangular mel filters [40, 321], scaled so that a full-scale sine gives about 1."""
    bank = _librosa().filters.mel(sr=SAMPLE_RATE, n_fft=_WINDOW, n_mels=MELS, fmin=60, fmax=7600, norm=None)
    return (bank / (_WINDOW / 4) ** 2).astype(np.float32)


@cache
def _unheard_power() -> np.ndarray:
    """Mel power [40] below which a column counts as silence: white noise of _AUDIBLE_DBFS, tripled because single columns scatter."""
    white = 10 ** (_AUDIBLE_DBFS / 10) * np.sum(np.hanning(_WINDOW) ** 2)  # expected |STFT|² of one bin
    return 3 * white * _mel_bank().sum(axis=1)


def _librosa() -> ModuleType:
    """Import librosa after giving its compiled functions a cache folder."""
    make_room_for_caches()
    import librosa

    return librosa
