"""What a rank settles before it works: its device, and the ways of its messages."""

from __future__ import annotations

import pytest
import torch

from sonic.config import Ranks
from sonic.parallel.mesh import open_world
from sonic.parallel.settings import ParallelConfig


@pytest.mark.parametrize(("device", "chosen"), [("cuda:1", torch.device("cuda", 1)), ("cuda", 0)])
def test_the_device_of_a_rank_is_the_current_one_whoever_has_looked_at_cuda_before(device, chosen, monkeypatch):
    seen = []
    monkeypatch.setattr(torch.cuda, "set_device", seen.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with open_world(ParallelConfig("single"), "single", Ranks(), device=torch.device(device)) as world:
        assert world.device == torch.device(device)
    assert seen == [chosen]


def test_a_cpu_has_no_current_device_to_choose(monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: pytest.fail("there is none"))
    with open_world(ParallelConfig("single"), "single", Ranks(), device=torch.device("cpu")):
        pass
