"""The planner's estimate against the program on fake tensors, for models small enough to be built in a second."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from tiny import SIZE, conditions, latents_of, spans_of, tiny_model

from sonic.cli import Entry, compose
from sonic.config import SamplerConfig
from sonic.encoders.speech import SPEECH_ENCODERS
from sonic.encoders.text import TextEncoder
from sonic.families import FAMILIES
from sonic.inference.rollout import NoiseSource, Sampling, rollout
from sonic.parallel.context import DistributedContext
from sonic.parallel.mesh import World
from sonic.parallel.offload import load_before_use
from sonic.parallel.parallel_config import HardwareConfig, OffloadConfig, ParallelConfig, PlanConfig
from sonic.planner import extrapolate
from sonic.planner.memory import SPEECH_NUMBERS, TEXT_NUMBERS, memory_bytes, ring_bytes
from sonic.planner.plans import offloaded
from sonic.planner.search import search_plans
from sonic.planner.track import track
from sonic.planner.workload import Workload
from sonic.vae.motion_vae import WarpAutoencoder
from sonic.vae.svd_vae import SvdAutoencoder
from sonic.vae.wan_vae import WanAutoencoder

PLAN = Entry("plan", PlanConfig)
WIDE = (
    "model=live_avatar_14b",
    "video=704x384",
    "run.dtype=bfloat16",  # four blocks of the 14B's proportions, without its autoencoder
    "model.trunk.hidden_dim=2048",
    "model.trunk.ffn_dim=5632",
    "model.trunk.num_heads=16",
    "model.trunk.num_layers=4",
    "model.audio.inject_layers=[0,2]",
    "model.family=preview",
    "hardware.reserve_gib=0",
    "model.text.text_dim=512",
    "model.speech_encoder=logmel",
)

# umt5-xxl, as published beside Wan2.2-S2V
XXL = {
    "vocab_size": 256_384, "d_model": 4096, "d_kv": 64, "d_ff": 10_240, "num_layers": 24, "num_heads": 64,
    "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128, "feed_forward_proj": "gated-gelu",
}  # fmt: skip


def tracked_gib(found):
    """The peak of every rank of the chosen plan, on fake tensors."""
    return [max(rank.values()) for rank in track(found).ranks]


@pytest.mark.parametrize(
    "items",
    [
        ("hardware=1xh200", "parallel=single"),
        ("hardware=1xh200", "parallel=single", "run.dtype=float32"),
        ("hardware=1xh200", "parallel=single", "model.rollout.clip_frames=24"),
        ("hardware=2x24gb", "parallel=pipeline"),
        ("hardware=4x24gb", "parallel=pipeline", "parallel.layers=[2,1,1,0]"),
        ("hardware=4x24gb", "parallel=pipeline", "parallel.vae_rank=true"),
        ("hardware=2x24gb", "parallel=pipeline", "parallel.vae_rank=true"),
        ("hardware=2x24gb", "parallel=pipeline", "model.rollout.clip_frames=24"),
        ("hardware=1x24gb", "parallel=offload", "offload.kv=host", "offload.resident_gib=0"),
        ("hardware=1x24gb", "parallel=offload", "offload.resident_gib=0.25"),
        ("hardware=4x24gb", "parallel=fsdp", "parallel.prefetch=0"),
        ("hardware=4x24gb", "parallel=fsdp", "parallel.cpu_offload=true"),
        ("hardware=4x24gb", "parallel=fsdp", "parallel.prefetch=1", "parallel.unshard_unit=block"),
        ("hardware=4x24gb", "parallel=fsdp", "parallel.prefetch=2", "parallel.unshard_unit=linear"),
        ("hardware=2x24gb", "parallel=pipeline", "sampler.sample_guide_scale=4"),
        ("hardware=4x24gb", "parallel=context"),
        ("hardware=2x24gb", "parallel=context", "model.rollout.clip_frames=24"),
        ("hardware=4x24gb", "parallel=fsdp", "parallel.context=2"),
        ("hardware=4x24gb", "parallel=pipeline", "parallel.context=2"),
    ],
)
def test_the_estimate_of_a_video_equals_the_tracked_memory(items):
    found = search_plans(compose(PLAN, [*WIDE, *items]))
    assert found.chosen.peak_gib == pytest.approx(tracked_gib(found), rel=0.05)
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("items", "error"),
    [
        (("hardware=2x24gb", "parallel=pipeline", "parallel.vae_rank=true"), 0.01),  # the second rank has the decoder and nothing else
        (("hardware=1xh200", "parallel=single", "model.rollout.clip_frames=12"), 0.05),
    ],
)
def test_the_estimate_of_the_published_vae_equals_the_tracked_memory(items, error):
    small = ("model.family=wan", "video.size=256x256", "model.trunk.num_layers=2", "model.audio.inject_layers=[0]")
    found = search_plans(compose(PLAN, [*WIDE, *small, *items]))
    assert found.chosen.ranks[-1]["generate"]["vae"] > 0.6 * 2**30 * found.chosen.peak_gib[-1]
    assert found.chosen.peak_gib == pytest.approx(tracked_gib(found), rel=error)


def test_encoders_and_autoencoders_have_the_estimated_size():
    sizes = lambda makers: {name: sum(weight.numel() for weight in make().parameters()) for name, make in makers.items()}  # noqa: E731
    with torch.device("meta"):
        autoencoders = {"wan": WanAutoencoder, "preview": WarpAutoencoder, "sonic_svd": SvdAutoencoder}
        assert sizes(autoencoders) == {name: entry.parameters for name, entry in FAMILIES.items()}
        assert sizes(SPEECH_ENCODERS) == SPEECH_NUMBERS
        assert sizes({XXL["d_model"]: lambda: TextEncoder(XXL)}) == TEXT_NUMBERS


def test_a_plan_that_cannot_be_tracked_is_reported_as_an_estimate_only():
    found = search_plans(compose(PLAN, [*WIDE, "hardware=4x24gb", "parallel=zero3"]))
    assert not track(found).ranks
    assert "predicted only" in track(found).reason


@pytest.mark.parametrize(
    "items",
    [
        (
            "hardware=1xh200",
            "parallel=single",
            "model.trunk.num_layers=8",
            "model.audio.inject_layers=[0,3,6]",
            "model.rollout.clip_frames=24",
        ),
        ("hardware=2x24gb", "parallel=pipeline", "model.trunk.num_layers=15", "model.audio.inject_layers=[0,4,8,9,11]"),
    ],
)
def test_the_memory_of_all_layers_is_extrapolated_from_few(items, monkeypatch):
    found = search_plans(compose(PLAN, [*WIDE, *items]))
    tracked = tracked_gib(found)
    monkeypatch.setattr(extrapolate, "MORE", 100)
    assert tracked == pytest.approx(tracked_gib(found), rel=0.005)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_slots_for_rings_in_host_memory_are_as_large_as_predicted_to_the_byte(scale):
    model, caches = tiny_model().requires_grad_(False), []
    parallel, world = ParallelConfig("offload", offload=OffloadConfig(kv="host", inflight=1)), World("offload", torch.device("cpu"))
    context = DistributedContext(world, parallel, load_before_use(model, world, parallel))
    make = model.new_cache
    model.new_cache = lambda *tracked, **settings: caches.append(make(*tracked, **settings)) or caches[-1]
    settings = SamplerConfig(name="euler", schedule="linear", sample_steps=2, sample_guide_scale=scale)
    blocks = rollout(model, conditions(4), spans_of(2), sampling=Sampling(settings, NoiseSource(torch.Generator())), context=context)
    next(blocks)
    work = Workload(model.config, 8 * SIZE[1], 8 * SIZE[0], steps=2, guided=scale != 1, dtype_bytes=4)
    items = offloaded(work, HardwareConfig(), parallel).ranks[0]["generate"]
    assert sum(slot.nbytes for slot in context.execution.windows.slots) == items["kv_rings"]
    prompts = [part for cache in caches for pair in cache.text.values() for part in pair]
    assert sum(part.nbytes for part in prompts) == items["memory_tokens"]


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_caches_of_a_video_are_as_large_as_predicted_to_the_byte(steps, scale):
    model, caches = tiny_model(), []
    make = model.new_cache
    model.new_cache = lambda *tracked, **settings: caches.append(make(*tracked, **settings)) or caches[-1]
    latents_of(model, conditions(2), 1, sample_steps=steps, sample_guide_scale=scale)
    buffers = [each for cache in caches for ring in cache.rings for each in (*ring.keys.values(), *ring.values.values())]
    kept = [each for cache in caches for each in (*cache.ref_keys.values(), *(part for pair in cache.text.values() for part in pair))]
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in (*buffers, *kept)}
    work = Workload(model.config, 8 * SIZE[1], 8 * SIZE[0], steps=steps, guided=scale != 1, dtype_bytes=4)
    assert sum(storages.values()) == model.config.trunk.num_layers * (ring_bytes(work) + memory_bytes(work))
