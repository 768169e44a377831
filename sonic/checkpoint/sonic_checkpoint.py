"""The converted checkpoint of Sonic: its networks, each loaded when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from sonic.checkpoint.converted import CPU, ConvertedFolder
from sonic.checkpoint.official import speech_encoder
from sonic.checkpoint.speech_weights import load_hidden_states
from sonic.encoders.clip_image import ClipImageEncoder
from sonic.encoders.clip_sound import ClipSoundEncoder, FrameBuckets, FrameTokens
from sonic.encoders.whisper import WhisperEncoder
from sonic.vae.rife import Rife
from sonic.vae.svd_vae import SvdAutoencoder

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class SonicCheckpoint(ConvertedFolder):
    """An opened converted checkpoint of Sonic. Its networks are computed in the precision that is asked for."""

    DOWNLOADED: ClassVar[str] = "source=checkpoints model=sonic_svd"

    @property
    def unet_weights(self) -> Path:
        """The folder of the UNet's weights."""
        return self.folder / "unet"

    def autoencoder(self, device: torch.device, dtype: torch.dtype) -> SvdAutoencoder:
        """The VAE."""
        return self._network("vae", SvdAutoencoder, device, dtype=dtype, inside="blocks.")

    def image_encoder(self, device: torch.device, dtype: torch.dtype) -> ClipImageEncoder:
        """CLIP's picture embedding."""
        return self._network("image_encoder", ClipImageEncoder, device, dtype=dtype, inside="network.")

    def speech(self, device: torch.device, dtype: torch.dtype = torch.float32) -> ClipSoundEncoder:
        """Whisper, and the networks of audio tokens and motion buckets."""
        part = speech_encoder(self.folder / "whisper", "whisper")
        tokens = self._network("audio2token", lambda sizes: FrameTokens(**sizes), device, dtype=dtype)
        buckets = self._network("audio2bucket", lambda sizes: FrameBuckets(**sizes), device, dtype=dtype)
        whisper = load_hidden_states(WhisperEncoder, part, device)
        return ClipSoundEncoder(whisper, tokens, buckets).to(dtype).eval()

    def rife(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Rife:
        """The network that doubles the frame rate."""
        return self._network("rife", lambda sizes: Rife(**sizes), device, dtype=dtype)

    def _network(
        self, component: str, make: Callable[[Mapping[str, Any]], Network], device: torch.device, *, dtype: torch.dtype, inside: str = ""
    ) -> Network:
        """A network of the checkpoint, built without memory and filled; `inside` comes before the names of its tensors."""
        with torch.device("meta"):
            network = make(self.sizes(component))
        network.load_state_dict({f"{inside}{name}": tensor for name, tensor in self.loaded(component, CPU).items()}, assign=True)
        return network.to(device, dtype).eval().requires_grad_(False)
