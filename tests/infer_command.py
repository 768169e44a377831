"""Runs the command infer in this process, with a model so small that a video takes little time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile
import torch
from PIL import Image
from run_files import save_weights
from skimage import data

from sonic.cli import Entry, compose
from sonic.config import ModelConfig
from sonic.encoders.logmel import LogMelEncoder
from sonic.families.preview import PreviewComponents
from sonic.inference.infer_config import InferConfig
from sonic.model.dit import AvatarDiT
from sonic.parallel.context import DistributedContext
from sonic.types import FaceBox, Inputs, Mouth, Portrait, Speech
from sonic.vae.motion_vae import WarpAutoencoder

ROOT = Path(__file__).resolve().parents[1]
TINY = (
    "model.trunk.hidden_dim=48",
    "model.trunk.ffn_dim=64",
    "model.trunk.num_heads=2",
    "model.trunk.num_layers=2",
    "model.trunk.freq_dim=32",
    "model.audio.inject_layers=[0]",
    "model.resolution=96",
    "sampler.sample_steps=1",
    "device=cpu",
)
FACE = ("face_box=[165,70,115,115]", "face.mouth=[223,160,22,0.0]")  # of the astronaut, to skip the detection


def untrained_components(config: ModelConfig) -> PreviewComponents:
    """The components of a preview model on the CPU, with their initial weights."""
    model, autoencoder, speech = (module.eval().requires_grad_(False) for module in (AvatarDiT(config), WarpAutoencoder(), LogMelEncoder()))
    built = {"model": model, "autoencoder": autoencoder, "speech": speech}
    return PreviewComponents(config, DistributedContext(), lambda: autoencoder, **built)


def tiny_components(seed: int = 0) -> PreviewComponents:
    """Components with random weights, none of them zero."""
    torch.manual_seed(seed)
    components = untrained_components(compose(Entry("infer", InferConfig), TINY).model)
    for module in (components.model, components.autoencoder, components.speech):
        for weight in module.parameters():
            weight.add_(torch.randn_like(weight) * 0.02)
    return components


def write_weights(folder: Path) -> Path:
    """A folder of weights for the tiny model."""
    components = tiny_components()
    folder.mkdir(parents=True)
    save_weights(components.model, folder / "preview_dit.safetensors")
    save_weights(components.autoencoder, folder / "preview_autoencoder.safetensors")
    save_weights(components.speech, folder / "preview_speech.safetensors")
    return folder


def write_files(folder: Path, seconds: float) -> Path:
    """A portrait me.png, a recording me.wav and the weights of the tiny model in a folder."""
    Image.fromarray(data.astronaut()).save(folder / "me.png")
    write_wav(folder / "me.wav", babble(seconds))
    write_weights(folder / "weights")
    return folder


def pipeline_options(folder: Path) -> dict:
    """The tiny model as the Python face takes it."""
    return {**dict(item.split("=", 1) for item in (*TINY, *FACE)), "weights": folder / "weights", "run.threads": 1}


def babble(seconds: float, seed: int = 0) -> np.ndarray:
    """Loud, changing sound at 16 kHz."""
    time = np.arange(round(16_000 * seconds)) / 16_000
    noise = np.random.default_rng(seed).normal(size=len(time))
    return (0.1 * noise * (1 + np.sin(2 * np.pi * 3 * time))).astype(np.float32)


def write_wav(path: Path, samples: np.ndarray, rate: int = 16_000) -> Path:
    """A recording on disk, as float samples."""
    soundfile.write(path, samples, rate, subtype="FLOAT")
    return path


def small_inputs(num_frames: int = 30, seed: int = 0) -> Inputs:
    """A picture of noise with a face in the middle, and babble as long as the video."""
    pixels = np.random.default_rng(1).integers(0, 256, (128, 160, 3), np.uint8)
    portrait = Portrait(pixels, FaceBox(40, 24, 80, 80), Mouth(80, 88, 16))
    return Inputs(portrait, Speech(babble(num_frames / 25)), num_frames, seed)
