"""Options that have no effect beside others of the same training: setting them is refused (standard library only)."""

from __future__ import annotations

import typing
from collections.abc import Callable
from functools import reduce

from sonic.config import require

TrainConfig = typing.Any  # the class of that name, whose module imports this one


def _drawn(config: TrainConfig) -> bool:
    return config.data.source == "drawn"


def _reads_weights(config: TrainConfig) -> bool:
    return hasattr(config.objective, "learn") or getattr(config.objective, "head_only", False)


def _reads_first_block(config: TrainConfig) -> bool:
    return config.objective.window.reach == "blocks" or config.objective.name == "dmd"


# option: whether this training reads it, and what it needs to be read; without what past=0 and learn.rank=0 switch off in a recipe
READ_WITH: dict[str, tuple[Callable[[TrainConfig], object], str]] = {
    "data.folder": (lambda c: not _drawn(c), "data.source=clips"),
    "data.split": (_drawn, "data.source=drawn"),
    "data.validation_share": (lambda c: c.log.validation_every and not _drawn(c), "log.validation_every above 0 and data.source=clips"),
    "log.validation_every": (lambda c: c.data.validation_share, "data.validation_share above 0"),
    "data.resolution": (_drawn, "data.source=drawn"),
    "log.sample_seconds": (lambda c: c.log.samples_every, "log.samples_every above 0"),
    "log.sample_steps": (
        lambda c: c.log.samples_every and not hasattr(c.objective, "sampler"),
        "log.samples_every above 0 and an objective without objective.sampler",
    ),
    "speed.prefetch": (lambda c: c.speed.workers, "speed.workers above 0"),
    "model.lora.path": (_reads_weights, "an objective that starts from a model's weights"),
    "model.weights": (_reads_weights, "an objective that starts from a model's weights; this one starts from random ones or init_from"),
    "objective.schedule": (lambda c: c.objective.schedule_share, "objective.schedule_share above 0"),
    "objective.window.max_first_block": (_reads_first_block, "objective.window.reach=blocks"),
    "objective.error.weight_cap": (lambda c: c.model.prediction == "clean", "model.prediction=clean"),
    "objective.sampler.negative_prompt": (lambda c: False, "a command that makes videos"),
}


def refuse_idle_options(config: TrainConfig) -> None:
    """Raise ValueError for an option that differs from its default and that this training would not read."""
    for option, (is_read, needs) in READ_WITH.items():
        *path, name = option.split(".")
        owner = reduce(lambda part, word: getattr(part, word, None), path, config)
        if hasattr(owner, name) and getattr(owner, name) != (default := getattr(type(owner)(), name)):
            way_out = "leave it empty" if default == "" else f"leave it at {default}"
            require(is_read(config), f"{option}={getattr(owner, name)} has no effect here: it needs {needs}; {way_out}")
    start = config.model.weights
    require(start != "student", f"model.weights={start} is a teacher with adapters for one number of steps; train from weights=teacher")
