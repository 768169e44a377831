"""The training loop, its checkpoints and its clock, on an objective that can be computed by hand."""

from __future__ import annotations

import errno
import json
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from run_files import read_scalars
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close
from torch.utils.data import Dataset

from sonic.parallel.mesh import World
from sonic.training.build import batch_stream
from sonic.training.checkpoint import Checkpoints
from sonic.training.engine import Engine
from sonic.training.log import RunLog
from sonic.training.loop import Diverged, TrainingRun, train
from sonic.training.objectives import Objective
from sonic.training.objectives.objective import Weighted
from sonic.training.train_config import BudgetConfig, CheckpointConfig, LogConfig, OptimConfig, TrainConfig


class Numbers(Dataset):
    """Pairs (x, 3x - 1), drawn by index and seed."""

    def __len__(self):
        return 64

    def __getitem__(self, draw):
        x = torch.randn(4, generator=torch.Generator().manual_seed(draw[1] % 2**31))
        return {"x": x, "y": 3 * x - 1}


class LineObjective(Objective):
    """The student fits a line; a second role is updated in every second step only."""

    def __init__(self, poison_at=None, poison=float("nan")):
        torch.manual_seed(0)
        self.roles = {"student": nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 4)), "critic": nn.Linear(4, 1)}
        self.poison_at, self.poison, self.calls = poison_at, poison, 0

    def roles_in_step(self, step):
        return ("student", "critic") if step % 2 else ("student",)

    def losses(self, role, batch, rng):
        self.calls += 1
        x = batch["x"] + 0.05 * torch.randn(batch["x"].shape, generator=rng) + 0.01 * torch.rand(4)
        bad = self.poison if self.calls == self.poison_at else 1.0
        wrong = self.roles[role](x) - (batch["y"] if role == "student" else 1.0)
        yield bad * wrong.square().mean(), {"size": wrong.abs().mean()}

    def export(self, weights):
        return dict(weights)


def make(folder, *, steps=12, objective=None, every=4, accumulate=1, resume="auto", log_every=1):
    config = TrainConfig(
        budget=BudgetConfig(max_steps=steps, batch_size=4, accumulate=accumulate),
        optim=OptimConfig(lr=0.02, warmup_steps=2),
        checkpoint=CheckpointConfig(every_steps=every, keep=2, resume=resume),
        log=LogConfig(every_steps=log_every, bar=False),
    )
    world = World()
    stream, log = batch_stream(config, Numbers(), world), RunLog(folder, config.log, name="line")
    return TrainingRun(config, objective or LineObjective(), Engine(config, world, folder), stream, log, folder)


class Killed(Exception):
    pass


def kill_at(run, step):
    """Abort the run right before the optimizer step of `step`, without cleaning up."""
    real = run.engine.step

    def stop(role, *, rate, step: int, limit=step):
        if step == limit:
            raise Killed
        return real(role, rate=rate, step=step)

    run.engine.step = stop
    with pytest.raises(Killed):
        train(run)
    run.engine.checkpoints.settle()  # a checkpoint under way would be lost with the process; here it is finished


def curve(folder):
    return [(line["step"], line["student/loss"]) for line in read_scalars(folder)]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_killed_run_continues_bit_for_bit(tmp_path, accumulate):
    whole = make(tmp_path / "whole", accumulate=accumulate)
    train(whole)
    kill_at(make(tmp_path / "killed", accumulate=accumulate), 7)
    again = make(tmp_path / "killed", accumulate=accumulate)
    train(again)
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")
    for name, value in whole.engine.weights().items():
        assert torch.equal(value, again.engine.weights()[name])


