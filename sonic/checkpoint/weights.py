"""Weights on disk: the map between our names and the official ones, and checked reading and writing of safetensors.

Files hold official names wherever a name has one, so a file written here loads in the published code and the other way round.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sonic.system.files import save_tensors
from sonic.system.heartbeat import beat

_MULTI_HEAD = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out": "o", "norm_q": "norm_q", "norm_k": "norm_k"}


def _multi_head(ours: str, official: str) -> dict[str, str]:
    return {f"{ours}.{our}": f"{official}.{theirs}" for our, theirs in _MULTI_HEAD.items()}


# Module (or bare parameter) paths; {i} counts blocks or injectors. Weight and bias keep their names.
OFFICIAL = {
    "patch_embed": "patch_embedding",
    "pose_embed": "cond_encoder",
    "roles": "trainable_cond_mask",
    "text_embed.expand": "text_embedding.0",
    "text_embed.out": "text_embedding.2",
    "time_embed.expand": "time_embedding.0",
    "time_embed.out": "time_embedding.2",
    "time_embed.project": "time_projection.1",
    "frame_pack.newest": "frame_packer.proj",
    "frame_pack.middle": "frame_packer.proj_2x",
    "frame_pack.oldest": "frame_packer.proj_4x",
    "audio_encoder.layer_weights": "casual_audio_encoder.weights",
    "audio_encoder.padding": "casual_audio_encoder.encoder.padding_tokens",
    "audio_encoder.local": "casual_audio_encoder.encoder.conv1_local.conv",
    "audio_encoder.pooled": "casual_audio_encoder.encoder.conv1_global.conv",
    "audio_encoder.shrink": "casual_audio_encoder.encoder.conv2.conv",
    "audio_encoder.shrink_again": "casual_audio_encoder.encoder.conv3.conv",
    "audio_encoder.out": "casual_audio_encoder.encoder.final_linear",
    "blocks.{i}.modulation": "blocks.{i}.modulation",
    **_multi_head("blocks.{i}.self_attention", "blocks.{i}.self_attn"),
    "blocks.{i}.text_norm": "blocks.{i}.norm3",
    **_multi_head("blocks.{i}.text_attention", "blocks.{i}.cross_attn"),
    "blocks.{i}.mlp_in": "blocks.{i}.ffn.0",
    "blocks.{i}.mlp_out": "blocks.{i}.ffn.2",
    "audio_injectors.{i}.modulation": "audio_injector.injector_adain_layers.{i}.linear",
    **_multi_head("audio_injectors.{i}.attention", "audio_injector.injector.{i}"),
    "head.modulation": "head.modulation",
    "head.project": "head.head",
}
OURS = {official: ours for ours, official in OFFICIAL.items()}


def to_official(name: str) -> str | None:
    """The official name of one of our tensors, None when it has none."""
    return _translate(name, OFFICIAL)


def to_ours(name: str) -> str | None:
    """Our name of an official tensor, None when it is unknown."""
    return _translate(name, OURS)


def export(model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors under the names a file holds: official where there is one, ours elsewhere."""
    return {to_official(name) or name: tensor for name, tensor in model.state_dict().items()}


def save_weights(model: nn.Module, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write the model's tensors as one safetensors file, in the precision they have."""
    save_tensors({name: tensor.detach().cpu().contiguous() for name, tensor in export(model).items()}, path, metadata or {})


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Fill the model from a safetensors file, or from all of a folder, with official or our own names; precision and device stay
    the model's, and tensors are read one at a time.

    Raises ValueError in one sentence when a file is cut short, or a tensor is missing, one too many, or of another shape.
    """
    wanted = model.state_dict()
    with stored_weights(path, {name: tensor.shape for name, tensor in wanted.items()}) as stored, torch.no_grad():
        for name, target in wanted.items():
            target.copy_(stored[name].view())


class Stored(NamedTuple):
    """A tensor that is still in its file."""

    file: Any
    name: str

    @property
    def shape(self) -> list[int]:
        """Of the whole tensor."""
        return self.file.get_slice(self.name).get_shape()

    def part(self, place: tuple[slice, ...]) -> Tensor:
        """A part of it, read now."""
        beat()
        return self.file.get_slice(self.name)[place]

    def view(self) -> Tensor:
        """All of it as a map of the file, read when it is looked at."""
        beat()
        return self.file.get_tensor(self.name)


@contextmanager
def stored_weights(path: str | Path, shapes: Mapping[str, Sequence[int]]) -> Iterator[Mapping[str, Stored]]:
    """The tensors of a safetensors file, or of all in a folder, by our names, still on disk.

    Raises ValueError unless there are exactly tensors of these shapes.
    """
    with ExitStack() as stack:
        stored = {}
        for file in _files(Path(path)):
            opened = stack.enter_context(_opened(file))
            stored |= {name if name in shapes else to_ours(name) or name: Stored(opened, name) for name in opened.keys()}  # noqa: SIM118
        _check_names(shapes, {ours: each.name for ours, each in stored.items()}, path)
        for name, wanted in shapes.items():
            if list(wanted) != stored[name].shape:
                raise ValueError(
                    f"weights {path}: tensor {stored[name].name} has shape {stored[name].shape}, the model needs {list(wanted)}; "
                    "use the file that was made for this model"
                )
        yield stored


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, by the names they have there. Raises ValueError when it is missing or damaged."""
    with _opened(_files(Path(path))[0]) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _files(path: Path) -> list[Path]:
    found = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not found or not found[0].exists():
        raise ValueError(f"weights {path} do not exist; give the path of a safetensors file")
    return found


@contextmanager
def _opened(path: Path) -> Iterator:
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"weights {path} cannot be read: the file is cut short or not safetensors ({error}); fetch it again") from error


def _check_names(wanted: Mapping[str, Sequence[int]], stored: Mapping[str, str], path: str | Path) -> None:
    missing = [name for name in wanted if name not in stored]
    if missing:
        first = to_official(missing[0]) or missing[0]
        raise ValueError(
            f"weights {path}: tensor {first} is missing ({len(missing)} of {len(wanted)} in all); the file is for another model"
        )
    extra = [stored[name] for name in stored if name not in wanted]
    if extra:
        raise ValueError(
            f"weights {path}: tensor {extra[0]} has no place in the model ({len(extra)} in all); the file is for another model"
        )


def _translate(name: str, table: Mapping[str, str]) -> str | None:
    for path, leaf in _splits(name):
        if path in table:
            return table[path] + leaf
        words = path.split(".")
        for place, word in enumerate(words):
            pattern = ".".join([*words[:place], "{i}", *words[place + 1 :]])
            if word.isdigit() and pattern in table:
                return table[pattern].replace("{i}", word) + leaf
    return None


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """A name whole, and cut before its last word."""
    yield name, ""
    path, _, leaf = name.rpartition(".")
    yield path, f".{leaf}"
