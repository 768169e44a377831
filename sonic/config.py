"""Every knob of the program, as plain dataclasses with their defaults and laws. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field


def ints(*values: int):
    """A list field with a default."""
    return field(default_factory=lambda: list(values))


@dataclass
class TrunkConfig:
    """The transformer itself; `patch_size` counts latents along (time, height, width)."""

    hidden_dim: int = 192
    ffn_dim: int = 768
    num_heads: int = 3
    num_layers: int = 6
    patch_size: list[int] = ints(1, 3, 3)
    latent_channels: int = 16
    freq_dim: int = 256
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.hidden_dim % self.num_heads:
            raise ValueError(f"model.trunk.hidden_dim={self.hidden_dim} must be a multiple of num_heads={self.num_heads}")


@dataclass
class AudioConfig:
    """Speech features as they arrive ([num_audio_layers, audio_dim] per video frame) and where they are injected."""

    audio_dim: int = 560
    num_audio_layers: int = 1
    num_audio_token: int = 4
    inject_layers: list[int] = ints(0, 2, 4)


@dataclass
class TextConfig:
    """Rows of the prompt's embedding; shorter prompts are padded with zero rows to `text_len`."""

    text_dim: int = 32
    text_len: int = 4


@dataclass
class MotionConfig:
    """FramePack memory of the past: bucket sizes in latent frames, newest first; motion_frames = [video, latent] frames."""

    buckets: list[int] = ints(1, 2, 16)
    add_last_motion: int = 2
    motion_frames: list[int] = ints(73, 19)


@dataclass
class RolloutConfig:
    """The block-causal way of running: latent frames in a block, blocks a ring remembers, where the reference sits."""

    block_frames: int = 3
    window_blocks: int = 3
    ref_position: int = 30
    ref_distance: int = 16

    def __post_init__(self) -> None:
        if self.block_frames < 1 or self.window_blocks < 1:
            raise ValueError(f"model.rollout: block_frames={self.block_frames} and window_blocks={self.window_blocks} must be at least 1")
        if not 0 <= self.ref_distance <= self.ref_position:
            raise ValueError(f"model.rollout.ref_distance={self.ref_distance} must lie between 0 and ref_position={self.ref_position}")


@dataclass
class ModelConfig:
    """One member of the S2V family. `resolution` is the side of the face crop in pixels (0 = the whole picture);
    `prediction` says what the head's output means (velocity or clean); `weights` empty = the bundled file."""

    name: str = "preview"
    trunk: TrunkConfig = field(default_factory=TrunkConfig)
    audio: AudioConfig = field(default_factory=AudioConfig)
    text: TextConfig = field(default_factory=TextConfig)
    motion: MotionConfig = field(default_factory=MotionConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    prediction: str = "velocity"
    autoencoder: str = "warp"
    speech_encoder: str = "logmel"
    resolution: int = 192
    weights: str = ""