def test_lines_after_a_restart_are_means_over_the_same_steps(tmp_path):
    train(make(tmp_path / "whole", log_every=3))
    kill_at(make(tmp_path / "killed", log_every=3), 7)
    train(make(tmp_path / "killed", log_every=3))
    whole, killed = (
        [
            {name: value for name, value in line.items() if name == "step" or name.startswith(("student/", "critic/", "train/"))}
            for line in read_scalars(folder)
        ]
        for folder in (tmp_path / "whole", tmp_path / "killed")
    )
    assert [line["step"] for line in killed] == [1, 3, 6, 9, 12] and killed == whole


class Sometimes(LineObjective):
    """Has a figure in its second and fourth batch alone."""

    def losses(self, role, batch, rng):
        for loss, _ in super().losses(role, batch, rng):
            has = float(self.calls in (2, 4))
            yield loss, {"rare": Weighted(torch.tensor(has * self.calls), torch.tensor(has))}


def test_a_figure_is_the_mean_over_the_batches_that_have_it(tmp_path):
    train(make(tmp_path / "each", objective=Sometimes(), steps=3, accumulate=2))
    assert [line.get("student/rare") for line in read_scalars(tmp_path / "each")] == [2.0, 4.0, None]
    train(make(tmp_path / "joint", objective=Sometimes(), steps=6, log_every=6))
    assert [line.get("student/rare") for line in read_scalars(tmp_path / "joint")] == [None, 3.0]


def test_a_finished_training_returns_its_figures_again(tmp_path):
    first, second = train(make(tmp_path)), train(make(tmp_path))
    assert (first.new_steps, second.new_steps) == (12, 0) and second.figures == first.figures != {}
    assert len(read_scalars(tmp_path)) == 12


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path, caplog):
    train(make(tmp_path / "whole"))
    kill_at(make(tmp_path / "run"), 10)
    newest = next((tmp_path / "run/checkpoints/step_00000008").glob("*.distcp"))
    newest.write_bytes(newest.read_bytes()[:-5] + b"xxxxx")
    train(make(tmp_path / "run"))
    assert f"{newest.name} does not match its digest" in caplog.text
    assert "damaged_step_00000008" in kept_in(tmp_path / "run")
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")


def test_a_checkpoint_of_an_older_format_is_skipped(tmp_path, caplog):
    (tmp_path / "step_00000003").mkdir()
    (tmp_path / "step_00000003/facts.json").write_text('{"step": 3, "sha256": "of one file"}')
    assert Checkpoints(tmp_path, keep=2, world=World()).load("auto", dict, lambda state: None) == {}
    assert "step_00000003 cannot be read" in caplog.text


def test_a_checkpoint_without_the_moments_of_weights_that_no_gradient_reached_is_loaded(tmp_path):
    """As earlier versions wrote it."""
    run = make(tmp_path)
    run.engine.prepare(run.objective)
    state = {name: value for name, value in run.engine._state().items() if not name.startswith("moments.critic.")}
    state["weights.critic.bias"] = torch.full((1,), 3.0)
    run.engine.checkpoints.save(1, state, {})
    run.engine.checkpoints.settle()
    assert run.engine.load()["step"] == 1 and run.objective.roles["critic"].bias.item() == 3.0
    assert not any(value.any() for name, value in run.engine._state().items() if name.startswith("moments.critic."))


def test_only_the_newest_checkpoints_stay(tmp_path):
    train(make(tmp_path, steps=11, every=2))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_00000010", "step_00000011"]


def test_partial_checkpoints_of_a_crashed_run_are_removed_by_the_next_one(tmp_path):
    (tmp_path / "checkpoints/.aside_00000003").mkdir(parents=True)
    train(make(tmp_path, steps=1, every=1))
    assert kept_in(tmp_path) == ["step_00000001"]


