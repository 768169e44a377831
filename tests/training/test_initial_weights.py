"""Training from a converted checkpoint: no rank holds all weights, and mismatches are reported."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from run_files import read_scalars, save_weights
from safetensors.torch import load_file, save_file
from test_engines import launched
from test_objectives import config_of
from torch.testing import assert_close

from sonic.checkpoint import tensor_files
from sonic.checkpoint.bundled import BUNDLED
from sonic.checkpoint.converted import FORMAT
from sonic.checkpoint.load import without_memory
from sonic.cli import compose, run_command
from sonic.commands import train_command
from sonic.commands.train_command import ENTRY
from sonic.config import AdapterConfig, SamplerConfig
from sonic.data.clips import write_index
from sonic.model.dit import AvatarDiT
from sonic.training.build import run_training
from sonic.training.objective_config import DmdConfig, FlowMatchConfig, WindowConfig
from sonic.training.objectives.flow_match import FlowMatch
from sonic.training.train_config import BudgetConfig, CheckpointConfig, DataConfig, LogConfig, SpeedConfig

LORA = AdapterConfig(rank=4, alpha=8.0, targets=["self_attention", "audio_injectors", "mlp_in"])
EARS = AdapterConfig(targets=["audio_encoder", "audio_injectors"])
SAMPLER = SamplerConfig(sample_steps=2)
WHOLE = WindowConfig(reach="clip")
TEACHER_FILE = "preview_dit.safetensors"
GOALS = {
    "dmd": DmdConfig(sampler=SAMPLER, learn=LORA, critic_turns=1, window=WindowConfig(), teacher_guide_scale=2.0),
    "adapter": FlowMatchConfig(window=WHOLE, viseme_weight=0.0, learn=EARS),
}


def model_config():
    return replace(config_of(FlowMatchConfig(), "velocity").model, name="wan_s2v_14b", family="wan", resolution=0)


@pytest.fixture(scope="module")
def ready(tmp_path_factory) -> Path:
    """A converted checkpoint of a model with the 14B's parts, without its size."""
    folder, config = tmp_path_factory.mktemp("ready"), model_config()
    torch.manual_seed(3)
    model = AvatarDiT(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    (folder / "dit").mkdir()
    save_weights(model, folder / "dit" / "model.safetensors")
    sizes = {part: asdict(getattr(config, part)) for part in ("trunk", "audio", "text", "motion")}
    (folder / "manifest.json").write_text(json.dumps({"format": FORMAT, "model": config.name, "config": sizes}))
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    folder, rng, tensors, entries = tmp_path_factory.mktemp("clips"), torch.Generator().manual_seed(0), {}, []
    for name in ("a", "b", "c"):
        made = {"latents": (16, 6, 8, 8), "ref": (16, 1, 8, 8), "audio": (1, 160, 24), "text": (2, 8)}
        tensors |= {f"{name}/{key}": torch.randn(shape, generator=rng) for key, shape in made.items()}
        entries.append({"name": name, "shard": "a.safetensors", "latent_frames": 6, "tensors": list(made)})
    save_file(tensors, folder / "a.safetensors")
    write_index(folder, entries, family="wan")
    return folder


def config(goal, ready, clips, **speed):
    base = config_of(GOALS[goal])
    return replace(
        base, model=replace(model_config(), weights=str(ready)), data=DataConfig(folder=str(clips), window=6),
        budget=BudgetConfig(max_steps=3, batch_size=1, accumulate=2), log=LogConfig(every_steps=1, bar=False),
        speed=SpeedConfig(**speed), checkpoint=CheckpointConfig(every_steps=2),
    )  # fmt: skip


def train_here(folder, settings, export=""):
    """Train, and count the bytes read from the file; runs on every rank."""
    read, part = [], tensor_files.StoredTensor.part
    tensor_files.StoredTensor.part = lambda stored, index: read.append(part(stored, index)) or read[-1]
    try:
        run_training(replace(settings, export=export), Path(folder))
    finally:
        tensor_files.StoredTensor.part = part
    return sum(tensor.numel() for tensor in read)


def losses(folder):
    return torch.tensor([line["student/loss"] for line in read_scalars(folder)])


@pytest.mark.parametrize("goal", GOALS)
def test_each_rank_reads_and_holds_its_slices_and_trains_as_one_process(goal, ready, clips, tmp_path):
    whole = train_here(tmp_path / "one", config(goal, ready, clips), str(tmp_path / "one.safetensors"))
    shares = on_ranks(2, train_here, str(tmp_path / "two"), config(goal, ready, clips, engine="fsdp"), str(tmp_path / "two.safetensors"))
    assert whole == sum(tensor.numel() for tensor in load_file(ready / "dit" / "model.safetensors").values())
    assert sum(shares) == whole and max(shares) < 0.6 * whole
    assert_close(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5, atol=1e-7)
    assert_same_weights(tmp_path / "two.safetensors", tmp_path / "one.safetensors")


def assert_same_weights(found, wanted):
    found, wanted = load_file(found), load_file(wanted)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if not name.endswith("layer_weights"):  # of one layer only, so that its gradient is rounding
            assert_close(found[name], value, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("goal", GOALS)
def test_deepspeed_starts_from_the_checkpoint_and_exports_what_one_process_does(goal, ready, clips, tmp_path):
    pytest.importorskip("deepspeed")
    train_here(tmp_path / "one", config(goal, ready, clips), str(tmp_path / "one.safetensors"))
    settings = config(goal, ready, clips, engine="zero3")
    shares = on_ranks(2, launched, train_here, str(tmp_path / "two"), settings, str(tmp_path / "two.safetensors"))
    assert max(shares) < 0.6 * sum(shares)
    assert_close(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5, atol=1e-7)
    assert_same_weights(tmp_path / "two.safetensors", tmp_path / "one.safetensors")


def test_frozen_weights_are_held_in_half_precision_when_computing_in_it(ready, clips, tmp_path):
    for found in on_ranks(2, precisions, str(tmp_path), config("dmd", ready, clips, engine="fsdp", precision="bfloat16")):
        assert found == {"frozen": torch.bfloat16, "learning": torch.float32}


def precisions(folder, settings):
    from sonic.training.build import engine_of
    from sonic.training.objectives.dmd import DistributionMatching
    from sonic.training.world import join_world

    objective = DistributionMatching(settings, make=without_memory)
    engine = engine_of(settings, join_world(torch.device("cpu")), Path(folder))
    engine.allocate(objective)
    return {("learning" if p.requires_grad else "frozen"): p.dtype for p in objective.networks.base.parameters()}


ALL = ("data.validation_share=0", "log.validation_every=0")  # clips of one video, of which none can be held out


def exit_code(argv, folder=None):
    """Exit code of the command train, started here or in a folder."""
    os.chdir(folder or os.getcwd())
    return run_command(train_command.ENTRY, train_command.train, argv)


def test_batches_that_do_not_divide_end_every_rank_with_code_2_and_leave_nothing(ready, clips, tmp_path):
    argv = ["+train=audio_adapter", f"checkpoint={ready}", f"data.folder={clips}", "data.window=6", "budget.accumulate=3"]
    assert on_ranks(2, launched, exit_code, argv, str(tmp_path)) == [2, 2]
    assert list(tmp_path.iterdir()) == []


def test_memory_that_runs_out_ends_a_training_in_one_sentence_and_keeps_its_checkpoints(ready, clips, tmp_path, monkeypatch, capsys):
    losses_of, turns = FlowMatch.losses, []

    def losses(*arguments):
        turns.append(1)
        if len(turns) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 79.25 GiB. Process 7 has the rest.")
        return losses_of(*arguments)

    monkeypatch.setattr(FlowMatch, "losses", losses)
    monkeypatch.chdir(tmp_path)
    argv = ["+train=audio_adapter", f"checkpoint={ready}", f"data.folder={clips}", "data.window=6", "objective.window.past=2", *ALL]
    small = ["budget.batch_size=2", "budget.accumulate=1", "budget.max_steps=9", "checkpoint.every_steps=1", "export=a.safetensors"]
    here = ["speed.engine=auto", "speed.workers=0", "speed.device=cpu", "log.bar=false"]
    assert exit_code([*argv, *small, *here]) == 1
    output = capsys.readouterr().err
    (line,) = (line for line in output.splitlines() if "rank 0:" in line)
    assert re.search(r"rank 0: CUDA out of memory, Tried to allocate 2.00 GiB, GPU 0 has 79.25 GiB; (less is needed|end what else)", line)
    assert "Traceback" not in output
    assert (tmp_path / "runs/audio_adapter").is_dir() and not (tmp_path / "a.safetensors").exists()


@pytest.fixture
def sentence(tmp_path, monkeypatch, capsys):
    """Runs the command in an empty folder and gives its error message, after checking the exit code and the files."""
    monkeypatch.chdir(tmp_path)

    def run(*argv):
        assert exit_code(argv) == 2
        output = capsys.readouterr().err
        assert "Traceback" not in output and list(tmp_path.iterdir()) == [], output
        return output.strip().splitlines()[-1]

    return run


def test_a_recipe_for_another_model_than_the_checkpoint_is_reported(sentence, ready, clips):
    output = sentence("+distill=live_avatar_2step", f"checkpoint={ready}", f"data.folder={clips}", "speed.engine=local")
    assert "holds wan_s2v_14b; use model=wan_s2v_14b" in output


def test_a_checkpoint_of_other_sizes_than_it_says_is_reported(sentence, ready, clips, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    (other / "dit").symlink_to(ready / "dit")
    manifest = json.loads((ready / "manifest.json").read_text())
    manifest["config"]["trunk"]["ffn_dim"] = 32
    (other / "manifest.json").write_text(json.dumps(manifest))
    recipe = ["+train=audio_adapter", f"data.folder={clips}", "data.window=6", "objective.window.past=2", "speed.engine=local", *ALL]
    assert "has shape [64, 32], the model needs [32, 32]" in sentence(*recipe, f"checkpoint={other}")


@pytest.mark.parametrize("window", [5, 1])
def test_windows_that_are_not_whole_blocks_are_reported_before_anything_is_loaded(window, ready, clips, tmp_path, monkeypatch):
    monkeypatch.setattr("sonic.training.objectives.objective.fill", lambda *loading, **_: pytest.fail("weights were read"))
    settings = config("dmd", ready, clips)
    block = settings.model.rollout.block_frames
    settings.data.window = window
    below = max(1, window // block) * block
    with pytest.raises(
        ValueError, match=f"data.window={window} .* not whole blocks of {block}; use data.window={below} or {below + block}"
    ):
        run_training(settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_engine_without_its_package_names_the_extra(monkeypatch):
    import builtins

    from sonic.training.deepspeed_engine import _check_installed

    real = builtins.__import__
    gone = lambda name, *more: real(name, *more) if not name.startswith("deepspeed") else real("no_such_package")  # noqa: E731
    monkeypatch.setattr(builtins, "__import__", gone)
    with pytest.raises(ValueError, match="zero3 needs the packages deepspeed and accelerate: pip install"):
        _check_installed("zero3", torch.device("cpu"))


@pytest.mark.parametrize(
    ("settings", "sentence_of"),
    [
        ({"engine": "fsdp"}, "torchrun --nproc-per-node"),
        ({"engine": "zero2"}, "torchrun --nproc-per-node|pip install"),
        ({"context": 2}, "speed.context=2 processes to a batch do not divide the 1"),
        ({"replicas": 2}, "speed.replicas=2 copies of the weights, each on speed.context=1 processes to a batch do not divide the 1"),
    ],
)
def test_engines_that_need_several_processes_name_the_launch_command(settings, sentence_of, ready, clips, tmp_path):
    with pytest.raises(ValueError, match=sentence_of):
        run_training(config("adapter", ready, clips, **settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("weights", ["", "teacher"])
def test_flow_matching_starts_from_the_weights_that_are_named_and_says_so(weights, tmp_path, caplog):
    caplog.set_level("INFO")
    made = {"latents": (16, 3, 24, 24), "ref": (16, 1, 24, 24), "audio": (1, 160, 12), "visemes": (12, 5)}
    save_file({f"a/{key}": torch.randn(shape) for key, shape in made.items()}, tmp_path / "a.safetensors")
    write_index(tmp_path, [{"name": "a", "shard": "a.safetensors", "latent_frames": 3, "tensors": list(made)}])
    budget = [
        "budget.max_minutes=0",
        "budget.max_steps=1",
        "budget.batch_size=1",
        "optim.lr=1e-9",
        "log.samples_every=0",
        "speed.threads=1",
    ]
    arguments = [
        "+train=preview_dit",
        f"weights={weights}",
        f"data.folder={tmp_path}",
        "data.window=3",
        f"export={tmp_path}/dit.safetensors",
    ]
    run_training(compose(ENTRY, [*arguments, *budget]), tmp_path / "run")
    found, bundled = (load_file(folder / name)["roles.weight"] for folder, name in ((tmp_path, "dit.safetensors"), (BUNDLED, TEACHER_FILE)))
    assert (float((found - bundled).abs().max()) < 1e-3) == bool(weights)
    start = str(BUNDLED / TEACHER_FILE) if weights else "random weights, seed 0"
    assert f"the training begins from {start}" in caplog.text
