"""Options that several commands share, as dataclasses with their defaults and checks. Imports nothing heavy.

The options of a training run are in training/train_config.py, those of running on several devices in parallel/parallel_config.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import NamedTuple

from sonic.families import FAMILIES
from sonic.registry import closest_first as closest_first
from sonic.registry import help_of as help_of
from sonic.registry import names_in as names_in
from sonic.registry import one_of, option, require
from sonic.registry import unknown_choice as unknown_choice

SHIFT = 3.0  # the shift of the published schedules
OWN = "auto"  # the value of run.dtype for the model's own precision
PRECISIONS = ("float32", "bfloat16")
COMPILE = ("auto", "true", "false")  # values of run.compile
PHOTO_SIZE = "photo"
DURATION_POLICIES = ("follow", "strict", "trim", "pad")

# tables of variants, as MODULE.TABLE in sonic
SAMPLER_TABLE, SCHEDULE_TABLE, PREDICTION_TABLE = "sampling.samplers.SAMPLERS", "sampling.schedules.SCHEDULES", "sampling.path.PREDICTIONS"
ATTENTION_TABLE, SPEECH_ENCODER_TABLE = "model.attention.ATTENTION", "encoders.speech.SPEECH_ENCODERS"


class Ranks(NamedTuple):
    """The rank of this process and the number of processes, of all machines and of this one."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1


class OtherRank(RuntimeError):
    """This rank ended because another one failed; that rank has logged the details."""


def parse_size(size: str, option: str = "video.size") -> tuple[int, int]:
    """(width, height) of a size such as "704x384"; `*` is accepted for `x`, as in the published commands.

    Raises ValueError when it is not a size, or a side is not between 64 and 8192 pixels.
    """
    found = re.fullmatch(r"(\d+)[x*](\d+)", size.lower().replace(" ", ""))
    require(found is not None, f"{option}={size} is not a size; write WIDTHxHEIGHT such as 704x384, or {PHOTO_SIZE} for that of the photo")
    width, height = int(found[1]), int(found[2])
    fine = min(width, height) >= 64 and max(width, height) <= 8192
    require(fine, f"{option}={size} is impossible: each side must be between 64 and 8192 pixels; 704x384 is usual")
    return width, height


@dataclass
class CommandConfig:
    """Options that every command has."""

    plugins: list[str] = option([], "modules that register own samplers, objectives and so on, such as my.package (docs/extending.md)")


@dataclass
class TrunkConfig:
    """The transformer; `patch_size` counts latents along (time, height, width)."""

    hidden_dim: int = option(192, "width of a token")
    ffn_dim: int = option(768, "width inside the MLP")
    num_heads: int = option(3, "attention heads")
    num_layers: int = option(6, "transformer blocks")
    patch_size: list[int] = option([1, 3, 3], "latents in a token along time, height and width")
    latent_channels: int = option(16, "channels of a latent")
    freq_dim: int = option(256, "width of the sinusoidal embedding of the timestep")
    eps: float = option(1e-6, "epsilon of the norms")

    def __post_init__(self) -> None:
        whole = self.num_heads >= 1 and self.hidden_dim % self.num_heads == 0
        require(whole, f"model.trunk.hidden_dim={self.hidden_dim} must be a multiple of num_heads={self.num_heads}")
        require(self.num_layers >= 1, f"model.trunk.num_layers={self.num_layers}: need at least 1")
        require(len(self.patch_size) == 3, f"model.trunk.patch_size={self.patch_size}: give [time, height, width]")


@dataclass
class AudioConfig:
    """The speech features ([num_audio_layers, audio_dim] per video frame), and the blocks after which they are injected."""

    audio_dim: int = option(160, "width of a speech feature")
    num_audio_layers: int = option(1, "hidden layers of the speech encoder that are given")
    num_audio_token: int = option(4, "audio tokens per latent frame")
    inject_layers: list[int] = option([0, 2, 4], "blocks behind which audio is injected")


@dataclass
class TextConfig:
    """The prompt's embedding: rows of width `text_dim`, padded with zero rows to `text_len`."""

    text_dim: int = option(32, "width of a row of the prompt's embedding")
    text_len: int = option(4, "rows; shorter prompts are padded with zero rows")


