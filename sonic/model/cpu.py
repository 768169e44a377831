"""Layers and attention of the DiT, with faster implementations for CPUs where torch's own are slow; on other devices they are torch's."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

SCORES = 1 << 22  # attention scores computed at a time, 8 MiB: few enough to stay in the CPU's cache through the softmax


def slow_here(x: Tensor) -> bool:
    """Whether torch's kernels are slow for this tensor: bfloat16 on a CPU."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu"


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form, or for bfloat16 on a CPU in its erf form, which takes a quarter of the time.

    The two differ by at most 5e-4, less than the rounding of a bfloat16 above 0.2.
    """
    return F.gelu(x, approximate="none" if slow_here(x) else "tanh")


class RmsNorm(nn.RMSNorm):
    """torch's RMS norm in the precision of its input, which autocast would make float32; for bfloat16 on a CPU in half as many passes over
    memory, with gradients in a third, and with the scale rounded to bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        """[...,D] -> [...,D]"""
        if not slow_here(x):
            return super().forward(x).to(x.dtype)
        if torch.is_grad_enabled():
            return _RmsNorm.apply(x, self.weight, self.eps)
        return _normed(x, self.eps)[0].mul_(self.weight)


def _normed(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / rms(x), and 1 / rms(x) as [B,N,1]."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    scale = torch.rsqrt_(length.square_().div_(x.shape[-1]).add_(eps)).to(x.dtype)
    return x * scale, scale


class _RmsNorm(torch.autograd.Function):
    """x / rms(x) · weight for bfloat16 x; torch runs a dozen float32 kernels for it, and twice as many backward."""

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
        along = (product @ gain).unsqueeze(-1) / normed.shape[-1]  # the gradient along x itself, which normalisation cancels
        grad_x = (grad * gain).addcmul_(normed, along, value=-1).mul_(scale)
        return grad_x, product.flatten(0, -2).sum(0, dtype=torch.float32).to(weight.dtype), None


def product_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which products with this weight are computed: that of autocast where it is on, else the weight's."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


class Linear(nn.Linear):
    """torch's linear layer, with an optional GELU of its output."""

    def forward(self, x: Tensor, *, gelu: bool = False) -> Tensor:
        """[...,D] -> [...,D']"""
        return linear(x, self.weight, self.bias, then_gelu=gelu)


def linear_gelu(layer: nn.Module, x: Tensor) -> Tensor:
    """GELU after a linear layer, fused into one call where the layer supports it.  [...,D] -> [...,D']"""
    return layer(x, gelu=True) if isinstance(layer, Linear) else gelu(layer(x))


def linear(x: Tensor, weight: Tensor, bias: Tensor, *, then_gelu: bool = False) -> Tensor:
    """x · weightᵀ + bias, then optionally GELU in the form that `gelu` uses for this dtype.  [...,D] -> [...,D']

    On a CPU oneDNN is faster than what torch calls: for float32 that is MKL, which uses fewer instructions of processors by other makers
    than Intel; for bfloat16 torch writes the bias to memory before the product. On a GPU the kernel of the product applies a GELU, in its
    tanh form.
    """
    fits = x.dtype == weight.dtype == bias.dtype == product_dtype(weight) and not torch.is_grad_enabled()
    if then_gelu and fits and x.device.type != "cpu":
        return torch._addmm_activation(bias, x.flatten(0, -2), weight.mT, use_gelu=True).unflatten(0, x.shape[:-1])
    use_onednn = x.device.type == "cpu" and x.dtype == weight.dtype and x.dtype in _onednn_dtypes() and torch.backends.mkldnn.enabled
    if torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type) or not use_onednn or not x.numel():
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


@cache
def products_are_faster() -> bool:
    """Whether this CPU has bfloat16 products that torch's attention does not use, so that it runs at the rate of float32."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.11 does not have it yet
    return bool(capabilities.get("avx512_bf16")) and not capabilities.get("amx_bf16")


def attention_by_products(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Softmax attention without gradients; scores are rounded to the dtype of the queries.  [B,N,heads,d] -> [B,N,heads,d]

    It computes as many heads at a time as SCORES allows, or else as many queries of one head.
    """
    batch, number, heads, dim = queries.shape
    queries, keys, values = (rows.transpose(1, 2).flatten(0, 1) for rows in (queries, keys, values))  # [B·heads,N,d]
    attn_out, length = torch.empty_like(queries), keys.shape[1]
    heads_at_once, rows = max(1, SCORES // (number * length)), max(1, SCORES // length)
    buffer = queries.new_empty(min(heads_at_once, batch * heads) * min(rows, number) * length)
    for first in range(0, batch * heads, heads_at_once):
        part = slice(first, first + heads_at_once)
        for query, out in zip(queries[part].split(rows, dim=1), attn_out[part].split(rows, dim=1), strict=True):
            scores = buffer[: query.shape[0] * query.shape[1] * length].view(*query.shape[:2], length)
            torch.baddbmm(scores, query, keys[part].mT, beta=0, alpha=dim**-0.5, out=scores)
            torch.bmm(torch.softmax(scores, dim=-1, out=scores), values[part], out=out)
    return attn_out.unflatten(0, (batch, heads)).transpose(1, 2)
