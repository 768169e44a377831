"""What is learnt and from what, in whole numbers: the planner's only view of a training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from sonic.config import ModelConfig
from sonic.geometry import FRAMES_PER_LATENT, PIXELS_PER_LATENT
from sonic.model.counts import PACK_SCALES, Grid, block_weights, end_weights, memory_tokens
from sonic.parallel.parallel_config import PlanConfig
from sonic.planner.training_job import TaskConfig
from sonic.planner.workload import NUMBER_BYTES, workload


class Part(NamedTuple):
    """Numbers of the transformer that bear a name, in the unit that is gathered with them; `linear` = (in, out) of a linear layer."""

    name: str
    unit: str
    numbers: int
    linear: tuple[int, int] | None = None


@dataclass(frozen=True)
class Training:
    """One training at one size: `width` and `height` as the model sees its clips."""

    model: ModelConfig
    task: TaskConfig
    width: int
    height: int

    @property
    def number(self) -> int:
        """Bytes of a number in the precision that it computes in."""
        return NUMBER_BYTES[self.task.precision]

    @property
    def grid(self) -> Grid:
        """Rows and columns of patches."""
        _, rows, columns = self.model.trunk.patch_size
        return self.height // PIXELS_PER_LATENT // rows, self.width // PIXELS_PER_LATENT // columns

    @property
    def latent_frames(self) -> int:
        """Of a sample, those that are only told left out."""
        return self.task.window - self.task.past

    @property
    def blocks(self) -> int:
        """Blocks of a rollout."""
        return self.latent_frames // self.model.rollout.block_frames

    @property
    def memory(self) -> int:
        """Tokens of the reference and the past."""
        return memory_tokens(self.model, self.grid, motion=bool(self.task.past))

    @property
    def noisy(self) -> int:
        """Tokens that are denoised, of all samples that a rank works on at once."""
        return self.latent_frames * prod(self.grid)

    @property
    def clip(self) -> int:
        """Tokens of one sample that pass through the layers together when it is seen as a clip."""
        return self.noisy + self.memory

    @property
    def block(self) -> int:
        """The same of one block of its rollout."""
        return self.model.rollout.block_frames * prod(self.grid)

    @property
    def ring(self) -> int:
        """Tokens that one ring of a rollout holds."""
        return self.memory + self.model.rollout.window_blocks * self.block

    @property
    def row(self) -> int:
        """Bytes of a token, of all samples that a rank works on at once."""
        return self.task.batch_size * self.model.trunk.hidden_dim * self.number

    @property
    def frames(self) -> int:
        """Video frames that a step learns from."""
        return FRAMES_PER_LATENT * self.latent_frames * self.task.batch_size * self.task.accumulate

    @property
    def learners(self) -> int:
        """Roles that learn."""
        return 2 if self.task.objective == "dmd" else 1


def training(config: PlanConfig) -> Training:
    """The training of a planner's config. Raises ValueError for a size or a window that cannot be cut up."""
    film, task = workload(config), config.task
    found = Training(config.model, task, film.width, film.height)
    block = config.model.rollout.block_frames
    if task.objective == "dmd" and found.latent_frames % block:
        below = max(block, found.latent_frames // block * block)
        raise ValueError(f"task.window={task.window} is not whole blocks of {block} latent frames; use {below} or {below + block}")
    if task.past and not config.model.motion.buckets:
        raise ValueError(f"task.past={task.past}: model={config.model.name} has no motion memory; leave task.past at 0")
    if task.objective == "dmd" and not task.learn.rank:
        raise ValueError("task.learn.rank=0: each role would be a transformer of its own; the planner knows adapters on a shared one")
    if not learnt(found):
        raise ValueError(f"task.learn.targets={task.learn.targets} names nothing of this model; use such as audio_injectors")
    return found


def parts(config: ModelConfig) -> Iterator[Part]:
    """Everything the transformer consists of, by name, in the units that a training's sharding gathers."""
    dim, ffn = config.trunk.hidden_dim, config.trunk.ffn_dim
    ends, audio = end_weights(config), config.audio
    patch = config.trunk.latent_channels * prod(config.trunk.patch_size)
    for name in ("patch_embed", "pose_embed", "roles"):
        yield Part(name, "", ends[name])
    if config.motion.buckets:
        for name, scale in zip(("newest", "middle", "oldest"), PACK_SCALES, strict=True):
            yield Part(f"frame_pack.{name}", "frame_pack", (patch * scale**3 + 1) * dim)
    for name, inner, outer in (("expand", config.trunk.freq_dim, dim), ("out", dim, dim), ("project", dim, 6 * dim)):
        yield _linear(f"time_embed.{name}", "time_embed", inner, outer=outer)
    for name, inner in (("expand", config.text.text_dim), ("out", dim)):
        yield _linear(f"text_embed.{name}", "text_embed", inner, outer=dim)
    yield Part("audio_encoder", "", ends["audio_encoder"] - dim * dim - dim)
    yield _linear("audio_encoder.out", "", dim, outer=dim)
    for layer in range(config.trunk.num_layers):
        unit = f"blocks.{layer}"
        yield Part(unit, unit, block_weights(config)["rest"])
        for attention in ("self_attention", "text_attention"):
            yield from _attention(f"{unit}.{attention}", unit, dim)
        yield _linear(f"{unit}.mlp_in", unit, dim, outer=ffn)
        yield _linear(f"{unit}.mlp_out", unit, ffn, outer=dim)
    for index, _ in enumerate(audio.inject_layers):
        unit = f"audio_injectors.{index}"
        yield _linear(f"{unit}.modulation", unit, dim, outer=2 * dim)
        yield from _attention(f"{unit}.attention", unit, dim)
    yield Part("head", "", 2 * dim)
    yield _linear("head.project", "", dim, outer=patch)


def learnt(work: Training) -> dict[str, int]:
    """Numbers that one role learns, by the unit that holds them: its adapters, or the weights themselves."""
    learn, found = work.task.learn, {}
    for part in parts(work.model):
        words = part.name.split(".")
        if learn.targets and not any(target in words for target in learn.targets):
            continue
        adapters = learn.rank * sum(part.linear) if part.linear else 0
        size = adapters if learn.rank else part.numbers
        if size:
            found[part.unit] = found.get(part.unit, 0) + size
    return found


def _linear(name: str, unit: str, inner: int, *, outer: int) -> Part:
    return Part(name, unit, inner * outer + outer, (inner, outer))


def _attention(name: str, unit: str, dim: int) -> Iterator[Part]:
    for letter in ("q", "k", "v", "out"):
        yield _linear(f"{name}.to_{letter}", unit, dim, outer=dim)
    yield Part(f"{name}.norms", unit, 2 * dim)
