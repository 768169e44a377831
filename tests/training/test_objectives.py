"""All training objectives, on a tiny model."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from sonic.checkpoint.bundled import BUNDLED
from sonic.config import AudioConfig, ModelConfig, MotionConfig, RolloutConfig, TextConfig, TrunkConfig
from sonic.training.objective_config import AutoencodeConfig, FlowMatchConfig, PortraitConfig, VisemeConfig
from sonic.training.objectives.autoencode import Autoencode
from sonic.training.objectives.flow_match import FlowMatch
from sonic.training.objectives.portrait_latents import PortraitLatents
from sonic.training.objectives.transformer import cell_weights
from sonic.training.objectives.viseme import VisemePretraining, encoder_input
from sonic.training.train_config import BudgetConfig, OptimConfig, TrainConfig
from sonic.types import MotionLayers
from sonic.vae.motion_vae import WarpAutoencoder


def config_of(objective, prediction="clean"):
    model = ModelConfig(
        trunk=TrunkConfig(hidden_dim=32, ffn_dim=64, num_heads=2, num_layers=2, patch_size=[1, 2, 2], latent_channels=16, freq_dim=32),
        audio=AudioConfig(audio_dim=160, num_audio_layers=1, num_audio_token=2, inject_layers=[0, 1]),
        text=TextConfig(text_dim=8, text_len=2),
        motion=MotionConfig(),
        rollout=RolloutConfig(block_frames=3, window_blocks=2),
        prediction=prediction,
    )
    return TrainConfig(model=model, objective=objective, budget=BudgetConfig(max_steps=1), optim=OptimConfig())


@pytest.fixture
def batch():
    rng = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(shape, generator=rng)  # noqa: E731
    latents, ref = draw(2, 16, 6, 4, 4), draw(2, 16, 1, 4, 4)
    sound = {"audio": draw(2, 1, 160, 24), "mel": draw(2, 48, 40), "visemes": draw(2, 24, 5).abs()}
    moved = {"flow": draw(2, 24, 2, 16, 16) / 20, "opacity": draw(2, 24, 1, 16, 16).sigmoid(), "interior": draw(2, 24, 3, 16, 16).sigmoid()}
    moved["shown"] = moved["interior"].flip(0)
    seen = {"picture": draw(2, 3, 32, 32).clamp(-1, 1), "focus": draw(2, 16, 16).sigmoid(), **moved}
    return {"latents": latents, "ref": ref, "head": torch.zeros(2, 24, 4), **sound, **seen}


FROM_NOISE = FlowMatchConfig(schedule=[1.0], schedule_share=1.0, audio_dropout=0.0)
CASES = {
    "flow_match clean": lambda: FlowMatch(config_of(FROM_NOISE)),
    "flow_match velocity": lambda: FlowMatch(config_of(FROM_NOISE, "velocity")),
    "viseme": lambda: VisemePretraining(config_of(VisemeConfig())),
    "portrait": lambda: PortraitLatents(config_of(PortraitConfig())),
}


@pytest.mark.parametrize("name", CASES)
def test_every_objective_overfits_one_batch(name, batch):
    torch.manual_seed(0)
    objective = CASES[name]()
    optimizer = torch.optim.Adam(objective.roles["student"].parameters(), 3e-3)
    losses = []
    for _ in range(60):
        loss = sum(part for part, _ in objective.losses("student", batch, torch.Generator().manual_seed(1)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("name", CASES)
def test_a_loss_is_a_function_of_its_generator(name, batch):
    torch.manual_seed(0)
    objective = CASES[name]()
    one, two = (next(objective.losses("student", batch, torch.Generator().manual_seed(7)))[0] for _ in range(2))
    assert torch.equal(one, two)


def test_the_portrait_objective_trains_the_portrait_encoder_only(batch):
    objective = CASES["portrait"]()
    next(objective.losses("student", batch, torch.Generator().manual_seed(0)))[0].backward()
    moved = {name for name, p in objective.student["autoencoder"].named_parameters() if p.grad is not None}
    assert moved and all(name.startswith("portrait.") for name in moved)
    exported = objective.export(objective.student.state_dict())
    assert exported.keys() == WarpAutoencoder().state_dict().keys()


def test_the_viseme_head_alone_is_trained_and_exported_over_the_bundled_encoder(batch):
    objective = VisemePretraining(config_of(VisemeConfig(head_only=True)))
    next(objective.losses("student", batch, torch.Generator().manual_seed(0)))[0].backward()
    moved = {name for name, p in objective.student.named_parameters() if p.grad is not None}
    assert moved == {"viseme_head.weight", "viseme_head.bias"}
    exported = objective.export(objective.student.state_dict())
    assert {name: tuple(value.shape) for name, value in exported.items()} == {"weight": (5, 160), "bias": (5,)}
    encoder = load_file(BUNDLED / "preview_speech.safetensors")
    assert all(torch.equal(value, encoder[name].float()) for name, value in objective.student["speech_encoder"].state_dict().items())


def test_an_exported_autoencoder_has_the_measured_size_of_its_latents(batch):
    objective = Autoencode(config_of(AutoencodeConfig()))
    next(objective.losses("student", batch, torch.Generator().manual_seed(0)))
    exported = objective.export(objective.roles["student"].state_dict())
    assert exported.keys() == WarpAutoencoder().state_dict().keys()
    assert not torch.equal(exported["latent_scale"], WarpAutoencoder().latent_scale)


def test_with_decoder_only_latents_stay_and_the_decoder_learns_what_is_shown(batch):
    torch.manual_seed(0)
    objective = Autoencode(config_of(AutoencodeConfig(decoder_only=True)))
    model, layers = objective.roles["student"], MotionLayers(batch["flow"], batch["opacity"], batch["interior"])
    before = model.encode(layers), model.reference(batch["picture"]).latents
    optimizer, figures = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 3e-3), []
    for _ in range(30):
        loss, found = next(objective.losses("student", batch, torch.Generator().manual_seed(1)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        figures.append(float(found["interior"]))
    assert torch.equal(model.encode(layers), before[0]) and torch.equal(model.reference(batch["picture"]).latents, before[1])
    assert figures[-1] < 0.7 * figures[0]


def test_the_export_has_the_dit_without_the_viseme_head(batch):
    objective = CASES["flow_match clean"]()
    exported = objective.export(objective.roles["student"].state_dict())
    assert exported.keys() == objective.roles["student"]["model"].state_dict().keys()


def test_training_can_start_from_weights(tmp_path):
    from sonic.system.files import save_tensors
    from sonic.training.build import halved
    from sonic.training.initial_weights import load_initial_weights

    trained, objective = CASES["flow_match clean"](), CASES["flow_match velocity"]()
    save_tensors(halved(trained.export(trained.student.state_dict())), tmp_path / "dit.safetensors")
    load_initial_weights(objective, tmp_path / "dit.safetensors")
    found = objective.student["model"].state_dict()
    for name, value in trained.student["model"].state_dict().items():
        assert_close(found[name], value.half().float())
    with pytest.raises(ValueError, match="no tensor that fits"):
        load_initial_weights(CASES["viseme"](), tmp_path / "dit.safetensors")


def test_augmentation_keeps_the_shape_and_changes_the_columns():
    columns = torch.randn(2, 10, 40)
    found = encoder_input(columns, VisemeConfig(), torch.Generator().manual_seed(0))
    assert found.shape == columns.shape and (found - columns).std() > 0.1
    quiet = VisemeConfig(audio_noise=0, tilt=0, throat=0, bend=0)
    assert_close(encoder_input(columns, quiet, torch.Generator().manual_seed(0)), columns)


@pytest.mark.parametrize(("share", "kept"), [(0.0, 1.0), (1.0, 0.0)])
def test_audio_is_dropped_for_the_share_of_clips_that_is_asked_for(share, kept, batch):
    given = FlowMatch(config_of(FlowMatchConfig(audio_dropout=share)))._dropout_conditions(batch, torch.Generator().manual_seed(0))
    assert torch.equal(given.audio, kept * batch["audio"])


@pytest.mark.parametrize("sigma", [1.0, 0.5])
def test_the_error_from_noise_is_absent_without_clips_of_pure_noise(sigma, batch):
    torch.manual_seed(0)
    objective = FlowMatch(config_of(FlowMatchConfig(schedule=[sigma], schedule_share=1.0)))
    _, figures = next(objective.losses("student", batch, torch.Generator().manual_seed(0)))
    assert bool(figures["error_from_noise"].weight == 0) == (sigma < 1)


def test_cells_that_move_count_more_and_the_mean_stays_one():
    weights = cell_weights(torch.tensor([[0.0, 1.0], [0.5, 0.5]]), gain=8.0)
    assert_close(weights.mean(), torch.tensor(1.0))
    assert_close(weights[0, 1] / weights[0, 0], torch.tensor(9.0))


def test_sigmas_are_drawn_from_the_schedule_or_uniformly():
    objective = FlowMatch(config_of(FlowMatchConfig(schedule=[1.0, 0.5], schedule_share=0.5)))
    sigmas = objective._sigmas(torch.empty(2000, 1, 6, 1, 1), torch.Generator().manual_seed(0))
    share = ((sigmas == 1.0) | (sigmas == 0.5)).float().mean()
    assert 0.45 < share < 0.55
    assert sigmas.min() > 0 and sigmas.max() == 1
