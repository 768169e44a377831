"""The optimizer, its learning rate and the moving average, compared with values computed by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from sonic.training.optim import Ema, adamw, rate
from sonic.training.train_config import OptimConfig


def test_matrices_decay_and_biases_and_gains_do_not():
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Conv1d(2, 2, 3))
    with torch.no_grad():
        for weight in module.parameters():
            weight.fill_(2.0)
            weight.grad = torch.zeros_like(weight)
    adamw(module.parameters(), OptimConfig(lr=0.1, weight_decay=0.5)).step()
    for name, weight in module.named_parameters():
        assert_close(weight.detach(), torch.full_like(weight, 2.0 * (1 - 0.1 * 0.5) if weight.ndim >= 2 else 2.0), msg=name)


def test_one_kernel_for_all_parameters_steps_as_many_do():
    found = []
    for fused in (True, False):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
        optimizer = adamw(module.parameters(), OptimConfig(lr=0.1, weight_decay=0.5), fuse=lambda parameter: fused)  # noqa: B023
        for group in optimizer.param_groups:
            assert (group["fused"], group["foreach"]) == (fused, not fused)
        for _ in range(3):
            module(torch.randn(5, 3)).square().sum().backward()
            optimizer.step()
        found.append([weight.detach() for weight in module.parameters()])
    assert_close(*found)


@pytest.mark.parametrize(("step", "share"), [(0, 0.9), (10, 0.45), (100_000, 0.001)])
def test_an_average_has_a_smaller_decay_in_the_first_steps(step, share):
    module = nn.Linear(2, 2)
    average = Ema(dict(module.named_parameters()), decay=0.999)
    before = module.weight.detach().clone()
    with torch.no_grad():
        module.weight.add_(1.0)
    average.update(step)
    assert_close(average.averages["weight"], before + share)


def test_the_learning_rate_warms_up_stays_and_decays():
    config = OptimConfig(lr=2.0, warmup_steps=4, decay_from=0.5, final_lr=0.1)
    assert [rate(step, 0.0, config) for step in range(5)] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert [rate(100, progress, config) for progress in (0.5, 0.75, 1.0)] == pytest.approx([2.0, 1.1, 0.2])
