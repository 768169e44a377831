"""By how much the sound of a video is to be later than its pictures: post.alignment_offset, and what post.lip_align measures.

The opening of the mouth is read in the frames as they pass, and compared with the opening that the speech asks for. That is a linear map
of the features of the preview's speech encoder, which learnt mouth shapes from sound whose visemes are known: loudness would be off by
more than 10 ms, differently for every voice.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import cache

import numpy as np
import torch
from einops import rearrange
from scipy.interpolate import CubicSpline
from scipy.ndimage import uniform_filter1d
from torch import nn

from sonic.checkpoint.bundled import BUNDLED
from sonic.checkpoint.weights import load_weights
from sonic.data.audio import SAMPLE_RATE
from sonic.data.face_detector import Landmarks
from sonic.data.faces import CONFIDENT, FaceFinder
from sonic.encoders.logmel import VISEMES, LogMelEncoder
from sonic.evaluation import metrics
from sonic.geometry import FPS
from sonic.inference.inputs import Settings
from sonic.inference.post_config import MOST_OFFSET_S, PostConfig
from sonic.types import FrameChunk, Inputs, Portrait, Speech

log = logging.getLogger("sonic.inference")

STEP_S = 0.01  # between the offsets that are tried, up to MOST_OFFSET_S in both directions; a parabola refines the best
SLOW_S = 1.0  # changes of posture and of the smile are slower, and are subtracted
LEAST_S, PARTS = 2.0, 8  # shortest video that is measured, and parts of it that are left out in turn for the standard error
MOST_ERROR_S = 0.01  # largest standard error of an offset that is taken out
CHANCE = 1.2  # correlation that a second of unrelated tracks does not reach; it falls with the root of the length
WINDOW_S = 8.0  # of a stream that is measured at a time


@dataclass(frozen=True)
class MouthDelay:
    """By how much the mouth is later than the sound (negative = earlier), the standard error of that, the correlation of the mouth with
    what the speech asks for, and why the measure is not sure ("" = it is)."""

    late_s: float = 0.0
    standard_error_s: float = 0.0
    correlation: float = 0.0
    unsure: str = ""

    def __str__(self) -> str:
        if self.unsure:
            return f"lip_align changes nothing: {self.unsure}"
        how_sure = f"standard error {1000 * self.standard_error_s:.0f} ms, correlation {self.correlation:.2f}"
        which = "later" if self.late_s >= 0 else "earlier"
        return f"lip_align: the mouth is {1000 * abs(self.late_s):.0f} ms {which} than the sound ({how_sure}), which is taken out"


def mouth_delay(opening: np.ndarray, expected: np.ndarray, fps: float) -> MouthDelay:
    """Measure the delay of a mouth behind its speech, well below a frame.

    opening [F] at `fps`, nan where no mouth is seen; `expected` [K] by the speech, at FPS from the same moment on.
    """
    times, seen = (np.arange(len(opening)) + 0.5) / fps, np.isfinite(opening)
    used = seen & (times > MOST_OFFSET_S) & (times < len(opening) / fps - MOST_OFFSET_S)
    seconds = used.sum() / fps
    if seconds < LEAST_S:
        return MouthDelay(unsure=f"a speaking mouth is seen for {seconds:.1f} s, and {LEAST_S:.0f} s are needed")
    at, steps = (np.arange(len(expected)) + 0.5) / FPS, round(MOST_OFFSET_S / STEP_S)
    curve = CubicSpline(at, expected)
    offsets = STEP_S * np.arange(-steps, steps + 1)
    tracks = np.stack([np.interp(times, times[seen], opening[seen]), *(curve(np.clip(times - late, at[0], at[-1])) for late in offsets)])
    tracks = (tracks - uniform_filter1d(tracks, round(SLOW_S * fps), mode="nearest"))[:, used]
    late, correlation = _best(offsets, tracks)
    part = np.arange(tracks.shape[1]) * PARTS // tracks.shape[1]
    error = math.sqrt((PARTS - 1) * np.var([_best(offsets, tracks[:, part != left_out])[0] for left_out in range(PARTS)]))  # jackknife
    unsure, least = "", CHANCE / math.sqrt(seconds)
    if correlation < least:
        unsure = f"the mouth hardly follows the speech (correlation {correlation:.2f}, in {seconds:.1f} s {least:.2f} is needed)"
    elif abs(late) > MOST_OFFSET_S - STEP_S:
        unsure = f"mouth and sound seem to be {MOST_OFFSET_S} s or more apart"
    elif error > MOST_ERROR_S:
        unsure = f"its measure has a standard error of {1000 * error:.0f} ms, and {1000 * MOST_ERROR_S:.0f} ms is allowed"
    return MouthDelay(round(late, 4), round(error, 4), round(correlation, 3), unsure)


def _best(offsets: np.ndarray, tracks: np.ndarray) -> tuple[float, float]:
    """The offset at which the first track correlates best with the others, of which there is one for each offset, and the correlation."""
    position, correlation = metrics.peak([metrics.correlation(tracks[0], shifted) for shifted in tracks[1:]])
    return float(offsets[0] + STEP_S * position), correlation


@torch.no_grad()
def expected_opening(samples: np.ndarray, frames: int) -> np.ndarray:
    """The opening of a mouth that says this, in each 1/FPS s, 1 = wide open.  float32 [samples] at 16 kHz -> [F]"""
    encoder, head = _viseme_reader()
    return head(rearrange(encoder.encode_audio(samples, frames), "1 e f -> f e"))[:, 0].numpy()


@cache
def _viseme_reader() -> tuple[LogMelEncoder, nn.Linear]:
    """The bundled speech encoder and the viseme head over its features."""
    encoder, head = LogMelEncoder().eval(), nn.Linear(LogMelEncoder.FEATURES, VISEMES)
    load_weights(encoder, BUNDLED / "preview_speech.safetensors")
    load_weights(head, BUNDLED / "preview_visemes.safetensors")
    return encoder, head


class SoundOffset:
    """The offset of the sound of one video. With post.lip_align it is measured on the frames that are recorded, and until then 0."""

    def __init__(self, inputs: Inputs, post: PostConfig) -> None:
        self.delay: MouthDelay | None = None
        self._inputs, self._post, self._openings = inputs, post, []
        self._finder = FaceFinder() if post.lip_align else None
        self._face = None if self._finder is None else _landmarks(self._finder, inputs.portrait)

    @property
    def later_s(self) -> float:
        """Seconds by which the sound is to be later than the pictures."""
        return self._post.alignment_offset + (0.0 if self.delay is None or self.delay.unsure else self.delay.late_s)

    def as_json(self) -> dict:
        """The offset and what was measured, for result.json."""
        return {"later_s": round(self.later_s, 6), "lip_align": None if self.delay is None else asdict(self.delay)}

    def record(self, chunk: FrameChunk) -> None:
        """Read the mouth in the frames of a chunk."""
        for frame in np.asarray(chunk.pixels) if self._finder is not None else ():
            seen = None if self._face is None else self._finder.follow(frame, self._face)
            self._face = seen or self._face
            self._openings.append(math.nan if seen is None else seen.opening)

    def measure(self, samples: np.ndarray) -> None:
        """Measure the delay of the mouth over the recorded frames, whose sound at 16 kHz is given."""
        frames = math.ceil(len(self._openings) / self._inputs.fps * FPS)
        self.delay = mouth_delay(np.array(self._openings), expected_opening(samples, frames), self._inputs.fps)
        log.info("%s", self.delay)

    def speech(self) -> Speech:
        """The recording with the offset of the whole video, all of whose frames have been recorded."""
        if self._finder is not None:
            self.measure(self._inputs.speech.samples)
        return replace(self._inputs.speech, later_s=self.later_s)

    def stream(self, chunks: Iterator[FrameChunk], settings: Settings) -> Iterator[FrameChunk]:
        """The chunks, each with the offset of its sound: that of post.alignment_offset, to which the measured one is added WINDOW_S after
        the start, and held. Where a window gives no sure measure, the next one does."""
        first = 0
        with closing(chunks):
            for chunk in chunks:
                if self._finder is not None and (self.delay is None or self.delay.unsure):
                    self.record(chunk)
                    if len(self._openings) >= WINDOW_S * self._inputs.fps:
                        start = int(first * SAMPLE_RATE / self._inputs.fps)
                        self.measure(self._inputs.speech.samples[start:] if settings.sound is None else settings.sound.since(start))
                        first, self._openings = chunk.start + len(chunk), []
                yield replace(chunk, sound_later_s=self.later_s)
        if self._finder is not None and self.delay is None:
            log.info("%s", MouthDelay(unsure=f"a stream is measured over {WINDOW_S:g} s, and this one is shorter"))


def _landmarks(finder: FaceFinder, portrait: Portrait) -> Landmarks | None:
    """The landmarks of the face that speaks in a portrait, the largest where it is not known; None when none is seen."""
    found = finder.faces(portrait.pixels) if portrait.face is None else [finder.face_in(portrait.pixels, portrait.face)]
    sure = [face for face in found if face is not None and face.confidence >= CONFIDENT]
    return max(sure, key=lambda face: face.box.width).landmarks if sure else None