@dataclass
class MotionConfig:
    """The motion memory (FramePack): bucket sizes in latent frames, newest first (empty = no motion memory); motion_frames = [video
    frames, latent frames] that precede a clip."""

    buckets: list[int] = option([1, 2, 16], "FramePack memory of the past: latent frames per bucket, newest first; empty = no such memory")
    add_last_motion: int = option(2, "how many of the newest buckets are given: 2 = all, 1 = without the newest, 0 = the oldest alone")
    motion_frames: list[int] = option([73, 19], "video and latent frames of the past that come before a clip")


@dataclass
class UNetConfig:
    """The UNet of a model that denoises windows of frames (Stable Video Diffusion with audio attention), under diffusers' names."""

    block_out_channels: list[int] = option([320, 640, 1280, 1280], "channels of each level; the last one has no attention")
    num_attention_heads: list[int] = option([5, 10, 20, 20], "attention heads of each level")
    layers_per_block: int = option(2, "residual blocks of each level")
    cross_attention_dim: int = option(1024, "width of the image embedding and of an audio token")
    addition_time_embed_dim: int = option(256, "width of the embedding of each added id: frame rate and two motion buckets")
    audio_tokens: int = option(32, "audio tokens of a frame")
    window_frames: int = option(25, "frames of a window, which are denoised together")
    window_overlap: int = option(0, "frames that neighbouring windows of a step share")
    window_shift: int = option(7, "frames by which the windows move from one sampling step to the next")

    def __post_init__(self) -> None:
        levels = len(self.block_out_channels)
        fits = levels >= 2 and levels == len(self.num_attention_heads)
        require(fits, f"model.unet: {levels} levels of channels need as many numbers of heads, and at least 2")
        inside = 0 <= self.window_overlap < self.window_frames
        require(inside, f"model.unet.window_overlap={self.window_overlap} must lie between 0 and window_frames={self.window_frames}")


@dataclass
class RolloutConfig:
    """How a model generates a video, at `fps`: block by block, or in whole clips of `clip_frames` video frames.

    A block has `block_frames` latent frames, and the KV cache holds `window_blocks` of them. The time id of the reference is
    `ref_position`, later `ref_distance` ahead of the block.
    """

    block_frames: int = option(3, "latent frames in a block")
    window_blocks: int = option(3, "blocks that a KV ring holds")
    ref_position: int = option(30, "time position of the reference in the first blocks")
    ref_distance: int = option(16, "least distance in time between a block and the reference")
    fps: int = option(25, "video frames per second that the model was trained at")
    clip_frames: int = option(0, "video frames of a clip with full attention; 0 = block by block")
    dtype: str = option("float32", "precision of the transformer when run.dtype=auto: float32 or bfloat16")

    def __post_init__(self) -> None:
        sizes = f"block_frames={self.block_frames} and window_blocks={self.window_blocks}"
        require(self.block_frames >= 1 and self.window_blocks >= 1, f"model.rollout: {sizes} must be at least 1")
        require(self.fps >= 1 and self.clip_frames >= 0, f"model.rollout: fps={self.fps} and clip_frames={self.clip_frames} are impossible")
        inside = 0 <= self.ref_distance <= self.ref_position
        require(inside, f"model.rollout.ref_distance={self.ref_distance} must lie between 0 and ref_position={self.ref_position}")
        one_of(self.dtype, PRECISIONS, "model.rollout.dtype")


@dataclass
class LoraConfig:
    """A low-rank adapter that is added to the transformer's weights when they are loaded."""

    path: str = option("", "safetensors file in peft's format, or the downloaded LiveAvatar folder with one; empty = none")
    alpha: float = option(0.0, "alpha that the adapter was trained with; 0 = that in the file's metadata, or 64 without one")

    def __post_init__(self) -> None:
        require(self.alpha >= 0, f"model.lora.alpha={self.alpha}: need a positive number, or 0 for that in the file's metadata")


@dataclass
class AdapterConfig:
    """What is trained of the transformer: its own weights, or low-rank adapters."""

    rank: int = option(0, "rank of the adapters; 0 = no adapters, the weights themselves are trained")
    alpha: float = option(16.0, "strength of the adapters: their output is multiplied by alpha / rank")
    targets: list[str] = option([], "parts of the names of trained modules, such as mlp_in; empty = all (adapters: all linear layers)")

    def __post_init__(self) -> None:
        require(self.rank >= 0, f"learn.rank={self.rank}: need 0 (no adapters) or more")
        require(self.alpha > 0, f"learn.alpha={self.alpha}: need a positive number")


