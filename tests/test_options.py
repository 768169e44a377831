"""Common options (steps, guidance, precision, sizes, lengths) and the names that other programs have for them."""

from __future__ import annotations

import json

import pytest
import torch
from test_configs import ENTRIES, INFER, NEEDED

from sonic.cli import compose, entry_options, group_choices, help_text, run_command
from sonic.commands import infer_command, plan_command
from sonic.config import PRECISIONS, ModelConfig, VideoConfig, precision_of, settled_video
from sonic.families.family import build_components, family_of
from sonic.inference.report import sampling_of, sampling_words
from sonic.option_names import SHORT, SYNONYMS
from sonic.planner.search import search_plans
from sonic.planner.workload import workload
from sonic.sampling.schedules import sigmas_of

PLAN, BENCH = ENTRIES["plan"], ENTRIES["bench"]
SIZED = ("infer", "plan", "bench", "evaluate")
OWN = {
    "preview": "float32",
    "preview_velocity": "float32",
    "wan_s2v_14b": "bfloat16",
    "live_avatar_14b": "bfloat16",
    "sonic_svd": "bfloat16",
}


def levels(sampler):
    return sigmas_of(sampler.schedule, sampler.sample_steps, sampler.sample_shift).tolist()


@pytest.mark.parametrize("model", group_choices("model"))
@pytest.mark.parametrize(("command", "steps"), [*(("infer", steps) for steps in range(1, 9)), ("plan", 1), ("bench", 8), ("evaluate", 5)])
def test_any_number_of_steps_goes_with_every_model(command, steps, model):
    found = compose(ENTRIES[command], [f"model={model}", f"sampler.sample_steps={steps}"]).sampler
    assert found.sample_steps == steps == len(levels(found)) - 1


@pytest.mark.parametrize("steps", [2, 8])
@pytest.mark.parametrize("model", group_choices("model"))
@pytest.mark.parametrize("preset", group_choices("preset"))
def test_any_number_of_steps_goes_with_every_preset(preset, model, steps):
    given = [f"model={model}", f"+preset={preset}"]
    try:
        usual = compose(INFER, given).sampler
    except ValueError:
        return  # test_a_preset_fits_every_model_or_says_why_not
    found = compose(INFER, [*given, f"sampler.sample_steps={steps}"]).sampler
    assert (found.sample_steps, found.schedule, found.name) == (steps, usual.schedule, usual.name)


@pytest.mark.parametrize("steps", [3, 4])
def test_every_way_to_choose_a_table_gives_the_same_noise_levels(steps):
    model = "model=live_avatar_14b"
    typed = f"sampler.sample_steps={steps}"
    ways = [typed], [f"sampler=live_avatar_{steps}step"], ["sampler=live_avatar", typed]
    by_number, *others = (levels(compose(INFER, [model, *way]).sampler) for way in ways)
    assert others == [by_number, by_number]
    recipe = compose(ENTRIES["train"], [f"distill=live_avatar_{steps}step"]).objective.sampler
    assert levels(recipe) == by_number


def test_typed_options_override_those_of_a_sampler():
    found = compose(INFER, ["model=live_avatar_14b", "sampler=live_avatar_3step", "sampler.sample_steps=6"]).sampler
    assert (found.schedule, found.sample_steps) == ("live_avatar", 6)


def test_a_shift_without_effect_is_refused():
    with pytest.raises(ValueError, match="sampler.sample_shift=5.0 is not read by schedule=live_avatar"):
        compose(INFER, ["model=live_avatar_14b", "sampler.sample_shift=5"])


def test_the_planner_proposes_fewer_steps_that_fit():
    tight = ["hardware=1xh200", "parallel=single", "hardware.usable_gib=65", "model=live_avatar_14b", "video=704x384"]
    (fewer,) = (change for change in search_plans(compose(PLAN, tight)).changes if "steps" in change.sentence)
    assert search_plans(compose(PLAN, [*tight, *fewer.options])).fits


def message_of(*argv: str) -> dict:
    config = compose(INFER, argv)
    return sampling_of(config.sampler, "a file", torch.bfloat16, timesteps=family_of(config.model).timesteps(config.sampler))


