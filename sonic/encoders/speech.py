"""The table of speech encoders."""

from __future__ import annotations

from sonic.encoders.hubert import HubertEncoder
from sonic.encoders.logmel import LogMelEncoder
from sonic.encoders.speech_encoder import SpeechEncoder
from sonic.encoders.wav2vec import Wav2VecEncoder
from sonic.encoders.whisper import WhisperEncoder

# name, which is also the model_type in a published config.json -> class
SPEECH_ENCODERS: dict[str, type[SpeechEncoder]] = {
    "logmel": LogMelEncoder,
    "wav2vec2": Wav2VecEncoder,
    "hubert": HubertEncoder,
    "whisper": WhisperEncoder,
}
