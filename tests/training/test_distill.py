"""Distillation: rollouts equal those of inference, gradients are taken block by block, and only the updated role changes."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from test_objectives import batch as batch
from test_objectives import config_of
from torch.testing import assert_close

from sonic.checkpoint.load import fill
from sonic.checkpoint.lora import read_lora
from sonic.config import AdapterConfig, SamplerConfig
from sonic.geometry import BlockSpan
from sonic.inference.rollout import NoiseSource, Sampling, rollout
from sonic.model.dit import AvatarDiT
from sonic.sampling.schedules import sigmas_of
from sonic.system.files import save_tensors
from sonic.training.build import halved
from sonic.training.initial_weights import load_initial_weights
from sonic.training.objective_config import ConsistencyConfig, DmdConfig, WindowConfig
from sonic.training.objectives.consistency import Consistency, teacher_path
from sonic.training.objectives.dmd import DistributionMatching, Start, roll
from sonic.training.objectives.transformer import conditions_of

LORA, OWN = AdapterConfig(rank=4, alpha=8.0, targets=["self_attention", "mlp_in", "mlp_out"]), AdapterConfig()
CONFIGS = {"consistency": ConsistencyConfig, "dmd": DmdConfig}
OBJECTIVES = {"consistency": Consistency, "dmd": DistributionMatching}
ROLES = [("consistency", "student"), ("dmd", "student"), ("dmd", "critic")]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made(name, learn=LORA, *, steps=2, prediction="clean", **changes):
    """An objective whose transformers start from the same teacher, without zero weights."""
    torch.manual_seed(0)
    config = CONFIGS[name](sampler=SamplerConfig(sample_steps=steps), learn=learn, window=WindowConfig(max_first_block=3), **changes)
    objective = OBJECTIVES[name](config_of(config, prediction))
    teacher = AvatarDiT(objective.model_config)
    for module in objective.pretrained:
        torch.manual_seed(1)
        with torch.no_grad():
            for (own, weight), _ in zip(module.named_parameters(), range(10_000), strict=False):
                if "adapters" not in own:
                    weight.copy_(dict(teacher.named_parameters())[own])
                    weight.add_(0.1 * torch.randn_like(weight))
    return objective


def away(objective, role="student", seed=5):
    """Move a role away from the teacher."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in objective.roles[role].parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return objective


def descend(objective, role, batch, seed=1):
    loss = 0.0
    for part, _ in objective.losses(role, batch, seeded(seed)):
        part.backward()
        loss += part.item()
    return loss


@pytest.mark.parametrize(("name", "role"), ROLES)
@pytest.mark.parametrize("learn", [LORA, OWN], ids=["shared base", "own models"])
def test_an_update_changes_all_weights_of_its_role_and_no_others(name, role, learn, batch):
    objective = away(made(name, learn))
    for each in objective.roles.values():
        each.zero_grad()
    descend(objective, role, batch)
    touched = {own: {p for p, w in module.named_parameters() if w.grad is not None} for own, module in objective.roles.items()}
    assert all(bool(found) == (own == role) for own, found in touched.items())
    frozen = [w for module in objective.modules.values() for w in module.parameters() if not w.requires_grad]
    assert frozen and all(weight.grad is None for weight in frozen)


@pytest.mark.parametrize(("name", "role"), [("consistency", "student"), ("dmd", "critic")])
def test_one_batch_is_overfitted(name, role, batch):
    objective = away(made(name, **({"leap": 40} if name == "consistency" else {})), role)
    optimizer = torch.optim.Adam(objective.roles[role].parameters(), 3e-3)
    losses = []
    while len(losses) < 60 and (not losses or losses[-1] >= 0.6 * losses[0]):
        optimizer.zero_grad()
        losses.append(descend(objective, role, batch))
        optimizer.step()
    assert losses[-1] < 0.6 * losses[0]


