"""Inference from end to end with a tiny model: lengths, results, reproducible frames, and no files after an interruption."""

from __future__ import annotations

import itertools
import json
import math
import threading
from types import SimpleNamespace
from unittest.mock import patch

import av
import numpy as np
import pytest
import torch
import yaml
from infer_command import FACE, TINY, babble, small_inputs, tiny_components, write_wav, write_weights
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from sonic.cli import run_command
from sonic.commands import infer_command
from sonic.config import DecodeConfig, FaceConfig, SamplerConfig, VideoConfig
from sonic.data.image import MOUTH_IN_FACE, cut
from sonic.families.preview import Preview, head_poses
from sonic.geometry import BlockSpan
from sonic.inference.fit_picture import fit_portrait
from sonic.inference.generate import generate
from sonic.inference.infer_config import InferConfig
from sonic.inference.inputs import InMemory, Settings
from sonic.inference.motion_config import HeadConfig
from sonic.inference.report import FrameRecorder, StageTimer
from sonic.inference.stream import (
    IDLE_THREADS,
    buffer_all,
    decode_motion,
    half_the_threads,
    prefetch,
    render_motion,
    smooth_seams,
    with_events,
)
from sonic.system import device_stream
from sonic.types import FaceBox, LatentBlock, MotionLayers, Mouth, Portrait, Speech

KEYS = {
    "output", "frames", "fps", "audio_seconds", "frames_per_second", "first_frame_s", "peak_rss_gib", "peak_vram_gib",
    "stages_s", "versions", "sampling", "plan", "face", "sound",
}  # fmt: skip
QUICK = SamplerConfig(sample_steps=1)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_weights(tmp_path_factory.mktemp("parts") / "weights")


@pytest.fixture
def command(tmp_path, monkeypatch, weights):
    monkeypatch.chdir(tmp_path)
    return lambda *argv: run_command(infer_command.ENTRY, infer_command.infer, [*argv, f"weights={weights}", *FACE, *TINY])


@pytest.fixture(scope="module")
def components():
    return tiny_components()


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def frames_of(inputs, components, **options) -> np.ndarray:
    settings = Settings(InferConfig(sampler=QUICK, **options))
    return np.concatenate([np.asarray(chunk.pixels) for chunk in generate(inputs, components, settings)])


def seconds_of(path) -> tuple[int, float]:
    with av.open(str(path)) as container:
        sound = sum(frame.samples / frame.sample_rate for frame in container.decode(audio=0))
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0)), sound


@pytest.mark.parametrize("seconds", [0.3, 1.0, 1.3])
def test_the_video_is_as_long_as_the_recording(seconds, command, tmp_path):
    recording = write_wav(tmp_path / "speech.wav", babble(seconds))
    assert command(f"audio={recording}", "name=video") == 0
    frames, sound = seconds_of(tmp_path / "runs/video/out.mp4")
    assert abs(frames - 25 * seconds) <= 1
    assert abs(sound - seconds) < 0.05


@pytest.mark.parametrize(("infer_frames", "num_clip"), [(12, 2), (32, 1), (7, 3), (1, 30)])
def test_the_number_of_clips_limits_the_video(infer_frames, num_clip, command, tmp_path):
    recording, most = write_wav(tmp_path / "speech.wav", babble(2.0)), infer_frames * num_clip
    assert command(f"audio={recording}", f"video.num_clip={num_clip}", f"video.infer_frames={infer_frames}", "output=video.mp4") == 0
    frames, sound = seconds_of(tmp_path / "video.mp4")
    assert frames == most
    assert abs(sound - most / 25) < 1024 / 16_000  # a packet of sound


