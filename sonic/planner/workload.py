"""Describes a video or a training by its sizes: tokens, steps, bytes. The rest of the planner sees a job only through these types."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from pkgutil import resolve_name
from typing import Any, NamedTuple

from sonic.config import PHOTO_SIZE, AdapterConfig, ModelConfig, VideoConfig, parse_size, precision_of
from sonic.families import FAMILIES
from sonic.geometry import FRAMES_PER_LATENT, PIXELS_PER_LATENT, WAN_MULTIPLE, short_side_size, wan_size
from sonic.model.counts import PACK_SCALES, Grid, block_multiply_adds, block_weights, end_weights, forward_multiply_adds, memory_tokens
from sonic.parallel.parallel_config import PlanConfig
from sonic.training.objective_config import DmdConfig
from sonic.training.train_config import TrainConfig

ASSUMED_SIZE = "704x384"  # planned for video.size=photo when the photograph is not known
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Workload:
    """A video of `width` x `height` pixels: a stream of blocks (clip_frames=0), or clips of `clip_frames` frames."""

    model: ModelConfig
    width: int
    height: int
    steps: int
    guided: bool = False
    clip_frames: int = 0
    dtype_bytes: int = 2
    schedule: str = ""
    batch_size: int = 1
    motion_memory: bool = True  # whether the past is given, to a model that has a memory of it

    @property
    def about(self) -> str:
        """The size of the job in words."""
        return f"{self.tokens} tokens, {self.steps} steps"

    @property
    def grid(self) -> Grid:
        """(rows, columns) of patches in a latent frame."""
        _, rows, columns = self.model.trunk.patch_size
        return self.height // PIXELS_PER_LATENT // rows, self.width // PIXELS_PER_LATENT // columns

    @property
    def memory(self) -> int:
        """Number of tokens of reference and motion."""
        return memory_tokens(self.model, self.grid, motion=self.motion)

    @property
    def query_tokens(self) -> int:
        """Number of tokens that are denoised at once."""
        return self.latent_frames * prod(self.grid)

    @property
    def frames(self) -> int:
        """Frames of a hand-over: of a block or of a clip."""
        return self.clip_frames or FRAMES_PER_LATENT * self.model.rollout.block_frames

    @property
    def display_s(self) -> float:
        """Seconds for which a hand-over is displayed."""
        return self.frames / self.model.rollout.fps

    @property
    def latent_frames(self) -> int:
        """Latent frames of a hand-over."""
        return self.frames // FRAMES_PER_LATENT

    @property
    def motion(self) -> bool:
        """Whether the memory has motion tokens."""
        return self.motion_memory and bool(self.model.motion.buckets)

    @property
    def tokens(self) -> int:
        """Number of tokens in a forward: of a clip with its memory, of a block without."""
        return self.query_tokens + (self.memory if self.clip_frames else 0)

    @property
    def window(self) -> int:
        """Number of tokens of the video in a full KV ring; 0 for clips."""
        return 0 if self.clip_frames else self.model.rollout.window_blocks * self.query_tokens

    @property
    def passes(self) -> int:
        """Forwards per sampling step: 2 with guidance, else 1."""
        return 2 if self.guided else 1

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's activations, in all samples of a batch."""
        return self.batch_size * self.model.trunk.hidden_dim * self.dtype_bytes

    @property
    def activation_bytes(self) -> int:
        """Bytes of the activations of all tokens in a forward, in the dtype of products."""
        return self.tokens * self.token_bytes

    @property
    def stream_bytes(self) -> int:
        """Bytes of all tokens of a forward between two layers, where they are float32."""
        return self.activation_bytes * 4 // self.dtype_bytes

    @property
    def forward_flops(self) -> int:
        """Operations of a forward of one sample, with full KV rings."""
        if self.clip_frames:
            return 2 * forward_multiply_adds(self.model, self.latent_frames, self.grid, motion=self.motion)
        return 2 * block_multiply_adds(self.model, self.grid, blocks=self.model.rollout.window_blocks, motion=self.motion)

    @property
    def pixels(self) -> int:
        """Pixels of a frame."""
        return self.width * self.height

    def resized(self, width: int, height: int) -> Workload:
        """The same job at the nearest size that the model can generate."""
        width, height = wan_size(width, height, width * height)
        return replace(self, width=width, height=height)

    def with_layers(self, layers: range) -> Workload:
        """The same job for a model of these layers only; of one layer when the range is empty."""
        audio, trunk = self.model.audio, self.model.trunk
        inject = [layer - layers.start for layer in audio.inject_layers if layer in layers]
        model = replace(self.model, trunk=replace(trunk, num_layers=max(1, len(layers))), audio=replace(audio, inject_layers=inject))
        return replace(self, model=model)


@dataclass(frozen=True, kw_only=True)
class Training(Workload):
    """A training by a recipe; as a workload it is the forward of a batch of samples as clips."""

    recipe: TrainConfig

    @property
    def display_s(self) -> float:
        """Nothing is displayed."""
        return 0.0

    @property
    def block(self) -> Training:
        """The forward of one block of the student's rollout, with one KV ring."""
        return replace(self, clip_frames=0)

    @property
    def distils(self) -> bool:
        """Whether the student learns from its own rollouts (dmd), beside a critic; otherwise from clips (flow_match)."""
        return isinstance(self.recipe.objective, DmdConfig)

    @property
    def learn(self) -> AdapterConfig:
        """What is trained: adapters, or weights."""
        return self.recipe.objective.learn

    @property
    def roles(self) -> int:
        """Number of roles that are trained: the student, and under dmd the critic."""
        return 2 if self.distils else 1

    def changed(self, section: str, **fields: object) -> Training:
        """The same training with other fields in a section of its recipe, such as budget."""
        recipe = replace(self.recipe, **{section: replace(getattr(self.recipe, section), **fields)})
        return training_of(recipe, self.width, self.height)


