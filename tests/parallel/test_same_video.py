"""The command infer under every plan on two ranks gives the bytes of one rank's video."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from infer_command import FACE
from infer_command_ranks import infer_on

from sonic.data.video import VideoWriter
from sonic.system.program import command_words

ARGUMENTS = ("+preset=fast_preview", "video.num_clip=1", "video.infer_frames=12", "run.threads=1", "device=cpu", *FACE)
APART = ("parallel=pipeline", "parallel.vae_rank=true")
TWO_RANKS = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def generate(folder: Path, plan: str, starter: tuple[str, ...] = ()) -> bytes:
    output = folder / f"{plan}.mp4"
    arguments = (f"parallel={plan}", f"output={output}", f"run.folder={folder / 'runs'}", f"name={plan}", *ARGUMENTS)
    done = subprocess.run(
        [*command_words("infer", *starter), *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return output.read_bytes()


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> bytes:
    return generate(tmp_path_factory.mktemp("alone"), "single")


@pytest.mark.parametrize("plan", ["pipeline", "zero3"])
def test_two_ranks_make_the_video_of_one(plan, alone, tmp_path):
    if plan == "zero3":
        pytest.importorskip("deepspeed", reason="needs the extra [deepspeed]")
    assert generate(tmp_path, plan, TWO_RANKS) == alone


@pytest.mark.parametrize("plan", ["fsdp", "context"])
def test_two_ranks_without_a_launcher_make_the_video_of_one(plan, alone, tmp_path):
    codes, output = infer_on(2, [*ARGUMENTS, f"parallel={plan}", f"output={tmp_path / 'two.mp4'}"], tmp_path)
    assert codes == [0] * 2, output
    assert (tmp_path / "two.mp4").read_bytes() == alone


def test_offloading_makes_the_video_of_one_device(alone, tmp_path):
    assert generate(tmp_path, "offload") == alone


def test_a_bad_request_between_two_videos_changes_neither(alone, tmp_path):
    lines = [{"output": str(tmp_path / "one.mp4")}, {"image": str(tmp_path / "nobody.jpg")}, {"output": str(tmp_path / "two.mp4")}]
    (tmp_path / "requests.jsonl").write_text("\n".join(map(json.dumps, lines)))
    arguments = ("parallel=pipeline", f"requests={tmp_path / 'requests.jsonl'}", f"run.folder={tmp_path / 'runs'}", *ARGUMENTS)
    done = subprocess.run([*command_words("infer", *TWO_RANKS), *arguments], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 1, done.stderr
    assert "2 videos made, 1 requests bad" in done.stdout
    assert (tmp_path / "one.mp4").read_bytes() == (tmp_path / "two.mp4").read_bytes() == alone


def test_layers_on_three_ranks_and_the_vae_on_a_fourth_make_the_video_of_one(alone, tmp_path):
    codes, output = infer_on(4, [*ARGUMENTS, *APART, f"output={tmp_path / 'four.mp4'}", "name=four"], tmp_path)
    assert codes == [0] * 4, output
    assert (tmp_path / "four.mp4").read_bytes() == alone
    plan = json.loads((tmp_path / "runs/four/result.json").read_text())["plan"]
    assert plan["plan"] == "pipeline+vae_rank"
    assert len(plan["measured_gib_per_rank"]) == len(plan["predicted_gib_per_rank"]) == 4


def full_at_first(rank: int) -> None:
    """The first rank's disk is full when it writes its first frames."""
    write, calls = VideoWriter.write, []

    def writes(*arguments) -> None:
        calls.append(1)
        if rank == 0 and len(calls) == 1:
            raise OSError("the disk is full")
        write(*arguments)

    VideoWriter.write = writes


def test_two_pairs_of_ranks_make_videos_side_by_side_and_a_bad_one_changes_none(alone, tmp_path):
    first, *good = [{"output": str(tmp_path / f"{index}.mp4")} for index in range(3)]
    lines = [first, {"image": str(tmp_path / "nobody.jpg")}, *good]  # every other one for each pair
    (tmp_path / "requests.jsonl").write_text("\n".join(map(json.dumps, lines)))
    arguments = (*ARGUMENTS, *APART, "parallel.replicas=2", f"requests={tmp_path / 'requests.jsonl'}")
    codes, output = infer_on(4, arguments, tmp_path, before=full_at_first)
    assert codes == [1, 0, 0, 0], output  # only the first rank exits with 1: a launcher ends all ranks when one fails
    assert "2 videos made, 2 requests bad" in output
    assert "line 1: the disk is full" in output
    assert all(Path(each["output"]).read_bytes() == alone for each in good)
