"""What the planner says of trainings: it adds up, it is what a step takes, and what it proposes helps."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from sonic.app import Entry, compose, options
from sonic.counts import weights
from sonic.model.adapters import Adapters
from sonic.model.dit import AvatarDiT
from sonic.parallel.settings import PlanConfig
from sonic.parallel.training_memory import ITEMS
from sonic.parallel.training_plans import planned_training, training_json
from sonic.parallel.training_work import learnt, parts, training
from sonic.train.dry_run import track_training
from sonic.train.objective_settings import OBJECTIVE_CONFIGS
from sonic.train.settings import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
PLAN = Entry("plan", PlanConfig)
TRAIN = Entry("train", TrainConfig, collections=("train", "distill"), variants={"objective": OBJECTIVE_CONFIGS})
BIG = ("model=live_avatar_14b", "video.size=384x256")
WIDE = (  # three blocks of the 14B's proportions
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
TRAININGS = [name for name in options("task") if name != "film"]


def plan(*items):
    return planned_training(compose(PLAN, [*BIG, *items]))


def peak(*items):
    return plan("hardware=8x80gb", "parallel=fsdp", *items).chosen.peak_gib


@pytest.mark.parametrize(
    "items",
    [
        ("task=distill", "hardware=4x24gb"),
        ("task=distill", "hardware=8x80gb", "video.size=704x384", "task.learn.rank=16"),
        ("task=distill", "hardware=2x24gb", "task.recompute=false"),
        ("task=train", "hardware=8x80gb"),
        ("task=train", "hardware=2x24gb", "task.precision=float32", "task.batch_size=2"),
        ("task=audio_adapter", "hardware=4x80gb"),
    ],
)
def test_what_is_predicted_is_what_a_step_takes(items):
    found = planned_training(compose(PLAN, [*WIDE, "parallel=fsdp", *items]))
    tracked = track_training(found.work, found.hardware, found.chosen)
    assert found.chosen.peak_gib == pytest.approx(max(tracked.values()), rel=0.05)
    assert set(tracked) <= set(found.chosen.moments)
    assert not dist.is_initialized()
