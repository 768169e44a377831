"""The device of a rank, and the process groups of its messages."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks

from sonic.config import Ranks
from sonic.inference.components import find_device
from sonic.parallel import mesh
from sonic.parallel.layer_pipeline import pipeline_channel
from sonic.parallel.mesh import make_world, open_world
from sonic.parallel.parallel_config import ParallelConfig
from sonic.parallel.vae_rank import make_vae_channel
from sonic.training.world import join_world

CPU = torch.device("cpu")


@pytest.mark.parametrize(("device", "chosen"), [("cuda:1", torch.device("cuda", 1)), ("cuda", 0)])
def test_the_device_of_a_rank_is_the_current_one_whoever_has_looked_at_cuda_before(device, chosen, monkeypatch):
    seen = []
    monkeypatch.setattr(torch.cuda, "set_device", seen.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with open_world(ParallelConfig("single"), Ranks(), torch.device(device)) as world:
        assert world.device == torch.device(device)
    assert seen == [chosen]


def test_a_cpu_has_no_current_device_to_choose(monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: pytest.fail("there is none"))
    with open_world(ParallelConfig("single"), Ranks(), CPU):
        pass


@pytest.mark.parametrize(("devices", "backend"), [(2, "cpu:gloo,cuda:nccl"), (1, "gloo")])
def test_ranks_that_share_a_device_use_gloo_in_videos_and_trainings(devices, backend, monkeypatch, caplog):
    begun, current = [], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(dist, "init_process_group", lambda name, **named: begun.append(name))
    device = find_device("auto", local_rank=1)
    join_world(device, local_world=2)
    with pytest.raises(ValueError, match="process group"), open_world(ParallelConfig("fsdp"), Ranks(1, 2, 1, 2), device):
        pass
    assert begun == [backend] * 2
    assert current == [torch.device("cuda", 1 % devices)] * 2
    assert ("2 ranks share 1 devices" in caplog.text) == (devices == 1)


def sent_each_way() -> list[float]:
    """Messages that each of three ranks receives over groups as of CUDA ranks: two share the layers, the third has the VAE."""
    mesh.direct = lambda device: True
    world, rank = make_world(ParallelConfig("pipeline", vae_rank=True), "pipeline", CPU), dist.get_rank()
    groups = {group.group_name for group in world.lanes}
    channels = [make(world) for make, ranks in ((pipeline_channel, (0, 1)), (make_vae_channel, (0, 2))) if rank in ranks]
    assert len(groups) == mesh.LANES
    assert {group.group_name for channel in channels for group in channel._groups.values()} <= groups
    for number, channel in enumerate(channels):  # all requests are sent before the first reply
        if rank == 0:
            channel.send_next(torch.full((3,), 1.0 + number))
    if rank:
        received = channels[0].recv_previous()
        channels[0].send_first(10 * received)
        found = [received[2].item()]
    else:
        found = [channel.recv_last()[2].item() for channel in reversed(channels)]
    for channel in channels:
        channel.flush()
    return found


def test_ranks_of_different_channels_receive_each_others_messages():
    assert on_ranks(3, sent_each_way, timeout_s=240) == [[20, 10], [1], [2]]


def test_ranks_without_a_gpu_make_no_groups_for_messages():
    assert on_ranks(1, lanes_of_a_cpu, timeout_s=240) == [0]


def lanes_of_a_cpu() -> int:
    return len(make_world(ParallelConfig("pipeline"), "pipeline", CPU).lanes)
