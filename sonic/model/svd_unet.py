"""The UNet of Stable Video Diffusion with attention to audio: diffusers' blocks, and what the published model of Sonic changes in them.

Shapes: B rows (of guidance or of a batch), F frames of a window, T audio tokens of a frame, D their width, Q pixels of a level, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import UNetSpatioTemporalConditionModel
from diffusers.models.attention import BasicTransformerBlock, FeedForward, TemporalBasicTransformerBlock
from diffusers.models.resnet import AlphaBlender
from diffusers.models.upsampling import Upsample2D
from einops import rearrange
from torch import Tensor, nn

from sonic.config import UNetConfig
from sonic.model.attention import KeysValues, sdpa

HIDDEN = 1 << 18  # hidden numbers of an MLP that are computed at a time, 1 MiB: few enough to stay in a CPU's cache


class UNetConditions(NamedTuple):
    """What the frames of a window are denoised with; a dimension of size 1 in the place of F means that all frames have the same.

    `audio_tokens` are [B,F,T,D]; or, with `frames`, those of a clip [n,T,D], where `frames[row][i]` is the index of the tokens that frame
    i of a row attends to. Then `cache`, a dict that is empty in the first call, keeps the audio keys and values of all n frames for later
    calls with the same weights and tokens, without gradients: `unet_counts.cached_numbers` of each frame, 1.6 MB at the published size.
    The last rows have the image embeddings [R,F,1,D]: a row before them, of R < B, has none, which is the same as zeros.
    """

    image_embeds: Tensor
    audio_tokens: Tensor
    added_ids: Tensor  # [B,3] frames per second and two motion buckets
    face_mask: Tensor | None = None  # [1 or B,1,8h,8w] how much audio the pixels attend to; None = all of it
    audio_scale: float = 1.0
    frames: Sequence[Sequence[int]] | None = None
    cache: dict[nn.Module, KeysValues] | None = None


class SvdUNet(UNetSpatioTemporalConditionModel):
    """Predicts v of a window of noisy latents. Its tensors have the published names. `enable_gradient_checkpointing` is diffusers'."""

    def __init__(self, config: UNetConfig) -> None:
        down, up, levels = "DownBlockSpatioTemporal", "UpBlockSpatioTemporal", len(config.block_out_channels)
        super().__init__(
            down_block_types=(f"CrossAttn{down}",) * (levels - 1) + (down,),
            up_block_types=(up,) + (f"CrossAttn{up}",) * (levels - 1),
            block_out_channels=tuple(config.block_out_channels),
            num_attention_heads=tuple(config.num_attention_heads),
            layers_per_block=config.layers_per_block,
            cross_attention_dim=config.cross_attention_dim,
            addition_time_embed_dim=config.addition_time_embed_dim,
            projection_class_embeddings_input_dim=3 * config.addition_time_embed_dim,
            num_frames=config.window_frames,
        )
        for name, layer in list(self.named_modules()):
            if name.endswith("attn2"):
                kind = TemporalAudioAttention if "temporal_transformer_blocks" in name else SpatialAudioAttention
                layer.set_processor(kind(layer.to_q.in_features, config.cross_attention_dim))
            elif isinstance(layer, BasicTransformerBlock | TemporalBasicTransformerBlock):
                layer.ff = ChunkedMlp(layer.norm3.normalized_shape[0], activation_fn="geglu")
            if isinstance(layer, TemporalBasicTransformerBlock):
                layer.ff_in = ChunkedMlp(layer.norm3.normalized_shape[0], activation_fn="geglu")
        for block in self.up_blocks[:-1]:
            block.upsamplers[0] = MergedUpsample(block.upsamplers[0].channels, use_conv=True)
        move_blend_factors(self, self.conv_in.weight.device)

    def forward(self, sample: Tensor, timestep: Tensor | float, conditions: UNetConditions) -> Tensor:
        """sample [B,F,8,h,w] (noisy and picture latents), timestep ln(sigma)/4 -> v [B,F,4,h,w], in the precision of the weights"""
        context = WindowContext.of(conditions, sample, len(self.down_blocks))
        return super().forward(sample, timestep, context, conditions.added_ids, return_dict=False)[0]

    def units(self) -> list[nn.Module]:
        """The blocks in the order in which they run; what lies outside them is small."""
        return [*self.down_blocks, self.mid_block, *self.up_blocks]


def move_blend_factors(module: nn.Module, device: torch.device) -> None:
    """Move the weights that blend space and time, which the library makes in host memory, also when another device is the default."""
    for blend in (part for part in module.modules() if isinstance(part, AlphaBlender)):
        blend.mix_factor = nn.Parameter(blend.mix_factor.detach().to(device))


