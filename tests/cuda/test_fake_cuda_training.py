"""Every training step runs on a (fake) CUDA device: losses, gradients, clipping, AdamW and the average, with one wait of the host each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest
import torch
from fake_cuda import CUDA, fake_cuda_mode, on_cuda

from torch.utils.data import default_collate

from sonic.cli import compose
from sonic.commands.train_command import ENTRY as TRAIN
from sonic.model.dit import AvatarDiT
from sonic.parallel.mesh import World
from sonic.synthetic.drawn_people import DrawnFaces
from sonic.training import loop
from sonic.training.engine import Engine
from sonic.training.objectives import OBJECTIVES
from sonic.training.train_config import TrainConfig

RECIPES = {
    "flow_match": "+train=preview_dit",
    "audio_adapter": "+train=audio_adapter",
    "dmd": "+distill=live_avatar_2step",
    "consistency": "+distill=preview_2step",
    "autoencode": "+train=preview_autoencoder",
    "portrait": "+train=preview_portrait",
    "viseme": "+train=preview_visemes",
}
MODEL = ("embed.py", "kv_cache.py")  # their look-ups are counted with the videos
KERNELS = ("_fused_adamw_", "_foreach_lerp_", "_foreach_mul_")  # of an update, each for many tensors


def small(name: str, *options: str) -> TrainConfig:
    """The recipe of a training, with a transformer of two narrow layers."""
    config = compose(TRAIN, [RECIPES[name], *options, *("data.window=6",) * (name != "audio_adapter")])
    model = config.model
    if name in ("flow_match", "audio_adapter", "dmd", "consistency"):
        trunk = replace(model.trunk, hidden_dim=64, ffn_dim=96, num_heads=2, num_layers=2, freq_dim=16)
        audio = replace(model.audio, audio_dim=16, num_audio_layers=min(2, model.audio.num_audio_layers), inject_layers=[0, 1])
        model = replace(model, trunk=trunk, audio=audio, text=replace(model.text, text_dim=16, text_len=4))
    return replace(config, model=model, budget=replace(config.budget, batch_size=2, accumulate=1))


def batch_of(config: TrainConfig) -> dict[str, torch.Tensor]:
    """A batch in host memory."""
    model, count = config.model, config.budget.batch_size
    frames, side, channels = config.data.window or 6, (model.resolution or 64) // 8, model.trunk.latent_channels
    some = lambda *shape: torch.rand(count, *shape)  # noqa: E731
    if config.objective.name == "viseme":
        return {"mel": some(8 * frames, 40), "visemes": some(4 * frames, 5)}
    if config.objective.name in ("autoencode", "portrait"):
        return default_collate([DrawnFaces(resolution=64)[0, seed] for seed in range(count)])
    batch = {"latents": some(channels, frames, side, side), "ref": some(channels, 1, side, side)}
    batch["audio"] = some(model.audio.num_audio_layers, model.audio.audio_dim, 4 * frames)
    preview = {"visemes": some(4 * frames, 5), "head": some(4 * frames, 4)}
    return batch | (preview if model.resolution else {"text": some(model.text.text_len, model.text.text_dim)})


class OnFakeCuda(Engine):
    """The engine of one process; `Module.to` cannot put fake weights in the place of real ones."""

    def to_device(self, module: torch.nn.Module) -> None:
        on_cuda(module)


def step_of(config: TrainConfig, half_base: bool = False) -> SimpleNamespace:
    """What a step of a training asks of the device, by role, and where its weights, moments and averages are."""
    objective = OBJECTIVES[config.objective.name](config, make=AvatarDiT)
    for parameter in (p for module in objective.modules.values() for p in module.parameters()):
        if half_base and not parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    with TemporaryDirectory() as folder, fake_cuda_mode() as record:
        engine = OnFakeCuda(config, World(device=CUDA), Path(folder))
        engine.prepare(objective)
        run = loop.TrainingRun(config, objective, engine, None, None, Path(folder))
        batch, found = batch_of(config), SimpleNamespace(waits={}, launches={})
        for number, role in enumerate(dict.fromkeys(objective.roles_in_step(0))):
            record.clear()
            figures = loop._update(run, role, iter([batch]), step=0, number=number, lr=1e-3)
            assert all(isinstance(value, float) for value in figures.values())
            found.waits[role], found.launches[role] = dict(record.waits), dict(record.launches)
        moments = [value for states in engine.optimizers.values() for kept in states.state.values() for value in kept.values()]
        weights = [p for module in engine.roles.values() for p in module.parameters()]
        found.devices = {str(tensor.device) for tensor in (*moments, *weights, *engine.ema.averages.values())}
    return found


STEPS = [(name, precision) for name in RECIPES for precision in ("float32", "bfloat16") if (name, precision) != ("dmd", "bfloat16")]


@pytest.mark.parametrize(("name", "precision"), STEPS)  # dmd in bfloat16 comes next
def test_fake_cuda_takes_a_step_of_every_training_with_one_wait(fake_cuda, name, precision):
    check(fake_cuda(step_of, small(name, f"speed.precision={precision}")))


@pytest.mark.parametrize("name", ["audio_adapter", "dmd", "consistency"])
def test_fake_cuda_recomputes_layers_over_a_frozen_half_precision_base(fake_cuda, name):
    check(fake_cuda(step_of, small(name, "speed.precision=bfloat16", "speed.recompute=true"), True))


def check(found: SimpleNamespace) -> None:
    """Everything that stays is on the device, an update is few kernels, and the training waits once: to read its loss and norm."""
    assert found.devices == {"cuda:0"}
    for role, waits in found.waits.items():
        training = {where: count for where, count in waits.items() if where[1].partition(":")[0] not in MODEL}
        assert [(kind, count) for (kind, _), count in training.items()] == [("copy to the host", 1)], training
        kernels = [found.launches[role].get(name, 0) for name in KERNELS]
        assert kernels[0] <= 2 and kernels[1:] == [role == "student", 1], kernels
