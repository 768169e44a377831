"""Fixtures for every test; this file also makes the helpers beside it importable."""

from __future__ import annotations

import logging

import pytest
import torch


@pytest.fixture
def rng() -> torch.Generator:
    """A seeded generator; torch's global one is seeded alike."""
    torch.manual_seed(0)
    return torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def logging_as_before():
    """A command that ran inside a test leaves no handlers behind, and the next test hears what is logged."""
    log = logging.getLogger("sonic")
    before = log.handlers[:], log.propagate, log.level
    yield
    log.handlers[:], log.propagate = before[:2]
    log.setLevel(before[2])
