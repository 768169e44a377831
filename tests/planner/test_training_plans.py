"""The planner for trainings: sums are consistent, estimates equal the tracked memory, and proposed changes help."""

from __future__ import annotations

import json
import os
import resource
import subprocess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from sonic.cli import Entry, compose, group_choices, run_command
from sonic.commands import plan_command
from sonic.model.adapters import Adapters
from sonic.model.counts import weights
from sonic.model.dit import AvatarDiT
from sonic.parallel.parallel_config import PlanConfig
from sonic.planner import extrapolate
from sonic.planner.training_memory import ITEMS
from sonic.planner.training_plans import planned_training, training_json
from sonic.planner.training_workload import learnt, parts, training
from sonic.system.program import interpreter, process
from sonic.training.objective_config import OBJECTIVE_CONFIGS
from sonic.training.track_training import track_training
from sonic.training.train_config import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
PLAN = Entry("plan", PlanConfig)
TRAIN = Entry("train", TrainConfig, collections=("train", "distill"), variants={"objective": OBJECTIVE_CONFIGS})
BIG = ("model=live_avatar_14b", "video.size=384x256")
WIDE = (  # a few blocks of the 14B's proportions
    *BIG,
    "model.trunk.hidden_dim=2048",
    "model.trunk.ffn_dim=5632",
    "model.trunk.num_heads=16",
    "model.trunk.num_layers=3",
    "model.audio.inject_layers=[0,2]",
    "model.audio.audio_dim=256",
    "model.audio.num_audio_layers=4",
    "model.text.text_dim=512",
    "hardware.reserve_gib=0",
)
SHORT = ("model.trunk.num_layers=2", "model.audio.inject_layers=[1]")
MEMORY = {"peak_gib_per_rank", "items_gib", "host_gib_per_rank", "phases_gib"}
FIELDS = MEMORY | {"plan", "fits", "seconds_per_block", "frames_per_second", "first_frame_s", "reason", "seconds_per_step", "options"}
TRAININGS = [name for name in group_choices("task") if name != "video"]


def plan(*items):
    return planned_training(compose(PLAN, [*BIG, *items]))


def peak(*items):
    return plan("hardware=8x80gb", "parallel=fsdp", *items).chosen.peak_gib


@pytest.mark.parametrize(
    "items",
    [
        (*SHORT, "task=distill", "hardware=4x24gb", "task.learn.rank=16"),
        (*SHORT, "task=distill", "hardware=4x24gb", "parallel.context=2"),
        ("task=train", "hardware=4x24gb", "parallel.context=4"),
        ("task=train", "hardware=8x80gb", "task.recompute=false"),
        ("task=train", "hardware=2x24gb", "task.precision=float32", "task.batch_size=2"),
        ("task=audio_adapter", "hardware=4x80gb"),
    ],
)
def test_the_estimate_of_a_training_step_equals_the_tracked_memory(items):
    found = planned_training(compose(PLAN, [*WIDE, "parallel=fsdp", *items]))
    tracked = track_training(found.work, found.hardware, found.chosen)
    assert found.chosen.peak_gib == pytest.approx(max(tracked.values()), rel=0.05)
    assert set(tracked) <= set(found.chosen.phases)
    assert not dist.is_initialized()


def test_the_memory_of_all_layers_is_extrapolated_from_few(monkeypatch):
    items = ("task=train", "hardware=4x24gb", "parallel=fsdp", "model.trunk.num_layers=6", "model.audio.inject_layers=[0,3,4]")
    found = planned_training(compose(PLAN, [*WIDE, *items]))
    monkeypatch.setattr(extrapolate, "FEW", 3)
    monkeypatch.setattr(extrapolate, "MORE", 4)
    tracked = track_training(found.work, found.hardware, found.chosen)
    monkeypatch.setattr(extrapolate, "MORE", 100)
    assert tracked == pytest.approx(track_training(found.work, found.hardware, found.chosen), rel=0.01)


@pytest.mark.skipif("SONIC_SLOW" not in os.environ, reason="takes a minute or two; set SONIC_SLOW=1")
@pytest.mark.parametrize(
    ("asked", "most"),
    [
        (("task=distill", "hardware=4x24gb"), 22),
        (("task=distill", "hardware=8x80gb", "video.size=704x384"), 72),
        (("task=train", "hardware=8x80gb"), 78),
    ],
)
def test_the_14b_takes_the_estimated_memory(asked, most):
    found = plan(*asked)
    tracked = max(track_training(found.work, found.hardware, found.chosen).values())
    assert found.chosen.peak_gib == pytest.approx(tracked, rel=0.05)
    assert tracked <= most


