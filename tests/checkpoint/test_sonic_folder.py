"""Conversion of the folder that Sonic is downloaded as."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import signal
import sys
from collections.abc import Callable
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_command import convert, tensors_of
from safetensors.torch import load_file, save_file
from sonic_folder_tiny import CLIP, VAE, WHISPER, golden_checkpoint, golden_folder, golden_weights
from test_interrupted_conversion import files_of, killed_in_shard, times_of

from sonic.arguments import model_choice
from sonic.checkpoint import convert as conversion
from sonic.checkpoint import sonic_folder
from sonic.checkpoint.official import DIT_STEM, shapes_of
from sonic.checkpoint.sonic_folder import BUCKETS, PARTS, RIFE, SVD, TOKENS, UNET
from sonic.checkpoint.tensor_files import StoredTensor
from sonic.config import ModelConfig, UNetConfig
from sonic.encoders.clip_image import ClipImageEncoder
from sonic.encoders.clip_sound import FrameBuckets, FrameTokens
from sonic.encoders.whisper import WhisperEncoder
from sonic.model.svd_unet import SvdUNet
from sonic.vae.rife import UNUSED, Rife
from sonic.vae.svd_vae import PUBLISHED, SvdAutoencoder

SHARD = 4_000_000  # bytes, so that the UNet has several shards
WHISPER_TINY = {"d_model": 384, "encoder_layers": 4, "encoder_attention_heads": 6, "encoder_ffn_dim": 1536}
VAE_FILE, CLIP_FILE = f"{SVD}/vae/diffusion_pytorch_model.fp16.safetensors", f"{SVD}/image_encoder/model.fp16.safetensors"
WHISPER_FILE = "whisper-tiny/model.safetensors"
NETWORKS: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
    UNET: lambda: SvdUNet(UNetConfig()).state_dict(),
    f"{SVD}/unet": lambda: {name: each for name, each in SvdUNet(UNetConfig()).state_dict().items() if ".processor." not in name},
    TOKENS: lambda: FrameTokens().state_dict(),
    BUCKETS: lambda: FrameBuckets().state_dict(),
    VAE_FILE: lambda: SvdAutoencoder().blocks.state_dict(),
    CLIP_FILE: lambda: ClipImageEncoder().network.state_dict(),
    WHISPER_FILE: lambda: WhisperEncoder(WHISPER_TINY).encoder.state_dict(),
    RIFE: lambda: Rife().state_dict(),
}
PUBLISHED_LISTS = {  # tensors, numbers, and the beginning of the hash of the sorted lines "name [shape]"; of Whisper its encoder
    UNET: (1492, 1_575_741_162, "d6eb9410e3245902"),
    f"{SVD}/unet": (1428, 1_524_623_082, "fed4cc54bd409e97"),
    TOKENS: (8, 54_300_672, "06423100e6ac5f08"),
    BUCKETS: (6, 21_762_050, "33493fdf3cc71de9"),
    VAE_FILE: (374, 97_742_847, "258775fe3fbea0a2"),
    CLIP_FILE: (520, 632_076_800, "d260f16faa7589f6"),
    WHISPER_FILE: (67, 8_208_384, "90ba912ba5834e2c"),
    RIFE: (120, 2_277_600, "06d795d1284444ad"),
}


def copied(folder: Path) -> Path:
    """A copy of the small download that a test may change."""
    return shutil.copytree(golden_folder().parent / "checkpoints", folder / "checkpoints")


@pytest.mark.parametrize("file", PUBLISHED_LISTS)
def test_the_networks_have_the_published_names_and_shapes(file):
    shapes = shapes_of(NETWORKS[file])
    lines = "\n".join(sorted(f"{name} {list(shape)}" for name, shape in shapes.items()))
    numbers = sum(prod(shape) for shape in shapes.values())
    assert (len(shapes), numbers, sha256(lines.encode()).hexdigest()[:16]) == PUBLISHED_LISTS[file]


def test_the_published_sizes_are_read_from_the_tensors(tmp_path, monkeypatch):
    prefixes = {RIFE: "module.", WHISPER_FILE: "model.encoder."}

    def published(path: Path) -> dict[str, StoredTensor]:
        file = path.relative_to(tmp_path).as_posix()
        shapes = shapes_of(NETWORKS[file])
        return {f"{prefixes.get(file, '')}{name}": StoredTensor(path, name, shape, "F16") for name, shape in shapes.items()}

    for file in (UNET, TOKENS, BUCKETS, RIFE, VAE_FILE, CLIP_FILE, WHISPER_FILE):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    for part, config in (
        (f"{SVD}/vae", PUBLISHED),
        (f"{SVD}/image_encoder", {}),
        ("whisper-tiny", {**WHISPER_TINY, "model_type": "whisper"}),
    ):
        (tmp_path / part / "config.json").write_text(json.dumps(config))
    for module in ("sonic_folder", "official", "tensor_files"):
        monkeypatch.setattr(f"sonic.checkpoint.{module}.survey", published)
    base = ModelConfig(unet=UNetConfig([32, 64], [1, 1], window_frames=11))
    found = sonic_folder.networks(tmp_path, base)
    assert UNetConfig(**found.config["unet"]) == UNetConfig()
    assert sum(part.nbytes(tensor) for part in found.components.values() for tensor in part.tensors.values()) == 2 * sum(
        numbers for file, (_, numbers, _) in PUBLISHED_LISTS.items() if file != f"{SVD}/unet"
    )


def test_the_converted_networks_have_the_downloaded_weights():
    checkpoint, cpu = golden_checkpoint(), torch.device("cpu")
    speech, rife = checkpoint.speech(cpu), golden_weights("rife_tiny")
    for found, wanted in (
        (tensors_of(checkpoint.unet_weights, "model"), golden_weights("unet_tiny")),
        (checkpoint.autoencoder(cpu, torch.float32).blocks.state_dict(), golden_weights("vae_tiny")),
        (checkpoint.image_encoder(cpu, torch.float32).network.state_dict(), golden_weights("clip_tiny")),
        (speech.tokens.state_dict(), golden_weights("audio2token_tiny")),
        (speech.buckets.state_dict(), golden_weights("audio2bucket_tiny")),
        ({f"encoder.{name}": each for name, each in speech.whisper.encoder.state_dict().items()}, golden_weights("whisper_tiny_random")),
        (checkpoint.rife(cpu).state_dict(), {name: each for name, each in rife.items() if not name.startswith(UNUSED)}),
    ):
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], each) or torch.equal(found[name], each.half().float()) for name, each in wanted.items())


def test_the_networks_are_loaded_whole_and_in_the_precision_that_is_asked_for():
    checkpoint, cpu = golden_checkpoint(), torch.device("cpu")
    encoder = checkpoint.image_encoder(cpu, torch.bfloat16)
    for network in (encoder, checkpoint.autoencoder(cpu, torch.bfloat16), checkpoint.speech(cpu, torch.bfloat16)):
        assert {weight.dtype for weight in network.parameters()} == {torch.bfloat16}
        assert not any(tensor.is_meta for tensor in [*network.parameters(), *network.buffers()])
    assert encoder(torch.zeros(1, 3, 224, 224)).shape == (1, 24)


def test_the_manifest_records_sizes_sources_and_licence(tmp_path, capfd):
    download = copied(tmp_path)
    (download / CLIP_FILE).rename(download / f"{SVD}/image_encoder/model.safetensors")
    assert convert(f"source={download}", "model=sonic_svd", f"output={tmp_path / 'out'}") == 0
    text = capfd.readouterr()
    assert "may not be used commercially" in text.err and "unet: 1070 tensors of" in text.out + text.err
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert "commercially" in manifest["licence"] and manifest["model"] == "sonic_svd"
    assert manifest["config"]["unet"] == {
        "block_out_channels": [32, 32, 64], "num_attention_heads": [2, 4, 8], "layers_per_block": 2, "cross_attention_dim": 24,
        "addition_time_embed_dim": 16, "audio_tokens": 5,
    }  # fmt: skip
    for file in ("unet.pth", "image_encoder/model.safetensors", "whisper-tiny/model.safetensors"):
        path = next(path for path in download.rglob("*") if path.as_posix().endswith(f"/{file}"))
        assert manifest["sources"][file] == sha256(path.read_bytes()).hexdigest()
    assert manifest["hashes"]["unet"] == manifest["sources"]["unet.pth"][:16]


def test_the_folder_is_recognised_and_keeps_the_windows_of_the_options():
    assert model_choice(str(golden_folder())) == {"model": "sonic_svd", "model.weights": str(golden_folder())}
    base = ModelConfig(name="sonic_svd", unet=UNetConfig(window_frames=6))
    found = golden_checkpoint().config(base).unet
    assert (found.window_frames, found.block_out_channels, found.num_attention_heads) == (6, [32, 32, 64], [2, 4, 8])


@pytest.mark.parametrize("arrangement", ["published", "the folder above", "repositories", "side by side"])
def test_the_parts_are_found_however_they_lie(tmp_path, arrangement):
    folder = copied(tmp_path)
    if arrangement == "the folder above":
        folder = tmp_path
    elif arrangement == "repositories":
        (tmp_path / "Sonic").mkdir()
        for name in ("Sonic", "RIFE"):
            (folder / name).rename(tmp_path / "Sonic" / name)
        (folder / "whisper-tiny").rename(tmp_path / "whisper-tiny")
        (folder / SVD).rename(tmp_path / SVD)
        folder = tmp_path
    elif arrangement == "side by side":
        for part in (*PARTS, f"{SVD}/unet"):
            (folder / part).rename(tmp_path / Path(part).name)
        folder = tmp_path
    found = sonic_folder.networks(folder, ModelConfig())
    assert {name: len(part.tensors) for name, part in found.components.items()} == golden_checkpoint().manifest["tensors"]
    assert found.config["unet"]["num_attention_heads"] == [2, 4, 8]


def test_the_unet_goes_back_to_its_published_names(tmp_path):
    assert convert(f"source={golden_folder()}", "model=sonic_svd", "to=official", f"output={tmp_path / 'back'}") == 0
    found, wanted = tensors_of(tmp_path / "back", DIT_STEM), golden_weights("unet_tiny")
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_killed_conversion_is_continued(tmp_path, monkeypatch):
    source = f"source={copied(tmp_path)}"
    argv = [source, "model=sonic_svd", f"output={tmp_path / 'out'}"]
    process = multiprocessing.get_context("forkserver").Process(target=killed_in_shard, args=(2, *argv), kwargs={"shard": SHARD})
    process.start()
    process.join(timeout=240)
    assert process.exitcode == -signal.SIGKILL and not (tmp_path / "out").exists()
    left = tmp_path / "out.partial"
    before = times_of(left / "unet")
    assert len(before) == 1 and len(list(left.rglob("*.part"))) == 1
    monkeypatch.setattr(conversion, "SHARD_BYTES", SHARD)
    assert convert(*argv) == 0
    assert before.items() <= times_of(tmp_path / "out/unet").items()
    assert convert(*argv[:2], f"output={tmp_path / 'whole'}") == 0
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole") and not left.exists()


class Code:
    def __reduce__(self):
        return (sys.exit, (7,))


Damage = Callable[[Path], None]


def tensors_changed(file: str, change: Callable[[dict], Any]) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / file
        pickled = path.suffix != ".safetensors"
        tensors = torch.load(path, weights_only=True) if pickled else load_file(path)
        change(tensors)
        torch.save(tensors, path) if pickled else save_file(tensors, path)

    return damage


def cut(file: str, kept: int = -100) -> Damage:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:kept])


def missing(part: str) -> Damage:
    return lambda folder: shutil.rmtree(folder / part) if (folder / part).is_dir() else (folder / part).unlink()


def config_of(part: str, given: dict) -> Damage:
    return lambda folder: (folder / part / "config.json").write_text(json.dumps(given))


DAMAGE: dict[str, tuple[Damage, tuple[str, ...]]] = {  # what is done to the folder, and words of the error
    **{f"without {part}": (missing(part), (part, "does not exist")) for part in PARTS},
    **{f"{file} cut off": (cut(file), (Path(file).name, "cut short")) for file in (UNET, TOKENS, BUCKETS, RIFE)},
    **{f"{file} cut off": (cut(file), (Path(file).name, "are not all there")) for file in (VAE_FILE, CLIP_FILE, WHISPER_FILE)},
    **{
        f"code in {file}": (tensors_changed(file, lambda held: held.update(code=Code())), (Path(file).name, "no code in it was run"))
        for file in (UNET, TOKENS, BUCKETS, RIFE)
    },
    "a file of tensors without weights": (missing(VAE_FILE), ("vae/diffusion_pytorch_model.safetensors", "does not exist")),
    "empty file": (cut(UNET, 0), ("unet.pth", "not a file of tensors")),
    "no adapters": (
        tensors_changed(UNET, lambda held: [held.pop(name) for name in list(held) if "_ip." in name]),
        ("unet.pth", "processor.to_k_ip.0.weight", "missing"),
    ),
    "tensor too many": (tensors_changed(UNET, lambda held: held.update(surprise=torch.zeros(1))), ("surprise", "no place in the UNet")),
    "whole numbers": (tensors_changed(BUCKETS, lambda held: held.update({"proj3.bias": torch.zeros(2, dtype=torch.int32)})), ("int32",)),
    "shape off by one": (
        tensors_changed(TOKENS, lambda held: held.update({"proj2.bias": torch.zeros(41)})),
        ("proj2.bias", "[41]", "[40]"),
    ),
    "another network": (tensors_changed(RIFE, lambda held: (held.clear(), held.update(a=torch.zeros(1)))), ("flownet.pkl", "block0.conv0")),
    "heads that do not divide": (config_of(f"{SVD}/unet", {"num_attention_heads": [3, 4, 8]}), ("[3, 4, 8] heads", "num_attention_heads")),
    "heads of another network": (config_of(f"{SVD}/unet", {"num_attention_heads": [5, 10, 20, 20]}), ("heads", "[32, 32, 64]")),
    "no heads": (missing(f"{SVD}/unet"), ("unet/config.json", "num_attention_heads")),
    "another VAE": (config_of(f"{SVD}/vae", {**VAE, "layers_per_block": 2}), (VAE_FILE, "of the VAE is missing")),
    "another CLIP": (config_of(f"{SVD}/image_encoder", {**CLIP, "hidden_size": 32}), (CLIP_FILE, "shape")),
    "another speech encoder": (config_of("whisper-tiny", {**WHISPER, "model_type": "wav2vec2"}), ("wav2vec2, not whisper",)),
    "config cut off": (cut(f"{SVD}/vae/config.json", 20), ("config.json", "not JSON")),
    "states of another width": (
        tensors_changed(TOKENS, lambda held: held.update({"proj1.weight": torch.zeros(40, 400)})),
        ("whisper-tiny", "states of a window: 800", "reads 400"),
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_reported_in_one_sentence_and_nothing_is_written(tmp_path, capfd, kind):
    damage, words = DAMAGE[kind]
    folder = copied(tmp_path)
    damage(folder)
    before = sorted(tmp_path.iterdir())
    assert convert(f"source={folder}", "model=sonic_svd", f"output={tmp_path / 'out'}") == 2
    error = capfd.readouterr().err
    assert error.count("sonic: error") == 1 and "Traceback" not in error and all(word in error for word in words), error
    assert sorted(tmp_path.iterdir()) == before
