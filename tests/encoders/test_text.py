"""Files of the text encoder, and cleaning of prompts."""

from __future__ import annotations

import logging
import sys

import pytest
import torch
from torch.testing import assert_close

from sonic.encoders.text import TIED, TextEncoder, cleaned, to_published, to_transformers

TINY = {"vocab_size": 20, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 2, "num_heads": 2, "feed_forward_proj": "gated-gelu"}


def published(encoder):
    """The encoder's tensors under the names of a published file."""
    return {to_published(name): tensor.clone() for name, tensor in encoder.encoder.state_dict().items() if name != TIED}


def test_names_go_both_ways():
    names = [name for name in TextEncoder(TINY).encoder.state_dict() if name != TIED]
    assert [to_transformers(to_published(name)) for name in names] == names
    assert not any(to_published(name) == name for name in names)


def test_published_tensors_are_all_loaded():
    torch.manual_seed(0)
    first, second = TextEncoder(TINY), TextEncoder(TINY)
    second.load_tensors(published(first), "a file")
    ids, mask = torch.randint(20, (2, 6)), torch.tensor([[1] * 6, [1] * 2 + [0] * 4])
    for one, two in zip(first(ids, mask), second(ids, mask), strict=True):
        assert_close(one, two)
    assert [len(rows) for rows in second(ids, mask)] == [6, 2]


def test_a_missing_tensor_is_named():
    tensors = published(TextEncoder(TINY))
    del tensors["blocks.1.attn.k.weight"]
    with pytest.raises(ValueError, match=r"block\.1\.layer\.0\.SelfAttention\.k"):
        TextEncoder(TINY).load_tensors(tensors, "a file")


def test_prompts_are_cleaned_as_published():
    assert cleaned("a  person\n&amp;amp; another ") == "a person & another"
    pytest.importorskip("ftfy")
    assert cleaned("\u201ca person\u201d\uff0c talking") == '"a person", talking'


def test_without_ftfy_a_prompt_is_read_as_typed_with_a_warning(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    monkeypatch.setattr("sonic.encoders.text.log", logging.getLogger("details"))
    assert cleaned("a\uff0cb") == "a\uff0cb"
    assert "ftfy" in caplog.text
    caplog.clear()
    assert cleaned("a, b") == "a, b" and not caplog.text
