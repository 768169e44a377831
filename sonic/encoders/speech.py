"""The table of speech encoders."""

from __future__ import annotations

from sonic.encoders.hubert import HubertEncoder
from sonic.encoders.logmel import LogMelEncoder
from sonic.encoders.speech_encoder import SpeechEncoder
from sonic.encoders.wav2vec import Wav2VecEncoder
from sonic.encoders.whisper import WhisperEncoder
from sonic.registry import Registry

# name, which is also the model_type in a published config.json -> class
SPEECH_ENCODERS: Registry[type[SpeechEncoder]] = Registry(
    "model.speech_encoder",
    {"logmel": LogMelEncoder, "wav2vec2": Wav2VecEncoder, "hubert": HubertEncoder, "whisper": WhisperEncoder},
)
