"""Speech encoders whose features are all hidden states of a network of transformers, 50 per second, picked per video frame.

Shapes: K hidden layers (the input of the first one included), E their width, F video frames.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sonic.data.audio import SAMPLE_RATE
from sonic.encoders.speech_encoder import SpeechEncoder
from sonic.geometry import FPS
from sonic.types import upload

STATES_PER_S = 50
STATE_SAMPLES = SAMPLE_RATE // STATES_PER_S  # samples from one hidden state to the next
NOT_READ = "masked_spec_embed"  # a weight that only trainings of wav2vec2 and hubert use
# name in older files -> name of the two weights of the weight-normalised convolution
RENAMED = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}


class HiddenStateEncoder(SpeechEncoder):
    """A network of transformers, run on windows of the recording so that memory does not grow with its length."""

    rate = STATES_PER_S
    context_s, look_ahead_s = 4.0, 1.0
    WINDOW_S, MARGIN_S = 60, 4  # a window is encoded with a margin on both sides, whose states are discarded
    STATE_FIELD = 400  # samples that one hidden state depends on, before attention
    KEYS: ClassVar[tuple[str, ...]]  # what is read of a published config.json
    PREFIX: ClassVar[str]  # before the names of tensors in a published file

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder.eval()
        self.num_layers, self.width = encoder.config.num_hidden_layers + 1, encoder.config.hidden_size

    @classmethod
    def to_transformers(cls, name: str) -> str:
        """transformers' name of a tensor in a published file; empty for the output layer and the training mask."""
        words = name.removeprefix(cls.PREFIX).split(".")
        ours = ".".join([*words[:-1], RENAMED.get(words[-1], words[-1])])
        return "" if ours.startswith("lm_head.") or ours == NOT_READ else ours

    def encode_into(self, samples: np.ndarray, out: Tensor, fps: int) -> None:
        """Write the features of a recording into `out`; frames after its end stay zero."""
        total = self.num_states(len(samples))
        positions = self.positions(out.shape[-1], fps, total)
        start, last = 0, None  # `last` is the previous piece's last state, for interpolation across the join; `start` is its index
        for piece in self.pieces(samples):
            states = piece if last is None else torch.cat((last, piece), dim=1)
            stop = start + states.shape[1] - 1
            inside = np.flatnonzero((positions >= start) & ((positions < stop) | (stop == total - 1)))
            out[..., torch.from_numpy(inside)] = states_at(states, positions[inside] - start).cpu()
            start, last = stop, states[:, -1:]

    @torch.no_grad()
    def encode_block(self, held: np.ndarray, frames: range, *, start: int, fps: int = FPS) -> Tensor:
        """Features of the video frames `frames`, from a window around them; zeros after the end of the sound."""
        first_state = max(0, int((frames.start / fps - self.context_s) * STATES_PER_S))
        window = held[first_state * STATE_SAMPLES - start :]
        if len(window) < self.STATE_FIELD:
            return torch.zeros(self.num_layers, self.width, len(frames))
        states = self.hidden_states(torch.from_numpy(self.scaled(window, held)))
        positions = self.positions(frames.stop, fps)[frames.start :] - first_state
        inside = positions[positions < states.shape[1]]
        return F.pad(states_at(states, inside), (0, len(frames) - len(inside)))

    def pieces(self, samples: np.ndarray) -> Iterator[Tensor]:
        """The states of one window after another, each [K,states,E]."""
        wave = torch.from_numpy(self.scaled(samples, samples))
        window, margin = (seconds * SAMPLE_RATE for seconds in (self.WINDOW_S, self.MARGIN_S))
        for start in range(0, max(1, len(wave) - self.STATE_FIELD + STATE_SAMPLES), window):
            first, last = max(0, start - margin), min(len(wave), start + window + margin + self.STATE_FIELD - STATE_SAMPLES)
            if last - first < self.STATE_FIELD:
                break
            states = self.hidden_states(wave[first:last])[:, (start - first) // STATE_SAMPLES :]
            yield states[:, : window // STATE_SAMPLES]

    def scaled(self, samples: np.ndarray, reference: np.ndarray) -> np.ndarray:
        """The samples as the network reads them: here scaled so that `reference` has zero mean and unit variance."""
        return ((samples - reference.mean()) / np.sqrt(reference.var() + 1e-7)).astype(np.float32)

    def hidden_states(self, wave: Tensor) -> Tensor:
        """All hidden states of scaled samples that are encoded at once.  [samples] -> [K,states,E]"""
        return self.all_states(wave)[:, : self.num_states(len(wave))]

    def all_states(self, wave: Tensor) -> Tensor:
        """All hidden states of what the network reads of scaled samples, which may end in silence.  [samples] -> [K,states,E]"""
        weight = next(self.encoder.parameters())
        out = self.encoder(upload(self.inputs(wave), weight.device).to(weight), output_hidden_states=True)
        return torch.cat([*out.hidden_states[:-1], out.last_hidden_state])  # in wav2vec2 and hubert the list ends before the last norm

    def inputs(self, wave: Tensor) -> Tensor:
        """What the network reads of scaled samples: here the samples.  [samples] -> [1,samples]"""
        return wave[None]

    @classmethod
    def num_states(cls, samples: int) -> int:
        """Number of hidden states of a recording of `samples` samples."""
        return 1 + max(0, samples - cls.STATE_FIELD) // STATE_SAMPLES

    def positions(self, num_frames: int, fps: int, total: int | None = None) -> np.ndarray:
        """Fractional indices of the hidden states at the times k/fps of the first `num_frames` video frames, without those after the end
        of all `total` states; None = the sound is still arriving."""
        positions = np.arange(num_frames) * STATES_PER_S / fps
        return positions if total is None else positions[positions < total]


def states_at(states: Tensor, positions: np.ndarray) -> Tensor:
    """Hidden states interpolated at fractional indices, in float32.  [K,states,E] and [n] -> [K,E,n]"""
    last = states.shape[1] - 1
    where = upload(torch.from_numpy(positions), states.device).clamp(max=last)
    below = where.long()
    share = (where - below)[:, None].to(states)
    return torch.lerp(states[:, below], states[:, (below + 1).clamp(max=last)], share).mT.float()