def test_a_run_says_which_noise_levels_it_uses():
    found = message_of("model=live_avatar_14b")
    assert (found["table"], found["timesteps"]) == (True, [1000, 857.692, 602.151, 8.929])
    levels = "euler, 4 steps of schedule live_avatar (its table): timesteps 1000, 857.7, 602.2, 8.9"
    assert sampling_words(found) == f"{levels}; no guidance; weights: a file in bfloat16"
    found = message_of("model=live_avatar_14b", "sampler.sample_steps=2")
    assert (found["table"], found["sigmas"]) == (False, [1, 0.751121, 0])
    found = message_of("model=wan_s2v_14b")
    assert found["timesteps"][:3] == [999, 991, 982]  # whole, as the solver rounds them down
    assert "timesteps 999, 991, 982, ..., 136, 71; guidance 4.5" in sampling_words(found)


@pytest.mark.parametrize(
    ("steps", "more", "weights"),
    [
        (3, [], "preview_dit.safetensors + preview_3step.safetensors"),
        (6, [], "preview_dit.safetensors without adapters (no bundled student has learnt 6 steps; there are those of: 1, 2, 3, 4)"),
        (6, ["weights=student"], "preview_dit.safetensors + preview_4step.safetensors"),
        (3, ["weights=teacher"], "preview_dit.safetensors"),
    ],
)
def test_the_preview_uses_the_weights_made_for_the_number_of_steps(steps, more, weights):
    config = compose(INFER, [f"sampler.sample_steps={steps}", "device=cpu", *more])
    assert build_components(config.model, config.run, steps=steps).weights == weights


@pytest.mark.parametrize("model", group_choices("model"))
def test_guidance_of_zero_is_off(model):
    one, zero = (compose(INFER, [f"model={model}", f"sampler.sample_guide_scale={scale}"]) for scale in (1, 0))
    assert zero == one
    planned = [workload(compose(PLAN, [f"model={model}", f"sampler.sample_guide_scale={scale}"])) for scale in (1, 0)]
    assert planned[0] == planned[1]


@pytest.mark.parametrize("model", group_choices("model"))
def test_each_model_has_a_default_precision(model):
    for name in ("infer", "plan", "bench"):
        config = compose(ENTRIES[name], [f"model={model}"])
        assert precision_of(config.run.dtype, config.model) == OWN[model]
    assert workload(compose(PLAN, [f"model={model}"])).dtype_bytes == {"float32": 4, "bfloat16": 2}[OWN[model]]
    assert compose(ENTRIES["train"], [*NEEDED["train"], f"model={model}"]).speed.precision == OWN[model]
    for asked in PRECISIONS:
        config = compose(INFER, [f"model={model}", f"run.dtype={asked}"])
        assert precision_of(config.run.dtype, config.model) == asked
        typed = [*NEEDED["train"], f"model={model}", f"speed.precision={asked}"]
        assert compose(ENTRIES["train"], typed).speed.precision == asked


@pytest.mark.parametrize("model", group_choices("model"))
@pytest.mark.parametrize("preset", group_choices("preset"))
def test_presets_leave_the_precision_to_the_model(preset, model):
    try:
        config = compose(INFER, [f"model={model}", f"+preset={preset}"])
    except ValueError:
        return
    assert precision_of(config.run.dtype, config.model) == OWN[model]


def test_the_help_says_that_the_default_precision_is_the_models():
    line = next(line for line in help_text(INFER).splitlines() if "run.dtype=" in line)
    assert "run.dtype=auto" in line and "the model's own" in line


@pytest.mark.parametrize("command", SIZED)
def test_a_size_with_a_star_is_the_size_with_a_cross(command, capsys):
    shown = []
    for size in ("384*256", "384x256"):
        assert run_command(ENTRIES[command], lambda config, run: None, ["--cfg", f"video.size={size}"]) == 0
        shown.append(capsys.readouterr().out.replace(size, "SIZE"))
    assert shown[0] == shown[1]


