"""Linear layers of the DiT. On a CPU and without gradients they call oneDNN directly, which fuses bias and GELU into the product."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sonic.model.pointwise import gelu, slow_here


class Linear(nn.Linear):
    """torch's linear layer, with an optional GELU of its output."""

    def forward(self, x: Tensor, *, gelu: bool = False) -> Tensor:
        """[...,D] -> [...,D']"""
        return linear(x, self.weight, self.bias, then_gelu=gelu)


def linear_gelu(layer: nn.Module, x: Tensor) -> Tensor:
    """GELU after a linear layer, fused into one call where the layer supports it.  [...,D] -> [...,D']"""
    return layer(x, gelu=True) if isinstance(layer, Linear) else gelu(layer(x))


def linear(x: Tensor, weight: Tensor, bias: Tensor, *, then_gelu: bool = False) -> Tensor:
    """x · weightᵀ + bias, then optionally GELU in the form that `pointwise.gelu` uses for this dtype.  [...,D] -> [...,D']

    oneDNN is faster than what torch calls: for float32 that is MKL, which uses fewer instructions of processors by other makers than
    Intel; for bfloat16 torch writes the bias to memory before the product.
    """
    use_onednn = x.device.type == "cpu" and x.dtype == weight.dtype and x.dtype in _onednn_dtypes() and torch.backends.mkldnn.enabled
    if torch.is_grad_enabled() or not use_onednn or not x.numel():
        out = F.linear(x, weight, bias)
        return gelu(out) if then_gelu else out
    form = "none" if slow_here(x) else "tanh"
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, *(("gelu", [], form) if then_gelu else ("none", [], "")))


@cache
def _onednn_dtypes() -> frozenset[torch.dtype]:
    """Dtypes that oneDNN multiplies on this processor; none where torch was built without oneDNN."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return frozenset()
    narrow = [torch.bfloat16] if torch.ops.mkldnn._is_mkldnn_bf16_supported() else []
    return frozenset([torch.float32, *narrow])
