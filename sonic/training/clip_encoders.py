"""Builds the encoders that make data sets, and gives hashes of their weights."""

from __future__ import annotations

from sonic.data.data_config import PrecomputeConfig
from sonic.data.shards import Encoders
from sonic.families.family import family_of


def build_encoders(config: PrecomputeConfig) -> Encoders:
    """Build the encoders of the configured model that the data need. Raises ValueError when their weights are missing."""
    return Encoders(None, None) if config.kind == "spoken" else family_of(config.model).clip_encoders(config)


def clip_hashes(config: PrecomputeConfig) -> dict[str, str]:
    """The hashes of the encoders that clips would be made with now; {} for kind "spoken", which needs none."""
    return {} if config.kind == "spoken" else family_of(config.model).encoder_hashes(config.model, config.autoencoder)
