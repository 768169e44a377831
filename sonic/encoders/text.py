"""Prompts to rows of text features: transformers' umT5 encoder with the published weights' names."""

from __future__ import annotations

import html
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

log = logging.getLogger("sonic.model")

# umt5-xxl, as published beside Wan2.2-S2V
XXL = {
    "vocab_size": 256_384, "d_model": 4096, "d_kv": 64, "d_ff": 10_240, "num_layers": 24, "num_heads": 64,
    "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128, "feed_forward_proj": "gated-gelu",
}  # fmt: skip
# published name -> transformers' name; {i} counts the layers
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
    """umT5: every layer has a relative position bias of its own."""

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        from transformers import UMT5Config, UMT5EncoderModel

        self.encoder = UMT5EncoderModel(UMT5Config(**(config or XXL))).eval()

    def load(self, path: str | Path) -> None:
        """Take the weights of a published file, .pth or .safetensors.

        Raises ValueError when the file cannot be read safely, or a tensor is missing or has no place.
        """
        self.take(_read(Path(path)), str(path))

    def take(self, tensors: Mapping[str, Tensor], source: str) -> None:
        """Take weights by their published names, in the precision they have. Raises ValueError unless all of them fit."""
        found = {to_transformers(name): tensor for name, tensor in tensors.items()}
        wanted = {name for name in self.encoder.state_dict() if name != TIED}
        wrong = sorted(wanted ^ set(found))
        if wrong:
            raise ValueError(f"{source}: tensor {wrong[0]} is missing or has no place ({len(wrong)}); the file is for another text encoder")
        self.encoder.load_state_dict({**found, TIED: found["shared.weight"]}, assign=True)

    @torch.no_grad()
    def forward(self, ids: Tensor, mask: Tensor) -> list[Tensor]:
        """Token ids [B,L] and which of them are real (1) or padding (0) -> for every prompt its rows [length, D], padding left out"""
        rows = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return [prompt[:length] for prompt, length in zip(rows, mask.sum(1).tolist(), strict=True)]


def to_transformers(name: str) -> str:
    """transformers' name of a published tensor; a name that is unknown stays as it is."""
    path, _, leaf = name.rpartition(".")
    words = path.split(".")
    number = words[1] if words[0] == "blocks" and len(words) > 1 else ""
    pattern = NAMES.get(".".join([words[0], "{i}", *words[2:]]) if number else path)
    return name if pattern is None else f"{pattern.replace('{i}', number)}.{leaf}"


def to_published(name: str) -> str:
    """The published name of one of transformers' tensors."""
    words = name.split(".")
    number = words[2] if words[:2] == ["encoder", "block"] else ""
    for theirs, pattern in NAMES.items():
        if f"{pattern.replace('{i}', number)}.weight" == name:
            return f"{theirs.replace('{i}', number)}.weight"
    return name


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give the published text encoder, such as models_t5_umt5-xxl-enc-bf16.pth")
    try:
        return load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch names a dozen kinds of damage by a dozen kinds of errors
        raise ValueError(f"{path} cannot be read as plain tensors ({type(error).__name__}: {error}); fetch it again") from error


def cleaned(prompt: str) -> str:
    """A prompt as the published code hands it to its tokenizer: characters mended, HTML's names for them resolved, single spaces."""
    return " ".join(html.unescape(html.unescape(_mended(prompt))).split())


def _mended(prompt: str) -> str:
    """The prompt with its characters mended by ftfy, as the published code does it: wide commas become plain ones, and the like."""
    if prompt.isascii():
        return prompt
    try:
        import ftfy
    except ImportError:
        log.warning("a prompt beyond ASCII is read as it is typed; the published code mends it with ftfy first: pip install ftfy")
        return prompt
    return ftfy.fix_text(prompt)


class Tokenizer:
    """transformers' tokenizer of a folder; prompts are cleaned as the published code cleans them."""

    def __init__(self, folder: str | Path) -> None:
        from transformers import AutoTokenizer

        try:
            self.tokens = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder} holds no tokenizer that can be read ({error}); fetch it again") from error

    def __call__(self, prompts: list[str], length: int) -> tuple[Tensor, Tensor]:
        """Ids and mask [B,length], cut and padded to it."""
        texts = [cleaned(prompt) for prompt in prompts]
        found = self.tokens(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return found["input_ids"], found["attention_mask"]
