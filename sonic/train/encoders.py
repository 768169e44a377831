"""The encoders that data sets are made with: the model's own speech encoder and its trained autoencoder."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from sonic.checkpoint.ready import Ready
from sonic.config import ModelConfig
from sonic.data.precompute import Encoders
from sonic.data.settings import PrecomputeConfig
from sonic.infer.build import AUTOENCODERS, find_device, transformer_weights, weight_files
from sonic.model.speech_encoder import SPEECH_ENCODERS
from sonic.model.weights import load_weights
from sonic.types import pick


def build_encoders(config: PrecomputeConfig) -> Encoders:
    """Encoders of the configured model, where the data need them. Raises ValueError without their weights."""
    if config.kind == "spoken":
        return Encoders(None, None)
    return pick(BUILDERS, config.model.autoencoder, "model.autoencoder")(config)


def autoencoder_hash(model: ModelConfig, weights: str = "") -> str:
    """16 digits that say which weights the model's autoencoder has (`weights` = a file instead of the model's own); "" when it has
    none, as a published model without its checkpoint."""
    if model.autoencoder == "wan":
        return _checkpoint(model).autoencoder_hash() if model.weights else ""
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(Path(weights) if weights else weight_files(model).autoencoder).items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _moving(config: PrecomputeConfig) -> Encoders:
    """Those of a model that moves the photograph; it reads no prompts."""
    files = weight_files(config.model)
    speech = pick(SPEECH_ENCODERS, config.model.speech_encoder, "model.speech_encoder")()
    autoencoder = pick(AUTOENCODERS, config.model.autoencoder, "model.autoencoder")()
    load_weights(speech, files.speech)
    load_weights(autoencoder, Path(config.autoencoder) if config.autoencoder else files.autoencoder)
    known = autoencoder_hash(config.model, config.autoencoder)
    return Encoders(speech.eval().hear, autoencoder.eval().requires_grad_(False), None, known, config.model.rollout.fps)


def _painting(config: PrecomputeConfig) -> Encoders:
    """Those of a published model, out of its ready checkpoint, on the machine's accelerator where there is one."""
    checkpoint, device = _checkpoint(config.model), find_device("auto")
    if not config.data.source:
        raise ValueError(f"model={config.model.name} learns from videos: name a folder of them as data.source=FOLDER")
    length, fps = checkpoint.config(config.model).text.text_len, config.model.rollout.fps
    rows = checkpoint.reader(length, device)
    return Encoders(
        hear=lambda samples, frames: checkpoint.hear(samples, frames, fps=fps, device=device)[0].cpu(),
        autoencoder=checkpoint.autoencoder(device, torch.float32),
        read=lambda prompt: F.pad(found := rows(prompt)[0].cpu(), (0, 0, 0, length - len(found))),
        autoencoder_hash=checkpoint.autoencoder_hash(),
        fps=fps,
    )


BUILDERS = {"warp": _moving, "wan": _painting}  # by model.autoencoder


def _checkpoint(model: ModelConfig) -> Ready:
    return Ready.open(transformer_weights(model).parent)
