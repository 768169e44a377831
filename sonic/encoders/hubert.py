"""HuBERT as a speech encoder: the network of wav2vec2, trained in another way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sonic.encoders.hidden_states import HiddenStateEncoder
from sonic.encoders.wav2vec import KEYS, LARGE


class HubertEncoder(HiddenStateEncoder):
    """transformers' HubertModel."""

    KEYS, PREFIX = (*KEYS, "conv_pos_batch_norm", "feat_proj_layer_norm"), "hubert."

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        from transformers import HubertConfig, HubertModel

        super().__init__(HubertModel(HubertConfig(**(config or LARGE))))