def test_a_student_follows_its_gradient_to_a_video(batch, monkeypatch):
    """With a gradient towards one video in place of critic and teacher, the student overfits that video."""
    objective = away(made("dmd", steps=1, anchor_share=0.0))
    goal = torch.randn(1, 16, 1, 4, 4, generator=seeded(4)).expand_as(batch["latents"])
    monkeypatch.setattr(objective, "_gradient", lambda start, latents, rng: (latents - goal, {}))
    optimizer = torch.optim.Adam(objective.roles["student"].parameters(), 3e-2)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        losses.append(descend(objective, "student", batch))
        optimizer.step()
    assert losses[-1] < 0.6 * losses[0]


def test_the_gradient_points_from_the_critics_prediction_to_the_teachers(batch, monkeypatch):
    objective, seen = made("dmd"), {"critic": 1.0, "teacher": -1.0}
    towards = lambda role, *given: lambda x, sigma: (x - seen[role]) / sigma.view(-1, 1, 1, 1, 1)  # noqa: E731
    monkeypatch.setattr(objective, "velocity", towards)
    start = Start(conditions_of(batch, objective.model_config), batch["latents"], 0, None)
    latents = torch.zeros_like(batch["latents"])
    gradient, _ = objective._gradient(start, latents, seeded())
    assert_close(
        gradient, torch.full_like(latents, 2.0), rtol=1e-4, atol=1e-4
    )  # the step is against it: video - gradient, on the teacher's side


def test_a_critic_equal_to_the_teacher_gives_no_gradient(batch):
    agreed, apart = away(made("dmd")), away(away(made("dmd")), "critic", seed=6)
    assert descend(agreed, "student", batch) == 0 < descend(apart, "student", batch)


@pytest.mark.parametrize("prediction", ["clean", "velocity"])
def test_a_training_rollout_equals_the_rollout_of_inference(prediction, batch):
    objective = away(made("dmd", prediction=prediction))
    given, noise = conditions_of(batch, objective.model_config), torch.randn(batch["latents"].shape, generator=seeded(2))
    block = objective.model_config.rollout.block_frames
    spans = [BlockSpan(index, index * block, block) for index in range(2)]
    source = NoiseSource(seeded(), noise=lambda span: noise[:, :, span.start : span.stop])
    with objective.networks.use_role("student") as model:
        expected = torch.cat([b.latents for b in rollout(model, given, spans, sampling=Sampling(objective.config.sampler, source))], dim=2)
        with torch.no_grad():
            found = roll(model, Start(given, noise, 0, None), objective.sigmas)
    last = found.before[-1] + (0 - objective.sigmas[-2].item()) * (found.before[-1] - found.clean[-1]) / objective.sigmas[-2].item()
    assert_close(last, expected, atol=1e-6, rtol=1e-6)


def test_an_anchored_rollout_starts_with_the_true_block_and_later_blocks_attend_to_it(batch):
    objective = away(made("dmd"))
    given, noise = conditions_of(batch, objective.model_config), torch.randn(batch["latents"].shape, generator=seeded(2))
    with objective.networks.use_role("student") as model, torch.no_grad():
        free, anchored = (roll(model, Start(given, noise, 0, truth), objective.sigmas) for truth in (None, batch["latents"]))
    assert torch.equal(anchored.clean[-1][:, :, :3], batch["latents"][:, :, :3])
    assert (anchored.clean[-1][:, :, 3:] - free.clean[-1][:, :, 3:]).abs().max() > 1e-4


def test_the_true_block_gets_no_gradient_and_the_others_do(batch):
    objective = away(away(made("dmd", steps=1, anchor_share=1.0)), "critic", seed=6)
    first, second = (part.item() for part, _ in _backward_each(objective, batch))
    assert first < 1e-8 < 1e-4 < second


