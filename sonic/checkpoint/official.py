"""The folders of the Wan family as they are downloaded: networks, config files and tensor names, and checks that all is there."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sonic.checkpoint.tensor_files import FLOATS, StoredTensor, check, survey, survey_sharded
from sonic.checkpoint.weights import export, to_official
from sonic.config import AudioConfig, ModelConfig, TextConfig, TrunkConfig
from sonic.encoders.hidden_states import NOT_READ
from sonic.encoders.speech import SPEECH_ENCODERS
from sonic.encoders.text import TIED, TextEncoder, to_published, to_transformers
from sonic.model.dit import AvatarDiT
from sonic.vae.wan_vae import WanAutoencoder, to_diffusers

DIT_STEM = "diffusion_pytorch_model"
TEXT_FILE, VAE_FILE = "models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth"
TOKENIZER, SPEECH = "google/umt5-xxl", "wav2vec2-large-xlsr-53-english"
VAE_LATENTS = 16
# settings of the published transformer with the only value that is supported: another value is another network
FIXED = {
    "model_type": "s2v", "enable_adain": True, "adain_mode": "attn_norm", "zero_timestep": True, "enable_motioner": False,
    "enable_tsm": False, "trainable_token_pos_emb": False, "enable_framepack": True, "framepack_drop_mode": "padd",
}  # fmt: skip
TRUNK = {  # option of our TrunkConfig: its name in the published config.json
    "hidden_dim": "dim", "ffn_dim": "ffn_dim", "num_heads": "num_heads", "num_layers": "num_layers", "latent_channels": "in_dim",
    "freq_dim": "freq_dim", "eps": "eps",
}  # fmt: skip


@dataclass(frozen=True)
class Component:
    """One network of a checkpoint: its tensors by their names in the converted files, and the config that it is built from."""

    tensors: Mapping[str, StoredTensor]
    config: Mapping[str, Any] = field(default_factory=dict)
    halve: bool = False  # write it in bfloat16, whatever its precision is now

    def dtype(self, stored: StoredTensor) -> str:
        """The precision in which a tensor is written."""
        return "BF16" if self.halve else stored.dtype

    def nbytes(self, stored: StoredTensor) -> int:
        """Bytes of a tensor in the precision in which it is written."""
        return prod(stored.shape) * FLOATS[self.dtype(stored)].itemsize


@dataclass(frozen=True)
class Download:
    """The networks of a downloaded folder, of which the first one denoises, the sizes of the model, and files that are copied."""

    components: Mapping[str, Component]
    config: Mapping[str, Any]  # as in ModelConfig
    tokenizer: Sequence[Path] = ()
    licence: str = ""  # what its owners forbid, as a sentence


def networks(folder: Path, base: ModelConfig) -> Download:
    """All that the Wan2.2-S2V-14B folder holds. Raises ValueError when a file is missing, damaged or for another model."""
    dit, model = transformer(folder, base)
    speech = speech_encoder(folder / SPEECH, "wav2vec2")
    components = {"dit": dit, "text_encoder": text_encoder(folder), "vae": autoencoder(folder), "speech_encoder": speech}
    check_together(folder, model, components)
    sizes = {part: asdict(getattr(model, part)) for part in ("trunk", "audio", "text", "motion")}
    return Download(components, sizes, tokenizer_files(folder))


def exported(tensors: Mapping[str, StoredTensor], config: ModelConfig) -> Component:
    """A transformer under its published names, from tensors under those or ours. Raises ValueError when it has other sizes."""
    named = {to_official(name): tensor for name, tensor in tensors.items()}
    check_published(named, shapes_of(lambda: export(AvatarDiT(config))), "transformer")
    return Component(named, official_config(config))


def transformer(folder: Path, base: ModelConfig) -> tuple[Component, ModelConfig]:
    """The DiT of a folder and its model config: sizes from the folder, everything else from `base`.

    Raises ValueError when a tensor is missing or the network is not the published one.
    """
    given = read_json(folder / "config.json")
    tensors = survey_sharded(folder, DIT_STEM)
    for name, value in FIXED.items():
        if given.get(name, value) != value:
            raise ValueError(f"{folder / 'config.json'}: {name}={given[name]} is another network than the published one, which has {value}")
    try:
        config = _model_config(given, partial(shape_in, tensors, folder), base)
    except KeyError as error:
        raise ValueError(f"{folder / 'config.json'} lacks {error}; fetch it again") from error
    check_published(tensors, shapes_of(lambda: export(AvatarDiT(config))), "transformer")
    return Component(tensors, halve=True), config


def official_config(config: ModelConfig) -> dict[str, Any]:
    """The content of the published config.json for a transformer of this config."""
    trunk, audio = config.trunk, config.audio
    return {
        "_class_name": "WanModel_S2V", **{name: getattr(trunk, ours) for ours, name in TRUNK.items()}, "out_dim": trunk.latent_channels,
        "text_len": config.text.text_len, "audio_dim": audio.audio_dim, "num_audio_token": audio.num_audio_token,
        "audio_inject_layers": audio.inject_layers, "cond_dim": trunk.latent_channels, "zero_init": True, "add_last_motion": True,
        "motion_token_num": 1024, **FIXED,
    }  # fmt: skip


def text_encoder(folder: Path) -> Component:
    """The umT5 encoder, with its sizes read from the shapes of its tensors."""
    tensors = survey(folder / TEXT_FILE)
    shape = partial(shape_in, tensors, folder / TEXT_FILE)
    vocab_size, width = shape("token_embedding.weight")
    buckets, heads = shape("blocks.0.pos_embedding.embedding.weight")
    config = {
        "vocab_size": vocab_size,
        "d_model": width,
        "d_kv": shape("blocks.0.attn.q.weight")[0] // heads,
        "d_ff": shape("blocks.0.ffn.fc1.weight")[0],
        "num_layers": 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": 128,
        "feed_forward_proj": "gated-gelu",
    }
    wanted = shapes_of(lambda: TextEncoder(config).encoder.state_dict())
    wanted.pop(TIED)
    check_published({to_transformers(name): tensor for name, tensor in tensors.items()}, wanted, "text encoder", called=to_published)
    return Component(tensors, config, halve=True)


def autoencoder(folder: Path) -> Component:
    """The Wan VAE, written in the precision of the published file."""
    tensors = survey(folder / VAE_FILE)
    config = {"base_dim": shape_in(tensors, folder / VAE_FILE, "encoder.conv1.weight")[0], "z_dim": VAE_LATENTS}
    check_published(to_diffusers(tensors), shapes_of(lambda: WanAutoencoder(config).blocks.state_dict()), "VAE")
    return Component(tensors, config)


def speech_encoder(folder: Path, name: str) -> Component:
    """The speech encoder `name` of a folder, without the output layer or the decoder. Raises ValueError when it is another network."""
    kind, given = SPEECH_ENCODERS[name], read_json(folder / "config.json")
    if given.get("model_type", name) != name:
        raise ValueError(f"{folder} holds {given['model_type']}, not {name}; name the folder of a {name}, or choose another speech encoder")
    config = {key: given[key] for key in kind.KEYS if key in given}
    pickled = folder / "pytorch_model.bin"
    only_pickled = pickled.is_file() and not (folder / "model.safetensors").is_file()
    tensors = survey(pickled) if only_pickled else survey_sharded(folder, "model")
    tensors = {name: tensor for name, tensor in tensors.items() if kind.to_transformers(name)}
    encoder = {kind.to_transformers(name): tensor for name, tensor in tensors.items()}
    wanted = shapes_of(lambda: kind(config).encoder.state_dict())
    wanted.pop(NOT_READ, None)
    check_published(encoder, wanted, "speech encoder", called=lambda name: f"{kind.PREFIX}{name}")
    return Component(tensors, config)


def check_together(folder: Path, model: ModelConfig, components: Mapping[str, Component]) -> None:
    """Raise ValueError when the widths of the encoders' features are not those that the transformer reads."""
    text, speech, audio = components["text_encoder"].config, components["speech_encoder"].config, model.audio
    width, layers = speech.get("hidden_size", audio.audio_dim), speech.get("num_hidden_layers", audio.num_audio_layers - 1)
    for what, file, given, wanted in (
        ("text rows of width", TEXT_FILE, text["d_model"], model.text.text_dim),
        ("speech features of width", SPEECH, width, audio.audio_dim),
        ("hidden layers of speech features:", SPEECH, layers + 1, audio.num_audio_layers),
    ):
        if given != wanted:
            raise ValueError(f"{folder / file} gives {what} {given}, the transformer reads {wanted}; fetch the folder of one model again")


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of the tokenizer. Raises ValueError when tokenizer.json is missing."""
    files = sorted(path for path in (folder / TOKENIZER).glob("*") if path.is_file() and not path.name.startswith("."))
    if not any(path.name == "tokenizer.json" for path in files):
        raise ValueError(f"{folder / TOKENIZER / 'tokenizer.json'} does not exist; fetch the tokenizer again")
    return files


def check_published(
    found: Mapping[str, StoredTensor],
    wanted: Mapping[str, tuple[int, ...]],
    what: str,
    *,
    called: Callable[[str], str] = str,
    mixed: bool = False,
) -> None:
    """Raise ValueError unless a network has exactly the wanted tensors (see `check`), all of the same floating point dtype, or `mixed`."""
    check(found, wanted, what, called=called)
    usual = Counter(tensor.dtype for tensor in found.values()).most_common(1)[0][0]
    for tensor in found.values():
        if tensor.dtype not in FLOATS:
            kinds = ", ".join(FLOATS)
            raise ValueError(f"{tensor.file}: tensor {tensor.name} is {tensor.dtype}, not one of {kinds}; fetch the original file")
        if tensor.dtype != usual and not mixed:
            raise ValueError(f"{tensor.file}: tensor {tensor.name} is {tensor.dtype}, the others are {usual}; fetch the original file")


def _model_config(given: Mapping[str, Any], shape: Callable[[str], tuple[int, ...]], base: ModelConfig) -> ModelConfig:
    trunk = TrunkConfig(**{ours: given[name] for ours, name in TRUNK.items()}, patch_size=list(shape("patch_embedding.weight")[2:]))
    layers = shape("casual_audio_encoder.weights")[1]
    audio = AudioConfig(given["audio_dim"], layers, given["num_audio_token"], list(given["audio_inject_layers"]))
    text = TextConfig(shape("text_embedding.0.weight")[1], given["text_len"])
    return replace(base, trunk=trunk, audio=audio, text=text)


def shapes_of(tensors: Callable[[], Mapping[str, Tensor]]) -> dict[str, tuple[int, ...]]:
    """The shapes of tensors that are made without memory."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in tensors().items()}


def read_json(path: Path) -> dict[str, Any]:
    """The content of a config file. Raises ValueError when it is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; name the folder that was downloaded") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); fetch it again") from error


def shape_in(tensors: Mapping[str, StoredTensor], path: Path, name: str) -> tuple[int, ...]:
    """The shape of a tensor of the file `path`. Raises ValueError without it."""
    if name not in tensors:
        raise ValueError(f"{path}: tensor {name} is missing; the file is for another model")
    return tensors[name].shape
