"""The speech encoder of a model with its weights: the model's own, or those that model.speech_weights names."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch

from sonic.checkpoint.bundled import weights_hash
from sonic.checkpoint.official import Component, speech_encoder
from sonic.checkpoint.tensor_files import read, sha256
from sonic.checkpoint.weights import load_weights
from sonic.config import ModelConfig
from sonic.encoders.hidden_states import HiddenStateEncoder
from sonic.encoders.speech import SPEECH_ENCODERS
from sonic.encoders.speech_encoder import SpeechEncoder

MakeSpeechEncoder = Callable[[torch.device], SpeechEncoder]


def open_speech_encoder(config: ModelConfig, own: Mapping[str, Path]) -> MakeSpeechEncoder:
    """A function that loads the speech encoder of a model on a device; `own` are the model's own weights, by name of the encoder.

    Raises ValueError when it has no weights, its files are damaged, or the model reads features of another size or rate.
    """
    name = config.speech_encoder
    kind, path = SPEECH_ENCODERS[name], _path(config, own)
    if path is None:
        given = "a folder with config.json and model.safetensors" if issubclass(kind, HiddenStateEncoder) else "a safetensors file"
        raise ValueError(f"model={config.name} has no weights of speech_encoder={name}; name them as model.speech_weights=PATH, {given}")
    if not issubclass(kind, HiddenStateEncoder):
        encoder = kind()
        load_weights(encoder, path)
        load = encoder.to
    else:
        part = speech_encoder(path, name)
        with torch.device("meta"):
            encoder = kind(part.config)
        load = partial(_loaded, kind, part, path)
    encoder.check_fits(config)
    return lambda device: load(device).eval().requires_grad_(False)


def speech_hash(config: ModelConfig, own: Mapping[str, Path]) -> str:
    """A hash of 16 digits of the speech encoder's weights; "" when it has none: of the tensors in a file, of the files in a folder."""
    path = _path(config, own)
    if path is None or not path.is_dir():
        return weights_hash(path) if path else ""
    digests = [sha256(file) for file in sorted({stored.file for stored in speech_encoder(path, config.speech_encoder).tensors.values()})]
    return (digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest())[:16]


def _path(config: ModelConfig, own: Mapping[str, Path]) -> Path | None:
    return Path(config.speech_weights) if config.speech_weights else own.get(config.speech_encoder)


def _loaded(kind: type[HiddenStateEncoder], part: Component, source: Path, device: torch.device) -> HiddenStateEncoder:
    encoder = kind(part.config).to(device)
    encoder.load_tensors({stored.name: tensor.to(device) for stored, tensor in read(part.tensors.values())}, str(source))
    return encoder