class ChunkedMlp(FeedForward):
    """diffusers' MLP, on a CPU without gradients on a few tokens at a time, which takes less time for the same result."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B,N,C] -> [B,N,C]"""
        forward = super().forward
        if hidden_states.device.type != "cpu" or torch.is_grad_enabled():
            return forward(hidden_states)
        tokens = hidden_states.flatten(0, 1).split(max(1, HIDDEN // (8 * hidden_states.shape[-1])))
        return torch.cat([forward(each) for each in tokens]).view_as(hidden_states)


class MergedUpsample(Upsample2D):
    """Doubles the sides by repeating pixels, then convolves 3x3: each pixel of a new square of 2x2 depends on 2x2 old ones.

    So the weights that meet the same pixel are added, and 4 of 9 multiplications remain; with gradients it is computed as in diffusers.
    """

    def forward(self, hidden_states: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
        """[B,C,h,w] -> [B,C,2h,2w], or as diffusers does it another output_size"""
        height, width = hidden_states.shape[-2:]
        doubled = output_size is None or tuple(output_size) == (2 * height, 2 * width)
        if torch.is_grad_enabled() or not doubled:
            return super().forward(hidden_states, output_size)
        padded = F.pad(hidden_states, (1, 1, 1, 1))
        parts = [
            F.conv2d(padded[..., row : row + height + 1, column : column + width + 1], kernel, self.conv.bias)
            for row, kernels in enumerate(_halves(self.conv.weight, 2))
            for column, kernel in enumerate(_halves(kernels, 3))
        ]
        return rearrange(parts, "(row column) b c h w -> b c (h row) (w column)", row=2)


def _halves(kernel: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The two weights of the first and of the second pixel of a pair, from the three of a convolution of repeated pixels."""
    first, middle, last = kernel.unbind(dim)
    return torch.stack((first, middle + last), dim), torch.stack((first + middle, last), dim)


@dataclass(frozen=True)
class WindowContext:
    """What all cross-attentions of one call read. diffusers' forward carries it in the place of a tensor, `encoder_hidden_states`.

    It has the methods by which that forward repeats such a tensor for each frame and pixel, and repeats nothing.
    """

    image: Tensor  # [R,F or 1,D]
    tokens: Tensor  # [n,T,D]
    used: Tensor | slice  # indices [S] of those tokens that the frames of this call attend to
    of_frames: Tensor  # [B·F] which of the used tokens each frame attends to
    means: Tensor  # [A,T,D] the mean over the frames, of each row that differs from those before it
    of_rows: Tensor  # [B] which mean each row attends to
    masks: dict[int, Tensor]  # pixels of a level -> its face mask [1 or B,Q,1]
    audio_scale: float
    cache: dict[nn.Module, KeysValues] | None

    @classmethod
    def of(cls, given: UNetConditions, sample: Tensor, levels: int) -> WindowContext:
        """The context of a call, in the precision and on the device of the sample [B,F,8,h,w]."""
        (batch, frames), tokens, rows, cache = sample.shape[:2], given.audio_tokens.to(sample), given.frames, given.cache
        if rows is None:
            rows = [range(row * frames, (row + 1) * frames) if tokens.shape[1] > 1 else [row] * frames for row in range(batch)]
            tokens, cache = rearrange(tokens, "b f t d -> (b f) t d"), None
        flat, distinct = [index for row in rows for index in row], list(dict.fromkeys(map(tuple, rows)))
        used = list(dict.fromkeys(flat))
        place, indices = {index: number for number, index in enumerate(used)}, partial(torch.tensor, device=sample.device)
        return cls(
            image=rearrange(given.image_embeds, "r f 1 d -> r f d").to(sample),
            tokens=tokens[indices(used)] if cache is None else tokens,
            used=slice(None) if cache is None else indices(used),
            of_frames=indices([place[index] for index in flat]),
            means=torch.stack([tokens[indices(row)].mean(0) if len(set(row)) > 1 else tokens[row[0]] for row in distinct]),
            of_rows=indices([distinct.index(tuple(row)) for row in rows]),
            masks=level_masks(given.face_mask, sample, levels),
            audio_scale=given.audio_scale,
            cache=cache,
        )

    @property
    def shape(self) -> torch.Size:
        """That of the tokens."""
        return self.tokens.shape

    def itself(self, *_: Any, **__: Any) -> WindowContext:
        """This context, whatever shape is asked for."""
        return self

    repeat_interleave = broadcast_to = reshape = __getitem__ = itself


def level_masks(face_mask: Tensor | None, sample: Tensor, levels: int) -> dict[int, Tensor]:
    """The face mask [B,1,H,W] at each level of the UNet, by the level's number of pixels Q: bicubic, so that values may leave 0 to 1.

    -> [B,Q,1] in the precision and on the device of the sample [...,h,w]
    """
    masks, (height, width) = {}, sample.shape[-2:]
    for _ in range(0 if face_mask is None else levels):
        resized = F.interpolate(face_mask.float(), size=(height, width), mode="bicubic", align_corners=False)
        masks[height * width] = rearrange(resized, "b 1 h w -> b (h w) 1").to(sample)
        height, width = -(-height // 2), -(-width // 2)
    return masks


class AudioAttention(nn.Module):
    """Cross-attention to the image embedding, and with keys and values of its own to audio tokens: a processor of diffusers' attention.

    out = to_out(image values + weight · audio attention): softmax over the one key of the image is 1, so that the image adds its values.
    """

    def __init__(self, channels: int, cross_attention_dim: int) -> None:
        super().__init__()
        self.to_k_ip = nn.ModuleList([nn.Linear(cross_attention_dim, channels, bias=False)])
        self.to_v_ip = nn.ModuleList([nn.Linear(cross_attention_dim, channels, bias=False)])

    def keys_values(self, tokens: Tensor) -> KeysValues:
        """Keys and values of audio tokens.  [n,T,D] -> each [n,T,C]"""
        return self.to_k_ip[0](tokens), self.to_v_ip[0](tokens)


class SpatialAudioAttention(AudioAttention):
    """The pixels of a frame attend to its image embedding, and as much as the face mask says to its audio tokens."""

    def forward(self, attn: nn.Module, tokens: Tensor, *, encoder_hidden_states: WindowContext, attention_mask: None) -> Tensor:
        """[B·F,Q,C] -> [B·F,Q,C]"""
        context, rows = encoder_hidden_states, len(encoder_hidden_states.of_rows)
        frames = len(tokens) // rows
        image = rearrange(image_values(attn, context.image, rows).expand(-1, frames, -1), "b f c -> (b f) 1 c")
        if not context.audio_scale:
            return attn.to_out[0](image).expand_as(tokens)
        mask = context.masks.get(tokens.shape[1], tokens.new_ones(1, 1, 1))
        weight = context.audio_scale * (mask.repeat_interleave(frames, 0) if len(mask) > 1 else mask)
        known = tuple(x[context.used] for x in self.cached(context))
        return attend(attn, tokens, image, known=known, of=context.of_frames, weight=weight)

    def cached(self, context: WindowContext) -> KeysValues:
        """Keys and values of the context's tokens, from its cache if it has one."""
        if context.cache is None:
            return self.keys_values(context.tokens)
        if self not in context.cache:
            context.cache[self] = self.keys_values(context.tokens)
        return context.cache[self]


class TemporalAudioAttention(AudioAttention):
    """Each pixel attends in all frames to the mean over the frames of the image embedding and of the audio tokens.

    Pixels of a row have the same keys, so that they are queries of one attention.
    """

    def forward(self, attn: nn.Module, tokens: Tensor, *, encoder_hidden_states: WindowContext, attention_mask: None) -> Tensor:
        """[B·Q,F,C] -> [B·Q,F,C]"""
        context, rows = encoder_hidden_states, len(encoder_hidden_states.of_rows)
        image = image_values(attn, context.image.mean(1, keepdim=True), rows)
        pixels = rearrange(tokens, "(b q) f c -> b (q f) c", b=rows)
        if not context.audio_scale:
            return attn.to_out[0](image).expand_as(pixels).reshape_as(tokens)
        known = self.keys_values(context.means)
        return attend(attn, pixels, image, known=known, of=context.of_rows, weight=context.audio_scale).view_as(tokens)


def image_values(attn: nn.Module, image: Tensor, rows: int) -> Tensor:
    """What the image adds to all pixels of a frame: zeros in the rows before the last R, which have no image.  [R,F,D] -> [B,F,C]"""
    return F.pad(attn.to_v(image), (0, 0, 0, 0, rows - len(image), 0))


def attend(attn: nn.Module, tokens: Tensor, image: Tensor, *, known: KeysValues, of: Tensor, weight: Tensor | float) -> Tensor:
    """to_out(image + weight · attention of tokens to audio keys and values, the sets `of` those known).

    tokens [B,N,C], image [B,1,C], known each [S,T,C], of [B], weight [...,N or 1,1] -> [B,N,C]
    """
    fewer = known[0].shape[1] < known[0].shape[2] // attn.heads
    if fewer and not torch.is_grad_enabled() and type(attn.to_q) is type(attn.to_out[0]) is nn.Linear:
        scores, out = merged_weights(attn, *known)
        shares = rearrange(torch.bmm(tokens, scores[of]), "b n (heads t) -> b n heads t", heads=attn.heads).softmax(-1)
        shares = rearrange(shares, "b n heads t -> b n (heads t)") * weight
        return torch.baddbmm(attn.to_out[0](image), shares, out[of])
    heads = (rearrange(x, "b n (heads d) -> b n heads d", heads=attn.heads) for x in (attn.to_q(tokens), *(x[of] for x in known)))
    audio = rearrange(sdpa(*heads), "b n heads d -> b n (heads d)")
    return attn.to_out[0](image + weight * audio)


def merged_weights(attn: nn.Module, keys: Tensor, values: Tensor) -> KeysValues:
    """Queries times keys, and values times the output layer, as one product each: cheaper where a head has more channels than keys.

    each [S,T,C] -> [S,C,heads·T], [S,heads·T,C]
    """
    keys, values = (rearrange(x, "s t (heads d) -> s heads t d", heads=attn.heads) for x in (keys, values))
    query = rearrange(attn.to_q.weight, "(heads d) c -> heads d c", heads=attn.heads)
    out = rearrange(attn.to_out[0].weight, "c (heads d) -> heads d c", heads=attn.heads)
    scores = rearrange(keys @ query * attn.scale, "s heads t c -> s c (heads t)")
    return scores, rearrange(values @ out, "s heads t c -> s (heads t) c")
