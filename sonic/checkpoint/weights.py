"""Weights of the transformer on disk: the map between our names and the official ones, and safetensors files that are checked when read.

Files contain the official name of every tensor that has one, so the published code loads files written here, and the reverse.
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
from sonic.system.heartbeat import heartbeat

_MULTI_HEAD = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out": "o", "norm_q": "norm_q", "norm_k": "norm_k"}


def _multi_head(ours: str, official: str) -> dict[str, str]:
    return {f"{ours}.{our}": f"{official}.{theirs}" for our, theirs in _MULTI_HEAD.items()}


# Paths of modules or parameters; {i} is the number of a block or injector. The last part of a name, weight or bias, is the same in both.
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
    """The official name of a tensor with our name; None when it has none."""
    return _translate(name, OFFICIAL)


def to_ours(name: str) -> str | None:
    """Our name of a tensor with an official name; None when the name is unknown."""
    return _translate(name, OURS)


def export(model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors under the names that files contain: official where there is one, ours elsewhere."""
    return {to_official(name) or name: tensor for name, tensor in model.state_dict().items()}


def save_weights(model: nn.Module, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write the model's tensors as one safetensors file, in the precision they have."""
    save_tensors({name: tensor.detach().cpu().contiguous() for name, tensor in export(model).items()}, path, metadata or {})


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load the model's weights from a safetensors file, or from all in a folder, with official names or ours.

    Precision and device stay the model's; tensors are read one at a time.
    Raises ValueError when a file is cut short, or a tensor is missing, unknown, or of another shape.
    """
    wanted = model.state_dict()
    with stored_weights(path, {name: tensor.shape for name, tensor in wanted.items()}) as stored, torch.no_grad():
        for name, target in wanted.items():
            target.copy_(stored[name].view())


class LazyTensor(NamedTuple):
    """A tensor of an open file, not read yet."""

    file: Any
    name: str

    @property
    def shape(self) -> list[int]:
        """The shape of the whole tensor."""
        return self.file.get_slice(self.name).get_shape()

    def part(self, index: tuple[slice, ...]) -> Tensor:
        """A slice of the tensor, read from the file."""
        heartbeat()
        return self.file.get_slice(self.name)[index]

    def view(self) -> Tensor:
        """The whole tensor as a memory map of the file, whose pages are read when they are used."""
        heartbeat()
        return self.file.get_tensor(self.name)


@contextmanager
def stored_weights(path: str | Path, shapes: Mapping[str, Sequence[int]]) -> Iterator[Mapping[str, LazyTensor]]:
    """The tensors of a safetensors file, or of all in a folder, by our names, not read yet; the files are open inside the `with` block.

    Raises ValueError unless the tensors are exactly those of `shapes`.
    """
    with ExitStack() as stack:
        stored = {}
        for file in _files(Path(path)):
            opened = stack.enter_context(_opened(file))
            stored |= {name if name in shapes else to_ours(name) or name: LazyTensor(opened, name) for name in opened.keys()}  # noqa: SIM118
        _check_names(shapes, {ours: tensor.name for ours, tensor in stored.items()}, path)
        for name, wanted in shapes.items():
            if list(wanted) != stored[name].shape:
                raise ValueError(
                    f"weights {path}: tensor {stored[name].name} has shape {stored[name].shape}, the model needs {list(wanted)}; "
                    "use the file that was made for this model"
                )
        yield stored


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, by their names in it. Raises ValueError when the file is missing or damaged."""
    with _opened(_files(Path(path))[0]) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _files(path: Path) -> list[Path]:
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not files[0].exists():
        raise ValueError(f"weights {path} do not exist; give the path of a safetensors file")
    return files


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
        for index, word in enumerate(words):
            pattern = ".".join([*words[:index], "{i}", *words[index + 1 :]])
            if word.isdigit() and pattern in table:
                return table[pattern].replace("{i}", word) + leaf
    return None


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """The name as (path, rest): whole with an empty rest, and cut before its last part."""
    yield name, ""
    path, _, leaf = name.rpartition(".")
    yield path, f".{leaf}"
