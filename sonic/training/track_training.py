"""A turn of a training on fake tensors and fake ranks, tracked: the planner's prediction against engine and objective themselves."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from sonic.config import SamplerConfig
from sonic.geometry import FRAMES_PER_LATENT, PIXELS_PER_LATENT
from sonic.model import pointwise
from sonic.model.blocks import attend_by
from sonic.model.execution import Execution
from sonic.parallel.mesh import make_world
from sonic.parallel.parallel_config import HardwareConfig, ParallelConfig
from sonic.parallel.ulysses import sequence_parallel
from sonic.planner.extrapolate import of_all_layers
from sonic.planner.memory import GIB
from sonic.planner.training_plans import TrainingPlan
from sonic.planner.training_workload import Training
from sonic.training.fsdp_engine import ShardedEngine
from sonic.training.objective_config import DmdConfig, FlowMatchConfig, WindowConfig
from sonic.training.objectives import OBJECTIVES, Batch, Losses
from sonic.training.objectives.dmd import roll
from sonic.training.objectives.networks import CRITIC, STUDENT
from sonic.training.optim import adamw
from sonic.training.train_config import BudgetConfig, DataConfig, SpeedConfig, TrainConfig

ANSWERS = {torch.bool: True, torch.float32: 0.5, torch.float64: 0.5, torch.bfloat16: 0.5}  # to who asks for a number; others: 0
PAST_NOISE = 0.3


def track_training(work: Training, hardware: HardwareConfig, plan: TrainingPlan) -> dict[str, float] | None:
    """GiB of every rank by moment; None for a plan that keeps shards on the host, which is the device where ranks are fake."""
    if plan.parallel.cpu_offload:
        return None
    found = of_all_layers(work.model, lambda model: track(replace(work, model=model), plan.ranks, plan.parallel.context))
    return {phase: size / GIB + hardware.reserve_gib for phase, size in found.items()}


def track(work: Training, ranks: int, share: int) -> dict[str, int]:
    """The most bytes that a rank holds in each moment of a step after the first, `share` ranks to a batch, as a CUDA device computes.

    Parts of the step that repeat earlier ones are left out: further sampling steps, which go over the same ring; the gradient of
    blocks between the first and the last; the averages' update, which is in place.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        world = make_world(ParallelConfig("fsdp", context=share), "fsdp", torch.device("cpu"))
        execution = Execution(sequence_parallel(world, work.model.trunk.num_heads))
        with mode:
            config = train_config(work)
            objective = OBJECTIVES[config.objective.name](config, execution=execution)
            batch = _batch(work)
        for network in objective.modules.values():
            attend_by(network, _fused)
        engine = ShardedEngine(config, world, Path())
        engine.prepare(objective)
        with mode:
            updates = {role: Update(module, config) for role, module in engine.roles.items()}
        ledger, found = Ledger(), {}
        states = [update.optimizer for update in updates.values()]
        ledger.track_external(*objective.modules.values(), *engine.ema.averages.values(), *states, *batch.values())
        with mode, _as_on_devices(), _no_collection(), ledger:
            for phase in STEPS[config.objective.name](TrackedRun(objective, engine, batch, updates)):
                found[phase] = max(found.get(phase, 0), ledger.lap())
        return found
    finally:
        dist.destroy_process_group()


def train_config(work: Training) -> TrainConfig:
    """The recipe of a training, as far as memory goes."""
    task = work.task
    window = WindowConfig(reach="clip", past=task.past, past_noise=PAST_NOISE if task.past else 0.0, max_first_block=0)
    if task.objective == "dmd":
        sampler = SamplerConfig(sample_steps=1)
        objective = DmdConfig(sampler=sampler, teacher_guide_scale=task.teacher_guide_scale, window=window, learn=task.learn)
    else:
        objective = FlowMatchConfig(viseme_weight=0.0, window=window, learn=task.learn)
    return TrainConfig(
        model=work.model,
        objective=objective,
        data=DataConfig(window=task.window),
        budget=BudgetConfig(max_steps=1, batch_size=task.batch_size, accumulate=task.accumulate),
        speed=SpeedConfig(precision=task.precision, engine="fsdp", recompute=task.recompute),
    )


