"""Synthesised sentences with known phoneme times, their viseme tracks, and augmentation to the sound of real recordings.

The viseme track is the ground truth of training and evaluation. Sample rate 16 kHz, video rate 25 frames per second.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.fft import next_fast_len

from sonic.data.audio import SAMPLE_RATE, resample
from sonic.geometry import FPS
from sonic.synthetic.espeak import DRAWN, espeak
from sonic.synthetic.speakers import ACCENTS, DRAWN_SHARE, SPEAKERS, SPEED, WORDS, draw_speaker
from sonic.types import pick

Phoneme = tuple[float, float, str]  # start s, end s, IPA name

_LEFT_TO_THE_NEIGHBOURS = "hɦkɡgŋxɣχqʁʀʔ"  # articulated behind the lips: they take the mouth shape of their neighbours
_VISEMES = {
    # sounds: (open, width, press, teeth, tongue); width -1 rounded .. +1 spread, the others 0..1
    "aɑ": (0.88, 0.10, 0, 0.45, 0.25),
    "æɐ": (0.82, 0.25, 0, 0.50, 0.25),
    "ʌ": (0.68, 0.05, 0, 0.40, 0.20),
    "ɛεe": (0.58, 0.40, 0, 0.60, 0.30),
    "əɜɚɘɝɤ": (0.46, 0.05, 0, 0.40, 0.25),
    "ɪɨᵻ": (0.36, 0.45, 0, 0.65, 0.30),
    "iɯ": (0.29, 0.65, 0, 0.75, 0.25),
    "ɔɒɞ": (0.68, -0.40, 0, 0.25, 0.15),
    "oɵ": (0.52, -0.60, 0, 0.15, 0.10),
    "øœ": (0.46, -0.55, 0, 0.25, 0.20),
    "uʊʉ": (0.25, -0.85, 0, 0.05, 0.05),
    "yʏɥ": (0.22, -0.80, 0, 0.20, 0.10),
    "wʍ": (0.14, -0.95, 0, 0.00, 0.00),
    "mbpɱ": (0.00, 0.00, 1, 0.00, 0.00),
    "β": (0.08, 0.00, 0.7, 0.10, 0.00),
    "fvʋ": (0.10, 0.10, 0.3, 0.95, 0.00),
    "θð": (0.20, 0.10, 0, 0.70, 0.95),
    "tdnszʈɖ": (0.18, 0.25, 0, 0.90, 0.45),
    "cɟɲɕʑçjʎ": (0.22, 0.35, 0, 0.80, 0.35),
    "lɫɬɭ": (0.32, 0.10, 0, 0.50, 0.90),
    "ʃʒʂʐ": (0.20, -0.55, 0, 0.95, 0.15),
    "rɹɾɻ": (0.25, -0.25, 0, 0.45, 0.50),
    _LEFT_TO_THE_NEIGHBOURS: (0.28, 0.05, 0, 0.45, 0.15),
}
_VOICELESS_STOPS, _CLOSURE_BEFORE_BURST_S = "ptkcqʈ", 0.050
VISEMES = {sound: np.array(shape, np.float32) for sounds, shape in _VISEMES.items() for sound in sounds}

_GRID_HZ = 200  # internal rate of the track; a frame centre (k + 1/2) / 25 s falls on sample 8k + 4
_SPREAD_S = (0.026, 0.040, 0.012, 0.024, 0.020)  # gaussian width of coarticulation for each number of a viseme
_CLOSURE_S = 0.070  # shortest hold of a bilabial: longer than a video frame, so every closure is seen
_QUIET_DB = 20.0  # dB below the loud parts at which the relative loudness is zero


@dataclass(frozen=True)
class Utterance:
    """Clean speech with its phonemes (start s, end s, IPA name; the empty name is silence), text and voice."""

    samples: np.ndarray
    phonemes: tuple[Phoneme, ...]
    text: str
    voice: str

    @property
    def seconds(self) -> float:
        """Duration of the samples in seconds."""
        return len(self.samples) / SAMPLE_RATE


def say(rng: np.random.Generator, *, seconds: float, split: str = "train") -> Utterance:
    """Synthesise sentences of random words by a random speaker, `seconds` long; the last sentence is cut off if need be.

    Splits share no speakers and no words. The same rng state gives the same samples.
    """
    accents = pick(ACCENTS, split, "split")
    english = [name for name, language in accents.items() if language == "en"]
    accent = str(rng.choice(english if rng.random() < 0.5 else list(accents)))
    speaker, variant = str(rng.choice(SPEAKERS[split])), ""
    if split == "train" and rng.random() < DRAWN_SHARE:
        speaker, variant = DRAWN, draw_speaker(rng)
    voice = f"{accent}+{speaker}"
    manner = {"rate": int(rng.integers(125, 215)), "pitch": int(rng.integers(20, 85)), "range": int(rng.integers(25, 85))}
    speed = float(rng.uniform(*SPEED[split]))

    samples, phonemes, texts, end = [], [], [], 0.0
    pause = float(rng.uniform(0.08, 0.40))
    while end < seconds:
        samples.append(np.zeros(round(pause * SAMPLE_RATE), np.float32))
        phonemes.append((end, end + pause, ""))
        end += len(samples[-1]) / SAMPLE_RATE
        text = sentence(rng, WORDS[split][accents[accent]])
        sound, spoken = speak(text, voice, seed=int(rng.integers(2**31)), speed=speed, manner=manner, variant=variant)
        samples.append(sound)
        phonemes += [(end + start, end + stop, name) for start, stop, name in spoken]
        texts.append(text)
        end += len(sound) / SAMPLE_RATE
        pause = float(rng.uniform(0.05, 0.25) if rng.random() < 0.7 else rng.uniform(0.4, 1.0))
    sound, phonemes = _cut(np.concatenate(samples), phonemes, seconds)
    level = float(rng.uniform(0.4, 0.9)) / max(1e-4, float(np.abs(sound).max()))
    return Utterance(sound * np.float32(level), tuple(phonemes), " ".join(texts), f"{voice} {manner} speed {speed:.3f}")


def sentence(rng: np.random.Generator, words: tuple[str, ...]) -> str:
    """A random sentence of three to nine words, with punctuation for its intonation."""
    chosen = [str(word) for word in rng.choice(words, size=int(rng.integers(3, 10)))]
    commas = [word + "," if rng.random() < 0.12 else word for word in chosen[:-1]]
    return " ".join([*commas, chosen[-1]]) + str(rng.choice([".", ".", ".", "?", "!"]))


def speak(
    text: str, voice: str, *, seed: int = 0, speed: float = 1.0, manner: dict[str, int] | None = None, variant: str = ""
) -> tuple[np.ndarray, list[Phoneme]]:
    """Synthesise `text` by an espeak-ng voice such as "en-us+f2": samples (float32, 16 kHz) and phonemes. Deterministic.

    manner: rate (words per minute), pitch and range (0..100). `speed` plays the result faster, which raises the formants too.
    variant: voice variant file of the speaker DRAWN (see draw_speaker).
    """
    with espeak(voice.partition("-")[0].partition("+")[0], variant) as engine:
        sound, events, rate = engine.synthesise(text, voice, seed=seed, manner={"rate": 165, "pitch": 50, "range": 50} | (manner or {}))
    sound = resample(sound, round(rate * speed), SAMPLE_RATE)
    length = len(sound) / SAMPLE_RATE
    events = [(0.0, ""), *events]
    times = [min(length, seconds * rate / round(rate * speed)) for seconds, _ in events] + [length]
    phonemes = [(start, stop, name) for start, stop, (_, name) in zip(times, times[1:], events, strict=False) if stop > start]
    return sound, _start_stops_at_the_closure(phonemes)


def _start_stops_at_the_closure(phonemes: list[Phoneme]) -> list[Phoneme]:
    """Move the start of p, t, k to their closure: espeak-ng reports the burst, which follows 50 ms of silence.

    Measured on the level around 800 consonants between vowels; the reported times of voiced stops and all other sounds are right.
    """
    moved = list(phonemes)
    for i, (burst, stop, name) in enumerate(phonemes):
        sounds = [letter for letter in name if letter in VISEMES]
        if not sounds or sounds[0] not in _VOICELESS_STOPS:
            continue
        start = burst
        if i > 0:
            before, _, name_before = moved[i - 1]
            start = max(burst - _CLOSURE_BEFORE_BURST_S, (before + burst) / 2)
            moved[i - 1] = (before, start, name_before)
        release = stop if len(sounds) > 1 or i + 1 == len(moved) else min(stop, burst + 0.01)
        moved[i] = (start, release, name)
        if i + 1 < len(moved):
            moved[i + 1] = (release, *phonemes[i + 1][1:])
    return moved


def _cut(samples: np.ndarray, phonemes: list[Phoneme], seconds: float) -> tuple[np.ndarray, list[Phoneme]]:
    samples = samples[: round(seconds * SAMPLE_RATE)].copy()
    samples[-160:] *= np.linspace(1, 0, len(samples[-160:]), dtype=np.float32)  # 10 ms: a cut vowel must not click
    kept = [(start, min(stop, seconds), name) for start, stop, name in phonemes if start < seconds]
    return samples, kept


def viseme_track(utterance: Utterance, num_frames: int) -> np.ndarray:
    """Visemes of every video frame, float32 [F,5] (open, width, press, teeth, tongue); frame k is the instant (k + 1/2) / 25 s.

    The mouth shapes of the phonemes, smoothed by small gaussians (coarticulation); the opening is scaled by 0.45 + 0.55 · relative
    loudness. Silence is exactly zero, and bilabials close fully.
    """
    count = max(num_frames * _GRID_HZ // FPS, round(utterance.seconds * _GRID_HZ)) + 1
    targets, weights = np.zeros((count, 5), np.float32), np.full((count, 1), 1.0, np.float32)
    closures = np.zeros(count, np.float32)
    for start, stop, name in utterance.phonemes:
        shapes = [sound for sound in name if sound in VISEMES]
        edges = np.linspace(start, stop, len(shapes) + 1)  # a diphthong or an affricate moves through its parts
        for sound, a, b in zip(shapes, edges, edges[1:], strict=False):
            span = slice(round(a * _GRID_HZ), max(round(b * _GRID_HZ), round(a * _GRID_HZ) + 1))
            targets[span] = VISEMES[sound]
            weights[span] = 0.25 if sound in _LEFT_TO_THE_NEIGHBOURS else 1.0
            if VISEMES[sound][2] == 1:
                middle, half = (a + b) / 2, max(_CLOSURE_S, 0.8 * (b - a)) / 2
                closures[max(0, round((middle - half) * _GRID_HZ)) : round((middle + half) * _GRID_HZ) + 1] = 1
    track = np.stack([_blend(targets[:, i], weights[:, 0], spread) for i, spread in enumerate(_SPREAD_S)], axis=1)
    press = np.clip(1.15 * _smooth(closures, _SPREAD_S[2]), 0, 1)
    track[:, 2] = np.maximum(press, track[:, 2] * (track[:, 2] < 0.9))
    track[:, 0] *= (0.45 + 0.55 * _relative_loudness(utterance.samples, count)) * (1 - press)
    return track[_GRID_HZ // FPS // 2 :: _GRID_HZ // FPS][:num_frames]


def _blend(values: np.ndarray, weights: np.ndarray, spread_s: float) -> np.ndarray:
    """Weighted gaussian average of `values`: sounds of small weight take the values of their neighbours."""
    return _smooth(values * weights, spread_s) / _smooth(weights, spread_s)


def _smooth(values: np.ndarray, spread_s: float) -> np.ndarray:
    """Gaussian smoothing with compact support (2.5 widths), so that silence a little away from sound stays exactly zero."""
    radius = int(2.5 * spread_s * _GRID_HZ)
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / (spread_s * _GRID_HZ)) ** 2)
    return np.convolve(np.pad(values, radius, mode="edge"), kernel / kernel.sum(), mode="valid").astype(np.float32)


def _relative_loudness(samples: np.ndarray, count: int) -> np.ndarray:
    """Loudness at _GRID_HZ, from 0 (20 dB below the loud parts, or quieter) to 1 (the loud parts: 95th percentile)."""
    hop = SAMPLE_RATE // _GRID_HZ
    padded = np.zeros(count * hop, np.float32)
    padded[: min(len(samples), count * hop)] = samples[: count * hop]
    power = np.roll(padded, hop // 2).reshape(count, hop) ** 2  # window i is centred on i / 200 s
    power = np.maximum(_smooth(power.mean(axis=1), 0.014), 0)
    decibels = 10 * np.log10(power + 1e-10)
    audible = decibels[decibels > -60]
    loud = np.percentile(audible, 95) if len(audible) else 0.0
    return np.clip(1 + (decibels - loud) / _QUIET_DB, 0, 1).astype(np.float32)


def augment(samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Augment speech as if recorded by a microphone in a room: echo, band limits, noise, gain. Length and timing do not change."""
    count = len(samples)
    length = next_fast_len(count + SAMPLE_RATE // 2, real=True)  # room for the echo; a large prime factor takes ten times as long
    spectrum = np.fft.rfft(samples, length)
    if rng.random() < 0.5:
        spectrum *= np.fft.rfft(_room(rng), length)
    if rng.random() < 0.8:
        spectrum *= _microphone(np.fft.rfftfreq(length, 1 / SAMPLE_RATE), rng)
    sound = np.fft.irfft(spectrum, length)[:count]
    level = float(np.sqrt(np.mean(sound**2))) + 1e-5
    if rng.random() < 0.8:
        sound = sound + _noise(count, rng) * max(level, 1e-3) * 10 ** (-rng.uniform(15, 50) / 20)
    peak = float(np.abs(sound).max()) + 1e-6
    gain = 10 ** (-rng.uniform(0, 26) / 20) / peak
    drive = 1.5 if rng.random() < 0.05 else 1.0  # one recording in twenty is overdriven
    return np.clip(sound * gain * drive, -1, 1).astype(np.float32)


def _room(rng: np.random.Generator) -> np.ndarray:
    """Impulse response of a small room: the direct sound at time zero and a decaying tail of noise."""
    decay_s = rng.uniform(0.04, 0.35)
    time = np.arange(int(min(0.5, decay_s) * SAMPLE_RATE)) / SAMPLE_RATE
    tail = rng.standard_normal(len(time)) * np.exp(-6.9 * time / decay_s)  # -60 dB after decay_s
    tail *= rng.uniform(0.1, 0.6) / np.sqrt(np.sum(tail**2))
    tail[0] = 1.0
    return tail


def _microphone(frequency: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Zero-phase frequency response: a high-pass, a low-pass, a tilt and two broad bumps."""
    low, high = rng.uniform(30, 280), rng.uniform(3200, 8000)
    octaves = np.log2(np.maximum(frequency, 30) / 1000)
    decibels = rng.uniform(-4, 4) * octaves
    for _ in range(2):
        decibels += rng.uniform(-7, 7) * np.exp(-0.5 * ((octaves - rng.uniform(-3, 3)) / rng.uniform(0.3, 1.0)) ** 2)
    return 10 ** (decibels / 20) / np.sqrt(1 + (low / np.maximum(frequency, 1)) ** 4) / np.sqrt(1 + (frequency / high) ** 8)


def _noise(count: int, rng: np.random.Generator) -> np.ndarray:
    """Noise of unit power: white to brown, sometimes with mains hum."""
    spectrum = np.fft.rfft(rng.standard_normal(count))
    frequency = np.fft.rfftfreq(count, 1 / SAMPLE_RATE)
    spectrum *= np.maximum(frequency, 40) ** -rng.uniform(0, 1.2)
    noise = np.fft.irfft(spectrum, count)
    noise /= np.sqrt(np.mean(noise**2)) + 1e-9
    if rng.random() < 0.25:
        noise += rng.uniform(0.2, 1.0) * np.sin(2 * np.pi * rng.choice([50, 60, 100, 120]) * np.arange(count) / SAMPLE_RATE)
    return noise
