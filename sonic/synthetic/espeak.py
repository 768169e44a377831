"""Binding to the espeak-ng library of the espeakng-loader wheel (ctypes): text to samples and phonemes with their times."""

from __future__ import annotations

import _ctypes
import ctypes
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np

from sonic.types import pick

DRAWN = "drawn"  # name of the speaker whose voice variant is passed with the text


class _Event(ctypes.Structure):
    """espeak_EVENT of speak_lib.h; for a phoneme event the last eight bytes are its UTF-8 name."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position_ms", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("name", ctypes.c_char * 8),
    ]


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))
_SYNCHRONOUS, _PHONEME_EVENTS, _IPA, _DONT_EXIT, _UTF8, _PHONEME = 2, 1, 2, 0x8000, 1, 7
_PARAMETERS = {"rate": 1, "pitch": 3, "range": 4}
_VOLUME, _VOLUME_VALUE = 2, 60  # at the default of 100 some voices clip


class EspeakEngine:
    """One loaded copy of the espeak-ng library; use it for one text only."""

    def __init__(self, library: ctypes.CDLL, data: str) -> None:
        self.library, self.sound, self.events = library, [], []
        self.callback = _Callback(self._receive)  # kept alive: the library stores only its address
        self.rate = library.espeak_Initialize(_SYNCHRONOUS, 0, data.encode(), _PHONEME_EVENTS | _IPA | _DONT_EXIT)
        if self.rate <= 0:
            raise RuntimeError(f"espeak-ng did not start from {data}; reinstall it: pip install --force-reinstall espeakng-loader")
        library.espeak_SetSynthCallback(self.callback)

    def _receive(self, wave, count: int, events) -> int:
        if wave and count:
            self.sound.append(np.ctypeslib.as_array(wave, (count,)).copy())
        index = 0
        while events[index].type != 0:
            if events[index].type == _PHONEME:
                self.events.append((events[index].audio_position_ms / 1000, events[index].name.decode("utf-8", "ignore")))
            index += 1
        return 0

    def synthesise(self, text: str, voice: str, *, seed: int, manner: dict[str, int]) -> tuple[np.ndarray, list[tuple[float, str]], int]:
        """Synthesise a text: samples, (start s, IPA) of every phoneme, and the sample rate in Hz."""
        if self.library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(f"voice={voice} is unknown to espeak-ng; choose an accent and a speaker of sonic/synthetic/speakers.py")
        self.library.espeak_ng_SetRandSeed(ctypes.c_long(seed))
        c_library = ctypes.cdll.msvcrt if os.name == "nt" else ctypes.CDLL(None)
        c_library.srand(ctypes.c_uint(seed))  # breathy voices take their noise from rand()
        self.library.espeak_SetParameter(_VOLUME, _VOLUME_VALUE, 0)
        for name, value in manner.items():
            self.library.espeak_SetParameter(pick(_PARAMETERS, name, "manner"), value, 0)
        data = text.encode()
        self.library.espeak_Synth(data, ctypes.c_size_t(len(data) + 1), 0, 1, 0, _UTF8, None, None)
        self.library.espeak_Synchronize()
        sound = np.concatenate(self.sound).astype(np.float32) / 32768 if self.sound else np.zeros(0, np.float32)
        return sound, [event for event in self.events if not event[1].startswith("(")], self.rate


@contextmanager
def espeak(language: str, variant: str = "") -> Iterator[EspeakEngine]:
    """Load a fresh copy of the library (0.2 ms): espeak-ng keeps state between texts, so reuse would make samples depend on history.

    `variant` is the text of a voice variant file, as in espeak-ng's voices/!v; it becomes the speaker DRAWN, and then only `language`
    ("pt" of "pt-br") can be spoken.
    """
    try:
        import espeakng_loader
    except ImportError as error:
        raise ValueError("speaking needs espeak-ng, which is not installed; run: pip install espeakng-loader") from error
    data = Path(espeakng_loader.get_data_path())
    with _with_variant(data, language, variant) if variant else nullcontext(data) as folder:
        library = ctypes.CDLL(espeakng_loader.get_library_path())
        try:
            yield EspeakEngine(library, str(folder))
        finally:
            library.espeak_Terminate()
            unload = getattr(_ctypes, "dlclose", None) or _ctypes.FreeLibrary
            unload(library._handle)


@contextmanager
def _with_variant(data: Path, language: str, variant: str) -> Iterator[Path]:
    """A temporary espeak-ng data folder with one voice variant in place of its own, since it reads variants from no other place."""
    with tempfile.TemporaryDirectory(prefix="voice_") as name:
        folder = Path(name)
        (folder / "voices" / "!v").mkdir(parents=True)
        (folder / "voices" / "!v" / DRAWN).write_text(variant)
        for entry in data.iterdir():  # linking all dictionaries takes longer than speaking a sentence
            if entry.name in (f"{language}_dict", "en_dict") or not entry.name.endswith(("voices", "_dict")):
                (folder / entry.name).symlink_to(entry)
        yield folder
