"""Voices of synthesised speech: accents and speakers of espeak-ng, random speakers, and the words they say. Splits share none of them."""

from __future__ import annotations

from configparser import ConfigParser
from importlib.resources import files

import numpy as np

# accent of espeak-ng -> word list it reads; English is drawn half of the time
ACCENTS = {
    "train": {
        "en-us": "en", "en": "en", "en-029": "en", "de": "de", "es": "es", "fr": "fr", "it": "it", "pt-br": "pt",
        "nl": "nl", "sv": "sv", "fi": "fi", "tr": "tr", "id": "id", "pl": "pl", "sw": "sw",
    },
    "test": {
        "en-us-nyc": "en", "en-gb-x-rp": "en", "en-gb-scotland": "en", "de": "de", "es-419": "es", "fr-be": "fr", "it": "it",
        "nl": "nl", "fi": "fi", "id": "id", "ro": "ro",
    },
}  # fmt: skip
_SPEAKERS = {
    "train": """
        m1 m2 m3 m4 m6 m7 f1 f2 f3 f5 Alex Alicia Andrea Annie Denis Diogo Gene Gene2 Henrique Hugo Lee Mario Michael Mike adam anika
        announcer antonio aunty belinda benjamin boris caleb david ed edward edward2 grandma gustave ian john klatt2 klatt3 linda
        marcelo max miguel norbert paul quincy rob sandro steph travis victor zac Reed""",
    "test": "m5 m8 f4 Andy Jacky Nguyen kaukovalta klatt4 michel pablo pedro robert shelby grandpa",
}
SPEAKERS = {split: tuple(names.split()) for split, names in _SPEAKERS.items()}
SPEED = {"train": (0.86, 1.16), "test": (0.92, 1.08)}  # playback speed also shifts the formants, as another vocal tract would
DRAWN_SHARE = 0.6  # of the train split's recordings: espeak-ng's own speakers vary too little
_FORMANTS = 9
_KLATT_KINDS = 5  # voicing sources of espeak-ng's second (Klatt) synthesiser


def _read_words() -> dict[str, dict[str, tuple[str, ...]]]:
    """The words of each split and language."""
    parser = ConfigParser(interpolation=None)
    parser.read_string((files("sonic.assets") / "words.ini").read_text(encoding="utf-8"))
    return {split: {language: tuple(words.split()) for language, words in parser[split].items()} for split in parser.sections()}


WORDS = _read_words()


def draw_speaker(rng: np.random.Generator) -> str:
    """Draw a random speaker, as the text of an espeak-ng voice variant file.

    The vocal tract length shifts all formants, the shape of the mouth mostly the lower ones; height and width of the formants,
    intonation, breath, roughness and timbre vary as widely as in espeak-ng's own variants.
    """
    throat = rng.normal(0, 0.12)
    mouth = rng.uniform(-0.95, 0.25) * (rng.random() < 0.7)  # shift of the first formant; half as much for the second, ...
    lines = ["language variant", "name drawn"]
    base = int(np.exp(rng.uniform(np.log(60), np.log(230))))
    lines.append(f"pitch {base} {round(base * rng.uniform(1.2, 2.0))}")
    loud = rng.uniform(0.55, 1.0)  # of the formants above the third, as a share of those of the default voice
    for formant in range(_FORMANTS):
        centre = throat + rng.normal(0, 0.07) + mouth * 0.5 ** max(0, formant - 1)
        height = rng.lognormal(0, 0.3) * (loud if formant > 3 else 1.0)
        lines.append(f"formant {formant} {_percent(np.exp(centre))} {_percent(height)} {_percent(rng.lognormal(0, 0.3))}")
    lines.append(f"consonants {_percent(rng.uniform(0.55, 1.35))} {_percent(rng.uniform(0.5, 1.2))}")
    lines.append(f"voicing {_percent(rng.uniform(0.4, 1.2))}")
    lines.append(f"roughness {rng.integers(0, 5)}")
    lines.append(f"flutter {rng.integers(0, 12)}")
    lines.append(f"intonation {rng.integers(1, 5)}")
    if rng.random() < 0.25:
        lines.append(f"breath {' '.join(str(rng.integers(0, 50)) for _ in range(6))}")
        lines.append("breathw 150 150 200 200 400 400")
    if rng.random() < 0.4:
        lines.append(f"tone {_tone(rng)}")
    if rng.random() < 0.2:
        lines.append(f"klatt {rng.integers(1, _KLATT_KINDS + 1)}")
    return "\n".join(lines) + "\n"


def _tone(rng: np.random.Generator) -> str:
    """Timbre of a voice: amplitudes 0..255 at rising frequencies in Hz."""
    centres = np.sort(rng.uniform(100, 3500, size=int(rng.integers(2, 5))))
    return " ".join(f"{round(hz)} {rng.integers(60, 256)}" for hz in centres)


def _percent(share: float) -> int:
    return round(100 * share)
