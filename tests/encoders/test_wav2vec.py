"""Speech features of published models, on a tiny encoder."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from golden_speech import pick_frames, states_of, stretch
from torch.testing import assert_close

from sonic.encoders.wav2vec import Wav2VecEncoder, frame_positions

TINY = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "conv_dim": [8] * 7, "conv_bias": True,
    "feat_extract_norm": "layer", "do_stable_layer_norm": True, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return Wav2VecEncoder(TINY)


def speech(seconds):
    time = np.arange(round(16_000 * seconds)) / 16_000
    return (np.sin(2 * np.pi * (200 + 40 * time) * time) * np.sin(2 * np.pi * 1.7 * time)).astype(np.float32)


def test_every_frame_has_all_layers_and_frames_after_the_end_are_silent(encoder):
    found = encoder.encode_audio(speech(1.0), 40)
    assert found.shape == (3, 16, 40)
    assert found[..., :20].abs().min(1).values.max() > 0 and not found[..., 26:].any()


@pytest.mark.parametrize("seconds", [0.2, 1.0, 2.5])
@pytest.mark.parametrize("in_memory", [1 << 30, 0])
def test_features_picked_window_by_window_are_those_of_all_states(encoder, seconds, in_memory, monkeypatch):
    monkeypatch.setattr(Wav2VecEncoder, "WINDOW_S", 1)
    monkeypatch.setattr("sonic.encoders.speech_encoder.IN_MEMORY", in_memory)
    sound = speech(seconds)
    expected = pick_frames(stretch(states_of(encoder, sound)), frame_positions(70, 25))
    assert_close(encoder.encode_audio(sound, 70), expected.permute(1, 2, 0), atol=1e-5, rtol=1e-5)


def test_several_voices_are_encoded_independently(encoder):
    voices = [speech(1.0), -speech(0.5)]
    assert_close(encoder.encode_audio_batch(voices, 30), torch.stack([encoder.encode_audio(voice, 30) for voice in voices]))


def test_features_that_do_not_fit_on_the_disk_are_refused_in_one_sentence(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr("sonic.encoders.speech_encoder.IN_MEMORY", 0)
    monkeypatch.setattr("sonic.encoders.speech_encoder.shutil.disk_usage", lambda folder: shutil._ntuple_diskusage(100, 99, 1))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(ValueError, match=rf"needed in {tmp_path} .* TMPDIR"):
        encoder.encode_audio(speech(1.0), 40)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("seconds", [0.2, 1.0, 2.5, 3.0])
def test_windows_keep_every_hidden_state_at_its_position(encoder, seconds, monkeypatch):
    whole = states_of(encoder, speech(seconds))
    monkeypatch.setattr(Wav2VecEncoder, "WINDOW_S", 1)
    monkeypatch.setattr(Wav2VecEncoder, "MARGIN_S", 1)
    windows = states_of(encoder, speech(seconds))
    assert windows.shape == whole.shape
    # attention spans the whole recording, so only the input of the layers is equal away from the window borders
    assert_close(windows[0], whole[0], atol=1e-3, rtol=1e-3)


def test_windows_give_nearly_the_features_of_the_whole_recording(encoder, monkeypatch):
    whole = states_of(encoder, speech(40.0))
    monkeypatch.setattr(Wav2VecEncoder, "WINDOW_S", 15)
    apart = (states_of(encoder, speech(40.0)) - whole).square().mean(-1).sqrt() / whole.square().mean(-1).sqrt()
    assert apart.mean() < 0.01 and apart.amax() < 0.1


def test_resampled_features_keep_the_first_and_the_last():
    states = torch.randn(2, 50, 3)
    found = stretch(states)
    assert found.shape == (2, 30, 3)
    assert_close(found[:, [0, -1]], states[:, [0, -1]])


def test_a_frame_is_driven_by_the_sound_of_its_time():
    states = torch.arange(60.0).reshape(1, 60, 1)
    found = pick_frames(states, frame_positions(25, 25))
    assert_close(found.flatten() / 30, torch.arange(25) / 25, atol=0.5 / 30 + 1e-6, rtol=0)
