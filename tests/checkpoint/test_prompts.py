"""Prompts of published models: encoded before the transformer is loaded, by one encoder, and only those that are used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from convert_command import infer

from sonic.checkpoint import converted as converted_module
from sonic.checkpoint.converted import Checkpoint
from sonic.families import family

SMALL = ("video.size=64x64", "run.threads=1", "run.dtype=float32", "video.num_clip=1", "parallel=single")
MODELS = {
    "live": ("model=live_avatar_14b", "video.infer_frames=12"),
    "wan": ("model=wan_s2v_14b", "sampler.sample_steps=1", "video.infer_frames=8"),
}


@pytest.fixture
def events(monkeypatch) -> list[str]:
    """Names of loaded networks and encoded prompts, in order."""
    seen: list[str] = []
    make, build, tokens = Checkpoint._text_encoder, family.build_parallel_model, converted_module.Tokenizer.__call__
    noted = lambda name, work: lambda *given, **named: (seen.append(name), work(*given, **named))[1]  # noqa: E731
    monkeypatch.setattr(Checkpoint, "_text_encoder", noted("encoder", make))
    monkeypatch.setattr(family, "build_parallel_model", noted("transformer", build))
    monkeypatch.setattr(
        converted_module.Tokenizer, "__call__", lambda self, some, length: (seen.append(*some), tokens(self, some, length))[1]
    )
    return seen


def copy_of(ready: Path, model: str, folder: Path) -> Path:
    """A copy of a checkpoint without stored prompts."""
    return shutil.copytree(ready / model, folder / model, ignore=shutil.ignore_patterns("prompts"))


def argv(ready: Path, model: str, folder: Path) -> list[str]:
    return [*MODELS[model], *SMALL, f"checkpoint={copy_of(ready, model, folder)}", f"audio={ready / 'speech.wav'}"]


def file_of(folder: Path, *lines: str) -> Path:
    (folder / "requests.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "requests.jsonl"


def request(folder: Path, name: str) -> str:
    return json.dumps({"prompt": name, "output": str(folder / f"{name}.mp4")})


@pytest.mark.parametrize("kept", [True, False])
def test_prompts_of_all_requests_are_read_by_one_encoder_before_the_transformer(kept, ready, events, tmp_path, monkeypatch):
    if not kept:  # a checkpoint on a disk that is read only
        monkeypatch.setattr(converted_module, "_store", lambda file, tensors: False)
    given = argv(ready, "live", tmp_path)
    lines = [request(tmp_path, "calm"), "{", request(tmp_path, "bright"), request(tmp_path, "calm").replace("calm.mp4", "again.mp4")]
    assert infer(tmp_path, *given, f"requests={file_of(tmp_path, *lines)}", "name=videos") == 1
    assert events == ["encoder", "calm", "bright", "transformer"]
    results = json.loads((tmp_path / "runs/videos/videos.json").read_text())
    assert ["error" in results[line] for line in ("1", "2", "3", "4")] == [False, True, False, False]
    assert all(results[line]["plan"]["plan"] == "single" and results[line]["plan"]["measured_gib_per_rank"] for line in ("1", "3", "4"))


def test_text_features_of_another_length_or_damaged_ones_are_encoded_and_stored_beside_the_others(tmp_path, monkeypatch):
    checkpoint = Checkpoint(tmp_path, {"sources": {"models_t5_umt5-xxl-enc-bf16.pth": "abc"}})
    monkeypatch.setattr(Checkpoint, "_text_encoder", lambda self, device: lambda ids: [torch.ones(each, 4) for each in ids.tolist()])
    monkeypatch.setattr(converted_module, "Tokenizer", lambda folder: lambda prompts, length: (torch.tensor([length]),))
    for _ in range(2):
        assert [checkpoint.prompt_encoder(length, torch.device("cpu"))("calm").shape[1] for length in (3, 5)] == [3, 5]
    files = sorted((tmp_path / "prompts").iterdir())
    assert len(files) == 2
    whole = [path.read_bytes() for path in files]
    for path in files:
        path.write_bytes(path.read_bytes()[:20])  # cut off
    assert [checkpoint.prompt_encoder(length, torch.device("cpu"))("calm").shape[1] for length in (3, 5)] == [3, 5]
    assert [path.read_bytes() for path in files] == whole


def test_a_damaged_file_of_text_features_is_written_again(tmp_path, monkeypatch):
    monkeypatch.setattr(Checkpoint, "_text_encoder", lambda self, device: lambda ids: [torch.ones(3, 4)])
    monkeypatch.setattr(converted_module, "Tokenizer", lambda folder: lambda prompts, length: (torch.tensor([length]),))
    checkpoint = Checkpoint(tmp_path, {"sources": {"models_t5_umt5-xxl-enc-bf16.pth": "abc"}})
    rows = checkpoint.prompt_encoder(3, torch.device("cpu"))("calm")
    (file,) = (tmp_path / "prompts").iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])
    assert torch.equal(checkpoint.prompt_encoder(3, torch.device("cpu"))("calm"), rows)
    assert file.read_bytes() == whole


def test_an_existing_video_is_not_made_again(ready, events, tmp_path):
    given = [*argv(ready, "live", tmp_path), f"requests={file_of(tmp_path, request(tmp_path, 'calm'), request(tmp_path, 'bright'))}"]
    assert infer(tmp_path, *given, "name=first") == 0
    before = [(tmp_path / f"{name}.mp4").stat().st_mtime_ns for name in ("calm", "bright")]
    (tmp_path / "bright.mp4").unlink()
    events.clear()
    assert infer(tmp_path, *given, "name=second") == 0
    assert [*json.loads((tmp_path / "runs/second/videos.json").read_text())] == ["2"]
    assert (tmp_path / "calm.mp4").stat().st_mtime_ns == before[0] and (tmp_path / "bright.mp4").exists()
    assert events == ["transformer"]


@pytest.mark.parametrize(
    ("model", "extra", "read"), [("live", [], ["calm"]), ("wan", ["sampler.negative_prompt=bright"], ["calm", "bright"])]
)
def test_one_encoder_reads_what_a_video_needs(model, extra, read, ready, events, tmp_path):
    """Live Avatar runs without guidance, so the negative prompt is never encoded."""
    assert infer(tmp_path, *argv(ready, model, tmp_path), *extra, "prompt=calm", f"output={tmp_path / 'a.mp4'}") == 0
    assert events == ["encoder", *read, "transformer"]


def test_a_missing_encoder_fails_only_the_videos_that_need_it(ready, tmp_path, capfd):
    given = argv(ready, "live", tmp_path)
    known = [*given, "prompt=calm", f"output={tmp_path / 'known.mp4'}"]
    assert infer(tmp_path, *known) == 0
    shutil.rmtree(tmp_path / "live/text_encoder")
    (tmp_path / "calm.mp4").unlink(missing_ok=True)
    lines = [request(tmp_path, "bright"), request(tmp_path, "calm")]
    assert infer(tmp_path, *given, f"requests={file_of(tmp_path, *lines)}") == 1
    assert (tmp_path / "calm.mp4").exists() and not (tmp_path / "bright.mp4").exists()
    assert "line 1: " in capfd.readouterr().err


@pytest.mark.parametrize("load", [lambda checkpoint: checkpoint._text_encoder(torch.device("cpu")),
                                  lambda checkpoint: checkpoint.loaded("speech_encoder", torch.device("cpu"))])  # fmt: skip
def test_an_encoder_gives_a_heartbeat_with_every_tensor_that_is_moved(load, ready, monkeypatch):
    moved, heartbeats = [], []
    to = torch.Tensor.to
    monkeypatch.setattr("sonic.checkpoint.tensor_files.heartbeat", lambda: heartbeats.append(len(moved)))
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *given, **named: (moved.append(self), to(self, *given, **named))[1])
    load(Checkpoint.open(ready / "live"))
    assert len(heartbeats) > 10
    assert heartbeats == list(range(len(heartbeats)))  # heartbeat and tensor alternate
