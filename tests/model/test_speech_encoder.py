"""Laws of the speech features."""

import torch
from torch.testing import assert_close

from sonic.model.speech_encoder import LOG_MEL_DIM, vary_throat


def test_the_same_throat_changes_nothing():
    features = torch.randn(2, 1, LOG_MEL_DIM, 5)
    assert_close(vary_throat(features, torch.ones(2)), features)


def test_a_shorter_throat_moves_a_formant_up():
    features = torch.zeros(2, 1, LOG_MEL_DIM, 1)
    features[:, 0, 20] = 1.0  # mel 20 of the first column
    moved = vary_throat(features, torch.tensor([0.8, 1.25]))[:, 0, :40, 0].argmax(-1)
    assert moved[0] > 20 > moved[1]


def test_silence_stays_silence():
    features = torch.full((1, 1, LOG_MEL_DIM, 3), -0.857)
    assert_close(vary_throat(features, torch.tensor([1.1])), features)
