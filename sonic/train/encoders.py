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
    """Encoders of the configured model; the autoencoder only where frames are encoded. Raises ValueError without its weights."""
    hear = pick(SPEECH_ENCODERS, config.model.speech_encoder, "model.speech_encoder")
    if config.kind == "spoken":
        return Encoders(hear, None)
    autoencoder = pick(AUTOENCODERS, config.model.autoencoder, "model.autoencoder")()
    load_weights(autoencoder, Path(config.autoencoder) if config.autoencoder else weight_files(config.model)[1])
    return Encoders(hear, autoencoder.eval().requires_grad_(False))
