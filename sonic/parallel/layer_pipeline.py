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
from sonic.model.audio_tokens import AudioTokens
from sonic.model.dit import AvatarDiT
from sonic.model.execution import Execution, ForwardRequest, TrunkInputs
from sonic.model.kv_cache import KVCache
from sonic.parallel.channel import P2PChannel
from sonic.parallel.context import DistributedContext
from sonic.parallel.layer_ranges import best_ranges, ranges_of
from sonic.parallel.mesh import World
from sonic.types import Conditions

FIRST = ("patch_embed", "pose_embed", "frame_pack", "roles", "time_embed", "text_embed", "audio_encoder")
SPARE = 1  # forwards in flight beyond one per rank, so that no rank waits for a message


class Message(NamedTuple):
    """A message along the pipeline: the memory of a new rollout ("memory"), one forward ("block"), or the end ("stop").

    `shape` is [batch, rows, columns] of patches; `latents` is the dtype in which the prediction is sent back.
    """

    kind: str
    cond_index: int = 0
    steps: int = 0
    step: int = 0
    ref_position: int | None = None
    span: BlockSpan | None = None
    shape: tuple[int, int, int] = (0, 0, 0)
    motion: bool = False
    latents: torch.dtype = torch.float32


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
    for name in FIRST if stage else ():
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
            message = Message("memory", index, steps, shape=shape, motion=each.motion is not None)
            self.channel.send_next(message, _tensors(outputs, None))
            self.caches.append(cache)

    def accepts(self, request: ForwardRequest) -> bool:
        """Whether another forward can start: at most one per stage and SPARE more are in flight."""
        return self.in_flight < self.channel.stages + SPARE

    @torch.no_grad()
    def submit(self, request: ForwardRequest) -> None:
        """Run this rank's layers and send the outputs to the next stage."""
        cache, span, model = self.caches[request.cond_index], request.inputs.span, self.model
        context = model.block_context(span, cache, cache.rings[request.step], ref_position=request.inputs.ref_position)
        inputs, summary = model.embed_block(request.latents, request.timestep, request.inputs, sequence=self.execution.sequence)
        (outputs,) = self.execution.run_blocks(model, [inputs], [context])
        fields = {"step": request.step, "ref_position": request.inputs.ref_position, "span": span, "latents": request.latents.dtype}
        self.channel.send_next(Message("block", request.cond_index, **fields), _tensors(outputs, summary))
        self.in_flight += 1

    def collect(self) -> Sequence[Tensor]:
        """Receive the prediction of the oldest request."""
        self.in_flight -= 1
        return self.channel.recv_last()[1]

    def close(self) -> None:
        """Receive all predictions in flight, so that the channel is empty for the next rollout, and free the KV caches."""
        while self.in_flight:
            self.collect()
        self.caches.clear()  # frees them before the encoders of the next rollout run


@torch.no_grad()
def stage_loop(model: AvatarDiT, context: DistributedContext, *, dtype: torch.dtype) -> None:
    """The loop of every stage but the first: receive inputs, run this rank's layers, send the outputs, until a "stop" message."""
    channel, execution = context.channel, context.execution
    caches: dict[int, KVCache] = {}
    like = torch.empty(0, dtype=dtype, device=channel.device)
    heads = execution.sequence.local_heads(model.config.trunk.num_heads)
    last = channel.stage == channel.stages - 1
    while True:
        message, tensors = channel.recv_previous()
        if message.kind == "stop":
            if not last:
                channel.send_next(message, ())
            channel.flush()
            return
        if message.kind == "memory":
            cache = attention_context = None  # frees the previous rollout's cache before this one's is allocated
            if message.cond_index == 0:
                caches.clear()
            cache = model.cache_of(message.shape, steps=message.steps, motion=message.motion, like=like, heads=heads)
            caches[message.cond_index] = cache
            grid, attention_context = (1, cache.memory_tokens), model.memory_context(cache)
        else:
            cache = caches[message.cond_index]
            grid = (message.span.latent_frames // model.config.trunk.patch_size[0], math.prod(cache.grid))
            attention_context = model.block_context(message.span, cache, cache.rings[message.step], ref_position=message.ref_position)
        inputs, summary = _trunk_inputs(tensors, execution, grid)
        (outputs,) = execution.run_blocks(model, [inputs], [attention_context])
        if not last:
            channel.send_next(message, _tensors(outputs, summary))
        elif message.kind == "block":
            prediction = model.unembed(outputs, summary, cache.grid, sequence=execution.sequence)
            channel.send_first(message, (prediction.to(message.latents),))


def stop_stages(channel: P2PChannel) -> None:
    """End the loops of all other stages; called by the first rank."""
    channel.send_next(Message("stop"), ())
    channel.flush()


def pipeline_channel(world: World) -> P2PChannel:
    """The channel of the stages to which this rank belongs."""
    return P2PChannel(dist.get_process_group_ranks(world.group("layers"))[: world.stages], world.device, lanes=world.lanes)


def _tensors(inputs: TrunkInputs, summary: Tensor | None) -> list[Tensor | None]:
    """The tensors of a message, in the order of `_trunk_inputs`."""
    (modulation,) = inputs.modulations
    audio = (None, None, None) if inputs.audio is None else tuple(inputs.audio)
    return [inputs.tokens, modulation, inputs.text, *audio, summary]


def _trunk_inputs(tensors: Sequence[Tensor | None], execution: Execution, grid: tuple[int, int]) -> tuple[TrunkInputs, Tensor | None]:
    """The inputs and the time embedding in a message's tensors; `grid` is (T, S), S over all ranks that share the tokens."""
    tokens, modulation, text, audio_tokens, audio_summary, masks, summary = tensors
    layout = ((grid[0], tokens.shape[1] // grid[0]),)
    audio = None if audio_tokens is None else AudioTokens(audio_tokens, audio_summary, masks)
    return TrunkInputs(tokens, layout, (modulation,), text, audio, execution.sequence.exchange((grid,))), summary
