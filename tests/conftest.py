"""Fixtures for every test; this file also makes the helpers beside it importable."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def rng() -> torch.Generator:
    """A seeded generator; torch's global one is seeded alike."""
    torch.manual_seed(0)
    return torch.Generator().manual_seed(0)
