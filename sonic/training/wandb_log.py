"""The log of a run in W&B (the only module that imports it): figures, facts, media, and artifacts with their lineage."""

from __future__ import annotations

import json
import logging
import re
import uuid
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sonic.config import require
from sonic.evaluation.sweep import Cell
from sonic.training.histograms import Histogram
from sonic.training.lineage import Artifact
from sonic.training.log_destination import SAMPLE, LogDestination, LoggedRun
from sonic.training.train_config import LogConfig, WandbConfig

PATIENCE_S = 30  # how long to wait for W&B before the run continues offline
LOG = logging.getLogger(__name__)


def wants_wandb(config: WandbConfig) -> bool:
    """Whether log.wandb is on. Raises ValueError when W&B is not installed."""
    there = config.wandb == "off" or find_spec("wandb") is not None
    require(there, f"log.wandb={config.wandb} needs W&B, which is not installed; run: pip install wandb, or use log.wandb=off")
    return config.wandb != "off"


class WandbLog(LogDestination):
    """A W&B run, which is continued when the folder has its id."""

    @classmethod
    def wanted(cls, config: LogConfig) -> bool:
        """Whether log.wandb is on."""
        return wants_wandb(config)

    def __init__(self, run: LoggedRun) -> None:
        self.run = open_wandb(run.folder, run.config, run.name, facts=run.facts)

    def scalars(self, step: int, values: Mapping[str, float], video: Path | None = None) -> None:
        """Log the figures and the video of a step."""
        import wandb

        media = {} if video is None else {SAMPLE: wandb.Video(str(video), format="mp4")}
        self.run.log({**values, **media}, step=step)

    def histograms(self, step: int, values: Mapping[str, Histogram]) -> None:
        """Log histograms of a step."""
        import wandb

        self.run.log({name: wandb.Histogram(np_histogram=tuple(value)) for name, value in values.items()}, step=step)

    def artifact(self, artifact: Artifact, *, made: bool) -> None:
        """Log an artifact as output or as input of the run."""
        log_artifact(self.run, artifact, made=made)

    def close(self, *, failed: bool) -> None:
        """End the run; W&B marks one that failed."""
        self.run.finish(exit_code=int(failed))


def open_wandb(
    folder: Path, config: WandbConfig, name: str, *, group: str = "", job_type: str = "train", facts: Mapping[str, Any] | None = None
):
    """Start a W&B run, or continue the one whose id is in the folder. Falls back to offline mode when W&B cannot be reached."""
    import wandb

    id_file = folder / "wandb_id.txt"
    run_id = id_file.read_text().strip() if id_file.exists() else uuid.uuid4().hex[:8]
    id_file.write_text(run_id)
    keywords = {"project": config.project, "name": name, "id": run_id, "resume": "allow", "dir": str(folder)}
    keywords |= {"entity": config.entity or None, "group": config.group or group or None, "job_type": config.job_type or job_type}
    keywords |= {"tags": config.tags or None, "notes": config.notes or None, "settings": wandb.Settings(init_timeout=PATIENCE_S)}
    try:
        run = wandb.init(mode=config.wandb, **keywords)
    except wandb.errors.Error as error:
        LOG.warning("W&B cannot be used (%s); logging offline under %s", str(error).splitlines()[0], folder)
        wandb.teardown()  # its service still holds the failed run
        run = wandb.init(mode="offline", **keywords)
    run.config.update(dict(facts or {}), allow_val_change=True)
    return run


def log_artifact(run: Any, artifact: Artifact, *, made: bool) -> None:
    """Log an artifact as output of a W&B run or as its input. A failure is logged as a warning, since the figures are safe without it."""
    import wandb

    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", artifact.name)
    try:
        entry = wandb.Artifact(name, type=artifact.kind, metadata=dict(artifact.metadata))
        with entry.new_file("identity.json") as file:
            json.dump(artifact.identity, file, indent=1, sort_keys=True)
        for path in artifact.files:
            entry.add_file(str(path), name=path.name)
        if artifact.reference is not None:
            entry.add_reference(artifact.reference.as_uri(), name=artifact.reference.name)
        if made:
            run.log_artifact(entry)
        elif run.offline:  # use_artifact refuses, but what it publishes is what `wandb sync` sends
            run._log_artifact(entry, is_user_created=True, use_after_commit=True)
        else:
            run.use_artifact(entry)
    except (wandb.errors.Error, AttributeError, OSError, TypeError, ValueError) as error:
        LOG.warning("the artifact %s could not be logged to W&B (%s)", name, error)


def log_evaluation(
    folder: Path, config: WandbConfig, made: Artifact, *, job_type: str, facts: Mapping[str, Any], inputs: Sequence[Artifact]
) -> None:
    """Log an evaluation as a W&B run with its figures, contact sheets and videos, after what it used; nothing with log.wandb=off."""
    if not wants_wandb(config):
        return
    import wandb

    run = open_wandb(folder, config, folder.name, job_type=job_type, facts=facts)
    for artifact in inputs:
        log_artifact(run, artifact, made=False)
    sheets, videos = ([path for path in made.files if path.suffix == ending] for ending in (".png", ".mp4"))
    media = {"eval/sheets": [wandb.Image(str(path), caption=path.stem) for path in sheets]}
    media["eval/videos"] = [wandb.Video(str(path), caption=path.stem, format="mp4") for path in videos]
    run.log({**flat(made.identity), **{name: items for name, items in media.items() if items}})
    log_artifact(run, made, made=True)
    run.finish()


def flat(figures: Mapping[str, Any]) -> dict[str, float]:
    """The figures of an evaluation by their names in the log: of those with an interval, the mean."""
    means = {name: value.get("mean") if isinstance(value, dict) else value for name, value in figures.items()}
    return {f"eval/{name}": value for name, value in means.items() if isinstance(value, int | float)}


def log_cells(cells: Sequence[Cell], config: LogConfig, *, group: str) -> None:
    """Log the figures of every finished seed of a sweep's cells as runs of one W&B group, with the whole configs and the swept options
    by their names; a job that logs itself has its run continued. Does nothing with log.wandb=off."""
    if not wants_wandb(config):
        return
    for cell in cells:
        for seed, figures in cell.seed_figures.items():
            folder = cell.run_folder(seed)
            folder.mkdir(parents=True, exist_ok=True)
            run = open_wandb(folder, config, f"{cell.name}, seed {seed}", group=group, job_type=cell.job, facts=cell.config)
            run.config.update({**cell.choices, "seed": seed}, allow_val_change=True)
            run.summary.update(flat(figures))
            run.finish()
