"""Every engine trains as one process does: shards with shared tokens, and what cannot be started is said."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from test_ranks import curve, trained
from torch.testing import assert_close

from sonic.train.log import read_scalars


def norms(folder):
    """Of the student's gradient, step by step."""
    return torch.tensor([line["train/student_grad_norm"] for line in read_scalars(folder)])


def with_deepspeed(folder, name, steps, speed):
    """The same as `trained`, where torchrun would have set the environment."""
    os.environ.update(RANK=str(dist.get_rank()), WORLD_SIZE=str(dist.get_world_size()), LOCAL_RANK=str(dist.get_rank()))
    return trained(folder, name, steps, speed)


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
@pytest.mark.parametrize(("name", "steps"), [("clip", 20), ("dmd", 3)])
def test_deepspeed_trains_as_one_process(name, steps, engine, tmp_path):
    pytest.importorskip("deepspeed")
    trained(tmp_path / "one", name, steps)
    on_ranks(2, with_deepspeed, str(tmp_path / "many"), name, steps, {"engine": engine})
    assert_close(curve(tmp_path / "many"), curve(tmp_path / "one"), rtol=1e-5, atol=1e-7)
    assert_close(norms(tmp_path / "many"), norms(tmp_path / "one"), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("name", "ranks", "context"), [("clip", 2, 2), ("clip", 4, 2), ("clip", 4, 4), ("dmd", 2, 2)])
def test_shards_with_shared_tokens_train_as_one_process(name, ranks, context, tmp_path):
    steps = 20 if name == "clip" else 2
    trained(tmp_path / "one", name, steps)
    on_ranks(ranks, trained, str(tmp_path / "many"), name, steps, {"context": context})
    assert_close(curve(tmp_path / "many"), curve(tmp_path / "one"), rtol=1e-5, atol=1e-7)
    assert_close(norms(tmp_path / "many"), norms(tmp_path / "one"), rtol=1e-4, atol=1e-7)
