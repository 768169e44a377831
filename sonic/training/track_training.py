"""Measures the memory of a training step by running the real engine and objective on fake tensors and fake ranks."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sonic.geometry import FRAMES_PER_LATENT, PIXELS_PER_LATENT
from sonic.model.execution import Execution
from sonic.parallel.parallel_config import ParallelConfig
from sonic.parallel.ulysses import sequence_parallel
from sonic.planner.extrapolate import of_all_layers
from sonic.planner.fake_gpu import FakeGpuGenerator, FakeGpuMode, fake_gpu
from sonic.planner.ledger import Ledger
from sonic.planner.memory import GIB
from sonic.planner.plans import Plan
from sonic.planner.search import Tracked
from sonic.planner.track import fake_world
from sonic.planner.workload import Training
from sonic.training.fsdp_engine import ShardedEngine
from sonic.training.objective_config import DmdConfig, FlowMatchConfig
from sonic.training.objectives import OBJECTIVES, Batch, Losses
from sonic.training.objectives.dmd import roll
from sonic.training.objectives.networks import CRITIC, STUDENT
from sonic.training.optim import adamw
from sonic.training.plan_training import PlanTrainingConfig, training
from sonic.training.train_config import TrainConfig


def track_training(config: PlanTrainingConfig, plan: Plan) -> Tracked:
    """The memory of a plan of a training."""
    config = replace(config, speed=replace(config.speed, cpu_offload=plan.parallel.cpu_offload))
    found = of_all_layers(config.model, lambda model: _peaks(replace(config, model=model), plan))
    return Tracked([{phase: size / GIB + config.hardware.reserve_gib for phase, size in found.items()}] * len(plan.ranks))


def _peaks(config: PlanTrainingConfig, plan: Plan) -> dict[str, int]:
    """Peak bytes of a rank in each phase of any step after the first.

    Repeated parts of the step are left out: further sampling steps, which reuse the same ring; the backward pass of blocks between
    the first and the last; the in-place update of the averages.
    """
    with fake_world(plan.parallel, len(plan.ranks)) as world:
        mode, tracked = FakeGpuMode(allow_non_fake_inputs=True), tracked_config(config, plan.parallel)
        execution = Execution(sequence_parallel(world, config.model.trunk.num_heads))
        with fake_gpu(), mode:
            objective = OBJECTIVES[tracked.objective.name](tracked, execution=execution)
            batch, engine = _batch(training(config)), ShardedEngine(tracked, world, Path())
            engine.prepare(objective)
            updates = {role: Update(module, tracked) for role, module in engine.roles.items()}
        ledger, found = Ledger(), {}
        states = [update.optimizer for update in updates.values()]
        ledger.track_external(*objective.modules.values(), *engine.ema.averages.values(), *states, *batch.values())
        step = _distil if isinstance(tracked.objective, DmdConfig) else _match_flow
        with fake_gpu(), mode, _no_collection(), ledger:
            for phase in step(TrackedRun(objective, engine, batch, updates)):
                found[phase] = max(found.get(phase, 0), ledger.lap())
        return found


def tracked_config(config: PlanTrainingConfig, parallel: ParallelConfig) -> TrainConfig:
    """The config that is run for tracking: FSDP, one sampling step, and no viseme head, which is small."""
    goal = config.objective
    if isinstance(goal, DmdConfig):
        goal = replace(goal, sampler=replace(goal.sampler, schedule="linear", sample_steps=1))
    elif isinstance(goal, FlowMatchConfig):
        goal = replace(goal, viseme_weight=0.0)
    return replace(config, objective=goal, speed=replace(config.speed, engine="fsdp", reshard=parallel.reshard))


class Update:
    """A role's optimizer on this rank's shards as plain tensors: the same as the engine's without the overhead of DTensor (half a
    minute per thousand tensors). Its moments are allocated, as after the first step."""

    def __init__(self, role: nn.Module, config: TrainConfig) -> None:
        self.role = role
        self.learning = [parameter for parameter in role.parameters() if parameter.requires_grad]
        self.shards = [nn.Parameter(_shard(parameter).detach()) for parameter in self.learning]
        self.optimizer = adamw(self.shards, config.optim, fuse=lambda shard: True)
        for shard in self.shards:
            shard.grad = torch.zeros_like(shard)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def fill(self) -> None:
        """Allocate gradients, as an earlier batch of the same step leaves them."""
        for parameter in self.learning:
            parameter.grad = torch.zeros_like(parameter)

    def __call__(self) -> None:
        """Take the optimizer step and free the gradients."""
        for parameter, shard in zip(self.learning, self.shards, strict=True):
            shard.grad = None if parameter.grad is None else _shard(parameter.grad).detach()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.role.zero_grad()


class TrackedRun(NamedTuple):
    """The parts of a tracked training step."""

    objective: Any
    engine: ShardedEngine
    batch: Batch
    updates: Mapping[str, Update]


def _match_flow(step: TrackedRun) -> Iterator[str]:
    """A flow-matching step: forward and backward of a clip, and the update."""
    step.updates[STUDENT].fill()
    losses = step.objective.losses(STUDENT, step.batch, FakeGpuGenerator())
    _descend(step.engine, STUDENT, losses)
    losses.close()
    yield "gradient"
    step.updates[STUDENT]()
    yield "update"


def _distil(step: TrackedRun) -> Iterator[str]:
    """A DMD step: one update of the critic and one of the student, as in DistributionMatching.losses, from one rollout."""
    objective, engine, batch, updates = step
    rng, frames = FakeGpuGenerator(), batch["latents"].shape[2]
    last = frames // objective.model_config.rollout.block_frames - 1
    with engine.precision():
        start = objective._start(batch, rng, torch.Generator())
        with objective.networks.use_role(STUDENT) as model, torch.no_grad():
            rolled = roll(model, start, objective.sigmas, execution=objective.execution)
    yield "rollout"
    updates[CRITIC].fill()
    critic = objective._critic(start, rolled, step=0, batch=batch, rng=rng)
    _descend(engine, CRITIC, critic)
    critic.close()
    yield "critic"
    updates[CRITIC]()
    yield "update"
    updates[STUDENT].fill()
    replay = objective._student(start, rolled, step=0, batch=batch, rng=rng)
    for block in range(last + 1):
        with torch.set_grad_enabled(block in (0, last)):
            _descend(engine, STUDENT, replay)
    replay.close()
    yield "student"
    updates[STUDENT]()
    yield "update"


def _descend(engine: ShardedEngine, role: str, losses: Losses) -> None:
    """Backpropagate the next part of a loss, if there is one. `losses` stays open, because it holds the role's adapters active."""
    with engine.precision():
        loss, _ = next(losses)
    if loss.requires_grad:
        engine.backward(role, loss)


def _batch(work: Training) -> dict[str, Tensor]:
    """A batch of one rank, without values."""
    recipe, model = work.recipe, work.model
    size, channels = (work.height // PIXELS_PER_LATENT, work.width // PIXELS_PER_LATENT), model.trunk.latent_channels
    empty = lambda *shape: torch.empty(recipe.budget.batch_size, *shape)  # noqa: E731
    return {
        "latents": empty(channels, recipe.data.window, *size),
        "ref": empty(channels, 1, *size),
        "audio": empty(model.audio.num_audio_layers, model.audio.audio_dim, FRAMES_PER_LATENT * recipe.data.window),
        "text": empty(model.text.text_len, model.text.text_dim),
    }


def _shard(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@contextmanager
def _no_collection() -> Iterator[None]:
    """Context without garbage collection, which would scan a million small objects repeatedly."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