def kept_in(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_a_run_that_begins_again_keeps_its_own_checkpoints(tmp_path, caplog):
    train(make(tmp_path))
    train(make(tmp_path, steps=3, every=1, resume="never"))
    assert kept_in(tmp_path) == ["left_step_00000008", "left_step_00000012", "step_00000002", "step_00000003"]
    assert "goes on from step 0; 2 checkpoints beyond it" in caplog.text
    again = make(tmp_path)
    again.engine.prepare(again.objective)
    assert again.engine.load()["step"] == 3


def test_a_run_that_continues_from_a_named_checkpoint_renames_the_later_ones(tmp_path):
    whole = make(tmp_path / "whole")
    train(whole)
    train(make(tmp_path / "run"))
    (tmp_path / "run/checkpoints/left_step_00000012").mkdir()  # of an earlier run
    other = make(tmp_path / "run", resume=str(tmp_path / "run/checkpoints/step_00000008"), every=2)
    train(other)
    assert kept_in(tmp_path / "run") == ["left_step_00000012", "step_00000010", "step_00000012"]
    assert (tmp_path / "run/checkpoints/left_step_00000012/facts.json").is_file()
    for name, value in whole.engine.weights().items():
        assert torch.equal(value, other.engine.weights()[name])


def test_a_full_disk_leaves_the_old_checkpoint_and_says_so(tmp_path, monkeypatch, caplog):
    kept = Checkpoints(tmp_path, keep=2, world=World())
    kept.save(1, {"a": torch.ones(2)}, {})
    kept.settle()
    monkeypatch.setattr("sonic.training.checkpoint._flush", lambda path: (_ for _ in ()).throw(OSError("disk full")))
    kept.save(2, {"a": torch.zeros(2)}, {})
    kept.settle()
    assert "step 2 could not be written (disk full)" in caplog.text
    found = {"a": torch.zeros(2)}
    assert kept.load("auto", lambda: found, lambda state: None)["step"] == 1
    assert_close(found["a"], torch.ones(2))
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]


def test_a_full_disk_loses_checkpoints_but_does_not_end_the_run(tmp_path, monkeypatch, caplog):
    real = Path.mkdir

    def full(path, *more, **named):
        if path.name == ".aside_00000008":
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, *more, **named)

    monkeypatch.setattr(Path, "mkdir", full)
    assert train(make(tmp_path)).steps == 12
    assert kept_in(tmp_path) == ["step_00000004", "step_00000012"]
    assert "step 8 could not be written" in caplog.text and "No space left" in caplog.text


@pytest.mark.parametrize(("call", "poison"), [(1, float("nan")), (2, float("nan")), (61, 1e5), (62, 1e5)])
def test_the_kept_batch_is_the_one_with_the_bad_loss(call, poison, tmp_path):
    run = make(tmp_path, steps=40, accumulate=2, objective=LineObjective(poison_at=call, poison=poison))
    with pytest.raises(Diverged):
        train(run)
    wrong = next(islice(run.batches(0), call - 1, None))
    assert torch.equal(load_file(tmp_path / "diverged_batch.safetensors")["x"], wrong["x"])


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    with pytest.raises(Diverged, match="optim.lr"):
        train(make(tmp_path, objective=LineObjective(poison_at=9)))
    again = make(tmp_path)
    again.engine.prepare(again.objective)
    assert again.engine.load()["step"] == 4
    assert all(t.isfinite().all() for t in again.engine.weights().values())
    assert (tmp_path / "diverged_batch.safetensors").exists()


def test_a_loss_that_explodes_stops_before_it_is_kept(tmp_path):
    with pytest.raises(Diverged, match="exploded from"):
        train(make(tmp_path, steps=40, every=5, objective=LineObjective(poison_at=50, poison=1e5)))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_00000025", "step_00000030"]
    assert (tmp_path / "diverged_batch.safetensors").exists()


def test_only_the_roles_of_a_turn_are_updated(tmp_path):
    run = make(tmp_path, steps=1)
    before = {role: [p.clone() for p in module.parameters()] for role, module in run.objective.roles.items()}
    train(run)
    moved = {
        role: any(not torch.equal(a, b) for a, b in zip(before[role], module.parameters(), strict=True))
        for role, module in run.objective.roles.items()
    }
    assert moved == {"student": True, "critic": False}


