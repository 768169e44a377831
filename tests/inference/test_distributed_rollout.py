"""Messages of the first rank to the other ranks of a rollout."""

from __future__ import annotations

import pickle
from dataclasses import replace

import torch
from tiny import SIZE, conditions

from sonic.inference.distributed_rollout import compact
from sonic.types import Conditions

FRAMES = 8  # video frames of a clip


def test_a_clip_is_sent_without_the_rest_of_the_video_and_a_constant_as_one_number():
    whole = replace(conditions(2), audio=torch.randn(1, 2, 6, 1000 * FRAMES))
    clip = replace(whole, audio=whole.audio[..., FRAMES : 2 * FRAMES])
    sent = pickle.dumps((compact(clip), compact(clip.drop("audio"))))
    sent_back, silent = pickle.loads(sent)
    fits = sum(value.nbytes for name, value in vars(clip).items() if value is not None)
    assert len(sent) < fits + 8000  # plus the shared tensors once
    assert len(pickle.dumps(clip)) > whole.audio.nbytes
    assert torch.equal(sent_back.audio, clip.audio)
    assert silent.audio.shape == clip.audio.shape
    assert silent.audio.untyped_storage().nbytes() == 4
    for name in ("ref", "text", "motion", "pose"):
        assert torch.equal(getattr(sent_back, name), getattr(whole, name))


def test_a_view_that_repeats_part_of_a_larger_tensor_is_sent_as_that_part():
    row = torch.randn(50, 1, 4, 1, *SIZE)[3]
    sent_back = compact(Conditions(ref=row.expand(2, -1, -1, -1, -1), text=torch.zeros(2, 3, 5)))
    assert sent_back.ref.untyped_storage().nbytes() == row.nbytes
    assert torch.equal(sent_back.ref, row.expand(2, -1, -1, -1, -1))
