"""Any number of processes trains as one does: the same losses, and checkpoints that any other number can continue."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from ranks import on_ranks
from run_files import read_scalars
from torch.testing import assert_close
from torch.utils.data import Dataset

from sonic.config import AdapterConfig, SamplerConfig
from sonic.training.build import batch_stream, engine_of
from sonic.training.log import RunLog
from sonic.training.loop import TrainingRun, train
from sonic.training.objective_config import DmdConfig, FlowMatchConfig, WindowConfig
from sonic.training.objectives.dmd import DistributionMatching
from sonic.training.objectives.flow_match import FlowMatch
from sonic.training.train_config import BudgetConfig, CheckpointConfig, LogConfig, OptimConfig, SpeedConfig, TrainConfig
from sonic.training.world import join_world

LORA = AdapterConfig(rank=4, alpha=8.0, targets=["self_attention", "mlp_in", "mlp_out"])
WHOLE_CLIP = WindowConfig(reach="clip", levels="frame", past=2, past_noise=0.3)
GOALS = {
    "clip": (FlowMatch, FlowMatchConfig(window=WHOLE_CLIP, viseme_weight=0.0)),
    "flow_match": (FlowMatch, FlowMatchConfig()),
    "dmd": (DistributionMatching, DmdConfig(sampler=SamplerConfig(sample_steps=2), learn=LORA, critic_turns=1, window=WindowConfig())),
    "dmd apart": (DistributionMatching, DmdConfig(sampler=SamplerConfig(sample_steps=2), critic_turns=1)),  # three transformers
}


class Windows(Dataset):
    """Random windows of latents [16,6,size,size] that depend on their key alone."""

    def __init__(self, size=4):
        self.size = size

    def __len__(self):
        return 24

    def __getitem__(self, draw):
        rng = torch.Generator().manual_seed(draw[1] % 2**31)
        some = lambda *shape: torch.randn(shape, generator=rng)  # noqa: E731
        given = {"audio": some(1, 160, 24), "visemes": some(24, 5).abs(), "head": torch.zeros(24, 4)}
        text = {"text": some(2, 8)} if self.size == 8 else {}
        return {"latents": some(16, 6, self.size, self.size), "ref": some(16, 1, self.size, self.size), **given, **text}


def run_of(folder, name, *, steps, accumulate=4, every=0, **speed):
    from test_objectives import config_of

    cls, goal = GOALS[name]
    base = config_of(goal, "velocity" if name == "clip" else "clean")
    config = TrainConfig(
        name=name, model=base.model, objective=goal, budget=BudgetConfig(max_steps=steps, batch_size=1, accumulate=accumulate),
        optim=OptimConfig(lr=1e-3, warmup_steps=2), log=LogConfig(every_steps=1, bar=False), speed=SpeedConfig(**speed),
        checkpoint=CheckpointConfig(every_steps=every),
    )  # fmt: skip
    torch.manual_seed(0)
    objective = cls(config)
    with torch.no_grad():
        for network in objective.modules.values():
            for parameter in network.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    world = join_world(torch.device("cpu"), context=config.speed.context, replicas=config.speed.replicas)
    folder = Path(folder)
    log = RunLog(folder, config.log, name=name, main=world.main)
    return TrainingRun(
        config, objective, engine_of(config, world, folder), batch_stream(config, Windows(8 if name == "clip" else 4), world), log, folder
    )


def trained(folder, name, steps, speed=None):
    """Train and give the result; runs on every rank."""
    run = run_of(folder, name, steps=steps, **(speed or {}))
    train(run)
    return {key: value.clone() for key, value in run.engine.weights().items()}


def continued(folder, name, steps, speed=None):
    """The same with all trainable weights set to zero at first, so that only a checkpoint gives the right result."""
    run = run_of(folder, name, steps=steps, **(speed or {}))
    with torch.no_grad():
        for parameter in (p for module in run.objective.roles.values() for p in module.parameters() if p.requires_grad):
            parameter.zero_()
    train(run)


class Stopped(Exception):
    """Raised to interrupt a training."""


def stopped(folder, name, steps, at, speed=None):
    """The same, but interrupted before the update of step `at`, where a checkpoint was due."""
    run = run_of(folder, name, steps=steps, every=at, **(speed or {}))
    real = run.engine.step

    def pull(role, *, rate, step):
        if step == at:
            raise Stopped
        return real(role, rate=rate, step=step)

    run.engine.step = pull
    try:
        train(run)
    except Stopped:
        run.engine.checkpoints.settle()


def curve(folder):
    return torch.tensor([line["student/loss"] for line in read_scalars(Path(folder))])


@cache
def alone(name, steps):
    """The curve of one process."""
    with TemporaryDirectory() as folder:
        trained(folder, name, steps)
        return curve(folder)


@pytest.mark.parametrize("name", ["clip", "flow_match", "dmd"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_shards_on_any_number_of_ranks_train_as_one_process(name, ranks, tmp_path):
    steps = 20 if name == "flow_match" else 4
    on_ranks(ranks, trained, str(tmp_path / "many"), name, steps)
    assert_close(curve(tmp_path / "many"), alone(name, steps), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 4)])
def test_another_number_of_ranks_continues_a_run(before, after, tmp_path):
    for ranks, work, more in ((before, stopped, (3,)), (after, continued, ())):
        given = (str(tmp_path / "run"), "flow_match", 6, *more)
        on_ranks(ranks, work, *given) if ranks > 1 else work(*given)
    assert len(list((tmp_path / "run/checkpoints").glob("step_*"))) == 2
    assert_close(curve(tmp_path / "run"), alone("flow_match", 6), rtol=1e-5, atol=1e-7)


def test_layers_computed_again_give_the_same_gradients(tmp_path):
    plain, again = (trained(tmp_path / str(flag), "dmd", 2, {"recompute": flag}) for flag in (False, True))
    for name, value in plain.items():
        assert_close(again[name], value)


def test_batches_that_cannot_be_shared_are_reported(tmp_path):
    with pytest.raises(AssertionError, match="use budget.accumulate=2 or 4"):
        on_ranks(2, shared, 3)


def shared(accumulate):
    from sonic.training.build import check_accumulate

    check_accumulate(TrainConfig(budget=BudgetConfig(max_steps=1, accumulate=accumulate)), join_world(torch.device("cpu")))


def test_a_run_that_is_killed_continues_bit_for_bit(tmp_path):
    """kill -9 during training and writing, restarted until it finishes: the same losses as without a kill."""
    train_it = "t.train(t.run_of(sys.argv[1], 'flow_match', steps=30, every=2))"
    script = f"import sys; sys.path[:0] = sys.argv[3:]; import test_training_ranks as t; {train_it}"
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
    command = [sys.executable, "-c", script, str(tmp_path / "killed"), "-", *paths]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(command, env=environment)
    until = time.monotonic() + 300
    while not list((tmp_path / "killed/checkpoints").glob("step_0000001*")):
        assert first.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert len(curve(tmp_path / "killed")) < 30
    subprocess.run(command, env=environment, check=True)
    subprocess.run([*command[:3], str(tmp_path / "whole"), *command[4:]], env=environment, check=True)
    assert torch.equal(curve(tmp_path / "killed"), curve(tmp_path / "whole"))
