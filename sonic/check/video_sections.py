"""Sections of the device check about videos: the transformer alone, with weights in host memory, and with the VAE."""

from __future__ import annotations

import time
from contextlib import nullcontext
from itertools import islice

import torch
from torch import Tensor

from sonic.bench.plan_check import hand_overs, product_tflops
from sonic.check.figures import Figures
from sonic.check.kernel_sections import NO_GPU
from sonic.check.measure import Clock, SlowCopies, count_waits, differing, kernels_of, peak_over_plan
from sonic.check.random_video import blocks_of, opened, random_model, release
from sonic.check.shapes import Case
from sonic.checkpoint.load import without_memory
from sonic.inference.report import StageTimer
from sonic.model.dit import AvatarDiT
from sonic.parallel.context import DistributedContext
from sonic.parallel.mesh import World
from sonic.parallel.parallel_config import OffloadConfig, ParallelConfig
from sonic.parallel.parallelize import parallelizer_of
from sonic.planner.memory import layer_bytes
from sonic.planner.step_time import GIGA, TERA

WARM, TIMED = 5, 3  # blocks until all rings are full, and blocks that are timed
OFFLOADED, BLOCKS = 6, 3  # layers and blocks of the video with weights in host memory
SINGLE = ParallelConfig("single")
WAYS = (  # of offloading: slots, forwards in flight, where the KV rings are
    (1, 1, "device"),
    (2, 1, "device"),
    (3, 4, "device"),
    (2, 1, "host"),
)


def single(case: Case, figures: Figures) -> None:
    """The transformer alone on one device: its speed, what it waits for, its memory, and whether it repeats itself."""
    with opened(case, case.video(SINGLE)) as found:
        components, work, device = found.components, case.work(), case.device
        count, sampler = WARM + TIMED + 2, case.bench.sampler
        blocks, again = (blocks_of(components.model, components.context, work, count=count, sampler=sampler) for _ in range(2))
        latents = [next(blocks).latents for _ in range(WARM)]
        if case.on_gpu:
            with count_waits() as waits:
                latents.append(next(blocks).latents)
            figures.add("syncs", waits.total())
            figures.add("syncs_at", ", ".join(f"{line} x{count}" for line, count in waits.items()) or "nowhere")
        clock, forwards = Clock(device), TIMED * work.steps * work.passes
        latents += [block.latents for block in islice(blocks, TIMED)]
        issued, seconds = (time.perf_counter() - clock.begun) / forwards, clock.seconds() / forwards
        figures.add("forward", 1000 * seconds, "ms")
        rate, product = work.forward_flops / seconds / TERA, product_tflops(work, device)
        figures.add("rate", rate, "TFLOP/s")
        figures.add("product", product, "TFLOP/s")
        figures.add("share_of_product", rate / product)
        if case.on_gpu:
            figures.add("host_of_forward", 1000 * issued, "ms until the host has queued it")
            busy = kernels_of(lambda: next(blocks)).total() / (work.steps * work.passes)
            if busy:
                figures.add("busy_share", busy / seconds)
            else:
                figures.skip("the profiler sees no kernels", "busy_share")
            figures.add("peak_over_plan", peak_over_plan(found.estimate, device, "vae"))
        else:
            figures.skip(NO_GPU, "syncs", "host_of_forward", "busy_share", "peak_over_plan")
        figures.add("differing_latents", differing(latents, [block.latents for block in islice(again, len(latents))]))


@torch.no_grad()
def offload(case: Case, figures: Figures) -> None:
    """All layers in host memory: the same video with any number of slots, also when every copy comes late; and the rate of copies."""
    work = case.work(OFFLOADED)
    like = random_model(work, case.device, case.dtype)
    alone = DistributedContext(World("single", case.device))
    true, _ = _latents(case, like, alone)
    for slots, inflight, kv in WAYS:
        config = ParallelConfig("offload", offload=OffloadConfig(resident_gib=0.0, slots=slots, inflight=inflight, kv=kv))
        model, context = _offloaded(like, case, config)
        latents, seconds = _latents(case, model, context)
        figures.add(f"seconds_{slots}_slots_{inflight}_in_flight_kv_{kv}", seconds, "s")
        if slots == 2 and kv == "device":
            moved = layer_bytes(work, range(work.model.trunk.num_layers)) * BLOCKS * work.steps * work.passes
            rate = moved / seconds / GIGA
        with SlowCopies() if case.on_gpu else nullcontext():
            late, _ = _latents(case, model, context)
        differs = differing(true, latents) + differing(true, late)
        figures.add("differing_latents", differs, f"with {slots} slots, {inflight} in flight, keys and values on the {kv}")
        del model, context
        release(case)
    if case.on_gpu:
        figures.add("weights_rate", rate, "GB/s")
    else:
        figures.skip(NO_GPU, "weights_rate", "late_copies")


def _latents(case: Case, model: AvatarDiT, context: DistributedContext) -> tuple[list[Tensor], float]:
    """The latents of a short video in host memory, and its seconds."""
    clock = Clock(case.device)
    blocks = blocks_of(model, context, case.work(OFFLOADED), count=BLOCKS, sampler=case.bench.sampler)
    found = [block.latents for block in blocks]
    return [latents.cpu() for latents in found], clock.seconds()


def _offloaded(like: AvatarDiT, case: Case, config: ParallelConfig) -> tuple[AvatarDiT, DistributedContext]:
    """A model with the weights of another one under a plan on one device."""
    world, plan = World(config.name, case.device), parallelizer_of(config.name)
    model = without_memory(like.config).to(case.dtype).eval().requires_grad_(False)
    plan.allocate(model, world, config)
    for here, there in zip(model.parameters(), like.parameters(), strict=True):
        here.copy_(there)
    return model, DistributedContext(world, config, plan.start(model, world, config))


def video(case: Case, figures: Figures) -> None:
    """Transformer and VAE together, from encoded inputs to frames in host memory."""
    for steps, name in ((4, ""), (3, "_3_steps")):
        config, work, family = case.video(SINGLE, steps=steps), case.work(), case.family(decodes=True)
        with opened(case, config, decodes=True) as found:
            begun, timer = time.perf_counter(), StageTimer()
            count = WARM + TIMED if case.on_gpu else 2
            ends = hand_overs(family, found.components, config, num_frames=work.frames * count, timer=timer)
            figures.add(f"first_frames{name}", ends[0] - begun, "s after the inputs were encoded")
            timed = ends[-TIMED - 1 :]
            figures.add(f"frames_per_second{name}", work.frames * (len(timed) - 1) / (timed[-1] - timed[0]), "frames/s")
            for stage in ("denoise", "decode"):
                figures.add(f"{stage}{name}", 1000 * timer.seconds[stage] / count, "ms a block")
            if case.on_gpu and not name:
                figures.add("peak_over_plan", peak_over_plan(found.estimate, case.device))
    if not case.on_gpu:
        figures.skip(NO_GPU, "peak_over_plan")