@pytest.mark.parametrize("model", group_choices("model"))
@pytest.mark.parametrize("hardware", [name for name in group_choices("hardware") if name != "here"])
@pytest.mark.parametrize("task", TRAININGS)
def test_every_training_adds_up(task, hardware, model):
    config = compose(PLAN, [f"task={task}", f"hardware={hardware}", f"model={model}", "task.past=0", "task.window=12"])
    found = training_json(planned_training(config))
    assert found["chosen"] == found["plans"][0]
    for each in found["plans"]:
        assert set(each) >= FIELDS
        assert set(each["items_gib"]) == set(ITEMS)
        assert max(each["peak_gib_per_rank"]) == pytest.approx(sum(each["items_gib"].values()), abs=0.01)
        assert max(each["peak_gib_per_rank"]) == max(each["phases_gib"].values())
        assert each["fits"] <= (max(each["peak_gib_per_rank"]) <= config.hardware.usable_gib)
        assert min(each["seconds_per_step"], each["frames_per_second"]) > 0


def test_a_student_of_the_14b_learns_on_four_small_cards():
    found = plan("task=distill", "hardware=4x24gb")
    assert found.fits
    assert found.chosen.name == "fsdp"
    assert found.chosen.peak_gib <= 22


def test_a_student_of_the_14b_learns_in_full_size_on_eight_large_cards():
    found = plan("task=distill", "hardware=8x80gb", "video.size=704x384")
    assert found.fits
    assert found.chosen.peak_gib <= 72


def test_all_of_the_14b_learns_on_eight_large_cards():
    assert plan("task=train", "hardware=8x80gb").fits


@pytest.mark.parametrize("task", TRAININGS)
@pytest.mark.parametrize("model", group_choices("model"))
def test_the_counted_parameters_are_those_of_the_model(model, task):
    config = compose(PLAN, [f"model={model}", f"task={task}", "task.past=0", "task.window=12"])
    work, learn = training(config), config.task.learn
    with torch.device("meta"):
        built = AvatarDiT(config.model)
        assert sum(part.numbers for part in parts(config.model)) == weights(config.model) == sum(p.numel() for p in built.parameters())
        if learn.rank:
            learning = Adapters(built, ["student"], learn).roles["student"].parameters()
        else:
            learning = [p for name, p in built.named_parameters() if not learn.targets or {*learn.targets} & {*name.split(".")}]
    assert sum(learnt(work).values()) == sum(weight.numel() for weight in learning)


@pytest.mark.parametrize(("task", "recipe"), [("distill", "distill=live_avatar_4step"), ("audio_adapter", "train=audio_adapter")])
def test_a_planned_task_has_the_options_of_its_recipe(task, recipe):
    planned, recipe = compose(PLAN, [f"task={task}"]).task, compose(TRAIN, [recipe])
    goal, past = recipe.objective, recipe.objective.window.past
    assert (planned.objective, planned.window, planned.past, planned.learn) == (
        goal.name,
        recipe.data.window,
        past,
        goal.learn,
    )
    assert (planned.batch_size, planned.accumulate) == (recipe.budget.batch_size, recipe.budget.accumulate)
    assert (search_plans.precision, search_plans.recompute) == (recipe.speed.precision, recipe.speed.recompute)
    assert goal.window.reach == "clip"
    if goal.name == "dmd":
        assert (search_plans.critic_turns, search_plans.teacher_guide_scale) == (goal.critic_turns, goal.teacher_guide_scale)


@pytest.mark.parametrize(
    ("task", "smaller"),
    [
        ("distill", "task.learn.rank=64"),
        ("distill", "video.size=256x256"),
        ("distill", "model.rollout.window_blocks=3"),
        ("distill", "parallel.context=2"),
        ("train", "task.window=30"),
        ("train", "parallel.cpu_offload=true"),
        ("train", "task.learn.targets=[audio_injectors]"),
    ],
)
def test_smaller_trainings_need_less_memory(task, smaller):
    assert peak(f"task={task}", smaller) < peak(f"task={task}") < peak(f"task={task}", "task.recompute=false")


