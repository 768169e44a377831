"""The UNet of Stable Video Diffusion with attention to audio: diffusers' blocks, and what the published model of Sonic changes in them.

Shapes: B rows (of guidance or of a batch), F frames of a window, T audio tokens of a frame, D their width, Q pixels of a level, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import UNetSpatioTemporalConditionModel
from einops import rearrange
from torch import Tensor, nn

from sonic.config import UNetConfig
from sonic.model.attention import sdpa

KeysValues = tuple[Tensor, Tensor]


class UNetConditions(NamedTuple):
    """What the frames of a window are denoised with; a dimension of size 1 in the place of F means that all frames have the same.

    `audio_tokens` are [B,F,T,D]; or, with `frames`, those of a clip [n,T,D], where `frames[row][i]` is the index of the tokens that frame
    i of a row attends to. Then `cache`, a dict that is empty in the first call, keeps the audio keys and values of all n frames for later
    calls with the same weights and tokens, without gradients: `unet_counts.cached_bytes` of each frame.
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
        self.to(self.conv_in.weight.device)  # the blend factors, which the library makes in host memory, when a device is the default

    def forward(self, sample: Tensor, timestep: Tensor | float, conditions: UNetConditions) -> Tensor:
        """sample [B,F,8,h,w] (noisy and picture latents), timestep ln(sigma)/4 -> v [B,F,4,h,w], in the precision of the weights"""
        context = WindowContext.of(conditions, sample, len(self.down_blocks))
        return super().forward(sample, timestep, context, conditions.added_ids, return_dict=False)[0]

    def units(self) -> list[nn.Module]:
        """The blocks in the order in which they run; what lies outside them is small."""
        return [*self.down_blocks, self.mid_block, *self.up_blocks]


