"""Low-rank adapters, and tensors that replace weights, in files of peft's format: reading them, and the names of ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from sonic.checkpoint.header import Header, read_header
from sonic.checkpoint.tensor_files import StoredTensor, sha256, survey, weights_hash
from sonic.checkpoint.weights import to_official, to_ours
from sonic.model.adapters import DOWN, SLASH, UP

PREFIX = "base_model.model."
PUBLISHED = "liveavatar.safetensors"
BESIDE = ("audio2token.", "audio2bucket.")  # networks beside the transformer whose tensors may be in the same file
ALPHA, USUAL_ALPHA = "alpha", 64.0  # the metadata key of alpha in our files; the alpha that published adapters were trained with
SHOWN = 5  # number of names that an error lists


class Adapter(NamedTuple):
    """The low-rank change of one weight: scale · up @ down, with down [rank,in] and up [out,rank], which are read when they are used."""

    down: StoredTensor
    up: StoredTensor

    def delta(self, alpha: float) -> Tensor:
        """alpha / rank · up @ down, in float32.  -> [out, in]"""
        return (alpha / self.down.shape[0]) * (self.up.whole().float() @ self.down.whole().float())


@dataclass(frozen=True)
class Lora:
    """Adapters by our names of the weights that they change, the alpha that they were trained with, their file and what its header says.

    `replaced` are tensors that stand in the place of weights (peft's modules_to_save), `beside` those of the networks BESIDE, both by name.
    """

    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    alpha: float = 0.0
    file: Path | None = None
    header: Header | None = None
    replaced: Mapping[str, StoredTensor] = field(default_factory=dict)
    beside: Mapping[str, StoredTensor] = field(default_factory=dict)

    def check_base(self, weights: Path) -> None:
        """Raise ValueError when the adapters were trained on other weights than these; older files do not say on which."""
        known = self.header.base_hash if self.header else ""
        if known and known != (found := base_hash(weights)):
            raise ValueError(
                f"lora {self.file} was trained on {self.header.base} (hash {known}), not on {weights} (hash {found}); "
                "use the weights that it was trained on, or train it on these"
            )

    def check(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Raise ValueError unless the model has a weight of the right shape for every adapter and every tensor that replaces one."""
        changed = {name: [up.shape[0], down.shape[1]] for name, (down, up) in self.adapters.items()}
        changed |= {name: list(stored.shape) for name, stored in self.replaced.items()}
        lacking = [name for name in changed if name not in shapes]
        if lacking:
            share = f"{len(lacking)} of {len(changed)}"
            raise ValueError(f"the lora adapts {share} weights that the model lacks: {_listed(lacking)}; use the lora of this model")
        for name, ours in changed.items():
            if ours != (wanted := list(shapes[name])):
                raise ValueError(f"the lora's {name} is for a weight of shape {ours}, the model's has {wanted}; use the lora of this model")


    @torch.no_grad()
    def replace_beside(self, networks: Mapping[str, nn.Module]) -> None:
        """Replace the tensors of networks beside the transformer, by their names in BESIDE. Raises ValueError when they are not theirs."""
        weights = {f"{first}.{name}": weight for first, network in networks.items() for name, weight in network.named_parameters()}
        for name, stored in self.beside.items():
            ours = list(weights[name].shape) if name in weights else "none"
            if ours != list(stored.shape):
                raise ValueError(f"lora {self.file}: {name} has shape {list(stored.shape)}, the model's {ours}; use the lora of this model")
            weights[name].copy_(stored.whole())


NO_LORA = Lora()


def read_lora(path: str | Path, alpha: float = 0.0) -> Lora:
    """The adapters in a file, or in the published file of a folder. Source: LoRA, arXiv 2106.09685.

    Without `alpha` it is the one in the file's metadata, or else USUAL_ALPHA. Keys may begin with `base_model.model.` and contain an
    adapter's name (`.default`); modules may have official names or ours.
    Raises ValueError when the file cannot be read, holds a tensor that is not one of a pair, or two for the same weight.
    """
    path = Path(path) / PUBLISHED if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise ValueError(f"lora {path} does not exist; give the path of a safetensors file in peft's format")
    halves: dict[str, dict[str, StoredTensor]] = {}
    unpaired, replaced, beside = [], {}, {}
    for name, stored in survey(path).items():
        module, role = _split(name)
        if not role:
            if name.startswith(PREFIX):
                replaced[to_ours(name.removeprefix(PREFIX))] = stored
            elif name.startswith(BESIDE):
                beside[name] = stored
            else:
                unpaired.append(name)
            continue
        weight = to_ours(f"{module}.weight")
        if (other := halves.setdefault(weight, {}).setdefault(role, stored)) is not stored:
            raise ValueError(f"lora {path} holds {other.name} and {name}, both for {weight}; give a file with one adapter")
    for pair in halves.values():
        if len(pair) < 2 or pair[DOWN].shape[0] != pair[UP].shape[1]:
            unpaired.append(_split(next(iter(pair.values())).name)[0])
    if unpaired or not (halves or replaced):
        raise ValueError(
            f"lora {path} holds no whole pair of {DOWN} and {UP} for: {_listed(unpaired or ['anything'])}; give a file in peft's format"
        )
    adapters = {weight: Adapter(pair[DOWN], pair[UP]) for weight, pair in halves.items()}
    with safe_open(str(path), framework="pt") as file:
        return Lora(adapters, alpha or float((file.metadata() or {}).get(ALPHA, USUAL_ALPHA)), path, read_header(path), replaced, beside)


def base_hash(weights: Path) -> str:
    """A hash of 16 digits of whole weights: of the tensors in a file, or of the manifest beside the folder of a converted checkpoint."""
    manifest = weights.parent / "manifest.json"
    return weights_hash(weights) if not weights.is_dir() else sha256(manifest)[:16] if manifest.is_file() else ""


def peft_name(name: str) -> str:
    """peft's name of an adapter tensor, built from the module's official name where it has one."""
    path, role, _ = name.rsplit(".", 2)
    assert role in (DOWN, UP), name
    official = to_official(f"{path.replace(SLASH, '.')}.weight").removesuffix(".weight")
    return f"{PREFIX}{official}.{role}.weight"


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
