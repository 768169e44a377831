"""What a training that continues from a checkpoint may change, and the sentences about what has changed since.

A checkpoint's metadata holds the options, the code and the number of processes that wrote it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from sonic.training.train_config import TrainConfig

FIXED = (  # options, and groups of them, that the state of a training depends on
    *("model", "objective.name", "objective.learn", "objective.head_only", "objective.decoder_only"),
    *("data.window", "data.resolution"),
)
MOVABLE = ("model.name", "model.weights", "model.speech_weights", "model.lora.path")  # names of what may be the same
UNLISTED = ("checkpoint.resume",)

LOG = logging.getLogger(__name__)


def start_of(config: TrainConfig, *, commit: str, ranks: int) -> dict:
    """This start as it is recorded in the metadata of its checkpoints."""
    return {"options": json.loads(json.dumps(_flat(asdict(config)))), "commit": commit, "ranks": ranks}


def refuse_changes(checkpoint: Mapping, now: Mapping) -> None:
    """Raise ValueError with both values of an option that must not change since a checkpoint, given its metadata and this start."""
    for option, (before, after) in _changed_options(checkpoint, now).items():
        if option not in MOVABLE and any(f"{option}.".startswith(f"{fixed}.") for fixed in FIXED):
            raise ValueError(
                f"{option}={_shown(after)} cannot continue the training of step {checkpoint['step']}, which has {option}={_shown(before)}; "
                f"use that again, or a new name= for another training"
            )


def announce(checkpoint: Mapping, now: Mapping, folder: Path, *, budget: str) -> None:
    """Log from where a training continues, and everything that has changed since the checkpoint of this metadata."""
    if not checkpoint:
        return
    resume = now["options"]["checkpoint.resume"]
    source = "" if resume == "auto" else f" from {resume}"
    minutes = checkpoint.get("seconds", 0) / 60
    LOG.info("resuming %s%s at step %d, after %.1f minutes, of %s", folder, source, checkpoint["step"], minutes, budget)
    changes = [f"{option} {_shown(before)} -> {_shown(after)}" for option, (before, after) in _changed_options(checkpoint, now).items()]
    if "options" not in checkpoint:
        changes = ["an older version wrote the checkpoint without its options, so changed ones are not listed"]
    elif checkpoint["commit"] != now["commit"]:
        changes.append(f"code {checkpoint['commit']} -> {now['commit']}")
    if checkpoint.get("ranks", now["ranks"]) != now["ranks"]:
        changes.append(f"processes {checkpoint['ranks']} -> {now['ranks']} (sums in another order: equal within rounding, not bit for bit)")
    if changes:
        LOG.warning("changed since that checkpoint: %s", "; ".join(changes))


def _changed_options(checkpoint: Mapping, now: Mapping) -> dict[str, tuple[object, object]]:
    """Options with other values than those of a checkpoint, as (before, now). One that the other version lacks is not among them."""
    before, after = checkpoint.get("options", {}), now["options"]
    both = [option for option in after if option in before and option not in UNLISTED]
    return {option: (before[option], after[option]) for option in both if before[option] != after[option]}


def _flat(options: Mapping, prefix: str = "") -> dict[str, object]:
    """The options of nested groups by their full names."""
    found: dict[str, object] = {}
    for name, value in options.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found


def _shown(value: object) -> str:
    """A value as it is typed; '' for an empty text."""
    return (value or "''") if isinstance(value, str) else json.dumps(value)
