"""The preview's speech encoder and its augmentation."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from sonic.data.audio import MELS, SILENT_COLUMN
from sonic.encoders.logmel import LogMelEncoder, TimeConv, vary_throat


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return LogMelEncoder().eval()


def noise(seconds):
    return np.random.default_rng(0).normal(0, 0.1, int(16_000 * seconds)).astype(np.float32)


def test_every_video_frame_has_its_features(encoder):
    assert encoder.encode_audio(noise(1.0), 37).shape == (1, 160, 37)


def test_features_do_not_depend_on_the_chunk_size(encoder, monkeypatch):
    samples = noise(4.0)
    whole = encoder.encode_audio(samples, 100)
    monkeypatch.setattr(LogMelEncoder, "CHUNK", 7)
    assert_close(encoder.encode_audio(samples, 100), whole, atol=2e-5, rtol=0)


def test_features_do_not_depend_on_sound_beyond_the_margin(encoder):
    columns = torch.randn(1, 2 * 80, MELS)
    other = columns.clone()
    other[:, : 2 * (40 - LogMelEncoder.MARGIN)] = SILENT_COLUMN
    assert_close(encoder(other)[:, 40:], encoder(columns)[:, 40:])
    other[:, : 2 * (40 - LogMelEncoder.MARGIN) + 30] = SILENT_COLUMN
    assert (encoder(other)[:, 40] - encoder(columns)[:, 40]).abs().max() > 1e-4


def test_a_convolution_of_the_encoder_is_that_of_torch():
    conv = TimeConv(3, 5, 5, dilation=2)
    kernel = conv.weight.unflatten(1, (5, 3)).permute(0, 2, 1)
    x = torch.randn(2, 20, 3)
    expected = torch.nn.functional.conv1d(x.mT, kernel, conv.bias, padding=4, dilation=2).mT
    assert_close(conv(x), expected)


def test_an_unchanged_vocal_tract_changes_nothing():
    columns = torch.randn(2, 5, MELS)
    assert_close(vary_throat(columns, torch.ones(2, 1)), columns)


def test_a_shorter_vocal_tract_moves_a_formant_up():
    columns = torch.zeros(2, 1, MELS)
    columns[:, 0, 20] = 1.0
    moved = vary_throat(columns, torch.tensor([[0.8], [1.25]]))[:, 0].argmax(-1)
    assert moved[0] > 20 > moved[1]


def test_a_mouth_of_another_shape_moves_the_low_formants_alone():
    columns = torch.zeros(1, 1, MELS)
    columns[:, 0, [10, 35]] = 1.0
    moved = vary_throat(columns, torch.where(torch.arange(MELS) < 30, 0.5, 1.0)[None])[0, 0]
    assert moved[10] == 0 and moved[20] == moved[21] == 0.75 and moved[35] == 1


def test_silent_columns_stay_silent():
    columns = torch.full((1, 3, MELS), SILENT_COLUMN)
    assert_close(vary_throat(columns, torch.tensor([[1.1]])), columns)