@dataclass
class SpeechEncoderConfig:
    """The speech encoder of a model. Its number of hidden layers and their width are those in `AudioConfig`."""

    speech_encoder: str = option("logmel", "encoder of the recording (logmel = a small one of log-mel columns)", table=SPEECH_ENCODER_TABLE)
    speech_weights: str = option(
        "", "folder of the speech encoder as published (config.json, model.safetensors), for logmel a file; empty = the model's own"
    )

    def __post_init__(self) -> None:
        one_of(self.speech_encoder, names_in(SPEECH_ENCODER_TABLE), "model.speech_encoder")


@dataclass
class ModelConfig(SpeechEncoderConfig):
    """A model of the S2V family. `ModelConfig()` alone has plain defaults, for which there are no weights; conf/model has the sizes of
    models, and `AvatarPipeline.from_pretrained(NAME).config.model` has those of one."""

    name: str = option("preview", "one of the files in conf/model")
    trunk: TrunkConfig = option(TrunkConfig)
    audio: AudioConfig = option(AudioConfig)
    text: TextConfig = option(TextConfig)
    motion: MotionConfig = option(MotionConfig)
    rollout: RolloutConfig = option(RolloutConfig)
    unet: UNetConfig = option(UNetConfig)
    prediction: str = option("velocity", "quantity that the transformer predicts (clean = the latents)", table=PREDICTION_TABLE)
    family: str = option("preview", lambda: " or ".join(f"{name} ({entry.about})" for name, entry in FAMILIES.items()))
    resolution: int = option(192, "side of the face crop in pixels; 0 = the whole picture")
    weights: str = option(
        "",
        "folder of weights or checkpoint, a trained file, or a bundled model: student (of few steps) or teacher; empty = student",
    )
    lora: LoraConfig = option(LoraConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self.prediction, names_in(PREDICTION_TABLE), "model.prediction")
        one_of(self.family, list(FAMILIES), "model.family")
        tile = 8 * self.trunk.patch_size[1]
        fits = self.resolution >= 0 and self.resolution % tile == 0
        require(fits, f"model.resolution={self.resolution} must be a multiple of {tile} pixels (8 per latent, whole patches)")


@dataclass
class SamplerConfig:
    """How latents are sampled from noise."""

    name: str = option("euler", "solver", table=SAMPLER_TABLE)
    schedule: str = option("linear", "schedule of the noise levels", table=SCHEDULE_TABLE)
    sample_steps: int = option(4, "sampling steps per block; more are slower and better")
    sample_guide_scale: float = option(
        1.0, "guidance towards the audio, for sonic_svd towards the picture; 1 = off, faster; so is 0, as in published commands"
    )
    audio_guide_scale: float = option(1.0, "for sonic_svd, guidance from silence towards the audio; 1 = off, 0 = without the audio")
    sample_shift: float = option(SHIFT, "above 1, more of the steps are at high noise; the schedules live_avatar and karras contain theirs")
    negative_prompt: str = option("", "what guidance leads away from, for models that read text")

    def __post_init__(self) -> None:
        one_of(self.name, names_in(SAMPLER_TABLE), "sampler.name")
        one_of(self.schedule, names_in(SCHEDULE_TABLE), "sampler.schedule")
        self.sample_guide_scale = self.sample_guide_scale or 1.0
        steps, scale, shift = self.sample_steps, self.sample_guide_scale, self.sample_shift
        require(1 <= steps <= 1000, f"sampler.sample_steps={steps} is impossible: need 1 to 1000; 4 is usual")
        for name, value in (("sample_guide_scale", scale), ("audio_guide_scale", self.audio_guide_scale)):
            require(0 <= value <= 30, f"sampler.{name}={value} must lie between 0 and 30; 1 switches guidance off")
        require(0 < shift <= 100, f"sampler.sample_shift={shift} must be above 0 and at most 100; 1 leaves the schedule as it is")
        movable = shift == SHIFT or self.schedule not in ("live_avatar", "karras")  # which contain theirs
        require(movable, f"sampler.sample_shift={shift} is not read by schedule={self.schedule}: use {SHIFT}, or schedule=twice_shifted")


