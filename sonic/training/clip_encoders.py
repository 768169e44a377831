"""The encoders that data sets are made with: the model's own speech encoder and its trained autoencoder."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F

from sonic.checkpoint.converted import Ready
from sonic.checkpoint.weights import load_weights, read_tensors
from sonic.config import ModelConfig
from sonic.data.data_config import PrecomputeConfig
from sonic.data.precompute import Encoders
from sonic.encoders.speech import SPEECH_ENCODERS
from sonic.inference.components import AUTOENCODERS, find_device, transformer_weights, weight_files
from sonic.types import pick

AUTOENCODER, SPEECH = "autoencoder_hash", "speech_hash"  # what shards and their index call them
SPEECH_FILES = ("model.safetensors", "pytorch_model.bin")  # that a published wav2vec may come in


def build_encoders(config: PrecomputeConfig) -> Encoders:
    """Encoders of the configured model, where the data need them. Raises ValueError without their weights."""
    if config.kind == "spoken":
        return Encoders(None, None)
    return pick(BUILDERS, config.model.autoencoder, "model.autoencoder")(config)


def hashes_of(model: ModelConfig, autoencoder: str = "") -> dict[str, str]:
    """16 digits for each encoder that say which weights the model has for it (`autoencoder` = a file instead of the model's own);
    "" where it has none, as a published model without its checkpoint."""
    if model.autoencoder == "wan":
        return _published_hashes(_checkpoint(model)) if model.weights else {AUTOENCODER: "", SPEECH: ""}
    files = weight_files(model)
    return {AUTOENCODER: _digest(Path(autoencoder) if autoencoder else files.autoencoder), SPEECH: _digest(files.speech)}


def clip_hashes(config: PrecomputeConfig) -> dict[str, str]:
    """Those of what clips are made with now; recorded speech alone needs no encoder."""
    return {} if config.kind == "spoken" else hashes_of(config.model, config.autoencoder)


def _published_hashes(checkpoint: Ready) -> dict[str, str]:
    """From what its VAE and its wav2vec were made of."""
    sources = checkpoint.manifest["sources"]
    speech = next((digest for file, digest in sources.items() if file in SPEECH_FILES), "")
    return {AUTOENCODER: checkpoint.autoencoder_hash(), SPEECH: speech[:16]}


def _digest(path: Path) -> str:
    """16 digits of the tensors in a file; "" when there is none."""
    if not path.is_file():
        return ""
    digest = hashlib.sha256()
    for name, tensor in sorted(read_tensors(path).items()):
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
    return Encoders(speech.eval().hear, autoencoder.eval().requires_grad_(False), None, clip_hashes(config), config.model.rollout.fps)


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
        hashes=_published_hashes(checkpoint),
        fps=fps,
    )


BUILDERS = {"warp": _moving, "wan": _painting}  # by model.autoencoder


def _checkpoint(model: ModelConfig) -> Ready:
    return Ready.open(transformer_weights(model).parent)
