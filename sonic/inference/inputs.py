"""Opens and checks the inputs of a video (portrait, recording, masks, poses) and holds the settings of its generation."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import skimage
import torch

from sonic.config import DecodeConfig, FaceConfig, HeadConfig, SamplerConfig
from sonic.data.audio import load_speech
from sonic.data.faces import portrait_of
from sonic.data.image import covering, load_image
from sonic.data.live_audio import LiveAudio
from sonic.data.video import frames_at
from sonic.encoders.wav2vec import clips_of, states_of
from sonic.geometry import frames_of_audio
from sonic.inference.components import BUNDLED
from sonic.inference.conditions import fit_portrait, generated_area, published_picture, whole_picture
from sonic.inference.infer_config import InferConfig
from sonic.inference.rollout import OnStep
from sonic.system.paths import check_input, file_key
from sonic.types import Inputs, Portrait, Speech

log = logging.getLogger("sonic.inference")

DROPPED_FRAMES = 3  # the published pipelines drop these from the first clip, so the video runs ahead of its sound
WHITE = 127  # pixels of a mask above this level belong to the voice
PORTRAITS = {"astronaut": Path(skimage.__file__).parent / "data" / "astronaut.png"}
RECORDINGS = {"sample": BUNDLED / "sample_speech.flac"}
BUNDLED_INPUTS = {"image": PORTRAITS, "audio": RECORDINGS}  # option -> the files in the package that it may name


@dataclass(frozen=True)
class Settings:
    """How a video is generated.

    `generator` replaces the generator seeded with the video's seed; `sound` replaces the recording while it is still arriving; `on_step`
    is called after every sampling step, in the thread that denoises.
    """

    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    motion: HeadConfig = field(default_factory=HeadConfig)
    expand_ratio: float = 1.6
    clip_frames: int = 48
    compat: str = ""
    generator: torch.Generator | None = None
    on_step: OnStep | None = None
    sound: LiveAudio | None = None

    def random(self, seed: int) -> torch.Generator:
        """The generator of the noise: the given one, or a new one with the seed of the video."""
        return self.generator or torch.Generator().manual_seed(seed)

    @classmethod
    def of(cls, config: InferConfig) -> Settings:
        """The settings that a config contains."""
        ratio, clip_frames = config.face.expand_ratio, config.video.infer_frames
        return cls(config.sampler, config.decode, config.motion, ratio, clip_frames, config.video.compat)


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
        """The recording from memory or from its file; empty while the sound is still arriving."""
        if self.sound is not None:
            return Speech(np.zeros(0, np.float32))
        return load_speech(RECORDINGS.get(config.audio, config.audio)) if self.speech is None else self.speech


ALL_IN_FILES = InMemory()


def open_portrait(config: InferConfig, memory: InMemory = ALL_IN_FILES) -> Inputs:
    """The inputs of a preview video, in whose photograph a face must be found or given.

    Raises ValueError for options that only published models read, and without a face.
    """
    options = (("motion.pose", config.motion.pose), ("face.masks", config.face.masks), ("video.compat", config.video.compat))
    for option, value in options:
        if value:
            raise ValueError(f"{option}={value}: model={config.model.name} moves one face and follows no video; use a published model")
    speech = memory.speech_of(config)
    portrait = portrait_of(memory.picture_of(config), config.face.box, config.face.mouth)
    location = {"face_box": astuple(portrait.face), "face.mouth": astuple(portrait.mouth)}
    log.info(" ".join(f"{option}=[{','.join(f'{value:.10g}' for value in values)}]" for option, values in location.items()))
    fitted, frames = fit_portrait(portrait, config.video.size), _length(config, memory, speech)
    return Inputs(fitted, speech, frames, config.seed, location=location)


def open_picture(config: InferConfig, memory: InMemory = ALL_IN_FILES) -> Inputs:
    """The inputs of a Wan video, which generates the whole picture and needs no face in it.

    Raises ValueError for options of the preview, and for masks that do not fit the picture or the recordings.
    """
    _refuse_face_options(config)
    voices = tuple(load_speech(name) for name in config.audio.split("+")) if config.face.masks else ()
    speech = _mixed(voices) if voices else memory.speech_of(config)
    pixels = memory.picture_of(config)
    fit, area = published_picture if config.video.compat else whole_picture, generated_area(pixels, config.video.size)
    picture = Portrait(fit(pixels, area))
    length = _published_length(config, speech) if config.video.compat else _length(config, memory, speech)
    inputs = Inputs(picture, speech, length, config.seed, config.video.fps, config.prompt, config.sampler.negative_prompt)
    masks = None
    if voices:
        masks = np.stack([fit(_mask(name, pixels.shape), area)[..., 0] > WHITE for name in _one_each(config.face.masks, voices)])
    return replace(inputs, voices=voices, masks=masks, pose=_poses(config.motion.pose, inputs) if config.motion.pose else None)


OPENERS: dict[str, Callable[[InferConfig, InMemory], Inputs]] = {"warp": open_portrait, "wan": open_picture}  # by model.autoencoder


def open_inputs(config: InferConfig, memory: InMemory = ALL_IN_FILES) -> Inputs:
    """Read and check the inputs of a video. Raises ValueError with one sentence for anything that is wrong with them."""
    _refuse_with_memory(config, memory)
    for option, name in inputs_of(config, memory):
        check_input(name, option)
    return OPENERS[config.model.autoencoder](config, memory)


def _refuse_with_memory(config: InferConfig, memory: InMemory) -> None:
    """Raise ValueError for options that cannot be combined with sound in memory, or with sound that is still arriving."""
    if config.face.masks and (memory.speech is not None or memory.sound is not None):
        raise ValueError("face.masks needs audio=a.wav+b.wav, a file for each voice; save the recordings first")
    if memory.sound is None:
        return
    rollout, model = config.model.rollout, config.model.name
    if rollout.clip_frames:
        raise ValueError(
            f"model={model} makes clips of {config.video.infer_frames} frames whose sound it needs whole; give audio as a file or as "
            "(samples, sample_rate), or use a model that goes block by block: preview or live_avatar_14b"
        )
    needed_whole = (
        ("video.compat", config.video.compat, "its clips need their sound whole"),
        ("motion.pose", config.motion.pose, "the poses are read for a length that is known"),
        ("motion.head", config.motion.head.removeprefix("off"), "the motion is drawn for a length that is known"),
        ("decode.online", "" if config.decode.online else "false", "nothing would be decoded before the sound ends"),
    )
    for option, value, why in needed_whole:
        if value:
            raise ValueError(f"{option}={value} does not go with audio that is still arriving: {why}; leave it out, or give a recording")


def inputs_of(config: InferConfig, memory: InMemory = ALL_IN_FILES) -> list[tuple[str, str]]:
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


def _refuse_face_options(config: InferConfig) -> None:
    """Raise ValueError for options that only the preview reads, such as face.box, unless they have their default values."""
    defaults = {"face": FaceConfig(), "motion": HeadConfig()}
    for group, name in (("face", "box"), ("face", "mouth"), ("face", "expand_ratio"), ("motion", "head"), ("motion", "strength")):
        value = getattr(getattr(config, group), name)
        if value != getattr(defaults[group], name):
            why = f"model={config.model.name} generates the whole picture and looks for no face in it"
            raise ValueError(f"{group}.{name}={value}: {why}; leave it out, or use model=preview")


def _mixed(voices: tuple[Speech, ...]) -> Speech:
    """The sum of all recordings, clipped to [-1,1], as long as the longest."""
    mixed = np.zeros(max(len(voice.samples) for voice in voices), np.float32)
    for voice in voices:
        mixed[: len(voice.samples)] += voice.samples
    return Speech(np.clip(mixed, -1, 1), voices[0].sample_rate)


def _one_each(masks: list[str], voices: tuple[Speech, ...]) -> list[str]:
    if len(masks) != len(voices):
        raise ValueError(f"face.masks names {len(masks)} pictures for {len(voices)} recordings; give one for each of audio=a.wav+b.wav")
    return masks


def _mask(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A mask as uint8 [H,W,3]. Raises ValueError unless it has the size of the portrait."""
    pixels = load_image(name, "face.masks")
    if pixels.shape != shape:
        sizes = f"{pixels.shape[1]}x{pixels.shape[0]} pixels, the portrait {shape[1]}x{shape[0]}"
        raise ValueError(f"face.masks={name} has {sizes}; draw it over the portrait")
    return pixels


