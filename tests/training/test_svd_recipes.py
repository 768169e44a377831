"""Sonic's recipes from a converted checkpoint to a file that videos are made with, at the size of the recorded cases."""

from __future__ import annotations

import pytest
import torch
from run_files import read_scalars
from safetensors.torch import load_file, save_file
from sonic_folder_tiny import golden_folder

from sonic.checkpoint.header import read_header
from sonic.checkpoint.lora import read_lora
from sonic.cli import compose
from sonic.commands import infer_command, train_command
from sonic.config import RunConfig
from sonic.data.clips import write_index
from sonic.families.family import family_of
from sonic.parallel.context import DistributedContext
from sonic.parallel.mesh import World
from sonic.training.build import run_training

SIZE, FRAMES, LONG = 8, 6, 9


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Clips of four videos, of random tensors."""
    folder, tensors, entries = tmp_path_factory.mktemp("clips"), {}, []
    for number in range(4):
        rng = torch.Generator().manual_seed(number)
        some = lambda *shape: torch.randn(shape, generator=rng)  # noqa: E731, B023
        made = {
            "latents": some(4, LONG, SIZE, SIZE), "image_latents": some(4, SIZE, SIZE), "image_embed": some(24),
            "buckets": 16 + some(LONG, 2),
            "face_mask": torch.ones(8 * SIZE, 8 * SIZE), "token_ticks": some(LONG, 10, 5, 16), "bucket_ticks": some(LONG, 50, 16),
        }  # fmt: skip
        tensors |= {f"{number}/{key}": tensor for key, tensor in made.items()}
        entry = {"name": str(number), "video": f"{number}.mp4", "shard": "a.safetensors", "latent_frames": LONG}
        entries.append({**entry, "tensors": list(made)})
    save_file(tensors, folder / "a.safetensors")
    write_index(folder, entries, family="sonic_svd")
    return folder


def trained(recipe, clips, folder, *options):
    """Train by a recipe, made small. Returns the exported file."""
    small = ["budget.max_steps=2", "budget.accumulate=2", "speed.device=cpu", "speed.workers=0", "speed.precision=float32", "log.bar=false"]
    sizes = [f"data.window={FRAMES}", f"model.unet.window_frames={FRAMES}", "log.every_steps=1", f"data.folder={clips}"]
    where = [f"export={folder / 'out.safetensors'}", "optim.warmup_steps=1", "optim.ema_decay=0.5"]
    run_training(compose(train_command.ENTRY, [recipe, *small, *sizes, *where, *options]), folder)
    return folder / "out.safetensors"


def test_trained_conditions_are_distilled_and_load_over_the_checkpoint(clips, tmp_path):
    checks = ["data.validation_share=0.4", "log.validation_every=1"]
    audio = trained("+train=sonic_svd_audio", clips, tmp_path / "audio", f"checkpoint={golden_folder()}", "optim.lr=1e-2", *checks)
    changes, header = read_lora(audio), read_header(audio)
    assert len(changes.replaced) % 2 == 0 and all("_ip.0.weight" in name for name in changes.replaced)
    assert {name.split(".")[0] for name in changes.beside} == {"audio2token", "audio2bucket"} and not changes.adapters
    changes.check_base(golden_folder() / "unet")
    assert header.base and header.objective == "svd_audio" and not header.sampler
    assert len([line for line in read_scalars(tmp_path / "audio") if "eval/validation_loss_sigma_0.7" in line]) == 2

    student = trained("+distill=sonic_svd_8step", clips, tmp_path / "student", f"weights={audio}", "objective.learn.rank=2")
    found = read_lora(student)
    assert found.adapters and {**found.replaced}.keys() == {**changes.replaced}.keys() and found.beside.keys() == changes.beside.keys()
    for name, stored in changes.replaced.items():
        assert torch.equal(found.replaced[name].whole().float(), stored.whole().float())
    assert read_header(student).sampler["sample_steps"] == 8 and read_header(student).sampler["schedule"] == "karras"
    assert read_header(student).base_hash == header.base_hash

    for file in (audio, student):
        config = compose(infer_command.ENTRY, [f"weights={file}"]).model
        context, family = DistributedContext(World("single", torch.device("cpu"))), family_of(config)
        unet = family.build_model(config, RunConfig(), context=context, dtype=torch.float32, steps=8).state_dict()
        sound = family.components(config, context, torch.float32).speech().state_dict()
        for name, stored in changes.replaced.items():
            assert name in found.adapters or torch.equal(unet[name], stored.whole().float())
        for name, stored in changes.beside.items():
            own = name.replace("audio2token", "tokens").replace("audio2bucket", "buckets")
            assert torch.equal(sound[own], stored.whole().float())

    config = compose(infer_command.ENTRY, [f"weights={student}"])
    assert config.model.lora.path == str(student) and config.model.weights == str(golden_folder())
    assert (config.sampler.sample_steps, config.sampler.sample_guide_scale, config.sampler.audio_guide_scale) == (8, 1, 1)


def test_a_training_goes_on_from_what_an_earlier_one_exported(clips, tmp_path):
    given = ("+train=sonic_svd_audio", clips), (f"checkpoint={golden_folder()}", "budget.max_steps=1")
    first = trained(*given[0], tmp_path / "first", *given[1], "optim.lr=1e-2")
    again = trained(*given[0], tmp_path / "again", *given[1], "optim.lr=1e-12", f"init_from={first}")
    ours = load_file(again)
    for name, tensor in load_file(first).items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-3, rtol=1e-3)