@dataclass
class VideoConfig:
    """The generated video."""

    size: str = option(PHOTO_SIZE, "photo = size of the photograph (at most the area of 3840x2160), or WIDTHxHEIGHT to fit within")
    min_resolution: int = option(0, "short side in px, even, 384 to 2160, of a video with the photograph's aspect; 0 = by video.size")
    duration: float = option(0.0, "seconds that the recording should last, within a frame; 0 = not compared")
    duration_policy: str = option(
        "follow",
        "another length: follow = warn, as long as the sound; strict = refuse; trim = cut a longer one; pad = silence after a shorter one",
    )
    infer_frames: int = option(0, "frames in a clip; 0 = the model's own: 80 for wan_s2v_14b; 48 for others, only to count clips")
    num_clip: int = option(0, "clips of infer_frames frames to make at most; 0 = until the audio ends")
    fps: int = option(0, "frames per second; only the model's own rate is possible; 0 = that rate")
    interpolate: str = option(
        "", "for sonic_svd, whose model makes 12.5 frames per second: rife = 25, none = 12.5; empty = rife for it, none for others"
    )
    compat: str = option("", "upstream = reproduce the published pipelines with their faults, to compare with them; empty = off")

    def __post_init__(self) -> None:
        if self.size != PHOTO_SIZE:
            parse_size(self.size)
        short, seconds = self.min_resolution, self.duration
        inside = short == 0 or (384 <= short <= 2160 and short % 2 == 0)
        require(inside, f"video.min_resolution={short} must be 0 (off) or an even number between 384 and 2160")
        inside = seconds == 0 or 0.2 <= seconds <= 86_400
        require(inside, f"video.duration={seconds} must be 0 (as long as the recording) or lie between 0.2 and 86400 s")
        one_of(self.duration_policy, DURATION_POLICIES, "video.duration_policy")
        one_of(self.interpolate, ("", "rife", "none"), "video.interpolate")
        one_of(self.compat, ("", "upstream"), "video.compat")
        require(self.infer_frames >= 0, f"video.infer_frames={self.infer_frames}: need 0 (the model's own) or more")
        require(self.num_clip >= 0, f"video.num_clip={self.num_clip}: need 0 (until the audio ends) or more")
        whole = f"video.duration={seconds} cannot be made with video.compat={self.compat}, whose videos are whole clips; leave one out"
        require(seconds == 0 or self.compat == "", whole)


