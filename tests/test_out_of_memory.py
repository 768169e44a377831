"""Memory that runs out ends every command in one sentence that says what would help, with exit code 1 and no half-written files."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from infer_command import FACE, TINY, write_weights
from infer_command_ranks import infer_on

from sonic.cli import compose, run_command
from sonic.commands import infer_command, judge_command, precompute_command, train_command
from sonic.config import Ranks
from sonic.data import own_videos
from sonic.families.wan import Wan
from sonic.inference import choose_plan as choose
from sonic.inference.choose_plan import WOULD_HELP, choose_plan, would_help
from sonic.model.dit import AvatarDiT
from sonic.system.out_of_memory import out_of_memory
from sonic.system.worker import Worker
from sonic.training import plan_training
from sonic.vae.motion_vae import WarpAutoencoder

CPU = torch.device("cpu")
OF_DEVICE = (  # as torch writes it
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.25 GiB of which 1.19 GiB is free. Process 7 has "
    "78.06 GiB memory in use. Of the allocated memory 70.00 GiB is allocated by PyTorch, and 1.00 GiB is reserved by PyTorch but "
    "unallocated. If reserved but unallocated memory is large try setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True."
)
SHORT = "CUDA out of memory, Tried to allocate 2.00 GiB, GPU 0 has a total capacity of 79.25 GiB of which 1.19 GiB is free; "
OTHERS = "end what else uses it, or use a device with more"
RUNS_OUT = {"forward": (AvatarDiT, "run_blocks"), "decoding": (WarpAutoencoder, "decode")}


def runs_out(*arguments, **named):
    raise torch.OutOfMemoryError(OF_DEVICE)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return write_weights(tmp_path_factory.mktemp("parts") / "weights")


def only_message(text: str) -> str:
    """The one line of the program about its end."""
    assert "Traceback" not in text
    (line,) = [line for line in text.splitlines() if line.startswith("sonic:")]
    return line


@pytest.mark.parametrize("where", RUNS_OUT)
def test_a_video_ends_in_one_sentence_and_leaves_nothing(where, weights, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(*RUNS_OUT[where], runs_out)
    argv = [f"weights={weights}", f"output={tmp_path / 'me.mp4'}", f"run.folder={tmp_path / 'runs'}", *FACE, *TINY]
    assert run_command(infer_command.ENTRY, infer_command.infer, argv) == 1
    assert only_message(capsys.readouterr().err).endswith(f"rank 0: {SHORT}{OTHERS}")
    assert list(tmp_path.rglob("*")) == []


def second_rank_runs_out(rank: int) -> None:
    if rank == 1:
        AvatarDiT.run_blocks = runs_out


def test_both_of_two_ranks_name_the_one_that_ran_out(weights, tmp_path):
    argv = ["parallel=pipeline", f"weights={weights}", f"output={tmp_path / 'me.mp4'}", *FACE, *TINY]
    codes, output = infer_on(2, argv, tmp_path, before=second_rank_runs_out)
    assert codes == [1, 1], output
    lines = [line for line in output.splitlines() if "sonic:" in line]
    assert all(f"rank 1: {SHORT.rstrip('; ')}" in line for line in lines), output
    assert len(lines) == 2 and "Traceback" not in output, output
    assert not list(tmp_path.rglob("*.mp4"))


def test_a_request_that_runs_out_says_what_would_help_and_the_others_are_made(weights, tmp_path, monkeypatch, capsys):
    done, calls = AvatarDiT.run_blocks, []

    def once(*arguments):
        calls.append(1)
        return runs_out() if len(calls) == 1 else done(*arguments)

    monkeypatch.setattr(AvatarDiT, "run_blocks", once)
    videos = [tmp_path / "a.mp4", tmp_path / "b.mp4"]
    (tmp_path / "requests.jsonl").write_text("".join(f'{{"output": "{path}"}}\n' for path in videos))
    argv = [f"requests={tmp_path / 'requests.jsonl'}", "name=r", f"weights={weights}", f"run.folder={tmp_path / 'runs'}", *FACE, *TINY]
    assert run_command(infer_command.ENTRY, infer_command.infer, [*argv, "video.num_clip=1", "video.infer_frames=12"]) == 1
    assert f"line 1: {SHORT}{OTHERS}" in capsys.readouterr().err
    assert [path.exists() for path in videos] == [False, True]


def test_a_data_set_ends_in_one_sentence_and_no_video_is_left_out_for_it(tmp_path, monkeypatch, capsys):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos/a.mp4").write_bytes(b"a video")
    monkeypatch.setattr(own_videos, "clips_of", runs_out)
    entry = replace(precompute_command.ENTRY, location=lambda config: (str(tmp_path / "runs"), "none"))
    argv = [f"data.source={tmp_path / 'videos'}", f"folder={tmp_path / 'clips'}", "workers=0"]
    assert run_command(entry, precompute_command.make, argv) == 1
    assert only_message(capsys.readouterr().err).endswith(f"rank 0: {SHORT}{OTHERS}")
    assert list((tmp_path / "clips").iterdir()) == []


def test_an_error_of_a_child_process_is_recognised_in_its_parent():
    worker = Worker(int)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        worker.call(runs_out)
    worker.close()
    assert out_of_memory(caught.value) == SHORT.rstrip("; ")
    with pytest.raises(RuntimeError) as caught:
        Worker(runs_out).call(int)
    assert "CUDA out of memory" in out_of_memory(caught.value)


ERRORS = {
    "the host, by torch": lambda: torch.empty(2**50),
    "the host, by numpy": lambda: np.zeros(2**50),
    "the host, by Python": lambda: bytearray(2**60),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_every_command_ends_so_whatever_allocates(kind, tmp_path, capsys):
    job = lambda config, run: run.open() and ERRORS[kind]() and None  # noqa: E731
    entry = replace(judge_command.ENTRY, location=lambda config: (str(tmp_path), "run"))
    assert run_command(entry, job, ["mp4=a.mp4", "image=a.png", "audio=a.wav"]) == 1
    assert re.fullmatch(r"sonic: .*rank 0: out of memory.*; " + OTHERS, only_message(capsys.readouterr().err))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text", ["CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"]
)
def test_other_words_of_cuda_for_it_are_known(text):
    assert "out of memory" in out_of_memory(RuntimeError(text))


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: an illegal memory access"), ValueError("out of memory"), KeyError("a")])
def test_other_errors_are_not_taken_for_it(error):
    assert out_of_memory(error) == ""


@pytest.mark.parametrize("model", ["live_avatar_14b", "wan_s2v_14b"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_what_would_help_a_video_needs_a_tenth_less_than_its_plan(model, ranks, monkeypatch):
    monkeypatch.setattr(Wan, "settled_model", lambda family, config: config)
    argv = [f"model={model}", "+preset=standard", f"hardware={'1xh200' if ranks == 1 else '8x141gb'}", "video.size=704x384"]
    there, config = Ranks(0, ranks, 0, ranks), compose(infer_command.ENTRY, argv)
    before = max(choose_plan(config, there, CPU).plan.peak_gib)
    sentence = out_of_memory(torch.OutOfMemoryError(OF_DEVICE), WOULD_HELP, config, there)
    assert sentence.startswith(f"{SHORT}less is needed with ")
    changes = [found.split() for found in re.findall(r"\(((?:\S+=\S+ ?)+)\)", sentence)]
    assert any("video.size=" in option for options in changes for option in options)
    for options in changes:
        if "parallel.cpu_offload=true" in options and ranks == 1:
            continue  # planned as single, though a rank alone keeps its weights in host memory as well
        ran = [] if options[0].startswith("parallel=") else [f"parallel={choose_plan(config, there, CPU).plan.parallel.name}"]
        changed = compose(infer_command.ENTRY, [*argv, *ran, *options])
        assert max(choose_plan(changed, there, CPU).plan.peak_gib) <= 0.9 * before + 1e-6, options


def test_what_would_help_a_training_are_options_of_the_training():
    config = compose(train_command.ENTRY, ["+distill=live_avatar_4step", "budget.batch_size=2"])
    words = plan_training.would_help(config, Ranks(), torch.OutOfMemoryError(OF_DEVICE))
    assert "(budget.batch_size=1)" in words and "(objective.learn.rank=64)" in words
    for options in re.findall(r"\(((?:\S+=\S+ ?)+)\)", words):
        compose(train_command.ENTRY, ["+distill=live_avatar_4step", *options.split()])


def test_host_memory_that_runs_out_beside_a_gpu_is_not_saved_by_moving_more_to_the_host(monkeypatch):
    monkeypatch.setattr(Wan, "settled_model", lambda family, config: config)
    monkeypatch.setattr(choose, "find_device", lambda name: torch.device("cuda"))
    argv = ["model=live_avatar_14b", "+preset=standard", "hardware=1x80gb", "video.size=704x384", "parallel=offload"]
    config = compose(infer_command.ENTRY, argv)
    device = would_help(config, Ranks(), torch.OutOfMemoryError(OF_DEVICE))
    library = would_help(config, Ranks(), RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"))
    host = would_help(config, Ranks(), RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    assert "kv=host" in device and library == device and "kv=host" not in host
