"""Every YAML composes, every model builds on the meta device, and every mistake on the command line lists the choices."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml

import sonic.compose
from sonic import option_names
from sonic.check.check_config import CheckConfig
from sonic.checkpoint.convert_config import ConvertConfig
from sonic.cli import Entry, compose, entry_options, group_choices, groups, help_text, run_command
from sonic.commands.bundle_command import ENTRY as BUNDLE
from sonic.commands.plan_command import TRAINING_ENTRY
from sonic.config import (
    ATTENTION_TABLE,
    PREDICTION_TABLE,
    SAMPLER_TABLE,
    SCHEDULE_TABLE,
    SPEECH_ENCODER_TABLE,
    parse_size,
)
from sonic.data.data_config import CLIP_TABLE, PrecomputeConfig
from sonic.evaluation.evaluate_config import EvaluateConfig
from sonic.evaluation.judge_config import JudgeConfig
from sonic.evaluation.sweep_config import AblateConfig
from sonic.inference.components import DTYPES
from sonic.inference.infer_config import BenchConfig, InferConfig
from sonic.model.dit import AvatarDiT
from sonic.parallel.parallel_config import PlanConfig
from sonic.system.program import interpreter
from sonic.training.objective_config import OBJECTIVE_CONFIGS
from sonic.training.objectives import OBJECTIVES
from sonic.training.train_config import DATASET_TABLE, ENGINE_TABLE, TrainConfig

ROOT = Path(__file__).resolve().parents[1]
INFER = Entry("infer", InferConfig)
ENTRIES = {
    "infer": INFER,
    "bench": Entry("bench", BenchConfig),
    "evaluate": Entry("evaluate", EvaluateConfig),
    "convert": Entry("convert", ConvertConfig, collections=()),
    "judge": Entry("judge", JudgeConfig, collections=()),
    "bundle": BUNDLE,
    "check": Entry("check", CheckConfig, collections=()),
    "train": Entry("train", TrainConfig, collections=("train", "distill"), variants={"objective": OBJECTIVE_CONFIGS}),
    "ablate": Entry("ablate", AblateConfig, collections=("ablate",)),
    "precompute": Entry("precompute", PrecomputeConfig, collections=("precompute",)),
    "plan": Entry("plan", PlanConfig),
    "plan_training": TRAINING_ENTRY,
}
NEEDED = {
    **dict.fromkeys(("train", "plan_training"), ["budget.max_steps=1"]),
    "judge": ["mp4=out.mp4"],
    "convert": ["source=a", "output=b", "live_avatar=c"],
    "ablate": ["grid={seed: [1]}"],
}  # options without which a command has no meaning
CHOICES = [(name, group, option) for name, entry in ENTRIES.items() for group, found in groups(entry).items() for option in found]
PRESETS = {
    (group, option) for _, group, option in CHOICES if (ROOT / "conf" / group / option).is_dir()
}  # a folder with a file for each model
MODEL_OF = {"parallel=windows": ["model=sonic_svd"]}  # choices that go with some models only
PUBLISHED = {"wan_s2v_14b": 16_295_755_609, "live_avatar_14b": 16_295_755_609}


@pytest.mark.parametrize("name", ENTRIES)
def test_every_command_composes_without_arguments(name):
    assert isinstance(compose(ENTRIES[name], NEEDED.get(name, [])), ENTRIES[name].schema)


@pytest.mark.parametrize(("name", "group", "option"), [each for each in CHOICES if each[1:] not in PRESETS])
def test_every_choice_composes(name, group, option):
    needed = [] if group in ("train", "distill", "precompute", "ablate") else NEEDED.get(name, [])
    needed = needed + MODEL_OF.get(f"{group}={option}", [])
    assert isinstance(compose(ENTRIES[name], [f"{group}={option}", *needed]), ENTRIES[name].schema)


def test_a_choice_that_is_a_folder_is_a_preset():
    """Which test_a_preset_fits_every_model_or_says_why_not composes."""
    assert {group for group, _ in PRESETS} == {"preset"}


VARIANTS = {group for entry in ENTRIES.values() for group in entry.variants}  # their choices are in registries, without files


def test_every_yaml_belongs_to_a_command():
    files = {path.relative_to(ROOT / folder) for folder in ("conf", "recipes") for path in (ROOT / folder).rglob("*.yaml")}
    known = {Path(f"{name}.yaml") for name in ENTRIES} | {
        Path(group, f"{option}.yaml") for _, group, option in CHOICES if group not in VARIANTS
    }
    per_model = {Path("preset", preset, f"{model}.yaml") for preset in group_choices("preset") for model in group_choices("model")}
    assert files == {path for path in known if path.parent != Path("preset")} | per_model


@pytest.mark.parametrize("model", group_choices("model"))
@pytest.mark.parametrize("preset", group_choices("preset"))
def test_a_preset_fits_every_model_or_says_why_not(preset, model):
    try:
        found = compose(INFER, [f"model={model}", f"+preset={preset}"])
    except ValueError as refusal:
        assert f"preset={preset} does not go with model={model}" in str(refusal)
        assert "use " in str(refusal)
    else:
        assert found.model.name == model


@pytest.mark.parametrize("command", ["infer", "plan", "evaluate", "bench"])
@pytest.mark.parametrize("model", group_choices("model"))
def test_each_model_has_a_default_sampler(command, model):
    entry = ENTRIES[command]
    own, published = compose(entry, [f"model={model}"]).sampler, compose(entry, [f"model={model}", "+preset=standard"]).sampler
    assert own == published
    steps = {
        "preview": ("linear", 4, 1.0),
        "preview_velocity": ("linear", 40, 1.0),
        "wan_s2v_14b": ("unipc", 40, 4.5),
        "live_avatar_14b": ("live_avatar", 4, 1.0),
        "sonic_svd": ("karras", 25, 2.0),
    }[model]
    assert (own.schedule, own.sample_steps, own.sample_guide_scale) == steps


def test_a_chosen_sampler_replaces_the_default():
    found = compose(INFER, ["model=wan_s2v_14b", "sampler=euler", "sampler.sample_steps=8"]).sampler
    assert (found.name, found.sample_steps, found.sample_guide_scale) == ("euler", 8, 1.0)
    assert compose(INFER, ["model=wan_s2v_14b", "+preset=fast_preview"]).sampler.sample_steps == 20
    assert compose(INFER, ["model=wan_s2v_14b", "sampler.sample_steps=8"]).sampler.name == "unipc"
    assert compose(INFER, ["model=live_avatar_14b", "sampler=live_avatar_3step"]).sampler.sample_steps == 3


def test_a_model_of_ones_own_needs_no_preset(tmp_path, monkeypatch):
    for folder in ("conf", "recipes"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    (tmp_path / "conf/model/mine.yaml").write_text("defaults: [preview]\nname: mine\n")
    monkeypatch.setattr(sonic.compose, "ROOT", tmp_path)
    assert compose(INFER, ["model=mine"]).sampler == compose(INFER, []).sampler


@pytest.mark.parametrize(
    ("preset", "frames", "blocks"), [("standard", 48, 4), ("low_memory", 48, 4), ("standard", 96, 8), ("standard", 24, 2)]
)
def test_with_compat_upstream_the_attention_window_is_one_clip(preset, frames, blocks):
    given = ["model=live_avatar_14b", f"+preset={preset}", f"video.infer_frames={frames}"]
    for entry in (INFER, ENTRIES["plan"]):
        assert compose(entry, [*given, "compat=upstream"]).model.rollout.window_blocks == blocks
        assert compose(entry, given).model.rollout.window_blocks == (4 if preset == "standard" else 2)


@pytest.mark.parametrize("name", group_choices("model"))
def test_every_model_builds_on_the_meta_device(name):
    config = compose(INFER, [f"model={name}"]).model
    with torch.device("meta"):
        model = AvatarDiT(config)
    assert config.name == name
    if name in PUBLISHED:
        assert sum(weight.numel() for weight in model.parameters()) == PUBLISHED[name]


def test_names_of_variants_are_read_without_importing_their_modules():
    tables = (
        SAMPLER_TABLE,
        SCHEDULE_TABLE,
        PREDICTION_TABLE,
        ATTENTION_TABLE,
        SPEECH_ENCODER_TABLE,
        ENGINE_TABLE,
        DATASET_TABLE,
        CLIP_TABLE,
    )
    tables += ("bench.benchmark.BENCHES", "checkpoint.convert.DIRECTIONS", "evaluation.sweep.ENGINES")
    script = f"import json, sys\nfrom sonic.config import names_in\nprint(json.dumps([names_in(table) for table in {tables}]))\n"
    script += "assert 'torch' not in sys.modules"
    found = json.loads(subprocess.run([*interpreter(), "-c", script], capture_output=True, text=True, check=True).stdout)
    modules = [(import_module(f"sonic.{table.rpartition('.')[0]}"), table.rpartition(".")[2]) for table in tables]
    assert found == [list(getattr(module, name)) for module, name in modules]


def test_every_precision_is_a_choice():
    for name in DTYPES:
        compose(INFER, [f"run.dtype={name}"])


def test_a_preset_leaves_the_rest_to_the_command_line():
    found = compose(INFER, ["+preset=fast_preview", "sampler.sample_steps=7", "model.resolution=96"])
    assert (found.sampler.sample_steps, found.model.resolution) == (7, 96)


def test_the_last_of_two_presets_counts():
    both, one = (compose(INFER, items) for items in (["+preset=quality", "preset=streaming"], ["preset=streaming"]))
    assert both == one


@pytest.mark.parametrize(
    "text", ["my photo (1), final.jpg", "a=b.jpg", "${HOME}.jpg", "${x", r"\${x}\\", 'it\'s "me".png', "[1].jpg", "1e3", "null", "off"]
)
def test_text_stays_exactly_as_typed(text, capsys):
    assert compose(INFER, [f"image={text}"]).image == text
    assert run_command(INFER, lambda config, run: None, ["--cfg", f"image={text}"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["image"] == text


@pytest.mark.parametrize(("typed", "value"), [("010", 10), ("7", 7), ("-0", 0), ("+5", 5)])
def test_every_seed_is_kept_as_typed(typed, value):
    assert compose(INFER, [f"seed={typed}"]).seed == value


@pytest.mark.parametrize(("typed", "value"), [("012", 12.0), ("1e-2", 0.01), ("1.5", 1.5), (".5", 0.5), ("2.", 2.0), ("3E1", 30.0)])
def test_every_number_is_kept_as_typed(typed, value):
    assert compose(INFER, [f"sampler.sample_shift={typed}", f"face_box=[010,{typed},1e1,09]"]).face.box == [10, value, 10, 9]
    assert compose(INFER, [f"sampler.sample_shift={typed}"]).sampler.sample_shift == value


def test_short_names_set_the_full_options():
    found = compose(INFER, ["name=me", "face_box=[1,2,30,40]", "weights=folder", "device=cpu"])
    assert (found.run.name, found.face.box, found.model.weights, found.run.device) == ("me", [1, 2, 30, 40], "folder", "cpu")


@pytest.mark.parametrize(
    ("typed", "first"),
    [
        ("sampler.sample_step=3", "sampler has: sample_steps"),
        ("sample_steps=3", "choose one of: sampler.sample_steps"),
        ("sede=3", "choose one of: seed"),
        ("ouput=x.mp4", "choose one of: output"),
        ("model.trunk.hiden_dim=3", "model.trunk has: hidden_dim"),
        ("preset=fast_previw", "choose one of: fast_preview"),
        ("+preset=streeming", "choose one of: streaming"),
        ("model=preveiw", "choose one of: preview"),
        ("sampler=eular", "choose one of: euler"),
        ("sampler.name=eular", "choose one of: euler, heun, unipc"),
        ("sampler.schedule=linaer", "choose one of: linear"),
        ("motion.head=gentel", "choose one of: gentle"),
        ("run.dtype=float23", "choose one of: float32"),
        ("sampler.sample_steps=many", "not a whole number"),
        ("decode.online=perhaps", "not true or false"),
        ("seed=1:30", "seed=1:30 is not a whole number"),
        ("seed=0x10", "seed=0x10 is not a whole number"),
        ("seed=2026-01-01", "seed=2026-01-01 is not a whole number"),
        ("sampler.sample_shift=1:30", "is not a number"),
        ("face_box=[1,2,3", "not a list of numbers such as [1,2,3]"),
        ("face_box=5", "not a list of numbers such as [1,2,3]"),
        ("face.masks=left.png", "face.masks=left.png is not a list of words such as [a,b]"),
        ("face_box=[1,2,3]", "give [x,y,width,height]"),
        ("video.infer_frames=-1", "need 0 (the model's own) or more"),
        ("video.fps=30", "use 25"),
        ("video.size=7x", "write WIDTHxHEIGHT"),
        ("sampler.sample_steps=0", "need 1 to 1000"),
        ("seed=-1", "must lie between"),
        ("run=me", "set one of: run.name"),
        ("image", "write option=value"),
        ("--image me.jpg", "write option=value"),
    ],
)
def test_a_mistake_on_the_command_line_lists_the_choices(typed, first):
    with pytest.raises(ValueError, match=r"\S") as caught:
        compose(INFER, [typed])
    assert first in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "typed", "expected"),
    [
        ("ablate", ["+ablate=steps", "seeds=3"], "seeds=3 is not a list of whole numbers such as [1,2,3]"),
        ("train", ["objective.learn.targets=mlp_in"], "objective.learn.targets=mlp_in is not a list of words such as [a,b]"),
    ],
)
def test_a_value_that_should_be_a_list_is_answered_with_an_example_list(name, typed, expected):
    with pytest.raises(ValueError, match="such as") as caught:
        compose(ENTRIES[name], [*NEEDED[name], *typed])
    assert expected in str(caught.value)


def test_a_mistyped_key_in_a_yaml_lists_the_choices(tmp_path, monkeypatch):
    for folder in ("conf", "recipes"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    (tmp_path / "conf/preset/mine.yaml").write_text("# @package _global_\nsampler: {sample_step: 3}\n")
    monkeypatch.setattr(sonic.compose, "ROOT", tmp_path)
    with pytest.raises(ValueError, match="sampler.sample_step is not an option; sampler has: sample_steps"):
        compose(INFER, ["preset=mine"])


def test_every_short_name_and_every_name_of_files_is_an_option_of_a_command():
    known = {option for entry in ENTRIES.values() for option in entry_options(entry)}
    assert known >= option_names.FILES
    assert known >= {*option_names.SHORT.values()}


def test_sizes_are_read_with_a_cross_or_a_star():
    assert parse_size("704x384") == parse_size("704*384") == (704, 384)


@pytest.mark.parametrize("name", ENTRIES)
def test_help_names_every_option_and_choice(name):
    entry = ENTRIES[name]
    text = help_text(entry)
    lines = text.splitlines() + [
        line
        for group, members in entry.variants.items()
        for member in members
        for line in help_text(entry, [f"{group}={member}"]).splitlines()
    ]
    shown = {line.split("=")[0].strip(): line for line in lines if "=" in line[:44]}
    assert {*entry_options(entry)} <= {*shown}
    assert [option for option in entry_options(entry) if not shown[option][46:].strip()] == []  # every one says what it is
    assert all(choice in text for choices in groups(ENTRIES[name]).values() for choice in choices)


def test_help_shows_the_options_and_values_of_what_was_chosen(capsys):
    for argv, there, absent in (
        (["+train=preview_dit"], ["budget.max_minutes=90", "optim.lr=0.0015", "objective.schedule_share=0.85"], "objective.critic_turns"),
        (["objective=dmd", "optim.lr=3e-3"], ["objective.critic_turns=5", "optim.lr=0.003"], "objective.schedule_share"),
        (["+distill=preview_2step"], ["objective.teacher_steps="], "objective.critic_turns"),
    ):
        assert run_command(ENTRIES["train"], lambda config, run: None, [*argv, "--help"]) == 0
        text = capsys.readouterr().out
        assert all(f"  {word}" in text for word in there) and absent not in text and f"options of {' '.join(argv)}" in text


@pytest.mark.parametrize("name", ["train", "evaluate", "plan", "judge", "bench"])
def test_a_file_that_cannot_be_written_is_refused_before_the_work(name, tmp_path, capsys):
    (tmp_path / "file").touch()
    option = f"{'export' if name == 'train' else 'json'}={tmp_path / 'file/deep/out'}"
    needed = ["budget.max_steps=1"] if name == "train" else NEEDED.get(name, [])
    assert run_command(ENTRIES[name], lambda config, run: pytest.fail("the work began"), [*needed, option]) == 2
    assert f"{tmp_path / 'file'} is not a folder; choose a file elsewhere" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["+preset=quality", "--help"], ["sampler.nmae=x"]])
def test_the_command_line_answers_fast_and_without_torch(arguments):
    script = "import sys\nfrom sonic.main import main\ntry:\n    main()\nfinally:\n    assert 'torch' not in sys.modules\n"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([*interpreter(), "-c", script, "infer", *arguments], capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3  # CPU time of the process itself
    assert done.returncode == (0 if "--help" in arguments else 2), done.stderr
    assert "Traceback" not in done.stderr


LARGE = [("distill", f"live_avatar_{steps}step") for steps in (4, 3, 2)] + [("train", "audio_adapter")]


@pytest.mark.parametrize(("group", "option"), LARGE)
def test_every_recipe_for_large_cards_builds_on_the_meta_device(group, option):
    """Build each recipe on the meta device: one base, adapters or the chosen parts are trainable, batches divide by eight ranks."""
    config = compose(ENTRIES["train"], [f"{group}={option}"])
    with torch.device("meta"):
        objective = OBJECTIVES[config.objective.name](config, None)
    held = {id(weight): weight.numel() for network in objective.modules.values() for weight in network.parameters()}
    learning = sum(weight.numel() for weight in objective.roles["student"].parameters() if weight.requires_grad)
    roles = objective.roles.values() if config.objective.learn.rank else ()
    adapters = sum(weight.numel() for role in roles for weight in role.parameters())
    assert sum(held.values()) == PUBLISHED[config.model.name] + adapters
    assert 0 < learning < 0.15 * PUBLISHED[config.model.name]
    assert config.budget.accumulate % 8 == 0
    block = config.model.rollout.block_frames
    assert option == "audio_adapter" or config.data.window % block == 0
