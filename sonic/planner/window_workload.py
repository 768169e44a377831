"""Describes a video that a UNet denoises in windows of frames, and counts the bytes that it needs, item by item."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sonic.config import ModelConfig, precision_of
from sonic.families import FAMILIES
from sonic.geometry import PIXELS_PER_LATENT
from sonic.model.unet_counts import WindowCall, cached_numbers, unet_end_weights, unet_operations, unet_units, unet_weights, unit_weights
from sonic.parallel.parallel_config import PlanConfig
from sonic.planner.memory import Items
from sonic.planner.workload import DTYPE_BYTES, size_for
from sonic.sampling.windows import CACHED_FRAMES

ASSUMED_SECONDS = 10.0  # length of a video whose recording is not known
GATED_MLP = 8 + 4 + 4  # copies of the tokens in the widest moment of an MLP: both halves of its hidden layer, the gate, their product
AROUND = 7  # copies around it: its input, three sums before it, the input of time, and the input and output of space
LATENT_BYTES = 16  # of a pixel of the latents: 4 channels in float32
RIFE_NUMBERS, RIFE_ELEMENTS = 2_277_600, 160  # weights; elements per pixel between two frames, where a stage sees half of the sides
DECODER_CHANNELS, DECODER_COPIES = 128, 8  # of the VAE's last level; what it holds of a frame at once
IMAGE_ENCODER = 632_076_800  # weights of CLIP's ViT-H/14
AUDIO_NUMBERS = 8_208_384 + 54_300_672 + 21_762_050  # weights of Whisper's encoder, audio2token and audio2bucket


@dataclass(frozen=True)
class WindowWorkload:
    """A video of `width` x `height` pixels, of which a model makes `frames` in windows, each with `rows` of guidance.

    `chunk` frames are decoded together, with `overlap` more on each side; `doubled`: a frame is interpolated after each.
    """

    model: ModelConfig
    width: int
    height: int
    steps: int
    rows: int
    frames: int
    chunk: int = 8
    overlap: int = 4
    doubled: bool = True
    dtype_bytes: int = 2

    @property
    def about(self) -> str:
        """The length of the job in words."""
        return f"{self.frames} frames in {self.windows} windows of {self.model.unet.window_frames}, {self.rows} rows, {self.steps} steps"

    @property
    def windows(self) -> int:
        """Number of windows in a step."""
        return -(-self.frames // (self.model.unet.window_frames - self.model.unet.window_overlap))

    @property
    def pixels(self) -> int:
        """Pixels of a frame."""
        return self.width * self.height

    @property
    def latent_pixels(self) -> int:
        """Pixels of a frame's latents."""
        return self.pixels // PIXELS_PER_LATENT**2

    @property
    def shown(self) -> int:
        """Frames of the video."""
        return self.frames * (1 + self.doubled)

    @property
    def display_s(self) -> float:
        """Seconds for which the video is displayed."""
        return 2 * self.frames / self.model.rollout.fps

    @property
    def decoded(self) -> int:
        """Most frames that are decoded together."""
        return min(self.frames, self.chunk + 2 * self.overlap)

    @property
    def call_flops(self) -> int:
        """Operations of one call of the UNet for a window."""
        sides = self.height // PIXELS_PER_LATENT, self.width // PIXELS_PER_LATENT
        return unet_operations(self.model.unet, WindowCall(*sides, self.rows, self.model.unet.window_frames))

    def calls(self, ranks: int = 1) -> int:
        """Calls of the UNet on each of the ranks that divide the windows."""
        return self.steps * -(-self.windows // ranks)


def window_workload(config: PlanConfig, seconds: float = 0.0) -> WindowWorkload:
    """The video of a planner's config for a recording of this length (0 = not known). Raises ValueError for an impossible size."""
    model, sampler, video, published = config.model, config.sampler, config.video, bool(config.video.compat)
    picture, sound = sampler.sample_guide_scale, sampler.audio_guide_scale
    frames = int((seconds or video.duration or ASSUMED_SECONDS) * model.rollout.fps) // 2
    return WindowWorkload(
        model,
        *size_for(model, video),
        steps=sampler.sample_steps,
        rows=sum(map(bool, (1 - picture, picture - sound, sound))),
        frames=max(1, frames),
        chunk=8 if published else config.decode.chunk_frames,
        overlap=0 if published else config.decode.overlap_frames,
        doubled=video.interpolate != "none",
        dtype_bytes=DTYPE_BYTES[precision_of(config.run.dtype, model)],
    )


def sublayer_bytes(work: WindowWorkload) -> Iterator[tuple[int, float]]:
    """(level, bytes) of each part of the UNet whose weights are gathered or loaded together, in the order in which a call runs them."""
    config = work.model.unet
    for unit in unet_units(config):
        for place, residual in enumerate(unit.residuals):
            yield unit.level, unit_weights(config, unit._replace(residuals=[residual], transformers=0, sampler=0)) * work.dtype_bytes
            if place < unit.transformers:
                yield unit.level, unit_weights(config, unit._replace(residuals=[], transformers=1, sampler=0)) * work.dtype_bytes
        if unit.sampler:
            alone = unit._replace(residuals=[], transformers=0)
            yield unit.level, unit_weights(config, alone) * work.dtype_bytes


def unit_bytes(work: WindowWorkload, unshard_unit: str) -> list[tuple[int, float]]:
    """(level, bytes) of each part that is gathered at a time, of the size that parallel.unshard_unit names."""
    if unshard_unit == "sublayer":
        return list(sublayer_bytes(work))
    return [(unit.level, unit_weights(work.model.unet, unit) * work.dtype_bytes) for unit in unet_units(work.model.unet)]


def unet_bytes(work: WindowWorkload) -> float:
    """Bytes of all weights of the UNet."""
    return unet_weights(work.model.unet) * work.dtype_bytes


def end_bytes(work: WindowWorkload) -> float:
    """Bytes of its weights outside the blocks."""
    return unet_end_weights(work.model.unet) * work.dtype_bytes


def call_bytes(work: WindowWorkload) -> float:
    """Bytes of the activations of a call at its fullest: in the first transformer of the last level, which has the most pixels.

    Then there are also what the way down left for this level, and the wider output of the level below. With one row of guidance the
    order of time and space is a view. Deeper levels have twice the channels at most, and a quarter of the pixels.
    """
    config = work.model.unet
    first, below = config.block_out_channels[:2]
    copies = GATED_MLP + AROUND - (work.rows == 1) + config.layers_per_block + 1
    pixel = copies * first + below + 8  # 8 channels of the network's input
    return pixel * work.rows * config.window_frames * work.latent_pixels * work.dtype_bytes


def clip_bytes(work: WindowWorkload, ranks: int = 1) -> dict[str, float]:
    """Bytes that grow with the length of the video: latents with their noise and the windows' results, tokens, and cached keys."""
    config, size = work.model.unet, work.dtype_bytes
    own = -(-work.windows // ranks) * config.window_frames
    kept = cached_numbers(config) * (work.frames + 1) if work.frames <= CACHED_FRAMES else 0
    tokens = 2 * work.frames * config.audio_tokens * config.cross_attention_dim * size  # with and without those of silence behind them
    return {"latents": (2 * work.frames + own) * work.latent_pixels * LATENT_BYTES, "audio_tokens": tokens, "audio_keys": kept * size}


def decoder_bytes(work: WindowWorkload) -> dict[str, float]:
    """Bytes of the VAE and of RIFE: weights, the copies of the last level's channels, and frames in float32."""
    copies = DECODER_COPIES * DECODER_CHANNELS * work.decoded * work.dtype_bytes
    frames = 3 * 4 * work.chunk * (2 + 2 * work.doubled)
    vae = FAMILIES[work.model.family].parameters * work.dtype_bytes
    return {"vae": vae, "rife": 4 * RIFE_NUMBERS * work.doubled, "decoding": (copies + frames) * work.pixels}


def first_bytes(work: WindowWorkload) -> Items:
    """Bytes of the encoders' weights, which are freed before the UNet is loaded; those of sound are in float32."""
    return {"image_encoder": IMAGE_ENCODER * work.dtype_bytes, "speech_encoder": AUDIO_NUMBERS * 4}
