"""Files of the text encoder, and cleaning of prompts."""

from __future__ import annotations

import logging
import pickle
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


class Trap:
    """An object whose pickle runs code when loaded."""

    def __reduce__(self):
        return (print, ("run",))


def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path, capsys):
    (tmp_path / "text.pth").write_bytes(pickle.dumps({"a": Trap()}))
    with pytest.raises(ValueError, match="plain tensors"):
        TextEncoder(TINY).load(tmp_path / "text.pth")
    assert "run" not in capsys.readouterr().out


def test_a_missing_text_encoder_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        TextEncoder(TINY).load(tmp_path / "text.pth")