def training_of(recipe: TrainConfig, width: int, height: int) -> Training:
    """The training by a recipe on samples of this size, of which the first latent frames may be motion memory."""
    past = recipe.objective.window.past
    return Training(
        recipe.model,
        width,
        height,
        steps=1,
        clip_frames=FRAMES_PER_LATENT * (recipe.data.window - past),
        dtype_bytes=DTYPE_BYTES[recipe.speed.precision],
        batch_size=recipe.budget.batch_size,
        motion_memory=past > 0,
        recipe=recipe,
    )


def workload(config: PlanConfig, seconds: float = 0.0) -> Any:
    """The video of a planner's config for a recording of this length (0 = not known), of the type that the model's family has.

    Raises ValueError for an impossible size.
    """
    return resolve_name(FAMILIES[config.model.family].workload)(config, seconds)


def video_workload(config: PlanConfig, seconds: float = 0.0) -> Workload:
    """The video of a transformer, which takes the same memory for each block or clip of it, whatever its length."""
    model = config.model
    return Workload(
        model,
        *size_for(model, config.video),
        steps=config.sampler.sample_steps,
        guided=config.sampler.sample_guide_scale != 1,
        clip_frames=config.video.infer_frames if model.rollout.clip_frames else 0,
        dtype_bytes=DTYPE_BYTES[precision_of(config.run.dtype, model)],
        schedule=config.sampler.schedule,
    )


def size_for(model: ModelConfig, video: VideoConfig) -> tuple[int, int]:
    """(width, height) in pixels that the model generates for these options. Raises ValueError for a size that patches do not divide."""
    width, height = parse_size(ASSUMED_SIZE if video.size == PHOTO_SIZE else video.size)
    if video.min_resolution:
        width, height = short_side_size(width, height, video.min_resolution, multiple=WAN_MULTIPLE)
    width, height = (model.resolution, model.resolution) if model.resolution else wan_size(width, height, width * height)
    _, rows, columns = (PIXELS_PER_LATENT * patch for patch in model.trunk.patch_size)
    if not FAMILIES[model.family].short_side and (width % columns or height % rows):  # a UNet has no patches
        raise ValueError(f"{width}x{height} cannot be cut into patches of {columns}x{rows} pixels; use multiples of them")
    return width, height


class WeightGroup(NamedTuple):
    """Parameters of the transformer under a name: how many, and the unit that gathers them; `linear` = (in, out) of a linear layer."""

    name: str
    unit: str
    numbers: int
    linear: tuple[int, int] | None = None


def parts(config: ModelConfig) -> Iterator[WeightGroup]:
    """All weights of the transformer by name, with the units in which a training shards them."""
    dim, ffn = config.trunk.hidden_dim, config.trunk.ffn_dim
    ends, audio = end_weights(config), config.audio
    patch = config.trunk.latent_channels * prod(config.trunk.patch_size)
    for name in ("patch_embed", "pose_embed", "roles"):
        yield WeightGroup(name, "", ends[name])
    if config.motion.buckets:
        for name, scale in zip(("newest", "middle", "oldest"), PACK_SCALES, strict=True):
            yield WeightGroup(f"frame_pack.{name}", "frame_pack", (patch * scale**3 + 1) * dim)
    for name, inner, outer in (("expand", config.trunk.freq_dim, dim), ("out", dim, dim), ("project", dim, 6 * dim)):
        yield _linear(f"time_embed.{name}", "time_embed", inner, outer=outer)
    for name, inner in (("expand", config.text.text_dim), ("out", dim)):
        yield _linear(f"text_embed.{name}", "text_embed", inner, outer=dim)
    yield WeightGroup("audio_encoder", "", ends["audio_encoder"] - dim * dim - dim)
    yield _linear("audio_encoder.out", "", dim, outer=dim)
    for layer in range(config.trunk.num_layers):
        unit = f"blocks.{layer}"
        yield WeightGroup(unit, unit, block_weights(config)["rest"])
        for attention in ("self_attention", "text_attention"):
            yield from _attention(f"{unit}.{attention}", unit, dim)
        yield _linear(f"{unit}.mlp_in", unit, dim, outer=ffn)
        yield _linear(f"{unit}.mlp_out", unit, ffn, outer=dim)
    for index, _ in enumerate(audio.inject_layers):
        unit = f"audio_injectors.{index}"
        yield _linear(f"{unit}.modulation", unit, dim, outer=2 * dim)
        yield from _attention(f"{unit}.attention", unit, dim)
    yield WeightGroup("head", "", 2 * dim)
    yield _linear("head.project", "", dim, outer=patch)


def learnt(work: Training) -> dict[str, int]:
    """Number of trainable parameters of one role in each unit: its adapters, or the weights themselves."""
    learn, found = work.learn, {}
    for part in parts(work.model):
        words = part.name.split(".")
        if learn.targets and not any(target in words for target in learn.targets):
            continue
        adapters = learn.rank * sum(part.linear) if part.linear else 0
        size = adapters if learn.rank else part.numbers
        if size:
            found[part.unit] = found.get(part.unit, 0) + size
    return found


def _linear(name: str, unit: str, inner: int, *, outer: int) -> WeightGroup:
    return WeightGroup(name, unit, inner * outer + outer, (inner, outer))


def _attention(name: str, unit: str, dim: int) -> Iterator[WeightGroup]:
    for letter in ("q", "k", "v", "out"):
        yield _linear(f"{name}.to_{letter}", unit, dim, outer=dim)
    yield WeightGroup(f"{name}.norms", unit, 2 * dim)
