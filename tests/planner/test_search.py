"""The planner: sums are consistent, chosen plans fit, and every proposed change helps."""

from __future__ import annotations

import itertools
import json
import resource
import subprocess
from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name

import pytest

from sonic.cli import Entry, compose, group_choices
from sonic.families import FAMILIES
from sonic.parallel.layer_ranges import best_ranges
from sonic.parallel.parallel_config import PLANS, PlanConfig
from sonic.parallel.parallelize import Parallelizer, parallelizer_of
from sonic.planner.memory import TEXT_NUMBERS, union
from sonic.planner.plans import CLIPS_WAIT
from sonic.planner.search import EQUAL, as_json, by_name, search_plans
from sonic.system.program import interpreter

ROOT = Path(__file__).resolve().parents[2]
PLAN = Entry("plan", PlanConfig)
DTYPES = ("bfloat16", "float32")
MEMORY = {"peak_gib_per_rank", "items_gib", "host_gib_per_rank"}
FIELDS = MEMORY | {"plan", "fits", "seconds_per_block", "frames_per_second", "first_frame_s", "reason"}


def plan(*items):
    return search_plans(compose(PLAN, ["model=live_avatar_14b", "video=704x384", "run.dtype=bfloat16", *items]))


def chosen(*items):
    return as_json(plan(*items))["chosen"]


def test_a_plan_is_one_row_of_a_table_and_a_file_of_options():
    assert {"auto", *PLANS} == set(group_choices("parallel"))
    for name, code in PLANS.items():
        model = next(each for each in group_choices("model") if name in FAMILIES[compose(PLAN, [f"model={each}"]).model.family].plans)
        assert compose(PLAN, [f"model={model}", f"parallel={name}"]).parallel.name == name
        assert isinstance(parallelizer_of(name), Parallelizer)
        for module, part in (("plans", code.estimate), ("track", code.tracker)):
            assert not part or callable(resolve_name(f"sonic.planner.{module}:{part}"))


@pytest.mark.parametrize("model", group_choices("model"))
@pytest.mark.parametrize("hardware", [name for name in group_choices("hardware") if name != "here"])
def test_what_fits_is_chosen_before_what_does_not_and_the_fast_before_the_slow(hardware, model):
    found = search_plans(compose(PLAN, [f"hardware={hardware}", f"model={model}", "run.dtype=bfloat16"]))
    needed = lambda each: max(each.seconds.total, found.work.display_s)  # noqa: E731
    fits = lambda each: max(each.peak_gib) <= found.hardware.usable_gib and len(each.ranks) * each.host <= found.hardware.host_gib * 2**30  # noqa: E731
    fitting = [each for each in found.plans if fits(each)]
    first = [each for each in fitting if not by_name(each.parallel, found.hardware)] or fitting
    assert found.fits == bool(fitting)
    if fitting:
        assert found.chosen in first
        assert needed(found.chosen) <= EQUAL * min(map(needed, first))
    for each in as_json(found)["plans"]:
        assert set(each) >= FIELDS
        assert each["frames_per_second"] > 0 <= each["first_frame_s"]


def test_every_plan_is_shown_and_one_that_leaves_devices_idle_is_chosen_when_no_other_fits():
    four, two = plan("hardware=4x24gb", "+preset=standard"), plan("hardware=2x24gb", "+preset=standard")
    assert {each.parallel.name for each in four.plans} == set(FAMILIES["wan"].plans)
    assert four.chosen.parallel.name == "pipeline"
    assert two.chosen.parallel.name == "offload" and two.fits
    assert all(each.missing_gib(two.hardware) for each in two.plans if not by_name(each.parallel, two.hardware))


@pytest.mark.parametrize("model", group_choices("model"))
@pytest.mark.parametrize("hardware", ["2x24gb", "4x24gb", "8x24gb"])
@pytest.mark.parametrize("gib", [8, 22])
def test_what_several_devices_do_or_would_do_keeps_all_of_them_busy(hardware, model, gib):
    config = compose(PLAN, [f"hardware={hardware}", f"model={model}", "run.dtype=bfloat16", f"hardware.usable_gib={gib}"])
    found = search_plans(config, idle=False)
    for each in (*found.plans, *(change.plan for change in found.changes)):
        assert not by_name(each.parallel, config.hardware)
        stages = len(each.ranges) - bool(each.parallel.vae_rank)
        assert stages <= 1 or not found.work.clip_frames


def test_sharded_weights_of_the_14b_are_gathered_in_small_pieces():
    found = chosen("hardware=4x24gb", "parallel=fsdp", "parallel.prefetch=0")["items_gib"]
    assert found["weights"] + found["unshard_prefetch"] <= 8.5
    assert found["unshard_prefetch"] <= 0.5


def test_four_small_cards_run_the_14b_in_a_pipeline():
    found = chosen("hardware=4x24gb", "+preset=standard")
    assert (found["plan"], found["fits"]) == ("pipeline", True)
    assert len(found["peak_gib_per_rank"]) == 4
    assert max(found["peak_gib_per_rank"]) <= 21


