"""The text encoder: prompts become rows of features, by transformers' umT5 with weights under their published names."""

from __future__ import annotations

import html
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sonic.checkpoint.weights import translated

log = logging.getLogger("sonic.model")

# published name -> transformers' name; {i} is the number of the layer
NAMES = {
    "token_embedding": "shared",
    "norm": "encoder.final_layer_norm",
    "blocks.{i}.norm1": "encoder.block.{i}.layer.0.layer_norm",
    **{f"blocks.{{i}}.attn.{p}": f"encoder.block.{{i}}.layer.0.SelfAttention.{p}" for p in "qkvo"},
    "blocks.{i}.pos_embedding.embedding": "encoder.block.{i}.layer.0.SelfAttention.relative_attention_bias",
    "blocks.{i}.norm2": "encoder.block.{i}.layer.1.layer_norm",
    "blocks.{i}.ffn.gate.0": "encoder.block.{i}.layer.1.DenseReluDense.wi_0",
    "blocks.{i}.ffn.fc1": "encoder.block.{i}.layer.1.DenseReluDense.wi_1",
    "blocks.{i}.ffn.fc2": "encoder.block.{i}.layer.1.DenseReluDense.wo",
}
TIED = "encoder.embed_tokens.weight"  # transformers' second name of "shared.weight"


class TextEncoder(nn.Module):
    """The umT5 encoder, in which every layer has its own relative position bias."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        from transformers import UMT5Config, UMT5EncoderModel

        self.encoder = UMT5EncoderModel(UMT5Config(**config)).eval()

    def load_tensors(self, tensors: Mapping[str, Tensor], source: str) -> None:
        """Load weights by their published names, in the precision they have. Raises ValueError when one is missing or unknown."""
        weights = {to_transformers(name): tensor for name, tensor in tensors.items()}
        wanted = {name for name in self.encoder.state_dict() if name != TIED}
        wrong = sorted(wanted ^ set(weights))
        if wrong:
            raise ValueError(f"{source}: tensor {wrong[0]} is missing or has no place ({len(wrong)}); the file is for another text encoder")
        self.encoder.load_state_dict({**weights, TIED: weights["shared.weight"]}, assign=True)

    @torch.no_grad()
    def forward(self, ids: Tensor, mask: Tensor) -> list[Tensor]:
        """Token ids [B,L] and their mask, 1 for a token and 0 for padding -> the rows of every prompt without padding, [tokens,E] each"""
        rows = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return [prompt[:length] for prompt, length in zip(rows, mask.sum(1).tolist(), strict=True)]


def to_transformers(name: str) -> str:
    """transformers' name of a published tensor; an unknown name is returned as it is."""
    return translated(name, NAMES)


def to_published(name: str) -> str:
    """The published name of a tensor of transformers' encoder; an unknown name is returned as it is."""
    return translated(name, {theirs: published for published, theirs in NAMES.items()})


def cleaned(prompt: str) -> str:
    """The prompt as the published code gives it to its tokenizer: characters repaired by ftfy (full-width commas become plain ones, and so
    on), HTML entities resolved, single spaces."""
    if not prompt.isascii():
        try:
            import ftfy

            prompt = ftfy.fix_text(prompt)
        except ImportError:
            log.warning("a prompt with characters outside ASCII stays as it is; the published code repairs it with ftfy: pip install ftfy")
    return " ".join(html.unescape(html.unescape(prompt)).split())


class Tokenizer:
    """transformers' tokenizer from a folder; it cleans prompts as the published code does."""

    def __init__(self, folder: str | Path) -> None:
        from transformers import AutoTokenizer

        try:
            self.tokens = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder} holds no tokenizer that can be read ({error}); fetch it again") from error

    def __call__(self, prompts: list[str], length: int) -> tuple[Tensor, Tensor]:
        """Token ids and mask of the prompts, each cut or padded to `length`.  -> two of int64 [B,length]"""
        texts = [cleaned(prompt) for prompt in prompts]
        encoded = self.tokens(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return encoded["input_ids"], encoded["attention_mask"]
