"""A file that a training exports says of what model it is; commands take that from it, and refuse what contradicts it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from infer_command import FACE
from ranks import on_ranks
from safetensors.torch import load_file, save_file
from video_files import read_frames

from sonic.checkpoint import bundled
from sonic.checkpoint.bundled import BUNDLED
from sonic.checkpoint.header import KEY, read_header
from sonic.cli import compose, run_command
from sonic.commands import bundle_command
from sonic.commands.evaluate_command import ENTRY as EVALUATE
from sonic.commands.infer_command import ENTRY as INFER
from sonic.commands.infer_command import infer
from sonic.commands.plan_command import ENTRY as PLAN
from sonic.commands.train_command import ENTRY as TRAIN
from sonic.data.clips import write_index
from sonic.families.family import build_components
from sonic.pipeline import AvatarPipeline
from sonic.training.build import run_training

OWN = (
    "model.trunk.hidden_dim=64", "model.trunk.ffn_dim=96", "model.trunk.num_heads=2", "model.trunk.num_layers=2", "model.resolution=96",
    "model.audio.inject_layers=[0]", "model.prediction=velocity", "model.rollout.window_blocks=2",
)  # fmt: skip
SHORT = ("budget.max_steps=3", "budget.max_minutes=0", "budget.batch_size=2", "log.bar=false", "speed.precision=float32")


def train(folder: Path, *options: str) -> Path:
    """Train for three steps from a command line; gives the exported file."""
    export = folder / options[0] / "weights.safetensors"
    data = ["data.source=clips", f"data.folder={folder / 'clips'}", "data.window=6", "log.samples_every=0"]
    run_training(compose(TRAIN, [f"name={options[0]}", *options[1:], *SHORT, *data, f"export={export}"]), folder / options[0])
    return export


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder, rng = tmp_path_factory.mktemp("header"), torch.Generator().manual_seed(0)
    shapes = {"latents": (16, 6, 12, 12), "ref": (16, 1, 12, 12), "audio": (1, 160, 24), "visemes": (24, 5), "head": (24, 4)}
    tensors = {f"c{n}/{name}": torch.randn(shape, generator=rng) for n in range(2) for name, shape in shapes.items()}
    (folder / "clips").mkdir()
    save_file(tensors, folder / "clips/a.safetensors")
    entries = [{"name": f"c{n}", "shard": "a.safetensors", "latent_frames": 6, "tensors": sorted(shapes)} for n in range(2)]
    write_index(folder / "clips", entries)
    soundfile.write(folder / "me.wav", 0.1 * np.sin(np.arange(8000) / 9), 16000)
    return folder


@pytest.fixture(scope="module")
def whole(folder) -> Path:
    """The whole weights of a small model of one's own."""
    return train(folder, "whole", *OWN)


@pytest.fixture(scope="module")
def student(folder, whole) -> Path:
    """Adapters of two sampling steps for these weights."""
    distill = ("objective=consistency", "objective.sampler.sample_steps=2", "objective.sampler.sample_shift=2", "objective.learn.rank=2")
    return train(folder, "student", *distill, f"weights={whole}")


def rewritten(path: Path, target: Path, change) -> Path:
    """A copy of a file of weights, whose header `change` has changed in place."""
    header = {"format": 1, **asdict(read_header(path))}
    change(header)
    save_file(load_file(path), target, {KEY: json.dumps(header)})
    return target


@pytest.mark.parametrize("entry", [INFER, EVALUATE, PLAN, TRAIN], ids=lambda entry: entry.name)
@pytest.mark.parametrize("named", ["whole", "student"])
def test_every_command_takes_the_model_from_its_weights(entry, named, whole, student):
    file = {"whole": whole, "student": student}[named]
    found = compose(entry, [f"weights={file}", *(SHORT if entry is TRAIN else ())]).model
    asked = compose(TRAIN, [*OWN, *SHORT]).model
    lora = replace(asked.lora, path=str(student) if named == "student" else "")
    assert found == replace(asked, weights=str(whole), lora=lora)


def test_a_model_to_start_from_says_its_size_unless_the_user_does(whole):
    assert compose(TRAIN, [f"init_from={whole}", *SHORT]).model == compose(TRAIN, [*OWN, *SHORT]).model
    other = compose(TRAIN, [f"init_from={whole}", "model.prediction=clean", *SHORT]).model
    assert other == compose(TRAIN, [*OWN, "model.prediction=clean", *SHORT]).model


