"""What the planner says of the trainings of recipes: it adds up, it is what a step takes, and what it proposes helps."""

from __future__ import annotations

import json
import os
import resource
import subprocess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from sonic.cli import compose, group_choices, run_command
from sonic.commands import plan_command
from sonic.model import blocks
from sonic.model.adapters import Adapters
from sonic.model.counts import weights
from sonic.model.dit import AvatarDiT
from sonic.planner import extrapolate
from sonic.planner.search import as_json
from sonic.planner.workload import learnt, parts
from sonic.system.program import command_words, interpreter
from sonic.training.plan_training import plan_training, training
from sonic.training.track_training import track_training

ROOT = Path(__file__).resolve().parents[2]
PLAN = plan_command.TRAINING_ENTRY
DISTILL, ADAPTER = "+distill=live_avatar_4step", "+train=audio_adapter"
WHOLE = (ADAPTER, "objective.learn.targets=[]")  # every weight learns
RECIPES = {"distill": (DISTILL,), "adapter": (ADAPTER,), "whole": WHOLE}
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
COPIED = ("hardware=8x80gb", "model.trunk.num_layers=6", "model.audio.inject_layers=[0,3]", "objective.window.past=0", "data.window=12")
SHORT = ("model.trunk.num_layers=2", "model.audio.inject_layers=[1]")
MEMORY = {"peak_gib_per_rank", "items_gib", "host_gib_per_rank", "phases_gib"}
FIELDS = MEMORY | {"plan", "fits", "seconds_per_block", "frames_per_second", "first_frame_s", "reason", "seconds_per_step", "options"}


def plan(*items):
    return plan_training(compose(PLAN, [*BIG, *items]))


def tracked_gib(*items):
    """The chosen plan's peak, and that of each phase of its step on fake tensors."""
    config = compose(PLAN, items)
    chosen = plan_training(config).chosen
    assert len(set(chosen.peak_gib)) == 1
    return chosen.peak_gib[0], track_training(config, chosen).ranks[0]


def peak(*items):
    return max(plan("hardware=8x80gb", "parallel=fsdp", *items).chosen.peak_gib)


@pytest.mark.parametrize(
    "items",
    [
        (*SHORT, DISTILL, "hardware=4x24gb", "objective.learn.rank=16"),
        (*SHORT, DISTILL, "hardware=4x24gb", "parallel.context=2"),
        (*WHOLE, "hardware=4x24gb", "parallel.context=4"),
        (*WHOLE, "hardware=8x80gb", "speed.recompute=false"),
        (*WHOLE, "hardware=2x24gb", "speed.precision=float32", "budget.batch_size=2"),
        (ADAPTER, "hardware=4x80gb"),
        (*SHORT, DISTILL, "hardware=4x80gb", "speed.reshard=false"),
        (*WHOLE, "hardware=8x80gb", "parallel.reshard=false"),
        (ADAPTER, "hardware=4x80gb", "speed.reshard=false"),
        (ADAPTER, "hardware=4x80gb", "speed.recompute=false"),
        (*SHORT, DISTILL, "hardware=4x24gb", "parallel.cpu_offload=true"),
        (*SHORT, DISTILL, "hardware=4x24gb", "speed.replicas=2"),
        (*WHOLE, *COPIED, "parallel.replicas=8"),  # of whose peak the gradients that copies average are 7 %
    ],
)
def test_what_is_predicted_is_what_a_step_takes(items):
    predicted, tracked = tracked_gib(*WIDE, "parallel=fsdp", *items)
    assert predicted == pytest.approx(max(tracked.values()), rel=0.05)
    assert set(tracked) <= set(plan(*WIDE, "parallel=fsdp", *items).chosen.ranks[0])
    assert not dist.is_initialized()


