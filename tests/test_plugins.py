"""Variants of one's own: packages given as plugins=, and config files from anywhere."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from infer_command import FACE, ROOT, TINY, write_files
from safetensors.torch import load_file
from video_files import read_frames

import sonic
from sonic.checkpoint.speech_weights import open_speech_encoder
from sonic.cli import compose, help_text, run_command
from sonic.commands import ablate_command, evaluate_command, infer_command, plan_command, precompute_command, train_command
from sonic.config import SAMPLER_TABLE, AudioConfig, ModelConfig
from sonic.encoders.speech import SPEECH_ENCODERS
from sonic.evaluation.sweep import cells_of
from sonic.plugins import VARIABLE, load_plugins
from sonic.registry import Registry, names_in
from sonic.sampling.samplers import SAMPLERS
from sonic.system.worker import Worker
from sonic.training.objective_config import OBJECTIVE_CONFIGS
from sonic.training.objectives import OBJECTIVES

FILE = re.compile(r"```\w*\n# ([\w/]+\.\w+)\b.*?\n(.*?)```", re.S)  # in docs/extending.md
SMALL = (*TINY, "weights=weights", "run.threads=1")
SAMPLER = """
from itertools import pairwise
from sonic.sampling.samplers import SAMPLERS, Query, Sampler
def damped(noise, sigmas, rng):
    for step, (now, then) in enumerate(pairwise(sigmas.tolist())):
        noise = noise + 0.9 * (then - now) * (yield Query(noise, now, step))
    return noise
SAMPLERS["damped"] = Sampler(damped)
"""
OBJECTIVE = """
from dataclasses import dataclass
from sonic.config import option
from sonic.training.objective_config import ObjectiveConfig
from sonic.training.objectives import OBJECTIVES, Objective
@dataclass
class LinesConfig(ObjectiveConfig):
    name: str = "lines"
    slope: float = option(2.0, "steepness")
class Lines(Objective):
    options = LinesConfig
OBJECTIVES["lines"] = Lines
"""
ENCODER = """
import torch
from sonic.data.audio import envelope
from sonic.encoders.speech import SPEECH_ENCODERS
from sonic.encoders.speech_encoder import SpeechEncoder
class Loudness(SpeechEncoder):
    rate, context_s, look_ahead_s, num_layers, width = 25, 0.0, 0.0, 1, 1
    def encode_into(self, samples, out, fps):
        out[0, 0] = torch.from_numpy(envelope(samples, 16_000, out.shape[-1], fps=fps))
    def encode_block(self, held, frames, *, start, fps=25):
        raise AssertionError("no live sound here")
