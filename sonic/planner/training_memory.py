"""Predicts the bytes that a rank needs in each phase of a training step under FSDP2, item by item. It models this implementation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from sonic.model.counts import weights
from sonic.parallel.parallel_config import HardwareConfig, ParallelConfig
from sonic.parallel.shard_units import TRAINING_ENDS, all_units
from sonic.planner.memory import GIB, memory_bytes, ring_bytes
from sonic.planner.workload import Training, learnt

PERSISTENT = ("frozen_weights", "learning_weights", "optimizer_states", "average")  # kept between steps
TRANSIENT = ("gradients", "gathered", "reduced", "kv_ring", "layer_inputs", "activations")
ABSENT = ("vae", "text_encoder", "speech_encoder")  # latents, text embeddings and speech features are computed before the training
ITEMS = (*PERSISTENT, *TRANSIENT, *ABSENT, "reserve")
MASTER, ADAM_MOMENTS = 4, 8  # bytes per trainable parameter: float32 weight, AdamW's two moments


class Copies(NamedTuple):
    """Tensors alive at the widest point of a layer, as copies: of all tokens in the computing precision, of all tokens in float32
    (norms), of the denoised tokens in float32, and of the MLP's hidden layer."""

    tokens: float
    float32_tokens: float
    float32_queries: float
    hidden: float


FORWARD = Copies(4, 1, 0.5, 3)  # without gradients
GRAPH = {  # while a layer's MLP is backpropagated, by what is trained in a block; the layer's input is not counted
    "adapters": Copies(10, 6, 0, 4),
    "weights": Copies(12, 7, 2, 3),
    "elsewhere": Copies(6, 6, 1, 3),
}
KEPT = {  # by a layer between its forward and its backward pass, without recompute, with its output
    "adapters": Copies(10, 6, 0, 2),
    "weights": Copies(12, 6, 0, 2),
    "elsewhere": Copies(6, 6, 0, 1),
}
KEPT_BY_INJECTOR = Copies(3, 0, 3, 0)  # without recompute; those in the computing precision are of the denoised tokens too


@dataclass(frozen=True)
class Sizes:
    """Sizes of the transformer's weights when `ranks` ranks shard them.

    `frozen` is the bytes of this rank's frozen shards, `learning` the trainable parameters of a role on this rank, `root` the gathered
    bytes of the weights in no unit, `units` those of each unit in the order of use, `learnt` the trainable parameters of each unit;
    `kept`: what a forward gathered stays until its backward pass."""

    frozen: float
    learning: float
    root: float
    units: Mapping[str, float]
    learnt: Mapping[str, int]
    ranks: int
    kept: bool = False

    @property
    def largest(self) -> float:
        """Gathered bytes of the largest unit."""
        return max(self.units.values())

    @property
    def done(self) -> str:
        """The audio injector behind the last block, which a backward pass has left when it reaches that block; "" if there is none."""
        *_, last = self.units
        return last if last.startswith("audio_injectors") else ""

    @property
    def averaged(self) -> float:
        """Bytes of the gradients that groups of ranks have averaged when a backward pass reaches its peak, in the second block: FSDP keeps
        them until the end of the pass. Without those of the unit before, which count as reduced."""
        layers = [size for unit, size in self.learnt.items() if unit.startswith(("blocks.", "audio_injectors."))]
        now = self.learnt.get("blocks.0", 0) + self.learnt.get("blocks.1", 0)
        return MASTER * max(0, sum(layers) - now - max(layers, default=0)) / self.ranks

    @property
    def gathered(self) -> float:
        """Bytes of all weights that a pass gathers."""
        return self.root + sum(self.units.values())


