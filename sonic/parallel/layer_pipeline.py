"""The layer pipeline: each rank has a range of layers and their KV rings, and the forwards of many blocks pass through the ranks.

A forward of block b at sampling step i needs, in every layer, the keys of earlier blocks at step i, and before the first layer
the latents of block b after step i - 1. So different ranks can run forwards of different blocks and steps at the same time.
Weights stay where they are, and the number of ranks does not depend on the number of steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sonic.config import ModelConfig
from sonic.geometry import BlockSpan
from sonic.model.dit import AvatarDiT
from sonic.model.execution import ForwardRequest, TrunkInputs
from sonic.model.kv_cache import KVCache
from sonic.parallel.channel import P2PChannel, Shutdown
from sonic.parallel.context import DistributedContext
from sonic.parallel.layer_ranges import best_ranges, ranges_of
from sonic.parallel.mesh import World
from sonic.types import Conditions

FIRST_STAGE = ("patch_embed", "pose_embed", "frame_pack", "roles", "time_embed", "text_embed", "audio_encoder")
SPARE = 1  # forwards in flight beyond one per rank, so that no rank waits for a message


class MemoryMessage(NamedTuple):
    """The memory of a new rollout: [batch, rows, columns] of patches, whether it has motion and runs compiled, the next layer's inputs."""

    cond_index: int
    steps: int
    shape: tuple[int, int, int]
    motion: bool
    compiled: bool
    inputs: TrunkInputs


class BlockMessage(NamedTuple):
    """One forward of a block: the inputs of the next layer, and for the last stage the prediction's dtype."""

    cond_index: int
    step: int
    span: BlockSpan
    ref_position: int | None
    inputs: TrunkInputs
    latents_dtype: torch.dtype


def layer_ranges(config: ModelConfig, stages: int, sizes: Sequence[int] | None = None) -> list[range]:
    """The layers of each rank: as many as `sizes` gives, or else ranges with multiply-adds as equal as possible, injectors included.

    Raises ValueError when `sizes` does not fit the number of stages or of the model's layers.
    """
    dim, ffn, count = config.trunk.hidden_dim, config.trunk.ffn_dim, config.trunk.num_layers
    if sizes:
        if len(sizes) != stages or sum(sizes) != count:
            raise ValueError(
                f"parallel.layers={list(sizes)} does not share {count} blocks out among {stages} stages; "
                f"give {stages} numbers that add up to {count}, or leave it out"
            )
        return ranges_of(sizes)
    block, injector = 6 * dim * dim + 2 * dim * ffn, 2 * dim * dim
    costs = [block + injector * (layer in config.audio.inject_layers) for layer in range(count)]
    return best_ranges(count, stages, lambda stage, layers: float(sum(costs[layer] for layer in layers)))


def keep_range(model: AvatarDiT, stage: int, ranges: Sequence[range]) -> None:
    """Remove from the model everything but one stage's range of layers; removed modules become None, so that names do not change.

    A stage after the last range keeps no layers.
    """
    own = ranges[stage] if stage < len(ranges) else range(0)
    for layer in range(len(model.blocks)):
        if layer not in own:
            model.blocks[layer] = None
    for index, layer in enumerate(model.config.audio.inject_layers):
        if layer not in own:
            model.audio_injectors[index] = None
    for name in FIRST_STAGE if stage else ():
        setattr(model, name, None)
    if stage != len(ranges) - 1:
        model.head = None


