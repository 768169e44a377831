"""What is filmed and how: the bundled picture and recording, the knobs of filming, the length of a film."""

from __future__ import annotations

import logging
from dataclasses import astuple, dataclass, field, replace
from itertools import islice
from pathlib import Path

import numpy as np
import skimage

from sonic.config import DecodeConfig, FaceConfig, HeadConfig, SamplerConfig
from sonic.data.audio import load_speech
from sonic.data.image import covering, load_image, load_portrait
from sonic.data.video import frames_at
from sonic.encoders.wav2vec import clips_of, states_of
from sonic.geometry import frames_of_audio
from sonic.inference.components import BUNDLED
from sonic.inference.conditions import fit_portrait, painted_size, published_picture, whole_picture
from sonic.inference.infer_config import InferConfig
from sonic.system.paths import check_input, file_key
from sonic.types import Portrait, Scene, Speech

log = logging.getLogger("sonic.inference")

LOST_FRAMES = 3  # that the published pipelines cut off the first clip, so that the video runs ahead of its sound
WHITE = 127  # of a mask, above which it counts
PORTRAITS = {"astronaut": Path(skimage.__file__).parent / "data" / "astronaut.png"}
RECORDINGS = {"sample": BUNDLED / "sample_speech.flac"}
BUNDLED_INPUTS = {"image": PORTRAITS, "audio": RECORDINGS}  # by the option that may name one of them


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
    knobs = (("motion.pose", config.motion.pose), ("face.masks", config.face.masks), ("video.compat", config.video.compat))
    for knob, value in knobs:
        if value:
            raise ValueError(f"{knob}={value}: model={config.model.name} moves one face and follows no video; use a published model")
    speech = load_speech(RECORDINGS.get(config.audio, config.audio))
    portrait = load_portrait(PORTRAITS.get(config.image, config.image), config.face.box, config.face.mouth)
    places = (",".join(f"{value:.10g}" for value in astuple(place)) for place in (portrait.face, portrait.mouth))
    log.info("face_box=[%s] face.mouth=[%s]", *places)
    return Scene(fit_portrait(portrait, config.video.size), speech, _length(config, speech), config.seed)


def open_picture(config: InferConfig) -> Scene:
    """A scene whose every pixel is painted: the whole picture counts, with or without a face in it."""
    _refuse_places(config)
    voices = tuple(load_speech(name) for name in config.audio.split("+")) if config.face.masks else ()
    speech = _together(voices) if voices else load_speech(RECORDINGS.get(config.audio, config.audio))
    pixels = load_image(PORTRAITS.get(config.image, config.image))
    fit, area = published_picture if config.video.compat else whole_picture, painted_size(pixels, config.video.size)
    picture = Portrait(fit(pixels, area))
    length = _published_length(config, speech) if config.video.compat else _length(config, speech)
    told = Scene(picture, speech, length, config.seed, config.video.fps, config.prompt, config.sampler.negative_prompt)
    masks = None
    if voices:
        masks = np.stack([fit(_mask(name, pixels.shape), area)[..., 0] > WHITE for name in _one_each(config.face.masks, voices)])
    return replace(told, voices=voices, masks=masks, pose=_poses(config.motion.pose, told) if config.motion.pose else None)


OPENERS = {"warp": open_portrait, "wan": open_picture}  # by model.autoencoder


def open_scene(config: InferConfig) -> Scene:
    """Read and check portrait and recording. Raises ValueError in one sentence for everything that is wrong with them."""
    for option, name in inputs_of(config):
        check_input(name, option)
    return OPENERS[config.model.autoencoder](config)


def inputs_of(config: InferConfig) -> list[tuple[str, str]]:
    """Every file that a film is made from, with the option that names it; what comes with the program is not among them."""
    audio = config.audio.split("+") if config.face.masks else [config.audio]
    named = [("image", config.image), *(("audio", name) for name in audio), *(("face.masks", name) for name in config.face.masks or ())]
    named += [("motion.pose", config.motion.pose), ("requests", config.requests)]
    return [(option, name) for option, name in named if name and name not in BUNDLED_INPUTS.get(option, ())]


def refuse_overwriting(config: InferConfig, *written: Path) -> None:
    """Raise ValueError when one of the files that will be written is an input, however the two are spelt."""
    read = {file_key(name): f"{option}={name}" for option, name in reversed(inputs_of(config))}
    for path in written:
        if (named := read.get(file_key(path))) is not None:
            raise ValueError(f"output={path} is the file {named} that the film is made from; choose another output")


def _refuse_places(config: InferConfig) -> None:
    """Raise ValueError for the knobs of a model that moves one face; here they would change nothing."""
    usual = {"face": FaceConfig(), "motion": HeadConfig()}
    for group, name in (("face", "box"), ("face", "mouth"), ("face", "expand_ratio"), ("motion", "head"), ("motion", "strength")):
        value = getattr(getattr(config, group), name)
        if value != getattr(usual[group], name):
            why = f"model={config.model.name} paints the whole picture and looks for no face in it"
            raise ValueError(f"{group}.{name}={value}: {why}; leave it out, or use model=preview")


def _together(voices: tuple[Speech, ...]) -> Speech:
    """All recordings at once, as long as the longest."""
    mixed = np.zeros(max(len(voice.samples) for voice in voices), np.float32)
    for voice in voices:
        mixed[: len(voice.samples)] += voice.samples
    return Speech(np.clip(mixed, -1, 1), voices[0].sample_rate)


def _one_each(masks: list[str], voices: tuple[Speech, ...]) -> list[str]:
    if len(masks) != len(voices):
        raise ValueError(f"face.masks names {len(masks)} pictures for {len(voices)} recordings; give one for each of audio=a.wav+b.wav")
    return masks


def _mask(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A mask as a picture. Raises ValueError unless it has the size of the portrait."""
    pixels = load_image(name, "face.masks")
    if pixels.shape != shape:
        sizes = f"{pixels.shape[1]}x{pixels.shape[0]} pixels, the portrait {shape[1]}x{shape[0]}"
        raise ValueError(f"face.masks={name} has {sizes}; draw it over the portrait")
    return pixels


def _poses(path: str, scene: Scene) -> np.ndarray:
    """The video of poses in the size and at the rate of the film; black after its end."""
    height, width = scene.portrait.pixels.shape[:2]
    found = [covering(frame, width, height) for frame in islice(frames_at(path, scene.fps), scene.num_frames)]
    black = np.zeros((scene.num_frames - len(found), height, width, 3), np.uint8)
    return np.concatenate([np.stack(found), black]) if found else black


def _length(config: InferConfig, speech: Speech) -> int:
    """Video frames of the recording, or of the clips that are allowed."""
    frames = frames_of_audio(len(speech.samples), speech.sample_rate, config.video.fps)
    return min(frames, config.video.num_clip * config.video.infer_frames or frames)


def _published_length(config: InferConfig, speech: Speech) -> int:
    """The same as the published pipelines have it: whole clips, one more where none is needed, and the first frames lost."""
    clips = clips_of(states_of(len(speech.samples)), config.video.infer_frames, config.video.fps)
    return min(clips, config.video.num_clip or clips) * config.video.infer_frames - LOST_FRAMES
