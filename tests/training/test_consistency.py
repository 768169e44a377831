"""Consistency distillation: starts, targets and losses of the student's steps, with velocities that can be computed by hand."""

from __future__ import annotations

import pytest
import torch
from test_distill import batch as batch
from test_distill import made, seeded
from torch.testing import assert_close

from sonic.config import SamplerConfig
from sonic.training.objectives.consistency import teacher_path
from sonic.training.objectives.distill import motion_ratio


def column(values: torch.Tensor) -> torch.Tensor:
    """[B] -> [B,1,1,1,1]"""
    return values.view(-1, 1, 1, 1, 1)


def test_a_window_lies_at_every_block_up_to_the_last_that_is_asked_for():
    objective, rng = made("consistency"), seeded()
    assert {objective.first_block(rng) for _ in range(200)} == {0, 1, 2, 3}


@pytest.mark.parametrize("name", ["consistency", "dmd"])
def test_exported_weights_say_how_many_steps_the_student_takes(name):
    assert made(name, steps=3).metadata["sample_steps"] == "3"


def test_the_motion_ratio_is_relative_to_the_truth(batch):
    truth = batch["latents"]
    assert_close(motion_ratio(0.5 * truth + 3.0, truth), torch.tensor(0.5))
    assert motion_ratio(torch.ones_like(truth), truth) == 0


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_clips_begin_where_the_student_steps_as_often_as_is_asked_for(share):
    objective = made("consistency", steps=2, teacher_steps=8, start_share=share)
    positions = objective._path_points(4000, seeded())
    assert objective.stride == 4 and set(positions.tolist()) <= set(range(8))
    found = (positions % objective.stride == 0).float().mean().item()
    assert found == pytest.approx(share + (1 - share) / 4, abs=0.05)


def test_the_teacher_takes_its_steps_and_the_student_the_rest_from_there():
    objective = made("consistency", steps=2, teacher_steps=8, leap=2)
    path, x = objective.path, torch.zeros(3, 16, 6, 4, 4)
    position, end = torch.tensor([0, 3, 5]), torch.tensor([4, 4, 8])  # from 3 the teacher has one step to go
    stop = torch.tensor([2, 4, 7])
    one = torch.ones_like(x)
    aim = objective._aim(x, position, end, student=lambda x, sigma: one * column(sigma), teacher=lambda x, sigma: 2 * one)
    expected = 2 * (path[stop] - path[position]) + (path[end] - path[stop]) * path[stop]
    assert_close(aim, one * column(expected).float())


def test_a_velocity_error_of_one_has_loss_one_at_every_level_above_the_cap(batch, monkeypatch):
    objective = made("consistency", steps=1, teacher_steps=10, leap=10)
    objective.path = torch.linspace(1, 0, 11)
    speed = {"student": 1.0, "teacher": 0.0}
    monkeypatch.setattr(objective, "velocity", lambda role, *given: lambda x, sigma: torch.full_like(x, speed[role]))
    for position, cost in ((0, 1.0), (3, 1.0), (5, 1.0), (8, 4 * 0.2**2)):
        monkeypatch.setattr(objective, "_path_points", lambda count, rng, position=position: torch.full((count,), position))
        loss, _ = next(objective.losses("student", batch, seeded()))
        assert loss.item() == pytest.approx(cost, rel=1e-4), position


@pytest.mark.parametrize(("steps", "asked"), [(1, 40), (3, 40), (4, 40), (4, 10), (4, 4)])
def test_the_number_of_teacher_steps_is_the_nearest_multiple_of_the_students(steps, asked):
    path, stride = teacher_path(SamplerConfig(schedule="linear", sample_steps=steps), asked)
    assert len(path) - 1 == steps * stride
    assert abs(steps * stride - asked) <= steps / 2