def test_a_turn_of_the_critic_leaves_the_students_average_as_it_is(tmp_path):
    run = make(tmp_path)
    engine, roles, moved = run.engine, run.objective.roles, {}
    engine.prepare(run.objective)
    with torch.no_grad():
        roles["student"][0].weight.add_(1.0)  # so that its average would change
    for role in ("critic", "student"):
        before = {name: value.clone() for name, value in engine.weights().items()}
        engine.backward(role, roles[role](torch.ones(2, 4)).square().mean())
        engine.step(role, rate=0.01, step=0)
        moved[role] = any(not torch.equal(value, before[name]) for name, value in engine.weights().items())
    assert moved == {"critic": False, "student": True}


def test_a_checkpoint_that_is_due_by_the_clock_is_written_once(tmp_path, monkeypatch):
    run, saved, now = make(tmp_path, every=0), [], [0.0]
    run.config.checkpoint = CheckpointConfig(every_minutes=1.0)
    monkeypatch.setattr("sonic.training.loop.time", SimpleNamespace(monotonic=lambda: now[0]))
    step, save = run.engine.step, run.engine.save

    def slow(role, **named):
        now[0] += 10.0 * (role == "student")
        return step(role, **named)

    run.engine.step, run.engine.save = slow, lambda step, metadata: saved.append(step) or save(step, metadata)
    train(run)
    assert saved == [7, 12]  # after 70 seconds, and at the end


def test_the_logged_loss_falls(tmp_path):
    outcome = train(make(tmp_path, steps=150, every=0))
    losses = [loss for _, loss in curve(tmp_path)]
    assert sum(losses[-10:]) < 0.2 * sum(losses[:10])
    assert outcome.steps == 150 and outcome.samples == 4 * (150 + 75)


def test_a_budget_in_minutes_ends_in_time(tmp_path):
    run = make(tmp_path)
    run.config.budget = BudgetConfig(max_minutes=0.02, batch_size=4)
    outcome = train(run)
    assert 1.2 <= outcome.seconds < 5 and outcome.steps > 5


def test_a_log_line_cut_short_by_a_crash_is_dropped(tmp_path):
    log = RunLog(tmp_path, LogConfig(bar=False), name="log")
    with log.open(0):
        log.scalars(1, {"loss": 1.0})
        log.scalars(2, {"loss": 2.0})
    path = tmp_path / "scalars.jsonl"
    path.write_text(path.read_text() + '{"step": 3, "lo')
    with log.open(1):
        log.scalars(2, {"loss": 5.0})
    assert [(line["step"], line["loss"]) for line in read_scalars(tmp_path)] == [(1, 1.0), (2, 5.0)]
    assert json.loads(path.read_text().splitlines()[0])["loss"] == 1.0


@pytest.mark.parametrize("values", [{"max_steps": 0}, {"max_steps": 5, "max_minutes": 1.0}])
def test_a_budget_is_either_steps_or_minutes(values):
    with pytest.raises(ValueError, match="exactly one"):
        TrainConfig(budget=BudgetConfig(**values))


def test_a_checkpoint_of_another_model_is_reported_and_kept(tmp_path):
    train(make(tmp_path, steps=2, every=2))
    other = LineObjective()
    other.roles["student"] = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="another model or objective.*use a new name="):
        train(make(tmp_path, steps=4, objective=other))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000002"]


def test_an_incomplete_checkpoint_is_refused_with_the_missing_tensor(tmp_path):
    train(make(tmp_path, steps=2, every=2))
    other = LineObjective()
    other.roles["reader"] = nn.Linear(2, 2, bias=False)
    with pytest.raises(ValueError, match=r"it lacks weights\.reader\.weight and 0 more.*use a new name="):
        train(make(tmp_path, steps=4, objective=other))
