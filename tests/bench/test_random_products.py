"""Products that measure a rate multiply random numbers: a GPU multiplies equal ones faster, because they take less power."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from tiny import tiny_config
from torch.overrides import TorchFunctionMode

from sonic.bench import forward_time, plan_check
from sonic.planner.workload import Workload

PRODUCTS = {
    "fit": lambda: plan_check.product_tflops(Workload(tiny_config(), 128, 128, steps=1, dtype_bytes=4), torch.device("cpu")),
    "dit": partial(forward_time.gemm_fraction, tiny_config(), torch.float32, (2, 8, 8)),
}


class Products(TorchFunctionMode):
    """Collects the standard deviation of the matrices that are multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.spread: list[float] = []

    def __torch_function__(self, function: Callable, _types: object, args: tuple = (), kwargs: dict | None = None) -> Any:
        if getattr(function, "__name__", "") in ("matmul", "__matmul__"):
            self.spread += [each.std().item() for each in args]
        return function(*args, **(kwargs or {}))


def once(jobs: dict[str, Callable[[], object]], *_: object) -> dict[str, float]:
    """Every product runs once; the forward, which has products of its own, does not."""
    for name, job in jobs.items():
        if name != "forward":
            job()
    return dict.fromkeys(jobs, 1.0)


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_that_measure_a_rate_multiply_random_numbers(name, monkeypatch):
    monkeypatch.setattr(plan_check, "PRODUCT_S", 0.01)
    monkeypatch.setattr(forward_time, "fastest", once)
    with Products() as products:
        PRODUCTS[name]()
    assert products.spread and min(products.spread) > 0.9
