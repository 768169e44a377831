"""Frozen weights are held in half precision, trainable ones in float32."""

from __future__ import annotations

import torch
from ranks import on_ranks
from run_files import read_scalars
from test_training_ranks import run_of

from sonic.training.loop import train


def halved(folder, name):
    """Two steps of a training in bfloat16: precisions of frozen and of trainable weights; runs on every rank."""
    run = run_of(folder, name, steps=2, precision="bfloat16", recompute=True)
    with torch.no_grad():  # decay leaves zeros where they are, so that only a gradient moves them
        for adapter in run.objective.roles["student"].values():
            adapter.lora_B.weight.zero_()
    train(run)
    weights = [parameter for network in run.objective.modules.values() for parameter in network.parameters()]
    kinds = [{weight.dtype for weight in weights if weight.requires_grad == learns} for learns in (False, True)]
    student = run.engine.roles["student"].named_parameters()
    moved = {name: bool(weight.full_tensor().abs().max() > 0) for name, weight in student if name.endswith("lora_B.weight")}
    return kinds, moved


def test_frozen_weights_are_held_in_half_precision_on_all_ranks(tmp_path):
    for kinds, moved in on_ranks(2, halved, str(tmp_path / "run"), "dmd"):
        assert kinds == [{torch.bfloat16}, {torch.float32}]
        assert moved and all(moved.values())
    losses = [row["student/loss"] for row in read_scalars(tmp_path / "run") if "student/loss" in row]
    assert len(losses) == 2 and all(0 < loss < float("inf") for loss in losses)
