"""The converted checkpoint: each component in a folder of its own, a manifest, and what loads them."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sonic.checkpoint.tensor_files import StoredTensor, read, survey_sharded
from sonic.config import AudioConfig, ModelConfig, MotionConfig, TextConfig, TrunkConfig
from sonic.encoders.text import TextEncoder, Tokenizer
from sonic.encoders.wav2vec import Wav2VecEncoder
from sonic.system.files import save_tensors
from sonic.system.program import written
from sonic.vae.wan_vae import WanAutoencoder

log = logging.getLogger("sonic.checkpoint")

FORMAT = "sonic ready checkpoint 1"
MANIFEST, REPORT, STEM, TOKENIZER, PROMPTS = "manifest.json", "report.json", "model", "tokenizer", "prompts"
CPU = torch.device("cpu")
PARTS = {"trunk": TrunkConfig, "audio": AudioConfig, "text": TextConfig, "motion": MotionConfig}


@dataclass(frozen=True)
class Checkpoint:
    """An opened converted checkpoint."""

    folder: Path
    manifest: dict[str, Any]
    unkept: dict[Path, Tensor] = field(default_factory=dict, repr=False, compare=False)  # rows by the file that could not be written

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Raises ValueError when the folder is no converted checkpoint, with the way to make one."""
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
        except (OSError, ValueError):
            raise ValueError(
                f"checkpoint={folder} is no converted checkpoint ({MANIFEST} is missing or damaged); make one of the downloaded folders: "
                f"{written('convert')} source=Wan2.2-S2V-14B live_avatar=LiveAvatar output=FOLDER"
            ) from None
        if manifest.get("format") != FORMAT:
            raise ValueError(f"checkpoint={folder} was written by another version ({manifest.get('format')}); convert it again")
        return cls(folder, manifest)

    def config(self, base: ModelConfig) -> ModelConfig:
        """`base`, with the sizes of the checkpoint. Raises ValueError when it is for another model."""
        made_for = self.manifest["model"]
        if made_for != base.name:
            way_out = f"use model={made_for}, or convert the folders again for {base.name}"
            raise ValueError(f"checkpoint={self.folder} holds {made_for}; {way_out}")
        return replace(base, **{name: kind(**self.manifest["config"][name]) for name, kind in PARTS.items()})

    def tensors(self, component: str) -> dict[str, StoredTensor]:
        """What a component's shards hold."""
        return survey_sharded(self.folder / component, STEM)

    @property
    def weights(self) -> Path:
        """The folder of the transformer's weights."""
        return self.folder / "dit"

    def autoencoder(self, device: torch.device, dtype: torch.dtype) -> WanAutoencoder:
        """The Wan VAE. In bfloat16 its frames differ from float32's by 50 dB (0.8 of 255 levels, root mean square; random weights of the
        published size), latents that were rounded to bfloat16 once and decoded in float32 by 70 dB."""
        vae = WanAutoencoder(self._config("vae"))
        vae.load_tensors(self._moved("vae", CPU))
        return vae.to(device, dtype).eval().requires_grad_(False)

    def rows(self, prompt: str, length: int, device: torch.device) -> Tensor:
        """Text rows [1,L,D] of a prompt, from the cache when it is known; else the encoder is loaded, used and let go."""
        return self.reader(length, device)(prompt)

    def reader(self, length: int, device: torch.device) -> Callable[[str], Tensor]:
        """The same for prompt after prompt: the encoder is loaded for the first that is not known, and let go with the reader."""
        loaded: list[tuple[TextEncoder, Tokenizer]] = []

        def read_rows(prompt: str) -> Tensor:
            name = hashlib.sha256(json.dumps([self._hash(), prompt, length]).encode()).hexdigest()[:32]
            file = self.folder / PROMPTS / f"{name}.safetensors"
            if file in self.unkept:
                return self.unkept[file].to(device)
            if file.is_file() and (known := _kept(file)) is not None:
                return known.to(device)
            if not loaded:
                loaded.append((self._text_encoder(device), Tokenizer(self.folder / TOKENIZER)))
            encoder, tokens = loaded[0]
            (found,) = encoder(*(each.to(device) for each in tokens([prompt], length)))
            rows = found[None].float().cpu()
            if not _store(file, {"rows": rows}):
                self.unkept[file] = rows
            return rows.to(device)

        return read_rows

    def _text_encoder(self, device: torch.device) -> TextEncoder:
        with torch.device("meta"):
            encoder = TextEncoder(self._config("text_encoder"))
        encoder.load_tensors(self._moved("text_encoder", device), str(self.folder))
        return encoder.to(device)

    def encode_audio(self, samples: np.ndarray, num_frames: int, *, fps: int, device: torch.device) -> Tensor:
        """Speech features [1,N,E,F] of a recording; the encoder is loaded, used and let go."""
        return self.encode_audio_batch([samples], num_frames, fps=fps, device=device)

    def encode_audio_batch(self, voices: Sequence[np.ndarray], num_frames: int, *, fps: int, device: torch.device) -> Tensor:
        """The same of several recordings.  -> [voices,N,E,F]"""
        return self.speech_encoder(device).encode_audio_batch(voices, num_frames, fps)

    def speech_encoder(self, device: torch.device) -> Wav2VecEncoder:
        """The speech encoder with its weights."""
        encoder = Wav2VecEncoder(self._config("speech_encoder")).to(device)
        encoder.load_tensors(self._moved("speech_encoder", device), str(self.folder))
        return encoder.eval()

    def _moved(self, component: str, device: torch.device) -> dict[str, Tensor]:
        """A component's tensors by name, read and moved one by one: each is a sign that the work gets on, however slow the disk is."""
        return {stored.name: tensor.to(device) for stored, tensor in read(self.tensors(component).values())}

    def _config(self, component: str) -> dict[str, Any]:
        return json.loads((self.folder / component / "config.json").read_text())

    def autoencoder_hash(self) -> str:
        """What the VAE was made from, in 16 digits."""
        return next(digest for file, digest in self.manifest["sources"].items() if "VAE" in file)[:16]

    def _hash(self) -> str:
        """What the text encoder was made from."""
        return next(digest for file, digest in self.manifest["sources"].items() if file.startswith("models_t5"))


def _kept(file: Path) -> Tensor | None:
    """The rows in a file of the cache; None for a damaged one, which is made anew."""
    try:
        return load_file(file)["rows"]
    except (SafetensorError, KeyError) as error:
        log.warning("%s is damaged and is made anew (%s)", file, error)
        return None


def _store(file: Path, tensors: dict[str, Tensor]) -> bool:
    """Write a file; False for a checkpoint that cannot be written to, which is used without a cache."""
    try:
        file.parent.mkdir(exist_ok=True)
        save_tensors(tensors, file)
        return True
    except OSError as error:
        log.warning("%s cannot be kept and will be made anew next time (%s)", file, error)
        return False