def test_a_small_video_of_the_14b_leaves_room_on_four_small_cards():
    found = chosen("hardware=4x24gb", "+preset=fast_preview", "video=384x256")
    assert (found["plan"], found["fits"]) == ("pipeline", True)
    assert max(found["peak_gib_per_rank"]) <= 13
    assert found["frames_per_second"] >= 25


def test_the_prompts_encoder_takes_the_same_in_either_precision_of_the_video():
    narrow, wide = (plan("hardware=8x24gb", "+preset=fast_preview", "video=384x256", f"run.dtype={name}") for name in DTYPES)
    assert {each.chosen.ranks[0]["encode"]["text_encoder"] for each in (narrow, wide)} == {2 * TEXT_NUMBERS[4096]}
    assert wide.chosen.ranks[1]["generate"]["weights"] == 2 * narrow.chosen.ranks[1]["generate"]["weights"]
    assert wide.fits


def test_host_memory_is_shared_by_all_ranks_of_a_machine():
    asked = ("hardware=4x24gb", "parallel=fsdp", "parallel.cpu_offload=true", "hardware.usable_gib=1000", "hardware.memory_gib=0")
    each = chosen(*asked, "hardware.host_gib=1000")["host_gib_per_rank"]
    short = plan(*asked, f"hardware.host_gib={2.5 * each}")
    assert short.chosen.missing_gib(short.hardware) == pytest.approx(1.5 * each, rel=0.01)
    assert "too much for" in as_json(short)["chosen"]["reason"]
    assert plan(*asked, f"hardware.host_gib={4.1 * each}").fits


def test_clips_of_the_teacher_fit_on_eight_large_cards():
    found = plan("hardware=8x80gb", "model=wan_s2v_14b", "+preset=quality", "video=1024x704")
    fitting = {each.name for each in found.plans if each.missing_gib(found.hardware) == 0}
    assert "fsdp+context8" in fitting


def test_one_small_card_fits_with_offloading():
    found = chosen("hardware=1x24gb", "+preset=standard")
    assert found["plan"].startswith("offload")
    assert found["fits"]
    assert "wait in" in found["reason"]


@pytest.mark.parametrize(
    "asked",
    [
        ("hardware=1x24gb", "hardware.host_gib=24"),
        ("hardware=1x24gb", "parallel=single"),
        ("hardware=4x24gb", "parallel=fsdp"),
        ("hardware=4x24gb", "parallel=pipeline", "parallel.vae_rank=true"),
        ("hardware=4x24gb", "parallel.vae_rank=true"),
        ("hardware=1x24gb", "model=wan_s2v_14b", "video.size=1024x704", "video.infer_frames=160", "hardware.usable_gib=14"),
    ],
)
def test_proposed_changes_help(asked):
    found = plan(*asked)
    assert not found.fits
    assert found.chosen.missing_gib(found.hardware) > 0
    assert found.changes
    for change in found.changes:
        options = [item for item in asked if item.partition("=")[0] not in {option.partition("=")[0] for option in change.options}]
        assert plan(*options, *change.options).fits, change.sentence


@pytest.mark.parametrize("name", FAMILIES["wan"].plans)
def test_less_needs_less_and_more_devices_need_no_more_of_each(name):
    asked = (f"parallel={name}", "sampler=euler", "sampler.sample_steps=8")
    asked += ("hardware.usable_gib=100", "hardware.memory_gib=0", "hardware.host_gib=1000")
    asked += ("hardware=1x80gb",) if PLANS[name].one_rank else ("hardware=4x24gb",)
    asked += ("offload.resident_gib=4",) if name == "offload" else ()
    peak = lambda *items: max(chosen(*asked, *items)["peak_gib_per_rank"])  # noqa: E731
    for smaller in ("sampler.sample_steps=7", "model.rollout.window_blocks=3", "video.size=640x384"):
        assert peak(smaller) < peak()
    assert PLANS[name].one_rank or peak("hardware.devices=8") < peak()


@pytest.mark.parametrize("devices", range(2, 9))
@pytest.mark.parametrize("steps", [1, 3, 8])
def test_stages_own_every_block_once(devices, steps):
    sampler = ("sampler=euler", f"sampler.sample_steps={steps}")
    config = compose(PLAN, ["model=live_avatar_14b", "video=704x384", "hardware=8x80gb", "parallel=pipeline", *sampler])
    found = search_plans(replace(config, hardware=replace(config.hardware, devices=devices))).chosen
    assert [layer for layers in found.ranges for layer in layers] == list(range(40))
    assert len(found.ranges) == devices == len(found.ranks)


def test_stages_can_be_given():
    found = chosen("hardware=2x24gb", "parallel=pipeline", "parallel.layers=[30,10]")
    assert found["ranges"] == [[0, 30], [30, 40]]
    with pytest.raises(ValueError, match="2 numbers whose sum is 40"):
        plan("hardware=2x24gb", "parallel=pipeline", "parallel.layers=[30,9]")


