"""Plans of videos that a UNet denoises in windows: bytes by formula against the dry run, times, and what would make a video fit."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from sonic.cli import Entry, compose
from sonic.commands.plan_command import ENTRY
from sonic.config import Ranks, UNetConfig
from sonic.encoders.clip_image import ClipImageEncoder
from sonic.families import FAMILIES
from sonic.inference.choose_plan import choose_plan
from sonic.inference.infer_config import InferConfig
from sonic.model.unet_counts import unet_weights
from sonic.planner.memory import GIB
from sonic.planner.search import as_json, search_plans
from sonic.planner.track import track
from sonic.planner.window_workload import (
    IMAGE_ENCODER,
    RIFE_NUMBERS,
    clip_bytes,
    end_bytes,
    sublayer_bytes,
    unet_bytes,
    unit_bytes,
    window_workload,
)  # fmt: skip
from sonic.vae.rife import Rife
from sonic.vae.svd_vae import SvdAutoencoder

SONIC = ("model=sonic_svd", "hardware.reserve_gib=0")
SMALL = (  # the proportions of the published UNet with fewer levels, which runs on fake tensors in two seconds
    "model.unet.block_out_channels=[320,640,640]",
    "model.unet.num_attention_heads=[5,10,10]",
    "model.unet.layers_per_block=1",
)


def planned(*items):
    return search_plans(compose(ENTRY, [*SONIC, *items]))


@pytest.mark.parametrize(
    "items",
    [
        ("hardware=1x24gb", "parallel=single", "video.size=512x512"),
        ("hardware=1x24gb", "parallel=single", "video.size=384x512", "sampler.audio_guide_scale=1", "sampler.sample_guide_scale=1"),
        ("hardware=1x24gb", "parallel=single", "video.size=256x256", "run.dtype=float32", "video.interpolate=none"),
        ("hardware=4x24gb", "parallel=windows", "video.size=512x512", "video.duration=25", "decode.overlap_frames=0"),
        ("hardware=4x24gb", "parallel=fsdp", "video.size=256x256", "parallel.unshard_unit=block"),
        ("hardware=4x24gb", "parallel=fsdp", "video.size=256x256", "parallel.cpu_offload=true"),
        ("hardware=1x24gb", "parallel=offload", "video.size=512x512", "offload.resident_gib=0.2"),
        ("hardware=4x24gb", "parallel=windows", "parallel.cpu_offload=true", "video.size=512x512", "offload.resident_gib=0.2"),
    ],
)
def test_each_phase_of_the_estimate_equals_the_tracked_memory(items):
    found = planned(*SMALL, *items)
    tracked = track(found).ranks
    assert len(tracked) == len(found.chosen.ranks)
    for rank, measured in ((0, tracked[0]), (-1, tracked[-1])):
        phases = {phase: sum(items.values()) / GIB for phase, items in found.chosen.ranks[rank].items()}
        assert phases == pytest.approx(measured, rel=0.05)
    assert not dist.is_initialized()


def test_numbers_of_weights_are_those_of_the_networks():
    with torch.device("meta"):
        networks = ClipImageEncoder(), SvdAutoencoder(), Rife()
    counted = [sum(weight.numel() for weight in network.parameters()) for network in networks]
    assert counted == [IMAGE_ENCODER, FAMILIES["sonic_svd"].parameters, RIFE_NUMBERS]
    assert unet_weights(UNetConfig()) == 1_575_741_162
    work = planned("hardware=1x24gb").work
    for unit in ("block", "sublayer"):
        assert end_bytes(work) + sum(size for _, size in unit_bytes(work, unit)) == unet_bytes(work) == 2 * 1_575_741_162
    assert len(list(sublayer_bytes(work))) > len(unit_bytes(work, "block"))


def test_a_longer_recording_needs_more_memory_for_latents_and_tokens_alone():
    short, long = (planned("hardware=1x24gb", "video.size=512x512", "parallel=single", f"video.duration={length}") for length in (30, 120))
    sizes = [sum(clip_bytes(found.work).values()) / GIB for found in (short, long)]
    assert long.chosen.peak_gib[0] - sizes[1] == pytest.approx(short.chosen.peak_gib[0] - sizes[0], rel=0.05)
    assert sizes[1] == pytest.approx(4 * sizes[0], rel=0.02)
    assert long.chosen.seconds.compute == pytest.approx(4 * short.chosen.seconds.compute)


def test_ranks_divide_the_windows_and_the_first_one_decodes():
    alone = planned("hardware=1x24gb", "video.size=512x512", "parallel=single").chosen
    four = planned("hardware=4x24gb", "video.size=512x512", "parallel=windows").chosen
    assert four.seconds.compute == pytest.approx(alone.seconds.compute * 2 / 5)  # five windows, two turns
    assert four.seconds.vae == alone.seconds.vae and four.seconds.activations > 0
    assert "decode" in four.ranks[0] and "decode" not in four.ranks[1]
    assert alone.frames == 250 and alone.seconds.first < alone.seconds.total


@pytest.mark.parametrize(("picture", "sound", "rows"), [(2, 7.5, 3), (2, 2, 2), (1, 7.5, 2), (1, 1, 1), (0, 0, 1)])
def test_rows_of_guidance_without_weight_are_not_planned(picture, sound, rows):
    scales = f"sampler.sample_guide_scale={picture}", f"sampler.audio_guide_scale={sound}"
    assert window_workload(compose(ENTRY, [*SONIC, *scales])).rows == rows


@pytest.mark.parametrize("hardware", ["1x24gb", "4x24gb"])
def test_proposed_changes_make_a_video_fit(hardware):
    asked = ("video.size=1024x1024", f"hardware={hardware}")
    found = search_plans(compose(ENTRY, ["model=sonic_svd", *asked]))
    assert not found.fits and "decode phase" in as_json(found)["plans"][0]["reason"]
    assert len(found.changes) == 3
    for change in found.changes:  # a short side is that of the photograph, which a plan does not know
        options = [option.replace("min_resolution=832", "size=832x832") for option in change.options]
        assert search_plans(compose(ENTRY, ["model=sonic_svd", *asked, *options])).fits, change.sentence


@pytest.mark.parametrize(
    ("items", "sentence"),
    [
        (("hardware=1x24gb", "parallel=windows"), "one; use single or offload"),
        (("hardware=1x24gb", "parallel=fsdp"), "one; use single or offload"),
        (("hardware=1x24gb", "parallel=offload", "offload.kv=host"), "leave offload.kv at device"),
        (("hardware=4x24gb", "parallel=fsdp", "parallel.unshard_unit=linear"), "by block or sublayer"),
    ],
)
def test_plans_that_cannot_run_are_refused_with_the_way_out(items, sentence):
    with pytest.raises(ValueError, match=sentence):
        planned(*items)


def test_all_plans_have_a_command_that_makes_the_planned_size():
    found = replace(planned("hardware=4x24gb", "video.size=512x512"), asked=("model=sonic_svd", "video.size=512x512"))
    written = json.loads(json.dumps(as_json(found)))
    assert {plan["plan"] for plan in written["plans"]} >= {"single", "windows", "fsdp", "offload", "fsdp+cpu_offload"}
    assert all("video.min_resolution=512" in plan["command"] for plan in written["plans"])
    assert written["chosen"]["seconds_per_video"] > 0 and "nproc-per-node=4" in written["chosen"]["command"]


class Unread:
    """A family whose checkpoint is not read."""

    def settled_model(self, config):
        return config


def test_a_video_is_planned_for_the_length_of_its_recording_and_refused_where_it_does_not_fit():
    def chosen(*items):
        config = compose(Entry("infer", InferConfig), ["model=sonic_svd", "hardware=1x24gb", "video.interpolate=none", *items])
        return choose_plan(config, Ranks(), torch.device("cpu"), family=Unread(), size=(1024, 1024))

    with pytest.raises(ValueError, match=r"would fit: .*decode\.chunk_frames=4"):
        chosen()
    found = chosen("decode.chunk_frames=2", "decode.overlap_frames=1", "sampler.audio_guide_scale=2")
    assert found.plan.frames == int(found.seconds * 25) // 2 and 1 < found.seconds < 60
