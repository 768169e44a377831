"""Checks of recorded wav2vec2 features and of their selection for each video frame."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from golden_case import Case, tensors_of
from torch import Tensor

from sonic.encoders.hidden_states import STATES_PER_S, HiddenStateEncoder
from sonic.encoders.wav2vec import PICKED_PER_S, Wav2VecEncoder, frame_positions, published_clips


@torch.no_grad()
def states_of(encoder: HiddenStateEncoder, samples: np.ndarray) -> Tensor:
    """All hidden states at 50 per second.  [samples] -> [K,states,E]"""
    return torch.cat(list(encoder.pieces(samples)), dim=1)


def stretch(states: Tensor, rate: int = PICKED_PER_S, *, length: int | None = None) -> Tensor:
    """Hidden states resampled to another rate, or to `length` states; the first and last stay the first and last.
    [K,states,E] -> [K,states',E]"""
    size = int(states.shape[1] / STATES_PER_S * rate) if length is None else length
    return F.interpolate(states.mT, size=size, mode="linear", align_corners=True).mT


def pick_frames(states: Tensor, positions: np.ndarray, *, around: int = 0, stride: int = 1) -> Tensor:
    """The states at the given indices, concatenated with `around` neighbours on both sides, `stride` apart; zeros after the end.

    states [K,states,E], positions [F] -> [F,K,(2·around+1)·E]
    """
    last = states.shape[1] - 1
    near = torch.from_numpy(positions)[:, None] + stride * torch.arange(-around, around + 1)
    picked = states[:, near.clamp(0, last)]
    inside = torch.from_numpy(positions <= last).to(picked)
    return rearrange(picked, "k f near e -> f k (near e)") * rearrange(inside, "f -> f 1 1")


def wav2vec_features(case: Case) -> None:
    encoder = Wav2VecEncoder(case.manifest["config"])
    weights = {Wav2VecEncoder.to_transformers(name): tensor for name, tensor in tensors_of(case.weights(0)).items()}
    encoder.encoder.load_state_dict(weights, strict=False)
    samples = case.inputs["waveform_16k"].numpy()
    case.close(torch.from_numpy(encoder.scaled(samples, samples))[None], case.outputs["input_values"])
    states = states_of(encoder, samples)
    case.close(states, case.outputs["hidden_states_50fps"])
    spread = stretch(states)
    case.close(spread, case.outputs["features_30fps"])
    case.close(spread[-1:], case.outputs["last_layer_30fps"])
    name, expected = next((name, tensor) for name, tensor in case.outputs.items() if name.startswith("bucket_"))
    _, fps, frames = name.split("_")
    fps, frames = int(fps.removeprefix("fps")), int(frames.removeprefix("bf"))
    count = frames * published_clips(spread.shape[1], frames, fps)
    assert published_clips(spread.shape[1], frames, fps) == case.manifest["num_repeat"]
    case.close(encoder.encode_audio(samples, count, fps).permute(2, 0, 1), expected)


def bucketing(case: Case) -> None:
    states, repeats = case.inputs["feat50"], case.manifest["num_repeat"]
    spread = case.outputs["interp.out30.lenNone"]
    for name, expected in case.outputs.items():
        words = name.split(".")
        if words[0] == "interp":
            length = words[2].removeprefix("len")
            case.close(stretch(states, int(words[1].removeprefix("out")), length=None if length == "None" else int(length)), expected)
        elif words[0] == "sample_indices":
            rate, _, fps, count = map(int, words[1:])
            assert np.array_equal(frame_positions(count, fps, rate), expected.numpy()), name
        elif words[0].startswith("bucket"):
            case.close(_bucket(name, spread, repeats[name]), expected.unsqueeze(1) if expected.ndim == 2 else expected)
        else:
            fps, frames = (int(word.lstrip("fpsb")) for word in words[1:])
            count = frames * published_clips(spread.shape[1], frames, fps)
            case.close(pick_frames(spread, frame_positions(count, fps)).permute(1, 2, 0)[None], expected)


def _bucket(name: str, spread: torch.Tensor, repeats: int) -> torch.Tensor:
    """ "bucket_fps.fps16.bf80.m0": clips of 80 frames at 16 a second; "bucket.stride2.bf12.m2": every second feature."""
    kind, pace, frames, around = name.split(".")
    frames, around = int(frames.removeprefix("bf")), int(around.removeprefix("m"))
    spread = spread[:1] if "single_layer" in kind else spread[:, :75] if "exact_multiple" in kind else spread
    if kind == "bucket":
        stride = int(pace.removeprefix("stride"))
        return pick_frames(spread, stride * np.arange(frames * repeats), around=around, stride=stride)
    fps = int(pace.removeprefix("fps"))
    assert published_clips(spread.shape[1], frames, fps) == repeats, name
    return pick_frames(spread, frame_positions(frames * repeats, fps), around=around, stride=PICKED_PER_S // fps)
