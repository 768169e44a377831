"""Laws of the text encoder's files."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch.testing import assert_close

from sonic.model.text import TIED, TextEncoder, to_transformers

TINY = {"vocab_size": 20, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 2, "num_heads": 2, "feed_forward_proj": "gated-gelu"}


def published(encoder):
    """The encoder's tensors under the names of a published file."""
    back = {"shared": "token_embedding", "encoder.final_layer_norm": "norm"}
    found = {}
    for name, tensor in encoder.encoder.state_dict().items():
        if name == TIED:
            continue
        for i in range(2):
            for theirs in ("norm1", *(f"attn.{p}" for p in "qkvo"), "pos_embedding.embedding", "norm2", "ffn.gate.0", "ffn.fc1", "ffn.fc2"):
                back[to_transformers(f"blocks.{i}.{theirs}.weight").removesuffix(".weight")] = f"blocks.{i}.{theirs}"
        found[f"{back[name.removesuffix('.weight')]}.weight"] = tensor.clone()
    return found


def test_a_published_file_is_read_whole(tmp_path):
    torch.manual_seed(0)
    first, second = TextEncoder(TINY), TextEncoder(TINY)
    torch.save(published(first), tmp_path / "text.pth")
    second.load(tmp_path / "text.pth")
    ids, mask = torch.randint(20, (2, 6)), torch.tensor([[1] * 6, [1] * 2 + [0] * 4])
    for one, two in zip(first(ids, mask), second(ids, mask), strict=True):
        assert_close(one, two)
    assert [len(rows) for rows in second(ids, mask)] == [6, 2]


def test_a_missing_tensor_is_named(tmp_path):
    tensors = published(TextEncoder(TINY))
    del tensors["blocks.1.attn.k.weight"]
    torch.save(tensors, tmp_path / "text.pth")
    with pytest.raises(ValueError, match=r"block\.1\.layer\.0\.SelfAttention\.k"):
        TextEncoder(TINY).load(tmp_path / "text.pth")


class Trap:
    """A pickle that wants to run code."""

    def __reduce__(self):
        return (print, ("run",))


def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path, capsys):
    (tmp_path / "text.pth").write_bytes(pickle.dumps({"a": Trap()}))
    with pytest.raises(ValueError, match="plain tensors"):
        TextEncoder(TINY).load(tmp_path / "text.pth")
    assert "run" not in capsys.readouterr().out


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        TextEncoder(TINY).load(tmp_path / "text.pth")
