"""Latents of a clip to frames as bytes: numbers of frames, rounding, order, and memory that does not grow with the length."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from delayed_streams import delayed_streams
from torch import nn
from torch.testing import assert_close

from sonic.config import DecodeConfig
from sonic.inference.decode_windows import decode_clip, doubled, shown_frames
from sonic.inference.report import StageTimer
from sonic.vae.rife import Rife
from sonic.vae.svd_vae import SvdAutoencoder

TINY = {"block_out_channels": (32, 32), "down_block_types": ("DownEncoderBlock2D",) * 2, "layers_per_block": 1, "latent_channels": 4}


class LatentsAsFrames(nn.Module):
    """In place of a VAE: a frame is the first three channels of its latents. It remembers how it was asked and how far it went."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.asked, self.decoded = [], 0

    def decode(self, latents, *, chunk, overlap):
        self.asked.append((chunk, overlap))
        for some in latents.split(chunk):
            self.decoded += len(some)
            yield some[:, :3]


class Mean(nn.Module):
    """In place of RIFE: the mean of two frames."""

    def middle(self, first, second):
        assert first.shape == second.shape and len(first) == 1, "two neighbouring frames at a time"
        return (first + second) / 2


def frames_of(latents, autoencoder, rife=None, *, upstream=False, **options):
    options = DecodeConfig(**options)
    return list(decode_clip(latents, autoencoder, rife, decode=options, timer=StageTimer(), upstream=upstream))


@pytest.mark.parametrize("frames", [1, 2, 8, 11])
@pytest.mark.parametrize("upstream", [False, True])
def test_a_clip_has_twice_its_frames_and_upstream_one_less(rng, frames, upstream):
    given = torch.rand(frames, 3, 4, 4, generator=rng)
    found = torch.cat(list(doubled([given], Mean(), upstream=upstream)))
    assert len(found) == shown_frames(frames, upstream=upstream) == 2 * frames - upstream
    assert torch.equal(found[::2], given)
    assert_close(found[1 : 2 * frames - 2 : 2], (given[1:] + given[:-1]) / 2)
    assert upstream or torch.equal(found[-1], given[-1]), "the last frame is shown twice"


def test_the_frames_do_not_depend_on_how_they_come_in_chunks(rng):
    torch.manual_seed(0)
    rife, given = Rife(16).eval(), torch.rand(7, 3, 32, 32, generator=rng)
    expected = torch.cat(list(doubled([given], rife)))
    for lengths in ((1,) * 7, (3, 4), (6, 1)):
        assert torch.equal(torch.cat(list(doubled(given.split(lengths), rife))), expected)


@pytest.mark.parametrize("online", [True, False])
def test_pixels_are_rounded_to_the_nearest_level(online):
    levels = torch.tensor([-0.2, 0.49, 0.51, 100.49, 100.51, 254.6, 255.4]) / 255 * 2 - 1
    latents = levels.reshape(-1, 1, 1, 1).expand(-1, 4, 2, 2)
    found = torch.cat(frames_of(latents, LatentsAsFrames(), online=online))
    assert found.dtype is torch.uint8 and found.shape == (7, 2, 2, 3)
    assert found[:, 0, 0, 0].tolist() == [0, 0, 1, 100, 101, 255, 255]


def test_upstream_decodes_eight_frames_without_overlap_and_others_as_configured():
    autoencoder, latents = LatentsAsFrames(), torch.zeros(20, 4, 2, 2)
    frames_of(latents, autoencoder, upstream=True, chunk_frames=5)
    frames_of(latents, autoencoder, chunk_frames=5, overlap_frames=2)
    assert autoencoder.asked == [(8, 0), (5, 2)]


def test_frames_are_the_same_on_another_thread_and_however_late_they_are_copied(rng):
    torch.manual_seed(0)
    autoencoder, rife, latents = SvdAutoencoder(TINY), Rife(16).eval(), torch.randn(10, 4, 4, 4, generator=rng)
    here = torch.cat(frames_of(latents, autoencoder, rife, chunk_frames=4, online=False))
    assert here.shape == (20, 8, 8, 3) and len(here.unique()) > 50
    for online in (True, False):
        assert torch.equal(torch.cat(frames_of(latents, autoencoder, rife, chunk_frames=4, online=online)), here)
        with delayed_streams():
            chunks = decode_clip(latents, autoencoder, rife, decode=DecodeConfig(chunk_frames=4, online=online), timer=StageTimer())
            late = torch.cat([pixels.clone() for pixels in chunks])
        assert torch.equal(late, here)


def test_frames_come_out_while_later_ones_are_still_latents():
    autoencoder, shown = LatentsAsFrames(), 0
    for pixels in decode_clip(torch.zeros(200, 4, 2, 2), autoencoder, Mean(), decode=DecodeConfig(queue=1), timer=StageTimer()):
        shown += len(pixels) // 2
        assert autoencoder.decoded - shown <= 8 * 5, "shown, waiting twice, in the making, and the neighbour of a frame"
    assert autoencoder.decoded == 200 and shown == 200


def test_memory_of_two_minutes_is_that_of_half_a_minute(tmp_path):
    """Peak memory of a process that decodes, doubles and writes 30 s, and after that 120 s, whose frames are 150 MB in bytes."""
    program = f"""
import resource, sys, torch
sys.path[:0] = {[str(folder) for folder in Path(__file__).parents[:2]]!r}
from test_decode_windows import LatentsAsFrames, Mean
from sonic.config import DecodeConfig
from sonic.data.video import VideoWriter
from sonic.inference.decode_windows import decode_clip
from sonic.inference.report import StageTimer
for seconds in (30, 120):
    latents = torch.zeros(1, 4, 128, 128).expand(int(12.5 * seconds), -1, -1, -1)
    with VideoWriter({str(tmp_path / "clip.mp4")!r}, 128, 128, num_frames=25 * seconds) as writer:
        for pixels in decode_clip(latents, LatentsAsFrames(), Mean(), decode=DecodeConfig(), timer=StageTimer()):
            writer.write(pixels.numpy())
    print(writer.frames, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    frames_short, short, frames_long, long = map(int, found)
    assert (frames_short, frames_long) == (750, 3000)
    assert long <= 1.05 * short