def test_the_dry_run_of_a_training_sees_what_only_devices_do(monkeypatch):
    items, original = (*WIDE, *SHORT, ADAPTER, "hardware=4x80gb", "parallel=fsdp"), blocks.add_residual
    before = tracked_gib(*items)[1]["gradient"]

    def planted(tokens, change):
        held = tokens.new_empty(64, *tokens.shape) if tokens.device.type != "cpu" else tokens
        return original(tokens, change) if held.numel() else change

    monkeypatch.setattr(blocks, "add_residual", planted)
    assert tracked_gib(*items)[1]["gradient"] > 1.1 * before


def test_few_layers_tell_what_all_layers_take(monkeypatch):
    items = (*WHOLE, "hardware=4x24gb", "parallel=fsdp", "model.trunk.num_layers=6", "model.audio.inject_layers=[0,3,4]")
    monkeypatch.setattr(extrapolate, "FEW", 3)
    monkeypatch.setattr(extrapolate, "MORE", 4)
    _, tracked = tracked_gib(*WIDE, *items)
    monkeypatch.setattr(extrapolate, "MORE", 100)
    assert tracked == pytest.approx(tracked_gib(*WIDE, *items)[1], rel=0.01)


@pytest.mark.skipif("SONIC_SLOW" not in os.environ, reason="takes a minute or two; set SONIC_SLOW=1")
@pytest.mark.parametrize(
    ("asked", "most"),
    [
        ((DISTILL, "hardware=4x24gb"), 22),
        ((DISTILL, "hardware=8x80gb", "video.size=704x384"), 72),
        ((*WHOLE, "hardware=8x80gb"), 78),
    ],
)
def test_the_14b_is_what_it_is_predicted_to_be(asked, most):
    predicted, tracked = tracked_gib(*BIG, *asked)
    assert predicted == pytest.approx(max(tracked.values()), rel=0.05)
    assert max(tracked.values()) <= most


@pytest.mark.parametrize("model", group_choices("model"))
@pytest.mark.parametrize("hardware", [name for name in group_choices("hardware") if name != "here"])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_training_that_fits_is_chosen_before_one_that_does_not(recipe, hardware, model):
    config = compose(
        PLAN,
        [*recipe, f"hardware={hardware}", f"model={model}", "objective.window.past=0", "objective.window.past_noise=0", "data.window=12"],
    )
    found, hardware = plan_training(config), config.hardware
    fits = [max(each.peak_gib) <= hardware.usable_gib and len(each.ranks) * each.host <= hardware.host_gib * 2**30 for each in found.plans]
    assert found.fits == any(fits)
    assert fits == sorted(fits, reverse=True)
    for each in as_json(found)["plans"]:
        assert set(each) >= FIELDS
        assert min(each["seconds_per_step"], each["frames_per_second"]) > 0


def test_a_student_of_the_14b_learns_on_four_small_cards():
    found = plan(DISTILL, "hardware=4x24gb")
    assert found.fits
    assert found.chosen.name == "fsdp"
    assert max(found.chosen.peak_gib) <= 22


def test_a_student_of_the_14b_learns_in_full_size_on_eight_large_cards():
    found = plan(DISTILL, "hardware=8x80gb", "video.size=704x384")
    assert found.fits
    assert max(found.chosen.peak_gib) <= 72


def test_all_of_the_14b_learns_on_eight_large_cards():
    assert plan(*WHOLE, "hardware=8x80gb").fits


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("model", group_choices("model"))
def test_what_is_counted_is_what_the_model_has(model, recipe):
    config = compose(PLAN, [f"model={model}", *recipe, "objective.window.past=0", "objective.window.past_noise=0", "data.window=12"])
    work, learn = training(config), config.objective.learn
    with torch.device("meta"):
        built = AvatarDiT(config.model)
        assert sum(part.numbers for part in parts(config.model)) == weights(config.model) == sum(p.numel() for p in built.parameters())
        if learn.rank:
            learning = Adapters(built, ["student"], learn).roles["student"].parameters()
        else:
            learning = [p for name, p in built.named_parameters() if not learn.targets or {*learn.targets} & {*name.split(".")}]
    assert sum(learnt(work).values()) == sum(weight.numel() for weight in learning)


