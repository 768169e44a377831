"""Messages of the first rank to the other ranks of a rollout."""

from __future__ import annotations

from dataclasses import replace

import torch
from tiny import SIZE, conditions

from sonic.parallel.channel import decode, encode
from sonic.types import Conditions

FRAMES = 8  # video frames of a clip


def received(message: object) -> tuple[object, int]:
    """A message as it is received, and the number of bytes sent for it."""
    encoded, tensors = encode(message)
    rest = iter([tensor.clone() for tensor in tensors])
    return decode(bytes(encoded), lambda layout: next(rest)), len(encoded) + sum(tensor.nbytes for tensor in tensors)


def test_a_clip_is_sent_without_the_rest_of_the_video_and_a_constant_as_one_number():
    whole = replace(conditions(2), audio=torch.randn(1, 2, 6, 1000 * FRAMES))
    clip = replace(whole, audio=whole.audio[..., FRAMES : 2 * FRAMES])
    (sent_back, silent), size = received((clip, clip.drop("audio")))
    fits = sum(value.nbytes for name, value in vars(clip).items() if value is not None)
    assert size < fits + 8000  # plus the shared tensors once
    assert torch.equal(sent_back.audio, clip.audio)
    assert silent.audio.shape == clip.audio.shape
    assert silent.audio.untyped_storage().nbytes() == 4
    for name in ("ref", "text", "motion", "pose"):
        assert torch.equal(getattr(sent_back, name), getattr(whole, name))


def test_a_view_that_repeats_part_of_a_larger_tensor_is_sent_as_that_part():
    row = torch.randn(50, 1, 4, 1, *SIZE)[3]
    sent_back, _ = received(Conditions(ref=row.expand(2, -1, -1, -1, -1), text=torch.zeros(2, 3, 5)))
    assert sent_back.ref.untyped_storage().nbytes() == row.nbytes
    assert torch.equal(sent_back.ref, row.expand(2, -1, -1, -1, -1))


def test_a_message_keeps_the_memory_layout_of_its_tensors_and_what_is_around_them():
    tensors = [torch.randn(2, 3, 4).permute(2, 0, 1), torch.randn(4, 6)[:, ::2], torch.zeros(0, 3), torch.tensor(7, dtype=torch.int64)]
    (kind, found, nothing), _ = received(("kind", tensors, None))
    assert (kind, nothing) == ("kind", None)
    assert all(torch.equal(there, tensor) and there.dtype == tensor.dtype for there, tensor in zip(found, tensors, strict=True))
    assert found[0].stride() == tensors[0].stride()