@pytest.mark.parametrize("command", ["infer", "two ranks"])
@pytest.mark.parametrize("named", ["whole", "student"])
def test_weights_of_ones_own_size_make_a_video_without_another_word(command, named, folder, whole, student, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    file, output = {"whole": whole, "student": student}[named], folder / f"{named}.mp4"
    argv = [f"weights={file}", "image=astronaut", "audio=me.wav", *FACE, f"output={output}", "device=cpu", "sampler.name=euler"]
    if command == "infer":
        assert run_command(INFER, infer, argv) == 0
        assert sum(1 for _ in read_frames(output)) == 12
        assert ("holds adapters: they are added to" in capsys.readouterr().out) == (named == "student")
    else:
        one, other = on_ranks(2, weights_on_a_rank, argv)
        assert one == other == weights_on_a_rank(argv)


def weights_on_a_rank(argv):
    """A sum over the weights that a rank loads."""
    config = compose(INFER, argv)
    components = build_components(config.model, config.run, steps=config.sampler.sample_steps)
    return sum(float(weight.double().abs().sum()) for weight in components.model.parameters())


def test_a_python_caller_names_the_file_too(whole, student):
    for file, steps in ((whole, 4), (student, 2)):
        with AvatarPipeline.from_pretrained(file, device="cpu") as pipe:
            assert pipe.opened.components.model.config.trunk.hidden_dim == 64 and pipe.config.sampler.sample_steps == steps


def test_a_student_changes_the_weights_of_its_base(whole, student):
    assert weights_on_a_rank([f"weights={whole}"]) != weights_on_a_rank([f"weights={student}"])


def test_a_student_is_sampled_as_it_was_trained_unless_the_user_asks_otherwise(student):
    taken = compose(INFER, [f"weights={student}", "+preset=fast_preview"]).sampler
    assert (taken.name, taken.sample_steps, taken.sample_shift) == ("euler", 2, 2.0)
    asked = compose(INFER, [f"weights={student}", "sampler.sample_steps=3"]).sampler
    assert (asked.sample_steps, asked.sample_shift) == (3, 2.0)
    assert compose(INFER, [f"weights={student}", "sampler=euler"]).sampler.sample_steps == 4


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("model.trunk.hidden_dim=32", "model.trunk.hidden_dim=32 contradicts .* a model with model.trunk.hidden_dim=64; leave model.trunk"),
        ("model.prediction=clean", "model.prediction=clean contradicts .* a model with model.prediction=velocity; leave model.prediction="),
        ("model=preview_velocity", "model.trunk.hidden_dim=192 contradicts .* a model with model.trunk.hidden_dim=64; leave model= out"),
    ],
)
def test_an_option_that_contradicts_the_file_is_refused_with_both_values(option, sentence, whole):
    with pytest.raises(ValueError, match=sentence):
        compose(INFER, [f"weights={whole}", option])


def test_a_name_alone_contradicts_nothing(whole, tmp_path):
    file = rewritten(whole, tmp_path / "renamed.safetensors", lambda header: header["model"].update(asdict(compose(INFER, []).model)))
    rewritten(file, file, lambda header: [header["model"].pop(name) for name in ("weights", "lora")])
    with pytest.raises(ValueError, match=r"model.prediction=velocity contradicts .*; leave model= out"):
        compose(INFER, [f"weights={file}", "model=preview_velocity"])
    rewritten(file, file, lambda header: header["model"].update(prediction="velocity"))
    assert compose(INFER, [f"weights={file}", "model=preview_velocity"]).model.name == "preview_velocity"
    rewritten(file, file, lambda header: header["model"].update(name="preview_velocity"))
    assert compose(INFER, [f"weights={file}"]).sampler.sample_steps == 40  # as with model=preview_velocity


def test_how_a_model_is_run_may_be_chosen(whole):
    found = compose(INFER, [f"weights={whole}", "model.rollout.window_blocks=4", "model.resolution=192"]).model
    assert (found.rollout.window_blocks, found.resolution, found.trunk.hidden_dim) == (4, 192, 64)


def test_files_that_say_nothing_are_loaded_as_before(whole, tmp_path):
    save_file(load_file(whole), tmp_path / "plain.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(whole.read_bytes()[:200])
    for name in ("plain", "damaged"):
        file = tmp_path / f"{name}.safetensors"
        assert read_header(file) is None
        assert compose(INFER, [f"weights={file}"]).model.trunk.hidden_dim == 192


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda header: header.update(format=2), "format 2, this version of the program reads 1"),
        (lambda header: header.update(model=[]), "model in its header is damaged"),
        (lambda header: header.pop("sampler"), "sampler in its header is damaged"),
        (lambda header: header["model"]["trunk"].update(hiden_dim=3), "model.trunk.hiden_dim, which is no option"),
        (lambda header: header["model"].update(weights="elsewhere"), "model.weights, which is no option"),
        (lambda header: header["model"]["trunk"].update(num_layers="many"), "model.trunk.num_layers=many is not a whole number"),
        (lambda header: header["model"]["trunk"].update(num_heads=5), "must be a multiple of num_heads=5"),
        (lambda header: header["model"].update(name="${oc.env:HOME}"), r"\$\{oc.env:HOME\}"),
    ],
)
def test_a_header_is_checked_like_a_command_line(change, sentence, whole, tmp_path):
    file = rewritten(whole, tmp_path / "changed.safetensors", change)
    with pytest.raises(ValueError, match=sentence):
        raise ValueError(compose(INFER, [f"weights={file}"]).model.name)