@pytest.mark.parametrize("recipe", [f"{group}={name}" for group in ("distill", "train") for name in group_choices(group)])
def test_a_recipe_is_planned_as_it_is_or_the_reason_is_given(recipe):
    config = compose(PLAN, [f"+{recipe}", "hardware=8x80gb"])
    try:
        job = training(config)
    except ValueError as refusal:
        assert "is not planned; the planner knows" in str(refusal)
        assert "live_avatar" not in recipe and recipe != "train=audio_adapter"
    else:
        assert (job.latent_frames + config.objective.window.past, job.learn) == (config.data.window, config.objective.learn)
        assert as_json(plan_training(config))["chosen"]["seconds_per_step"] > 0


def test_sampling_steps_and_turns_of_the_critic_are_those_of_the_recipe():
    quick, slow = (plan(f"+distill=live_avatar_{steps}step", "hardware=8x80gb").chosen.seconds.total for steps in (2, 4))
    assert quick < slow < plan(DISTILL, "hardware=8x80gb", "objective.critic_turns=9").chosen.seconds.total
    assert plan(DISTILL, "hardware=8x80gb", "objective.teacher_guide_scale=1").chosen.seconds.total < slow


def test_the_placement_that_a_recipe_names_is_the_one_that_is_planned():
    wide = ["speed.context=2", "speed.replicas=2"]
    for options in (wide[:1], wide[1:], ["speed.cpu_offload=true"], [*wide, "speed.cpu_offload=true"]):
        found = plan(DISTILL, "hardware=8x80gb", *options)
        assert len(found.plans) == 1
        assert found.chosen.options == ("speed.engine=fsdp", *options)


@pytest.mark.parametrize(
    ("task", "smaller"),
    [
        ("distill", "objective.learn.rank=64"),
        ("distill", "video.size=256x256"),
        ("distill", "data.window=9"),
        ("distill", "parallel.context=2"),
        ("whole", "data.window=30"),
        ("whole", "parallel.cpu_offload=true"),
        ("whole", "objective.learn.targets=[audio_injectors]"),
    ],
)
def test_less_needs_less(task, smaller):
    recipe = RECIPES[task]
    assert peak(*recipe, smaller) < peak(*recipe) < peak(*recipe, "speed.recompute=false")


def test_copies_of_the_shards_need_more_memory_and_save_nothing_inside_one_machine():
    asked = (*WHOLE, "hardware=8x80gb", "parallel=fsdp", "parallel.cpu_offload=true")
    plans = [plan(*asked, f"parallel.replicas={copies}").chosen for copies in (1, 2, -1)]
    assert [each.name for each in plans] == ["fsdp+cpu_offload", "fsdp+replicas2+cpu_offload", "fsdp+replicas8+cpu_offload"]
    assert plans[-1].options == ("speed.engine=fsdp", "speed.replicas=8", "speed.cpu_offload=true")
    shards = [each.host for each in plans]  # of 8, 4 and 1 ranks, beside what a process takes
    assert shards[1] - shards[0] == pytest.approx((shards[2] - shards[0]) / 7)
    one, two, all_weights = (plan(*asked[:-1], f"parallel.replicas={copies}").chosen for copies in (1, 2, 8))
    assert max(one.peak_gib) < max(two.peak_gib) < max(all_weights.peak_gib)
    assert two.seconds.weights == pytest.approx(one.seconds.weights)  # what copies save gathers they cost in averages


def test_a_shorter_ring_needs_less_in_rollout_and_replay():
    asked = (DISTILL, "hardware=8x80gb", "parallel=fsdp")
    short, long = (plan(*asked, f"model.rollout.window_blocks={blocks}").chosen.ranks[0] for blocks in (3, 4))
    assert all(sum(short[phase].values()) < sum(long[phase].values()) for phase in ("rollout", "student"))


