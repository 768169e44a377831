"""Miniature downloads and their conversions, made once for all tests of this folder; tests must not change them."""

from __future__ import annotations

import pytest
from convert_command import convert
from infer_command import babble, write_wav
from official_folder import write_lora, write_official


@pytest.fixture(scope="session")
def downloads(tmp_path_factory):
    folder = tmp_path_factory.mktemp("downloads")
    write_official(folder / "Wan2.2-S2V-14B")
    write_lora(folder / "LiveAvatar")
    write_wav(folder / "speech.wav", babble(1.5))
    return folder


@pytest.fixture(scope="session")
def ready(downloads):
    source = downloads / "Wan2.2-S2V-14B"
    assert convert(f"source={source}", "model=wan_s2v_14b", f"output={downloads / 'wan'}") == 0
    assert convert(f"source={source}", f"live_avatar={downloads / 'LiveAvatar'}", f"output={downloads / 'live'}") == 0
    return downloads
