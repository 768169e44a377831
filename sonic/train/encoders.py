"""The encoders that data sets are made with: the model's own speech encoder and its trained autoencoder."""

from __future__ import annotations

from pathlib import Path

from sonic.data.precompute import Encoders
from sonic.data.settings import PrecomputeConfig
from sonic.infer.build import AUTOENCODERS, weight_files
from sonic.model.speech_encoder import SPEECH_ENCODERS
from sonic.model.weights import load_weights
from sonic.types import pick


def build_encoders(config: PrecomputeConfig) -> Encoders:
    """Encoders of the configured model, where the data need them. Raises ValueError without their weights."""
    if config.kind == "spoken":
        return Encoders(None, None)
    files = weight_files(config.model)
    speech = pick(SPEECH_ENCODERS, config.model.speech_encoder, "model.speech_encoder")()
    autoencoder = pick(AUTOENCODERS, config.model.autoencoder, "model.autoencoder")()
    load_weights(speech, files.speech)
    load_weights(autoencoder, Path(config.autoencoder) if config.autoencoder else files.autoencoder)
    return Encoders(speech.eval().hear, autoencoder.eval().requires_grad_(False))
