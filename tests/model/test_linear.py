"""Linear layers: the direct oneDNN product, with or without fused GELU, equals torch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from sonic.model.cpu import Linear, linear, linear_gelu

EXACT = [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)]


@pytest.mark.parametrize(("dtype", "atol"), EXACT)
@pytest.mark.parametrize("shape", [(1, 12), (5, 12), (2, 3, 5, 12), (2, 0, 12)])
def test_the_direct_onednn_product_equals_torchs(shape, dtype, atol, rng):
    layer, x = Linear(12, 20).to(dtype), torch.randn(shape, dtype=dtype)
    with torch.no_grad():
        assert_close(layer(x), F.linear(x, layer.weight, layer.bias), atol=atol, rtol=atol)


@pytest.mark.parametrize(("dtype", "atol"), EXACT)
def test_non_contiguous_rows_are_multiplied_without_a_copy(dtype, atol, rng):
    layer, wide = Linear(12, 20).to(dtype), torch.randn(3, 24, 7, dtype=dtype)
    x = wide.transpose(1, 2)[..., ::2]
    with torch.no_grad():
        assert_close(layer(x), layer(x.contiguous()), atol=atol, rtol=atol)


@pytest.mark.parametrize(("dtype", "atol"), EXACT)
def test_gelu_inside_the_product_equals_gelu_after_it(dtype, atol, rng):
    layer, x = Linear(12, 20).to(dtype), torch.randn(2, 3, 5, 12, dtype=dtype)
    after = F.gelu(layer(x), approximate="tanh")
    with torch.no_grad():
        assert_close(linear_gelu(layer, x), after, atol=atol, rtol=atol)
        assert_close(linear_gelu(torch.nn.Sequential(layer), x), after, atol=atol, rtol=atol)


def test_gradients_come_by_torchs_own_product(rng):
    layer, x = Linear(12, 20), torch.randn(4, 12, requires_grad=True)
    given = (x, layer.weight, layer.bias)
    found, expected = (torch.autograd.grad(product(*given).square().sum(), given) for product in (linear, F.linear))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_without_onednn_torch_multiplies(rng):
    layer, x = Linear(12, 20), torch.randn(4, 12)
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
