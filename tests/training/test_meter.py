"""What a line of the log says: windows since the line before, by role."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from run_files import read_scalars
from torch import nn
from torch.testing import assert_close

from sonic.parallel.mesh import World
from sonic.training import meter as meters
from sonic.training.engine import Engine
from sonic.training.log import RunLog
from sonic.training.loop import TrainingRun, train
from sonic.training.meter import Meter
from sonic.training.objectives.dmd import compare_scores
from sonic.training.objectives.objective import Objective, Weighted
from sonic.training.objectives.transformer import by_noise_level
from sonic.training.train_config import BudgetConfig, CheckpointConfig, LogConfig, TrainConfig


class TwoRoles(Objective):
    """The critic learns twice a step; the loss of a step is its number, and the student has figures of some of its samples."""

    def __init__(self):
        self.roles = {role: nn.Linear(1, 1) for role in ("student", "critic")}

    def roles_in_step(self, step):
        return ("critic", "critic", "student")

    def losses(self, role, batch, rng):
        number = batch["number"]
        some = {"low": Weighted(number * (number % 2), number % 2), "never": Weighted(torch.zeros(()), torch.zeros(()))}
        zero = 0.0 * self.roles[role](torch.zeros(1, 1)).sum()
        yield number + zero, {**(some if role == "student" else {}), "teacher/score_rms": 2 * number}


def trained(folder, *, steps=4, every=2, **log):
    config = TrainConfig(
        budget=BudgetConfig(max_steps=steps, batch_size=4),
        checkpoint=CheckpointConfig(every_steps=1),
        log=LogConfig(every_steps=every, bar=False, **log),
    )
    world = World()
    batches = lambda start: ({"number": torch.tensor(float(number // 3))} for number in range(start, 1000))  # noqa: E731
    run_log = RunLog(folder, config.log, name="two")
    return train(TrainingRun(config, TwoRoles(), Engine(config, world, folder), batches, run_log, folder))


def test_curves_are_named_by_role_and_are_means_of_their_samples_since_the_last_line(tmp_path):
    trained(tmp_path)
    _, first, second = read_scalars(tmp_path)
    assert (first["student/loss"], second["student/loss"]) == (1.0, 2.5) and second["critic/loss"] == 2.5
    assert (first["student/low"], second["student/low"]) == (1.0, 3.0)  # of steps 1 and 3 alone
    assert "student/never" not in second and second["teacher/score_rms"] == 5.0
    assert {"student/grad_norm", "critic/grad_norm", "train/lr"} < second.keys()
    assert not any(name.startswith(("train/student", "train/critic")) for name in second)


def test_a_run_whose_checkpoint_has_curves_of_other_names_goes_on(tmp_path, monkeypatch):
    trained(tmp_path, steps=3)
    saved = Engine.load
    old = {"meter": {"train/student_loss": [4.0, 1]}, "figures": {"train/student_loss": 4.0}}
    monkeypatch.setattr(Engine, "load", lambda engine: saved(engine) | old)
    trained(tmp_path, steps=4)
    assert [line["step"] for line in read_scalars(tmp_path)] == [1, 2, 3, 4]
    assert read_scalars(tmp_path)[-1]["student/loss"] == 3.0


def test_seconds_and_samples_are_those_of_the_window_and_of_each_role(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(meters, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def passes(seconds):
        now[0] += seconds

    def drawn():
        while True:
            passes(1.0)
            yield {}

    meter = Meter({}, samples=8, device=torch.device("cpu"))
    stream = meter.batches(drawn())
    for window, slow in enumerate((1.0, 5.0)):
        for _ in range(2):
            for role, seconds in (("critic", 1.0), ("critic", 1.0), ("student", slow)):
                with meter.update(role):
                    next(stream)
                    passes(seconds)
                    meter.add({f"{role}/loss": (1.0, 1.0)})
            meter.steps += 1
        line = meter.line()
        expected = {"perf/seconds_per_step": 5.0 + slow, "perf/samples_per_second": 24 / (5.0 + slow), "perf/data_seconds_per_step": 3.0}
        expected |= {"perf/seconds_per_update_critic": 2.0, "perf/samples_per_second_critic": 4.0}
        expected |= {"perf/seconds_per_update_student": 1.0 + slow, "perf/samples_per_second_student": 8 / (1.0 + slow)}
        assert {name: line[name] for name in expected} == pytest.approx(expected), window
        assert line["perf/peak_gib"] > 0.05 and line.get("perf/allocated_gib", 1.0) > 0.05
        passes(100.0)  # a sample video
        meter.restart()


def test_losses_are_parted_by_noise_level_and_one_without_samples_has_no_weight():
    sigma, losses = torch.tensor([0.1, 0.25, 0.3, 1.0]), torch.tensor([1.0, 3.0, 5.0, float("nan")])
    found = {name: (float(total), float(weight)) for name, (total, weight) in by_noise_level(losses, sigma).items()}
    assert found["loss_sigma_0.00_0.25"] == (4.0, 2.0) and found["loss_sigma_0.25_0.50"] == (5.0, 1.0)
    assert found["loss_sigma_0.50_0.75"] == (0.0, 0.0) and found["loss_sigma_0.75_1.00"][1] == 1.0
    by_frame = by_noise_level(torch.ones(2, 3), torch.tensor([0.1, 0.9]))
    assert by_frame["loss_sigma_0.75_1.00"].weight == 3
    assert by_noise_level(torch.ones(1, 2), torch.tensor([[0.1, 0.9]]))["loss_sigma_0.75_1.00"].weight == 1


def test_scores_of_critic_and_teacher_are_compared():
    real = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    found = compare_scores(2 * real, real)
    assert_close(found["score_cosine"], torch.tensor(1.0))
    assert_close(found["critic/score_rms"], 2 * found["teacher/score_rms"])
    assert_close(found["score_difference_rms"], found["teacher/score_rms"])
    assert_close(compare_scores(-real, real)["score_cosine"], torch.tensor(-1.0))
