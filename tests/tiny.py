"""A DiT small enough for every test, and conditions that fit it."""

from __future__ import annotations

import torch

from sonic.config import AudioConfig, ModelConfig, MotionConfig, RolloutConfig, SamplerConfig, TextConfig, TrunkConfig
from sonic.geometry import BlockSpan
from sonic.inference.rollout import NoiseSource, Sampling, rollout
from sonic.model.dit import AvatarDiT
from sonic.parallel.context import DistributedContext
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
    """A model without zero weights, so that every part affects the output."""
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


def conditions_for(config: ModelConfig, frames: int, size: tuple[int, int]) -> Conditions:
    """Conditions for a model of any shape; `size` is in latent rows and columns."""
    rng = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=rng)  # noqa: E731
    channels, audio = config.trunk.latent_channels, config.audio
    return Conditions(
        ref=draw(1, channels, 1, *size),
        text=draw(1, config.text.text_len, config.text.text_dim),
        audio=draw(1, audio.num_audio_layers, audio.audio_dim, 4 * frames),
        motion=draw(1, channels, sum(config.motion.buckets), *size) if config.motion.buckets else None,
    )


def spans_of(number: int, block: int = BLOCK) -> list[BlockSpan]:
    return [BlockSpan(index, index * block, block) for index in range(number)]


def latents_of(
    model: AvatarDiT, conditions_: Conditions, number: int, *, seed: int = 0, context: DistributedContext | None = None, **changes
) -> torch.Tensor:
    """Latents of a video of `number` blocks, made by one rank or by several (given on the first)."""
    settings = SamplerConfig(**{"name": "euler", "schedule": "linear", "sample_steps": 2, **changes})
    source = NoiseSource(torch.Generator().manual_seed(seed))
    blocks = rollout(model, conditions_, spans_of(number), sampling=Sampling(settings, source), context=context)
    return torch.cat([block.latents for block in blocks], dim=2)
