"""How exactly post.lip_align takes offsets out of videos of drawn people whose mouths are known.

python tests/lip_align_table.py      prints the table of 20 clips of 4 to 8 s, each with five offsets
"""

from __future__ import annotations

import numpy as np
from video_files import speech, talking

from sonic.inference.post_config import PostConfig
from sonic.inference.sound_offset import SoundOffset
from sonic.synthetic import draw_face
from sonic.types import FrameChunk, Inputs, Portrait, Speech

SHIFTS_MS = (-80, -40, 0, 40, 80)
CLIPS = 20


def drawn_video(seed: int, frames: int) -> tuple[np.ndarray, np.ndarray]:
    """A drawn person who moves the head and speaks: frames uint8 [F,H,W,3], the first one at rest, and the sound at 16 kHz."""
    samples, visemes = speech(seed, frames)
    person = draw_face.draw_identity(np.random.default_rng(seed), 192, split="test", photographs=0)
    return talking(visemes, picture=person.picture, mouth=person.mouth, seed=seed), samples


def mouth_later(samples: np.ndarray, ms: float) -> np.ndarray:
    """The sound earlier by so much, so that the mouth is later; silence where sound is missing."""
    early = round(16 * ms)
    return np.pad(samples, (max(0, -early), max(0, early)))[max(0, early) :][: len(samples)]


def inputs_of(pixels: np.ndarray, samples: np.ndarray, fps: int = 25) -> Inputs:
    """The inputs of a video that will have these frames."""
    return Inputs(Portrait(pixels[0]), Speech(samples), len(pixels), fps=fps)


def recorded(seed: int, frames: int) -> tuple[SoundOffset, np.ndarray]:
    """The offset of a drawn video whose frames have been recorded, and its sound."""
    pixels, samples = drawn_video(seed, frames)
    offset = SoundOffset(inputs_of(pixels, samples), PostConfig(lip_align=True))
    offset.record(FrameChunk(pixels, 0))
    return offset, samples


def remaining_ms(offset: SoundOffset, samples: np.ndarray, shift_ms: float) -> float:
    """What is left of a shift of the mouth after the measured delay is taken out; all of it where the measure is not sure."""
    offset.measure(mouth_later(samples, shift_ms))
    return shift_ms - 1000 * offset.later_s


def main() -> None:
    """Print the table."""
    rows = []
    for seed in range(CLIPS):
        offset, samples = recorded(seed, 100 + 5 * seed)
        rows.append([remaining_ms(offset, samples, shift) for shift in SHIFTS_MS])
        print(f"clip {seed:2d} {4 + seed / 5:.1f} s:", " ".join(f"{left:+6.1f}" for left in rows[-1]), flush=True)
    left = np.array(rows)
    print("shift", " ".join(f"{shift:+5d}" for shift in SHIFTS_MS), "ms")
    print("within 10 ms", " ".join(f"{share:5.0%}" for share in (np.abs(left) <= 10).mean(axis=0)), f"of {CLIPS} clips each")
    print(f"all: {(np.abs(left) <= 10).mean():.1%}; mean {left.mean():+.1f} ms, deviation {left.std():.1f}, largest {abs(left).max():.1f}")


if __name__ == "__main__":
    main()
