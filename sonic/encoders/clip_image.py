"""The picture embedding of CLIP, which Sonic's UNet reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

VIT_H14 = {  # sizes of SVD-XT's image encoder, under transformers' names
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16, "projection_dim": 1024,
    "image_size": 224, "patch_size": 14, "hidden_act": "gelu",
}  # fmt: skip


class ClipImageEncoder(nn.Module):
    """The vision model of transformers' CLIP, with its projection."""

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        given = {**VIT_H14, **(config or {})}
        self.network = CLIPVisionModelWithProjection(CLIPVisionConfig(**{name: given[name] for name in VIT_H14})).eval()
        embeddings = self.network.vision_model.embeddings
        embeddings.position_ids = torch.arange(embeddings.num_positions, device="cpu")[
            None
        ]  # also of a network without memory: no file has it

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """pixels [B,3,224,224], normalised as CLIP was trained -> [B,D]"""
        return self.network(pixels.to(self.network.visual_projection.weight)).image_embeds
