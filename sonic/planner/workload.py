"""What is to be made, in whole numbers: tokens, keys, steps, bytes of a number. The planner's only view of a job."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from sonic.config import PHOTO_SIZE, ModelConfig, parse_size, precision_of
from sonic.geometry import FRAMES_PER_LATENT, PIXELS_PER_LATENT, wan_size
from sonic.model.counts import Grid, block_multiply_adds, forward_multiply_adds, memory_tokens
from sonic.parallel.parallel_config import PlanConfig

ASSUMED_SIZE = "704x384"  # of a photograph nobody has seen yet
NUMBER_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Workload:
    """One film: `width` and `height` as the model sees it, sampling steps, and how it is made (clip_frames 0 = as a stream)."""

    model: ModelConfig
    width: int
    height: int
    steps: int
    guided: bool = False
    clip_frames: int = 0
    number: int = 2

    @property
    def grid(self) -> Grid:
        """Rows and columns of patches."""
        _, rows, columns = self.model.trunk.patch_size
        return self.height // PIXELS_PER_LATENT // rows, self.width // PIXELS_PER_LATENT // columns

    @property
    def frames(self) -> int:
        """Video frames in what is handed over at once: a block, or a clip."""
        return self.clip_frames or FRAMES_PER_LATENT * self.model.rollout.block_frames

    @property
    def shown(self) -> float:
        """Seconds that these frames are shown for."""
        return self.frames / self.model.rollout.fps

    @property
    def latent_frames(self) -> int:
        """Latent frames of the same."""
        return self.frames // FRAMES_PER_LATENT

    @property
    def motion(self) -> bool:
        """Whether the past is remembered as tokens."""
        return bool(self.model.motion.buckets)

    @property
    def memory(self) -> int:
        """Tokens of the reference and the past."""
        return memory_tokens(self.model, self.grid, motion=self.motion)

    @property
    def noisy(self) -> int:
        """Tokens that are denoised at once."""
        return self.latent_frames * prod(self.grid)

    @property
    def tokens(self) -> int:
        """Tokens that pass through the blocks together."""
        return self.noisy + (self.memory if self.clip_frames else 0)

    @property
    def window(self) -> int:
        """Tokens of the film that a ring remembers; none for clips."""
        return 0 if self.clip_frames else self.model.rollout.window_blocks * self.noisy

    @property
    def passes(self) -> int:
        """Forwards in a sampling step: guidance needs two."""
        return 2 if self.guided else 1

    @property
    def row(self) -> int:
        """Bytes of one token."""
        return self.model.trunk.hidden_dim * self.number

    @property
    def stream(self) -> int:
        """Bytes of the tokens that pass through the blocks together."""
        return self.tokens * self.row

    @property
    def forward_flops(self) -> int:
        """Operations of one forward, the ring full."""
        if self.clip_frames:
            return 2 * forward_multiply_adds(self.model, self.latent_frames, self.grid, motion=self.motion)
        return 2 * block_multiply_adds(self.model, self.grid, blocks=self.model.rollout.window_blocks, motion=self.motion)

    @property
    def pixels(self) -> int:
        """Of one frame that the autoencoder makes."""
        return self.width * self.height

    def with_layers(self, layers: range) -> Workload:
        """The same through some of the blocks only."""
        audio, trunk = self.model.audio, self.model.trunk
        inject = [layer - layers.start for layer in audio.inject_layers if layer in layers]
        model = replace(self.model, trunk=replace(trunk, num_layers=max(1, len(layers))), audio=replace(audio, inject_layers=inject))
        return replace(self, model=model)


def workload(config: PlanConfig) -> Workload:
    """The job of a planner's config. Raises ValueError for a size that cannot be cut into patches."""
    model = config.model
    width, height = _size(config)
    _, rows, columns = (PIXELS_PER_LATENT * patch for patch in model.trunk.patch_size)
    if width % columns or height % rows:
        raise ValueError(f"{width}x{height} cannot be cut into patches of {columns}x{rows} pixels; use multiples of them")
    return Workload(
        model,
        width,
        height,
        steps=config.sampler.sample_steps,
        guided=config.sampler.sample_guide_scale != 1,
        clip_frames=config.video.infer_frames if model.rollout.clip_frames else 0,
        number=NUMBER_BYTES[precision_of(config.run.dtype, model)],
    )


def _size(config: PlanConfig) -> tuple[int, int]:
    """(width, height) as the model sees the film."""
    if config.model.resolution:
        return config.model.resolution, config.model.resolution
    width, height = parse_size(ASSUMED_SIZE if config.video.size == PHOTO_SIZE else config.video.size)
    return wan_size(width, height, width * height)
