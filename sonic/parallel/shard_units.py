"""The units that sharding gathers at a time: names of modules that run together, in the order in which a forward uses them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from sonic.config import ModelConfig
from sonic.model.counts import block_weights, end_weights, injector_weights

# Units outside the blocks, of a rollout and of a training, in the order in which a forward uses them. A rollout does not shard WHOLE:
# gathering its wide projection takes twice its size, more than keeping it. A training shards it, because its gradient and the
# optimizer's moments also have its size; the audio encoder, which only some recipes train, then belongs to the root.
WHOLE = ("time_embed",)
ENDS = ("frame_pack", "text_embed", "audio_encoder")
TRAINING_ENDS = ("time_embed", "frame_pack", "text_embed")


@dataclass(frozen=True)
class Unit:
    """Modules whose weights are gathered and freed together, the number of these weights, and the phase that uses them."""

    modules: tuple[str, ...]
    numbers: int
    phase: str


def block_units(config: ModelConfig, layer: int) -> Iterator[Unit]:
    """Units of a whole block and a whole injector."""
    yield Unit((f"blocks.{layer}",), sum(block_weights(config).values()), "mlp")
    if layer in config.audio.inject_layers:
        index = config.audio.inject_layers.index(layer)
        yield Unit((f"audio_injectors.{index}",), sum(injector_weights(config).values()), "injector")


def sublayer_units(config: ModelConfig, layer: int) -> Iterator[Unit]:
    """Units of the projections of one attention and of one linear layer of the MLP.

    The prompt's keys and values are projected once per video, so these projections are a separate unit, which blocks do not gather.
    """
    dim, parts = config.trunk.hidden_dim, block_weights(config)
    one = dim * dim + dim
    name = f"blocks.{layer}"
    yield Unit(_projections(f"{name}.self_attention", "qkv", "out"), 4 * one, "attention")
    yield Unit(_projections(f"{name}.text_attention", "q", "out"), 2 * one, "text")
    yield Unit(_projections(f"{name}.text_attention", "kv"), 2 * one, "prompt")
    yield Unit((f"{name}.mlp_in",), parts["mlp_in"], "mlp")
    yield Unit((f"{name}.mlp_out",), parts["mlp_out"], "mlp")
    if layer in config.audio.inject_layers:
        name = f"audio_injectors.{config.audio.inject_layers.index(layer)}"
        yield Unit((f"{name}.modulation",), injector_weights(config)["modulation"], "injector")
        yield Unit(_projections(f"{name}.attention", "qkv", "out"), 4 * one, "injector")


def linear_units(config: ModelConfig, layer: int) -> Iterator[Unit]:
    """Units of one matrix."""
    for unit in sublayer_units(config, layer):
        for module in unit.modules:
            yield Unit((module,), unit.numbers // len(unit.modules), unit.phase)


UNITS: Mapping[str, Callable[[ModelConfig, int], Iterator[Unit]]] = {
    "block": block_units,
    "sublayer": sublayer_units,
    "linear": linear_units,
}


def all_units(config: ModelConfig, unshard_unit: str = "block", *, ends: Sequence[str] = ENDS) -> list[Unit]:
    """The units of a transformer. The few weights that are in no unit belong to their block or to the root."""
    numbers = end_weights(config)
    found = [Unit((name,), numbers[name], "ends") for name in ends if numbers[name]]
    for layer in range(config.trunk.num_layers):
        found += UNITS[unshard_unit](config, layer)
    return found


def _projections(attention: str, *names: str) -> tuple[str, ...]:
    """Full names of an attention's projections; "qkv" stands for q, k and v."""
    letters = [letter for name in names for letter in ([name] if name == "out" else name)]
    return tuple(f"{attention}.to_{letter}" for letter in letters)
