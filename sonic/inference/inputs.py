"""The inputs of a video as files or in memory, and the settings of its generation."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import skimage
import torch

from sonic.checkpoint.bundled import BUNDLED
from sonic.config import VideoConfig
from sonic.data.audio import load_speech
from sonic.data.image import load_image
from sonic.data.live_audio import LiveAudio
from sonic.geometry import frames_of_audio
from sonic.inference.infer_config import InferConfig
from sonic.inference.rollout import OnStep
from sonic.system.paths import file_key
from sonic.types import Speech

log = logging.getLogger("sonic.inference")
PORTRAITS = {"astronaut": Path(skimage.__file__).parent / "data" / "astronaut.png"}
RECORDINGS = {"sample": BUNDLED / "sample_speech.flac"}
BUNDLED_INPUTS = {"image": PORTRAITS, "audio": RECORDINGS}  # option -> the files in the package that it may name


@dataclass(frozen=True)
class Settings:
    """How a video is generated: its options, and what a Python caller may hand over besides.

    `generator` replaces the generator seeded with the video's seed; `sound` replaces the recording while it is still arriving; `on_step`
    is called after every sampling step, in the thread that denoises.
    """

    config: InferConfig = field(default_factory=InferConfig)
    generator: torch.Generator | None = None
    on_step: OnStep | None = None
    sound: LiveAudio | None = None


class InMemory(NamedTuple):
    """Inputs passed as arrays or as live sound; each replaces the file that the config names."""

    picture: np.ndarray | None = None
    speech: Speech | None = None
    original: Speech | None = None  # `speech` at its own sample rate, for the sound track of the video
    sound: LiveAudio | None = None

    def picture_of(self, config: InferConfig) -> np.ndarray:
        """The picture from memory or from its file, uint8 [H,W,3]."""
        return load_image(PORTRAITS.get(config.image, config.image)) if self.picture is None else self.picture

    def speech_of(self, config: InferConfig) -> Speech:
        """The recording from memory or from its file, at its duration; empty while the sound is still arriving."""
        if self.sound is not None:
            return Speech(np.zeros(0, np.float32))
        speech = load_speech(RECORDINGS.get(config.audio, config.audio)) if self.speech is None else self.speech
        return at_duration(speech, config.video)


ALL_IN_FILES = InMemory()


def input_files(config: InferConfig, memory: InMemory = ALL_IN_FILES) -> list[tuple[str, str]]:
    """(option, file) for every file that a video is made from, without the files bundled with the package."""
    audio = config.audio.split("+") if config.face.masks else [config.audio]
    named = [("image", config.image)] if memory.picture is None else []
    named += [("audio", name) for name in audio if memory.speech is None and memory.sound is None]
    named += [("face.masks", name) for name in config.face.masks or ()]
    named += [("motion.pose", config.motion.pose), ("requests", config.requests)]
    return [(option, name) for option, name in named if name and name not in BUNDLED_INPUTS.get(option, ())]


def refuse_overwriting(inputs: Sequence[tuple[str, str]], *written: Path) -> None:
    """Raise ValueError when a file to be written is also an input, even if the two paths are spelt differently."""
    read = {file_key(name): f"{option}={name}" for option, name in reversed(inputs)}
    for path in written:
        if (named := read.get(file_key(path))) is not None:
            raise ValueError(f"output={path} is the file {named} that the video is made from; choose another output")


def at_duration(speech: Speech, video: VideoConfig) -> Speech:
    """The recording, cut to video.duration by video.duration_policy=trim, or with silence up to it by pad; else as it is."""
    lengths = {"trim": min, "pad": max}
    if not video.duration or video.duration_policy not in lengths:
        return speech
    return speech.lasting(lengths[video.duration_policy](speech.seconds, video.duration))


def check_duration(video: VideoConfig, seconds: float, called: str) -> None:
    """Log a warning when the sound and video.duration differ by more than a frame; `called` names the recording.

    Raises ValueError instead with video.duration_policy=strict.
    """
    if not video.duration and video.duration_policy != "follow":
        log.warning("video.duration_policy=%s has no effect without video.duration=SECONDS", video.duration_policy)
    if not video.duration or abs(seconds - video.duration) <= 1 / video.fps:
        return
    lengths = f"{called} lasts {seconds:.2f} s and video.duration={video.duration:g}"
    ways = "trim cuts a longer recording, pad adds silence to a shorter one"
    if video.duration_policy == "strict":
        raise ValueError(f"{lengths}: video.duration_policy=strict wants them equal within a frame; {ways}, follow makes {seconds:.2f} s")
    log.warning("%s: the video follows the sound; video.duration_policy=strict refuses that, %s", lengths, ways)


def video_length(config: InferConfig, memory: InMemory, speech: Speech) -> int:
    """Number of video frames for the recording, at most video.num_clip clips.

    For sound that is still arriving: the length of video.num_clip clips, or sys.maxsize when that is 0.
    """
    if memory.sound is not None:
        return config.video.num_clip * config.video.infer_frames or sys.maxsize
    frames = frames_of_audio(len(speech.samples), speech.sample_rate, config.video.fps)
    return min(frames, config.video.num_clip * config.video.infer_frames or frames)
