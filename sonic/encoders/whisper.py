"""Whisper's encoder as a speech encoder. It reads log-mel columns of 30 seconds; shorter sound is padded with silence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from sonic.data.audio import SAMPLE_RATE
from sonic.encoders.hidden_states import STATE_SAMPLES, HiddenStateEncoder

READ_S = 30  # seconds that the network reads at once
# whisper-medium, whose hidden layers have the width and number of those of wav2vec2-large
MEDIUM = {"d_model": 1024, "encoder_layers": 24, "encoder_attention_heads": 16, "encoder_ffn_dim": 4096}


class WhisperEncoder(HiddenStateEncoder):
    """The encoder of transformers' WhisperModel. Longer recordings are read in overlapping windows."""

    WINDOW_S, MARGIN_S = 22, 4  # READ_S together with both margins
    STATE_FIELD = STATE_SAMPLES
    KEYS, PREFIX = (*MEDIUM, "num_mel_bins", "activation_function", "scale_embedding"), "encoder."

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        from transformers import WhisperConfig, WhisperFeatureExtractor
        from transformers.models.whisper import modeling_whisper

        super().__init__(modeling_whisper.WhisperEncoder(WhisperConfig(**(config or MEDIUM))))
        self.extract = WhisperFeatureExtractor(feature_size=self.encoder.config.num_mel_bins)

    @classmethod
    def to_transformers(cls, name: str) -> str:
        """transformers' name of a tensor of a published WhisperForConditionalGeneration or WhisperModel; empty for those of the decoder."""
        name = name.removeprefix("model.")
        return name.removeprefix(cls.PREFIX) if name.startswith(cls.PREFIX) else ""

    def pieces(self, samples: np.ndarray) -> Iterator[Tensor]:
        """The states of one window after another; a recording that can be read at once is one piece."""
        if len(samples) > READ_S * SAMPLE_RATE:
            yield from super().pieces(samples)
        else:
            yield self.hidden_states(torch.from_numpy(self.scaled(samples, samples)))

    def chunk_states(self, samples: np.ndarray) -> Tensor:
        """The states of chunks of 30 s that do not see each other, with those of the silence after the end.  -> [1500·chunks,K,E]"""
        starts = range(0, len(samples), READ_S * SAMPLE_RATE)
        chunks = (torch.from_numpy(samples[start : start + READ_S * SAMPLE_RATE]) for start in starts)
        return torch.cat([rearrange(self.all_states(wave), "k t e -> t k e") for wave in chunks])

    def scaled(self, samples: np.ndarray, reference: np.ndarray) -> np.ndarray:
        """A copy of the samples as they are: the log-mel columns have their own scale."""
        return samples.astype(np.float32)

    def inputs(self, wave: Tensor) -> Tensor:
        """Log-mel columns of up to 30 s, and of silence after it.  [samples] -> [1,mels,3000]"""
        assert len(wave) <= READ_S * SAMPLE_RATE, f"{len(wave)} samples are more than whisper reads at once"
        return self.extract(wave.numpy(), sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features
