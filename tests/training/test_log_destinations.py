"""Destinations of the log beside JSONL: TensorBoard read with its own reader, histograms, and one that a plug-in adds."""

from __future__ import annotations

import sys

import pytest
import torch
from test_meter import trained
from torch import nn

from sonic.training import log as logs
from sonic.training.build import engine_of
from sonic.training.histograms import histogram, histograms
from sonic.training.log import RunLog
from sonic.training.log_destination import LogDestination
from sonic.training.train_config import BudgetConfig, LogConfig, SpeedConfig, TrainConfig, WandbConfig


def accumulated(folder):
    """What TensorBoard's own reader finds."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = reader.EventAccumulator(str(folder / "tensorboard"), size_guidance={reader.SCALARS: 0, reader.HISTOGRAMS: 0})
    return found.Reload()


def test_tensorboards_own_reader_finds_curves_and_histograms(tmp_path):
    pytest.importorskip("tensorboard")
    trained(tmp_path, tensorboard=True, histograms_every=2)
    found = accumulated(tmp_path)
    assert [(each.step, each.value) for each in found.Scalars("student/loss")] == [(1, 0.0), (2, 1.0), (4, 2.5)]
    tags = found.Tags()
    assert {"critic/loss", "perf/samples_per_second_critic"} < set(tags["scalars"])
    assert {"student/weights/weight", "critic/gradients/bias"} < set(tags["histograms"])
    assert all(each.histogram_value.num == 1 for each in found.Histograms("student/weights/weight"))


def test_tensorboard_hides_what_a_crashed_run_logged_too_far(tmp_path):
    pytest.importorskip("tensorboard")
    for start, values in ((0, {1: 1.0, 2: 2.0, 3: 3.0}), (1, {2: 20.0})):
        with RunLog(tmp_path, LogConfig(tensorboard=True, bar=False), name="two").open(start) as log:
            for step, value in values.items():
                log.scalars(step, {"student/loss": value})
    assert [(each.step, each.value) for each in accumulated(tmp_path).Scalars("student/loss")] == [(1, 1.0), (2, 20.0)]


def test_a_tensorboard_that_is_not_installed_is_named_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ValueError, match=r"log\.tensorboard=true needs TensorBoard.*pip install tensorboard"):
        RunLog(tmp_path / "run", LogConfig(tensorboard=True), name="two")
    assert not (tmp_path / "run").exists()


def test_a_histogram_counts_every_finite_value_once():
    values = torch.tensor([-1.0, 0.0, 0.0, 3.0, float("nan"), float("inf")])
    counts, edges = histogram(values)
    assert counts.sum() == 4 and (edges[0], edges[-1]) == (-1.0, 3.0) and counts[0] == counts[-1] == 1
    assert histogram(torch.full((5,), 2.0)).counts.sum() == 5
    assert histogram(torch.tensor([float("nan")])).counts.sum() == 0


def test_histograms_are_of_what_learns():
    module = nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    module(torch.ones(1, 2)).sum().backward()
    assert histograms("student", module).keys() == {"student/weights/weight", "student/gradients/weight"}


class OwnDestination(LogDestination):
    """A destination of one's own."""

    lines: list = []

    def __init__(self, run):
        self.lines.append((run.name, run.step))

    def scalars(self, step, values, video=None):
        self.lines.append((step, values["loss"]))

    def close(self, *, failed):
        self.lines.append(failed)


def test_a_destination_can_be_added(tmp_path, monkeypatch):
    monkeypatch.setitem(logs.DESTINATIONS, "mine", OwnDestination)
    with pytest.raises(KeyError), RunLog(tmp_path, LogConfig(bar=False), name="two") as log, log.open(3):
        log.scalars(4, {"loss": 0.5})
        raise KeyError
    assert OwnDestination.lines == [("two", 3), (4, 0.5), True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"histograms_every": 20}, "log.histograms_every=20 needs log.tensorboard=true"),
        ({"histograms_every": 30, "tensorboard": True}, "log.histograms_every=30 must be a multiple of log.every_steps=20"),
        ({"artifacts": "all"}, "log.artifacts=all"),
        ({"artifacts": "weights"}, "uploads nothing with log.wandb=off"),
        ({"wandb": "on"}, "log.wandb=on"),
    ],
)
def test_impossible_logs_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LogConfig(**options)
    kept = {name: value for name, value in options.items() if name in ("artifacts", "wandb")}
    if kept:
        with pytest.raises(ValueError, match=message):
            WandbConfig(**kept)


def test_histograms_of_an_engine_that_shards_gradients_its_own_way_are_refused(tmp_path):
    log = LogConfig(every_steps=1, tensorboard=True, histograms_every=1)
    config = TrainConfig(budget=BudgetConfig(max_steps=1), speed=SpeedConfig(engine="zero2"), log=log)
    with pytest.raises(ValueError, match=r"log\.histograms_every=1: speed\.engine=zero2"):
        engine_of(config, type("Ranks", (), {"ranks": 2, "mesh": object()})(), tmp_path)