@dataclass(frozen=True)
class WindowContext:
    """What all cross-attentions of one call read. diffusers' forward carries it in the place of a tensor, `encoder_hidden_states`.

    It has the methods by which that forward repeats such a tensor for each frame and pixel, and repeats nothing.
    """

    image: Tensor  # [R,F or 1,D]
    tokens: Tensor  # [n,T,D]
    of_frames: Tensor  # [B,F] indices of the tokens of each frame
    means: Tensor  # [A,T,D] the mean over the frames, of each row that differs from those before it
    of_rows: Tensor  # [B] indices of the mean of each row
    masks: dict[int, Tensor]  # pixels of a level -> its face mask [1 or B,1,Q,1]
    audio_scale: float
    cache: dict[nn.Module, KeysValues] | None

    @classmethod
    def of(cls, given: UNetConditions, sample: Tensor, levels: int) -> WindowContext:
        """The context of a call, in the precision and on the device of the sample [B,F,8,h,w]."""
        batch, frames, _, height, width = sample.shape
        tokens, rows, cache = given.audio_tokens, given.frames, given.cache
        if rows is None:
            rows = [range(row * frames, (row + 1) * frames) if tokens.shape[1] > 1 else [row] * frames for row in range(batch)]
            tokens, cache = rearrange(tokens, "b f t d -> (b f) t d"), None
        of_frames, distinct = torch.tensor([list(row) for row in rows], device=sample.device), list(dict.fromkeys(map(tuple, rows)))
        return cls(
            image=rearrange(given.image_embeds, "r f 1 d -> r f d").to(sample),
            tokens=tokens.to(sample),
            of_frames=of_frames,
            means=torch.stack([tokens[list(row)].mean(0) if len(set(row)) > 1 else tokens[row[0]] for row in distinct]).to(sample),
            of_rows=torch.tensor([distinct.index(tuple(row)) for row in rows], device=sample.device),
            masks={} if given.face_mask is None else level_masks(given.face_mask.to(sample), (height, width), levels),
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


def level_masks(face_mask: Tensor, latent_size: tuple[int, int], levels: int) -> dict[int, Tensor]:
    """The face mask [B,1,H,W] at each level of the UNet, by the level's number of pixels Q; bicubic, so that values may leave 0 to 1.

    -> [B,1,Q,1]
    """
    masks, (height, width) = {}, latent_size
    for _ in range(levels):
        resized = F.interpolate(face_mask, size=(height, width), mode="bicubic", align_corners=False)
        masks[height * width] = rearrange(resized, "b 1 h w -> b 1 (h w) 1")
        height, width = -(-height // 2), -(-width // 2)
    return masks


def attend(attn: nn.Module, tokens: Tensor, known: KeysValues) -> Tensor:
    """Attention of tokens to audio keys and values, before the output layer.  [B,N,C], each [B,T,C] -> [B,N,C]"""
    heads = (rearrange(x, "b n (heads d) -> b n heads d", heads=attn.heads) for x in (attn.to_q(tokens), *known))
    return rearrange(sdpa(*heads), "b n heads d -> b n (heads d)")


class AudioAttention(nn.Module):
    """Cross-attention to the image embedding, and with keys and values of its own to audio tokens: a processor of diffusers' attention.

    Softmax over the one key of the image is 1 whatever the query, so that the image adds its value.
    """

    def __init__(self, channels: int, cross_attention_dim: int) -> None:
        super().__init__()
        self.to_k_ip = nn.ModuleList([nn.Linear(cross_attention_dim, channels, bias=False)])
        self.to_v_ip = nn.ModuleList([nn.Linear(cross_attention_dim, channels, bias=False)])

    def keys_values(self, tokens: Tensor) -> KeysValues:
        """Keys and values of audio tokens.  [n,T,D] -> each [n,T,C]"""
        return self.to_k_ip[0](tokens), self.to_v_ip[0](tokens)


def image_values(attn: nn.Module, image: Tensor, rows: int) -> Tensor:
    """What the image adds to all pixels of a frame: zeros in the rows before the last R, which have no image.  [R,F,D] -> [B,F,C]"""
    return F.pad(attn.to_v(image), (0, 0, 0, 0, rows - len(image), 0))


class SpatialAudioAttention(AudioAttention):
    """The pixels of a frame attend to its image embedding, and as much as the face mask says to its audio tokens."""

    def forward(self, attn: nn.Module, tokens: Tensor, *, encoder_hidden_states: WindowContext, attention_mask: None) -> Tensor:
        """[B·F,Q,C] -> [B·F,Q,C]"""
        context, cache = encoder_hidden_states, encoder_hidden_states.cache
        rows, frames = context.of_frames.shape
        image = rearrange(image_values(attn, context.image, rows), "b f c -> b f 1 c")
        if not context.audio_scale:
            return attn.to_out[0](rearrange(image.expand(-1, frames, *tokens.shape[1:]), "b f q c -> (b f) q c"))
        known = None if cache is None else cache.get(self)
        if known is None:
            known = self.keys_values(context.tokens)
            if cache is not None:
                cache[self] = known
        keys, values = (x[context.of_frames.flatten()] for x in known)
        audio = rearrange(attend(attn, tokens, (keys, values)), "(b f) q c -> b f q c", f=frames) * context.audio_scale
        mask = context.masks.get(tokens.shape[1])
        out = image + (audio if mask is None else audio * mask)
        return attn.to_out[0](rearrange(out, "b f q c -> (b f) q c"))


class TemporalAudioAttention(AudioAttention):
    """Each pixel attends in all frames to the mean over the frames of the image embedding and of the audio tokens.

    Pixels of a row have the same keys, so that they are queries of one attention.
    """

    def forward(self, attn: nn.Module, tokens: Tensor, *, encoder_hidden_states: WindowContext, attention_mask: None) -> Tensor:
        """[B·Q,F,C] -> [B·Q,F,C]"""
        context, rows = encoder_hidden_states, len(encoder_hidden_states.of_rows)
        out = image_values(attn, context.image.mean(1, keepdim=True), rows)
        pixels = rearrange(tokens, "(b q) f c -> b (q f) c", b=rows)
        if context.audio_scale:
            keys, values = (x[context.of_rows] for x in self.keys_values(context.means))
            out = out + context.audio_scale * attend(attn, pixels, (keys, values))
        return attn.to_out[0](out.expand_as(pixels)).view_as(tokens)
