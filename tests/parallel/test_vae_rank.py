"""The VAE on its own rank: the video of one rank, remote caches that are kept and freed, and its faults."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from queue import Queue

import numpy as np
import pytest
import torch
import torch.distributed as dist
from infer_command import FACE
from infer_command_ranks import infer_on
from ranks import on_ranks
from torch import nn

from sonic.data.audio import SAMPLE_RATE, log_mel
from sonic.parallel.channel import P2PChannel, Shutdown
from sonic.parallel.vae_rank import DIRECTIONS, RemoteAutoencoder, serve_vae
from sonic.vae.motion_vae import WarpAutoencoder

CPU = torch.device("cpu")
ARGUMENTS = ("+preset=fast_preview", "video.num_clip=1", "video.infer_frames=12", *FACE)
APART = ("parallel=pipeline", "parallel.vae_rank=true")


def sabotaged(rank: int, *, way: str) -> None:
    """Make the last of two ranks fail when it decodes; slow first-time work is done before the watchdog's timeout starts."""
    log_mel(np.zeros(SAMPLE_RATE, np.float32), 25)
    ways = {"fails": broken, "hangs": lambda *arguments: time.sleep(1000)}
    if rank == 1:
        WarpAutoencoder.decode = ways[way]


def broken(*arguments) -> None:
    raise RuntimeError("the decoder fell over")


@pytest.mark.parametrize(("way", "word"), [("fails", "a fault of the program"), ("hangs", "hangs at test_vae_rank.py")])
def test_a_fault_on_the_vae_rank_ends_the_job_and_is_reported_first(way, word, tmp_path):
    codes, output = infer_on(
        2, [*ARGUMENTS, *APART, "parallel.timeout_s=8", f"output={tmp_path / 'a.mp4'}"], tmp_path, before=partial(sabotaged, way=way)
    )
    assert all(codes), output
    first, *others = [channel for channel in output.splitlines() if "sonic:" in channel]
    assert "rank 1: " in first and word in first, output
    assert all("rank 1" in channel for channel in others), output
    assert not (tmp_path / "a.mp4").exists()


class Remembers:
    """A cache of one number that records which caches are alive."""

    def __init__(self, value: float, alive: weakref.WeakSet) -> None:
        self.value = value
        alive.add(self)


class Counting(nn.Module):
    """An autoencoder whose frames encode its input, the input's strides, and the largest number of live caches."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: weakref.WeakSet = weakref.WeakSet()
        self.most = 0

    def encode(self, frames, cache=None):
        if frames.shape[2] % 4 != 1:
            raise ValueError(f"{frames.shape[2]} frames cannot be encoded")
        return torch.tensor(frames.stride()), Remembers(0.0, self.alive)

    def decode(self, latents, cache=None):
        remembers = Remembers(latents.sum().item() + (cache.value if cache else 0.0), self.alive)
        self.most = max(self.most, len(self.alive))
        return torch.full((2, 3), remembers.value, dtype=torch.bfloat16), remembers


def asked() -> list:
    """Replies to the first rank, and the largest number of caches on the other rank."""
    channel = P2PChannel([0, 1], CPU, DIRECTIONS)
    if dist.get_rank():
        autoencoder = Counting()
        serve_vae(autoencoder, channel)
        return [autoencoder.most, len(autoencoder.alive), bool(channel._sent)]
    far, found = RemoteAutoencoder(channel), []
    still = torch.randn(1, 8, 6, 3).permute(0, 3, 1, 2).unsqueeze(2)
    for picture in (still, still.expand(-1, -1, 5, -1, -1)):
        found.append((tuple(far.encode(picture)[0].tolist()), picture.stride()))
    with pytest.raises(ValueError, match="2 frames cannot be encoded"):
        far.encode(still.expand(-1, -1, 2, -1, -1))
    frames, cache = far.decode(torch.ones(1, 1, 1))
    twice = [far.decode(torch.full((1, 1, 2), value), cache)[0][0, 0].item() for value in (1.0, 2.0)]
    for _ in range(30):
        frames, cache = far.decode(torch.ones(1, 1, 1), cache)
    unsent = bool(channel._sent)
    channel.shut_down()
    return [found, twice, frames[1, 2].item(), frames.dtype, unsent]


def test_tensors_keep_their_strides_and_caches_without_a_handle_are_freed():
    (found, twice, last, dtype, asks), (most, left, unsent) = on_ranks(2, asked, timeout_s=60)
    assert all(theirs == ours for theirs, ours in found)
    assert twice == [3, 5]  # a cache is a value: what was decoded after it changes nothing
    assert (last, dtype) == (31, torch.bfloat16)
    assert most == 2  # the last one and the next, not one for each of thirty blocks
    assert left == 0
    assert not asks and not unsent  # buffers of messages that have arrived


class OneProcessChannel:
    """A channel of two ranks in one process. The first reply is delivered late."""

    def __init__(self) -> None:
        self.questions, self.answers, self.asked = Queue(), Queue(), threading.Event()

    def send_next(self, call) -> None:
        self.questions.put(call)
        slow = not self.asked.is_set()
        self.asked.set()
        time.sleep(0.2 * slow)

    def send_first(self, output) -> None:
        self.answers.put(output)

    def recv_previous(self):
        return self.questions.get()

    def recv_last(self):
        return self.answers.get(timeout=20)  # whoever keeps the autoencoder may have fallen over

    def flush(self) -> None:
        """Nothing is under way."""


@contextmanager
def answered(autoencoder: nn.Module) -> Iterator[RemoteAutoencoder]:
    """A remote autoencoder that is served by a thread."""
    vae_channel = OneProcessChannel()
    keeper = threading.Thread(target=serve_vae, args=(autoencoder, vae_channel))
    keeper.start()
    try:
        yield RemoteAutoencoder(vae_channel)
    finally:
        vae_channel.send_next(Shutdown())
        keeper.join()


def test_two_threads_that_call_at_once_get_their_own_replies():
    with answered(Counting()) as far, ThreadPoolExecutor() as pool:
        first = pool.submit(far.decode, torch.full((1, 1, 1), 3.0))
        far.channel.asked.wait()
        second = far.decode(torch.full((1, 1, 1), 5.0))
        assert [first.result()[0][0, 0].item(), second[0][0, 0].item()] == [3.0, 5.0]


def test_the_portrait_stays_on_the_vae_rank_and_its_latents_come_back():
    picture = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    autoencoder = WarpAutoencoder().eval().requires_grad_(False)
    here = autoencoder.reference(picture)
    with answered(autoencoder) as far:
        there = far.reference(picture)
        assert there.latents is not None and torch.equal(there.latents, here.latents)
        latents = here.latents.expand(-1, -1, 2, -1, -1)
        wanted, found = (each.decode(latents, known)[0] for each, known in ((autoencoder, here), (far, there)))
        assert all(map(torch.equal, found, wanted))
