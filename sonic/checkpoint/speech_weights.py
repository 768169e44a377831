"""The speech encoder of a model with its weights: the model's own, or those that model.speech_weights names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch

from sonic.checkpoint.official import Component, speech_encoder
from sonic.checkpoint.tensor_files import joined_hash, read, sha256, weights_hash
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
    kind, path = SPEECH_ENCODERS[name], Path(config.speech_weights) if config.speech_weights else own.get(name)
    if path is None and (issubclass(kind, HiddenStateEncoder) or kind().state_dict()):
        given = "a folder with config.json and model.safetensors" if issubclass(kind, HiddenStateEncoder) else "a safetensors file"
        raise ValueError(f"model={config.name} has no weights of speech_encoder={name}; name them as model.speech_weights=PATH, {given}")
    if not issubclass(kind, HiddenStateEncoder):
        encoder = kind().eval().requires_grad_(False)
        encoder.check_fits(config)
        if path is not None:
            load_weights(encoder, path)
        return encoder.to
    part = speech_encoder(path, name)
    with torch.device("meta"):
        kind(part.config).check_fits(config)
    return partial(load_hidden_states, kind, part)


def load_hidden_states(kind: type[HiddenStateEncoder], part: Component, device: torch.device) -> HiddenStateEncoder:
    """A speech encoder of transformers with the weights that `official.speech_encoder` has checked."""
    encoder = kind(part.config).to(device).requires_grad_(False)
    tensors = {kind.to_transformers(stored.name): tensor.to(device) for stored, tensor in read(part.tensors.values())}
    encoder.encoder.load_state_dict(tensors, strict=False)  # all that are read
    return encoder


def speech_hash(config: ModelConfig, own: Mapping[str, str]) -> str:
    """A hash of 16 digits of the weights in model.speech_weights; without, that of the model's own, or "" when it has none."""
    if not config.speech_weights:
        return own.get(config.speech_encoder, "")
    if (path := Path(config.speech_weights)).is_file():
        return weights_hash(path)
    tensors = speech_encoder(path, config.speech_encoder).tensors
    return joined_hash([sha256(file) for file in sorted({stored.file for stored in tensors.values()})])
