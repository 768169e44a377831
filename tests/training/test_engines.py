"""Every engine trains as one process does, and continues from the checkpoints of any other."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from run_files import read_scalars
from test_training_ranks import continued, curve, run_of, stopped, trained
from torch.testing import assert_close

from sonic.training.engine import is_sharded

ENGINES = ["fsdp", "zero2", "zero3"]


def figures(folder):
    """The losses of the student and the norms of its gradient, step by step."""
    return torch.tensor([[line["student/loss"], line["student/grad_norm"]] for line in read_scalars(folder)]).T


@cache
def alone(name, steps, **speed):
    """Figures and weights of one process."""
    with TemporaryDirectory() as folder:
        weights = trained(folder, name, steps, speed)
        return figures(Path(folder)), weights


def launched(work, *arguments):
    """Run the work with the environment that torchrun sets."""
    os.environ.update(RANK=str(dist.get_rank()), WORLD_SIZE=str(dist.get_world_size()), LOCAL_RANK=str(dist.get_rank()))
    return work(*arguments)


def needs(engine):
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")


@pytest.mark.parametrize(("ranks", "context"), [(2, 2), (4, 2)])
def test_shards_with_shared_tokens_train_as_one_process(ranks, context, tmp_path):
    accumulate = ranks // context
    weights = on_ranks(ranks, trained, str(tmp_path), "clip", 20, {"context": context, "accumulate": accumulate})[0]
    assert_same(tmp_path, weights, "clip", 20, accumulate=accumulate)


def test_rollouts_with_shared_tokens_train_as_one_process(tmp_path):
    weights = on_ranks(2, trained, str(tmp_path), "dmd", 2, {"context": 2})[0]
    assert_same(tmp_path, weights, "dmd", 2)


@pytest.mark.parametrize(
    ("name", "ranks", "speed"),
    [
        ("clip", 4, {"replicas": 2}),
        ("dmd", 4, {"replicas": 2}),
        ("dmd apart", 4, {"replicas": 2, "reshard": False, "recompute": True}),
        ("clip", 4, {"replicas": 2, "context": 2, "accumulate": 2}),
        ("dmd", 4, {"replicas": 2, "context": 2, "accumulate": 2, "cpu_offload": True, "recompute": True}),
        ("clip", 2, {"replicas": 2}),  # every process has all weights
        ("clip", 6, {"replicas": 3, "accumulate": 6}),
    ],
)
def test_copies_of_the_shards_train_as_one_process(name, ranks, speed, tmp_path):
    accumulate = speed.get("accumulate", 4)
    weights = on_ranks(ranks, trained, str(tmp_path), name, 3, speed)[0]
    assert_same(tmp_path, weights, name, 3, accumulate=accumulate)


@pytest.mark.parametrize(("engine", "ranks"), [("zero2", 2), ("zero3", 2), ("zero3", 4)])
def test_deepspeed_trains_as_one_process(engine, ranks, tmp_path):
    needs(engine)
    weights = on_ranks(ranks, launched, trained, str(tmp_path), "clip", 20, {"engine": engine, "accumulate": ranks})[0]
    assert_same(tmp_path, weights, "clip", 20, accumulate=ranks)


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_deepspeed_rolls_out_and_learns_two_roles_as_one_process(engine, tmp_path):
    needs(engine)
    weights = on_ranks(2, launched, trained, str(tmp_path), "dmd", 2, {"engine": engine})[0]
    assert_same(tmp_path, weights, "dmd", 2)


@pytest.mark.parametrize("engine", ENGINES)
def test_weights_in_host_memory_and_layers_computed_again_change_nothing(engine, tmp_path):
    needs(engine)
    weights = on_ranks(2, launched, trained, str(tmp_path), "clip", 3, {"engine": engine, "cpu_offload": True, "recompute": True})[0]
    assert_same(tmp_path, weights, "clip", 3)


@pytest.mark.parametrize(("name", "steps"), [("clip", 3), ("dmd", 2), ("dmd apart", 2)])
def test_weights_that_stay_gathered_until_the_backward_pass_change_nothing(name, steps, tmp_path):
    weights = on_ranks(2, trained, str(tmp_path), name, steps, {"reshard": False, "recompute": True})[0]
    assert_same(tmp_path, weights, name, steps)


def still_gathered(folder, reshard):
    """The share of the transformers' layers that are gathered after the losses of a step, and after the step."""
    run = run_of(folder, "dmd apart", steps=1, reshard=reshard)
    run.engine.prepare(run.objective)
    batch, layers = next(run.batches(0)), [block.mlp_in for model in run.objective.modules.values() for block in model.blocks]
    share = lambda: sum(not is_sharded(layer.weight) for layer in layers) / len(layers)  # noqa: E731
    losses = run.objective.losses("critic", batch, torch.Generator().manual_seed(0))
    loss, _ = next(losses)
    before = share()
    run.engine.backward("critic", loss)
    run.engine.step("critic", rate=1e-3, step=0)
    return before, share()


