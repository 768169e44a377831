"""The speech encoder of the published models: all hidden states of wav2vec2, resampled from 50 to 30 per second, picked per video frame.

Shapes: K hidden layers (the input of the first one included), E their width, F video frames.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sonic.data.audio import SAMPLE_RATE
from sonic.geometry import FPS

STATE_SAMPLES = 320  # samples from one hidden state to the next: 50 states per second
STATE_RECEPTIVE_FIELD = 400  # samples that one hidden state depends on
STATES_PER_S, PICKED_PER_S = 50, 30
IN_MEMORY = 1 << 30  # bytes; larger features are stored on disk
# wav2vec2-large-xlsr-53, as published beside Wan2.2-S2V
LARGE = {
    "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096, "conv_bias": True,
    "feat_extract_norm": "layer", "do_stable_layer_norm": True,
}  # fmt: skip
# name in older files -> name of the two weights of the weight-normalised convolution
RENAMED = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}


class Wav2VecEncoder(nn.Module):
    """transformers' Wav2Vec2Model, run on windows of the recording so that memory does not grow with its length."""

    WINDOW_S, MARGIN_S = 60, 4  # a window is encoded with a margin on both sides, whose states are discarded

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        from transformers import Wav2Vec2Config, Wav2Vec2Model

        self.encoder = Wav2Vec2Model(Wav2Vec2Config(**(config or LARGE))).eval()

    def load_tensors(self, tensors: Mapping[str, Tensor], source: str) -> None:
        """Load the weights of a published Wav2Vec2ForCTC or Wav2Vec2Model by their names, without its output layer and its training mask.

        Raises ValueError when one is missing or unknown.
        """
        weights = {ours: tensor for name, tensor in tensors.items() if (ours := to_transformers_speech(name))}
        wanted = [name for name in self.encoder.state_dict() if name != "masked_spec_embed"]
        wrong = sorted(set(wanted) ^ set(weights))
        if wrong:
            raise ValueError(f"{source}: tensor {wrong[0]} is missing or has no place ({len(wrong)}); the file is for another wav2vec2")
        self.encoder.load_state_dict(weights, strict=False)

    def encode_audio(self, samples: np.ndarray, num_frames: int, fps: int = FPS) -> Tensor:
        """Features of every video frame; zeros after the end of the recording.  float32 [samples] at 16 kHz -> [K,E,F]"""
        return self.encode_audio_batch([samples], num_frames, fps)[0]

    @torch.no_grad()
    def encode_audio_batch(self, voices: Sequence[np.ndarray], num_frames: int, fps: int = FPS) -> Tensor:
        """Features of several recordings.  -> [voices,K,E,F]"""
        config = self.encoder.config
        features = _zeros((len(voices), config.num_hidden_layers + 1, config.hidden_size, num_frames))
        for samples, out in zip(voices, features, strict=True):
            self._encode_into(samples, out, fps)
        return features

    def _encode_into(self, samples: np.ndarray, out: Tensor, fps: int) -> None:
        """Write the features of a recording into `out`, zeros [K,E,F]."""
        total = num_states(len(samples))
        kept = num_resampled(total)
        picked = frame_positions(out.shape[-1], fps)
        positions = picked[picked < kept] * ((total - 1) / max(1, kept - 1))  # resampling maps the first and last state to themselves
        start, last = 0, None  # `last` is the previous piece's last state, for interpolation across the join; `start` is its index
        for piece in self.pieces(samples):
            states = piece if last is None else torch.cat((last, piece), dim=1)
            stop = start + states.shape[1] - 1
            inside = np.flatnonzero((positions >= start) & ((positions < stop) | (stop == total - 1)))
            out[..., torch.from_numpy(inside)] = states_at(states, positions[inside] - start)
            start, last = stop, states[:, -1:]

    def pieces(self, samples: np.ndarray) -> Iterator[Tensor]:
        """The states of one window after another, each [K,states,E]."""
        wave = torch.from_numpy(normalised(samples))
        window, margin = (seconds * SAMPLE_RATE for seconds in (self.WINDOW_S, self.MARGIN_S))
        for start in range(0, max(1, len(wave) - STATE_RECEPTIVE_FIELD + STATE_SAMPLES), window):
            first, last = max(0, start - margin), min(len(wave), start + window + margin + STATE_RECEPTIVE_FIELD - STATE_SAMPLES)
            if last - first < STATE_RECEPTIVE_FIELD:
                break
            states = self.hidden_states(wave[first:last])[:, (start - first) // STATE_SAMPLES :]
            yield states[:, : window // STATE_SAMPLES]

    def hidden_states(self, wave: Tensor) -> Tensor:
        """All hidden states of normalised samples that are encoded at once.  [samples] -> [K,states,E]"""
        weight = next(self.encoder.parameters())
        out = self.encoder(wave.to(weight)[None], output_hidden_states=True)
        return torch.cat([*out.hidden_states[:-1], out.last_hidden_state])  # transformers 5 lists the last one before its norm


def _zeros(shape: tuple[int, ...]) -> Tensor:
    """Zeros in memory, or when larger than IN_MEMORY in a deleted temporary file, so that an hour of speech takes disk space instead.

    Raises ValueError when the disk has too little space: a write to the mapped file would end the process.
    """
    size = 4 * prod(shape)
    if size <= IN_MEMORY:
        return torch.zeros(shape)
    with tempfile.NamedTemporaryFile(prefix="sonic_speech_") as file:
        folder = Path(file.name).parent
        if shutil.disk_usage(folder).free < size:
            need = f"{size / 2**30:.1f} GiB are needed in {folder} for the speech features of a recording this long"
            raise ValueError(f"{need}; free some space there, or name a larger folder as TMPDIR")
        return torch.from_file(file.name, shared=True, size=prod(shape)).reshape(shape)


def to_transformers_speech(name: str) -> str:
    """transformers' name of a published tensor; empty for the output layer and the training mask."""
    words = name.removeprefix("wav2vec2.").split(".")
    ours = ".".join([*words[:-1], RENAMED.get(words[-1], words[-1])])
    return "" if ours.startswith("lm_head.") or ours == "masked_spec_embed" else ours


def normalised(samples: np.ndarray) -> np.ndarray:
    """The samples with zero mean and unit variance, computed as in the published processor."""
    return ((samples - samples.mean()) / np.sqrt(samples.var() + 1e-7)).astype(np.float32)


def frame_positions(num_frames: int, fps: int, rate: int = PICKED_PER_S) -> np.ndarray:
    """Index of the features at `rate` per second nearest to each video frame; halves round to the even index.  -> int64 [F]"""
    seconds = np.linspace(0, num_frames / fps, num_frames, endpoint=False)
    return np.round(seconds * rate).astype(np.int64)


def states_at(states: Tensor, positions: np.ndarray) -> Tensor:
    """Hidden states interpolated at fractional indices, in float32 on the CPU.  [K,states,E] and [n] -> [K,E,n]"""
    last = states.shape[1] - 1
    where = torch.from_numpy(positions).clamp(max=last)
    below = where.long()
    share = (where - below)[:, None].to(states)
    return torch.lerp(states[:, below], states[:, (below + 1).clamp(max=last)], share).mT.float().cpu()


def num_states(samples: int) -> int:
    """Number of hidden states, 50 per second, of a recording of `samples` samples."""
    return 1 + max(0, samples - STATE_RECEPTIVE_FIELD) // STATE_SAMPLES


def num_resampled(states: int) -> int:
    """Number of features at 30 per second that `states` hidden states are resampled to."""
    return int(states / STATES_PER_S * PICKED_PER_S)


def published_clips(resampled: int, clip_frames: int, fps: float) -> int:
    """Number of clips that the published code makes of features at 30 per second; it adds a clip of silence when they fill a whole number
    of clips."""
    return int(resampled / (clip_frames * PICKED_PER_S / fps)) + 1
