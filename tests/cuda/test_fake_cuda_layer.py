"""How many kernels a layer of the published models launches on a (fake) CUDA device, and what its elementwise kernels read and write."""

from __future__ import annotations

import torch
from fake_cuda import CUDA, fake_cuda_mode
from layer_kernels import FUSED, elementwise, kernels_of_a_layer

from sonic.model.cpu import Linear, linear_gelu

TOKENS = 3168 * 5120 * 2  # bytes of the tokens of a block in bfloat16


def test_fake_cuda_rotates_in_three_kernels_and_applies_gelu_in_the_product(fake_cuda):
    launches, _ = fake_cuda(kernels_of_a_layer, False)
    assert launches["_addmm_activation"] == 1 and not launches["gelu"]
    assert launches["mul"] == 2 and not launches["roll"]
    assert elementwise(launches) <= 26


def test_fake_cuda_fuses_what_lies_between_products_and_attentions(fake_cuda):
    """Into six kernels: the norm with its modulation, both rotations with the copy of the keys into the ring, the copy of the values, and
    a sum with each of the three norms or gates that follow."""
    launches, traffic = fake_cuda(kernels_of_a_layer, True)
    assert launches[FUSED] <= 6
    assert elementwise(launches) <= 9
    assert elementwise(traffic) <= 40 * TOKENS


def dtypes_under_autocast() -> list[torch.dtype]:
    """In which dtype a product with GELU is computed under autocast, with weights and inputs in float32, with gradients and without."""
    found = []
    with fake_cuda_mode(), torch.autocast("cuda", torch.bfloat16):
        layer, x = Linear(8, 8, device=CUDA), torch.empty(1, 4, 8, device=CUDA)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                found.append(linear_gelu(layer, x).dtype)
    return found


def test_fake_cuda_computes_in_the_dtype_of_autocast_with_gradients_and_without(fake_cuda):
    assert fake_cuda(dtypes_under_autocast) == [torch.bfloat16, torch.bfloat16]
