"""Weights of the transformer on disk: the map between our names and the official ones, and safetensors files that are checked when read.

Files contain the official name of every tensor that has one, so the published code loads files written here, and the reverse.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from sonic.checkpoint.tensor_files import StoredTensor, check, survey
from sonic.model.adapters import DOWN

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
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")  # of a block, inside a name


def to_official(name: str) -> str:
    """The official name of a tensor with our name; a name that has none is returned as it is."""
    return translated(name, OFFICIAL)


def to_ours(name: str) -> str:
    """Our name of a tensor with an official name; an unknown name is returned as it is."""
    return translated(name, OURS)


def translated(name: str, table: Mapping[str, str]) -> str:
    """The name of a tensor after `table` (see OFFICIAL), which holds whole names, or names without their last part."""
    path, _, leaf = name.rpartition(".")
    number = NUMBER.search(name)
    for known, rest in ((name, ""), (path, f".{leaf}")):
        if known in table:
            return table[known] + rest
        if (pattern := NUMBER.sub("{i}", known, count=1)) in table:
            return table[pattern].replace("{i}", number[0]) + rest
    return name


def export(model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors under the names that files contain: official where there is one, ours elsewhere."""
    return {to_official(name): tensor for name, tensor in model.state_dict().items()}


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load the model's weights from a safetensors file, or from all in a folder, with official names or ours.

    Precision and device stay the model's; tensors are read one at a time.
    Raises ValueError when a file is cut short, or a tensor is missing, unknown, or of another shape.
    """
    wanted = model.state_dict()
    stored = stored_weights(path, {name: tuple(tensor.shape) for name, tensor in wanted.items()})
    with torch.no_grad():
        for name, target in wanted.items():
            target.copy_(stored[name].whole())


def stored_weights(path: str | Path, shapes: Mapping[str, Sequence[int]]) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, or of all in a folder, by our names. Raises ValueError unless they are exactly `shapes`."""
    path = Path(path)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not files[0].exists():
        raise ValueError(f"weights {path} do not exist; give the path of a safetensors file")
    tensors = {name: stored for file in files for name, stored in survey(file).items()}
    if any(f".{DOWN}." in name for name in tensors):
        raise ValueError(f"{path} holds adapters and does not say for which weights; name it as model.lora.path={path} beside weights=FILE")
    found = {name if name in shapes else to_ours(name): stored for name, stored in tensors.items()}
    check(found, shapes, "model", called=to_official)
    return found
