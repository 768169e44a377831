"""What W&B gets of offline runs, as its own program sends it: facts, curves, media, and the lineage from data to evaluation."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from run_files import read_scalars
from safetensors.torch import save_file
from wandb_recorder import record_wandb
from wandb_server import KEY, synced

from sonic.commands import evaluate_command, judge_command
from sonic.config import Ranks
from sonic.data.clips import write_index
from sonic.system.run_folder import Run
from sonic.training import build
from sonic.training.build import run_training
from sonic.training.lineage import Artifact, dataset_artifact, digest, evaluation_artifact, weights_artifact
from sonic.training.log import RunLog
from sonic.training.objective_config import VisemeConfig
from sonic.training.train_config import BudgetConfig, DataConfig, LogConfig, TrainConfig, WandbConfig
from sonic.training.wandb_log import log_evaluation

FIGURES = {"sync_correlation": {"mean": 0.9, "ci95": 0.1, "clips": [0.9]}, "openings": [[0.0]], "peak_rss_gib": 1.5}


@pytest.fixture
def config(tmp_path):
    tensors = {"a/mel": torch.zeros(48, 40), "a/visemes": torch.rand(24, 5, generator=torch.Generator().manual_seed(0))}
    (tmp_path / "clips").mkdir()
    save_file(tensors, tmp_path / "clips/a.safetensors")
    clip = {"name": "a", "shard": "a.safetensors", "latent_frames": 6, "tensors": ["mel", "visemes"]}
    write_index(tmp_path / "clips", [clip], seed=7)
    return TrainConfig(
        name="first", export=str(tmp_path / "first/speech.safetensors"), objective=VisemeConfig(),
        data=DataConfig(folder=str(tmp_path / "clips"), window=6), budget=BudgetConfig(max_steps=2, batch_size=2),
        log=LogConfig(every_steps=1, bar=False, wandb="offline", tags=["one", "two"], notes="a note", group="ours", entity="lab"),
    )  # fmt: skip


def test_wandbs_own_reader_finds_facts_curves_and_the_lineage_of_data_weights_student_and_evaluation(config, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("SECRET_TOKEN", KEY)
    run_training(config, tmp_path / "first", commit="abc123", command="sonic train")
    monkeypatch.setattr(build, "load_initial_weights", lambda *expected: None)
    second = replace(config, name="second", init_from=config.export, export=str(tmp_path / "second/student.safetensors"))
    second.log = replace(config.log, histograms_every=2, artifacts="weights", job_type="distill")
    run_training(second, tmp_path / "second", commit="abc123", command="sonic train")
    (tmp_path / "scored").mkdir()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "scored/clip_000.png")
    made, student = (
        evaluation_artifact("scored", FIGURES, str(tmp_path / "scored")),
        weights_artifact(tmp_path / "second/student.safetensors"),
    )
    log_evaluation(tmp_path / "scored", config.log, made, job_type="evaluate", facts={"eval": {"clips": 1}}, inputs=[student])

    server = synced([tmp_path / name for name in ("first", "second", "scored")])
    first, second, scored = (server.runs[(tmp_path / name / "wandb_id.txt").read_text()] for name in ("first", "second", "scored"))
    assert first.about == {"displayName": "first", "groupName": "ours", "jobType": "train", "tags": ["one", "two"], "notes": "a note"}
    assert first.config["optim"]["lr"] == config.optim.lr and first.config["provenance"]["versions"]["torch"] == torch.__version__
    assert (second.about["jobType"], scored.about["jobType"]) == ("distill", "evaluate")
    for row, line in zip(first.history, read_scalars(tmp_path / "first"), strict=True):
        curves = {name: value for name, value in line.items() if "/" in name}
        assert len(curves) > 8 and curves.items() <= row.items() and row["_step"] == line["step"]
    weights = second.history[-1]["student/weights/viseme_head.weight"]
    assert weights["_type"] == "histogram" and sum(weights["values"]) == 5 * 160
    assert scored.history[-1]["eval/sync_correlation"] == 0.9 and scored.history[-1]["eval/sheets"]["count"] == 1
    assert {name: found["type"] for name, found in first.used.items()} == {"code": "code", "data-clips": "dataset"}
    assert first.used["data-clips"]["metadata"]["seed"] == 7
    assert second.used["data-clips"]["digest"] == first.used["data-clips"]["digest"]
    assert second.used["speech"]["digest"] == first.made["speech"]["digest"]
    assert {name: found["type"] for name, found in second.made.items()} == {"student": "model", "student-file": "weights"}
    assert scored.used["student"]["digest"] == second.made["student"]["digest"]
    assert scored.made["scored-evaluation"]["type"] == "evaluation"
    assert not any(KEY[:40] in sent for sent in server.sent)


def test_the_same_weights_are_the_same_artifact_and_others_are_not(tmp_path):
    for name, content in {"a": 0, "b": 0, "c": 1}.items():
        (tmp_path / name).write_bytes(bytes(40 << 20)[:-1] + bytes([content]))
    equal, again, other = (digest([tmp_path / name]) for name in "abc")
    assert equal == again != other
    assert digest([tmp_path / "a", tmp_path / "b"]) != equal


def test_drawn_people_are_data_too():
    assert dataset_artifact(DataConfig(source="drawn"), object()).identity["source"] == "drawn"


def test_an_artifact_that_cannot_be_logged_does_not_end_a_run(tmp_path, monkeypatch, caplog):
    record_wandb(monkeypatch)
    with RunLog(tmp_path, LogConfig(wandb="offline", bar=False), name="details").open(0) as log:
        log.artifact(Artifact("mine", "model", {}, files=[tmp_path / "missing.md"]))
    assert "the artifact mine could not be logged" in caplog.text


@pytest.mark.parametrize(
    ("command", "config_of", "name", "used"),
    [
        (evaluate_command, lambda asked: evaluate_command.ENTRY.schema(log=asked), "evaluate", ["code", "preview_dit"]),
        (judge_command, lambda asked: judge_command.ENTRY.schema(mp4="clip.mp4", log=asked), "judge", ["code", "clip"]),
    ],
)
def test_evaluate_and_judge_log_their_figures_and_what_they_are_of(command, config_of, name, used, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clip.mp4").write_bytes(b"a video")
    judged = {"sound_correlation": 1.0, "sound_offset_ms": 0.0, "sound_length_ms": 0.0, "frame_ms": 40.0}
    figures = FIGURES if name == "evaluate" else judged
    monkeypatch.setattr(f"sonic.evaluation.{name}.{name}", lambda config: figures)
    runs = record_wandb(monkeypatch)
    config = config_of(WandbConfig(wandb="offline", tags=["x"]))
    if name == "evaluate":
        config.model = replace(config.model, weights="teacher")
    assert not command.score(config, Run((str(tmp_path), "scored"), "{}", command=[name], root=tmp_path, ranks=Ranks()))
    (run,) = runs
    assert run.keywords["job_type"] == name and run.keywords["tags"] == ["x"] and run.exit_code == 0
    assert [each.name for each in run.used] == used and [each.type for each in run.made] == ["evaluation"]
    assert run.logged[0][1].items() >= ({"eval/sync_correlation": 0.9} if name == "evaluate" else {"eval/sound_correlation": 1.0}).items()
    facts = json.loads((tmp_path / "scored/provenance.json").read_text())
    assert facts["provenance"]["command"] == name and facts["log"]["tags"] == ["x"]
