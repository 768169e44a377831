"""What a program with many layers takes, known from runs with a few: every layer adds the same, and so does every audio injector."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from sonic.config import ModelConfig

FEW, MORE = 4, 6  # layers of the runs that stand for all
Counts = Mapping[str, float]


def with_few(model: ModelConfig, layers: int, injectors: int) -> ModelConfig:
    """The same model with fewer layers, an injector in every second one as far as they go."""
    inject = [2 * place for place in range(injectors)]
    return replace(model, trunk=replace(model.trunk, num_layers=layers), audio=replace(model.audio, inject_layers=inject))


def of_all_layers(model: ModelConfig, measured: Callable[[ModelConfig], Counts]) -> dict[str, float]:
    """`measured(model)`, from runs of smaller models where it has many layers."""
    layers, injectors = model.trunk.num_layers, len(model.audio.inject_layers)
    if layers <= MORE:
        return dict(measured(model))
    first = min(1, injectors)
    few, more = (measured(with_few(model, count, first)) for count in (FEW, MORE))
    heard = measured(with_few(model, MORE, 2)) if injectors > 1 else more
    each = {name: (more[name] - few[name]) / (MORE - FEW) for name in few}
    return {name: few[name] + (layers - FEW) * each[name] + (injectors - first) * (heard[name] - more[name]) for name in few}
