"""Builds the encoders that make data sets: the model's speech encoder and its trained autoencoder; and hashes of their weights."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F

from sonic.checkpoint.converted import Checkpoint
from sonic.checkpoint.official import VAE_FILE
from sonic.checkpoint.tensor_files import survey
from sonic.checkpoint.weights import load_weights
from sonic.config import ModelConfig
from sonic.data.data_config import PrecomputeConfig
from sonic.data.precompute import Encoders
from sonic.encoders.speech import SPEECH_ENCODERS
from sonic.inference.components import AUTOENCODERS, find_device, transformer_weights, weight_files
from sonic.types import pick

AUTOENCODER, SPEECH = "autoencoder_hash", "speech_hash"  # keys of the metadata of shards and indexes
SPEECH_FILES = ("model.safetensors", "pytorch_model.bin")  # file names of a published wav2vec


def build_encoders(config: PrecomputeConfig) -> Encoders:
    """Build the encoders of the configured model that the data need. Raises ValueError when their weights are missing."""
    if config.kind == "spoken":
        return Encoders(None, None)
    return pick(BUILDERS, config.model.autoencoder, "model.autoencoder")(config)


def hashes_of(model: ModelConfig, autoencoder: str = "") -> dict[str, str]:
    """A hash of 16 digits of each encoder's weights (`autoencoder` = a file in place of the model's own); "" when the model has no
    weights for it, as a published model without its checkpoint."""
    if model.autoencoder == "wan":
        return _published_hashes(_checkpoint(model)) if model.weights else {AUTOENCODER: "", SPEECH: ""}
    files = weight_files(model)
    return {AUTOENCODER: _digest(Path(autoencoder) if autoencoder else files.autoencoder), SPEECH: _digest(files.speech)}


def clip_hashes(config: PrecomputeConfig) -> dict[str, str]:
    """The hashes of the encoders that clips would be made with now; {} for kind "spoken", which needs none."""
    return {} if config.kind == "spoken" else hashes_of(config.model, config.autoencoder)


def _published_hashes(checkpoint: Checkpoint) -> dict[str, str]:
    """Hashes of a published model's VAE and wav2vec, from the digests of the files they were converted from."""
    return {AUTOENCODER: checkpoint.source_hash(VAE_FILE)[:16], SPEECH: checkpoint.source_hash(*SPEECH_FILES)[:16]}


def _digest(path: Path) -> str:
    """A hash of 16 digits of the tensors in a file; "" when it does not exist."""
    if not path.is_file():
        return ""
    digest = hashlib.sha256()
    for name, stored in sorted(survey(path).items()):
        tensor = stored.whole()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _preview_encoders(config: PrecomputeConfig) -> Encoders:
    """Encoders of the preview model, which has no text encoder."""
    files = weight_files(config.model)
    speech = pick(SPEECH_ENCODERS, config.model.speech_encoder, "model.speech_encoder")()
    autoencoder = pick(AUTOENCODERS, config.model.autoencoder, "model.autoencoder")()
    load_weights(speech, files.speech)
    load_weights(autoencoder, Path(config.autoencoder) if config.autoencoder else files.autoencoder)
    return Encoders(
        speech.eval().encode_audio, autoencoder.eval().requires_grad_(False), None, clip_hashes(config), config.model.rollout.fps
    )


def _wan_encoders(config: PrecomputeConfig) -> Encoders:
    """Encoders of a published model, from its converted checkpoint, on the machine's accelerator if it has one."""
    checkpoint, device = _checkpoint(config.model), find_device("auto")
    if not config.data.source:
        raise ValueError(f"model={config.model.name} learns from videos: name a folder of them as data.source=FOLDER")
    length, fps = checkpoint.config(config.model).text.text_len, config.model.rollout.fps
    rows = checkpoint.reader(length, device)
    return Encoders(
        encode_audio=lambda samples, frames: checkpoint.speech_encoder(device).encode_audio(samples, frames, fps),
        autoencoder=checkpoint.autoencoder(device, torch.float32),
        read=lambda prompt: F.pad(found := rows(prompt)[0].cpu(), (0, 0, 0, length - len(found))),
        hashes=_published_hashes(checkpoint),
        fps=fps,
    )


BUILDERS = {"warp": _preview_encoders, "wan": _wan_encoders}  # by model.autoencoder


def _checkpoint(model: ModelConfig) -> Checkpoint:
    return Checkpoint.open(transformer_weights(model).parent)
