"""The roofline on paper: it counts what the model counts, and its bounds are bounds."""

from __future__ import annotations

import json

import pytest
import torch

from sonic.bench.roofline import SIZES, SPEEDS, bench_roofline, bound_seconds
from sonic.cli import Entry, compose
from sonic.inference.infer_config import BenchConfig
from sonic.model.counts import block_multiply_adds, weights
from sonic.parallel.parallel_config import PlanConfig
from sonic.planner.hardware import CARDS, RATES, cards
from sonic.planner.traffic import forward_kernels
from sonic.planner.workload import workload

BENCH, PLAN = Entry("bench", BenchConfig), Entry("plan", PlanConfig)
SMALL = (
    "model=live_avatar_14b",
    "model.trunk.hidden_dim=512",
    "model.trunk.ffn_dim=1024",
    "model.trunk.num_heads=4",
    "model.text.text_dim=64",
)
FILES = {"H200": "1xh200", "H100": "1x80gb", "4090": "1x24gb", "L40S": "1x48gb"}


def test_operations_and_weights_are_those_that_the_model_counts(tmp_path, capsys):
    config = compose(BENCH, ["target=roofline", *SMALL, "run.dtype=bfloat16", "sampler=live_avatar_4step", f"json={tmp_path / 'out.json'}"])
    found = bench_roofline(config)
    assert found == json.loads((tmp_path / "out.json").read_text())
    for size, grid in zip(SIZES, ((24, 44), (16, 24)), strict=True):
        model = config.model
        wanted = 2 * block_multiply_adds(model, grid, blocks=model.rollout.window_blocks, motion=True)
        assert found["forward"][size]["operations"] == wanted
        assert found["forward"][size]["weights"] == 2 * weights(model)
    assert len(found["cards"]) == 2 * 4 * len(CARDS)
    assert {row["measured frames/s"] for row in found["cards"]} == {""}
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert sum(SPEEDS.count(" | ") == line.count(" | ") for line in printed) == 2 + len(found["cards"])


def test_no_plan_is_faster_than_the_bound():
    config = compose(BENCH, ["target=roofline", *SMALL[:1], "run.dtype=bfloat16", "sampler=live_avatar_4step"])
    for row in bench_roofline(config)["cards"]:
        assert not row["its frames/s"] or float(row["its frames/s"]) < float(row["bound, frames/s"])


def test_kernels_are_counted_with_what_they_read_and_write():
    items = (*SMALL, "run.dtype=bfloat16", "video.size=128x128", "model.audio.inject_layers=[1]")
    work, deeper = (workload(compose(PLAN, [*items, f"model.trunk.num_layers={layers}"])) for layers in (2, 3))
    found = forward_kernels(work)
    keys = 2 * work.model.trunk.num_layers * (work.memory + work.window) * work.token_bytes
    assert found["multiply"] > keys + 2 * weights(work.model) * 0.5
    assert found["launches"] > 2 * found["layer"] > 40
    assert forward_kernels(deeper)["launches"] - found["launches"] == found["layer"]


def test_cards_are_those_of_the_hardware_files():
    for name, file in FILES.items():
        found, filed = cards(name, 1), compose(PLAN, [f"hardware={file}"]).hardware
        for field in ("usable_gib", "reserve_gib", "tflops", "memory_gbps", "link_gbps", "host_gbps", "efficiency"):
            assert getattr(found, field) == getattr(filed, field), (name, field)


@pytest.mark.parametrize("card", CARDS)
def test_a_forward_takes_at_least_what_its_operations_and_its_bytes_take(card):
    needs = {"operations": 3e12, "weights": 1e9, "keys_values": 2e9, "products": 3e9, "others": 4e9}
    tflops, gbps = RATES[card]
    products, others = bound_seconds(needs, card)
    assert products == max(3 / tflops, 6 / gbps)
    assert others == 4 / gbps


def test_models_that_move_a_portrait_are_refused():
    with pytest.raises(ValueError, match="published transformers"):
        bench_roofline(compose(BENCH, ["target=roofline"]))
    assert torch.get_default_dtype() == torch.float32