def test_each_block_is_backpropagated_separately(batch):
    objective = away(away(made("dmd", steps=1, anchor_share=0.0)), "critic", seed=6)
    parts = list(zip(*((part.detach(), figures) for part, figures in _backward_each(objective, batch)), strict=True))[0]
    assert len(parts) == 2 and all(part > 0 for part in parts)
    replayed = {name: w.grad.clone() for name, w in objective.roles["student"].named_parameters()}
    for module in objective.roles.values():
        module.zero_grad()
    first = next(iter(objective.losses("student", batch, seeded(1))))[0]
    first.backward()  # nothing of the second block is needed for the first
    assert any(not torch.equal(w.grad, replayed[name]) for name, w in objective.roles["student"].named_parameters())
    assert_close(first.detach(), parts[0])


def test_the_students_losses_by_noise_level_add_up_to_its_loss_and_the_scores_are_logged(batch):
    objective = away(away(made("dmd", steps=1, anchor_share=1.0)), "critic", seed=6)
    parts = [(part.item(), figures) for part, figures in objective.losses("student", batch, seeded(1))]
    figures = parts[-1][1]
    levels = [value for name, value in figures.items() if name.startswith("loss_sigma_")]
    mean = sum(float(value.total) for value in levels) / sum(float(value.weight) for value in levels)
    assert len(levels) == 4 and mean == pytest.approx(sum(part for part, _ in parts), rel=1e-4)
    assert figures["critic/score_rms"] > 0 and figures["teacher/score_rms"] > 0 and 0 < figures["score_cosine"] < 1
    assert figures["score_difference_rms"] > 0 and figures["dmd_gradient_rms"] > 0 and figures["dmd_normaliser"] > 0


def _backward_each(objective, batch):
    for part, figures in objective.losses("student", batch, seeded(1)):
        part.backward()
        yield part, figures


def test_a_student_equal_to_the_teacher_has_no_loss_for_one_teacher_step(batch):
    """Without guidance and with as many steps as the teacher the loss is zero."""
    objective = made("consistency", steps=4, teacher_steps=4, leap=4)
    loss, figures = next(objective.losses("student", batch, seeded()))
    assert loss < 1e-8 and figures["motion_ratio"] > 0


def test_the_teachers_path_runs_through_the_students_levels():
    for schedule, steps in (("linear", 3), ("live_avatar", 4), ("unipc", 2), ("linear", 1)):
        sampler = SamplerConfig(schedule=schedule, sample_steps=steps)
        path, stride = teacher_path(sampler, 40)
        levels = sigmas_of(schedule, sampler.sample_steps, 3.0)
        assert_close(path[::stride], levels)
        assert (path.diff() < 0).all()


def test_the_target_after_the_teachers_steps_is_predicted_by_the_student(batch):
    """With leap=1 the student predicts the rest of the step, so a student unlike the teacher has another target than with leap=8."""
    short, whole = (away(made("consistency", steps=1, teacher_steps=8, leap=leap, start_share=1.0)) for leap in (1, 8))
    found = [next(o.losses("student", batch, seeded()))[0].item() for o in (short, whole)]
    assert found[0] != found[1] and min(found) > 0


def test_exported_adapters_are_the_student_and_state_their_alpha(batch, tmp_path):
    objective = away(made("consistency"))
    path = tmp_path / "student.safetensors"
    save_tensors(halved(objective.export(objective.roles["student"].state_dict())), path, objective.metadata)
    assert read_lora(path).alpha == LORA.alpha
    alone = AvatarDiT(objective.model_config)
    alone.load_state_dict({n: w for n, w in objective.modules["base"].state_dict().items() if "adapters" not in n})
    save_tensors(halved(alone.state_dict()), tmp_path / "base.safetensors")
    fill(alone, tmp_path / "base.safetensors", lora=read_lora(path))
    given, noise = conditions_of(batch, objective.model_config), batch["latents"]
    with objective.networks.use_role("student") as model, torch.no_grad():
        expected = model.forward_blocks(noise, torch.full((2,), 700.0), given)
        assert_close(alone.forward_blocks(noise, torch.full((2,), 700.0), given), expected, atol=2e-3, rtol=2e-3)


