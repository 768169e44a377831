"""Sections of the device check about jobs: a training, ranks of which one is lost, and a video that runs out of memory."""

from __future__ import annotations

import math
import multiprocessing
import os
import re
import subprocess
from itertools import repeat
from multiprocessing.synchronize import Event

import torch
import torch.distributed as dist
from torch import Tensor

from sonic.check.figures import Figures
from sonic.check.kernel_sections import NO_GPU
from sonic.check.measure import differing, peak_gib
from sonic.check.random_video import blocks_of, opened, release
from sonic.check.shapes import CPU_GIB, Case
from sonic.checkpoint.load import fill_randomly, without_memory
from sonic.cli import USER_ERROR
from sonic.config import OtherRank, Ranks
from sonic.geometry import FRAMES_PER_LATENT, GIB, PIXELS_PER_LATENT
from sonic.inference.rollout import seeded
from sonic.parallel.parallel_config import ParallelConfig
from sonic.planner.hardware import machine_here
from sonic.system.program import command_words
from sonic.training.engine import Engine, trainable, whole
from sonic.training.fsdp_engine import ShardedEngine
from sonic.training.initial_weights import init_adapters
from sonic.training.log import RunLog
from sonic.training.loop import TrainingRun, train as run_training
from sonic.training.objectives import OBJECTIVES
from sonic.training.plan_training import PlanTrainingConfig, plan_training, training
from sonic.training.world import join_world

LAYERS, BLOCKS = 8, 3  # of the videos that ranks make
ENDLESS = 100_000  # blocks of the video in which a rank is killed
PATIENCE_S, START_S, END_S = 5.0, 120.0, 30.0
VICTIM = 1


def train(case: Case, figures: Figures) -> None:
    """Turns of critic and student of a distillation with adapters on a frozen base, in one process under fsdp."""
    config, folder = case.training, case.folder / "train"
    dist.init_process_group("cpu:gloo,cuda:nccl" if case.on_gpu else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    world = join_world(case.device)
    objective = OBJECTIVES[config.objective.name](config, make=without_memory)
    engine = ShardedEngine(config, world, folder)
    engine.allocate(objective)
    for model in objective.pretrained:
        fill_randomly(model)
    init_adapters(objective.roles.values(), seeded(config.seed))
    log = RunLog(folder, config.log, name=config.name)
    found = run_training(TrainingRun(config, objective, engine, lambda start: repeat(_batch(config)), log, folder)).figures
    figures.add("step", found["perf/seconds_per_step"], "s for a turn of the critic and one of the student")
    norms = [value for name, value in found.items() if name.endswith("grad_norm")]
    figures.add("gradients_not_finite", sum(not math.isfinite(norm) for norm in norms))
    figures.add("gradient_norms", ", ".join(f"{norm:.3g}" for norm in norms))
    kept = [tensor.clone() for tensor in _learning(engine)]
    for tensor in _learning(engine):
        tensor.zero_()
    engine.load()
    figures.add("differing_in_checkpoint", differing(kept, _learning(engine)), f"of {sum(tensor.numel() for tensor in kept)} numbers")
    if case.on_gpu:
        planned = plan_training(config.__class__(**{**vars(config), "hardware": machine_here(config.hardware)}))
        figures.add("peak", peak_gib(case.device), "GiB")
        figures.add("peak_over_plan", torch.cuda.max_memory_reserved(case.device) / GIB / max(planned.chosen.peak_gib))
    else:
        figures.skip(NO_GPU, "peak_over_plan")
    dist.destroy_process_group()


def _batch(config: PlanTrainingConfig) -> dict[str, Tensor]:
    """A random batch, in host memory."""
    work, model, window, rng = training(config), config.model, config.data.window, seeded(0)
    size, channels = (work.height // PIXELS_PER_LATENT, work.width // PIXELS_PER_LATENT), model.trunk.latent_channels
    draw = lambda *shape: torch.randn(config.budget.batch_size, *shape, generator=rng)  # noqa: E731
    return {
        "latents": draw(channels, window, *size),
        "ref": draw(channels, 1, *size),
        "audio": draw(model.audio.num_audio_layers, model.audio.audio_dim, FRAMES_PER_LATENT * window),
        "text": draw(model.text.text_len, model.text.text_dim),
    }


def _learning(engine: Engine) -> list[Tensor]:
    """The memory of everything that learns on this rank."""
    return [whole(weight.detach()) for role in engine.roles.values() for weight in trainable(role).values()]


def ranks(case: Case, figures: Figures) -> None:
    """fsdp on one rank against a single device; and two ranks of a pipeline on this device, of which one is killed."""
    found = []
    for name in ("single", "fsdp"):
        with opened(case, case.video(ParallelConfig(name), LAYERS)) as each:
            blocks = blocks_of(each.components.model, each.components.context, case.work(LAYERS), count=BLOCKS, sampler=case.bench.sampler)
            found.append([block.latents.cpu() for block in blocks])
    figures.add("differing_latents", differing(*found))
    context = multiprocessing.get_context("forkserver")
    store, runs = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False), context.Event()
    processes = [context.Process(target=_rank, args=(rank, store.port, case), kwargs={"runs": runs}) for rank in (0, VICTIM)]
    for process in processes:
        process.start()
    if not runs.wait(START_S):
        raise RuntimeError(f"two ranks on one device made no block in {START_S:g} s")
    processes[VICTIM].kill()
    processes[0].join(END_S)
    end = processes[0].exitcode
    processes[0].kill()
    words = (case.folder / "rank0.txt").read_text(errors="replace")
    named = re.search(r"rank (\d+): (.*)", words)
    figures.add("blamed", int(named[1]) if named else -1)
    figures.add("message", named[0] if named else "none")
    figures.add("exit_code_of_the_other", "none: it hangs" if end is None else end)


def _rank(rank: int, port: int, case: Case, *, runs: Event) -> None:
    """A rank of a pipeline, with its output in a file; sets `runs` when a video is under way."""
    output = (case.folder / f"rank{rank}.txt").open("wb")
    os.dup2(output.fileno(), 2)
    store = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}  # the store lives on when a rank is lost
    here = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {**store, **{name: str(value) for name, value in here.items()}}
    config = case.video(ParallelConfig("pipeline", vae_rank=False, timeout_s=PATIENCE_S), LAYERS)
    try:
        with opened(case, config, Ranks(rank, 2, rank, 2)) as found:
            found.serve()
            work, components = case.work(LAYERS), found.components
            for block in blocks_of(components.model, components.context, work, count=ENDLESS, sampler=case.bench.sampler):
                if block.span.index == BLOCKS:
                    runs.set()
    except OtherRank as error:
        os.write(2, f"{error}\n".encode())
        raise SystemExit(1) from error


def memory(case: Case, figures: Figures) -> None:
    """A video that needs more memory than there is."""
    fit = [*command_words("bench"), "fit", *case.options, "fit.force=true", f"run.folder={case.folder}"]
    limited = ["sh", "-c", f'ulimit -v {CPU_GIB << 20}; exec "$@"', "sh", *fit]  # a CPU process has no cap of its own
    done = subprocess.run([*fit, "fit.cap_gib=2"] if case.on_gpu else limited, capture_output=True, text=True, check=False)
    figures.add("exit_code", done.returncode)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("sonic: warning")]
    figures.add("sentences", len(lines))
    figures.add("message", lines[-1] if lines else "none")
