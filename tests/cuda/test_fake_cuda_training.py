"""Every training step runs on a (fake) CUDA device: losses, gradients, clipping, AdamW and the average, with one wait of the host each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from fake_cuda import CUDA, fake_cuda_mode, on_cuda
from torch.utils.data import default_collate

from sonic.cli import compose
from sonic.commands.train_command import ENTRY as TRAIN
from sonic.geometry import BlockSpan
from sonic.model import attention
from sonic.model.dit import AvatarDiT
from sonic.model.kv_cache import CachedContext
from sonic.parallel.mesh import World
from sonic.synthetic.drawn_people import DrawnFaces
from sonic.training import loop
from sonic.training.engine import Engine
from sonic.training.objectives import OBJECTIVES
from sonic.training.train_config import TrainConfig
from sonic.types import Conditions

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
            assert all(isinstance(value, float) for pair in figures.values() for value in pair)
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


def flex_step(config: TrainConfig) -> tuple[SimpleNamespace, list[tuple[int, int]]]:
    """A step with one attention per layer: what it asks of the device, and the numbers of queries and keys of every compiled attention."""
    calls = []

    def kernel(attend, **options):
        assert attend.__name__ == "flex_attention" and options == {"dynamic": False}
        return lambda queries, keys, values, block_mask: calls.append((block_mask.shape[-2:], queries.dtype)) or queries + values.mean()

    with patch.object(attention, "compile_once", kernel):
        return step_of(config), calls


def test_fake_cuda_trains_blocks_with_one_compiled_attention_per_layer(fake_cuda):
    config = small("flow_match", "speed.precision=bfloat16", "objective.window.attention=flex")
    found, calls = fake_cuda(flex_step, config)
    check(found)
    tokens, blocks = (config.model.resolution // 8 // config.model.trunk.patch_size[1]) ** 2, 6 // config.model.rollout.block_frames
    assert calls == [((7 * tokens, (6 + blocks + 1) * tokens), torch.bfloat16)] * 2


def ring_copies() -> tuple[int, set[torch.dtype], int]:
    """The largest conversion in the third block of a rollout under autocast; the ring's dtypes, and the size of a block's keys in it."""
    model = small("dmd").model
    with torch.device("meta"):
        dit = AvatarDiT(model)
    with fake_cuda_mode() as record, torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        on_cuda(dit)
        channels, block, audio = model.trunk.latent_channels, model.rollout.block_frames, model.audio
        some = lambda *shape: torch.empty(1, *shape, device=CUDA)  # noqa: E731
        whole = Conditions(
            ref=some(channels, 1, 8, 8),
            text=some(model.text.text_len, model.text.text_dim),
            audio=some(audio.num_audio_layers, audio.audio_dim, 12 * block),
        )
        cache = dit.prefill(whole, dit.new_cache(whole, steps=1))
        ring = cache.rings[0]
        for index in range(3):
            inputs = dit.prepare_block(whole.at(BlockSpan(index, index * block, block)), BlockSpan(index, index * block, block))
            record.clear()
            with watch_attention() as converted:
                dit.denoise_block(some(channels, block, 8, 8), torch.full((1,), 500.0, device=CUDA), inputs, cache=cache, ring=ring)
        dtypes = {buffer.dtype for part in (ring.keys, ring.values) for buffer in part.values()}
        return max(converted), dtypes, ring.block_tokens * model.trunk.hidden_dim


@contextmanager
def watch_attention() -> Iterator[list[int]]:
    """Context that lists the size of every tensor that `CachedContext.attend` converts to another dtype."""
    converted, convert, attend, inside = [0], torch.Tensor.to, CachedContext.attend, []

    def to(tensor: torch.Tensor, *args, **named) -> torch.Tensor:
        found = convert(tensor, *args, **named)
        converted.append(tensor.numel() if inside and found.dtype != tensor.dtype else 0)
        return found

    def watched(self, *args) -> torch.Tensor:
        inside.append(self)
        try:
            return attend(self, *args)
        finally:
            inside.pop()

    with patch.object(torch.Tensor, "to", to), patch.object(CachedContext, "attend", watched):
        yield converted


def test_fake_cuda_converts_no_ring_of_keys_under_autocast(fake_cuda):
    converted, dtypes, block = fake_cuda(ring_copies)
    assert dtypes == {torch.bfloat16}
    assert converted <= block


def check(found: SimpleNamespace) -> None:
    """Everything that stays is on the device, an update is few kernels, and the training waits once: to read its loss and norm."""
    assert found.devices == {"cuda:0"}
    for role, waits in found.waits.items():
        training = {where: count for where, count in waits.items() if where[1].partition(":")[0] not in MODEL}
        assert [(kind, count) for (kind, _), count in training.items()] == [("copy to the host", 1)], training
        kernels = [found.launches[role].get(name, 0) for name in KERNELS]
        assert kernels[0] <= 2 and kernels[1:] == [role == "student", 1], kernels
