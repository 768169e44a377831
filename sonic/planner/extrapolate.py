"""Extrapolates measurements of a deep model from runs of shallow ones: each layer adds the same amount, and each audio injector too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from sonic.config import ModelConfig

FEW, MORE = 4, 6  # numbers of layers in the two runs that are extrapolated from
Counts = Mapping[str, float]


def with_few(model: ModelConfig, layers: int, injectors: int) -> ModelConfig:
    """The config of the same model with `layers` layers and `injectors` audio injectors, in layers 0, 2, 4, and so on."""
    inject = [2 * index for index in range(injectors)]
    return replace(model, trunk=replace(model.trunk, num_layers=layers), audio=replace(model.audio, inject_layers=inject))


def of_all_layers(model: ModelConfig, measured: Callable[[ModelConfig], Counts]) -> dict[str, float]:
    """`measured(model)`; for a model of more than MORE layers it is extrapolated linearly from models of FEW and MORE layers."""
    layers, injectors = model.trunk.num_layers, len(model.audio.inject_layers)
    if layers <= MORE:
        return dict(measured(model))
    first = min(1, injectors)
    few, more = (measured(with_few(model, count, first)) for count in (FEW, MORE))
    two_injectors = measured(with_few(model, MORE, 2)) if injectors > 1 else more
    each = {name: (more[name] - few[name]) / (MORE - FEW) for name in few}
    return {name: few[name] + (layers - FEW) * each[name] + (injectors - first) * (two_injectors[name] - more[name]) for name in few}
