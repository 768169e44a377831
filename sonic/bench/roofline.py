"""What a published model needs on paper: operations, bytes and launches of a forward, and how fast they can be on known cards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from rich.console import Console

from sonic.config import parse_size
from sonic.families import FAMILIES
from sonic.inference.infer_config import BenchConfig
from sonic.parallel.parallel_config import ParallelConfig
from sonic.planner.hardware import CARDS, RATES, cards
from sonic.planner.memory import model_bytes
from sonic.planner.search import search
from sonic.planner.step_time import GIGA, TERA, VAE_FLOPS, forwards
from sonic.planner.traffic import forward_kernels
from sonic.planner.workload import Workload, workload
from sonic.system.files import write_json

SIZES = ("704x384", "384x256")
NUMBERS = (1, 2, 4, 8)
NEEDS = "size | TFLOP | launches, a layer / all | GB: weights | keys, values | rest of products | other kernels | operations per byte"
SPEEDS = (
    "size | cards | ms of a forward: products | other kernels | bound, frames/s | planner's plan | its frames/s | GiB | measured frames/s"
)


def bench_roofline(config: BenchConfig) -> dict:
    """Print both tables as Markdown, write the JSON, and return the figures.

    Raises ValueError for a model whose frames are not of these sizes."""
    if not FAMILIES[config.model.family].times_transformer:
        raise ValueError(f"bench roofline is for published transformers, not model={config.model.name}; use model=live_avatar_14b")
    asked = workload(config)
    jobs = {size: replace(asked, width=width, height=height) for size in SIZES for width, height in [parse_size(size)]}
    figures = {size: _needs(work) for size, work in jobs.items()}
    speeds = [row for size, work in jobs.items() for row in _speeds(work, size, figures[size])]
    tables = (_markdown(NEEDS, ([size, *_cells(each)] for size, each in figures.items())), _markdown(SPEEDS, speeds))
    Console(width=400, soft_wrap=True).print("\n\n".join(tables), markup=False, highlight=False)
    found = {"forward": figures, "cards": [dict(zip(SPEEDS.split(" | "), row, strict=True)) for row in speeds]}
    if config.json:
        write_json(found, config.json)
    return found


def _needs(work: Workload) -> dict[str, float]:
    """Operations of a forward by the counts of the model, its launches, and the bytes that its kernels read and write."""
    kernels, weights = forward_kernels(work), model_bytes(work)
    keys = work.memory + (work.window or work.query_tokens)
    cached = 2 * keys * work.model.trunk.num_layers * work.token_bytes
    return {
        "operations": work.forward_flops,
        "layer": kernels["layer"],
        "launches": kernels["launches"],
        "weights": weights,
        "keys_values": cached,
        "products": kernels["multiply"] - weights - cached,
        "others": kernels["others"],
    }


def bound_seconds(needs: dict[str, float], card: str) -> tuple[float, float]:
    """Least seconds of a forward on a card at its nominal rates: of its products and attention, which are bound by operations or by
    bytes, and of its other kernels, which are bound by bytes."""
    tflops, gbps = RATES[card]
    multiplied = needs["weights"] + needs["keys_values"] + needs["products"]
    return max(needs["operations"] / (tflops * TERA), multiplied / (gbps * GIGA)), needs["others"] / (gbps * GIGA)


def _speeds(work: Workload, size: str, needs: dict[str, float]) -> Iterator[list[str]]:
    """Rows of SPEEDS: the bound of cards that divide the work perfectly, and the fastest plan that fits."""
    for card in CARDS:
        products, others = bound_seconds(needs, card)
        decoding = VAE_FLOPS * work.pixels * work.frames / (RATES[card][0] * TERA)
        for number in NUMBERS:
            bound = number * work.frames / (forwards(work) * (products + others) + decoding)
            times = [f"{1000 * seconds / number:.1f}" for seconds in (products, others)]
            yield [size, f"{number} x {card}", *times, f"{bound:.1f}", *_plan(work, card, number), ""]


def _plan(work: Workload, card: str, number: int) -> list[str]:
    hardware = cards(card, number)
    plans = search(work, hardware, ParallelConfig("auto"), idle=False).plans
    fitting = [plan for plan in plans if not plan.missing_gib(hardware)]
    if not fitting:
        return ["none fits", "", ""]
    plan = max(fitting, key=lambda plan: plan.frames_per_second)
    return [plan.name, f"{plan.frames_per_second:.1f}", f"{max(plan.peak_gib):.1f}"]


def _cells(needs: dict[str, float]) -> list[str]:
    parts = ("weights", "keys_values", "products", "others")
    intensity = needs["operations"] / sum(needs[part] for part in parts)
    launches = f"{needs['layer']:.0f} / {needs['launches']:.0f}"
    return [f"{needs['operations'] / TERA:.1f}", launches, *(f"{needs[part] / GIGA:.1f}" for part in parts), f"{intensity:.0f}"]


def _markdown(head: str, rows: Iterable[Sequence[str]]) -> str:
    lines = (head, " | ".join("---" for _ in head.split(" | ")), *map(" | ".join, rows))
    return "\n".join(f"| {line} |" for line in lines)