@pytest.mark.parametrize(
    "asked",
    [
        ("task=distill", "hardware=4x24gb", "parallel=fsdp", "video.size=704x384"),
        ("task=distill", "hardware=4x24gb", "parallel=fsdp", "task.recompute=false"),
        ("task=distill", "hardware=2x24gb", "hardware.host_gib=8", "task.learn.rank=256"),
        ("task=train", "hardware=8x80gb", "parallel=fsdp", "video.size=1024x704", "task.batch_size=2"),
    ],
)
def test_proposed_changes_help(asked):
    found = plan(*asked)
    assert not found.fits
    assert found.chosen.missing_gib(found.hardware) > 0
    assert found.changes
    for change in found.changes:
        names = {option.partition("=")[0] for option in change.options}
        assert plan(*(item for item in asked if item.partition("=")[0] not in names), *change.options).fits, change.sentence


def test_no_change_is_proposed_when_no_single_one_helps():
    found = plan("task=train", "hardware=4x24gb")
    assert not found.fits
    assert not found.changes


@pytest.mark.parametrize(
    ("items", "sentence"),
    [
        (("task=distil",), "choose one of: distill"),
        (("task=distill", "task.window=10"), "use 9 or 12"),
        (("task=distill", "task.learn.rank=0"), "adapters"),
        (("task=train", "model=preview"), "leave task.past at 0"),
        (("task=train", "task.past=39"), "between 0 and task.window=39"),
        (("task=distill", "task.learn.targets=[mouth]"), "names nothing"),
        (("task=distill", "parallel=pipeline"), "use parallel=fsdp"),
        (("task=distill", "hardware=4x24gb", "parallel=fsdp", "parallel.context=3"), "3 ranks cannot share"),
        (("task=distill", "hardware=8x80gb", "parallel=fsdp", "task.accumulate=4"), "cannot be shared by 8 rows"),
        (("task=video", "task.objective=dmd"), "goes with another"),
    ],
)
def test_impossible_options_are_refused_in_one_sentence(items, sentence):
    with pytest.raises(ValueError, match=r"\S") as caught:
        plan(*items)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(("size", "code"), [("384x256", 0), ("704x384", 3)])
def test_the_command_answers_fast_and_its_exit_code_says_whether_it_fits(tmp_path, size, code):
    script = "import sys\nfrom sonic.main import main\ntry:\n    main()\nfinally:\n    assert 'torch' not in sys.modules\n"
    asked = [
        "task=distill",
        "model=live_avatar_14b",
        "hardware=4x24gb",
        "parallel=fsdp",
        f"video.size={size}",
        f"json={tmp_path / 'plan.json'}",
    ]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([*interpreter(), "-c", script, "plan", *asked], capture_output=True, text=True, check=False, cwd=tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3  # of its own, whatever else the machine does
    assert done.returncode == code, done.stderr
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["fits"] == (code == 0)
    if code:
        assert "nothing fits" in done.stdout
        assert found["missing_gib"] > 0
        assert found["changes"]


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        (("hardware=4x24gb", "parallel=fsdp", "parallel.context=2", *SHORT), "fsdp+context"),
        (("hardware=4x24gb", "parallel=zero3", *SHORT), "zero3"),
        (("task=train", "hardware=4x24gb", "parallel=fsdp", "parallel.cpu_offload=true"), "fsdp+cpu_offload"),
    ],
)
def test_the_command_reports_when_its_estimate_cannot_be_tracked(tmp_path, asked, name, capsys):
    assert run_command(PLAN, plan_command.plan, [*WIDE, *asked, "verify=true", f"json={tmp_path / 'plan.json'}"]) == 0
    output = [line for line in capsys.readouterr().out.splitlines() if line.startswith("not tracked: ")]
    assert len(output) == 1
    assert f"{name} is predicted only" in output[0]
    found = json.loads((tmp_path / "plan.json").read_text())["chosen"]
    assert found["tracked"] is None
    assert output[0] == f"not tracked: {found['tracked_reason']}"


def test_the_command_compares_its_estimate_with_the_tracked_memory(tmp_path):
    asked = [*WIDE, "task=train", "hardware=8x80gb", "verify=true", f"json={tmp_path / 'plan.json'}"]
    done = subprocess.run([*process("plan"), *asked], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "tracked" in done.stdout
    found = json.loads((tmp_path / "plan.json").read_text())["chosen"]
    assert found["peak_gib_per_rank"] == pytest.approx(found["tracked_gib_per_rank"], rel=0.05)