def sizes(work: Training, ranks: int, *, kept: bool = False) -> Sizes:
    """The sizes of the transformer's weights when `ranks` ranks shard them."""
    learning, total, adapters = learnt(work), weights(work.model), bool(work.learn.rank)
    units = {unit.modules[0]: unit.numbers for unit in all_units(work.model, ends=TRAINING_ENDS)}
    root = {"": total - sum(units.values())}
    gathered = {unit: (size + adapters * work.roles * learning.get(unit, 0)) * work.dtype_bytes for unit, size in (root | units).items()}
    used = {unit: size for unit, size in gathered.items() if unit and (unit != "frame_pack" or work.motion)}
    frozen = total - (0 if adapters else sum(learning.values()))
    return Sizes(frozen * work.dtype_bytes / ranks, sum(learning.values()) / ranks, gathered[""], used, learning, ranks, kept)


def phases(work: Training, hardware: HardwareConfig, parallel: ParallelConfig) -> dict[str, dict[str, float]]:
    """Bytes of a rank by phase and item, in any step after the first.

    With cpu_offload trainable and frozen weights, gradients, moments and averages are in host memory."""
    copies, share = parallel.replicas, max(1, parallel.context)
    size = sizes(work, hardware.ranks // copies, kept=not parallel.reshard)
    kept = {
        "frozen_weights": size.frozen,
        "learning_weights": MASTER * work.roles * size.learning,
        "optimizer_states": ADAM_MOMENTS * work.roles * size.learning,
        "average": MASTER * size.learning,
    }
    found = {}
    for name, passing in (_distil if work.distils else _match_flow)(work, size, share):
        items = dict.fromkeys(ITEMS, 0.0) | kept | passing | {"reserve": hardware.reserve_gib * GIB}
        if copies > 1 and items["reduced"]:
            items["reduced"] += size.averaged
        if parallel.cpu_offload:
            items |= dict.fromkeys((*PERSISTENT, "gradients"), 0.0)
            items |= dict.fromkeys(TRANSIENT, 0.0) if name == "update" else {}
        found[name] = items
    return found


def host_bytes(work: Training, ranks: int) -> float:
    """Bytes per rank in host memory under cpu_offload: weights, gradients, optimizer states, averaged weights."""
    size = sizes(work, ranks)
    return size.frozen + size.learning * (work.roles * (MASTER + ADAM_MOMENTS) + 2 * MASTER)


def _distil(work: Training, size: Sizes, share: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Phases of a DMD step: rollout of the student with one KV ring, critic on the clip, teacher and critic on it, student by blocks."""
    stream = work.block
    clip, block, query_share = work.tokens / share, stream.tokens / share, work.query_tokens / work.tokens
    ring = {"kv_ring": work.model.trunk.num_layers * (ring_bytes(stream) + memory_bytes(stream)) / share}
    gradients = {"gradients": MASTER * size.learning}
    forward = _forward(size, _copied(work, FORWARD, block, query_share=1))
    yield "rollout", ring | forward
    graph = _graph_bytes(work, clip, query_share=query_share)
    yield "critic", gradients | _widest(work, size, {}, graph=graph) | _kept_by_layers(work, size, clip, query_share=query_share)
    yield "scores", gradients | _forward(size, _copied(work, FORWARD, clip, query_share=query_share))
    graph = _graph_bytes(work, block, query_share=1) + 2 * (stream.memory + stream.window) / share * work.token_bytes  # old and new keys
    replay = gradients | ring | _kept_by_layers(work, size, block, query_share=1)
    yield "student", replay | _widest(work, size, forward, graph=graph)
    yield "update", _update(size)


def _match_flow(work: Training, size: Sizes, share: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Phases of a flow-matching step: forward and backward of a clip, and the update."""
    clip = work.tokens / share
    query_share = work.query_tokens / work.tokens
    graph = _graph_bytes(work, clip, query_share=query_share)
    rest = {"gradients": MASTER * size.learning} | _kept_by_layers(work, size, clip, query_share=query_share)
    forward = _forward(size, _copied(work, FORWARD, clip, query_share=1))
    yield "gradient", rest | _widest(work, size, forward, graph=graph)
    yield "update", _update(size)


def _copied(work: Training, copies: Copies, tokens: float, *, query_share: float) -> float:
    """Bytes of the tensors that `copies` counts, for `tokens` tokens of which the fraction `query_share` is denoised."""
    trunk = work.model.trunk
    wide = 4 / work.dtype_bytes * (copies.float32_tokens + query_share * copies.float32_queries)
    return tokens * work.token_bytes * (copies.tokens + wide + copies.hidden * trunk.ffn_dim / trunk.hidden_dim)


def _graph_bytes(work: Training, tokens: float, *, query_share: float) -> float:
    """Bytes of a block's autograd graph for `tokens` tokens of which the fraction `query_share` is denoised."""
    return _copied(work, GRAPH[_trained(work)], tokens, query_share=query_share)


def _trained(work: Training) -> str:
    """The key of GRAPH: what is trained inside the blocks."""
    if work.learn.rank:
        return "adapters"
    return "weights" if any(unit.startswith("blocks.") for unit in learnt(work)) else "elsewhere"


def _kept_by_layers(work: Training, size: Sizes, tokens: float, *, query_share: float) -> dict[str, float]:
    """What layers keep while the last block is backpropagated: with recompute the float32 inputs of blocks and injectors, else what the
    backward passes of the others read. Blocks that nothing that learns precedes keep nothing."""
    layers, injectors = work.model.trunk.num_layers, len(work.model.audio.inject_layers) - bool(size.done)
    learning = layers - (1 + min(work.model.audio.inject_layers, default=0) if _trained(work) == "elsewhere" else 0)
    if work.recipe.speed.recompute:
        return {"layer_inputs": (learning + injectors) * tokens / work.tokens * work.stream_bytes}
    kept = (learning - 1) * _copied(work, KEPT[_trained(work)], tokens, query_share=query_share)
    return {"layer_inputs": kept + injectors * _copied(work, KEPT_BY_INJECTOR, tokens * query_share, query_share=1)}


def _forward(size: Sizes, activations: float) -> dict[str, float]:
    """Items of a forward without gradients: the larger of unpacking a unit and running it.

    While a unit is unpacked, its gather buffer and that of the unit before exist as well; while it runs, only its own buffer does."""
    if size.kept:
        return {"gathered": size.gathered + size.largest, "activations": activations}
    units = list(size.units.values())
    unpacking = max([before + 2 * now for before, now in zip(units, units[1:], strict=False)] + [2 * size.largest])
    if unpacking >= 2 * size.largest + activations:
        return {"gathered": size.root + unpacking, "activations": 0.0}
    return {"gathered": size.root + 2 * size.largest, "activations": activations}


def _widest(work: Training, size: Sizes, forward: Mapping[str, float], *, graph: float) -> Mapping[str, float]:
    """Items of a pass with gradients: those of its forward or its backward, whichever are larger.

    Without recompute the widest point is the last block's backward pass, when all other layers still keep their graphs."""
    if not work.recipe.speed.recompute:
        return _backward(work, size, graph, before=[size.done])
    return max(forward, _backward(work, size, graph, before=size.units), key=_sum)


def _backward(work: Training, size: Sizes, graph: float, *, before: Iterable[str]) -> dict[str, float]:
    """Items of a backward pass.

    `gathered`: the current unit and the next one, or all that a forward has kept. `reduced`: float32 gradients of the largest of the units
    that may be the one `before`, whole and this rank's shard, and the first gradient of the current unit. `activations`: the graph, and
    the float32 copy of the time embedding's weights that it keeps."""
    learning = max(size.learnt.get(unit, 0) for unit in before)
    first = work.model.trunk.hidden_dim * work.model.trunk.ffn_dim if _trained(work) == "weights" else 0
    time_embed = size.learnt.get("time_embed", 0) if work.dtype_bytes < MASTER and not work.learn.rank else 0
    reduced = MASTER * learning * (1 + 1 / size.ranks) + work.dtype_bytes * first
    gathered = size.gathered - size.units.get(size.done, 0.0) if size.kept else size.root + 2 * size.largest
    return {"gathered": gathered, "reduced": reduced, "activations": graph + MASTER * time_embed}


def _update(size: Sizes) -> dict[str, float]:
    """Items of the optimizer step, which changes everything in place."""
    return {"gradients": MASTER * size.learning}


def _sum(items: Mapping[str, float]) -> float:
    return sum(items.values())
