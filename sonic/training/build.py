"""Builds a training run (dataset, objective, engine, log) from its config, and exports its weights and their card."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.utils.data import Dataset

from sonic.checkpoint.bundled import BUNDLED, IN_PACKAGE, named_weights
from sonic.checkpoint.header import Header, model_fields, read_header
from sonic.checkpoint.load import without_memory
from sonic.checkpoint.lora import base_hash
from sonic.config import AdapterConfig, Ranks
from sonic.data.clips import ENCODERS, ClipDataset, batches, sample_order
from sonic.families.family import family_of
from sonic.inference.components import DTYPES, find_device, lora_of, set_tf32
from sonic.model.execution import Execution
from sonic.parallel.mesh import World
from sonic.parallel.ulysses import sequence_parallel
from sonic.parallel.watchdog import watch_ranks
from sonic.registry import Registry
from sonic.system.files import save_tensors, written_temporary
from sonic.system.heartbeat import pause_watchdog
from sonic.system.program import written
from sonic.training.deepspeed_engine import Zero3Engine, ZeroEngine
from sonic.training.engine import Engine
from sonic.training.fsdp_engine import ShardedEngine
from sonic.training.initial_weights import init_adapters, load_initial_weights
from sonic.training.lineage import Artifact, dataset_artifact, exported_artifacts, weights_artifact
from sonic.training.log import RunLog
from sonic.training.loop import TrainingResult, TrainingRun, train
from sonic.training.objectives import OBJECTIVES
from sonic.training.objectives.objective import Batch, Objective
from sonic.training.provenance import keep_provenance, provenance
from sonic.training.resume import refuse_changes, start_of
from sonic.training.samples import SAMPLES, Student, sample_maker
from sonic.training.train_config import DataConfig, SpeedConfig, TrainConfig
from sonic.training.validation import validator
from sonic.training.world import join_world
from sonic.types import pick

LOG = logging.getLogger(__name__)


def _drawn(config: DataConfig) -> Dataset:
    from sonic.synthetic.drawn_people import DrawnFaces  # has requirements that the other sources have not

    return DrawnFaces(window=config.window, resolution=config.resolution, split=config.split)


def _clips(config: DataConfig) -> Dataset:
    return ClipDataset(config.folder, config.window, share=config.validation_share)


DATASETS: Registry[Callable[[DataConfig], Dataset]] = Registry("data.source", {"clips": _clips, "drawn": _drawn})

ENGINES: Registry[Callable[..., Engine]] = Registry(
    "speed.engine", {"local": Engine, "fsdp": ShardedEngine, "zero2": ZeroEngine, "zero3": Zero3Engine}
)


def run_training(
    config: TrainConfig,
    folder: Path,
    *,
    commit: str = "unknown",
    command: str = "",
    on_built: Callable[[], object] = lambda: None,
    ranks: Ranks = Ranks(),  # noqa: B008
) -> TrainingResult:
    """Train by `config` in the run folder `folder`, and export the averaged weights and their card if `config.export` is set.

    `on_built` is called once all parts are built, just before the folder is used; `ranks` are the processes that torchrun started.
    """
    if config.model.weights:  # the checkpoint says how large the model is
        config = replace(config, model=family_of(config.model).settled_model(config.model))
    if config.speed.threads:
        torch.set_num_threads(config.speed.threads)
    device = _device(config.speed.device, ranks)
    world = join_world(device, context=config.speed.context, replicas=config.speed.replicas, local_world=ranks.local_world)
    with (
        watch_ranks(world.rank, world.ranks, device=world.device, patience_s=config.speed.timeout_s),
        RunLog(folder, config.log, name=config.name, main=world.main) as log,
    ):
        return _build_and_train(config, world, log, on_built=on_built, origin=(commit, command))


def _build_and_train(
    config: TrainConfig, world: World, log: RunLog, *, on_built: Callable[[], object], origin: tuple[str, str]
) -> TrainingResult:
    """Build the parts, train and export, in one process of the world."""
    folder = log.folder
    check_accumulate(config, world)
    engine = engine_of(config, world, folder)
    refuse_changes(engine.checkpoints.find(config.checkpoint.resume), start_of(config, commit=origin[0], ranks=world.ranks))
    torch.manual_seed(config.seed)
    set_tf32(DTYPES[config.speed.precision])
    dataset, family = pick(DATASETS, config.data.source, "data.source")(config.data), family_of(config.model)
    if isinstance(dataset, ClipDataset):
        dataset.check(config.model, family.encoder_hashes)
    execution = Execution(sequence_parallel(world, config.model.trunk.num_heads))
    kind = pick(OBJECTIVES, config.objective.name, "objective.name")
    objective = kind(config, dataset, make=partial(without_memory, network=kind.network), execution=execution)
    engine.allocate(objective)
    lora = lora_of(config.model.lora)
    if getattr(config.objective, "learn", AdapterConfig()).rank and (lora.adapters or lora.replaced and not objective.keeps_changes):
        way_out = "use objective.learn.rank=0, which trains and exports whole weights, or init_from=FILE to go on with those adapters"
        raise ValueError(f"model.lora.path={config.model.lora.path}: adapters cannot be trained on top of adapters; {way_out}")
    if objective.pretrained:
        objective.load(family.transformer_weights(config.model), lora)
    init_adapters(objective.roles.values(), torch.Generator().manual_seed(config.seed))
    if config.init_from:
        load_initial_weights(objective, named_weights(config.init_from))
    start = family.transformer_weights(config.model) if objective.pretrained else f"random weights, seed {config.seed}"
    LOG.info("the training begins from %s", f"{config.init_from}, and for the rest {start}" if config.init_from else start)
    student = Student(config, objective, engine, folder)
    checks = {"make_sample": sample_maker(student), "validate": validator(student)}
    on_built()
    folder.mkdir(parents=True, exist_ok=True)
    if world.main:
        with pause_watchdog():  # files may take any time
            log.facts = provenance(config, command=origin[1], commit=origin[0])
            log.inputs = [keep_provenance(log.facts, folder), *inputs_of(config, objective, dataset)]
    outcome = train(TrainingRun(config, objective, engine, batch_stream(config, dataset, world), log, folder, **checks, commit=origin[0]))
    if samples := sorted((folder / SAMPLES).glob("*")):
        log.artifact(Artifact(f"{config.name}-samples", "samples", {"steps": outcome.steps}, files=samples))
    if outcome.signal or not config.export:
        return outcome
    weights = halved(objective.export(engine.weights(objective.exports)))  # a collective call
    if world.main:
        path = Path(config.export)
        with pause_watchdog():  # files may take any time
            header = _header(config, objective, dataset, path=path, minutes=outcome.seconds / 60)
            if not outcome.new_steps and path.with_suffix(".md").is_file() and _holds(path, weights, header):
                LOG.info("this training was finished before and made no step; %s and its card stay as they are", path)
                return outcome
            path.parent.mkdir(parents=True, exist_ok=True)
            size = sum(tensor.numel() for tensor in weights.values())
            card = describe(config, outcome, dataset, parameters=size, origin=origin, device=world.device)
            with written_temporary(path.with_suffix(".md")) as file:  # before the weights, so that new ones never have an old card
                file.write_text(card)
            save_tensors(weights, path, {**objective.metadata, **header})
            for artifact in exported_artifacts(path, figures=outcome.figures, whole=config.log.artifacts == "weights"):
                log.artifact(artifact)
    return outcome


def inputs_of(config: TrainConfig, objective: Objective, dataset: Dataset) -> list[Artifact]:
    """The data and the weights that a training uses."""
    weights = [named_weights(config.init_from)] if config.init_from else []
    if objective.pretrained:
        weights.append(family_of(config.model).transformer_weights(config.model))
    return [dataset_artifact(config.data, dataset), *map(weights_artifact, weights)]


def engine_of(config: TrainConfig, world: World, folder: Path) -> Engine:
    """Build the engine of speed.engine; auto = local for one process, fsdp for several."""
    name = config.speed.engine if config.speed.engine != "auto" else "local" if world.ranks == 1 else "fsdp"
    if name == "local" and world.ranks > 1:
        raise ValueError(f"speed.engine=local trains in one process, but {world.ranks} were started; use speed.engine=fsdp")
    if name != "local" and world.mesh is None:
        program = written("train", starter="torchrun --nproc-per-node=N")
        raise ValueError(f"speed.engine={name} needs processes that torchrun starts: {program} ...")
    if name in ("zero2", "zero3") and config.log.histograms_every:
        raise ValueError(
            f"log.histograms_every={config.log.histograms_every}: speed.engine={name} keeps gradients to itself; use 0 or fsdp"
        )
    for option in ("context", "replicas", "reshard"):
        value, usual = getattr(config.speed, option), getattr(SpeedConfig(), option)
        if value != usual and name != "fsdp":
            raise ValueError(f"speed.{option}={str(value).lower()} needs speed.engine=fsdp, and this is {name}; leave one of them out")
    if config.speed.cpu_offload and name == "local":
        raise ValueError("speed.cpu_offload=true needs an engine that shards: speed.engine=fsdp, zero2 or zero3; leave it out")
    return pick(ENGINES, name, "speed.engine")(config, world, folder)


def check_accumulate(config: TrainConfig, world: World) -> None:
    """Raise ValueError unless every process, or group of processes that share tokens, gets the same number of batches per step."""
    accumulate, ranks, size = config.budget.accumulate, world.data_ranks, config.budget.batch_size
    if accumulate % ranks:
        processes = "processes" if config.speed.context == 1 else f"rows of {config.speed.context} processes"
        below, above = accumulate // ranks * ranks, (accumulate // ranks + 1) * ranks
        raise ValueError(
            f"budget.accumulate={accumulate} batches of budget.batch_size={size} cannot be shared by {ranks} {processes}; "
            f"use budget.accumulate={f'{below} or {above}' if below else above}"
        )


def batch_stream(config: TrainConfig, dataset: Dataset, world: World) -> Callable[[int], Iterator[Batch]]:
    """A function that gives this process's batches after the first `start` batches of all processes together."""
    speed, share = config.speed, {"rank": world.data_rank, "ranks": world.data_ranks}
    order = partial(sample_order, len(dataset), config.budget.batch_size, seed=config.seed, **share)
    return lambda start: batches(dataset, partial(order, start=start), workers=speed.workers, prefetch=speed.prefetch)


