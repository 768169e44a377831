"""Gradients of a DiT stay of one size while conditions are dropped, from random weights and from bundled ones."""

from __future__ import annotations

import pytest
import torch

from sonic.checkpoint.bundled import named_weights
from sonic.cli import compose
from sonic.commands.train_command import ENTRY
from sonic.config import AudioConfig, ModelConfig, MotionConfig, RolloutConfig, TextConfig, TrunkConfig
from sonic.parallel.mesh import World
from sonic.training.engine import Engine
from sonic.training.initial_weights import load_initial_weights
from sonic.training.objective_config import FlowMatchConfig, WindowConfig
from sonic.training.objectives.flow_match import FlowMatch
from sonic.training.optim import rate
from sonic.training.train_config import BudgetConfig, OptimConfig, TrainConfig

STEPS = 200


def model_of(width, layers, *, tokens, inject, audio_layers=1, buckets=(), text=(8, 2), prediction="clean", patch=3):
    return ModelConfig(
        trunk=TrunkConfig(hidden_dim=width, ffn_dim=2 * width, num_heads=2, num_layers=layers, patch_size=[1, patch, patch], freq_dim=16),
        audio=AudioConfig(audio_dim=12, num_audio_layers=audio_layers, num_audio_token=tokens, inject_layers=list(inject)),
        text=TextConfig(*text),
        motion=MotionConfig(buckets=list(buckets)),
        rollout=RolloutConfig(block_frames=3, window_blocks=2),
        prediction=prediction,
    )


DROPPED = {"audio_dropout": 0.5, "viseme_weight": 0.0}
CLIP = FlowMatchConfig(**DROPPED, schedule_share=0.0, window=WindowConfig(reach="clip", past=3, past_noise=0.3))
SIZES = {
    "narrow": (model_of(24, 1, tokens=2, inject=[0]), FlowMatchConfig(**DROPPED)),
    "like the preview": (model_of(48, 4, tokens=8, inject=[0, 2]), FlowMatchConfig(**DROPPED)),
    "like Wan": (
        model_of(36, 3, tokens=4, inject=[0, 1, 2], audio_layers=5, buckets=[1, 2, 16], text=(16, 6), prediction="velocity", patch=1),
        CLIP,
    ),
}


def batches(model, rng, frames):
    """Latents that follow the sound, and prompts that fill half of the rows."""
    audio, channels = model.audio, model.trunk.latent_channels
    side = model.trunk.patch_size[-1] * (4 if model.motion.buckets else 2)
    follow = torch.randn(audio.audio_dim, channels, generator=rng) / 4
    while True:
        sound = torch.randn(2, audio.num_audio_layers, audio.audio_dim, 4 * frames, generator=rng)
        moved = torch.einsum("b e f, e c -> b c f", sound.mean(1), follow)[..., ::4, None, None]
        still = torch.randn(2, channels, 1, side, side, generator=rng)
        text = torch.randn(2, model.text.text_len // 2, model.text.text_dim, generator=rng)
        yield {"latents": moved + 0.3 * still, "ref": still, "audio": sound, "text": text}


def gradient_norms(objective, config, steps, folder):
    """The norm of the gradient in each step of a training, before it is clipped."""
    engine = Engine(config, World(), folder)
    engine.prepare(objective)
    window = objective.config.window
    stream, norms = batches(config.model, torch.Generator().manual_seed(1), 6 + window.past), []
    for step in range(steps):
        loss, _ = next(objective.losses("student", next(stream), torch.Generator().manual_seed(step)))
        engine.backward("student", loss)
        norms.append(float(engine.step("student", rate=rate(step, step / steps, config.optim), step=step)))
    return torch.tensor(norms)


def config_of(model, objective):
    return TrainConfig(model=model, objective=objective, budget=BudgetConfig(max_steps=STEPS), optim=OptimConfig())


@pytest.mark.parametrize("size", SIZES)
def test_from_random_weights_no_gradient_is_twenty_times_the_usual_one(size, tmp_path):
    config = config_of(*SIZES[size])
    torch.manual_seed(0)
    norms = gradient_norms(FlowMatch(config), config, STEPS, tmp_path)
    print(f"{size}: median {norms.median():.3g}, largest {norms.max():.3g}, ratio {norms.max() / norms.median():.1f}")
    assert norms.max() < 20 * norms.median()


def test_bundled_weights_that_go_on_learning_have_gradients_of_one_size(tmp_path):
    """They were trained from biases of zero, and have others now."""
    config = compose(ENTRY, ["+train=preview_videos", "speed.precision=float32", "objective.audio_dropout=0.5", "budget.batch_size=2"])
    torch.manual_seed(0)
    objective = FlowMatch(config)
    load_initial_weights(objective, named_weights(config.init_from))
    norms = gradient_norms(objective, config, 6, tmp_path)
    assert norms.max() < 20 * norms.median()
