"""Predicts the bytes that a rank needs in each phase of a training step under FSDP2, item by item. It models this implementation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

from sonic.parallel.parallel_config import HardwareConfig, ParallelConfig
from sonic.planner.memory import GIB
from sonic.planner.workload import Training, learnt, parts

PERSISTENT = ("frozen_weights", "learning_weights", "optimizer_states", "average")  # kept between steps
TRANSIENT = ("gradients", "gathered", "reduced", "kv_ring", "layer_inputs", "activations")
ABSENT = ("vae", "text_encoder", "speech_encoder")  # latents, text embeddings and speech features are computed before the training
ITEMS = (*PERSISTENT, *TRANSIENT, *ABSENT, "reserve")
MASTER, ADAM_MOMENTS = 4, 8  # bytes per trainable parameter: float32 weight, AdamW's two moments

# Tensors alive while a layer is recomputed and backpropagated, as copies of: all tokens in the computing precision, all tokens in
# float32 (norms), the denoised tokens in float32, and the MLP's hidden layer. By what is trained in a block.
GRAPH = {"adapters": (17, 5, 2, 2), "weights": (15, 7, 2, 3), "elsewhere": (10, 5, 2, 2)}
LEFT = {"adapters": (0.89, 5.7), "weights": (0.94, 8.3), "elsewhere": (0.9, 5.7)}  # kept without recompute: graph share; injector copies
FORWARD = (4, 1, 0.5, 3)  # the copies of GRAPH in a forward without gradients


@dataclass(frozen=True)
class Sizes:
    """Sizes of the transformer's weights under FSDP.

    `frozen` is the bytes of this rank's shards, `learning` the trainable parameters per role on this rank, `root` and `units` the
    gathered bytes of the root (always gathered) and of the units in order of use, `learnt` the trainable parameters of each unit."""

    frozen: float
    learning: float
    root: float
    units: tuple[tuple[str, float], ...]
    learnt: Mapping[str, int]
    ranks: int

    def numbers(self, roles: int = 1) -> float:
        """Number of trainable parameters of `roles` roles on this rank."""
        return roles * self.learning


def sizes(work: Training, ranks: int) -> Sizes:
    """The sizes of the transformer's weights when `ranks` ranks shard them."""
    learning, whole = learnt(work), {}
    for part in parts(work.model):
        whole[part.unit] = whole.get(part.unit, 0) + part.numbers
    adapters = work.learners if work.job.learn.rank else 0
    total, mine = sum(whole.values()), sum(learning.values())
    frozen = total - (0 if adapters else mine)
    gathered = {unit: (size + adapters * learning.get(unit, 0)) * work.dtype_bytes for unit, size in whole.items()}
    root = gathered.pop("")
    return Sizes(frozen * work.dtype_bytes / ranks, mine / ranks, root, tuple(_met(work, gathered)), learning, ranks)


def phases(work: Training, hardware: HardwareConfig, parallel: ParallelConfig) -> dict[str, dict[str, float]]:
    """Bytes of a rank by phase and item, in any step after the first.

    With cpu_offload trainable and frozen weights, gradients, moments and averages are in host memory."""
    ranks, share = hardware.devices, max(1, parallel.context)
    size = sizes(work, ranks)
    kept = {
        "frozen_weights": size.frozen,
        "learning_weights": MASTER * size.numbers(work.learners),
        "optimizer_states": ADAM_MOMENTS * size.numbers(work.learners),
        "average": MASTER * size.numbers(),
    }
    found = {}
    for name, passing in PHASES_OF[work.job.objective](work, size, share):
        items = dict.fromkeys(ITEMS, 0.0) | kept | passing | {"reserve": hardware.reserve_gib * GIB}
        if parallel.cpu_offload:
            largest = max(unit for _, unit in size.units)
            items |= dict.fromkeys((*PERSISTENT, "gradients"), 0.0)
            items["gathered"] += 2 * largest / ranks  # shards of a unit and of the next one, copied from host memory
            items |= dict.fromkeys(TRANSIENT, 0.0) if name == "update" else {}
        found[name] = items
    return found


def host_bytes(work: Training, ranks: int) -> float:
    """Bytes per rank in host memory under cpu_offload: weights, gradients, optimizer states, averaged weights."""
    size = sizes(work, ranks)
    return size.frozen + size.numbers(work.learners) * (MASTER + ADAM_MOMENTS) + size.numbers() * (2 * MASTER)