def test_a_rank_for_the_vae_has_all_of_it_and_no_blocks():
    together, apart = (plan("hardware=8x24gb", "parallel=pipeline", f"parallel.vae_rank={way}").chosen for way in ("false", "true"))
    one, other = ([union(rank) for rank in found.ranks] for found in (together, apart))
    assert [bool(rank["vae"]) for rank in one] == [True, *[False] * 7]
    assert [bool(rank["vae"]) for rank in other] == [*[False] * 7, True]
    last = other[-1]
    assert not last["weights"] + last["kv_rings"] + last["memory_tokens"] + last["text_encoder"]
    assert last["vae"] == one[0]["vae"]
    assert sum(rank["weights"] for rank in other) == pytest.approx(sum(rank["weights"] for rank in one))
    assert [layer for layers in apart.ranges for layer in layers] == list(range(40))
    assert (len(apart.ranges), len(apart.parallel.layers)) == (8, 7)


def test_the_vae_has_a_rank_of_its_own_where_it_fits_nowhere_else():
    large = ("hardware=8x24gb", "video.size=1344x1024", "model.rollout.window_blocks=1")
    found = chosen(*large)
    assert (found["plan"], found["fits"]) == ("pipeline+vae_rank", True)
    assert "the VAE has a rank of its own" in found["reason"]
    assert not chosen(*large, "parallel=pipeline", "parallel.vae_rank=false")["fits"]


def test_a_rank_for_the_vae_without_gain_is_not_used_unless_set():
    frames = lambda *items: chosen("hardware=8x24gb", *items)["frames_per_second"]  # noqa: E731
    assert chosen("hardware=8x24gb")["plan"] == "pipeline"
    assert chosen("hardware=8x24gb", "parallel.vae_rank=true")["plan"] == "pipeline+vae_rank"
    assert frames() >= frames("parallel.vae_rank=true")


@pytest.mark.parametrize(("layers", "name"), [("[10,10,10,10]", "pipeline"), ("[14,13,13]", "pipeline+vae_rank")])
def test_stages_that_are_given_say_whether_the_last_rank_is_for_the_vae(layers, name):
    assert chosen("hardware=4x80gb", "parallel=pipeline", f"parallel.layers={layers}")["plan"] == name


def test_the_slowest_stage_is_as_fast_as_possible():
    costs = [1, 5, 1, 2, 1, 3]
    total = lambda layers: float(sum(costs[layer] for layer in layers))  # noqa: E731
    found = best_ranges(6, 3, lambda stage, layers: total(layers))
    cuts = itertools.combinations_with_replacement(range(7), 2)
    assert max(map(total, found)) == min(max(total(range(a)), total(range(a, b)), total(range(b, 6))) for a, b in cuts)


@pytest.mark.parametrize(
    ("items", "sentence"),
    [
        (("hardware=1x24gb", "parallel=fsdp"), "there is one; use single or offload"),
        (("hardware=1x24gb", "parallel=pipeline"), "use single or offload"),
        (("hardware=4x24gb", "parallel=fsdp", "parallel.context=3"), "choose another parallel.context"),
        (("hardware=4x24gb", "parallel=single", "parallel.context=2"), "leave parallel.context at 1"),
        (("hardware=4x24gb", "parallel=fsdp", "parallel.vae_rank=true"), "goes with parallel=pipeline"),
        (("hardware=4x24gb", "parallel=pipeline", "parallel.context=2", "parallel.vae_rank=true"), "leave parallel.context at 1"),
        (("hardware=1x24gb", "parallel.vae_rank=true"), "there is one; use single or offload"),
        (("hardware=4x24gb", "parallel.vae_rank=perhaps"), "parallel.vae_rank=perhaps is not true or false"),
        (("model=wan_s2v_14b", "video.infer_frames=81"), "multiple of 4"),
        (("hardware=4x24gb", "model=wan_s2v_14b", "parallel=pipeline"), CLIPS_WAIT),
        (("hardware=4x24gb", "model=wan_s2v_14b", "parallel.vae_rank=true"), CLIPS_WAIT),
        (("hardware=4x24bg",), "choose one of: 4x24gb"),
    ],
)
def test_impossible_options_are_refused_in_one_sentence(items, sentence):
    with pytest.raises(ValueError, match=r"\S") as caught:
        plan(*items)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(("extra", "code"), [((), 0), (("parallel=single",), 3), (("parallel=sinlge",), 2)])
def test_the_command_answers_fast_and_its_exit_code_says_whether_it_fits(tmp_path, extra, code):
    script = "import sys\nfrom sonic.main import main\ntry:\n    main()\nfinally:\n    assert 'torch' not in sys.modules\n"
    asked = ["+preset=standard", "model=live_avatar_14b", "hardware=4x24gb", f"json={tmp_path / 'plan.json'}", *extra]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([*interpreter(), "-c", script, "plan", *asked], capture_output=True, text=True, check=False, cwd=tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3  # of its own, whatever else the machine does
    assert done.returncode == code, done.stderr
    if code == 2:
        assert "choose one of" in done.stderr
        return
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["fits"] == (code == 0)
    if code:
        assert "nothing fits" in done.stdout
        assert found["missing_gib"] > 0
        assert found["changes"]
        assert "pipeline" in found["changes"][0]["plan"]
