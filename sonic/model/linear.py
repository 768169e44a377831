"""Linear layers of the DiT: without gradients on a CPU straight through oneDNN, which adds bias and GELU while it multiplies."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sonic.model.pointwise import gelu, slow_here


class Linear(nn.Linear):
    """torch's, but it can be asked for the GELU of its output as well."""

    def forward(self, x: Tensor, *, gelu: bool = False) -> Tensor:
        """[...,D] -> [...,D']"""
        return linear(x, self.weight, self.bias, then_gelu=gelu)


def linear_gelu(layer: nn.Module, x: Tensor) -> Tensor:
    """GELU after a linear layer, in one call where the layer can.  [...,D] -> [...,D']"""
    return layer(x, gelu=True) if isinstance(layer, Linear) else gelu(layer(x))


def linear(x: Tensor, weight: Tensor, bias: Tensor, *, then_gelu: bool = False) -> Tensor:
    """x · weightᵀ + bias, and the GELU of it in the form that `pointwise.gelu` takes for this dtype.  [...,D] -> [...,D']

    torch multiplies float32 by MKL, which knows fewer instructions of other makers' processors than oneDNN does, and writes
    the bias of bfloat16 down before it multiplies.
    """
    straight = x.device.type == "cpu" and x.dtype == weight.dtype and x.dtype in _multiplied() and torch.backends.mkldnn.enabled
    if torch.is_grad_enabled() or not straight or not x.numel():
        found = F.linear(x, weight, bias)
        return gelu(found) if then_gelu else found
    form = "none" if slow_here(x) else "tanh"
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, *(("gelu", [], form) if then_gelu else ("none", [], "")))


@cache
def _multiplied() -> frozenset[torch.dtype]:
    """Dtypes that this processor's oneDNN multiplies; none where torch was built without it."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return frozenset()
    narrow = [torch.bfloat16] if torch.ops.mkldnn._is_mkldnn_bf16_supported() else []
    return frozenset([torch.float32, *narrow])
