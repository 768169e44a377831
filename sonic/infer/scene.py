"""What is filmed and how: the bundled picture and recording, the knobs of filming, the length of a film."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import skimage

from sonic.config import DecodeConfig, HeadConfig, SamplerConfig
from sonic.data.portrait import load_image, load_portrait
from sonic.data.speech import load_speech
from sonic.geometry import frames_of_audio
from sonic.infer.build import BUNDLED
from sonic.infer.conditions import fit_portrait, painted_size, published_picture, whole_picture
from sonic.infer.settings import InferConfig
from sonic.model.wav2vec import clips_of, states_of
from sonic.types import Portrait, Scene, Speech

LOST_FRAMES = 3  # that the published pipelines cut off the first clip, so that the video runs ahead of its sound
PORTRAITS = {"astronaut": Path(skimage.__file__).parent / "data" / "astronaut.png"}
RECORDINGS = {"sample": BUNDLED / "sample_speech.flac"}


@dataclass(frozen=True)
class Settings:
    """How a scene is filmed."""

    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    motion: HeadConfig = field(default_factory=HeadConfig)
    expand_ratio: float = 1.6
    clip_frames: int = 48
    compat: str = ""

    @classmethod
    def of(cls, config: InferConfig) -> Settings:
        """The part of the knobs that concerns filming."""
        ratio, clip_frames = config.face.expand_ratio, config.video.infer_frames
        return cls(config.sampler, config.decode, config.motion, ratio, clip_frames, config.video.compat)


def open_portrait(config: InferConfig) -> Scene:
    """A scene whose photograph is moved: its face has to be found."""
    speech = load_speech(RECORDINGS.get(config.audio, config.audio))
    portrait = load_portrait(PORTRAITS.get(config.image, config.image), config.face.box, config.face.mouth)
    return Scene(fit_portrait(portrait, config.video.size), speech, _length(config, speech), config.seed)


def open_picture(config: InferConfig) -> Scene:
    """A scene whose every pixel is painted: the whole picture counts, with or without a face in it."""
    speech = load_speech(RECORDINGS.get(config.audio, config.audio))
    pixels = load_image(PORTRAITS.get(config.image, config.image))
    fit = published_picture if config.video.compat else whole_picture
    picture = Portrait(fit(pixels, painted_size(pixels, config.video.size)))
    length = _published_length(config, speech) if config.video.compat else _length(config, speech)
    return Scene(picture, speech, length, config.seed, config.video.fps, config.prompt, config.sampler.negative_prompt)


OPENERS = {"warp": open_portrait, "wan": open_picture}  # by model.autoencoder


def open_scene(config: InferConfig) -> Scene:
    """Read and check portrait and recording. Raises ValueError in one sentence for everything that is wrong with them."""
    return OPENERS[config.model.autoencoder](config)


def _length(config: InferConfig, speech: Speech) -> int:
    """Video frames of the recording, or of the clips that are allowed."""
    frames = frames_of_audio(len(speech.samples), speech.sample_rate, config.video.fps)
    return min(frames, config.video.num_clip * config.video.infer_frames or frames)


def _published_length(config: InferConfig, speech: Speech) -> int:
    """The same as the published pipelines have it: whole clips, one more where none is needed, and the first frames lost."""
    clips = clips_of(states_of(len(speech.samples)), config.video.infer_frames, config.video.fps)
    return min(clips, config.video.num_clip or clips) * config.video.infer_frames - LOST_FRAMES