def test_a_plan_for_a_size_with_a_star_is_the_plan_for_the_size(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, size in (("star", "384*256"), ("cross", "384x256")):
        argv = ["model=live_avatar_14b", "hardware=4x24gb", f"video.size={size}", f"json={name}.json"]
        assert run_command(PLAN, plan_command.plan, argv) == 0
    star, cross = (
        json.loads((tmp_path / f"{name}.json").read_text().replace("'", "").replace(size, "SIZE"))  # commands quote a star
        for name, size in (("star", "384*256"), ("cross", "384x256"))
    )
    assert star == cross and star["fits"]


@pytest.mark.parametrize("model", ["preview", "live_avatar_14b"])
@pytest.mark.parametrize("frames", [1, 32])
def test_any_number_of_frames_limits_a_video_that_is_made_block_by_block(model, frames):
    for name in ("infer", "plan", "bench"):
        video = compose(ENTRIES[name], [f"model={model}", f"video.infer_frames={frames}", "video.num_clip=50"]).video
        assert (video.infer_frames, video.num_clip) == (frames, 50)


@pytest.mark.parametrize(
    ("typed", "way_out"),
    [
        (["model=live_avatar_14b", "compat=upstream", "video.infer_frames=32"], "multiple of 12 .*use 24 or 36"),
        (["model=wan_s2v_14b", "video.infer_frames=30"], "multiple of 4 .*use 28 or 32"),
    ],
)
def test_clips_of_whole_blocks_or_latent_frames_need_their_multiple(typed, way_out):
    with pytest.raises(ValueError, match=way_out):
        compose(INFER, typed)


def test_resolving_video_options_does_not_change_the_arguments():
    video, model = VideoConfig(infer_frames=24, compat="upstream"), ModelConfig()
    found, settled = settled_video(video, model)
    assert (video, model) == (VideoConfig(infer_frames=24, compat="upstream"), ModelConfig())
    assert (found.fps, settled.rollout.window_blocks) == (25, 2)


@pytest.mark.parametrize("prefix", ["", "sampler."])
@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("cfg_scale", "sample_guide_scale"),
        ("guidance_scale", "sample_guide_scale"),
        ("guidence_scale", "sample_guide_scale"),
        ("cfg", "sample_guide_scale"),
        ("steps", "sample_steps"),
        ("num_inference_steps", "sample_steps"),
        ("num_inference_step", "sample_steps"),
    ],
)
def test_option_names_of_other_programs_are_answered_with_ours(prefix, typed, meant):
    first = f"sampler has: {meant}" if prefix else f"choose one of: sampler.{meant}"
    with pytest.raises(ValueError, match=f"{prefix}{typed} is not an option; {first}"):
        compose(INFER, [f"{prefix}{typed}=4"])


def test_only_short_names_of_the_command_itself_are_offered():
    for entry in ENTRIES.values():
        with pytest.raises(ValueError, match="nonsense is not an option") as caught:
            compose(entry, ["nonsense=1"])
        offered = str(caught.value).partition("choose one of: ")[2].split(", ")
        own = entry_options(entry)
        assert not [name for name in offered if name in SHORT and name not in own and SHORT[name] not in own]


@pytest.mark.parametrize("typed", ["--sample_steps", "--sample_steps=4", "--num_inference_steps"])
def test_options_with_dashes_are_answered_with_ours(typed, capsys):
    assert run_command(infer_command.ENTRY, infer_command.infer, [typed]) == 2
    assert f"{typed} is not understood; write option=value such as sampler.sample_steps=" in capsys.readouterr().err


def test_every_synonym_means_an_option_and_is_none_itself():
    known = [name for entry in ENTRIES.values() for name in entry_options(entry)]
    inferred = [name.rpartition(".")[2] for name in entry_options(INFER)]
    for word, ends in SYNONYMS.items():
        assert word not in inferred
        assert all(any(f".{name}".endswith(f".{end}") for name in known) for end in ends), word


@pytest.mark.parametrize(
    ("command", "word", "option"),
    [
        ("infer", "cfg_scale", "sampler.sample_guide_scale"),
        ("infer", "num_inference_steps", "sampler.sample_steps"),
        ("infer", "fp16", "run.dtype"),
        ("infer", "output_dir", "output"),
        *(("train", word, "optim.lr") for word in ("learning_rate", "lr")),
        *(("train", word, "budget.max_steps") for word in ("epochs", "max_train_steps", "num_train_epochs")),
        *(("train", word, "budget.batch_size") for word in ("batch_size", "train_batch_size")),
        *(("train", word, "speed.precision") for word in ("fp16", "bf16", "mixed_precision")),
        ("train", "gradient_accumulation_steps", "budget.accumulate"),
        ("train", "gradient_checkpointing", "speed.recompute"),
        ("train", "resume_from_checkpoint", "checkpoint.resume"),
        ("train", "output_dir", "export"),
        ("train", "lora_rank", "objective.learn.rank"),
        ("train", "lora_alpha", "objective.learn.alpha"),
        ("train", "num_workers", "speed.workers"),
        ("train", "max_grad_norm", "optim.clip_norm"),
    ],
)
def test_the_fields_words_for_an_option_are_answered_with_it_first(command, word, option, capsys):
    assert run_command(ENTRIES[command], lambda config, run: None, [f"{word}=1"]) == 2
    assert f"{word} is not an option; choose one of: {option}" in capsys.readouterr().err
