"""Compiled regions: as the code that they are compiled from, compiled once, and only where that is asked for and pays."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from infer_command import FACE, TINY, babble, write_wav, write_weights
from tiny import conditions, latents_of, tiny_model
from torch._inductor import config as inductor
from torch._inductor import cpp_builder
from torch.testing import assert_close

from sonic.cli import run_command
from sonic.commands import infer_command
from sonic.inference import components as module
from sonic.inference.components import Components, compile_fault
from sonic.model import compile as regions
from sonic.model.compile import COMPILE_TIME, compiled_regions, missing_compiler, region
from sonic.model.dit import AvatarDiT
from sonic.parallel.context import DistributedContext
from sonic.parallel.mesh import World

pytestmark = pytest.mark.skipif(bool(missing_compiler(torch.device("cpu"))), reason="torch.compile needs a C++ compiler; install g++")

BLOCKS = 4  # two more than the ring of the tiny model holds
REGIONS = 8  # four of a block, three of an injector, the rotation: for all layers and steps


@pytest.fixture
def without_code(monkeypatch):
    """Regions are compiled as far as the graph, which torch then runs: enough for what is not about the generated code."""
    regions._compiled.cache_clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    yield
    regions._compiled.cache_clear()


@pytest.fixture
def no_compiler():
    cpp_builder.cpp_compiler_search.cache_clear()
    with inductor.patch({"cpp.cxx": "no-such-compiler"}):
        yield
    cpp_builder.cpp_compiler_search.cache_clear()


def compiled_model() -> AvatarDiT:
    model = tiny_model().requires_grad_(False)
    model.compiled = True
    return model


def test_compiled_blocks_equal_plain_ones_and_nothing_is_compiled_after_the_first():
    plain = latents_of(tiny_model(), conditions(8), BLOCKS)
    model, before = compiled_model(), COMPILE_TIME.number
    latents_of(model, conditions(2), 1)
    assert COMPILE_TIME.number == before + REGIONS
    assert_close(latents_of(model, conditions(8), BLOCKS), plain, atol=1e-5, rtol=1e-5)
    assert COMPILE_TIME.number == before + REGIONS


def test_a_compiled_clip_equals_a_plain_one(without_code):
    latents, timestep, given = torch.randn(1, 4, 2, 16, 16), torch.tensor([400.0]), conditions(2)
    with torch.no_grad():
        plain, found = (model(latents, timestep, given) for model in (tiny_model(), compiled_model()))
    assert_close(found, plain, atol=1e-5, rtol=1e-5)


def test_a_region_runs_as_it_is_written_where_gradients_are_needed(without_code):
    doubled, x, before = region(lambda x: 2 * x), torch.ones(3, requires_grad=True), COMPILE_TIME.number
    with compiled_regions(True):
        doubled(x).sum().backward()
        assert COMPILE_TIME.number == before
        with torch.no_grad():
            assert_close(doubled(x), 2 * torch.ones(3))
    assert COMPILE_TIME.number == before + 1
    assert_close(x.grad, 2 * torch.ones(3))


def begun(monkeypatch, device: str, mode: str, *, seconds: tuple[float, ...], lack: str = "", plan: str = "single") -> list[bool]:
    """Whether each of several videos of these lengths runs compiled."""
    monkeypatch.setattr(module, "missing_compiler", lambda _: lack)
    model, context = tiny_model(), DistributedContext(World(plan, torch.device(device)))
    components, found = Components(model.config, context, make_autoencoder=list, model=model, compile=mode), []
    for length in seconds:
        components.begin_video(length)
        found.append(model.compiled)
    return found


def test_auto_compiles_on_cuda_for_the_second_video_or_a_long_one(monkeypatch):
    assert begun(monkeypatch, "cuda", "auto", seconds=(20, 20)) == [False, True]
    assert begun(monkeypatch, "cuda", "auto", seconds=(61,)) == [True]
    assert begun(monkeypatch, "cpu", "auto", seconds=(61, 61)) == [False, False]
    assert begun(monkeypatch, "cpu", "true", seconds=(1,)) == [True]
    assert begun(monkeypatch, "cuda", "false", seconds=(61, 61)) == [False, False]


def test_auto_without_a_compiler_warns_once_and_runs_plain(monkeypatch, caplog):
    assert begun(monkeypatch, "cuda", "auto", seconds=(61, 61, 61), lack="the package triton") == [False] * 3
    assert caplog.text.count("run.compile=auto: torch.compile needs the package triton, which is not installed here") == 1


def test_zero3_is_never_compiled(monkeypatch):
    assert "parallel=zero3 replaces weights while layers run" in compile_fault(World("zero3", torch.device("cpu")))
    assert begun(monkeypatch, "cuda", "auto", seconds=(61,), plan="zero3") == [False]


@pytest.fixture
def command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights, recording = write_weights(tmp_path / "weights"), write_wav(tmp_path / "speech.wav", babble(0.5))
    given = (f"audio={recording}", f"weights={weights}", "name=video", "device=cpu", *FACE, *TINY)
    return lambda *argv: run_command(infer_command.ENTRY, infer_command.infer, [*given, *argv])


def test_true_without_a_compiler_is_refused_in_a_sentence(command, capsys, no_compiler, tmp_path):
    assert command("run.compile=true") == 2
    assert "run.compile=true: torch.compile needs a C++ compiler (g++), which is not installed here; use run.compile=false" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "runs/video").exists()


def test_the_seconds_of_compiling_are_in_the_result_and_the_log(command, without_code, tmp_path):
    assert command("run.compile=true") == 0
    seconds = json.loads((tmp_path / "runs/video/result.json").read_text())["stages_s"]
    assert 0 < seconds["compile"] < seconds["denoise"]
    text = (tmp_path / "runs/video/log.txt").read_text()
    assert "torch keeps what it compiles in" in text
    assert "pieces of the transformer were compiled in" in text


def test_what_is_not_a_value_of_compile_is_refused(command, capsys):
    assert command("run.compile=graphs") == 2
    assert "run.compile=graphs is unknown; choose one of" in capsys.readouterr().err