@pytest.mark.parametrize(
    "asked",
    [
        (DISTILL, "hardware=4x24gb", "parallel=fsdp", "video.size=704x384"),
        (DISTILL, "hardware=4x24gb", "parallel=fsdp", "speed.recompute=false"),
        (DISTILL, "hardware=2x24gb", "hardware.host_gib=8", "objective.learn.rank=256"),
        (*WHOLE, "hardware=8x80gb", "parallel=fsdp", "video.size=1024x704", "budget.batch_size=2"),
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


def test_what_no_single_change_mends_is_not_made_up():
    found = plan(*WHOLE, "hardware=4x24gb")
    assert not found.fits
    assert not found.changes


@pytest.mark.parametrize(
    ("items", "sentence"),
    [
        (("+distill=live_avatar_4steps",), "choose one of: live_avatar_4step"),
        ((DISTILL, "data.window=10"), "use 9 or 12"),
        ((DISTILL, "objective.learn.rank=0"), "adapters"),
        ((*WHOLE, "model=preview"), "has no motion memory; use 0"),
        ((*WHOLE, "objective.window.past=39"), "between 0 and data.window=39"),
        ((DISTILL, "objective.learn.targets=[mouth]"), "names nothing"),
        ((DISTILL, "parallel=pipeline"), "use parallel=fsdp"),
        ((DISTILL, "hardware=4x24gb", "parallel=fsdp", "parallel.context=3"), "product is one of [1, 2, 4]"),
        ((DISTILL, "hardware=4x24gb", "speed.replicas=3"), "product is one of [1, 2, 4]"),
        ((DISTILL, "hardware=4x24gb", "speed.replicas=2", "speed.context=4"), "product is one of [1, 2, 4]"),
        ((DISTILL, "hardware=4x24gb", "parallel.replicas=3"), "product is one of [1, 2, 4]"),
        ((DISTILL, "hardware=8x80gb", "parallel=fsdp", "budget.accumulate=4"), "budget.accumulate=4 cannot be shared by 8; use 8"),
        ((DISTILL, "hardware.devices=3"), "budget.accumulate=16 cannot be shared by 3; use 15 or 18"),
        ((DISTILL, "speed.engine=zero3"), "use fsdp"),
        ((ADAPTER, "data.window=0"), "set the latent frames"),
        ((ADAPTER, "video.fps=24"), "leave the others out"),
        ((ADAPTER, "objective.window.reach=blocks"), "windows of full attention: clip"),
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
        DISTILL,
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


def test_the_command_reports_when_its_estimate_cannot_be_tracked(tmp_path, capsys):
    argv = [*WIDE, *SHORT, "hardware=4x24gb", "parallel=zero3", "verify=true", f"json={tmp_path / 'plan.json'}"]
    assert run_command(plan_command.entry_of(argv), plan_command.plan, argv) == 0
    output = [line for line in capsys.readouterr().out.splitlines() if line.startswith("not tracked: ")]
    assert len(output) == 1
    assert "zero3 is predicted only" in output[0]
    found = json.loads((tmp_path / "plan.json").read_text())["chosen"]
    assert found["tracked"] is None
    assert output[0] == f"not tracked: {found['tracked_reason']}"


def test_the_command_holds_its_prediction_against_the_program(tmp_path):
    asked = [*WIDE, *WHOLE, "hardware=8x80gb", "verify=true", f"json={tmp_path / 'plan.json'}"]
    done = subprocess.run([*command_words("plan"), *asked], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "tracked" in done.stdout
    found = json.loads((tmp_path / "plan.json").read_text())["chosen"]
    assert found["peak_gib_per_rank"] == pytest.approx(found["tracked_gib_per_rank"], rel=0.05)
