"""Puts a training run together: configs to dataset, objective, engine and log; and what remains of it: weights and a card."""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Dataset

from sonic.data.clips import ClipDataset, batches
from sonic.train.engine import LocalEngine
from sonic.train.log import RunLog
from sonic.train.loop import Outcome, Run, train
from sonic.train.objectives import OBJECTIVES
from sonic.train.settings import DataConfig, TrainConfig
from sonic.types import pick

LOG = logging.getLogger(__name__)


def _drawn(config: DataConfig) -> Dataset:
    from sonic.data.drawn import DrawnFaces  # needs what the other sources do not

    return DrawnFaces(config.folder, window=config.window, resolution=config.resolution, split=config.split)


DATASETS: dict[str, Callable[[DataConfig], Dataset]] = {
    "clips": lambda config: ClipDataset(config.folder, config.window),
    "drawn": _drawn,
}


def run_training(config: TrainConfig, folder: Path, *, commit: str = "unknown", command: str = "") -> Outcome:
    """Train as `config` says in the run folder `folder`; export the averaged weights and their card when asked."""
    if config.speed.threads:
        torch.set_num_threads(config.speed.threads)
    device = _device(config.speed.device)
    torch.manual_seed(config.seed)
    dataset = pick(DATASETS, config.data.source, "data.source")(config.data)
    objective = pick(OBJECTIVES, config.objective.name, "objective.name")(config, dataset)
    if config.init_from:
        start_from(objective.roles["student"], Path(config.init_from))
    engine = LocalEngine(config.optim, device, channels_last=config.speed.channels_last)
    speed = config.speed
    stream = partial(batches, dataset, config.budget.batch_size, seed=config.seed, workers=speed.workers, prefetch=speed.prefetch)
    folder.mkdir(parents=True, exist_ok=True)
    log = RunLog(folder, config.log, name=config.name)
    outcome = train(Run(config, objective, engine, lambda start: stream(start=start), log, folder))
    if config.export:
        weights = objective.export(engine.weights())
        save_weights(weights, Path(config.export))
        card = describe(config, outcome, parameters=sum(t.numel() for t in weights.values()), origin=(commit, command), device=device)
        Path(config.export).with_suffix(".md").write_text(card)
    return outcome


def start_from(module: nn.Module, path: Path) -> None:
    """Take over every tensor of `path` whose name and shape fit (with or without the name of a part in front).

    Raises ValueError when the file cannot be read or nothing fits.
    """
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"init_from={path} cannot be read: {error}") from error
    state = module.state_dict()
    taken = {}
    for name, value in state.items():
        for start in ("", *_starts(name)):
            candidate = found.get(name.removeprefix(start))
            if candidate is not None and candidate.shape == value.shape:
                taken[name] = candidate
                break
    if not taken:
        raise ValueError(f"init_from={path} has no tensor that fits this model; train from the start or name other weights")
    module.load_state_dict(taken, strict=False)
    LOG.info("took %d of %d tensors from %s", len(taken), len(state), path)


def save_weights(weights: dict[str, torch.Tensor], path: Path) -> None:
    """Write weights in half precision; under a temporary name first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    halves = {name: (t.half() if t.is_floating_point() else t).cpu().contiguous() for name, t in weights.items()}
    aside = path.with_name(f".{path.name}")
    save_file(halves, aside)
    aside.rename(path)


def describe(config: TrainConfig, outcome: Outcome, *, parameters: int, origin: tuple[str, str], device: torch.device) -> str:
    """The card beside exported weights. origin = (git commit, command)."""
    commit, command = origin
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    figures = "\n".join(f"| {name} | {value:.5g} |" for name, value in sorted(outcome.figures.items()))
    return f"""# {config.name}

| | |
|---|---|
| command | `{command}` |
| git commit | {commit} |
| data | {config.data.source}, seed {config.seed} |
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
"""


def _starts(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:n]) + "." for n in range(1, len(parts))]


def _device(name: str) -> torch.device:
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
