"""Sample videos of the student during training: saved, scored, and without effect on the training."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from ranks import on_ranks
from run_files import read_scalars, save_weights
from safetensors.torch import save_file
from video_files import read_frames

from sonic.config import AdapterConfig, AudioConfig, ModelConfig, MotionConfig, RolloutConfig, TextConfig, TrunkConfig
from sonic.data.clips import write_index
from sonic.model.dit import AvatarDiT
from sonic.training.build import run_training
from sonic.training.objective_config import ConsistencyConfig, FlowMatchConfig, VisemeConfig
from sonic.training.train_config import BudgetConfig, DataConfig, LogConfig, SpeedConfig, TrainConfig


@pytest.fixture
def clips(tmp_path):
    rng = torch.Generator().manual_seed(0)
    shapes = {"latents": (16, 6, 12, 12), "ref": (16, 1, 12, 12), "audio": (1, 160, 24), "visemes": (24, 5), "head": (24, 4)}
    tensors = {f"c{n}/{name}": torch.randn(shape, generator=rng) / 10 for n in range(2) for name, shape in shapes.items()}
    folder = tmp_path / "clips"
    folder.mkdir()
    save_file(tensors, folder / "a.safetensors")
    write_index(folder, [{"name": f"c{n}", "shard": "a.safetensors", "latent_frames": 6, "tensors": sorted(shapes)} for n in range(2)])
    return folder


def config(clips, objective, *, samples_every=2, **model):
    samples = {"sample_seconds": 2.0} if samples_every else {}
    samples |= {"sample_steps": 1} if samples and not hasattr(objective, "sampler") else {}
    sizes = ModelConfig(
        trunk=TrunkConfig(32, 64, 2, 2, [1, 2, 2], freq_dim=32), audio=AudioConfig(160, 1, 2, [0]), text=TextConfig(8, 2),
        motion=MotionConfig(), rollout=RolloutConfig(block_frames=3, window_blocks=2), prediction="clean", resolution=96, **model,
    )  # fmt: skip
    return TrainConfig(
        model=sizes, objective=objective, data=DataConfig(folder=str(clips), window=6), budget=BudgetConfig(max_steps=4, batch_size=2),
        log=LogConfig(every_steps=1, bar=False, samples_every=samples_every, **samples),
    )  # fmt: skip


def test_sample_videos_do_not_change_the_training(clips, tmp_path):
    pytest.importorskip("espeakng_loader")
    for name, every in (("seen", 2), ("unseen", 0)):
        made = config(clips, FlowMatchConfig(), samples_every=every)
        made.budget = BudgetConfig(max_steps=3, batch_size=2)
        run_training(made, tmp_path / name)
    seen, unseen = read_scalars(tmp_path / "seen"), read_scalars(tmp_path / "unseen")
    assert [line["train/student_loss"] for line in seen] == [line["train/student_loss"] for line in unseen]
    for line in seen:
        has_video = line["step"] in (2, 3)  # 3 is the last
        assert has_video == ("video" in line) == ("eval/sync_correlation" in line) == ("eval/dynamics_ratio" in line)
        if has_video:
            assert sum(1 for _ in read_frames(tmp_path / "seen" / line["video"])) == 50
        assert line["perf/peak_gib"] > 0.1 and line["perf/seconds_per_step"] > 0


def test_a_sample_video_that_cannot_be_written_does_not_end_the_run(clips, tmp_path, monkeypatch, caplog):
    pytest.importorskip("espeakng_loader")
    monkeypatch.setattr("sonic.data.video.shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    made = config(clips, FlowMatchConfig())
    made.budget = BudgetConfig(max_steps=1, batch_size=2)
    run_training(made, tmp_path / "run")
    (line,) = read_scalars(tmp_path / "run")
    assert "video" not in line and "eval/sync_correlation" in line
    assert "sample video of step 1 could not be written" in caplog.text


def test_a_distilled_student_is_sampled_with_its_own_number_of_steps(clips, tmp_path):
    pytest.importorskip("espeakng_loader")
    objective = ConsistencyConfig(learn=AdapterConfig(rank=2))
    made = config(clips, objective, samples_every=4)
    made.speed = SpeedConfig(precision="bfloat16", recompute=True)
    torch.manual_seed(1)
    save_weights(AvatarDiT(made.model), tmp_path / "dit.safetensors")
    made.model.weights = str(tmp_path / "dit.safetensors")
    run_training(made, tmp_path / "run")
    assert (tmp_path / "run/samples/step_00000004.mp4").is_file()


def trained(folder, clips):
    made = config(clips, FlowMatchConfig())
    made.speed = SpeedConfig(precision="bfloat16", engine="fsdp")
    made.budget = BudgetConfig(max_steps=2, batch_size=2, accumulate=2)
    run_training(made, folder)


def test_processes_with_a_sharded_student_make_its_video_together(clips, tmp_path):
    pytest.importorskip("espeakng_loader")
    on_ranks(2, trained, tmp_path / "run", clips)
    (_, last) = read_scalars(tmp_path / "run")
    assert (tmp_path / "run" / last["video"]).is_file() and -1 <= last["eval/sync_correlation"] <= 1


def test_sample_videos_of_other_objectives_are_refused(tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    save_file({"a/mel": torch.randn(48, 40), "a/visemes": torch.rand(24, 5)}, folder / "a.safetensors")
    write_index(folder, [{"name": "a", "shard": "a.safetensors", "latent_frames": 6, "tensors": ["mel", "visemes"]}])
    with pytest.raises(ValueError, match="objective=viseme makes no videos"):
        run_training(config(folder, VisemeConfig()), tmp_path / "run")


def test_sample_videos_have_the_expected_figures():
    with pytest.raises(ValueError, match="log.samples_every=30 must be a multiple of log.every_steps=20"):
        LogConfig(samples_every=30)
