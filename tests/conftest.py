"""Fixtures of all tests; this file also makes the helper modules beside it importable."""

from __future__ import annotations

import logging

import pytest
import torch
from fake_cuda import fake_cuda as fake_cuda  # a fixture


@pytest.fixture
def rng() -> torch.Generator:
    """A seeded generator; torch's global generator is seeded too."""
    torch.manual_seed(0)
    return torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def logging_as_before():
    """Restore the log handlers that a command set up inside a test, so that the next test captures the log."""
    log = logging.getLogger("sonic")
    before = log.handlers[:], log.propagate, log.level
    yield
    log.handlers[:], log.propagate = before[:2]
    log.setLevel(before[2])