def test_exported_adapters_load_into_peft(tmp_path):
    peft = pytest.importorskip("peft")
    objective = away(made("consistency"))
    tensors = objective.export(objective.roles["student"].state_dict())
    module = next(iter(tensors)).removeprefix("base_model.model.").rpartition(".lora_A")[0]

    class Like(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList([torch.nn.ModuleDict({"self_attn": torch.nn.ModuleDict({"q": torch.nn.Linear(32, 32)})})])

    assert module == "blocks.0.self_attn.q"
    theirs = peft.get_peft_model(Like(), peft.LoraConfig(r=4, lora_alpha=8, target_modules=[module]))
    mine = {name: t for name, t in tensors.items() if f".{module}." in name}
    found = peft.set_peft_model_state_dict(theirs, mine)
    assert not found.unexpected_keys
    x = torch.randn(3, 32)
    layer = theirs.base_model.model.blocks[0]["self_attn"]["q"]
    down, up = mine.values()
    assert_close(layer(x), layer.base_layer(x) + 2.0 * x @ down.T @ up.T)


def test_targets_that_name_nothing_are_reported(tmp_path):
    for learn in (AdapterConfig(rank=4, targets=["mouth"]), AdapterConfig(targets=["mouth"])):
        with pytest.raises(ValueError, match="mouth"):
            made("consistency", learn)


def test_the_rest_of_the_base_learns_where_targets_say_so():
    objective = made("consistency", AdapterConfig(targets=["audio_injectors"]))
    learning = {name for name, w in objective.roles["student"].named_parameters() if w.requires_grad}
    assert learning and all(name.startswith("audio_injectors") for name in learning)


def test_guidance_moves_the_teacher_away_from_the_prediction_without_audio(batch):
    plain, guided = (made("consistency", leap=40, teacher_guide_scale=scale) for scale in (1.0, 3.0))
    found = [next(o.losses("student", batch, seeded()))[0].item() for o in (plain, guided)]
    assert found[0] != found[1]
    given, sigma = conditions_of(batch, guided.model_config), torch.tensor([0.7, 0.4])
    with torch.no_grad():
        silent, with_audio = (guided._plain("teacher", each, 0)(batch["latents"], sigma) for each in (given.drop("audio"), given))
    assert not torch.equal(silent, with_audio)
    assert_close(guided.velocity("teacher", given, 0)(batch["latents"], sigma), silent + 3.0 * (with_audio - silent))


def test_a_student_needs_euler_steps_and_no_guidance():
    with pytest.raises(ValueError, match="use euler"):
        ConsistencyConfig(sampler=SamplerConfig(name="unipc"))
    with pytest.raises(ValueError, match="teacher_guide_scale"):
        DmdConfig(sampler=SamplerConfig(sample_guide_scale=2.0))


def test_a_student_continues_from_exported_adapters(tmp_path):
    first, second = (made("consistency") for _ in range(2))
    learnt = first.roles["student"].state_dict()
    for weight in learnt.values():
        weight.copy_(torch.randn(weight.shape).half())
    save_tensors(halved(first.export(learnt)), tmp_path / "student.safetensors", first.metadata)
    load_initial_weights(second, tmp_path / "student.safetensors")
    for name, weight in second.roles["student"].state_dict().items():
        assert_close(weight, learnt[name])


def test_adapters_learnt_at_another_alpha_are_refused(tmp_path):
    first, second = made("consistency"), made("consistency", AdapterConfig(rank=4, alpha=16.0, targets=LORA.targets))
    save_tensors(halved(first.export(first.roles["student"].state_dict())), tmp_path / "student.safetensors", first.metadata)
    with pytest.raises(ValueError, match=r"alpha 8\.0, not with objective\.learn\.alpha=16\.0; use objective\.learn\.alpha=8\.0"):
        load_initial_weights(second, tmp_path / "student.safetensors")


def test_a_file_of_other_adapters_is_refused(tmp_path):
    save_file({"base_model.model.blocks.9.self_attn.q.lora_A.weight": torch.zeros(4, 32)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no tensor that fits"):
        load_initial_weights(made("consistency"), tmp_path / "other.safetensors")
