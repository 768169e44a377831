"""The DiT's activation and norm, in other forms of the same function where torch's kernels are slow: bfloat16 on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form; bfloat16 on a CPU takes the erf form, a quarter of the time, whose 5e-4 of difference is less than the
    rounding of what is larger than 0.2."""
    return F.gelu(x, approximate="none" if slow_here(x) else "tanh")


class RmsNorm(nn.RMSNorm):
    """torch's, but in bfloat16 on a CPU in half the passes, with gradients in a third, the scale rounded once more."""

    def forward(self, x: Tensor) -> Tensor:
        """[...,D] -> [...,D]"""
        if not slow_here(x):
            return super().forward(x)
        if torch.is_grad_enabled():
            return _RmsNorm.apply(x, self.weight, self.eps)
        return _normed(x, self.eps)[0].mul_(self.weight)


def _normed(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / rms(x), and what x was multiplied by for it, [B,N,1]."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    scale = torch.rsqrt_(length.square_().div_(x.shape[-1]).add_(eps)).to(x.dtype)
    return x * scale, scale


class _RmsNorm(torch.autograd.Function):
    """x / rms(x) · weight of bfloat16 x; torch makes it of a dozen kernels in float32, and of twice as many backward."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, *given) -> Tensor:
        weight, eps = given
        normed, scale = _normed(x, eps)
        ctx.save_for_backward(normed, scale, weight)
        return normed * weight.to(x.dtype)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        normed, scale, weight = ctx.saved_tensors
        gain, product = weight.to(normed.dtype), grad * normed
        along = (product @ gain).unsqueeze(-1) / normed.shape[-1]  # what a longer x would change: the norm takes it away again
        by_x = (grad * gain).addcmul_(normed, along, value=-1).mul_(scale)
        return by_x, product.flatten(0, -2).sum(0, dtype=torch.float32).to(weight.dtype), None


def slow_here(x: Tensor) -> bool:
    """Where torch's kernels are so slow that another form of the same function pays."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu"