class PipelineForwards:
    """Forwards as the first rank runs them: its own layers, then those of the other stages. Results come in the order of the requests."""

    def __init__(self, model: AvatarDiT, conditions: Sequence[Conditions], steps: int, *, context: DistributedContext) -> None:
        self.model, self.channel, self.execution = model, context.channel, context.execution
        self.caches: list[KVCache] = []
        self.in_flight = 0
        if self.channel.forwards is not None:  # left by a rollout that was abandoned without `close`
            self.channel.forwards.close()
        self.channel.forwards = self
        for index, each in enumerate(conditions):
            cache = model.new_cache(each, steps=steps, execution=self.execution)
            inputs = model.embed_memory(each, self.execution.sequence)
            (outputs,) = self.execution.run_blocks(model, [inputs], [model.memory_context(cache)])
            shape = (each.ref.shape[0], *cache.grid)
            self.channel.send_next(MemoryMessage(index, steps, shape, each.motion is not None, model.compiled, _sendable(outputs)))
            self.caches.append(cache)

    def accepts(self, request: ForwardRequest) -> bool:
        """Whether another forward can start: at most one per stage and SPARE more are in flight."""
        return self.in_flight < self.channel.stages + SPARE

    @torch.no_grad()
    def submit(self, request: ForwardRequest) -> None:
        """Run this rank's layers and send the outputs to the next stage."""
        cache, span, model = self.caches[request.cond_index], request.inputs.span, self.model
        context = model.block_context(span, cache, cache.rings[request.step], ref_position=request.inputs.ref_position)
        inputs = model.embed_block(request.latents, request.timestep, request.inputs, sequence=self.execution.sequence)
        (outputs,) = self.execution.run_blocks(model, [inputs], [context])
        ref_position, dtype = request.inputs.ref_position, request.latents.dtype
        self.channel.send_next(BlockMessage(request.cond_index, request.step, span, ref_position, _sendable(outputs), dtype))
        self.in_flight += 1

    def collect(self) -> Sequence[Tensor]:
        """Receive the prediction of the oldest request."""
        in_flight, self.in_flight = self.in_flight, 0  # it stays 0 when the connection is lost
        prediction = self.channel.recv_last()
        self.in_flight = in_flight - 1
        return [prediction]

    def close(self) -> None:
        """Receive all predictions in flight, so that the channel is empty for the next rollout, and free the KV caches."""
        while self.in_flight:
            self.collect()
        self.caches.clear()  # frees them before the encoders of the next rollout run


@torch.no_grad()
def stage_loop(model: AvatarDiT, context: DistributedContext, *, dtype: torch.dtype) -> None:
    """The loop of every stage but the first: receive inputs, run this rank's layers, send the outputs, until it is shut down."""
    channel, execution = context.channel, context.execution
    caches: dict[int, KVCache] = {}
    like = torch.empty(0, dtype=dtype, device=channel.device)
    heads = execution.sequence.local_heads(model.config.trunk.num_heads)
    last = channel.stage == channel.stages - 1
    while not isinstance(message := channel.recv_previous(), Shutdown):
        if isinstance(message, MemoryMessage):
            cache = attention_context = None  # frees the previous rollout's cache before this one's is allocated
            if message.cond_index == 0:
                caches.clear()
            model.compiled = message.compiled
            cache = model.cache_of(message.shape, steps=message.steps, motion=message.motion, like=like, heads=heads)
            caches[message.cond_index] = cache
            grid, attention_context = (1, cache.memory_tokens), model.memory_context(cache)
        else:
            cache = caches[message.cond_index]
            grid = (message.span.latent_frames // model.config.trunk.patch_size[0], math.prod(cache.grid))
            attention_context = model.block_context(message.span, cache, cache.rings[message.step], ref_position=message.ref_position)
        inputs = message.inputs._replace(exchange=execution.sequence.exchange((grid,)))  # grid counts the tokens of all ranks
        (outputs,) = execution.run_blocks(model, [inputs], [attention_context])
        if not last:
            channel.send_next(message._replace(inputs=_sendable(outputs)))
        elif isinstance(message, BlockMessage):
            prediction = model.unembed(outputs, cache.grid, sequence=execution.sequence)
            channel.send_first(prediction.to(message.latents_dtype))
    if not last:
        channel.send_next(message)
    channel.flush()


def pipeline_channel(world: World) -> P2PChannel:
    """The channel of the stages to which this rank belongs."""
    return P2PChannel(dist.get_process_group_ranks(world.group("layers"))[: world.stages], world.device, lanes=world.lanes)


def _sendable(outputs: TrunkInputs) -> TrunkInputs:
    """The outputs of a stage without the exchange of its tokens, which each rank has its own of."""
    return outputs._replace(exchange=None)
