"""Validation: videos that the training never sees, and the loss on them."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from run_files import read_scalars
from safetensors.torch import save_file
from test_objectives import config_of
from torch.testing import assert_close

from sonic.data.clips import ClipDataset, read_index, write_index
from sonic.parallel.mesh import World
from sonic.training.build import batch_stream, run_training
from sonic.training.objective_config import FlowMatchConfig, VisemeConfig
from sonic.training.objectives.transformer import SIGMAS
from sonic.training.train_config import BudgetConfig, DataConfig, LogConfig, OptimConfig

VIDEOS, SHARE = 12, 0.3


@pytest.fixture
def folder(tmp_path) -> Path:
    """Clips of several videos, two of each; the portrait of a clip is filled with its video's number."""
    rng, tensors, entries = torch.Generator().manual_seed(0), {}, []
    for number in range(2 * VIDEOS):
        shapes = {"latents": (16, 6, 4, 4), "audio": (1, 160, 24)}
        made = {key: torch.randn(shape, generator=rng) for key, shape in shapes.items()}
        made |= {"latents": 0.1 * made["latents"] + 1, "ref": torch.full((16, 1, 4, 4), number // 2)}
        tensors |= {f"{number}/{key}": tensor for key, tensor in made.items()}
        entry = {"name": str(number), "video": f"{number // 2}.mp4", "shard": "a.safetensors", "latent_frames": 6}
        entries.append({**entry, "tensors": list(made)})
    path = tmp_path / "clips"
    path.mkdir()
    save_file({name: tensor.float() for name, tensor in tensors.items()}, path / "a.safetensors")
    write_index(path, entries)
    return path


def config_for(folder, steps=2, objective=None, share=SHARE):
    base = config_of(objective or FlowMatchConfig(viseme_weight=0.0))
    return replace(
        base,
        data=DataConfig(folder=str(folder), window=6, validation_share=share),
        budget=BudgetConfig(max_steps=steps, batch_size=2, accumulate=2),
        optim=OptimConfig(lr=3e-3, warmup_steps=1),
        log=LogConfig(every_steps=1, bar=False, validation_every=steps),
    )


def validations(run):
    """The losses of the validations of a run, each in the order of SIGMAS."""
    names = [f"eval/validation_loss_sigma_{sigma}" for sigma in SIGMAS]
    return torch.tensor([[line[name] for name in names] for line in read_scalars(run) if names[0] in line])


def videos_of(data):
    return {clip["video"] for clip in data.clips}


def test_whole_videos_are_held_out_and_stay_so_when_others_are_added(folder):
    ours, held_out = (ClipDataset(folder, 6, share=SHARE, held_out=each) for each in (False, True))
    assert videos_of(ours).isdisjoint(videos_of(held_out)) and len(ours) + len(held_out) == 2 * VIDEOS
    assert 0 < len(videos_of(held_out)) < VIDEOS
    index = read_index(folder)
    write_index(folder, [{**index["clips"][0], "video": "new.mp4"}, *index["clips"]])
    assert videos_of(ClipDataset(folder, 6, share=SHARE, held_out=True)) - {"new.mp4"} == videos_of(held_out)
    assert len(ClipDataset(folder, 6)) == 2 * VIDEOS + 1


def test_no_clip_of_a_held_out_video_is_drawn(folder):
    config = config_for(folder)
    ours = ClipDataset(folder, 6, share=SHARE)
    drawn = [batch["ref"].flatten(1)[:, 0] for batch in islice(batch_stream(config, ours, World())(0), 40)]
    assert {f"{int(number)}.mp4" for number in torch.cat(drawn)} == videos_of(ours)


def test_the_loss_on_held_out_clips_falls_when_the_model_learns(folder, tmp_path):
    config = config_for(folder, steps=40)
    config.log.validation_every = 20
    run_training(config, tmp_path / "run")
    half, end = validations(tmp_path / "run")
    assert (end < 0.8 * half).all()


def validated(config, run):
    run_training(config, Path(run))


def test_two_processes_validate_as_one(folder, tmp_path):
    run_training(config_for(folder), tmp_path / "one")
    on_ranks(2, validated, config_for(folder), str(tmp_path / "two"))
    one, two = validations(tmp_path / "one"), validations(tmp_path / "two")
    assert len(one) == 1
    assert_close(one, two, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("share", [1e-9, 0.9999])
def test_few_videos_of_which_none_or_all_would_be_held_out_are_trained_on_with_a_warning(share, folder, tmp_path, caplog):
    run_training(config_for(folder, share=share), tmp_path / "run")
    assert len(ClipDataset(folder, 6, share=share)) == 2 * VIDEOS
    assert "can hold out no video" in caplog.text and len(validations(tmp_path / "run")) == 0


def test_an_objective_without_noise_levels_refuses_validation(folder, tmp_path):
    config = config_for(folder, objective=VisemeConfig())
    with pytest.raises(ValueError, match=r"data.validation_share=0.3 is for objectives that denoise latents; use 0"):
        run_training(config, tmp_path / "run")
