"""The avatar DiT of the Wan2.2-S2V family: it denoises whole clips with full attention, or block by block over a KV cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from sonic.config import ModelConfig
from sonic.geometry import FRAMES_PER_LATENT, BlockSpan
from sonic.model.attention import AttentionContext, BlockCausalContext, ClipContext
from sonic.model.audio_tokens import AudioEncoder, AudioInjector, AudioTokens
from sonic.model.block_causal import FlexBlockContext
from sonic.model.blocks import Block, Head, add_residual, join_parts, split_parts
from sonic.model.compile import compiled_regions
from sonic.model.embed import FramePack, PatchEmbed, Rotation, TextEmbed, TimeEmbed, grid_positions, ref_time_id, rotation
from sonic.model.execution import LOCAL, BlockInputs, Execution, SequenceParallel, TrunkInputs
from sonic.model.kv_cache import CachedContext, CacheShard, KVCache, KVRing, PrefillContext, memory_positions
from sonic.types import Conditions

NOISY, REF, MOTION = 0, 1, 2  # rows of the role embedding
ENTRY_POINTS = ("forward_blocks", "new_cache", "prefill", "prepare_block", "denoise_block")  # what is called besides forward
STAGES = ("embed_memory", "embed_block", "run_blocks", "unembed")  # of these, which a rollout calls one by one


class AvatarDiT(nn.Module):
    """The avatar DiT. Noisy latents become a grid of tokens [B,T,S,D]; reference and motion become memory tokens [B,1,M,D].

    In a layer pipeline the blocks of other ranks are None. The argument `execution` says how a forward is executed.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.compiled = False  # whether blocks run with compiled regions
        trunk, audio, text = config.trunk, config.audio, config.text
        dim, channels, patch = trunk.hidden_dim, trunk.latent_channels, trunk.patch_size
        self.patch_embed = PatchEmbed(channels, dim, patch)
        self.pose_embed = PatchEmbed(channels, dim, patch)
        self.frame_pack = FramePack(channels, dim, patch, buckets=config.motion.buckets) if config.motion.buckets else None
        self.roles = nn.Embedding(3, dim)
        self.time_embed = TimeEmbed(trunk.freq_dim, dim)
        self.text_embed = TextEmbed(text.text_dim, text.text_len, dim)
        self.audio_encoder = AudioEncoder(audio.audio_dim, dim, num_layers=audio.num_audio_layers, num_tokens=audio.num_audio_token)
        self.blocks = nn.ModuleList(Block(dim, trunk.ffn_dim, trunk.num_heads, eps=trunk.eps) for _ in range(trunk.num_layers))
        self.audio_injectors = nn.ModuleList(AudioInjector(dim, trunk.num_heads, trunk.eps) for _ in audio.inject_layers)
        self.head = Head(dim, channels, tuple(patch), eps=trunk.eps)
        self.apply(_initialise)
        nn.init.zeros_(self.head.project.weight)

    def forward(self, latents: Tensor, timestep: Tensor, conditions: Conditions, *, execution: Execution = LOCAL) -> Tensor:
        """Denoise a whole clip with full attention.  latents [B,C,T,H,W], timestep [B] or [B,T] in 0..1000 -> [B,C,T,H,W]"""
        positions = self._grid_rotation(0, latents.shape)
        memory = self._memory_rotation(conditions, self.config.rollout.ref_position)
        context = ClipContext(torch.cat((positions, memory)))
        audio = self._audio_tokens(conditions, partial(self.audio_encoder.clip, motion_frames=self.config.motion.motion_frames))
        return self._denoise(latents, timestep, conditions, context=context, audio=audio, execution=execution)

    def forward_blocks(
        self, latents: Tensor, timestep: Tensor, conditions: Conditions, *, first_block: int = 0, execution: Execution = LOCAL
    ) -> Tensor:
        """Denoise all blocks of a rollout in one pass, for training; equal to `prefill`, then `denoise_block` of one block after another.

        latents [B,C,T,H,W], T = a whole number of blocks, timestep [B] or [B,T], conditions of these blocks -> [B,C,T,H,W]
        Raises ValueError when T is not a whole number of blocks.
        """
        rollout = self.config.rollout
        count, rest = divmod(latents.shape[2], rollout.block_frames)
        if rest or not count:
            raise ValueError(f"{latents.shape[2]} latent frames are not whole blocks of {rollout.block_frames}")
        starts = [(first_block + index) * rollout.block_frames for index in range(count)]
        positions = [self.ref_position(start) for start in starts]
        rotated = {position: self._memory_rotation(conditions, position) for position in positions}
        context = (FlexBlockContext if execution.flex_blocks else BlockCausalContext)(
            grid=self._grid_rotation(starts[0], latents.shape),
            memory=self._memory_rotation(conditions, rollout.ref_position),
            memory_keys=tuple(rotated[position] for position in positions),
            window=rollout.window_blocks,
        )
        audio = self._audio_tokens(conditions, partial(self._encode_blocks, count=count))
        return self._denoise(latents, timestep, conditions, context=context, audio=audio, execution=execution)

    def new_cache(self, conditions: Conditions, *, steps: int, execution: Execution = LOCAL) -> KVCache:
        """An empty cache for these conditions, with one ring per sampling step."""
        shape = (conditions.ref.shape[0], *self._grid_size(conditions.ref.shape))
        device = conditions.ref.device
        autocast = torch.is_autocast_enabled(device.type)  # then products are not in the precision of the weights
        dtype = torch.get_autocast_dtype(device.type) if autocast else self.patch_embed.weight.dtype
        like = torch.empty(0, dtype=dtype, device=execution.cache_device or device)
        heads = execution.sequence.local_heads(self.config.trunk.num_heads)
        cache = self.cache_of(shape, steps=steps, motion=conditions.motion is not None, like=like, heads=heads)
        return execution.windows.allocated(replace(cache, token_device=device))

    def cache_of(self, shape: tuple[int, int, int], *, steps: int, motion: bool, like: Tensor, heads: int) -> KVCache:
        """An empty cache of `shape` [batch, rows, columns] of patches, for the blocks that this model has and `heads` heads."""
        layers = [layer for layer, block in enumerate(self.blocks) if block is not None]
        return KVCache.allocate(self.config, shape, CacheShard(layers, heads), steps=steps, motion=motion, like=like)

    @torch.no_grad()
    def prefill(self, conditions: Conditions, cache: KVCache, *, execution: Execution = LOCAL) -> KVCache:
        """Write reference, motion and prompt into the cache; the blocks that its rings already hold stay."""
        inputs = self.embed_memory(conditions, execution.sequence)
        execution.run_blocks(self, [inputs], [self.memory_context(cache)])
        return cache

    def embed_memory(self, conditions: Conditions, sequence: SequenceParallel) -> TrunkInputs:
        """The memory tokens as inputs of the first transformer block."""
        memory = self._memory(conditions)
        time_embedding, modulation = self.time_embed(torch.zeros(1, 1, device=memory.device))
        text = self.text_embed(conditions.text)
        return _trunk_inputs([memory], (modulation,), text, time_embedding=time_embedding, audio=None, sequence=sequence)

    def memory_context(self, cache: KVCache) -> Callable[[int], AttentionContext]:
        """The attention context of each layer for the memory, which attends to itself and is written into the cache."""
        position = self.config.rollout.ref_position
        positions = rotation(memory_positions(cache.buckets, cache.grid, position, device=cache.token_device), self._head_dim)
        return lambda layer: PrefillContext(cache, layer, positions, position)

    def prepare_block(self, conditions: Conditions, span: BlockSpan) -> BlockInputs:
        """The inputs that all sampling steps of a block share; `conditions` are those of the block (`conditions.at(span)`)."""
        shape = (*conditions.ref.shape[:2], span.latent_frames, *conditions.ref.shape[3:])
        audio = self._audio_tokens(conditions, partial(self._encode_blocks, count=1))
        return BlockInputs(span, self._pose(conditions, shape), audio)

    def denoise_block(
        self,
        latents: Tensor,
        timestep: Tensor,
        inputs: BlockInputs,
        *,
        cache: KVCache,
        ring: KVRing,
        execution: Execution = LOCAL,
    ) -> Tensor:
        """Denoise one block and write its keys and values into `ring`.  [B,C,T,H,W], timestep [B] or [B,T] -> [B,C,T,H,W]

        Gradients flow through this block only, not into earlier ones. Raises ValueError when T is not the length of a block.
        """
        span = inputs.span
        if not latents.shape[2] == span.latent_frames == self.config.rollout.block_frames:
            raise ValueError(f"a block is {self.config.rollout.block_frames} latent frames; got {latents.shape[2]} for {span}")
        context = self.block_context(span, cache, ring, ref_position=inputs.ref_position)
        trunk_inputs = self.embed_block(latents, timestep, inputs, sequence=execution.sequence)
        (outputs,) = execution.run_blocks(self, [trunk_inputs], [context])
        return self.unembed(outputs, cache.grid, sequence=execution.sequence).to(latents.dtype)

    def embed_block(self, latents: Tensor, timestep: Tensor, inputs: BlockInputs, *, sequence: SequenceParallel) -> TrunkInputs:
        """A block's tokens as inputs of the first transformer block."""
        time_embedding, modulation = self.time_embed(_per_frame(timestep))
        tokens = [self.patch_embed(latents) + inputs.pose]
        return _trunk_inputs(tokens, (modulation,), None, time_embedding=time_embedding, audio=inputs.audio, sequence=sequence)

    def block_context(
        self, span: BlockSpan, cache: KVCache, ring: KVRing, *, ref_position: int | None = None
    ) -> Callable[[int], AttentionContext]:
        """The attention context of each layer for one block; reserves a slot for the block in the ring."""
        position = self.ref_position(span.start) if ref_position is None else ref_position
        slot = ring.begin(span.index)
        frames = span.latent_frames // self.config.trunk.patch_size[0]
        times = torch.arange(span.start, span.start + frames, dtype=torch.float64, device=cache.token_device)
        positions = rotation(grid_positions(times, *cache.grid), self._head_dim)
        return lambda layer: CachedContext(cache, ring, layer, slot, positions, position)

    def run_blocks(self, inputs: Sequence[TrunkInputs], contexts: Sequence[Callable[[int], AttentionContext]]) -> list[TrunkInputs]:
        """Run every sequence through a block before the next block, so that its weights are loaded once."""
        outputs = list(inputs)
        for layer, block in enumerate(self.blocks):
            if block is not None:
                outputs = [self._run_block(layer, sequence, context(layer)) for sequence, context in zip(outputs, contexts, strict=True)]
        return outputs

    def _run_block(self, layer: int, inputs: TrunkInputs, context: AttentionContext) -> TrunkInputs:
        """Run one transformer block and the audio injector after it, if there is one."""
        modulations, text, exchange = inputs.modulations, inputs.text, inputs.exchange
        inject = self.config.audio.inject_layers
        with compiled_regions(self.compiled and not isinstance(context, PrefillContext)):  # which runs once in a video
            tokens = self.blocks[layer](inputs.tokens, modulations, text, layout=inputs.layout, context=context, exchange=exchange)
            if inputs.audio is not None and layer in inject:
                grid = split_parts(tokens, inputs.layout)[0]
                tokens = add_residual(tokens, self.audio_injectors[inject.index(layer)](grid, inputs.audio).flatten(1, 2))
        return inputs._replace(tokens=tokens)

    def unembed(self, outputs: TrunkInputs, grid: tuple[int, int], *, sequence: SequenceParallel) -> Tensor:
        """The latents of the last block's outputs: of the first part of their layout, which holds the noisy tokens.  -> [B,C,T,H,W]"""
        rows, columns = grid
        patches = self.head(split_parts(outputs.tokens, outputs.layout)[0], outputs.time_embedding)
        return self.head.to_latents(sequence.gather(patches, rows * columns), columns)

    def ref_position(self, start: int) -> int:
        """The time id of the reference for a block that starts at latent frame `start`, by the configured rule."""
        rollout = self.config.rollout
        return ref_time_id(start, ref_position=rollout.ref_position, distance=rollout.ref_distance)

    def _denoise(
        self,
        latents: Tensor,
        timestep: Tensor,
        conditions: Conditions,
        *,
        context: AttentionContext,
        audio: AudioTokens | None,
        execution: Execution,
    ) -> Tensor:
        """Run latents and memory through the blocks in one sequence, the memory at noise level 0.  [B,C,T,H,W] -> [B,C,T,H,W]"""
        grid = self.patch_embed(latents) + self._pose(conditions, latents.shape)
        timestep = _per_frame(timestep)
        time_embedding, modulation = self.time_embed(torch.cat((timestep, torch.zeros_like(timestep[:, :1])), dim=1))
        parts = [grid, self._memory(conditions)]
        modulations, text = (modulation[:, :-1], modulation[:, -1:]), self.text_embed(conditions.text)
        sequence, time_embedding = execution.sequence, time_embedding[:, :-1]
        inputs = _trunk_inputs(parts, modulations, text, time_embedding=time_embedding, audio=audio, sequence=sequence)
        (outputs,) = execution.run_blocks(self, [inputs], [lambda layer: context])
        return self.unembed(outputs, self._grid_size(latents.shape), sequence=sequence).to(latents.dtype)

    def _pose(self, conditions: Conditions, shape: tuple[int, ...]) -> Tensor:
        """Pose tokens plus the role embedding of noisy tokens; no pose is a pose of zeros, of which the embedding's bias remains."""
        if conditions.pose is None:
            return self.pose_embed.bias + self.roles.weight[NOISY]
        if tuple(conditions.pose.shape[2:]) != tuple(shape[2:]):
            raise ValueError(f"pose covers {list(conditions.pose.shape[2:])} (time, height, width), the latents {list(shape[2:])}")
        return self.pose_embed(conditions.pose) + self.roles.weight[NOISY]

    def _memory(self, conditions: Conditions) -> Tensor:
        """Reference tokens, then motion tokens.  -> [B,1,M,D]"""
        ref = self.patch_embed(conditions.ref) + self.roles.weight[REF]
        if conditions.motion is None:
            return ref
        if self.frame_pack is None:
            raise ValueError(f"model={self.config.name} has no motion memory (model.motion.buckets is empty); leave motion latents out")
        motion = self.frame_pack(conditions.motion, self.config.motion.add_last_motion) + self.roles.weight[MOTION]
        return torch.cat((ref, motion), dim=2)

    def _audio_tokens(self, conditions: Conditions, encode: Callable[[Tensor], tuple[Tensor, Tensor]]) -> AudioTokens | None:
        """The audio tokens of speech features that `encode` turns into tokens and a summary, with the masks of several voices."""
        if conditions.audio is None:
            return None
        masks = conditions.masks
        if masks is not None:
            masks = rearrange(masks, "b t h w -> b t (h w) 1").to(self.patch_embed.weight.dtype)
        return AudioTokens(*encode(conditions.audio), masks)

    def _encode_blocks(self, features: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Audio tokens and summaries of `count` blocks, each encoded without the audio of its neighbours."""
        frames = FRAMES_PER_LATENT * self.config.rollout.block_frames
        if features.shape[-1] != count * frames:
            raise ValueError(f"{features.shape[-1]} audio columns do not fit {count} blocks of {frames} video frames")
        blocks = rearrange(features, "b k e (n f) -> (b n) k e f", n=count)
        tokens, summary = self.audio_encoder.clip(blocks, self.config.motion.motion_frames)
        return rearrange(tokens, "(b n) t a d -> b (n t) a d", n=count), rearrange(summary, "(b n) t d -> b (n t) d", n=count)

    def _grid_size(self, shape: tuple[int, ...]) -> tuple[int, int]:
        _, rows, columns = self.config.trunk.patch_size
        return shape[-2] // rows, shape[-1] // columns

    def _grid_rotation(self, start: int, shape: tuple[int, ...]) -> Rotation:
        frames = shape[2] // self.config.trunk.patch_size[0]
        times = torch.arange(start, start + frames, dtype=torch.float64, device=self.patch_embed.weight.device)
        return rotation(grid_positions(times, *self._grid_size(shape)), self._head_dim)

    def _memory_rotation(self, conditions: Conditions, ref_position: int) -> Rotation:
        buckets = () if conditions.motion is None else tuple(self.config.motion.buckets)
        positions = memory_positions(buckets, self._grid_size(conditions.ref.shape), ref_position, device=self.patch_embed.weight.device)
        return rotation(positions, self._head_dim)

    @property
    def _head_dim(self) -> int:
        return self.config.trunk.hidden_dim // self.config.trunk.num_heads


def _trunk_inputs(
    parts: list[Tensor],
    modulations: tuple[Tensor, ...],
    text: Tensor | None,
    *,
    time_embedding: Tensor,
    audio: AudioTokens | None,
    sequence: SequenceParallel,
) -> TrunkInputs:
    """The inputs of the blocks: this rank's tokens of the parts [B,T,S,D], in float32, each part with its modulation."""
    exchange = sequence.exchange(tuple(tuple(part.shape[1:3]) for part in parts))
    local = [sequence.split(part) for part in parts]
    if audio is not None and audio.masks is not None:
        audio = audio._replace(masks=sequence.split(audio.masks))
    layout = tuple(tuple(part.shape[1:3]) for part in local)
    return TrunkInputs(join_parts(local).float(), layout, modulations, text, audio, time_embedding, exchange)


def _per_frame(timestep: Tensor) -> Tensor:
    """Timesteps per latent frame.  [B] -> [B,1]; [B,T] is returned as it is"""
    return timestep if timestep.ndim == 2 else repeat(timestep, "b -> b 1")


def _initialise(module: nn.Module) -> None:
    """Initialise one module, after its parts. What dropped audio and missing prompts become must not be zero: the norms behind it multiply
    gradients by a thousand there."""
    if isinstance(module, nn.Linear | nn.Conv3d | nn.Conv1d):
        nn.init.xavier_uniform_(module.weight.flatten(1) if module.weight.ndim > 2 else module.weight)
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, AudioEncoder):
        for bias, std in ((module.local.bias, 0.5), (module.pooled.bias, 0.5), (module.padding, 0.02)):
            nn.init.normal_(bias, std=std)
    if isinstance(module, TextEmbed):
        nn.init.normal_(module.out.bias, std=0.02)