def _distil(work: Training, size: Sizes, share: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Phases of a DMD step: rollout of the student with one KV ring, critic on the clip, teacher and critic on it, student by blocks."""
    clip, block = _tokens(work, work.clip) / share, _tokens(work, work.block) / share
    ring = work.model.trunk.num_layers * _ring(work) / share
    gradients = MASTER * size.numbers()
    forward = _gathered(size, _live(work, FORWARD, block, query_share=1))
    yield "rollout", {"kv_ring": ring} | forward
    query_share = work.query_tokens / work.clip
    graph = _graph(work, clip, query_share=query_share)
    yield "critic", _backward(work, size, graph) | {"gradients": gradients, "layer_inputs": _remembered(work, clip, graph)}
    yield "scores", {"gradients": gradients} | _gathered(size, _live(work, FORWARD, clip, query_share=query_share))
    graph = _graph(work, block, query_share=1) + 2 * _tokens(work, work.ring) / share  # keys and values, old and new
    replay = {"gradients": gradients, "kv_ring": ring, "layer_inputs": _remembered(work, block, graph)}
    forward = _gathered(size, _live(work, FORWARD, block, query_share=1))
    yield "student", max((replay | each for each in (forward, _backward(work, size, graph))), key=_sum)
    yield "update", _update(size)


def _match_flow(work: Training, size: Sizes, share: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Phases of a flow-matching step: forward and backward of a clip, and the update."""
    clip = _tokens(work, work.clip) / share
    graph = _graph(work, clip, query_share=work.query_tokens / work.clip)
    rest = {"gradients": MASTER * size.numbers(), "layer_inputs": _remembered(work, clip, graph)}
    forward = _gathered(size, _live(work, FORWARD, clip, query_share=1))
    yield "gradient", max((rest | each for each in (forward, _backward(work, size, graph))), key=_sum)
    yield "update", _update(size)


PHASES_OF = {"dmd": _distil, "flow_match": _match_flow}


def _tokens(work: Training, count: float) -> float:
    return count * work.token_bytes


def _ring(work: Training) -> float:
    """Bytes of one layer's KV cache: the ring, the reference's keys before rotary embedding, and the prompt's keys and values."""
    return _tokens(work, 2 * work.ring + prod(work.grid) + 2 * work.model.text.text_len)


def _remembered(work: Training, tokens: float, graph: float) -> float:
    """Bytes that layers keep for the backward pass: with recompute the inputs of blocks and injectors, else most of their graphs."""
    layers, injectors = work.model.trunk.num_layers, len(work.model.audio.inject_layers)
    if work.job.recompute:
        return (layers + injectors) * tokens
    share, copies = LEFT[_kind(work)]
    return (layers - 1) * share * graph + injectors * copies * tokens


def _kind(work: Training) -> str:
    """The key of GRAPH: what is trained inside the blocks."""
    if work.job.learn.rank:
        return "adapters"
    return "weights" if any(unit.startswith("blocks.") for unit in learnt(work)) else "elsewhere"


def _graph(work: Training, tokens: float, *, query_share: float) -> float:
    """Bytes of a block's autograd graph for `tokens` bytes of tokens, of which the fraction `query_share` is denoised."""
    return _live(work, GRAPH[_kind(work)], tokens, query_share=query_share)


def _live(work: Training, copies: tuple[float, ...], tokens: float, *, query_share: float) -> float:
    """Bytes of the tensors that `copies` (an entry of GRAPH, or FORWARD) counts, for `tokens` bytes of tokens."""
    same, wide, wide_noisy, hidden = copies
    trunk = work.model.trunk
    return tokens * (same + 4 / work.dtype_bytes * (wide + query_share * wide_noisy) + hidden * trunk.ffn_dim / trunk.hidden_dim)


def _met(work: Training, gathered: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    """(name, gathered bytes) of units in the order in which the forward of a clip uses them."""
    inject = work.model.audio.inject_layers
    for end in ("time_embed", "frame_pack", "text_embed"):
        if end in gathered and (end != "frame_pack" or work.job.past):
            yield end, gathered[end]
    for layer in range(work.model.trunk.num_layers):
        yield f"blocks.{layer}", gathered[f"blocks.{layer}"]
        if layer in inject:
            yield f"audio_injectors.{inject.index(layer)}", gathered[f"audio_injectors.{inject.index(layer)}"]


def _gathered(size: Sizes, activations: float) -> dict[str, float]:
    """Items of a forward without gradients: the larger of unpacking a unit and running it.

    While a unit is unpacked, its gather buffer and that of the unit before exist as well; while it runs, only its own buffer does."""
    units = [numbers for _, numbers in size.units]
    largest = max(units)
    unpacking = max([before + 2 * now for before, now in zip(units, units[1:], strict=False)] + [2 * largest])
    if unpacking >= 2 * largest + activations:
        return {"gathered": size.root + unpacking, "activations": 0.0}
    return {"gathered": size.root + 2 * largest, "activations": activations}


def _backward(work: Training, size: Sizes, graph: float) -> dict[str, float]:
    """Items of a backward pass.

    `gathered`: the current unit and the next one. `reduced`: float32 gradients of the unit before, whole and this rank's shard, and the
    first gradient of the current unit. `activations`: the graph, and the float32 copy of the time embedding's weights that it keeps."""
    largest = max(numbers for _, numbers in size.units)
    learning = max(size.learnt.get(unit, 0) for unit, _ in size.units)
    own = work.model.trunk.hidden_dim * work.model.trunk.ffn_dim if _kind(work) == "weights" else 0
    remembered = size.learnt.get("time_embed", 0) if work.dtype_bytes < MASTER and not work.job.learn.rank else 0
    reduced = MASTER * learning * (1 + 1 / size.ranks) + work.dtype_bytes * own
    return {"gathered": size.root + 2 * largest, "reduced": reduced, "activations": graph + work.dtype_bytes * remembered}


def _update(size: Sizes) -> dict[str, float]:
    """Items of the optimizer step, which takes the square root of all second moments at once."""
    return {"gradients": MASTER * size.numbers(), "activations": MASTER * size.numbers()}


def _sum(items: Mapping[str, float]) -> float:
    return sum(items.values())