def settled_video(video: VideoConfig, model: ModelConfig) -> tuple[VideoConfig, ModelConfig]:
    """The video options with the model's own values in place of 0 and one size; and the model, for `compat` with the published window.

    A clip with full attention must be a whole number of latent frames, a clip of the published rollout a whole number of blocks;
    otherwise infer_frames only limits the length. Raises ValueError for other lengths, or a frame rate that is not the model's.
    """
    rollout = model.rollout
    require(
        video.fps in (0, rollout.fps),
        f"video.fps={video.fps} cannot be made: this model is trained at {rollout.fps} frames per second; use {rollout.fps}",
    )
    block, whole = 4 * rollout.block_frames, bool(rollout.clip_frames)
    step = 4 if whole else block if video.compat else 1
    frames = video.infer_frames or rollout.clip_frames or 48 // block * block or block
    below = max(step, frames // step * step)
    near = f"use {below} or {below + step}" if frames > step else f"use {step} or more"
    why = "a latent frame is 4 frames" if whole else f"a block of the published rollout is {rollout.block_frames} latent frames of 4 frames"
    require(frames % step == 0, f"video.infer_frames={frames} is not a multiple of {step} ({why}); {near}")
    limit = video.num_clip * frames / rollout.fps
    within = limit == 0 or video.duration <= limit + 1 / rollout.fps
    require(within, f"video.duration={video.duration} is longer than the {limit:g} s of video.num_clip={video.num_clip}; leave one out")
    if video.compat and not whole:
        model = replace(model, rollout=replace(rollout, window_blocks=frames // block))  # the published KV cache holds one clip
    own = FAMILIES[model.family].short_side
    require(
        own or video.interpolate != "rife", f"video.interpolate=rife is not for model={model.name}: post.interpolate=2 doubles its frames"
    )
    short = video.min_resolution or (own if video.size == PHOTO_SIZE else 0)
    found = replace(video, size=PHOTO_SIZE if short else video.size, min_resolution=short, fps=rollout.fps, infer_frames=frames)
    return replace(found, interpolate=video.interpolate or ("rife" if own else "none")), model


def precision_of(asked: str, model: ModelConfig) -> str:
    """The requested precision, or the model's own for "auto"."""
    return model.rollout.dtype if asked == OWN else asked


@dataclass
class DecodeConfig:
    """When latents are decoded to pixels."""

    online: bool = option(True, "decode on another thread while later blocks are denoised")
    queue: int = option(2, "blocks that may wait between denoising and decoding; for sonic_svd, decoded pieces that may wait to be written")
    chunk_frames: int = option(8, "for sonic_svd, frames decoded together (8 with video.compat); fewer need less memory and more time")
    overlap_frames: int = option(4, "for sonic_svd, frames decoded with a chunk on each side and thrown away (0 with video.compat)")

    def __post_init__(self) -> None:
        require(1 <= self.queue <= 1024, f"decode.queue={self.queue}: need 1 to 1024 blocks")
        require(1 <= self.chunk_frames <= 1024, f"decode.chunk_frames={self.chunk_frames}: need 1 to 1024 frames; 8 is usual")
        require(0 <= self.overlap_frames <= 32, f"decode.overlap_frames={self.overlap_frames}: need 0 to 32 frames; 4 is usual")


@dataclass
class FaceLocationConfig:
    """The position of the face in the photograph, instead of detecting it."""

    box: list[float] | None = option(None, "the face as [x,y,width,height] in photo pixels; empty = it is detected")
    mouth: list[float] | None = option(None, "the mouth as [x,y,half_width] or [x,y,half_width,angle]; empty = it is detected")

    def __post_init__(self) -> None:
        box, mouth = self.box, self.mouth
        fine = box is None or (len(box) == 4 and min(box[2:]) > 0)
        require(fine, f"face.box={box} is not a rectangle; give [x,y,width,height] in photo pixels")
        fine = mouth is None or (len(mouth) in (3, 4) and mouth[2] > 0)
        require(fine, f"face.mouth={mouth} is not a mouth; give [x,y,half_width] or [x,y,half_width,angle]")


@dataclass
class FaceConfig(FaceLocationConfig):
    """The position of the face, the size of the crop around it, and the areas of several speakers."""

    expand_ratio: float = option(0.3, "margin around the face box on every side of the crop that the model works on, in its size")
    masks: list[str] | None = option(None, "pictures, white where a speaker is: one for each recording of audio=a.wav+b.wav, in that order")
    missing: str = option("refuse", "without a face: refuse the picture, or whole = the audio moves all of it (sonic_svd only)")

    def __post_init__(self) -> None:
        super().__post_init__()
        ratio = self.expand_ratio
        same = f"; a crop of {ratio:g} sides of the box is face.expand_ratio={(ratio - 1) / 2:g}" if 1 < ratio <= 3 else ""
        sentence = f"face.expand_ratio={ratio} must lie between 0 and 1: it is the margin around the face box on every side, in its size"
        require(0 <= ratio <= 1, sentence + same)
        one_of(self.missing, ("refuse", "whole"), "face.missing")


@dataclass
class RunConfig:
    """The name and folder of the run, and how it uses the machine."""

    name: str = option("", "name of the folder runs/<name>; empty = the current time")
    folder: str = option("runs", "folder in which run folders are made")
    device: str = option("auto", "auto, cpu or cuda; auto = cuda when there is one")
    dtype: str = option(OWN, "precision of the transformer: float32, bfloat16, or auto = the model's own, bfloat16 for the 14B models")
    attention: str = option(
        "sdpa",
        "attention kernel: sdpa is torch's own (cuDNN's on Hopper); xformers, since torch 2.10 torch's own flash attention, is as fast on "
        "Ampere and Ada and slower on Hopper; flash3 is for Hopper; sage rounds to 8 bits; flex is torch's flex_attention",
        table=ATTENTION_TABLE,
    )
    compile: str = option(
        "auto", "fuse operations of the transformer (torch.compile): true, false, or auto = on CUDA, from the 2nd video or above 60 s"
    )
    threads: int = option(0, "CPU threads; 0 = torch's default")

    def __post_init__(self) -> None:
        plain = "/" not in self.name and "\\" not in self.name and self.name not in (".", "..")
        require(plain, f"run.name={self.name} must be a plain name; run.folder says where run folders are made")
        self.compile = str(self.compile).lower()
        one_of(self.compile, COMPILE, "run.compile")
        one_of(self.dtype, (OWN, *PRECISIONS), "run.dtype")
        one_of(self.attention, names_in(ATTENTION_TABLE), "run.attention")
        one_of(self.device.split(":")[0], ("auto", "cpu", "cuda"), "run.device")
        require(0 <= self.threads <= 4096, f"run.threads={self.threads}: need 0 (torch's own choice) to 4096")