def halved(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights in half precision, in host memory."""
    return {name: (tensor.half() if tensor.is_floating_point() else tensor).cpu().contiguous() for name, tensor in weights.items()}


def _header(config: TrainConfig, objective: Objective, dataset: Dataset, *, path: Path, minutes: float) -> dict[str, str]:
    """The metadata of an exported transformer: its model's config, and the weights that its adapters are for; {} for other networks."""
    if not hasattr(objective, "networks"):
        return {}
    model, base = config.model, ()
    if objective.exports_changes:
        file = family_of(model).transformer_weights(model)
        name = f"{IN_PACKAGE}{file.stem}" if file.parent == BUNDLED else os.path.relpath(model.weights, path.parent)
        base = (name, base_hash(file))
    sampler = asdict(config.objective.sampler) if hasattr(config.objective, "sampler") else {}
    sampler.pop("negative_prompt", None)
    hashes = {name: dataset.index.get(name, "") for name in ENCODERS} if isinstance(dataset, ClipDataset) else {}
    return Header(model_fields(model), config.objective.name, minutes, sampler, hashes, *base).metadata()


def _holds(path: Path, weights: dict[str, torch.Tensor], header: Mapping[str, str]) -> bool:
    """Whether a file contains exactly these weights, and says of what model if there is a `header`; a damaged one does not."""
    try:
        found = load_file(path)
        if header and not read_header(path):
            return False
    except (FileNotFoundError, SafetensorError):
        return False
    return found.keys() == weights.keys() and all(torch.equal(found[name], tensor) for name, tensor in weights.items())


def describe(
    config: TrainConfig, outcome: TrainingResult, dataset: Dataset, *, parameters: int, origin: tuple[str, str], device: torch.device
) -> str:
    """The text of the card beside exported weights. origin = (git commit, command)."""
    seed = dataset.index.get("seed") if isinstance(dataset, ClipDataset) else config.seed  # None for clips of videos
    commit, command = origin
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    figures = "\n".join(f"| {name} | {value:.5g} |" for name, value in sorted(outcome.figures.items()))
    return f"""# {config.name}

| | |
|---|---|
| command | `{command}` |
| git commit | {commit} |
| data | {config.data.source}{"" if seed is None else f", seed {seed}"} |
| training seed | {config.seed} |
| objective | {config.objective.name} |
| steps | {outcome.steps} of {config.budget.batch_size * config.budget.accumulate} samples |
| hours | {outcome.seconds / 3600:.2f} |
| machine | {machine}, torch {torch.__version__} |
| parameters | {parameters:,} |

Means over the last steps:

| figure | value |
|---|---|
{figures}

Objective: `{asdict(config.objective)}`
{_began_from(config.init_from)}"""


def _began_from(weights: str) -> str:
    """The card of the weights that the training started from, one heading level deeper; "" without a card."""
    if not weights or not (card := named_weights(weights).with_suffix(".md")).is_file():
        return ""
    return f"\nIt began from:\n\n#{card.read_text()}"


def _device(name: str, ranks: Ranks) -> torch.device:
    """The device of that name, of several the one for this rank. Raises ValueError when this machine does not have it."""
    try:
        return find_device(name, ranks.local_rank if ranks.world > 1 else None)
    except ValueError as error:
        raise ValueError(str(error).replace("run.device", "speed.device")) from error
