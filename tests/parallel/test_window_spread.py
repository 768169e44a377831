"""Windows of a clip that ranks denoise together give the bits of one rank, under every plan of a UNet."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from run_files import save_weights
from torch import Tensor

from sonic.cli import Entry, compose
from sonic.config import UNetConfig
from sonic.families import FAMILIES
from sonic.inference.denoise_windows import ClipConditions, WindowSampling, denoise_clip
from sonic.inference.distributed_rollout import shutdown
from sonic.inference.distributed_windows import ClipRequest, distributed_denoise, serve_clips
from sonic.inference.infer_config import InferConfig
from sonic.model.svd_unet import SvdUNet
from sonic.parallel.context import DistributedContext, context_of
from sonic.parallel.mesh import World, make_world
from sonic.parallel.parallel_config import PLANS, OffloadConfig, ParallelConfig
from sonic.parallel.parallelize_unet import RankSpread, build_parallel_unet, units_of
from sonic.sampling.windows import windows_of

CPU = torch.device("cpu")
TINY = UNetConfig([32, 64], [2, 4], layers_per_block=1, cross_attention_dim=16, addition_time_embed_dim=8, audio_tokens=3)
SAMPLING = WindowSampling(steps=2, windows=TINY)
LENGTHS = (10, 25, 26, 60, 83)  # frames; a window has 25


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("unet") / "unet.safetensors"
    save_weights(SvdUNet(TINY), path)
    return path


def request_of(frames: int) -> ClipRequest:
    rng = torch.Generator().manual_seed(frames)
    draw = lambda *shape: torch.randn(*shape, generator=rng)  # noqa: E731
    given = ClipConditions(
        image_latents=draw(4, 4, 4),
        tokens=draw(frames, 3, 16),
        silence=draw(3, 16),
        buckets=20 + draw(frames, 2),
        image_embed=draw(16),
        face_mask=torch.rand(1, 1, 32, 32, generator=rng),
    )
    return ClipRequest(given, draw(frames, 4, 4, 4), SAMPLING)


def alone(weights: Path, frames: int) -> Tensor:
    request = request_of(frames)
    unet = build_parallel_unet(TINY, weights, DistributedContext(World()), dtype=torch.float32)
    return denoise_clip(unet, request.conditions, request.noise, sampling=SAMPLING)


def clips(parallel: ParallelConfig, weights: Path, lengths: tuple[int, ...]) -> list[Tensor]:
    """The clips that the first rank makes while the others serve it."""
    context = context_of(make_world(parallel, parallel.name, CPU), parallel)
    unet = build_parallel_unet(TINY, weights, context, dtype=torch.float32)
    assert [name for name, _ in unet.named_parameters()] == [name for name, _ in SvdUNet(TINY).named_parameters()]
    if not context.world.leads:
        serve_clips(unet, context)
        return []
    made = [distributed_denoise(unet, request_of(frames), context) for frames in lengths]
    shutdown(context)
    return made


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [
        (2, ParallelConfig("windows")),
        (4, ParallelConfig("windows")),
        (2, ParallelConfig("windows", cpu_offload=True)),
        (2, ParallelConfig("fsdp")),
        (4, ParallelConfig("fsdp", unshard_unit="block", prefetch=2)),
        (2, ParallelConfig("fsdp", cpu_offload=True, reshard=False, prefetch=0)),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else f"{value.name} {value.unshard_unit} {value.cpu_offload}",
)
def test_ranks_that_share_the_windows_make_the_clip_of_one_rank(ranks, parallel, weights):
    made, *others = on_ranks(ranks, clips, parallel, weights, LENGTHS)
    assert others == [[]] * (ranks - 1)
    for frames, latents in zip(LENGTHS, made, strict=True):
        assert torch.equal(latents, alone(weights, frames)), f"{frames} frames"


def stopped(parallel: ParallelConfig, weights: Path) -> list[Tensor]:
    """The clip that the first rank makes after its caller has stopped one at the first step."""
    context = context_of(make_world(parallel, parallel.name, CPU), parallel)
    unet = build_parallel_unet(TINY, weights, context, dtype=torch.float32)
    if not context.world.leads:
        serve_clips(unet, context)
        return []
    steps = []

    def stop(step: int, timestep: float, latents: Tensor) -> None:
        steps.append(step)
        if len(steps) == 1:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        distributed_denoise(unet, request_of(60), context, on_step=stop)
    made = distributed_denoise(unet, request_of(26), context, on_step=stop)
    shutdown(context)
    assert steps == [0, 0, 1]
    return [made]


@pytest.mark.parametrize("name", ["windows", "fsdp"])
def test_a_clip_that_its_caller_stops_leaves_the_ranks_ready_for_the_next(name, weights):
    (made,), _ = on_ranks(2, stopped, ParallelConfig(name), weights, timeout_s=60)
    assert torch.equal(made, alone(weights, 26))


@pytest.mark.parametrize("store", ["pinned", "mmap"])
def test_offloading_makes_the_clip_of_one_device(store, weights):
    parallel = ParallelConfig("offload", offload=OffloadConfig(store=store, resident_gib=0.0))
    (made,) = clips_alone(parallel, weights)
    assert torch.equal(made, alone(weights, 26))


def clips_alone(parallel: ParallelConfig, weights: Path) -> list[Tensor]:
    context = DistributedContext(World(parallel.name), parallel)
    return [distributed_denoise(build_parallel_unet(TINY, weights, context, dtype=torch.float32), request_of(26), context)]


class Positions(RankSpread):
    """A spread without ranks around it."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("frames", [10, 26, 60, 83, 200])
