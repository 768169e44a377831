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

from sonic.training.build import check_accumulate, engine_of
from sonic.training.engine import is_sharded
from sonic.training.train_config import BudgetConfig, SpeedConfig, TrainConfig
from sonic.training.world import join_world

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
    [
        ((2, {"engine": "zero2"}), (1, {"engine": "zero2"})),
        ((2, {"engine": "zero3"}), (4, {"engine": "zero3"})),
        ((2, {"engine": "fsdp"}), (2, {"engine": "zero3"})),
        ((4, {"engine": "fsdp", "replicas": 2}), (2, {"engine": "zero3"})),
        ((4, {"engine": "fsdp", "replicas": 2}), (4, {"engine": "fsdp"})),
        ((2, {"engine": "fsdp"}), (4, {"engine": "fsdp", "replicas": 2, "context": 2})),
    ],
)
def test_another_engine_or_number_of_ranks_or_copies_continues_a_run(before, after, tmp_path):
    for (ranks, speed), work, more in ((before, stopped, (2,)), (after, continued, ())):
        needs(speed["engine"])
        on_ranks(ranks, launched, work, str(tmp_path), "clip", 3, *more, speed)
    assert_close(curve(tmp_path), alone("clip", 3)[0][0], rtol=1e-5, atol=1e-7)


def test_a_checkpoint_has_every_shard_once_however_many_copies_there_are(tmp_path):
    sizes = []
    for replicas in (1, 2):
        on_ranks(2, stopped, str(tmp_path / str(replicas)), "clip", 3, 2, {"engine": "fsdp", "replicas": replicas})
        files = list((tmp_path / str(replicas)).glob("checkpoints/step_*/*.distcp"))
        sizes.append(sum(file.stat().st_size for file in files))
    assert sizes[1] < 1.1 * sizes[0]


def shards(folder):
    """The ranks with which this one shares the weights, and its part of the transformer's numbers."""
    run = run_of(folder, "clip", steps=1, replicas=2)
    run.engine.prepare(run.objective)
    weights = [p for model in run.objective.modules.values() for p in model.parameters() if is_sharded(p)]
    own, total = (sum(each) for each in zip(*((p.to_local().numel(), p.numel()) for p in weights), strict=True))
    return dist.get_process_group_ranks(weights[0].device_mesh.get_group(1)), own / total, run.engine.world.data_rank


def test_consecutive_ranks_share_the_weights_of_a_copy(tmp_path):
    found = on_ranks(4, shards, str(tmp_path))
    assert [ranks for ranks, _, _ in found] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [share for _, share, _ in found] == [pytest.approx(0.5, abs=0.02)] * 4
    assert [index for _, _, index in found] == [0, 1, 2, 3]


def divided(folder, speed, accumulate):
    """Divide a training among the ranks, without running it."""
    config = TrainConfig(budget=BudgetConfig(max_steps=1, accumulate=accumulate), speed=SpeedConfig(device="cpu", **speed))
    world = join_world(torch.device("cpu"), context=config.speed.context, replicas=config.speed.replicas)
    engine_of(config, world, Path(folder))
    check_accumulate(config, world)


@pytest.mark.parametrize(
    ("ranks", "speed", "accumulate", "sentence"),
    [
        (2, {"replicas": 2, "engine": "local"}, 2, "speed.engine=local trains in one process, but 2 were started"),
        (2, {"replicas": 2, "engine": "zero2"}, 2, "speed.replicas=2 needs speed.engine=fsdp, and this is zero2; leave one of them out"),
        (2, {"replicas": 2, "engine": "zero3"}, 2, "speed.replicas=2 needs speed.engine=fsdp, and this is zero3; leave one of them out"),
        (3, {"replicas": 2}, 3, r"do not divide the 3 that were started; use a product that is one of \[1, 3\]"),
        (2, {"replicas": 2, "context": 2}, 2, r"do not divide the 2 that were started; use a product that is one of \[1, 2\]"),
        (3, {"replicas": 3}, 4, "budget.accumulate=4 batches of budget.batch_size=8 cannot be shared by 3 processes; use .*3 or 6"),
        (3, {}, 4, "budget.accumulate=4 batches of budget.batch_size=8 cannot be shared by 3 processes; use .*3 or 6"),
        (3, {"engine": "zero3"}, 4, "budget.accumulate=4 batches of budget.batch_size=8 cannot be shared by 3 processes; use .*3 or 6"),
    ],
)
def test_processes_that_cannot_divide_a_training_get_a_sentence(ranks, speed, accumulate, sentence, tmp_path):
    needs(speed.get("engine", ""))
    with pytest.raises(AssertionError, match=f"ValueError: .*{sentence}"):
        on_ranks(ranks, launched, divided, str(tmp_path), speed, accumulate)


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