@pytest.mark.parametrize(("reshard", "share"), [(True, 0), (False, 2 / 3)])  # of student, critic and teacher, which the critic needs not
def test_layers_stay_gathered_between_forward_and_backward_where_that_is_asked(reshard, share, tmp_path):
    assert on_ranks(2, still_gathered, str(tmp_path), reshard) == [(pytest.approx(share), 0)] * 2


@pytest.mark.parametrize("engine", ENGINES)
def test_half_precision_trains_like_float32(engine, tmp_path):
    needs(engine)
    on_ranks(2, launched, trained, str(tmp_path), "clip", 3, {"engine": engine, "precision": "bfloat16"})
    exact, half = alone("clip", 3)[0], figures(tmp_path)
    assert not torch.equal(half, exact)
    assert_close(half, exact, rtol=0.03, atol=0)


def assert_same(folder, weights, *run, **speed):
    """Assert that the losses and gradients of every step, and the final averaged weights, equal those of one process."""
    (losses, norms), (expected, wanted) = figures(folder), alone(*run, **speed)
    assert_close(losses, expected[0], rtol=1e-5, atol=1e-7)
    assert_close(norms, expected[1], rtol=1e-4, atol=1e-7)
    assert weights.keys() == wanted.keys()
    for key, value in wanted.items():
        if not key.endswith("layer_weights"):  # of one layer only, so that its gradient is rounding
            assert_close(weights[key], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("before", "after"),
    [(("zero2", 2), ("zero2", 1)), (("zero3", 2), ("zero3", 4)), (("fsdp", 2), ("zero3", 2))],
)
def test_another_engine_or_number_of_ranks_continues_a_run(before, after, tmp_path):
    pytest.importorskip("deepspeed")
    for (engine, ranks), work, more in ((before, stopped, (2,)), (after, continued, ())):
        on_ranks(ranks, launched, work, str(tmp_path), "clip", 3, *more, {"engine": engine})
    assert_close(curve(tmp_path), alone("clip", 3)[0][0], rtol=1e-5, atol=1e-7)


def held(folder, engine):
    """Parameters of the transformer that this process holds, and in total."""
    run = run_of(folder, "dmd", steps=1, engine=engine)
    base = run.objective.networks.base
    own = [p for name, p in base.named_parameters() if "adapters" not in name]
    total = sum(p.numel() for p in own)
    run.engine.prepare(run.objective)
    return sum(getattr(p, "ds_tensor", p).numel() for p in own), total


def test_zero3_shards_the_shared_base_and_zero2_does_not(tmp_path):
    pytest.importorskip("deepspeed")
    for engine, share in (("zero2", 1.0), ("zero3", 0.5)):
        for here, total in on_ranks(2, launched, held, str(tmp_path), engine):
            assert here == pytest.approx(share * total, rel=0.01)