def test_a_run_keeps_its_results(command, tmp_path, capsys):
    recording = write_wav(tmp_path / "speech.wav", babble(0.8))
    assert command(f"audio={recording}", "name=video", "seed=5") == 0
    folder = tmp_path / "runs/video"
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml", "command.txt", "git_commit.txt", "log.txt", "result.json", "contact_sheet.png", "out.mp4"
    }  # fmt: skip
    result = json.loads((folder / "result.json").read_text())
    assert set(result) == KEYS
    assert set(result["stages_s"]) == {"load", "encode", "denoise", "decode", "write"}
    assert (result["frames"], result["fps"], result["output"]) == (20, 25, str(folder / "out.mp4"))
    assert set(result["face"]) == {"face_box", "face.mouth", "crop"}
    assert yaml.safe_load((folder / "config.yaml").read_text())["seed"] == 5
    assert str(folder / "out.mp4") in capsys.readouterr().out


@pytest.mark.parametrize(("typed", "sides"), [([], 1.6), (["expand_ratio=0.15"], 1.3)])
def test_the_result_has_the_crop_that_the_model_worked_on_in_pixels_of_the_photograph(typed, sides, command, tmp_path, monkeypatch):
    cropped = []
    monkeypatch.setattr("sonic.families.preview.cut", lambda pixels, crop: cropped.append(crop) or cut(pixels, crop))
    recording = write_wav(tmp_path / "speech.wav", babble(0.3))
    assert command(f"audio={recording}", "min_resolution=1024", "name=video", *typed) == 0
    crop = json.loads((tmp_path / "runs/video/result.json").read_text())["face"]["crop"]
    assert crop["side"] == pytest.approx(sides * math.sqrt(115 * 22 / MOUTH_IN_FACE)) and (crop["angle"], crop["resolution"]) == (0, 96)
    (used,) = cropped  # in pixels of the video, which is twice as large as the photograph
    assert (used.center_x, used.center_y, used.side) == pytest.approx((2 * crop["center_x"], 2 * crop["center_y"], 2 * crop["side"]))


def test_the_same_seed_gives_the_same_frames_and_another_one_others(components):
    first, again, other = (frames_of(small_inputs(seed=seed), components) for seed in (3, 3, 4))
    assert (first == again).all()
    assert (first != other).any()


@pytest.mark.parametrize("queue", [1, 3])
def test_decoding_online_gives_the_frames_of_decoding_at_the_end(queue, components, one_thread):
    online, late = (frames_of(small_inputs(), components, decode=DecodeConfig(online=online, queue=queue)) for online in (True, False))
    assert (online == late).all()


def test_only_the_face_moves(components):
    inputs = small_inputs()
    frames = frames_of(inputs, components)
    assert frames.shape == (30, 128, 160, 3)
    assert (frames[:, :, :10] == inputs.portrait.pixels[:, :10]).all()
    assert (frames != inputs.portrait.pixels).any()


def test_an_audio_column_belongs_to_the_frame_of_its_time(components):
    inputs = small_inputs(30)
    conditions = Preview().condition(inputs, components, Settings()).conditions
    assert conditions.audio.shape[-1] == 36  # whole blocks of 12
    assert_close(conditions.audio[0], components.speech.encode_audio(inputs.speech.samples, 36))


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("output", [[], ["output=video.mp4"]])
def test_a_video_that_is_stopped_leaves_no_video_and_no_thread_at_work(stop, output, command, tmp_path, monkeypatch):
    seen = itertools.count()

    def record(self, chunk):
        if next(seen) == 1:
            raise stop

    monkeypatch.setattr(FrameRecorder, "record", record)
    recording = write_wav(tmp_path / "speech.wav", babble(3.0))
    assert command(f"audio={recording}", *output) == (130 if stop is KeyboardInterrupt else 1)
    assert not list(tmp_path.rglob("*.mp4"))
    assert not (stop is KeyboardInterrupt and (tmp_path / "runs").exists())
    threads = [thread for thread in threading.enumerate() if thread.name.startswith(("denoise", "decode"))]
    assert len(threads) == len(IDLE_THREADS["denoise"]) + len(IDLE_THREADS["decode"])


