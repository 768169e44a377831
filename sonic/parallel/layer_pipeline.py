"""The layer pipeline: each rank owns a range of layers and their KV rings, and forwards of many blocks flow through them.

A forward of block b at sampling step i needs, in every layer, the keys of earlier blocks at step i, and before the first layer
the latents of block b after step i - 1. So forwards of different blocks and steps are in different ranks at the same time:
weights never move, and the number of ranks has nothing to do with the number of steps.
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
from sonic.model.execution import Execution
from sonic.model.kv_cache import KVCache
from sonic.model.trunk_inputs import ForwardRequest, TrunkInputs
from sonic.parallel.channel import P2PChannel
from sonic.parallel.context import DistributedContext
from sonic.parallel.layer_ranges import best_ranges, ranges_of
from sonic.parallel.mesh import World
from sonic.types import Conditions

FIRST = ("patch_embed", "pose_embed", "frame_pack", "roles", "time_embed", "text_embed", "audio_encoder")
SPARE = 1  # forwards under way beyond one per rank, so that nobody waits for a message


class Message(NamedTuple):
    """What is sent along the pipeline: the memory of a rollout, one forward, or the end of the work.

    `shape` is [batch, rows, columns] of patches; `latents` the dtype that the prediction is sent back in.
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
    """Layers of each rank: so many as `sizes` says, or as even in arithmetic as they can be (an injector counts for what it adds).

    Raises ValueError when the sizes are not those of this model on so many ranks.
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
    """Leave in the model what one rank of the pipeline owns, nothing behind the last range; the rest becomes None and every name
    stays."""
    mine = ranges[stage] if stage < len(ranges) else range(0)
    for layer in range(len(model.blocks)):
        if layer not in mine:
            model.blocks[layer] = None
    for index, layer in enumerate(model.config.audio.inject_layers):
        if layer not in mine:
            model.audio_injectors[index] = None
    for name in FIRST if stage else ():
        setattr(model, name, None)
    if stage != len(ranges) - 1:
        model.head = None


class PipelineForwards:
    """The forwards of the first rank: its own blocks here, the others' along the channel. Results come in the order of the requests."""

    def __init__(self, model: AvatarDiT, conditions: Sequence[Conditions], steps: int, *, context: DistributedContext) -> None:
        self.model, self.channel, self.execution = model, context.channel, context.execution
        self.caches: list[KVCache] = []
        self.in_flight = 0
        if self.channel.forwards is not None:  # of a rollout that was given up without being closed
            self.channel.forwards.close()
        self.channel.forwards = self
        for index, each in enumerate(conditions):
            cache = model.new_cache(each, steps=steps, execution=self.execution)
            inputs = model.embed_memory(each, self.execution.sequence)
            (outputs,) = self.execution.run_blocks(model, [inputs], [model.memory_reach(cache)])
            shape = (each.ref.shape[0], *cache.grid)
            message = Message("memory", index, steps, shape=shape, motion=each.motion is not None)
            self.channel.send_next(message, _tensors(outputs, None))
            self.caches.append(cache)

    def accepts(self, request: ForwardRequest) -> bool:
        """One forward per rank and a spare one."""
        return self.in_flight < self.channel.stages + SPARE

    @torch.no_grad()
    def submit(self, request: ForwardRequest) -> None:
        """Run the blocks that are here and send the outputs on."""
        cache, span, model = self.caches[request.cond_index], request.inputs.span, self.model
        reach = model.block_reach(span, cache, cache.rings[request.step], ref_position=request.inputs.ref_position)
        inputs, summary = model.embed_block(request.latents, request.timestep, request.inputs, sequence=self.execution.sequence)
        (outputs,) = self.execution.run_blocks(model, [inputs], [reach])
        place = {"step": request.step, "ref_position": request.inputs.ref_position, "span": span, "latents": request.latents.dtype}
        self.channel.send_next(Message("block", request.cond_index, **place), _tensors(outputs, summary))
        self.in_flight += 1

    def collect(self) -> Sequence[Tensor]:
        """The oldest prediction."""
        self.in_flight -= 1
        return self.channel.recv_last()[1]

    def close(self) -> None:
        """Receive what is still in flight, so that the next rollout begins with an empty channel, and free the rings."""
        while self.in_flight:
            self.collect()
        self.caches.clear()  # encoders of the next rollout come before its own rings


@torch.no_grad()
def stage_loop(model: AvatarDiT, context: DistributedContext, *, dtype: torch.dtype) -> None:
    """What every stage but the first does until the end: receive, run the blocks that are here, send on."""
    channel, execution = context.channel, context.execution
    caches: dict[int, KVCache] = {}
    like = torch.empty(0, dtype=dtype, device=channel.device)
    heads = execution.sequence.heads(model.config.trunk.num_heads)
    last = channel.stage == channel.stages - 1
    while True:
        message, tensors = channel.recv_previous()
        if message.kind == "stop":
            if not last:
                channel.send_next(message, ())
            channel.flush()
            return
        if message.kind == "memory":
            cache = reach = None  # the rollout before is freed before there is room for this one
            if message.cond_index == 0:
                caches.clear()
            cache = model.cache_of(message.shape, steps=message.steps, motion=message.motion, like=like, heads=heads)
            caches[message.cond_index] = cache
            whole, reach = (1, cache.memory_tokens), model.memory_reach(cache)
        else:
            cache = caches[message.cond_index]
            whole = (message.span.latent_frames // model.config.trunk.patch_size[0], math.prod(cache.grid))
            reach = model.block_reach(message.span, cache, cache.rings[message.step], ref_position=message.ref_position)
        inputs, summary = _trunk_inputs(tensors, execution, whole)
        (outputs,) = execution.run_blocks(model, [inputs], [reach])
        if not last:
            channel.send_next(message, _tensors(outputs, summary))
        elif message.kind == "block":
            prediction = model.unembed(outputs, summary, cache.grid, sequence=execution.sequence)
            channel.send_first(message, (prediction.to(message.latents),))


def stop_stages(channel: P2PChannel) -> None:
    """The first rank's last message."""
    channel.send_next(Message("stop"), ())
    channel.flush()


def pipeline_channel(world: World) -> P2PChannel:
    """The channel along the stages that this rank is part of."""
    return P2PChannel(dist.get_process_group_ranks(world.group("layers"))[: world.stages], world.device, lanes=world.lanes)


def _tensors(inputs: TrunkInputs, summary: Tensor | None) -> list[Tensor | None]:
    """The tensors of a message."""
    (modulation,) = inputs.modulations
    audio = (None, None, None) if inputs.audio is None else tuple(inputs.audio)
    return [inputs.tokens, modulation, inputs.text, *audio, summary]


def _trunk_inputs(tensors: Sequence[Tensor | None], execution: Execution, whole: tuple[int, int]) -> tuple[TrunkInputs, Tensor | None]:
    """The inputs that a message holds; `whole` counts frames and tokens in a frame over all ranks that share them."""
    tokens, modulation, text, audio_tokens, audio_summary, masks, summary = tensors
    layout = ((whole[0], tokens.shape[1] // whole[0]),)
    audio = None if audio_tokens is None else AudioTokens(audio_tokens, audio_summary, masks)
    return TrunkInputs(tokens, layout, (modulation,), text, audio, execution.sequence.exchange((whole,))), summary
