"""The converted checkpoint: a folder for each network, a manifest, and the methods that load and run the networks."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sonic.checkpoint.official import TEXT_FILE
from sonic.checkpoint.tensor_files import StoredTensor, read, survey_sharded
from sonic.config import ModelConfig
from sonic.encoders.text import TextEncoder, Tokenizer
from sonic.system.files import save_tensors
from sonic.system.program import written
from sonic.vae.wan_vae import WanAutoencoder

log = logging.getLogger("sonic.checkpoint")

FORMAT = "sonic ready checkpoint 1"
MANIFEST, REPORT, STEM, TOKENIZER, PROMPTS = "manifest.json", "report.json", "model", "tokenizer", "prompts"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class ConvertedFolder:
    """An opened converted checkpoint of any family."""

    folder: Path
    manifest: dict[str, Any]
    DOWNLOADED: ClassVar[str] = "source=Wan2.2-S2V-14B live_avatar=LiveAvatar"  # the options of the conversion, as an example

    @classmethod
    def open(cls, folder: Path) -> Self:
        """The converted checkpoint in a folder. Raises ValueError with the command that makes one when the folder is none."""
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
        except (OSError, ValueError):
            raise ValueError(
                f"checkpoint={folder} is no converted checkpoint ({MANIFEST} is missing or damaged); make one of the downloaded folders: "
                f"{written('convert')} {cls.DOWNLOADED} output=FOLDER"
            ) from None
        if manifest.get("format") != FORMAT:
            raise ValueError(f"checkpoint={folder} was written by another version ({manifest.get('format')}); convert it again")
        return cls(folder, manifest)

    def config(self, base: ModelConfig) -> ModelConfig:
        """The model config `base` with the sizes of the checkpoint. Raises ValueError when the checkpoint is of another model."""
        made_for = self.manifest["model"]
        if made_for != base.name:
            way_out = f"use model={made_for}, or convert the folders again for {base.name}"
            raise ValueError(f"checkpoint={self.folder} holds {made_for}; {way_out}")
        return replace(base, **{name: replace(getattr(base, name), **sizes) for name, sizes in self.manifest["config"].items()})

    def tensors(self, component: str) -> dict[str, StoredTensor]:
        """The tensors in a component's shards, by name, not read yet."""
        return survey_sharded(self.folder / component, STEM)

    def loaded(self, component: str, device: torch.device) -> dict[str, Tensor]:
        """A component's tensors by name, read and moved one at a time; each gives a heartbeat, however slow the disk is."""
        return {stored.name: tensor.to(device) for stored, tensor in read(self.tensors(component).values())}

    def sizes(self, component: str) -> dict[str, Any]:
        """The config of a component."""
        return json.loads((self.folder / component / "config.json").read_text())

    def hash_of(self, component: str) -> str:
        """A hash of 16 digits of the files that a component was converted from."""
        return self.manifest["hashes"][component]

    def source_hash(self, *names: str) -> str:
        """The hash of the file that a network was converted from, which has one of these names; "" when there is none."""
        return next((digest for file, digest in self.manifest["sources"].items() if file in names), "")


@dataclass(frozen=True)
class Checkpoint(ConvertedFolder):
    """A converted checkpoint of the Wan family."""

    unkept: dict[Path, Tensor] = field(default_factory=dict, repr=False, compare=False)  # text rows whose cache file cannot be written

    @property
    def weights(self) -> Path:
        """The folder of the transformer's weights."""
        return self.folder / "dit"

    @property
    def speech_encoders(self) -> dict[str, Path]:
        """The folder of the speech encoder, by its name."""
        return {"wav2vec2": self.folder / "speech_encoder"}

    def autoencoder(self, device: torch.device, dtype: torch.dtype) -> WanAutoencoder:
        """The Wan VAE, loaded. Against float32, its frames in bfloat16 have a PSNR of 50 dB (0.8 of 255 levels, root mean square; random
        weights of the published size); latents rounded to bfloat16 once and decoded in float32 have 70 dB."""
        vae = WanAutoencoder(self.sizes("vae"))
        vae.load_tensors(self.loaded("vae", CPU))
        return vae.to(device, dtype).eval().requires_grad_(False)

    def prompt_encoder(self, length: int, device: torch.device) -> Callable[[str], Tensor]:
        """A function that gives the text rows [1,L,text_dim] of a prompt; it loads the text encoder at the first prompt that is not in
        the cache, and holds it as long as the function exists."""
        loaded: list[tuple[TextEncoder, Tokenizer]] = []

        def read_rows(prompt: str) -> Tensor:
            name = hashlib.sha256(json.dumps([self.source_hash(TEXT_FILE), prompt, length]).encode()).hexdigest()[:32]
            file = self.folder / PROMPTS / f"{name}.safetensors"
            if file in self.unkept:
                return self.unkept[file].to(device)
            if file.is_file() and (cached := _cached(file)) is not None:
                return cached.to(device)
            if not loaded:
                loaded.append((self._text_encoder(device), Tokenizer(self.folder / TOKENIZER)))
            encoder, tokens = loaded[0]
            (encoded,) = encoder(*(tensor.to(device) for tensor in tokens([prompt], length)))
            rows = encoded[None].float().cpu()
            if not _store(file, {"rows": rows}):
                self.unkept[file] = rows
            return rows.to(device)

        return read_rows

    def _text_encoder(self, device: torch.device) -> TextEncoder:
        with torch.device("meta"):
            encoder = TextEncoder(self.sizes("text_encoder"))
        encoder.load_tensors(self.loaded("text_encoder", device), str(self.folder))
        return encoder.to(device)


def _cached(file: Path) -> Tensor | None:
    """The text rows in a file of the cache; None, with a warning, when it is damaged."""
    try:
        return load_file(file)["rows"]
    except (SafetensorError, KeyError) as error:
        log.warning("%s is damaged and is written again (%s)", file, error)
        return None


def _store(file: Path, tensors: dict[str, Tensor]) -> bool:
    """Write a file of the cache; False, with a warning, when the folder cannot be written to."""
    try:
        file.parent.mkdir(exist_ok=True)
        save_tensors(tensors, file)
        return True
    except OSError as error:
        log.warning("%s cannot be written, so it will be computed again next time (%s)", file, error)
        return False
