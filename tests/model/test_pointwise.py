"""The CPU's bfloat16 forms of pointwise functions equal the functions, and so do their gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sonic.model.cpu import RmsNorm, gelu


@pytest.fixture
def norm():
    torch.manual_seed(0)
    norm = RmsNorm(96, 1e-6)
    with torch.no_grad():
        norm.weight.add_(0.3 * torch.randn(96))
    return norm


def gradients(make, x, *more, way):
    x = x.clone().requires_grad_()
    y = make(x)
    return y, *torch.autograd.grad(y, (x, *more), way.to(y.dtype))


def test_rms_norm_and_its_gradients_are_torchs(norm):
    x, way = torch.randn(2, 40, 96), torch.randn(2, 40, 96)
    expected = gradients(lambda x: nn.RMSNorm.forward(norm, x), x, norm.weight, way=way)
    found = gradients(norm, x.bfloat16(), norm.weight, way=way)
    for ours, torchs in zip(found, expected, strict=True):
        assert (ours.float() - torchs).norm() < 0.01 * torchs.norm()
    assert found[0].dtype == found[1].dtype == torch.bfloat16 and found[2].dtype == torch.float32


def test_rms_norm_without_gradients_is_the_same(norm):
    x = torch.randn(2, 40, 96).bfloat16()
    with torch.no_grad():
        assert (norm(x) - norm(x.float())).abs().max() < 0.05


def test_float32_uses_torchs_own_norm(norm):
    x = torch.randn(2, 40, 96)
    assert torch.equal(norm(x), F.rms_norm(x, (96,), norm.weight, 1e-6)) and torch.equal(gelu(x), F.gelu(x, approximate="tanh"))


def test_gelu_in_bfloat16_is_as_near_to_the_tanh_form_as_rounding_allows():
    x = torch.linspace(-8, 8, 4001)
    wrong = (gelu(x.bfloat16()).float() - F.gelu(x.bfloat16().float(), approximate="tanh")).abs()
    assert wrong.max() < 0.02 and wrong[x.abs() < 1].max() < 0.003
