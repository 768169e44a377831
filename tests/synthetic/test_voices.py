"""Synthetic speech and its viseme track."""

from __future__ import annotations

import builtins
import multiprocessing
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from sonic.data.audio import load_speech
from sonic.synthetic.espeak import DRAWN
from sonic.synthetic.speakers import ACCENTS, SPEAKERS, draw_speaker
from sonic.synthetic.voices import VISEMES, WORDS, Utterance, augment, say, speak, viseme_track

pytest.importorskip("espeakng_loader", reason="speaking needs the extra [voices]")


def test_the_same_seed_gives_the_same_speech_whatever_was_spoken_before():
    first = say(np.random.default_rng(7), seconds=2.0)
    say(np.random.default_rng(8), split="test", seconds=2.0)
    again = say(np.random.default_rng(7), seconds=2.0)
    assert np.array_equal(first.samples, again.samples)
    assert first.phonemes == again.phonemes


def test_a_breathy_voice_draws_its_noise_from_the_seed():
    first, _ = speak("A whisper in the hall.", "en-us+caleb", seed=5)
    speak("Something else in between.", "en-us+Reed", seed=6)
    again, _ = speak("A whisper in the hall.", "en-us+caleb", seed=5)
    assert np.array_equal(first, again)


def _first_samples(seed: int) -> np.ndarray:
    return say(np.random.default_rng(seed), seconds=1.0).samples[:8000]


def test_a_spawned_worker_synthesises_the_same_speech():
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert np.array_equal(pool.apply(_first_samples, (3,)), _first_samples(3))


def test_the_splits_share_no_speakers_and_no_words():
    assert not set(SPEAKERS["train"]) & set(SPEAKERS["test"])
    train = {word for words in WORDS["train"].values() for word in words}
    assert not train & {word for words in WORDS["test"].values() for word in words}


def test_drawn_speakers_speak_in_training_only_and_about_as_often_as_others():
    voices = {split: [say(np.random.default_rng(seed), split=split, seconds=1.0).voice for seed in range(24)] for split in SPEAKERS}
    assert not any(f"+{DRAWN} " in voice for voice in voices["test"])
    assert 6 <= sum(f"+{DRAWN} " in voice for voice in voices["train"]) <= 22


@pytest.mark.parametrize("seed", range(6))
def test_a_random_speaker_speaks_the_same_phonemes_with_another_voice(seed):
    text, speaker = "Father, my paper boat.", draw_speaker(np.random.default_rng(seed))
    samples, phonemes = speak(text, f"en-us+{DRAWN}", variant=speaker)
    again, _ = speak(text, f"en-us+{DRAWN}", variant=speaker)
    usual, usual_phonemes = speak(text, "en-us+m1")
    assert np.array_equal(samples, again)
    assert [name for *_, name in phonemes if name] == [name for *_, name in usual_phonemes if name]
    assert samples.std() > 0.003
    length = min(len(samples), len(usual))
    assert np.corrcoef(samples[:length], usual[:length])[0, 1] < 0.9


@pytest.mark.parametrize(("split", "accent"), [(split, accent) for split in ACCENTS for accent in ACCENTS[split]])
def test_every_accent_speaks_its_words(split, accent):
    word = WORDS[split][ACCENTS[split][accent]][0]
    samples, phonemes = speak(word, f"{accent}+{SPEAKERS[split][0]}")
    assert len(samples) > 1000
    assert any(sound in VISEMES for _, _, name in phonemes for sound in name)


