"""Parity with recorded numbers of Sonic's published code; the variable SONIC_GOLDEN_SVD names another folder of cases."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path

import pytest
import torch
from golden_sonic_case import SonicCase

FOLDER = Path(os.environ.get("SONIC_GOLDEN_SVD") or Path(__file__).parent / "golden_sonic")
FOLDERS = sorted(path for path in FOLDER.glob("case*") if path.is_dir())
CHECKED_BY = {  # the beginning of a case's name -> the module whose `check` compares it
    "case01": "golden_sonic_unet",
    "case02": "golden_sonic_audio",
    "case03": "golden_sonic_audio",
    "case04": "golden_sonic_sampling",
    "case05": "golden_sonic_sampling",
    "case06": "golden_sonic_picture",
    "case07": "golden_sonic_rife",
}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
@torch.no_grad()
def test_golden(folder: Path) -> None:
    kind = folder.name.partition("_")[0]
    assert kind in CHECKED_BY, f"nobody checks {folder.name}: its name must begin with one of {sorted(CHECKED_BY)}"
    import_module(CHECKED_BY[kind]).check(SonicCase.read(folder))


def test_the_folder_holds_cases() -> None:
    assert FOLDERS, f"{FOLDER} holds no case of {sorted(CHECKED_BY)}"