def test_adapters_of_other_weights_are_refused_with_both_hashes(whole, student, tmp_path):
    other = {name: tensor + 1 for name, tensor in load_file(whole).items()}
    save_file(other, tmp_path / "other.safetensors")
    known = read_header(student).base_hash
    with pytest.raises(ValueError, match=rf"was trained on \S+ \(hash {known}\), not on \S+other.safetensors \(hash [0-9a-f]{{16}}\)"):
        weights_on_a_rank([f"weights={tmp_path / 'other.safetensors'}", f"model.lora.path={student}"])


def test_adapters_that_say_nothing_of_their_weights_are_recognised(student, tmp_path):
    save_file(load_file(student), tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match=r"plain.safetensors holds adapters .*; name it as model.lora.path=\S+plain.safetensors beside"):
        weights_on_a_rank([f"weights={tmp_path / 'plain.safetensors'}"])


def test_adapters_name_what_is_missing_and_what_they_cannot_be_joined_with(whole, student, tmp_path):
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes(student.read_bytes())
    with pytest.raises(ValueError, match=r"whole.weights.safetensors \(hash \w+\), which does not exist; name their place: weights=FILE"):
        compose(INFER, [f"weights={alone}"])
    assert compose(INFER, [f"weights={whole}", f"model.lora.path={alone}"]).sampler.sample_steps == 2
    assert compose(INFER, [f"model.lora.path={student}"]).model.weights == str(whole)
    with pytest.raises(ValueError, match="holds adapters, and so does"):
        compose(INFER, [f"weights={student}", f"model.lora.path={alone}"])


def test_a_student_is_a_teacher_of_whole_weights_only(folder, student):
    with pytest.raises(ValueError, match="adapters cannot be trained on top of adapters"):
        train(folder, "refused", "objective=dmd", "objective.learn.rank=2", f"weights={student}")
    file = train(folder, "again", "objective=consistency", "objective.sampler.sample_steps=1", f"weights={student}", "optim.lr=1e-12")
    header = read_header(file)
    assert (header.base, header.objective, header.sampler["sample_steps"]) == ("", "consistency", 1)
    assert weights_on_a_rank([f"weights={file}"]) == pytest.approx(weights_on_a_rank([f"weights={student}"]), rel=1e-3)


@pytest.fixture(scope="module")
def of_bundled(folder) -> Path:
    """Adapters for the bundled teacher."""
    return train(folder, "bundled", "objective=consistency", "objective.learn.rank=2", "model.resolution=96")


def test_adapters_of_the_bundled_teacher_name_it(of_bundled):
    header = read_header(of_bundled)
    assert header.base == "bundled:preview_dit" and header.minutes > 0
    assert compose(INFER, [f"weights={of_bundled}"]).model.weights == str(BUNDLED / "preview_dit.safetensors")


def test_bundling_copies_what_fits_the_package_under_its_name(of_bundled, whole, tmp_path, monkeypatch):
    package, plain = tmp_path / "package", tmp_path / "plain.safetensors"
    package.mkdir()
    shutil.copyfile(BUNDLED / "preview_dit.safetensors", package / "preview_dit.safetensors")
    for module in (bundle_command, bundled):
        monkeypatch.setattr(module, "BUNDLED", package)
    put = lambda file, **options: bundle_command.bundle(bundle_command.BundleConfig(source=str(file), **options), None)  # noqa: E731
    put(of_bundled)
    for suffix in (".safetensors", ".md"):
        assert (package / f"preview_4step{suffix}").read_bytes() == of_bundled.with_suffix(suffix).read_bytes()
    with pytest.raises(ValueError, match=r"has preview_4step.safetensors already; add overwrite=true"):
        put(of_bundled)
    put(of_bundled, overwrite=True)
    other = rewritten(of_bundled, tmp_path / "other.safetensors", lambda header: header["encoders"].update(speech_hash="ab"))
    other.with_suffix(".md").write_text("a card")
    with pytest.raises(ValueError, match="with a preview_speech of hash ab, the package's has "):
        put(other)
    save_file(load_file(of_bundled), plain)
    with pytest.raises(ValueError, match="plain.safetensors: name a file that a training exported, with its card"):
        put(plain)
    plain.with_suffix(".md").write_text("a card")
    with pytest.raises(ValueError, match="does not say what it is, and the package has no plain.safetensors"):
        put(plain)
    save_file(
        {name: 2 * tensor for name, tensor in load_file(package / "preview_dit.safetensors").items()}, package / "preview_dit.safetensors"
    )
    with pytest.raises(
        ValueError, match=rf"with a preview_dit of hash {read_header(of_bundled).base_hash}, the package's has [0-9a-f]{{16}}"
    ):
        put(of_bundled, overwrite=True)
    put(whole, overwrite=True)
    assert (package / "preview_dit.safetensors").read_bytes() == whole.read_bytes()


def test_reading_a_header_imports_no_torch(whole):
    code = (
        f"import sys; from sonic.checkpoint.header import read_header; read_header({str(whole)!r}).model; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_recipe_with_another_objective_is_refused_in_a_sentence():
    with pytest.raises(
        ValueError, match=r"the recipe sets objective.teacher_steps, which the chosen objective does not have \(consistency"
    ):
        compose(TRAIN, ["+distill=preview_2step", "objective=dmd"])
