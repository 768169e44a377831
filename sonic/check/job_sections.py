"""Sections of the device check about whole jobs: videos, a training, ranks of which one is lost, and a lack of memory."""

from __future__ import annotations

import math
import multiprocessing
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import islice, repeat
from multiprocessing.synchronize import Event

import torch
import torch.distributed as dist
from torch import Tensor

from sonic.bench.plan_check import hand_overs, product_tflops
from sonic.check.case import VIDEO, CheckCase, random_conditions
from sonic.check.figures import Figures
from sonic.check.measure import best_seconds, count_waits, differing, error_of, kernel_seconds, late_copies, peak_over_plan, seconds_of
from sonic.checkpoint.load import fill_randomly, without_memory
from sonic.config import OtherRank, Ranks
from sonic.geometry import GIB
from sonic.inference.report import StageTimer
from sonic.inference.rollout import seeded
from sonic.model.compile import COMPILE_TIME, compiled_regions, missing_compiler
from sonic.model.dit import AvatarDiT
from sonic.model.embed import grid_positions, rotate_both, rotation
from sonic.parallel.context import DistributedContext
from sonic.parallel.mesh import World
from sonic.parallel.parallel_config import OffloadConfig, ParallelConfig
from sonic.parallel.parallelize import parallelizer_of
from sonic.planner.hardware import machine_here
from sonic.planner.memory import layer_bytes
from sonic.planner.step_time import GIGA, TERA
from sonic.planner.workload import Workload
from sonic.system.program import command_words
from sonic.training.engine import trainable, whole
from sonic.training.fsdp_engine import ShardedEngine
from sonic.training.initial_weights import init_adapters
from sonic.training.log import RunLog
from sonic.training.loop import TrainingRun
from sonic.training.loop import train as run_training
from sonic.training.objectives import OBJECTIVES
from sonic.training.plan_training import plan_training, training
from sonic.training.world import join_world
from sonic.types import LatentBlock

SINGLE = ParallelConfig("single")
WARM, TIMED = 5, 3  # blocks until all KV rings are full, and blocks that are timed
LAYERS, BLOCKS = 6, 3  # of videos that are compared with each other
OFFLOADING = (  # GiB of resident weights, slots of the others, forwards in flight, where the KV rings are
    *(OffloadConfig(resident_gib=0.0, slots=slots, inflight=inflight) for slots, inflight in ((2, 1), (1, 1), (3, 4))),
    OffloadConfig(resident_gib=100.0, inflight=1, kv="host"),
)
VIDEOS = 1000  # that two ranks make until one of them, VICTIM, is killed
VICTIM, PATIENCE_S, END_S, LOOK_S = 1, 10.0, 40.0, 0.1
CPU_GIB = 16  # address space of a CPU process in which the 14B does not fit, but Python and torch do


@torch.no_grad()
def single(case: CheckCase, figures: Figures) -> None:
    """The transformer alone on one device: its speed, what it waits for, its memory, whether it repeats itself, and compiled."""
    with case.opened(case.video(SINGLE)) as (found, _):
        work, device, model = case.work(), case.device, found.components.model
        start = partial(case.blocks, model, found.components.context, count=WARM + TIMED + 2)
        blocks = start()
        latents = [block.latents for block in islice(blocks, WARM)]
        if case.on_gpu:
            with count_waits() as waits:
                latents.append(next(blocks).latents)
            figures.add("syncs", waits.total(), ", ".join(f"{count} at {line}" for line, count in waits.items()))
        seconds, queued = seconds_of(lambda: latents.extend(block.latents for block in islice(blocks, TIMED)), device)
        forward, product = seconds / TIMED / (work.steps * work.passes), product_tflops(work, device)
        figures.add("forward", 1000 * forward, f"ms, of which the host needs {100 * queued / seconds:.0f} % to queue it")
        figures.add("share_of_product", work.forward_flops / forward / TERA / product, f"of {product:.4g} TFLOP/s")
        if case.on_gpu:
            busy = kernel_seconds(lambda: latents.append(next(blocks).latents))
            figures.add("busy_share", busy * TIMED / seconds) if busy else figures.skip("busy_share", "the profiler sees no kernels")
            figures.add("peak_over_plan", peak_over_plan(found.estimate, device, "vae"))
        latents.extend(block.latents for block in blocks)  # to the end, where its KV rings are freed
        figures.add("differing_latents", differing(latents, [block.latents for block in start()]))
        if case.on_gpu:
            figures.add("rotate_share", _rotation_seconds(work, case) / forward)
            if fault := missing_compiler(device):
                for name in ("compiled_error", "recompilations"):
                    figures.skip(name, fault)
            else:
                with compiled_regions(True):
                    figures.add("rotate_compiled", 1000 * _rotation_seconds(work, case), "ms of a forward")
                model.compiled = True
                _compiled(start(), latents[0], case, figures=figures)


