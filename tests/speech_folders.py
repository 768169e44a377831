"""Tiny speech encoders in the form in which real ones are downloaded, written by transformers itself."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from torch import nn

CONV = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "conv_dim": [8] * 7, "conv_bias": True,
    "feat_extract_norm": "layer", "do_stable_layer_norm": True, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
WHISPER = {
    "d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_layers": 1, "vocab_size": 20,
    "decoder_attention_heads": 2, "decoder_ffn_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1,
}  # fmt: skip
TINY = {"wav2vec2": ("Wav2Vec2", CONV), "hubert": ("Hubert", CONV), "whisper": ("Whisper", WHISPER)}
LAYERS, WIDTH = 3, 16


def write_speech_folder(folder: Path, name: str, *, head: str = "Model", seed: int = 0, **changes) -> nn.Module:
    """Write a tiny network of transformers, such as HubertForCTC for head="ForCTC", with random weights; gives it."""
    kind, config = TINY[name]
    torch.manual_seed(seed)
    model = getattr(transformers, f"{kind}{head}")(getattr(transformers, f"{kind}Config")(**config | changes)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    model.save_pretrained(folder)
    return model
