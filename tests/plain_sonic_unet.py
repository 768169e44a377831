"""diffusers' UNet wired as Sonic's published code wires its own, without any saving: what SvdUNet must equal, and be faster than."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import UNetSpatioTemporalConditionModel
from diffusers.image_processor import IPAdapterMaskProcessor
from einops import rearrange
from torch import Tensor, nn

from sonic.config import UNetConfig
from sonic.model.svd_unet import SvdUNet, UNetConditions


class PlainAttention(nn.Module):
    """Cross-attention to image and audio of one softmax each; `spatial` ones read the context of each frame and the face mask."""

    def __init__(self, channels: int, context: int, given: dict, *, spatial: bool) -> None:
        super().__init__()
        self.to_k_ip = nn.ModuleList([nn.Linear(context, channels, bias=False)])
        self.to_v_ip = nn.ModuleList([nn.Linear(context, channels, bias=False)])
        self.spatial, self.given = spatial, given

    def forward(self, attn: nn.Module, tokens: Tensor, encoder_hidden_states: Tensor, attention_mask: None = None) -> Tensor:
        context = self.given["context"] if self.spatial else encoder_hidden_states
        image, audio = context[:, :1], context[:, 1:]
        q = attn.to_q(tokens)
        picture = attention(attn.heads, q, attn.to_k(image), attn.to_v(image))
        sound = attention(attn.heads, q, self.to_k_ip[0](audio), self.to_v_ip[0](audio))
        if self.spatial and self.given["mask"] is not None:
            sound = sound * IPAdapterMaskProcessor.downsample(self.given["mask"][:, 0].to(sound), len(sound), *sound.shape[1:])
        return attn.to_out[0](picture + self.given["scale"] * sound)


def attention(heads: int, *projected: Tensor) -> Tensor:
    """Attention of all heads by torch.  [B,N,C] -> [B,N,C]"""
    q, k, v = (rearrange(x, "b n (heads d) -> b heads n d", heads=heads) for x in projected)
    return rearrange(F.scaled_dot_product_attention(q, k, v), "b heads n d -> b n (heads d)")


class PlainUNet(nn.Module):
    """The weights of a SvdUNet in diffusers' own class: contexts are repeated for every pixel, and masks are resized in every layer."""

    def __init__(self, config: UNetConfig, weights: SvdUNet) -> None:
        super().__init__()
        self.given = {}
        with torch.device(weights.conv_in.weight.device):
            self.unet = UNetSpatioTemporalConditionModel.from_config(weights.config)
            for name, layer in list(self.unet.named_modules()):
                if name.endswith("attn2"):
                    spatial = "temporal_transformer_blocks" not in name
                    layer.set_processor(PlainAttention(layer.to_q.in_features, config.cross_attention_dim, self.given, spatial=spatial))
        self.unet.load_state_dict(weights.state_dict(), assign=True)

    def forward(self, sample: Tensor, timestep: Tensor | float, conditions: UNetConditions) -> Tensor:
        """The prediction from conditions whose embeddings and tokens are [B,F,...] or [B,1,...]."""
        frames = sample.shape[1]
        both = [x.expand(-1, frames, -1, -1) for x in (conditions.image_embeds, conditions.audio_tokens)]
        context = torch.cat(both, dim=2)
        self.given.update(context=context.flatten(0, 1), mask=conditions.face_mask, scale=conditions.audio_scale)
        return self.unet(sample, timestep, context.mean(1), conditions.added_ids, return_dict=False)[0]
