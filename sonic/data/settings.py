"""Knobs of making data sets (stdlib only)."""

from __future__ import annotations

from dataclasses import dataclass

from sonic.config import ModelConfig, knob


@dataclass
class MixConfig:
    """Shares of the recordings and clips."""

    clean: float = knob(0.25, "recordings that stay free of noise, echo and band limits")
    silent: float = knob(0.05, "recordings in which nobody speaks")
    moving: float = knob(0.3, "clips whose head moves")

    def __post_init__(self) -> None:
        for name in ("clean", "silent", "moving"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"mix.{name}={getattr(self, name)}: need a share between 0 and 1")


@dataclass
class PrecomputeConfig:
    """Makes clips once, so that training only reads: speech with features and visemes, and drawn people saying it."""

    kind: str = knob("talking", "talking = latents of drawn people with their speech; spoken = speech alone")
    folder: str = knob("data/preview_clips", "where the shards and their index go; what is there already is kept")
    split: str = knob("train", "train or test: other people, voices and words")
    seed: int = 0
    utterances: int = knob(1000, "recordings to make")
    latent_frames: int = knob(18, "length of a clip; four video frames each")
    clips_per_utterance: int = knob(4, "clips cut from a recording, each with a person of its own")
    mix: MixConfig = knob(MixConfig)
    workers: int = knob(2, "processes; 0 = in this one")
    autoencoder: str = knob("", "weights of the autoencoder; empty = the bundled ones")
    model: ModelConfig = knob(ModelConfig)

    def __post_init__(self) -> None:
        for name in ("utterances", "latent_frames", "clips_per_utterance"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: need at least 1")
        if self.workers < 0:
            raise ValueError(f"workers={self.workers}: need 0 (this process) or more")
