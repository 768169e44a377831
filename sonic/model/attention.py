"""Attention kernels, and which tokens attend to which. Shapes: N tokens of a packed sequence, d channels of a head. No weights."""

from __future__ import annotations

import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Container
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from sonic.config import require
from sonic.model.cpu import attention_by_products, products_are_faster, slow_here
from sonic.model.embed import Rotation, rotate, rotate_both
from sonic.registry import Registry
from sonic.types import pick

log = logging.getLogger("sonic.model")

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v [B,N,heads,d] -> [B,N,heads,d]
KeysValues = tuple[Tensor, Tensor]
compile_once = cache(torch.compile)


def sdpa(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Softmax attention by torch, without a mask.  [B,N,heads,d] -> [B,N,heads,d]"""
    if not queries.numel():  # a rank to which no head of this attention is assigned
        return queries
    slow, learning = slow_here(queries), _learning(queries, keys, values)
    if slow and not learning and products_are_faster():
        return attention_by_products(queries, keys, values)
    queries, keys, values = (x.transpose(1, 2) for x in (queries, keys, values))
    if slow and learning:  # backward through torch's CPU kernel takes longer in bfloat16 than through plain products
        scores = (queries * queries.shape[-1] ** -0.5) @ keys.mT
        return (scores.softmax(-1) @ values).transpose(1, 2)
    return F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2)


def xformers(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Softmax attention by the CUDA kernels of xformers, without a mask.  [B,N,heads,d] -> [B,N,heads,d]"""
    if not queries.numel():
        return queries
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(queries, keys, values)


def flash3(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Softmax attention by the kernels of FlashAttention 3, without a mask.  [B,N,heads,d] -> [B,N,heads,d]"""
    if not queries.numel():
        return queries
    from flash_attn_interface import flash_attn_func

    found = flash_attn_func(queries, keys, values)
    return found[0] if isinstance(found, tuple) else found  # older builds also give the logarithm of the sum of each row


def sage(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Softmax attention by SageAttention, which rounds queries and keys to 8 bits.  [B,N,heads,d] -> [B,N,heads,d]

    Raises ValueError where gradients are needed.
    """
    if torch.is_grad_enabled() and _learning(queries, keys, values):
        raise ValueError("run.attention=sage has no gradients; train with run.attention=sdpa")
    if not queries.numel():
        return queries
    from sageattention import sageattn

    return sageattn(queries, keys.clone(), values, tensor_layout="NHD")  # version 1 changes the keys in place


def flex(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Softmax attention by torch's flex_attention, without a mask.  [B,N,heads,d] -> [B,N,heads,d]"""
    if not queries.numel() or (not queries.is_cuda and _learning(queries, keys, values)):  # it has no gradients on a CPU
        return sdpa(queries, keys, values)
    return flex_here(queries)(*(rows.transpose(1, 2) for rows in (queries, keys, values))).transpose(1, 2)


def flex_here(like: Tensor, *, dynamic: bool | None = None) -> Callable[..., Tensor]:
    """torch's flex_attention; on CUDA compiled, because otherwise it would store a score for every pair of a query and a key."""
    return compile_once(flex_attention, dynamic=dynamic) if like.is_cuda else flex_attention


def _learning(*tokens: Tensor) -> bool:
    return any(rows.requires_grad for rows in tokens)


class Backend(NamedTuple):
    """An attention function and what it needs: a package, and how it is installed; a CUDA device of a compute capability from `oldest` to
    `newest`, unless it runs `anywhere`; dtypes; channels of a head (None = any). One that is not `exact` rounds more than sdpa."""

    attend: Attention
    package: str = ""
    install: str = ""
    anywhere: bool = False
    oldest: tuple[int, int] = (8, 0)
    newest: tuple[int, int] = (99, 0)
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32)
    heads: Container[int] | None = None
    exact: bool = True

    def fault_of(self, device: torch.device) -> str:
        """Why a device cannot run it; "" when it can."""
        if self.anywhere or device.type != "cuda":
            return "" if self.anywhere else f"has kernels for CUDA only, not for {device.type}"
        found = torch.cuda.get_device_capability(device)
        needs = f"needs a GPU of compute capability {self.oldest} to {self.newest}, and this one has {found}"
        return "" if self.oldest <= found <= self.newest else needs.replace(" to (99, 0)", " or newer")


HALF, HEADS = (torch.bfloat16, torch.float16), range(8, 257, 8)
FLASH3 = Backend(flash3, "flash_attn_interface", "install flash-attn-3 from PyTorch's wheel index", dtypes=HALF, heads=HEADS)
ATTENTION: Registry[Backend] = Registry(
    "run.attention",
    {
        "sdpa": Backend(sdpa, anywhere=True),
        "xformers": Backend(xformers, "xformers", "pip install xformers"),
        "flash3": FLASH3._replace(oldest=(9, 0), newest=(9, 9)),  # Hopper
        "sage": Backend(sage, "sageattention", "pip install sageattention", dtypes=HALF, heads=(64, 96, 128), exact=False),
        "flex": Backend(flex, anywhere=True),
    },
)


def attention_for(name: str, device: torch.device, dtype: torch.dtype, *, head_dim: int) -> Attention:
    """The attention function called `name` (run.attention) for heads of `head_dim` channels in `dtype`; sdpa, with a warning, on a device
    where `name` does not run and would give the same.

    Raises ValueError when it cannot do what is asked for, or its package is not installed.
    """
    backend = pick(ATTENTION, name, "run.attention")
    fault = backend.fault_of(device)
    if fault and backend.exact:
        log.warning("run.attention=%s %s; torch's own attention is used (sdpa)", name, fault)
        backend, fault = ATTENTION["sdpa"], ""
    if not fault and backend.package and find_spec(backend.package) is None:
        fault = f"needs the package {backend.package}: {backend.install}"
    elif not fault and dtype not in backend.dtypes:
        fault = f"has no kernels for {dtype}: run.dtype=bfloat16 has them"
    elif not fault and backend.heads and head_dim not in backend.heads:
        fault = f"has no kernels for heads of {head_dim} channels"
    require(not fault, f"run.attention={name} {fault}; or use run.attention=sdpa, which needs nothing")
    if backend.attend is sdpa and device.type == "cuda":
        _log_kernel(device, dtype, head_dim)
    return backend.attend


def kernel_of(rows: Tensor) -> SDPBackend:
    """The kernel that torch takes for attention among rows like these.  [B,heads,N,d]"""
    return SDPBackend(torch._fused_sdp_choice(rows, rows, rows))


@cache
def _log_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Log which kernel sdpa takes, as torch chooses it here, and for slower kernels than cuDNN's and flash attention torch's reasons."""
    rows = torch.empty(1, 8, 256, head_dim, dtype=dtype, device=device)
    kernel, reasons = kernel_of(rows), []
    if kernel not in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        with warnings.catch_warnings(record=True) as caught, suppress(RuntimeError), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            warnings.simplefilter("always")
            F.scaled_dot_product_attention(rows, rows, rows)  # warns why it cannot, then raises
        messages = (str(each.message).partition(" (Triggered")[0] for each in caught)  # also that the other kernels are not allowed here
        reasons = [text for text in messages if "kernel not used" not in text and "runtime disabled" not in text]
    log.info("attention: sdpa takes torch's kernel %s", " ".join([kernel.name, *["because:"][: len(reasons)], *reasons]))


class QKV(NamedTuple):
    """Queries, keys and values of all tokens, each [B,N,heads,d], before rotary positions are applied."""

    queries: Tensor
    keys: Tensor
    values: Tensor


class AttentionContext(ABC):
    """Which keys the tokens of one layer attend to, and the rotary positions of both."""

    @abstractmethod
    def attend(self, attention: Attention, tokens: QKV) -> Tensor:
        """Self-attention over the allowed keys.  -> [B,N,heads,d]"""

    def text(self, project: Callable[[Tensor], KeysValues], rows: Tensor | None) -> KeysValues:
        """Keys and values [B,L,heads,d] of the prompt: projected from its rows [B,L,D], or by subclasses taken from a cache."""
        return project(rows)


class TokenExchange:
    """Redistribution around self-attention: ranks divide the tokens before and after it, and the heads inside it.

    This one is of a single rank, which has all tokens and all heads.
    """

    def to_heads(self, tokens: QKV) -> QKV:
        """From some tokens with all heads to all tokens with some heads."""
        return tokens

    def to_tokens(self, attn_out: Tensor) -> Tensor:
        """From all tokens with some heads to some tokens with all heads.  [B,N,some heads,d] -> [B,some tokens,heads,d]"""
        return attn_out


NO_EXCHANGE = TokenExchange()


@dataclass(frozen=True)
class ClipContext(AttentionContext):
    """Full attention: every token attends to every token of the grid and of the memory."""

    positions: Rotation

    def attend(self, attention: Attention, tokens: QKV) -> Tensor:
        """One attention over all tokens.  -> [B,N,heads,d]"""
        return attention(*rotate_both(tokens.queries, tokens.keys, self.positions), tokens.values)


@dataclass(frozen=True)
class BlockCausalContext(AttentionContext):
    """A whole rollout in one training pass: memory attends to memory; block i to memory and blocks i - window + 1 to i.

    The grid's tokens come first, the memory's last. `memory_keys[i]` rotates the memory's keys for block i, because the
    position of the reference depends on the block.
    """

    grid: Rotation
    memory: Rotation
    memory_keys: tuple[Rotation, ...]
    window: int

    def attend(self, attention: Attention, tokens: QKV) -> Tensor:
        """One attention per block, without a mask, so that fused kernels can be used.  -> [B,N,heads,d]"""
        size = self.grid.shape[0]
        (grid_q, memory_q), (grid_k, memory_k), (grid_v, memory_v) = ((x[:, :size], x[:, size:]) for x in tokens)
        grid_q, grid_k = rotate(grid_q, self.grid), rotate(grid_k, self.grid)
        length = size // len(self.memory_keys)
        rotated = {id(rotation): rotate(memory_k, rotation) for rotation in self.memory_keys}
        attn_out = []
        for index, rotation in enumerate(self.memory_keys):
            first, last = max(0, index + 1 - self.window) * length, (index + 1) * length
            block_k = torch.cat((rotated[id(rotation)], grid_k[:, first:last]), dim=1)
            block_v = torch.cat((memory_v, grid_v[:, first:last]), dim=1)
            attn_out.append(attention(grid_q[:, last - length : last], block_k, block_v))
        attn_out.append(attention(rotate(memory_q, self.memory), rotate(memory_k, self.memory), memory_v))
        return torch.cat(attn_out, dim=1)