class Ledger(MemTracker):
    """Bytes of all that is alive. Modules are entered by several doors, so nothing is asked of them; a number that the program
    wants of a tensor without numbers is made up, so that it runs as it is."""

    def _pre_fw_hook(self, *_: Any) -> None:
        """Nothing is kept by module."""

    _post_fw_hook = _pre_bw_hook = _post_bw_hook = _pre_fw_hook

    def __torch_dispatch__(self, func: Any, types: tuple, *given: Any) -> Any:
        args, named = given
        if func is torch.ops.prim.device.default:  # the most frequent question by far
            return args[0].fake_device
        if func is torch.ops.aten._local_scalar_dense.default:
            return ANSWERS.get(args[0].dtype, 0)
        if func.is_view and DTensor not in types:  # nothing is new
            return func(*args, **(named or {}))
        return super().__torch_dispatch__(func, types, args, named or {})

    def lap(self) -> int:
        """The most since the last call."""
        peak = sum(each["Total"] for each in self.get_tracker_snapshot("peak").values())
        self._peak_mem_snap = self.get_tracker_snapshot()
        self._peak_mem = {device: each["Total"] for device, each in self._peak_mem_snap.items()}
        return peak


class Update:
    """A role's optimizer on this rank's shards as plain tensors: what the engine's does, without DTensor's accounts, which take
    half a minute for a thousand tensors. Its memory is that of a step after the first."""

    def __init__(self, role: nn.Module, config: TrainConfig) -> None:
        self.role = role
        self.learning = [parameter for parameter in role.parameters() if parameter.requires_grad]
        self.shards = [nn.Parameter(_shard(parameter).detach()) for parameter in self.learning]
        self.optimizer = adamw(self.shards, config.optim)
        for shard in self.shards:
            shard.grad = torch.zeros_like(shard)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def fill(self) -> None:
        """Gradients as an earlier batch of the same step leaves them."""
        for parameter in self.learning:
            parameter.grad = torch.zeros_like(parameter)

    def __call__(self) -> None:
        """Use up the gradients."""
        for parameter, shard in zip(self.learning, self.shards, strict=True):
            shard.grad = None if parameter.grad is None else _shard(parameter.grad).detach()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.role.zero_grad()


class TrackedRun(NamedTuple):
    """What takes part in a step."""

    objective: Any
    engine: ShardedEngine
    batch: Batch
    updates: Mapping[str, Update]


def _match_flow(step: TrackedRun) -> Iterator[str]:
    """A step of one role: a clip's graph, and the update."""
    step.updates[STUDENT].fill()
    losses = step.objective.losses(STUDENT, step.batch, torch.Generator())
    _descend(step.engine, STUDENT, losses)
    losses.close()
    yield "gradient"
    step.updates[STUDENT]()
    yield "update"


def _distil(step: TrackedRun) -> Iterator[str]:
    """A turn of the critic and one of the student, as DistributionMatching.losses takes them, from one rollout."""
    objective, engine, batch, updates = step
    rng, frames = torch.Generator(), batch["latents"].shape[2]
    last = frames // objective.model_config.rollout.block_frames - 1
    with engine.precision():
        start = objective._start(batch, rng)
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
    """The gradient of the next part of a loss, where there is one; the losses stay, because they say whose adapters are in force."""
    with engine.precision():
        loss, _ = next(losses)
    if loss.requires_grad:
        engine.backward(role, loss)


STEPS: dict[str, Callable[[TrackedRun], Iterator[str]]] = {"dmd": _distil, "flow_match": _match_flow}


def _batch(work: Training) -> dict[str, Tensor]:
    """What a rank works on at once."""
    task, model = work.task, work.model
    size, channels = (work.height // PIXELS_PER_LATENT, work.width // PIXELS_PER_LATENT), model.trunk.latent_channels
    empty = lambda *shape: torch.empty(task.batch_size, *shape)  # noqa: E731
    return {
        "latents": empty(channels, task.window, *size),
        "ref": empty(channels, 1, *size),
        "audio": empty(model.audio.num_audio_layers, model.audio.audio_dim, FRAMES_PER_LATENT * task.window),
        "text": empty(model.text.text_len, model.text.text_dim),
    }


def _fused(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention as devices have it; the CPU's own form for gradients in half precision lays all scores out."""
    return F.scaled_dot_product_attention(*(each.transpose(1, 2) for each in (queries, keys, values))).transpose(1, 2)


def _shard(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@contextmanager
def _no_collection() -> Iterator[None]:
    """A million small objects are not searched for cycles again and again."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextmanager
def _as_on_devices() -> Iterator[None]:
    """Autocast as on CUDA: norms compute in float32 there, and in the given precision on a CPU, whose own forms keep less."""

    def wide(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def widened(*args: Any, **named: Any) -> Tensor:
            if torch.is_autocast_enabled("cpu"):
                args = [each.float() if isinstance(each, Tensor) else each for each in args]
            return norm(*args, **named)

        return widened

    kept, slow_here = (F.layer_norm, F.rms_norm), pointwise.slow_here
    F.layer_norm, F.rms_norm = (wide(norm) for norm in kept)
    pointwise.slow_here = lambda x: slow_here(x) and not torch.is_grad_enabled()
    try:
        yield
    finally:
        F.layer_norm, F.rms_norm = kept
        pointwise.slow_here = slow_here
