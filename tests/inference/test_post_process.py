"""Smoothing and interpolation over time: of motion layers, which the preview renders, and of generated pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from infer_command import FACE, TINY, small_inputs, tiny_components
from motion_table import acceleration, face_positions, jittered_face, psnr, sharpness, speaking_face

from sonic.cli import run_command
from sonic.commands import infer_command
from sonic.config import SamplerConfig
from sonic.inference.generate import generate, make_video
from sonic.inference.infer_config import InferConfig
from sonic.inference.inputs import Settings
from sonic.inference.post_config import PostConfig
from sonic.inference.post_process import as_displayed, halfway, process_motion, process_pixels, smoothing_kernel
from sonic.inference.report import StageTimer
from sonic.inference.stream import windows
from sonic.types import MotionLayers

FPS = 25


@pytest.fixture(scope="module")
def components():
    return tiny_components()


@pytest.fixture
def layers(rng) -> MotionLayers:
    return MotionLayers(*(torch.randn(1, 31, channels, 4, 5, generator=rng) for channels in (2, 1, 3)))


def config_of(**post) -> InferConfig:
    return InferConfig(sampler=SamplerConfig(sample_steps=1), post=PostConfig(**post))


def cut(layers: MotionLayers, *sizes: int):
    parts = zip(*(track.split(sizes, dim=1) for track in layers), strict=True)
    return (MotionLayers(*part) for part in parts)


@pytest.mark.parametrize("sizes", [[9], [1] * 9, [4, 5], [0, 2, 7]])
def test_windows_do_not_depend_on_how_the_frames_are_cut(sizes):
    edges = np.cumsum([0, *sizes])
    chunks = [range(a, b) for a, b in zip(edges, edges[1:], strict=False)]
    found = [window for group in windows(chunks, 2) for window in group]
    assert found == [tuple(min(max(0, index + offset), 8) for offset in range(-2, 3)) for index in range(9)]


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_a_video_shorter_than_a_window_keeps_its_length(frames):
    assert [window[3] for group in windows([range(frames)], 3) for window in group] == list(range(frames))


@pytest.mark.parametrize("post", [{"smooth_motion": 0.7}, {"interpolate": 2}, {"smooth_motion": 1.0, "interpolate": 2}])
def test_motion_in_chunks_is_motion_in_one_go_to_the_bit(post, layers):
    whole, parts = (list(process_motion(cut(layers, *sizes), PostConfig(**post), FPS)) for sizes in ([31], [12, 12, 7]))
    for name in MotionLayers._fields:
        one, other = (torch.cat([getattr(chunk, name) for chunk in chunks], dim=1) for chunks in (whole, parts))
        assert torch.equal(one, other) and one.shape[1] == 31 * post.get("interpolate", 1)


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_smoothing_takes_out_fast_motion_and_leaves_slow_motion(strength):
    weights = smoothing_kernel(strength, FPS)
    gain = {hertz: float(weights @ np.cos(2 * np.pi * hertz / FPS * np.arange(-3, 4))) for hertz in (0, 1, 3, 11)}
    assert gain[0] == pytest.approx(1) and gain[1] == pytest.approx(1, abs=0.02) and gain[3] == pytest.approx(1, abs=0.1)
    assert gain[11] == pytest.approx(1 - strength, abs=0.12)


def test_a_preview_of_twice_the_frame_rate_keeps_its_own_frames_and_numbers_all(components):
    inputs = small_inputs()
    plain, double = (list(generate(inputs, components, Settings(config_of(interpolate=times)))) for times in (1, 2))
    assert [chunk.start for chunk in double] == np.cumsum([0, *map(len, double)])[:-1].tolist()
    before, after = (np.concatenate([chunk.pixels for chunk in chunks]) for chunks in (plain, double))
    assert len(after) == 2 * len(before) and (after[::2] == before).all() and (after[1:-1:2] != before[:-1]).any()


def test_the_layers_of_a_preview_are_smoothed(components):
    settings = (Settings(config_of(smooth_motion=share)) for share in (0.0, 1.0))
    videos = (generate(small_inputs(), components, each) for each in settings)
    plain, smooth = (np.concatenate([chunk.pixels for chunk in video]).astype(int) for video in videos)
    jumps = [np.abs(np.diff(frames, 2, axis=0)).mean() for frames in (plain, smooth)]
    assert plain.shape == smooth.shape and jumps[1] < 0.7 * jumps[0]


def test_result_and_file_count_the_frames_that_are_displayed(components, tmp_path):
    from sonic.data.video import timed_frames

    inputs, config = small_inputs(), config_of(interpolate=2)
    result, recorder = make_video(inputs, components, config, output=tmp_path / "a.mp4", timer=StageTimer())
    times = [time for time, _ in timed_frames(tmp_path / "a.mp4")]
    assert (result.frames, result.fps, len(recorder.opening), len(times)) == (60, 50, 60, 60)
    assert times[-1] == pytest.approx(59 / 50) and as_displayed(inputs, config.post).num_frames == 60


def test_generated_pixels_of_twice_the_frame_rate_are_nearer_the_truth_than_blended_ones():
    truth = speaking_face(3, frames=9, resolution=160, head=True)
    frames = torch.from_numpy(truth[::2])
    found = torch.cat(list(process_pixels(iter(frames.split(2)), PostConfig(interpolate=2), FPS))).numpy()
    assert (found[::2] == truth[::2]).all() and len(found) == 10 and (found[-1] == found[-2]).all()
    blended = (truth[:-2:2].astype(float) + truth[2::2]) / 2
    assert psnr(found[1:-1:2], truth[1::2]) > psnr(blended, truth[1::2]) > psnr(truth[:-2:2], truth[1::2])


def test_between_two_equal_frames_is_that_frame():
    frame = torch.from_numpy(speaking_face(3, frames=1, resolution=64)[0])
    assert torch.equal(halfway(frame, frame.clone()), frame)


def test_jitter_is_taken_out_of_generated_pixels_and_sharpness_is_not():
    frames = torch.from_numpy(jittered_face(3, frames=30, resolution=256))
    whole, parts = (
        torch.cat(list(process_pixels(iter(frames.split(size)), PostConfig(smooth_motion=1.0), FPS))).numpy() for size in (30, 12)
    )
    assert (whole == parts).all()
    before, after = (acceleration(face_positions(video), FPS) for video in (frames.numpy(), whole))
    assert after < 0.5 * before
    assert sharpness(whole) > 0.97 * sharpness(frames.numpy())


def test_frames_without_a_face_stay_as_they_are(rng):
    frames = torch.randint(0, 256, (5, 96, 128, 3), generator=rng, dtype=torch.uint8)
    assert torch.equal(torch.cat(list(process_pixels(iter(frames.split(2)), PostConfig(smooth_motion=1.0), FPS))), frames)


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("post.smooth_motion=1.5", "post.smooth_motion=1.5 must lie between 0 (off) and 1"),
        ("post.smooth_motion=-0.1", "post.smooth_motion=-0.1 must lie between 0 (off) and 1"),
        ("post.interpolate=3", "post.interpolate=3 must be 1 (off) or 2"),
    ],
)
def test_a_value_outside_the_range_is_one_sentence(value, sentence, capfd):
    assert run_command(infer_command.ENTRY, infer_command.infer, [value, *FACE, *TINY]) == 2
    assert sentence in capfd.readouterr().err
