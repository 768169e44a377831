"""The speech encoder of the published models: wav2vec2, its hidden states resampled from 50 to 30 per second and picked per video frame."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sonic.encoders.hidden_states import STATES_PER_S, HiddenStateEncoder

PICKED_PER_S = 30
# wav2vec2-large-xlsr-53, as published beside Wan2.2-S2V; hubert-large has the same sizes
LARGE = {
    "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096, "conv_bias": True,
    "feat_extract_norm": "layer", "do_stable_layer_norm": True,
}  # fmt: skip
KEYS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "conv_bias", "feat_extract_norm", "conv_dim",
    "conv_kernel", "conv_stride", "do_stable_layer_norm", "num_conv_pos_embeddings", "num_conv_pos_embedding_groups",
)  # fmt: skip


class Wav2VecEncoder(HiddenStateEncoder):
    """transformers' Wav2Vec2Model, whose states are picked as in the published code."""

    KEYS, PREFIX = KEYS, "wav2vec2."

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        from transformers import Wav2Vec2Config, Wav2Vec2Model

        super().__init__(Wav2Vec2Model(Wav2Vec2Config(**(config or LARGE))))

    def positions(self, num_frames: int, fps: int, total: int | None = None) -> np.ndarray:
        """Fractional indices of the hidden states of the first video frames, through 30 features a second.

        Resampling maps the first and last of all `total` states to themselves, so it stretches them slightly; while the sound is still
        arriving, the times are exact.
        """
        picked = frame_positions(num_frames, fps)
        if total is None:
            return picked * STATES_PER_S / PICKED_PER_S
        kept = num_resampled(total)
        return picked[picked < kept] * ((total - 1) / max(1, kept - 1))


def frame_positions(num_frames: int, fps: int, rate: int = PICKED_PER_S) -> np.ndarray:
    """Index of the features at `rate` per second nearest to each video frame; halves round to the even index.  -> int64 [F]"""
    seconds = np.linspace(0, num_frames / fps, num_frames, endpoint=False)
    return np.round(seconds * rate).astype(np.int64)


def num_resampled(states: int) -> int:
    """Number of features at 30 per second that `states` hidden states are resampled to."""
    return int(states / STATES_PER_S * PICKED_PER_S)


def published_clips(resampled: int, clip_frames: int, fps: float) -> int:
    """Number of clips that the published code makes of features at 30 per second; it adds a clip of silence when they fill a whole number
    of clips."""
    return int(resampled / (clip_frames * PICKED_PER_S / fps)) + 1