SPEECH_ENCODERS["loudness"] = Loudness
"""
INFER, TRAIN, ABLATE = infer_command.ENTRY, train_command.ENTRY, ablate_command.ENTRY


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder, empty, and a process without plug-ins, of which none stays."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.setattr(sys, "path", [*sys.path])
    for registry in (SAMPLERS, OBJECTIVES, OBJECTIVE_CONFIGS, SPEECH_ENCODERS):
        monkeypatch.setattr(registry, "data", {**registry})
    monkeypatch.setattr(Registry, "additions", 0)
    before = {*sys.modules}
    yield tmp_path
    for name in {*sys.modules} - before:
        if (tmp_path / f"{name}.py").is_file():
            del sys.modules[name]


def write_module(folder: Path, name: str, text: str) -> str:
    (folder / f"{name}.py").write_text(text)
    return name


def help_line(entry, option: str) -> str:
    return next(line for line in help_text(entry).splitlines() if line.startswith(f"  {option}="))


# the example package of the docs, installed


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Path:
    """A folder with the files of docs/extending.md, whose package is installed in its folder `installed`."""
    folder = tmp_path_factory.mktemp("lab")
    for name, text in FILE.findall((ROOT / "docs/extending.md").read_text()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    offline = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check")
    subprocess.run([sys.executable, "-m", "pip", "install", *offline, "--target", "installed", "./my_lab"], cwd=folder, check=True)
    write_files(folder, 0.5)
    return folder


def in_lab(lab: Path, *command: str) -> str:
    """What a command writes that is started in the folder; the package is importable as an installed one is."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(lab / "installed"), str(ROOT), str(ROOT / "tests")])}
    environment |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run([sys.executable, *command], cwd=lab, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_video_is_made_with_the_sampler_the_schedule_and_the_attention_of_the_package(lab):
    given = ("image=me.png", "audio=me.wav", *SMALL, *FACE, "sampler.sample_steps=2")
    own = ("plugins=my_lab", "sampler.name=damped", "schedule=cosine", "run.attention=plain")
    in_lab(lab, "-m", "sonic", "infer", *given, *own, "output=own.mp4", "name=own")
    assert json.loads((lab / "runs/own/result.json").read_text())["sampling"]["solver"] == "damped"
    assert "plugins:\n- my_lab\n" in (lab / "runs/own/config.yaml").read_text()
    assert len(list(read_frames(lab / "own.mp4"))) >= 12


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_recipe_trains_the_objective_of_the_package(lab, ranks):
    program = ("-m", "torch.distributed.run", "--nproc-per-node", "2") if ranks == 2 else ()
    options = ("data.resolution=32", f"speed.workers={2 - ranks}", "speed.threads=1", f"budget.accumulate={ranks}", "log.bar=false")
    weights = f"opening_{ranks}.safetensors"
    in_lab(lab, *program, "-m", "sonic", "train", "recipe=opening.yaml", f"name=opening_{ranks}", f"export={weights}", *options)
    assert {name: tuple(each.shape) for name, each in load_file(lab / weights).items()} == {"weight": (2, 5), "bias": (2,)}
    config = (lab / f"runs/opening_{ranks}/config.yaml").read_text()
    assert "  name: opening\n  delta: 0.05\n" in config and "plugins:\n- my_lab\n" in config


def test_the_cells_of_a_sweep_get_the_package(lab):
    pytest.importorskip("submitit")
    common = ",".join(['"+preset=fast_preview"', *(f'"{item}"' for item in SMALL if "steps" not in item)])
    quick = ("clips=1", "seconds=2", "num_videos=0", "name=damped", f"common=[{common}]")
    in_lab(lab, str(ROOT / "launch/ablate.py"), "plugins=my_lab", "grid.sampler.name=[damped]", *quick)
    assert len(list((lab / "runs/damped/cells").glob("*/seed_1.json"))) == 1


# what a plug-in may be, and what is said otherwise


def test_names_of_a_plug_in_are_in_help_and_accepted_and_in_spawned_processes(here):
    name = write_module(here, "mine", SAMPLER)
    assert "damped" not in help_line(INFER, "sampler.name")
    made = compose(INFER, ["plugins=mine", "sampler.name=damped"])
    assert (made.plugins, made.sampler.name) == ([name], "damped")
    assert help_line(INFER, "sampler.name").endswith(", damped")
    with pytest.raises(ValueError, match="sampler.name=dampd is unknown; choose one of: damped,"):
        compose(INFER, ["plugins=[mine]", "sampler.name=dampd"])
    worker = Worker(nothing)
    try:
        assert "damped" in worker.call(names_in, SAMPLER_TABLE)
    finally:
        worker.close()


def nothing() -> None:
    """The preparation of a worker that needs none."""


def test_help_shows_the_names_and_the_options_of_a_plug_in_that_is_named_on_its_command_line(here, capsys):
    write_module(here, "mine", OBJECTIVE)
    assert run_command(TRAIN, None, ["--help", "plugins=mine", "objective=lines"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^  objective=.*\|lines\|", text, re.M) and re.search(r"^  objective.slope=2.0 +steepness$", text, re.M)


@pytest.mark.parametrize("given", [["recipe=mine.yaml"], ["+train=mine.yaml"], ["+train=mine.yaml", "objective.slope=4"]])
def test_a_recipe_brings_its_plug_ins(here, given):
    write_module(here, "mine", OBJECTIVE)
    (here / "mine.yaml").write_text("plugins: [mine]\ndefaults: [override /objective: lines]\nbudget: {max_steps: 1}\n")
    made = compose(TRAIN, given)
    assert (made.objective.name, made.objective.slope, made.plugins) == ("lines", 4.0 if len(given) > 1 else 2.0, ["mine"])


def test_a_sweep_hands_its_plug_ins_to_every_cell(here):
    write_module(here, "mine", SAMPLER)
    config = compose(ABLATE, ["plugins=mine", "grid.sampler.name=[damped,euler]"])
    for cell, name in zip(cells_of(config, here), ("damped", "euler"), strict=True):
        made = compose(evaluate_command.ENTRY, cell.run_of(1).options)
        assert (made.plugins, made.sampler.name) == (["mine"], name)


def test_plug_ins_work_from_python(here):
    write_module(here, "mine", SAMPLER)
    sonic.load_plugins(["mine"])
    assert "damped" in sonic.SAMPLERS
    sonic.load_plugins(["mine"])  # a second time is no mistake


BAD = {  # module, its text, what is said
    "nowhere": (None, "there is no module nowhere; install its package, or start in its folder"),
    "half.way": (None, "there is no module half"),
    "not-a-name": (None, "is not the name of a module"),
    "silent": ("x = 1\n", "registers nothing"),
    "broken": ("import nowhere_at_all\n", "fails: ModuleNotFoundError: No module named 'nowhere_at_all'; SONIC_DEBUG=1 shows where"),
    "unclosed": ("x = (\n", r"fails: SyntaxError: .*unclosed.py, line 1"),
    "leaves": ("import sys\nsys.exit(3)\n", "fails: SystemExit: 3"),
    "taken": ("from sonic.sampling.samplers import SAMPLERS\nSAMPLERS['euler'] = 1\n", "sampler.name=euler is there already"),
    "json": (None, "registers nothing"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_module_that_is_no_plug_in_is_one_sentence_and_exit_code_2(here, capsys, name):
    text, words = BAD[name]
    if text:
        write_module(here, name, text)
    assert run_command(INFER, None, [f"plugins={name}"]) == 2
    message = capsys.readouterr().err
    assert re.search(rf"^sonic: error: plugins={name}:? .*{words}", message) and message.count("\n") == 1
    assert list(SAMPLERS) == ["euler", "heun", "unipc", "dpmpp"]


def test_the_options_of_an_objective_have_its_name(here):
    with pytest.raises(ValueError, match='objective=other: the options LinesConfig need the line name: str = "other"'):
        load_plugins([write_module(here, "mine", OBJECTIVE.replace('OBJECTIVES["lines"]', 'OBJECTIVES["other"]'))])


def test_a_name_cannot_be_taken_twice(here):
    for registry, name in ((SAMPLERS, "heun"), (OBJECTIVES, "dmd")):
        with pytest.raises(ValueError, match="is there already; register yours under another name"):
            registry[name] = registry[name]
        with pytest.raises(ValueError, match="is there already"):
            registry.update({name: registry[name]})


def test_a_speech_encoder_without_weights_needs_no_file(here):
    load_plugins([write_module(here, "mine", ENCODER)])
    model = ModelConfig(speech_encoder="loudness", audio=AudioConfig(audio_dim=1, num_audio_layers=1))
    encoder = open_speech_encoder(model, {})(torch.device("cpu"))
    assert encoder.encode_audio(np.ones(16_000, np.float32), 25).shape == (1, 1, 25)


def test_no_list_repeats_the_names_of_a_registry():
    """Checks, help and defaults read the registries: a literal with the same names would go on refusing those of plug-ins."""
    literals, registries = [], {}
    for path in sorted((ROOT / "sonic").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Registry" and isinstance(node.args[-1], ast.Dict):
                registries[frozenset(map(ast.literal_eval, node.args[-1].keys))] = ast.unparse(node.args[0])
            if isinstance(node, ast.Tuple | ast.List | ast.Set) and all(isinstance(each, ast.Constant) for each in node.elts):
                literals.append((f"{path.relative_to(ROOT)}:{node.lineno}", frozenset(each.value for each in node.elts)))
    assert len(registries) >= 12
    assert [(where, registries[names]) for where, names in literals if names in registries] == []


# files from anywhere

FILES = {
    "wide.yaml": "defaults: [preview]\nname: wide\ntrunk: {hidden_dim: 384, ffn_dim: 1536, num_heads: 6}\n",
    "alone.yaml": "name: alone\ntrunk: {num_layers: 2}\naudio: {inject_layers: [0]}\n",
    "box.yaml": "defaults: [4x24gb]\nname: box\ndevices: 6\n",
    "quick.yaml": "defaults:\n  - override /sampler: unipc\nsampler: {sample_steps: 3}\n",
    "sweep.yaml": "grid: {sampler.sample_steps: [1, 2]}\n",
    "own data.yaml": "defaults: [preview_clips]\nutterances: 3\n",
}


@pytest.fixture
def files(here):
    """The files above in the current folder."""
    for name, text in FILES.items():
        (here / name).write_text(text)
    return here


def test_any_choice_may_be_a_file(files):
    made = compose(INFER, ["model=wide.yaml", f"+preset={files / 'quick.yaml'}", "hardware=box.yaml", "model.trunk.num_layers=2"])
    assert (made.model.name, made.model.trunk.hidden_dim, made.model.trunk.num_layers, made.model.prediction) == ("wide", 384, 2, "clean")
    assert (made.sampler.name, made.sampler.sample_steps) == ("unipc", 3)
    assert (made.hardware.name, made.hardware.devices, made.hardware.link) == ("box", 6, compose(INFER, ["hardware=4x24gb"]).hardware.link)
    assert compose(ABLATE, ["recipe=sweep.yaml"]).grid == compose(ABLATE, ["+ablate=sweep.yaml"]).grid == {"sampler.sample_steps": [1, 2]}
    assert compose(precompute_command.ENTRY, ["recipe=own data.yaml"]).utterances == 3
    assert compose(INFER, ["recipe=quick.yaml"]).sampler == made.sampler


def test_recipe_also_takes_our_names_in_training_and_in_planning(files):
    assert compose(TRAIN, ["recipe=preview_2step"]) == compose(TRAIN, ["+distill=preview_2step"])
    assert plan_command.entry_of(["recipe=mine.yaml"]) is plan_command.TRAINING_ENTRY


def test_a_model_file_has_the_presets_of_the_model_that_it_is_based_on(files):
    ours, own = (compose(INFER, [f"model={model}", "preset=quality"]) for model in ("preview", "wide.yaml"))
    assert ours.sampler == own.sampler
    (files / "big.yaml").write_text("defaults: [wan_s2v_14b]\nname: big\n")
    assert compose(INFER, ["model=big.yaml"]).sampler == compose(INFER, ["model=wan_s2v_14b"]).sampler
    assert compose(INFER, ["model=alone.yaml"]).model.trunk.num_layers == 2
    with pytest.raises(ValueError, match="preset=quality has no options for this model; leave it out"):
        compose(INFER, ["model=alone.yaml", "preset=quality"])


MISTAKES = {  # text of mine.yaml, what is said of model=mine.yaml
    "value": ("trunk: {hidden_dim: wide}", "mine.yaml: model.trunk.hidden_dim: .*could not be converted to Integer"),
    "rule": ("trunk: {hidden_dim: 385}", "mine.yaml: model.trunk.hidden_dim=385 must be a multiple of num_heads=3"),
    "option": ("trunk: {hiden_dim: 3}", "mine.yaml: model.trunk.hiden_dim is not an option; model.trunk has: hidden_dim"),
    "default": ("defaults: [previe]", "In mine.yaml: model=previe is unknown; choose one of: preview"),
    "yaml": ("trunk: [1\n", "mine.yaml is no YAML: .*line 2"),
    "list": ("- 1\n", "mine.yaml holds no options"),
    "missing": (None, "mine.yaml: No such file or directory; a file is looked for in the current folder"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_file_names_the_file_and_the_option(here, capsys, mistake):
    text, words = MISTAKES[mistake]
    if text is not None:
        (here / "mine.yaml").write_text(text)
    assert run_command(INFER, None, ["model=mine.yaml"]) == 2
    message = capsys.readouterr().err
    assert re.search(f"^sonic: error: {words}", message) and message.count("\n") == 1


def test_a_mistake_on_the_command_line_does_not_blame_the_file(files):
    with pytest.raises(ValueError, match="^model.trunk.hidden_dim=385 must be"):
        compose(INFER, ["model=wide.yaml", "model.trunk.hidden_dim=385"])
