"""Low-rank adapters from files in peft's format, and merging them into the weights that they change."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from sonic.checkpoint.weights import to_ours

PREFIX, DOWN, UP = "base_model.model.", "lora_A", "lora_B"
PUBLISHED = "liveavatar.safetensors"
ALPHA, USUAL_ALPHA = "alpha", 64.0  # the metadata key of alpha in our files; the alpha that published adapters were trained with
SHOWN = 5  # number of names that an error lists


class Adapter(NamedTuple):
    """The low-rank change of one weight: scale · up @ down, with down [rank,in] and up [out,rank]."""

    down: Tensor
    up: Tensor

    def delta(self, alpha: float) -> Tensor:
        """alpha / rank · up @ down, in float32.  -> [out, in]"""
        return (alpha / self.down.shape[0]) * (self.up.float() @ self.down.float())


def read_lora(path: str | Path) -> dict[str, Adapter]:
    """The adapters in a file, each by our name of the weight that it changes. Source: LoRA, arXiv 2106.09685.

    Keys may begin with `base_model.model.` and contain an adapter's name (`.default`); modules may have official names or ours.
    Raises ValueError when the file cannot be read, holds a tensor that is not one of a pair, or two for the same weight.
    """
    path = lora_file(path)
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise ValueError(f"lora {path} does not exist; give the path of a safetensors file in peft's format") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"lora {path} cannot be read: {error}; fetch it again") from error
    halves: dict[str, dict[str, Tensor]] = {}
    unpaired, name_of = [], {}
    for name, tensor in tensors.items():
        module, role = _split(name)
        if not role:
            unpaired.append(name)
            continue
        weight = to_ours(f"{module}.weight") or f"{module}.weight"
        if (other := name_of.setdefault((weight, role), name)) != name:
            raise ValueError(f"lora {path} holds {other} and {name}, both for {weight}; give a file with one adapter")
        halves.setdefault(module, {})[role] = tensor
    unpaired += [module for module, pair in halves.items() if len(pair) < 2 or pair[DOWN].shape[0] != pair[UP].shape[1]]
    if unpaired or not halves:
        raise ValueError(
            f"lora {path} holds no whole pair of {DOWN} and {UP} for: {_listed(unpaired or ['anything'])}; give a file in peft's format"
        )
    return {to_ours(f"{module}.weight") or f"{module}.weight": Adapter(pair[DOWN], pair[UP]) for module, pair in halves.items()}


def lora_file(path: str | Path) -> Path:
    """The path itself, or the published adapter's file when it is a folder."""
    return Path(path) / PUBLISHED if Path(path).is_dir() else Path(path)


def lora_alpha(path: str | Path) -> float:
    """The alpha that the file's metadata gives; USUAL_ALPHA when there is none."""
    with safe_open(str(lora_file(path)), framework="pt") as file:
        return float((file.metadata() or {}).get(ALPHA, USUAL_ALPHA))


@torch.no_grad()
def merge_lora(model: nn.Module, adapters: Mapping[str, Adapter], alpha: float) -> None:
    """Add every adapter to the weight of its name; `alpha` is the one it was trained with.

    Raises ValueError, before anything is changed, when the model lacks a weight or has it in another shape.
    """
    weights = model.state_dict()
    check_lora({name: tuple(weight.shape) for name, weight in weights.items()}, adapters)
    for name, adapter in adapters.items():
        weights[name].copy_(weights[name].float() + adapter.delta(alpha).to(weights[name].device))


def check_lora(shapes: Mapping[str, tuple[int, ...]], adapters: Mapping[str, Adapter]) -> None:
    """Raise ValueError unless the model has a weight of the right shape for every adapter."""
    lacking = [name for name in adapters if name not in shapes]
    if lacking:
        share = f"{len(lacking)} of {len(adapters)}"
        raise ValueError(f"the lora adapts {share} weights that the model lacks: {_listed(lacking)}; use the lora of this model")
    for name, (down, up) in adapters.items():
        shape, wanted = [up.shape[0], down.shape[1]], list(shapes[name])
        if shape != wanted:
            raise ValueError(f"the lora's {name} is for a weight of shape {shape}, the model's has {wanted}; use the lora of this model")


def _split(name: str) -> tuple[str, str]:
    """ "base_model.model.blocks.0.q.lora_A.default.weight" -> ("blocks.0.q", "lora_A"); ("", "") for anything else."""
    words = name.removeprefix(PREFIX).split(".")
    for role in (DOWN, UP):
        if role in words and words[-1] == "weight" and len(words) - words.index(role) in (2, 3):
            return ".".join(words[: words.index(role)]), role
    return "", ""


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
