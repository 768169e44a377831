"""Options of the command precompute (stdlib only)."""

from __future__ import annotations

from dataclasses import dataclass

from sonic.config import CommandConfig, ModelConfig, names_in, one_of, option, parse_size, require

CLIP_TABLE = "data.precompute.MAKERS"


@dataclass
class MixConfig:
    """Shares of the recordings and clips that are made in a special way."""

    clean: float = option(0.25, "recordings that stay free of noise, echo and band limits")
    silent: float = option(0.05, "recordings without speech")
    moving: float = option(0.3, "clips whose head moves")

    def __post_init__(self) -> None:
        for name in ("clean", "silent", "moving"):
            require(0 <= getattr(self, name) <= 1, f"mix.{name}={getattr(self, name)}: need a share between 0 and 1")


@dataclass
class FootageConfig:
    """The user's own videos, and which of their segments become clips."""

    source: str = option("", "folder of videos of people who speak; empty = people are drawn")
    size: str = option("384x256", "WIDTHxHEIGHT cut from the middle of the frames, for models that generate the whole picture")
    least_level_db: float = option(-45.0, "quieter clips count as silent, in dB below full scale")
    least_sync: float = option(0.2, "clips whose mouth and sound correlate less are left out")
    most_lag_s: float = option(0.2, "largest delay in seconds between mouth and sound")

    def __post_init__(self) -> None:
        width, height = parse_size(self.size, "data.size")
        require(width % 16 == height % 16 == 0, f"data.size={self.size}: both sides must be multiples of 16 pixels")
        require(0 <= self.least_sync < 1, f"data.least_sync={self.least_sync}: need a correlation in [0, 1)")
        require(0.04 <= self.most_lag_s <= 0.5, f"data.most_lag_s={self.most_lag_s}: need 0.04 (a frame) to 0.5 seconds")


@dataclass
class PrecomputeConfig(CommandConfig):
    """Makes a data set of clips for training: of your own videos (data.source), or of drawn people and synthesised speech."""

    kind: str = option("talking", "talking = latents of people with their speech; spoken = synthesised speech alone", table=CLIP_TABLE)
    folder: str = option("data/preview_clips", "folder for shards and index; existing shards are kept unless other encoders made them")
    split: str = option("train", "train or test; the two share no people, voices or words")
    seed: int = option(0, "other seeds are other people, voices and sentences")
    utterances: int = option(1000, "recordings to make")
    latent_frames: int = option(18, "length of a clip; four video frames each")
    clips_per_utterance: int = option(4, "clips cut from a recording, each with a different person")
    mix: MixConfig = option(MixConfig)
    data: FootageConfig = option(FootageConfig)
    workers: int = option(-1, "processes, each on the next GPU; -1 = one per GPU, or 2 on a machine without; 0 = in this one")
    autoencoder: str = option("", "weights of the autoencoder; empty = the bundled ones")
    model: ModelConfig = option(ModelConfig)

    def __post_init__(self) -> None:
        one_of(self.kind, names_in(CLIP_TABLE), "kind")
        for name in ("utterances", "latent_frames", "clips_per_utterance"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)}: need at least 1")
        fits = self.kind == "talking" or not self.data.source
        require(fits, f"kind={self.kind} is synthesised, but data.source={self.data.source} names videos; leave one of them out")
        require(self.workers >= -1, f"workers={self.workers}: need 1 or more, 0 for this process, or -1 for one per GPU")
