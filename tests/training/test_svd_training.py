"""Training of Sonic's UNet on windows: what is learnt, from what noise, without which conditions; and its student in fewer steps."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from run_files import read_scalars
from safetensors.torch import load_file, save_file
from test_training_ranks import Stopped
from torch.testing import assert_close
from torch.utils.data import Dataset

from sonic.checkpoint.load import fill, shapes_of
from sonic.checkpoint.lora import read_lora
from sonic.config import AdapterConfig, ModelConfig, UNetConfig
from sonic.encoders.clip_sound import FrameBuckets, FrameTokens
from sonic.inference.denoise_windows import ClipConditions, WindowSampling, denoise_clip
from sonic.model.svd_unet import SvdUNet
from sonic.sampling.karras import HIGHEST, clean_from, karras_sigmas, noisy_start
from sonic.system.files import save_tensors
from sonic.training.build import batch_stream, engine_of, halved
from sonic.training.log import RunLog
from sonic.training.loop import TrainingRun, train
from sonic.training.objective_config import SvdAudioConfig, SvdConsistencyConfig
from sonic.training.objectives.svd_audio import NOISE, SvdAudio
from sonic.training.objectives.svd_consistency import SvdConsistency
from sonic.training.objectives.svd_windows import frames_of, noised, v_of, v_target, velocity_of
from sonic.training.train_config import BudgetConfig, CheckpointConfig, DataConfig, LogConfig, OptimConfig, SpeedConfig, TrainConfig
from sonic.training.world import join_world

FRAMES, SIZE, WIDTH, LAYERS, STATES = 3, 8, 24, 5, 16
UNET = UNetConfig(
    block_out_channels=[32, 64], num_attention_heads=[2, 4], layers_per_block=1, cross_attention_dim=WIDTH, addition_time_embed_dim=16,
    audio_tokens=4, window_frames=FRAMES,
)  # fmt: skip
MODEL = ModelConfig(name="sonic_svd", family="sonic_svd", unet=UNET)
LORA = AdapterConfig(rank=4, alpha=4.0, targets=["attn1", "to_k_ip", "ff"])


def sound_networks(config):
    """Small networks of the sound, with random weights."""
    tokens, width = config.unet.audio_tokens, config.unet.cross_attention_dim
    return FrameTokens(10 * LAYERS * STATES, 16, tokens=tokens, width=width), FrameBuckets(50 * STATES + width, 16)


class Audio(SvdAudio):
    sound_networks = staticmethod(sound_networks)


class Student(SvdConsistency):
    sound_networks = staticmethod(sound_networks)


GOALS = {
    "audio": (Audio, SvdAudioConfig(learn=AdapterConfig(targets=["to_k_ip", "to_v_ip"]))),
    "student": (Student, SvdConsistencyConfig(sample_steps=4, teacher_steps=8, learn=LORA)),
    "student apart": (Student, SvdConsistencyConfig(sample_steps=4, teacher_steps=8)),
}


class WindowsOfFrames(Dataset):
    """Random windows that depend on their key alone, or on the index of the clip."""

    def __init__(self, clips: int = 24) -> None:
        self.clips = clips

    def __len__(self):
        return self.clips

    def __getitem__(self, draw):
        rng = torch.Generator().manual_seed(draw[0])
        some = lambda *shape: torch.randn(shape, generator=rng)  # noqa: E731
        mask = torch.zeros(8 * SIZE, 8 * SIZE)
        mask[8:40, 16:48] = 1.0
        return {
            "latents": some(4, FRAMES, SIZE, SIZE), "image_latents": some(4, SIZE, SIZE), "image_embed": some(WIDTH), "face_mask": mask,
            "buckets": 16 + 8 * some(FRAMES, 2), "token_ticks": some(FRAMES, 10, LAYERS, STATES), "bucket_ticks": some(FRAMES, 50, STATES),
        }  # fmt: skip


def config_of(name, *, steps=1, accumulate=2, every=0, lr=1e-3, **speed):
    return TrainConfig(
        name="svd", model=MODEL, objective=GOALS[name][1], budget=BudgetConfig(max_steps=steps, batch_size=1, accumulate=accumulate),
        optim=OptimConfig(lr=lr, warmup_steps=1, decay_from=0.9, ema_decay=0.5), log=LogConfig(every_steps=1, bar=False),
        data=DataConfig(folder="clips", window=FRAMES), speed=SpeedConfig(device="cpu", **speed),
        checkpoint=CheckpointConfig(every_steps=every),
    )  # fmt: skip


def made(name, config=None):
    """An objective without zero weights, except those of adapters."""
    torch.manual_seed(0)
    objective = GOALS[name][0](config or config_of(name))
    torch.manual_seed(1)
    with torch.no_grad():
        for module in objective.modules.values():
            for own, weight in module.named_parameters():
                if "adapters" not in own:
                    weight.add_(0.02 * torch.randn_like(weight))
    return objective


def batch_of(count=2):
    items = [WindowsOfFrames()[(index, 0)] for index in range(count)]
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_v_of_the_true_noise_leads_back_to_the_clean_latents():
    clean, noise = torch.randn(2, 2, FRAMES, 4, SIZE, SIZE, generator=seeded())
    for level in (0.002, 1.0, 30.0, 700.0):
        sigma = torch.full((2,), level)
        x, v = noised(clean, noise, sigma), v_target(clean, noise, sigma)
        assert_close(clean_from(x, v, level), clean, atol=1e-3 * max(1, level / 10), rtol=1e-3)
        assert_close(velocity_of(v, x, sigma), noise, atol=1e-4, rtol=1e-4)
        assert_close(v_of(velocity_of(v, x, sigma), x, sigma), v, atol=2e-3, rtol=1e-3)


def test_noise_levels_are_those_of_sampling():
    steps = karras_sigmas(101)[:-1]
    drawn = NOISE["karras"](20_000, seeded()).sort(descending=True).values
    assert_close(drawn[torch.linspace(0, len(drawn) - 1, 101).long()][10:90:10].log(), steps[10:90:10].log(), atol=0.1, rtol=0)
    logs = NOISE["lognormal"](20_000, seeded()).log()
    assert float(logs.mean()) == pytest.approx(1.0, abs=0.05) and float(logs.std()) == pytest.approx(1.6, abs=0.05)
    for draw in NOISE.values():
        assert float(draw(20_000, seeded()).min()) >= 0.00199 and float(draw(20_000, seeded()).max()) <= 700.01


def test_the_picture_the_sound_and_both_are_dropped_in_five_percent_each():
    image, audio = made("audio")._kept(torch.rand(40_000, generator=seeded()))
    for kept_image, kept_audio, share in ((0, 1, 0.05), (1, 0, 0.05), (0, 0, 0.05), (1, 1, 0.85)):
        found = ((image == kept_image) & (audio == kept_audio)).float().mean()
        assert float(found) == pytest.approx(share, abs=0.005)


def test_the_teacher_follows_the_guidance_of_inference():
    objective, batch = made("student"), batch_of(1)
    noise, sigma = torch.randn(FRAMES, 4, SIZE, SIZE, generator=seeded()), torch.full((1,), HIGHEST)
    ticks = batch["token_ticks"]
    with torch.no_grad(), objective.networks.use_role("teacher") as unet:
        tokens, silence = objective.tokens(ticks)[0], objective.tokens(torch.zeros_like(ticks))[0, 0]
        given = (batch["image_latents"][0], tokens, silence, batch["buckets"][0], batch["image_embed"][0], batch["face_mask"][None])
        expected = denoise_clip(unet, ClipConditions(*given), noise, sampling=WindowSampling(steps=1, windows=UNET))
    x = noisy_start(batch["image_latents"], noise, HIGHEST)[None]
    velocity = torch.no_grad()(objective._velocity("teacher", batch, objective.guidance_rows()))(x, sigma)
    assert_close((x - HIGHEST * velocity)[0], expected, atol=5e-3, rtol=1e-3)
    only_sound = torch.no_grad()(objective._velocity("teacher", batch, [(1, 1, 1.0)]))(x, sigma)
    assert (HIGHEST * (velocity - only_sound)).abs().max() > 0.1  # the other rows count


def test_what_sonic_added_learns_and_nothing_else():
    objective = made("audio")
    loss, figures = next(objective.losses("student", batch_of(), seeded()))
    loss.backward()
    names = {name for name, weight in objective.student.named_parameters() if weight.grad is not None}
    adapters = {name for name in names if name.startswith("unet.")}
    assert adapters and all("to_k_ip" in name or "to_v_ip" in name for name in adapters)
    assert names == objective.learnt and {name.split(".")[0] for name in names} == {"unet", "audio2token", "audio2bucket"}
    assert loss.item() == pytest.approx(float(figures["v_error"] + 0.1 * figures["bucket_error"]), rel=1e-5)
    levels = [figure for name, figure in figures.items() if "loss_sigma" in name]
    assert len(levels) == 4 and sum(float(each.weight) for each in levels) == 2
    exported = objective.export(dict(objective.student.state_dict()))
    assert len(exported) == len(names) and all(name.startswith(("base_model.model.", "audio2")) for name in exported)


def test_a_perfect_prediction_has_no_error_at_any_level(monkeypatch):
    objective, batch = made("audio"), batch_of()
    clean = frames_of(batch)

    def perfect(model, x, sigma, given):
        return v_target(clean, (x - clean) / sigma.view(-1, 1, 1, 1, 1), sigma)

    monkeypatch.setattr(objective, "predict", perfect)
    _, figures = next(objective.losses("student", batch, seeded()))
    assert float(figures["v_error"]) < 1e-4
    assert objective.validation_losses(None, batch, seeded()).max() < 1e-4


def test_dropped_conditions_are_the_rows_of_the_guidance():
    objective, batch = made("audio"), batch_of()
    given, picture = objective.conditions(batch, torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0]))
    tokens = objective.sound["audio2token"]
    assert given.image_embeds[0].abs().max() == picture[0].abs().max() == 0
    assert_close(given.image_embeds[1, 0, 0], batch["image_embed"][1])
    assert_close(picture[1, 0], batch["image_latents"][1])
    assert_close(given.audio_tokens[0], tokens(batch["token_ticks"][0]))
    assert_close(given.audio_tokens[1], tokens(torch.zeros_like(batch["token_ticks"][1])))
    assert_close(given.added_ids, torch.cat((torch.full((2, 1), 12.5), batch["buckets"].mean(1)), 1))


def test_the_teachers_path_contains_the_students_levels_and_is_even_as_karras_levels_are():
    objective = made("student")
    path, root = objective.path, objective.path ** (1 / 7)
    assert objective.stride == 2 and len(path) == 9 and path[-1] == 0
    assert torch.equal(path[::2], karras_sigmas(4))
    assert_close(root[1::2], (root[:-1:2] + root[2::2]) / 2)


def test_a_student_that_is_its_teacher_without_guidance_aims_at_its_own_steps():
    """With a leap of a whole step and one step of the teacher in it, the target is what the teacher itself predicts."""
    goal = replace(GOALS["student"][1], teacher_steps=4, teacher_guide_scale=1.0, teacher_audio_guide_scale=1.0)
    objective = made("student", replace(config_of("student"), objective=goal))
    assert objective.guidance_rows() == [(1, 1, 1.0)]
    assert float(next(objective.losses("student", batch_of(), seeded()))[0].detach()) < 1e-6


@pytest.mark.parametrize(("name", "lr"), [("audio", 3e-3), ("student", 3e-3), ("student apart", 3e-4)])
def test_the_loss_of_the_same_windows_falls(name, lr, tmp_path):
    run = run_of(tmp_path, name, steps=12, lr=lr, clips=2)

    def measured():
        with torch.no_grad():
            return sum(float(next(run.objective.losses("student", batch_of(), seeded(number)))[0]) for number in range(4))

    before = measured()
    train(run)
    assert measured() < 0.97 * before


def run_of(folder, name, *, clips=24, **settings):
    config = config_of(name, **settings)
    objective, world = made(name, config), join_world(torch.device("cpu"))
    log, engine = RunLog(Path(folder), config.log, name="svd", main=world.main), engine_of(config, world, Path(folder))
    return TrainingRun(config, objective, engine, batch_stream(config, WindowsOfFrames(clips), world), log, Path(folder))


def trained(folder, name, settings):
    run = run_of(folder, name, **settings)
    train(run)
    return {key: value.clone() for key, value in run.engine.weights(run.objective.exports).items()}


def stopped(folder, name, settings, at):
    run = run_of(folder, name, every=at, **settings)
    real = run.engine.step

    def step(role, *, rate, step):
        if step == at:
            raise Stopped
        return real(role, rate=rate, step=step)

    run.engine.step = step
    with pytest.raises(Stopped):
        train(run)
    run.engine.checkpoints.settle()


def losses_in(folder):
    return torch.tensor([[line["student/loss"], line["student/grad_norm"]] for line in read_scalars(Path(folder))])


@pytest.mark.parametrize("name", ["audio", "student"])
def test_an_interrupted_training_goes_on_bit_for_bit(name, tmp_path):
    whole = trained(tmp_path / "whole", name, {"steps": 3})
    stopped(tmp_path / "parts", name, {"steps": 3}, 2)
    again = trained(tmp_path / "parts", name, {"steps": 3})
    assert whole.keys() == again.keys() and all(torch.equal(value, again[key]) for key, value in whole.items())


@pytest.mark.parametrize("name", ["audio", "student"])
def test_blocks_computed_again_change_nothing(name, tmp_path):
    plain, again = (trained(tmp_path / str(flag), name, {"steps": 2, "recompute": flag}) for flag in (False, True))
    assert all(torch.equal(value, again[key]) for key, value in plain.items())


def launched(folder, name, settings):
    os.environ.update(RANK=str(dist.get_rank()), WORLD_SIZE=str(dist.get_world_size()), LOCAL_RANK=str(dist.get_rank()))
    return trained(folder, name, settings)


@pytest.mark.parametrize("engine", ["fsdp", "zero2", "zero3"])
@pytest.mark.parametrize("name", ["audio", "student"])
def test_two_processes_train_as_one(name, engine, tmp_path):
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    settings = {"steps": 3, "accumulate": 2}
    alone = trained(tmp_path / "one", name, settings)
    both = on_ranks(2, launched, str(tmp_path / "two"), name, {**settings, "engine": engine, "recompute": True})[0]
    assert_close(losses_in(tmp_path / "two"), losses_in(tmp_path / "one"), rtol=1e-4, atol=1e-6)
    assert both.keys() == alone.keys()
    for key, value in alone.items():
        assert_close(both[key], value, rtol=1e-3, atol=1e-4)


def test_the_unet_is_sharded_and_not_only_copied(tmp_path):
    assert max(on_ranks(2, share_held, str(tmp_path))) < 0.55


def share_held(folder):
    run = run_of(folder, "audio", engine="fsdp")
    run.engine.prepare(run.objective)
    weights = list(run.objective.networks.modules["student"].parameters())
    return sum(getattr(w, "to_local", lambda w=w: w)().numel() for w in weights) / sum(w.numel() for w in weights)


@pytest.mark.parametrize(("engine", "ranks"), [("local", 1), ("fsdp", 2), ("zero2", 2)])
def test_half_precision_trains_like_float32(engine, ranks, tmp_path):
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    trained(tmp_path / "exact", "audio", {"steps": 2})
    half = {"steps": 2, "precision": "bfloat16", "engine": engine}
    on_ranks(2, launched, str(tmp_path / "half"), "audio", half) if ranks > 1 else trained(tmp_path / "half", "audio", half)
    exact, half = losses_in(tmp_path / "exact"), losses_in(tmp_path / "half")
    assert not torch.equal(half, exact)
    assert_close(half, exact, rtol=0.05, atol=0)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"data": DataConfig(folder="clips", window=9)}, "data.window=9: model=sonic_svd denoises windows of 3 frames; use 3"),
        ({"speed": SpeedConfig(engine="fsdp", context=2)}, "speed.context=2: objective=svd_audio does not divide a window"),
    ],
)
def test_what_does_not_fit_a_window_is_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        made("audio", replace(config_of("audio"), **changes))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"noise": "uniform"}, "objective.noise=uniform"),
        ({"drop_both": 0.95}, "together at most 1"),
        ({"learn": AdapterConfig(rank=4)}, "objective.learn.rank=4: svd_audio trains whole weights"),
    ],
)
def test_options_that_cannot_be_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        SvdAudioConfig(**options)


@pytest.mark.parametrize("name", ["audio", "student", "student apart"])
def test_what_is_exported_loads_over_the_weights_that_it_changes(name, tmp_path):
    run = run_of(tmp_path, name, steps=2, lr=1e-2)
    objective, base = run.objective, tmp_path / "unet.safetensors"
    start = next(iter(objective.networks.modules.values())).state_dict()
    save_file({key: value.clone() for key, value in start.items() if "adapters" not in key.split(".")}, base)
    train(run)
    save_tensors(halved(objective.export(run.engine.weights(objective.exports))), tmp_path / "changes.safetensors", objective.metadata)
    unet, lora = SvdUNet(UNET).requires_grad_(False), read_lora(tmp_path / "changes.safetensors")
    fill(unet, base, lora=lora)
    changed = {key for key, value in unet.state_dict().items() if not torch.equal(value, load_file(base)[key])}
    assert changed == {*lora.replaced, *lora.adapters} and changed
    assert bool(lora.beside) == (name == "audio") and bool(lora.adapters) == (name == "student")
    batch, sigma = batch_of(1), torch.full((1,), 2.0)
    with torch.no_grad():
        for key, average in run.engine.ema.averages.items():
            dict(objective.roles["student"].named_parameters())[key].copy_(average)
        given = objective.conditions(batch, torch.ones(1), torch.ones(1))
        with objective.networks.use_role("student") as trained_unet:
            expected = objective.predict(trained_unet, frames_of(batch), sigma, given=given)
        found = objective.predict(unet, frames_of(batch), sigma, given=given)
    assert_close(found, expected, atol=5e-3, rtol=5e-3)


def test_a_student_of_changed_weights_exports_the_changes_too(tmp_path):
    objective = made("student")
    kept = {"base_model.model.conv_in.bias": torch.ones(32), "audio2token.proj1.weight": torch.ones(2)}
    objective.changes = kept
    assert objective.keeps_changes
    exported = objective.export(dict(objective.roles["student"].state_dict()))
    assert all(torch.equal(exported[name], value) for name, value in kept.items())
    assert all(name in kept or ".lora_" in name for name in exported)


def test_a_file_with_a_tensor_of_no_weight_of_the_model_is_refused(tmp_path):
    save_file({"base_model.model.conv_in.bias": torch.ones(31)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"conv_in.bias is for a weight of shape \[31\], the model's has \[32\]"):
        read_lora(tmp_path / "a.safetensors").check(shapes_of(SvdUNet(UNET)))
    save_file({"base_model.model.conv_un.bias": torch.ones(32)}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="adapts 1 of 1 weights that the model lacks: conv_un.bias"):
        read_lora(tmp_path / "b.safetensors").check(shapes_of(SvdUNet(UNET)))