def test_every_window_is_evaluated_and_all_ranks_make_equally_many_calls(ranks, frames):
    windows = len(windows_of(frames, 0, TINY))
    shares = [Positions(rank, ranks).mine(windows) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1 and len(shares[0]) == -(-windows // ranks)
    assert {window for share in shares for window in share} == set(range(windows))


def test_units_hold_nearly_all_weights_once_and_in_the_order_of_a_forward():
    unet, order = SvdUNet(TINY).eval(), []
    for kind in ("block", "sublayer"):
        units = units_of(unet, kind)
        weights = [weight for unit in units for weight in unit.parameters()]
        assert len(weights) == len(set(weights))
        outside = {name.split(".")[0] for name, weight in unet.named_parameters() if weight not in set(weights)}
        assert outside <= {"conv_in", "conv_out", "conv_norm_out", "time_embedding", "add_embedding"}
        hooks = [unit.register_forward_pre_hook(lambda module, args: order.append(module)) for unit in units]
        request, order[:] = request_of(25), []
        denoise_clip(unet, request.conditions, request.noise, sampling=WindowSampling(steps=1, windows=TINY))
        assert order == units
        for hook in hooks:
            hook.remove()
    with pytest.raises(ValueError, match="unshard_unit=linear: a UNet is gathered by block or sublayer"):
        units_of(unet, "linear")


@pytest.mark.parametrize(
    ("items", "sentence"),
    [
        (["model=sonic_svd", "parallel=pipeline"], "parallel=pipeline does not divide model=sonic_svd; use parallel=auto, single"),
        (["model=sonic_svd", "parallel=zero3"], "parallel=zero3 does not divide model=sonic_svd"),
        (
            ["model=sonic_svd", "parallel=fsdp", "parallel.context=2"],
            "parallel.context=2: model=sonic_svd has no tokens",
        ),
        (["model=wan_s2v_14b", "parallel=windows"], "parallel=windows does not divide model=wan_s2v_14b; use parallel=auto, single"),
    ],
)
def test_a_plan_of_another_family_is_refused(items, sentence):
    with pytest.raises(ValueError, match=sentence):
        compose(Entry("infer", InferConfig), items)


def test_every_plan_is_one_of_a_family():
    assert {name for entry in FAMILIES.values() for name in entry.plans} == set(PLANS)
