"""Audio tokens and motion buckets of clips: their lengths and their batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from sonic.encoders import clip_sound
from sonic.encoders.clip_sound import BUCKET_TICKS, FRAME_SAMPLES, TOKEN_TICKS, ClipSoundEncoder, FrameBuckets, FrameTokens, tick_windows
from sonic.encoders.whisper import WhisperEncoder

WIDTH, LAYERS, PICTURE = 16, 1, 8


@pytest.fixture(scope="module")
def encoder() -> ClipSoundEncoder:
    torch.manual_seed(0)
    whisper = WhisperEncoder({"d_model": WIDTH, "encoder_layers": LAYERS, "encoder_attention_heads": 2, "encoder_ffn_dim": 16})
    tokens = FrameTokens(sum(TOKEN_TICKS) * (LAYERS + 1) * WIDTH, 12, tokens=3, width=PICTURE)
    return ClipSoundEncoder(whisper, tokens, FrameBuckets(sum(BUCKET_TICKS) * WIDTH + PICTURE, 12))


@pytest.fixture
def samples() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(9 * FRAME_SAMPLES + 700).astype(np.float32)


def test_a_recording_of_nine_frames_has_nine_of_everything(encoder, samples):
    found = encoder(samples, 9, torch.ones(PICTURE))
    assert (found.tokens.shape, found.silence.shape, found.buckets.shape) == ((9, 3, PICTURE), (3, PICTURE), (9, 2))
    assert len(encoder.states(samples)) == 38  # 2 for each 25th of a second


def test_fewer_frames_are_those_of_the_recording_cut_there(encoder, samples):
    cut = encoder(samples[: 5 * FRAME_SAMPLES], 5, torch.ones(PICTURE))
    assert all(map(torch.equal, encoder(samples, 5, torch.ones(PICTURE)), cut))


@pytest.mark.parametrize(("length", "frames"), [(FRAME_SAMPLES - 1, 0), (FRAME_SAMPLES - 1, 1), (3 * FRAME_SAMPLES, 4)])
def test_frames_without_sound_are_refused(encoder, length, frames):
    with pytest.raises(ValueError, match=f"{length} samples .* give more sound"):
        encoder(np.zeros(length, np.float32), frames, torch.ones(PICTURE))


def test_frames_are_encoded_in_batches(encoder, samples, monkeypatch):
    whole = encoder(samples, 9, torch.ones(PICTURE))
    monkeypatch.setattr(clip_sound, "BATCH", 4)
    for found, wanted in zip(encoder(samples, 9, torch.ones(PICTURE)), whole, strict=True):
        assert_close(found, wanted)


def test_a_window_has_zeros_where_the_clip_has_no_states():
    states = torch.arange(1, 9).float()[:, None]  # two frames
    assert tick_windows(states, TOKEN_TICKS)[..., 0].tolist() == [[0, 0, 0, 0, 1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6, 7, 8, 0, 0]]
    around = tick_windows(states, BUCKET_TICKS)[..., 0]
    assert around[1].tolist() == [0] * 20 + list(range(1, 9)) + [0] * 22


def test_chunks_of_30_seconds_do_not_see_each_other(encoder):
    second = np.random.default_rng(1).standard_normal(3200).astype(np.float32)
    first = np.random.default_rng(2).standard_normal(480_000).astype(np.float32)
    with torch.no_grad():
        joined = encoder.whisper.chunk_states(np.concatenate([first, second]))
        assert len(joined) == 3000
        assert_close(joined[1500:], encoder.whisper.chunk_states(second))
