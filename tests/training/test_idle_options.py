"""Every option of a training is read, or refused where nothing reads it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import sonic
from sonic.cli import compose, config_options, groups
from sonic.commands.train_command import ENTRY
from sonic.training.idle_options import READ_WITH
from sonic.training.objective_config import OBJECTIVE_CONFIGS
from sonic.training.train_config import TrainConfig

SOURCES = [path for path in Path(sonic.__file__).parent.rglob("*.py") if "config" not in path.stem]
READ = {node.attr for path in SOURCES for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
DRAWN, DIT, STUDENT = ["+train=preview_autoencoder"], ["+train=preview_dit"], ["+distill=preview_2step"]
IDLE = {  # recipe and further options under which the option is refused, and a value that is not its default
    "data.folder": (DRAWN, "data/clips"),
    "data.split": (DIT, "test"),
    "data.resolution": (DIT, "96"),
    "data.validation_share": (DIT, "0.1"),
    "log.validation_every": (DIT, "100"),
    "log.sample_seconds": ([*DIT, "log.samples_every=0"], "4"),
    "log.sample_steps": (STUDENT, "4"),
    "speed.prefetch": (DIT, "8"),
    "model.lora.path": (DRAWN, "a.safetensors"),
    "model.weights": (DRAWN, "teacher"),
    "objective.schedule": (["+train=audio_adapter"], "[1.0]"),
    "objective.window.max_first_block": ([*DIT, "objective.window.reach=clip"], "3"),
    "objective.error.weight_cap": ([*DIT, "model.prediction=velocity"], "2"),
    "objective.sampler.negative_prompt": (STUDENT, "blurred"),
}


def test_every_option_that_can_be_idle_has_a_case():
    assert IDLE.keys() == READ_WITH.keys()


@pytest.mark.parametrize("option", IDLE)
def test_an_option_without_effect_is_refused(option):
    arguments, value = IDLE[option]
    compose(ENTRY, arguments)
    with pytest.raises(ValueError, match=rf"^{option}=.* has no effect here: it needs .*; leave it (at|empty)"):
        compose(ENTRY, [*arguments, f"{option}={value}"])


@pytest.mark.parametrize("schema", [TrainConfig, *OBJECTIVE_CONFIGS.values()])
def test_every_option_is_read_somewhere(schema):
    assert [name for name in config_options(schema) if name.rpartition(".")[2] not in READ] == []


@pytest.mark.parametrize("recipe", [f"+{group}={name}" for group in ("train", "distill") for name in groups(ENTRY)[group]])
def test_no_recipe_sets_an_idle_option(recipe):
    compose(ENTRY, [recipe])


def test_a_distilled_student_is_no_start():
    with pytest.raises(ValueError, match="model.weights=student .* train from weights=teacher"):
        compose(ENTRY, ["+train=preview_dit", "weights=student"])
