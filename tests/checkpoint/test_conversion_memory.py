"""A conversion needs the memory of a few tensors, however large the checkpoint is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from convert_command import convert, tensors_of
from official_folder import FULL, GIVEN, tiny_model, write_lora, write_official, write_sparse

from sonic.checkpoint import official
from sonic.checkpoint.convert import SHARD_BYTES, shards_of
from sonic.checkpoint.tensor_files import read
from sonic.checkpoint.weights import export
from sonic.cli import Entry, compose
from sonic.inference.infer_config import InferConfig
from sonic.model.dit import AvatarDiT

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
MIB = 2**20


def peak_growth(work: Callable[[], object]) -> float:
    """Largest growth of this process's resident memory (with mapped files) during the work, in MiB."""
    held = lambda line: int(STATUS.read_text().partition(f"{line}:")[2].split()[0]) / 1024  # noqa: E731
    try:
        RESET.write_text("5")
    except OSError:
        pytest.skip("the peak of resident memory is reset through /proc/self/clear_refs, which this system does not have")
    before = held("VmRSS")
    work()
    return held("VmHWM") - before


def test_a_conversion_takes_the_memory_of_a_few_tensors(tmp_path):
    """A transformer of 540 MiB, an adapter merged into every layer of it; its largest tensor has 16 MiB."""
    sizes = {"dim": 1024, "ffn_dim": 8192, "num_layers": 11, "num_heads": 8}
    source, config = write_official(tmp_path / "source"), tiny_model(hidden_dim=1024, ffn_dim=8192, num_layers=11, num_heads=8)
    for file in source.glob(f"{official.DIT_STEM}*"):
        file.unlink()
    (source / "config.json").write_text(json.dumps({**GIVEN, **sizes}))
    with torch.device("meta"):
        tensors = export(AvatarDiT(config))
    write_sparse(tensors, source, shards=3)
    lora = write_lora(tmp_path / "lora", tensors=tensors)
    total, largest = (join(2 * tensor.numel() for tensor in tensors.values()) / MIB for join in (sum, max))
    assert total > 500 and largest == 16
    grown = peak_growth(lambda: convert(f"source={source}", f"live_avatar={lora}", f"output={tmp_path / 'out'}"))
    written = tensors_of(tmp_path / "out/dit", "model")
    assert written.keys() == tensors.keys() and written["blocks.10.ffn.0.weight"].any()
    assert grown < 256  # mapped pages, a tensor and its adapter's product in float32, and imported modules


def test_the_published_14b_is_checked_and_split_into_shards_without_reading_its_weights(tmp_path):
    """Sparse files of 32 GB, which take no disk space: headers are read, contents are not."""
    config = compose(Entry("infer", InferConfig), ["model=wan_s2v_14b"]).model
    with torch.device("meta"):
        tensors = export(AvatarDiT(config))
    (tmp_path / "config.json").write_text(json.dumps(FULL))
    write_sparse(tensors, tmp_path, shards=4)

    def survey() -> None:
        part, found = official.transformer(tmp_path, config)
        assert (len(part.tensors), found) == (1260, config)
        shards = list(shards_of(part))
        sizes = [sum(part.nbytes(stored) for stored in shard.values()) for shard in shards]
        assert sum(sizes) == 2 * 16_295_755_609
        assert max(sizes) <= SHARD_BYTES
        assert all(not tensor.any() for _, tensor in read(shards[0].values()))

    assert peak_growth(survey) < 500
