"""A DiT small enough for every test, and conditions that fit it."""

from __future__ import annotations

import torch

from sonic.config import AudioConfig, ModelConfig, MotionConfig, RolloutConfig, TextConfig, TrunkConfig
from sonic.model.dit import AvatarDiT
from sonic.types import Conditions

SIZE = (16, 16)  # latent rows and columns
BLOCK = 2


def tiny_config(*, window_blocks: int = 2, ref_distance: int = 28) -> ModelConfig:
    return ModelConfig(
        trunk=TrunkConfig(hidden_dim=24, ffn_dim=32, num_heads=2, num_layers=3, patch_size=[1, 4, 4], latent_channels=4, freq_dim=16),
        audio=AudioConfig(audio_dim=6, num_audio_layers=2, num_audio_token=2, inject_layers=[0, 2]),
        text=TextConfig(text_dim=5, text_len=3),
        motion=MotionConfig(),
        rollout=RolloutConfig(block_frames=BLOCK, window_blocks=window_blocks, ref_distance=ref_distance),
    )


def tiny_model(**settings) -> AvatarDiT:
    """A model none of whose weights is zero, so that nothing hides."""
    torch.manual_seed(0)
    model = AvatarDiT(tiny_config(**settings))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    return model


def conditions(frames: int, *, batch: int = 1, motion: int | None = 3) -> Conditions:
    torch.manual_seed(1)
    return Conditions(
        ref=torch.randn(batch, 4, 1, *SIZE),
        text=torch.randn(batch, 2, 5),
        audio=torch.randn(batch, 2, 6, 4 * frames),
        motion=None if motion is None else torch.randn(batch, 4, motion, *SIZE),
        pose=torch.randn(batch, 4, frames, *SIZE),
    )