def _poses(path: str, inputs: Inputs) -> np.ndarray:
    """The frames of the pose video, uint8 [F,H,W,3] at the size and frame rate of the output, padded with black after its end."""
    height, width = inputs.portrait.pixels.shape[:2]
    found = [covering(frame, width, height) for frame in islice(frames_at(path, inputs.fps), inputs.num_frames)]
    black = np.zeros((inputs.num_frames - len(found), height, width, 3), np.uint8)
    return np.concatenate([np.stack(found), black]) if found else black


def _length(config: InferConfig, memory: InMemory, speech: Speech) -> int:
    """Number of video frames for the recording, at most video.num_clip clips.

    For sound that is still arriving: the length of video.num_clip clips, or sys.maxsize when that is 0.
    """
    if memory.sound is not None:
        return config.video.num_clip * config.video.infer_frames or sys.maxsize
    frames = frames_of_audio(len(speech.samples), speech.sample_rate, config.video.fps)
    return min(frames, config.video.num_clip * config.video.infer_frames or frames)


def _published_length(config: InferConfig, speech: Speech) -> int:
    """Number of video frames that the published pipelines make for the recording.

    These are whole clips, sometimes one more than the sound needs, minus the three frames dropped from the first clip.
    """
    clips = clips_of(states_of(len(speech.samples)), config.video.infer_frames, config.video.fps)
    return min(clips, config.video.num_clip or clips) * config.video.infer_frames - DROPPED_FRAMES