def _compiled(blocks: Iterator[LatentBlock], plain: Tensor, case: CheckCase, *, figures: Figures) -> None:
    """The same video by the compiled transformer."""
    figures.add("compiled_error", error_of(next(blocks).latents, plain))
    next(blocks)
    pieces = COMPILE_TIME.number
    figures.add("compile", COMPILE_TIME.seconds, f"s for {pieces} pieces of the transformer")
    for _ in range(WARM - 2):
        next(blocks)
    seconds, _ = seconds_of(lambda: list(islice(blocks, TIMED)), case.device)
    figures.add("forward_compiled", 1000 * seconds / TIMED / (case.work().steps * case.work().passes), "ms")
    figures.add("recompilations", COMPILE_TIME.number - pieces, "after the second block")


def _rotation_seconds(work: Workload, case: CheckCase) -> float:
    """Seconds in which queries and keys of a block are rotated in all layers."""
    trunk, device = work.model.trunk, case.device
    rows = torch.randn(1, work.query_tokens, trunk.num_heads, trunk.hidden_dim // trunk.num_heads, device=device, dtype=case.dtype)
    times = torch.arange(work.latent_frames, dtype=torch.float64, device=device)
    turns = rotation(grid_positions(times, *work.grid), rows.shape[-1])
    return trunk.num_layers * best_seconds(partial(rotate_both, rows, rows, turns), device)


@torch.no_grad()
def offload(case: CheckCase, figures: Figures) -> None:
    """Layers or KV rings in host memory: the same video in every way, also when every copy comes late; and the rate of the copies."""
    work, like = case.work(LAYERS), case.model(LAYERS, case.dtype)
    true, _ = _latents(case, like, DistributedContext(World("single", case.device)))
    forwards = work.steps * work.passes
    weights = BLOCKS * forwards * layer_bytes(work, range(work.model.trunk.num_layers))
    tokens = sum(work.memory + min((index + 1) * work.query_tokens, work.window) for index in range(BLOCKS))  # a block's come back
    rings = tokens * forwards * 2 * work.token_bytes * work.model.trunk.num_layers
    for options in OFFLOADING:
        way = f"with {options.slots} slots, {options.inflight} in flight, keys and values on the {options.kv}"
        model, context = _offloaded(like, case, ParallelConfig("offload", offload=options))
        found, seconds = _latents(case, model, context)
        figures.add("video", seconds, f"s {way}")
        figures.add("differing_latents", differing(true, found), way)
        if case.on_gpu:
            if options is OFFLOADING[0]:  # which waits for copies more than it computes
                figures.add("weights_rate", weights / seconds / GIGA, "GB/s")
            if options.kv == "host":
                figures.add("rings_rate", rings / seconds / GIGA, "GB/s")
            with late_copies():
                figures.add("late_copies", differing(true, _latents(case, model, context)[0]), f"latents that differ {way}")
        del model, context
        case.release()


def _latents(case: CheckCase, model: AvatarDiT, context: DistributedContext) -> tuple[list[Tensor], float]:
    """The latents of a short video in host memory, and its seconds."""
    found: list[Tensor] = []
    seconds, _ = seconds_of(lambda: found.extend(block.latents for block in case.blocks(model, context, count=BLOCKS)), case.device)
    return [latents.cpu() for latents in found], seconds


def _offloaded(like: AvatarDiT, case: CheckCase, config: ParallelConfig) -> tuple[AvatarDiT, DistributedContext]:
    """A model with the weights of another one under a plan on one device."""
    world, plan = World(config.name, case.device), parallelizer_of(config.name)
    model = without_memory(like.config).to(case.dtype).eval().requires_grad_(False)
    plan.allocate(model, world, config)
    for here, there in zip(model.parameters(), like.parameters(), strict=True):
        here.copy_(there)
    return model, DistributedContext(world, config, plan.start(model, world, config))


def video(case: CheckCase, figures: Figures) -> None:
    """Transformer and VAE together, from encoded inputs to frames in host memory, in four steps and in three."""
    for steps in (4, 3):
        config, frames, count = case.video(SINGLE, steps=steps), case.work().frames, WARM + TIMED if case.on_gpu else 2
        with case.opened(config, decodes=True) as (found, family):
            timer = StageTimer()
            ends = hand_overs(family, found.components, config, num_frames=frames * count, timer=timer)[-TIMED - 1 :]
            figures.add(f"frames_per_second_{steps}_steps", frames * (len(ends) - 1) / (ends[-1] - ends[0]), "frames/s")
            stages = ", ".join(f"{name} {1000 * timer.seconds[name] / count:.1f}" for name in ("denoise", "decode"))
            figures.add(f"block_{steps}_steps", 1000 * (ends[-1] - timer.start) / count, f"ms with encoding and warming up; {stages}")
            if case.on_gpu and steps == 4:
                figures.add("peak_over_plan", peak_over_plan(found.estimate, case.device))


def train(case: CheckCase, figures: Figures) -> None:
    """Turns of critic and student of a distillation with adapters on a frozen base, on one rank under fsdp."""
    config, folder, work = case.training, case.folder / "train", training(case.training)
    dist.init_process_group("cpu:gloo,cuda:nccl" if case.on_gpu else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    objective = OBJECTIVES[config.objective.name](config, make=without_memory)
    engine = ShardedEngine(config, join_world(case.device), folder)
    engine.allocate(objective)
    for model in objective.pretrained:
        fill_randomly(model)
    init_adapters(objective.roles.values(), seeded(config.seed))
    given = random_conditions(work, 1)
    latents = torch.randn(1, given.ref.shape[1], config.data.window, *given.ref.shape[3:], generator=seeded(1))
    batch = {"latents": latents, "ref": given.ref, "audio": given.audio, "text": given.text}
    log = RunLog(folder, replace(config.log, bar=False), name=config.name)
    found = run_training(TrainingRun(config, objective, engine, lambda start: repeat(batch), log, folder)).figures
    figures.add("step", found["perf/seconds_per_step"], "s for a turn of the critic and one of the student")
    norms = [value for name, value in found.items() if name.endswith("grad_norm")]
    figures.add("gradients_not_finite", sum(not math.isfinite(norm) for norm in norms), f"of {len(norms)}")
    if case.on_gpu:
        planned = plan_training(replace(config, hardware=machine_here(config.hardware))).chosen
        figures.add("peak_over_plan", torch.cuda.max_memory_reserved(case.device) / GIB / max(planned.peak_gib))
    learning = [weight.detach() for role in engine.roles.values() for weight in trainable(role).values()]
    kept = [whole(weight).clone() for weight in learning]
    for weight in learning:
        weight.zero_()
    engine.load()
    figures.add("differing_in_checkpoint", differing(kept, [whole(weight) for weight in learning]), f"numbers of {len(kept)} tensors")
    dist.destroy_process_group()


def ranks(case: CheckCase, figures: Figures) -> None:
    """fsdp on one rank against a single device; and two ranks of a pipeline on this device, of which one is killed."""
    found = []
    for name in ("single", "fsdp"):
        with case.opened(case.video(ParallelConfig(name), LAYERS)) as (each, _):
            found.append([block.latents.cpu() for block in case.blocks(each.components.model, each.components.context, count=BLOCKS)])
    figures.add("differing_latents", differing(*found))
    context = multiprocessing.get_context("forkserver")  # its server belongs to the section and ends with it
    context.set_forkserver_preload([__name__])
    store, runs = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False), context.Event()
    processes = [context.Process(target=_rank, args=(rank, store.port, case), kwargs={"runs": runs}) for rank in (0, VICTIM)]
    for process in processes:
        process.start()
    while not runs.wait(LOOK_S):
        if not all(process.is_alive() for process in processes):
            raise RuntimeError(f"two ranks on one device made no video; see {case.folder / 'rank0.txt'}")
    processes[VICTIM].kill()
    processes[0].join(END_S)
    end = processes[0].exitcode
    processes[0].kill()
    named = re.search(r"rank (\d+): .*", (case.folder / "rank0.txt").read_text(errors="replace"))
    figures.add("blamed", int(named[1]) if named else -1, f"({named[0]})" if named else "(nobody)")
    figures.add("exit_code_of_the_other", "none: it hangs" if end is None else end)


def _rank(rank: int, port: int, case: CheckCase, *, runs: Event) -> None:
    """A rank of a pipeline, with its output in a file; sets `runs` when a video is made."""
    with (case.folder / f"rank{rank}.txt").open("wb") as file:
        os.dup2(file.fileno(), 2)
    store = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}  # the store lives on when a rank is lost
    here = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {**store, **{name: str(value) for name, value in here.items()}}
    config = case.video(ParallelConfig("pipeline", vae_rank=False, timeout_s=PATIENCE_S), LAYERS)
    try:
        with case.opened(config, ranks=Ranks(rank, 2, rank, 2)) as (found, _):
            found.serve()
            for _ in range(VIDEOS):
                list(case.blocks(found.components.model, found.components.context, count=BLOCKS))
                runs.set()
    except OtherRank as error:
        os.write(2, f"{error}\n".encode())
        raise SystemExit(1) from error


def memory(case: CheckCase, figures: Figures) -> None:
    """A video that needs more memory than there is."""
    fit = [*command_words("bench"), "fit", *VIDEO, f"run.device={case.device}", "fit.force=true", f"run.folder={case.folder}"]
    limited = ["sh", "-c", f'ulimit -v {CPU_GIB << 20}; exec "$@"', "sh", *fit]  # a CPU process has no cap of its own
    done = subprocess.run([*fit, "fit.cap_gib=2"] if case.on_gpu else limited, capture_output=True, text=True, check=False)
    figures.add("exit_code", done.returncode)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("sonic: warning")]
    figures.add("sentences", len(lines), f"({lines[-1] if lines else 'nothing was said'})")