def test_videos_one_after_the_other_are_made_in_one_thread_and_those_at_once_in_two():
    def of_threads():
        for _ in range(4):
            yield threading.get_ident()

    first, stopped = list(prefetch(of_threads(), 1, name="video")), prefetch(of_threads(), 1, name="video")
    at_once = [next(stopped), *prefetch(of_threads(), 1, name="video")]
    stopped.close()
    assert set(first) == {at_once[0]} == set(prefetch(of_threads(), 1, name="video")) and set(at_once[1:]) != set(first)


def test_a_prefetching_stage_works_on_the_stream_of_its_caller():
    chosen = []
    cuda = {
        "is_initialized": lambda: True,
        "current_stream": lambda: "the caller's",
        "set_stream": lambda s: chosen.append((s, threading.get_ident())),
    }
    with patch.multiple(torch.cuda, **cuda):
        threads = list(prefetch((threading.get_ident() for _ in range(2)), 1, name="stage"))
    assert chosen == [("the caller's", threads[0])] and threads[0] != threading.get_ident()


def test_a_prefetching_stage_passes_on_errors():
    def broken():
        yield 1
        raise ValueError("the second one")

    items = prefetch(broken(), 1, name="stage")
    assert next(items) == 1
    with pytest.raises(ValueError, match="the second one"):
        next(items)


def test_a_prefetching_stage_keeps_the_order_and_its_queue_length():
    made = itertools.count()
    items = prefetch((next(made) for _ in range(100)), 2, name="stage")
    assert next(items) == 0
    threading.Event().wait(0.3)
    assert next(made) <= 1 + 2 + 1 + 1  # taken, queued, in progress, and this item
    assert list(items)[-1] == 100
    assert list(buffer_all(iter(range(5)))) == list(range(5))


def test_stages_that_work_at_once_share_the_threads_evenly_in_every_video():
    before, counts = torch.get_num_threads(), []

    def counted(items):
        counts.append(torch.get_num_threads())
        yield from items

    try:
        torch.set_num_threads(8)
        for _ in range(2):
            prepare = half_the_threads()
            inner = prefetch(counted([1]), 1, name="denoise", prepare=prepare)
            assert list(prefetch(counted(inner), 1, name="decode", prepare=prepare)) == [1]
        assert counts == [4, 4, 4, 4] and torch.get_num_threads() == 8
    finally:
        torch.set_num_threads(before)


def decoded(blocks, autoencoder, canvas):
    """The chunks of frames of some blocks, all of which belong to the video."""
    motion = decode_motion(with_events(blocks), lambda _, count: count, autoencoder=autoencoder, reference=None, timer=StageTimer())
    return render_motion(motion, canvas, timer=StageTimer())


def test_motion_decoded_on_another_device_is_rendered_on_the_device_of_the_photograph():
    shown = []

    def decode(latents, reference, cache):
        return MotionLayers(*(torch.empty(1, 12, channels, 8, 8, device="cuda") for channels in (2, 1, 3))), None

    def render(part, first):
        shown.append(part)
        return torch.zeros(part.flow.shape[1], 8, 8, 3, dtype=torch.uint8)

    canvas = SimpleNamespace(pixels=torch.zeros(8, 8, 3), render=render)
    with patch.dict(device_stream.STREAMS, clear=True), FakeTensorMode():  # which simulates devices that do not exist
        blocks = [LatentBlock(torch.empty(1, 16, 3, 8, 8, device="cuda"), BlockSpan(n, 3 * n, 3)) for n in range(2)]
        list(decoded(blocks, SimpleNamespace(decode=decode), canvas))
    device_stream.stream_on.cache_clear()
    assert shown and {tensor.device.type for part in shown for tensor in (part.flow, part.opacity, part.interior)} == {"cpu"}