def test_seconds_are_exact_and_phonemes_fill_them_in_order():
    utterance = say(np.random.default_rng(1), seconds=3.0)
    assert len(utterance.samples) == 48_000
    starts, stops = zip(*[(start, stop) for start, stop, _ in utterance.phonemes], strict=True)
    assert all(start <= stop for start, stop in zip(starts, stops, strict=True))
    assert np.allclose(starts[1:], stops[:-1], atol=1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_opening_follows_loudness_without_lead_or_lag(seed):
    utterance = say(np.random.default_rng(seed), split="test", seconds=8.0)
    opening = viseme_track(utterance, 200)[:, 0]
    level = np.log10(np.sqrt((utterance.samples.reshape(200, 640) ** 2).mean(axis=1)) + 1e-3)
    by_lag = [np.corrcoef(opening[4:-4], np.roll(level, -lag)[4:-4])[0, 1] for lag in range(-4, 5)]
    assert int(np.argmax(by_lag)) == 4
    assert max(by_lag) > 0.5


def test_every_bilabial_is_seen_closed_and_silence_is_exactly_zero():
    utterance = say(np.random.default_rng(5), seconds=8.0)
    track = viseme_track(utterance, 200)
    instants = (np.arange(200) + 0.5) / 25
    for start, stop, name in utterance.phonemes:
        if name in ("m", "b", "p") and 0.1 < start < 7.8:
            near = (instants > start - 0.03) & (instants < stop + 0.03)
            assert track[near, 2].max() > 0.9
            assert track[near, 0].min() < 0.06
        if name == "":
            inside = (instants > start + 0.11) & (instants < stop - 0.11)  # a rounded vowel reaches 0.1 s
            assert not track[inside, :2].any()


def test_the_track_of_silence_is_zero_and_later_frames_are_silent():
    silence = Utterance(np.zeros(16_000, np.float32), ((0.0, 1.0, ""),), "", "")
    assert not viseme_track(silence, 40).any()


def test_the_track_stays_in_its_ranges():
    track = viseme_track(say(np.random.default_rng(2), seconds=6.0), 150)
    assert track.dtype == np.float32 and track.shape == (150, 5)
    assert track[:, [0, 2, 3, 4]].min() >= 0 and track[:, [0, 2, 3, 4]].max() <= 1
    assert np.abs(track[:, 1]).max() <= 1


def test_augmented_speech_keeps_its_length_range_and_timing():
    rng = np.random.default_rng(0)
    samples = say(rng, seconds=4.0).samples
    levels = np.log10((samples.reshape(-1, 160) ** 2).mean(axis=1) + 1e-4)
    for _ in range(5):
        dirty = augment(samples, rng)
        assert dirty.shape == samples.shape and np.abs(dirty).max() <= 1
        loudness = np.log10((dirty.reshape(-1, 160) ** 2).mean(axis=1) / dirty.max() ** 2 + 1e-4)
        by_lag = [np.corrcoef(levels[5:-5], np.roll(loudness, -lag)[5:-5])[0, 1] for lag in range(-5, 6)]
        assert abs(int(np.argmax(by_lag)) - 5) <= 1


def test_silence_can_be_augmented():
    assert np.isfinite(augment(np.zeros(8000, np.float32), np.random.default_rng(0))).all()


def test_an_unknown_split_names_the_choices():
    with pytest.raises(ValueError, match="split=tset is unknown; choose one of: test, train"):
        say(np.random.default_rng(0), split="tset", seconds=1.0)


def test_an_unknown_voice_is_named():
    with pytest.raises(ValueError, match="voice=xx-nowhere"):
        speak("hello", "xx-nowhere")


def test_without_the_wheel_the_error_names_the_extra(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "espeakng_loader":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"pip install espeakng-loader"):
        speak("hello", "en-us")


def test_the_bundled_recording_is_the_one_its_card_describes(monkeypatch):
    """The card's own lines write it again, here to a list."""
    card = (files("sonic.assets") / "sample_speech.md").read_text()
    written = []
    monkeypatch.setattr("soundfile.write", lambda path, samples, rate: written.append((path, samples, rate)))
    exec(card.partition("```python\n")[2].partition("```")[0], {})
    ((path, samples, rate),) = written
    bundled = load_speech(files("sonic.assets") / Path(path).name)
    assert rate == 16_000 and len(bundled.samples) == len(samples)
    assert np.abs(bundled.samples - samples / 32767).max() < 1e-3
