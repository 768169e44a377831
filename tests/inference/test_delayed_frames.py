"""Frames that are decoded and copied on streams of their own, however late these are, equal those of a device that does all at once."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from delayed_streams import ACCESSES, DELAY_S, LateStream, delayed_streams
from infer_command import small_inputs, tiny_components
from official_folder import VAE, tiny_model
from ranks import on_ranks

from sonic.config import DecodeConfig, SamplerConfig
from sonic.families.wan import Wan
from sonic.inference.generate import generate
from sonic.inference.generate_wan import EncodedInputs
from sonic.inference.infer_config import InferConfig
from sonic.inference.inputs import Settings
from sonic.inference.report import StageTimer
from sonic.model.dit import AvatarDiT
from sonic.parallel.channel import P2PChannel
from sonic.parallel.context import DistributedContext
from sonic.parallel.vae_rank import DIRECTIONS, RemoteAutoencoder, serve_vae
from sonic.types import Inputs, Portrait, Speech
from sonic.vae.wan_vae import WanAutoencoder

CPU = torch.device("cpu")
FRAMES, MADE = 31, 36  # the last block is longer than the video


def settings(*, online: bool) -> Settings:
    return Settings(InferConfig(sampler=SamplerConfig(sample_steps=2), decode=DecodeConfig(online=online)))


def wan_autoencoder() -> WanAutoencoder:
    torch.manual_seed(1)
    return WanAutoencoder(VAE).eval().requires_grad_(False)


def wan_frames(autoencoder: WanAutoencoder | RemoteAutoencoder, *, online: bool, timer: StageTimer | None = None) -> np.ndarray:
    """Frames of a stream by a small model of the published kind."""
    torch.manual_seed(0)
    model = AvatarDiT(config := tiny_model()).eval().requires_grad_(False)
    for weight in model.parameters():
        weight.add_(0.05 * torch.randn_like(weight))
    components = SimpleNamespace(model=model, autoencoder=autoencoder, context=DistributedContext(), config=config, device=CPU)
    text, audio, picture = torch.randn(1, 4, 24), torch.randn(1, 3, 16, MADE), torch.rand(1, 3, 64, 64) * 2 - 1
    inputs = Inputs(Portrait(np.zeros((64, 64, 3), np.uint8)), Speech(np.zeros(0, np.float32)), FRAMES)
    encoded = EncodedInputs(picture, text, text, audio, clip_frames=12)
    given = {"settings": settings(online=online), "timer": timer or StageTimer()}
    return frames_in(Wan().generate(inputs, encoded, components, **given))


def frames_in(chunks: Iterator) -> np.ndarray:
    """All frames; each chunk is read when it comes, as a writer of videos does."""
    return np.concatenate([np.array(chunk.pixels) for chunk in chunks])


@pytest.mark.parametrize("online", [True, False])
def test_frames_of_a_published_model_are_the_same_however_late_they_are_decoded_and_copied(online):
    autoencoder, timer = wan_autoencoder(), StageTimer()
    alone = wan_frames(autoencoder, online=online)
    with delayed_streams():
        late = wan_frames(autoencoder, online=online, timer=timer)
        assert timer.seconds["decode"] > 6 * DELAY_S  # three blocks are decoded and copied
    assert alone.shape == (FRAMES, 64, 64, 3) and len(np.unique(alone)) > 50
    assert (late == alone).all()


@pytest.mark.parametrize("online", [True, False])
def test_frames_of_the_preview_are_the_same_however_late_they_are_decoded_and_copied(online):
    inputs, components = small_inputs(), tiny_components()
    alone = frames_in(generate(inputs, components, settings(online=online)))
    with delayed_streams():
        assert (frames_in(generate(inputs, components, settings(online=online))) == alone).all()


def far_frames() -> list:
    """Whether frames by an autoencoder on another rank, received late, are those of one here; and where they were received."""
    channel = P2PChannel([0, 1], CPU, DIRECTIONS)
    if dist.get_rank():
        serve_vae(wan_autoencoder(), channel)
        return []
    alone, receive, received = wan_frames(wan_autoencoder(), online=False), channel.recv_last, []

    def recv_last():
        received.append("on the stream of the transformer" if ACCESSES[0].counts else "on another one")
        return receive()

    channel.recv_last = recv_last
    with delayed_streams():
        late = wan_frames(RemoteAutoencoder(channel), online=False)
    channel.shut_down()
    return [bool((late == alone).all()), received]


def test_frames_of_a_rank_for_the_autoencoder_are_received_beside_the_work_of_the_transformer():
    same, received = on_ranks(2, far_frames, timeout_s=120)[0]
    assert same
    assert received == 2 * ["on the stream of the transformer"] + 4 * ["on another one"]  # two pictures; then the past, and three blocks


def test_a_stage_lasts_as_long_as_its_stream_and_the_host_does_not_wait_for_it():
    with delayed_streams():
        timer, stream, source = StageTimer(), LateStream(CPU, 0), torch.ones(3)
        for _ in range(20):
            with timer.stage("decode", stream):
                stream.copy(torch.empty(3), source)
        assert timer._unread  # the host has not waited for the last of them
        assert 20 * DELAY_S < timer.seconds["decode"] < timer.passed() and not timer._unread