def test_smoothing_across_blocks_equals_smoothing_the_whole():
    rng, shown = torch.Generator().manual_seed(0), []
    layers = [torch.rand(1, 24, channels, 4, 4, generator=rng) for channels in (2, 1, 3)]

    def decode(latents, reference, cache):
        first = cache or 0
        return MotionLayers(*(track[:, first : first + 12] for track in layers)), first + 12

    def render(part, first):
        shown.append(part)
        assert first == sum(other.flow.shape[1] for other in shown[:-1])
        return torch.zeros(part.flow.shape[1], 4, 4, 3, dtype=torch.uint8)

    canvas, vae = SimpleNamespace(pixels=torch.zeros(4, 4, 3), render=render), SimpleNamespace(decode=decode)
    blocks = [LatentBlock(torch.zeros(1, 16, 3, 4, 4), BlockSpan(n, 3 * n, 3)) for n in range(2)]
    assert [chunk.start for chunk in decoded(blocks, vae, canvas)] == [0, 12]
    whole = smooth_seams(MotionLayers(*layers), None)
    for name in ("flow", "opacity", "interior"):
        assert_close(torch.cat([getattr(part, name) for part in shown], dim=1), getattr(whole, name))


def test_the_head_is_still_by_default():
    assert head_poses(HeadConfig(), 24, seed=0) is None


def test_gentle_motion_begins_at_rest_and_follows_the_seed():
    one, same, other = (head_poses(HeadConfig(head="gentle"), 240, seed=seed) for seed in (1, 1, 2))
    assert one.shape == (240, 4)
    assert (one == same).all() and (one != other).any()
    assert (one[0, :3] == 0).all()  # roll and shifts
    assert one[:, 3].max() == 1  # a blink closes the eyes


def test_the_first_frame_is_the_same_with_head_motion_and_later_ones_are_not(components):
    still, gentle = (
        torch.cat([chunk.pixels for chunk in generate(small_inputs(), components, Settings(InferConfig(sampler=QUICK, motion=motion)))])
        for motion in (HeadConfig(), HeadConfig(head="gentle", motion_scale=2))
    )
    assert (gentle[0].int() - still[0].int()).abs().max() <= 1  # rounding
    assert (gentle[-1] != still[-1]).any(-1).sum() > 2 * (still[-1] != still[0]).any(-1).sum()  # the mouth moves in both


def test_head_motion_without_known_eyes_is_mentioned(tmp_path, caplog):
    options = FaceConfig(box=[40, 24, 80, 80], mouth=[80, 88, 16])
    noise = InMemory(small_inputs().portrait.pixels, Speech(babble(1.0)))
    for head in ("off", "gentle"):
        caplog.clear()
        opened = Preview().open(InferConfig(face=options, motion=HeadConfig(head=head)), noise)
        assert opened.portrait.eyes is None and ("do not blink" in caplog.text) == (head == "gentle")


@pytest.mark.parametrize(
    ("width", "height", "size", "expected"),
    [
        (161, 131, "photo", (160, 130)),
        (160, 130, "704x384", (160, 130)),
        (400, 720, "704x384", (386, 696)),
        (4000, 3000, "photo", (3324, 2494)),
    ],
)
def test_a_portrait_fits_the_video_with_its_face(width, height, size, expected):
    eyes = np.full((2, 16, 2), 50.0)
    pixels = np.full((height, width, 3), 7, np.uint8)
    portrait = Portrait(pixels, FaceBox(40, 20, 60, 60), Mouth(70, 60, 12), eyes=eyes, head_offset=5.0)
    found = fit_portrait(portrait, VideoConfig(size))
    assert found.pixels.shape == (expected[1], expected[0], 3)
    assert found.pixels.min() == found.pixels.max() == 7
    share = expected[0] / (width // 2 * 2)
    assert found.mouth.x == pytest.approx(70 * share, rel=0.01)
    assert found.face.width == pytest.approx(60 * share, rel=0.01)
    assert found.mouth.half_width == pytest.approx(12 * share, rel=0.01)
    assert found.eyes == pytest.approx(50 * share, rel=0.01) and found.head_offset == pytest.approx(5 * share, rel=0.01)
