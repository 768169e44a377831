"""The planner's dry run, which is on a device of its own, takes what it takes on a (fake) CUDA device."""

from __future__ import annotations

from unittest.mock import patch

import pytest
from fake_cuda import CUDA, FakeCuda, fake_cuda_mode

from sonic.cli import compose
from sonic.commands.plan_command import ENTRY
from sonic.parallel.mesh import World
from sonic.planner import track
from sonic.planner.search import search_plans

SMALL = (
    "model=live_avatar_14b",
    "run.dtype=bfloat16",
    "video=384x256",
    "hardware=1xh200",
    "parallel=single",
    "model.trunk.num_layers=3",
    "model.audio.inject_layers=[0,2]",
)


class Cuda(FakeCuda):
    """Fake CUDA beside another device that torch takes for the accelerator."""

    avoid_device_init = True


def peaks(items: tuple[str, ...]) -> tuple[float, float]:
    """GiB of the dry run on the planner's device and on fake CUDA."""
    found = search_plans(compose(ENTRY, [*SMALL, *items]))
    (ours,) = track.track(found).ranks  # first, so that torch knows its own functions that make tensors before the others are patched
    with fake_cuda_mode(), patch.multiple(track, fake_gpu=lambda: CUDA, FakeGpuMode=Cuda, make_world=lambda *_: World(device=CUDA)):
        (cuda,) = track.track(found).ranks
    return max(ours.values()), max(cuda.values())


@pytest.mark.parametrize("items", [(), ("model.rollout.clip_frames=48",), ("run.dtype=float32",)])
def test_the_dry_run_takes_what_fake_cuda_takes(fake_cuda, items):
    ours, cuda = fake_cuda(peaks, items)
    assert ours == pytest.approx(cuda, rel=1e-4)
