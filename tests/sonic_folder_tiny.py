"""A small download of Sonic in the published formats, with the weights of the recorded cases, and its conversion.

`golden_download(folder)` writes the download; `golden_checkpoint()` converts one, once for all tests of a process.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path

import torch
from convert_command import convert
from safetensors.torch import load_file, save_file
from torch import Tensor

from sonic.checkpoint.sonic_checkpoint import SonicCheckpoint
from sonic.checkpoint.sonic_folder import SVD

WEIGHTS = Path(os.environ.get("SONIC_GOLDEN_SVD") or Path(__file__).parent / "golden_sonic") / "weights"
HEADS = [2, 4, 8]
CLIP = {
    "hidden_size": 16, "intermediate_size": 32, "projection_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_channels": 3,
    "image_size": 224, "patch_size": 32, "hidden_act": "gelu", "model_type": "clip_vision_model",
}  # fmt: skip
VAE = {
    "_class_name": "AutoencoderKLTemporalDecoder", "in_channels": 3, "out_channels": 3, "down_block_types": ["DownEncoderBlock2D"] * 4,
    "block_out_channels": [32] * 4, "layers_per_block": 1, "latent_channels": 4, "sample_size": 64, "scaling_factor": 0.18215,
    "force_upcast": True,
}  # fmt: skip
WHISPER = {
    "model_type": "whisper", "d_model": 16, "encoder_layers": 4, "encoder_attention_heads": 2, "encoder_ffn_dim": 40, "num_mel_bins": 80,
    "max_source_positions": 1500,
}  # fmt: skip
UNET_OPTIONS = ["model=sonic_svd", "model.unet.window_frames=6"]  # of tests with the small checkpoint: windows that are quickly computed


def golden_weights(network: str) -> dict[str, Tensor]:
    """The recorded weights of a network, in float32."""
    return {name: tensor.float() for name, tensor in load_file(WEIGHTS / f"{network}.safetensors").items()}


def golden_download(folder: Path) -> Path:
    """Write a folder like the published checkpoints/."""
    svd, whisper = folder / SVD, folder / "whisper-tiny"
    for part in (folder / "Sonic", folder / "RIFE", whisper, svd / "unet", svd / "vae", svd / "image_encoder"):
        part.mkdir(parents=True)
    torch.save(golden_weights("unet_tiny"), folder / "Sonic/unet.pth")
    torch.save(golden_weights("audio2token_tiny"), folder / "Sonic/audio2token.pth")
    torch.save(golden_weights("audio2bucket_tiny"), folder / "Sonic/audio2bucket.pth")
    torch.save({f"module.{name}": tensor for name, tensor in golden_weights("rife_tiny").items()}, folder / "RIFE/flownet.pkl")
    half = {name: tensor.half() for name, tensor in golden_weights("vae_tiny").items()}
    save_file(half, svd / "vae/diffusion_pytorch_model.fp16.safetensors")
    half = {name: tensor.half() for name, tensor in golden_weights("clip_tiny").items()}
    save_file({**half, "vision_model.embeddings.position_ids": torch.arange(50)[None]}, svd / "image_encoder/model.fp16.safetensors")
    speech = {f"model.{name}": tensor for name, tensor in golden_weights("whisper_tiny_random").items()}
    save_file({**speech, "model.decoder.layer_norm.weight": torch.ones(16)}, whisper / "model.safetensors")
    for part, config in (
        (svd / "unet", {"num_attention_heads": HEADS}),
        (svd / "vae", VAE),
        (svd / "image_encoder", CLIP),
        (whisper, WHISPER),
    ):
        (part / "config.json").write_text(json.dumps(config))
    return folder


@cache
def golden_folder() -> Path:
    """The folder of the converted checkpoint. Tests must not change it."""
    folder = Path(tempfile.mkdtemp(prefix="sonic_svd"))
    atexit.register(shutil.rmtree, folder)
    assert convert(f"source={golden_download(folder / 'checkpoints')}", "model=sonic_svd", f"output={folder / 'converted'}") == 0
    return folder / "converted"


def golden_checkpoint() -> SonicCheckpoint:
    """The converted checkpoint."""
    return SonicCheckpoint.open(golden_folder())
