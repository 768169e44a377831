"""The planner before a job: it chooses a plan or refuses the job, and its estimate is compared with the measurement."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from infer_command import FACE, TINY, babble, write_wav, write_weights
from PIL import Image

from sonic.cli import Entry, compose, run_command
from sonic.commands import infer_command
from sonic.config import Ranks, VideoConfig
from sonic.families.wan import Wan
from sonic.inference.choose_plan import choose_plan
from sonic.parallel.parallel_config import HardwareConfig, PlanConfig
from sonic.planner.hardware import hardware_here, host_bytes
from sonic.planner.search import search_plans

CPU = torch.device("cpu")
CLIPS, STREAM = ("fsdp", "context"), ("pipeline", "fsdp", "context")  # plans that several ranks work in


def config(*overrides: str):
    """The config of a command line."""
    return compose(infer_command.ENTRY, ["+preset=fast_preview", *overrides])


def infer(*overrides: str) -> int:
    """The exit code of a command."""
    return run_command(infer_command.ENTRY, infer_command.infer, overrides)


@pytest.mark.parametrize(("ranks", "plan"), [(1, "single"), (2, "pipeline"), (4, "pipeline")])
def test_parallel_auto_is_the_plan_that_the_planner_chooses(ranks, plan):
    found = choose_plan(config(), Ranks(0, ranks, 0, ranks), CPU)
    assert found.plan.parallel.name == plan
    assert sum(found.plan.parallel.layers or [6]) == 6


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(("model", "plans"), [("preview", STREAM), ("wan_s2v_14b", CLIPS), ("live_avatar_14b", STREAM)])
def test_auto_leaves_no_rank_idle_where_one_alone_would_do(without_weights, model, plans, ranks):
    tiny = [*TINY[:7], "hardware=cpu", "hardware.usable_gib=1000", "video.size=64x64", "model.audio.audio_dim=16", "model.text.text_dim=8"]
    found = choose_plan(config(f"model={model}", *tiny), Ranks(0, ranks, 0, ranks), CPU)
    assert found.plan.parallel.name in plans


@pytest.fixture
def without_weights(monkeypatch):
    """Published models are planned as configured, without their weights."""
    monkeypatch.setattr(Wan, "settled_model", lambda family, model: model)


def test_clips_on_several_ranks_share_their_tokens_or_weights(without_weights):
    found = choose_plan(config("model=wan_s2v_14b", "hardware=8x80gb", "+preset=standard"), Ranks(0, 8, 0, 8), CPU)
    assert found.plan.parallel.name in CLIPS


@pytest.mark.parametrize("ranks", [4, 7])
def test_clips_in_a_pipeline_are_refused_before_anything_is_loaded(without_weights, ranks):
    asked = ["model=wan_s2v_14b", "+preset=standard", "hardware=8x24gb"]
    with pytest.raises(ValueError, match="a clip with full attention"):
        choose_plan(config(*asked, "parallel=pipeline"), Ranks(0, ranks, 0, ranks), CPU)
    assert choose_plan(config(*asked), Ranks(0, ranks, 0, ranks), CPU).plan.parallel.name in CLIPS


def test_a_file_of_requests_is_planned_for_its_largest_picture(without_weights, tmp_path):
    sizes = {"small.png": (512, 300), "large.jpg": (1000, 1400), "tiny.png": (64, 2000)}
    for name, size in sizes.items():
        Image.new("RGB", size).save(tmp_path / name)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    asked = ["model=live_avatar_14b", "+preset=standard", "hardware=8x24gb", "video.size=photo", f"image={tmp_path / 'small.png'}"]
    named = [json.dumps({"image": str(tmp_path / name)}) for name in ("tiny.png", "large.jpg", "broken.png", "nobody.png", "", "a\0b")]
    bad = ["", "{", "[1]", "[" * 100_000, '{"image": 3}', '{"image": null}']

    def size(*overrides: str, lines: Sequence[str] = ()) -> str:
        (tmp_path / "requests.jsonl").write_text("\n".join(lines))
        given = (f"requests={tmp_path / 'requests.jsonl'}",) if lines else ()
        return choose_plan(config(*asked, *overrides, *given, "plan.force=true"), Ranks(0, 8, 0, 8), CPU).config.video.size

    assert size(lines=['{"seed": 1}', *bad]) == size()
    assert size(lines=['{"seed": 1}', *bad, *named]) == size(f"image={tmp_path / 'large.jpg'}") != size()
    assert size(lines=bad) == "photo"
    with pytest.raises(ValueError, match="GiB are missing"):
        choose_plan(config(*asked, "hardware=4x24gb", f"image={tmp_path / 'large.jpg'}"), Ranks(0, 4, 0, 4), CPU)
    (tmp_path / "requests.jsonl").write_text(named[1])
    with pytest.raises(ValueError, match="GiB are missing"):
        choose_plan(config(*asked, "hardware=4x24gb", f"requests={tmp_path / 'requests.jsonl'}"), Ranks(0, 4, 0, 4), CPU)


def test_the_size_of_min_resolution_is_planned(without_weights, tmp_path):
    Image.new("RGB", (600, 400)).save(tmp_path / "me.png")
    Image.new("RGB", (4000, 200)).save(tmp_path / "strip.png")  # too wide for this, which its line of the requests says later
    lines = [json.dumps({"image": str(tmp_path / name)}) for name in ("strip.png", "me.png")]
    (tmp_path / "requests.jsonl").write_text("\n".join(lines))
    asked = ["model=live_avatar_14b", "hardware=8x80gb", "video.size=384x256", "min_resolution=700"]
    for source in (f"image={tmp_path / 'me.png'}", f"requests={tmp_path / 'requests.jsonl'}"):
        assert choose_plan(config(*asked, source), Ranks(0, 8, 0, 8), CPU).config.video == VideoConfig(
            "1024x704", infer_frames=48, fps=25, interpolate="none"
        )
    found = search_plans(compose(Entry("plan", PlanConfig), asked))
    assert (found.work.width, found.work.height) == (1280, 704)
    assert any("not known here, so 1280x704 is planned" in note for note in found.notes)


def test_a_size_that_is_known_is_planned_and_no_photograph_is_opened(without_weights):
    asked = config("model=live_avatar_14b", "hardware=8x80gb", "video.size=photo", "image=nobody.png")
    assert choose_plan(asked, Ranks(0, 8, 0, 8), CPU, size=(704, 384)).config.video.size == "704x384"
    with pytest.raises(ValueError, match="nobody.png does not exist"):
        choose_plan(asked, Ranks(0, 8, 0, 8), CPU)


def test_a_job_that_does_not_fit_its_ranks_is_refused_with_a_plan_that_does(without_weights):
    asked = ["model=live_avatar_14b", "+preset=standard", "hardware=2x24gb", "video.size=704x384"]
    with pytest.raises(ValueError, match=r"GiB are missing for parallel=pipeline on 2 x 22\.2 GiB; would fit: ") as refusal:
        choose_plan(config(*asked), Ranks(0, 2, 0, 2), CPU)
    for change in re.findall(r"\(([\w.]+=[^()]*)\)", str(refusal.value).partition("plan.force")[0]):
        assert choose_plan(config(*asked, *change.split()), Ranks(0, 2, 0, 2), CPU).plan.parallel.name in STREAM


def test_a_job_that_does_not_fit_is_refused_with_a_way_out_unless_forced(without_weights):
    small = ["hardware=4x24gb", "hardware.usable_gib=13", "model=live_avatar_14b", "video.size=704x384", "parallel=pipeline"]
    with pytest.raises(ValueError, match=r"GiB are missing for parallel=pipeline on 4 x 13\.0 GiB; would fit: .*plan\.force=true"):
        choose_plan(config(*small), Ranks(0, 4, 0, 4), CPU)
    assert choose_plan(config(*small, "plan.force=true"), Ranks(0, 4, 0, 4), CPU).plan.name == "pipeline"


@pytest.mark.parametrize(
    ("overrides", "device", "resident"), [((), "cuda", 13.3), (("offload.resident_gib=3",), "cuda", 3), ((), "cpu", -1)]
)
def test_offload_keeps_on_a_gpu_as_much_as_fits_or_as_is_set(overrides, device, resident, without_weights):
    plan = ["hardware=1x24gb", "model=live_avatar_14b", "video.size=704x384", "parallel=offload", "offload.kv=host", "plan.force=true"]
    found = choose_plan(config(*plan, *overrides), Ranks(), torch.device(device))
    assert found.plan.parallel.offload.resident_gib == pytest.approx(resident, abs=0.3)
    assert found.plan.parallel.offload.kv == "host"


@pytest.mark.parametrize(("local", "copies"), [(4, 4), (2, 2)])
def test_copies_on_a_machine_share_its_host_memory(local, copies, without_weights):
    plan = ["hardware=4x24gb", "model=live_avatar_14b", "video.size=704x384", "parallel=offload", "parallel.replicas=-1", "plan.force=true"]
    found = choose_plan(config(*plan), Ranks(0, 4, 0, local), CPU)
    assert found.config.hardware.devices == 1
    assert found.config.hardware.host_gib == 224 / copies


def test_the_command_refuses_without_making_files(tmp_path, capsys):
    assert infer("hardware=cpu", "hardware.usable_gib=0.55", f"run.folder={tmp_path / 'runs'}", *FACE) == 2
    assert "GiB are missing" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("plan", "asked"), [("fsdp", "context=2"), ("fsdp", "replicas=2"), ("zero3", "context=2"), ("single", "replicas=-1")]
)
def test_a_plan_given_by_name_is_run(plan, asked):
    found = choose_plan(config(f"parallel={plan}", f"parallel.{asked}", "model.trunk.num_heads=2"), Ranks(0, 2, 0, 2), CPU)
    assert found.plan.parallel.name == plan


@pytest.mark.parametrize(("ranks", "asked"), [(2, "replicas=2"), (1, "replicas=1")])
def test_a_rank_for_the_vae_needs_a_second_rank(ranks, asked):
    with pytest.raises(ValueError, match=r"vae_rank=true needs 2 ranks or more for a video and there is 1"):
        choose_plan(config("parallel=pipeline", "parallel.vae_rank=true", f"parallel.{asked}"), Ranks(0, ranks, 0, ranks), CPU)


def test_the_result_has_estimate_and_measurement_side_by_side_and_the_place_of_the_face(tmp_path):
    recording, weights = write_wav(tmp_path / "babble.wav", babble(1.0)), write_weights(tmp_path / "weights")
    assert infer(*TINY, *FACE, f"weights={weights}", f"audio={recording}", f"run.folder={tmp_path}", "name=here") == 0
    result = json.loads((tmp_path / "here" / "result.json").read_text())
    plan = result["plan"]
    assert plan["plan"] == "single"
    assert (result["face"]["face_box"], result["face"]["face.mouth"]) == ([165, 70, 115, 115], [223, 160, 22, 0])
    assert len(plan["predicted_gib_per_rank"]) == len(plan["measured_gib_per_rank"]) == 1
    assert 0 <= plan["measured_gib_per_rank"][0] < 2


def test_hardware_auto_is_detected_and_named_hardware_is_kept():
    here = HardwareConfig(name="here")
    alone, two = (hardware_here(here, CPU, ranks=count, local_ranks=count) for count in (1, 2))
    assert two.devices == 2
    assert 2 * two.usable_gib < host_bytes() / 2**30
    assert alone.usable_gib > two.usable_gib
    named = HardwareConfig(name="4x24gb", usable_gib=22.2, devices=4, link="host")
    given = hardware_here(replace(here, usable_gib=3.5), CPU, ranks=1, local_ranks=1)
    assert given == replace(alone, usable_gib=3.5)
    assert hardware_here(named, CPU, ranks=2, local_ranks=2) == replace(named, devices=2)
