"""The offset of the sound: shifted as the user asks, and measured from mouth and speech of the video itself."""

from __future__ import annotations

import json
from dataclasses import replace

import av
import numpy as np
import pytest
from infer_command import FACE, TINY, babble, pipeline_options, write_files, write_wav
from lip_align_table import SHIFTS_MS, drawn_video, inputs_of, mouth_later, recorded, remaining_ms
from scipy.interpolate import CubicSpline
from video_files import read_frames

import sonic.inference.generate as generation
from sonic import AvatarPipeline
from sonic.cli import run_command
from sonic.commands import infer_command
from sonic.data.audio import load_soundtrack
from sonic.data.live_audio import LiveAudio
from sonic.evaluation.judge import sound_offset as offset_between
from sonic.inference import sound_offset
from sonic.inference.infer_config import InferConfig
from sonic.inference.inputs import Settings
from sonic.inference.post_config import PostConfig
from sonic.inference.report import StageTimer
from sonic.inference.sound_offset import MouthDelay, SoundOffset, expected_opening, mouth_delay
from sonic.types import FrameChunk

RATE, ALIGNED = 16_000, InferConfig(post=PostConfig(lip_align=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("offset"), 0.5)


@pytest.fixture(scope="module")
def drawn() -> tuple[np.ndarray, np.ndarray]:
    """Four seconds of a drawn person, and the sound."""
    return drawn_video(3, 100)


@pytest.mark.parametrize("seed", [0, 1])
def test_shifted_videos_come_back_to_within_ten_milliseconds(seed):
    offset, samples = recorded(seed, 125)
    assert max(abs(remaining_ms(offset, samples, shift)) for shift in SHIFTS_MS) <= 10
    assert offset.delay.standard_error_s < 0.005 and offset.delay.correlation > 0.7


@pytest.mark.parametrize("fps", [16, 25, 50])
@pytest.mark.parametrize("late_s", [-0.0731, 0.0042, 0.15])
def test_a_delay_is_measured_well_below_a_frame_at_any_frame_rate(drawn, fps, late_s):
    expected = expected_opening(drawn[1], 100)
    curve, times = CubicSpline((np.arange(100) + 0.5) / 25, expected), (np.arange(4 * fps) + 0.5) / fps
    opening = 0.3 * curve(np.clip(times - late_s, 0.02, 3.98)) + 0.1 * np.sin(times)  # and a slow change of posture
    opening[10:14] = np.nan  # a mouth that is hidden for a moment
    found = mouth_delay(opening, expected, fps)
    assert not found.unsure and found.late_s == pytest.approx(late_s, abs=0.003)


@pytest.mark.parametrize("kind", ["another voice", "silence", "short", "no face", "far"])
def test_what_is_not_sure_changes_nothing_and_says_so(kind, drawn):
    pixels, samples = drawn
    given = {"another voice": drawn_video(8, 100)[1], "silence": np.zeros_like(samples), "far": mouth_later(samples, 300)}.get(
        kind, samples
    )
    pixels = pixels[:40] if kind == "short" else np.full_like(pixels, 127) if kind == "no face" else pixels
    offset = SoundOffset(inputs_of(pixels, given), PostConfig(lip_align=True, alignment_offset=0.05))
    offset.record(FrameChunk(pixels, 0))
    assert offset.speech().later_s == 0.05
    word = {"short": "is seen for 1.2 s", "no face": "is seen for 0.0 s"}.get(kind, "")
    assert word in offset.delay.unsure and str(offset.delay).startswith("lip_align changes nothing: ")
    assert offset.as_json()["lip_align"]["unsure"] == offset.delay.unsure


@pytest.mark.parametrize("late_s, word", [(0.03, "later"), (-0.03, "earlier")])
def test_the_sentence_about_a_delay_says_its_direction(late_s, word):
    assert f"the mouth is 30 ms {word} than the sound" in str(MouthDelay(late_s))


def test_the_offset_of_a_file_is_measured_over_all_frames_and_added_to_the_given_one(drawn, tmp_path, monkeypatch):
    """From frames to the decoded sound track, by the functions of the command line."""
    pixels, samples = drawn
    inputs = inputs_of(pixels, mouth_later(samples, 60))
    monkeypatch.setattr(generation, "generate", lambda *_, **__: (FrameChunk(pixels[k : k + 12], k) for k in range(0, len(pixels), 12)))
    components = type(
        "Components", (), {"config": ALIGNED.model, "device": type("Cpu", (), {"type": "cpu"}), "weights": "", "dtype": "float32"}
    )
    config = replace(ALIGNED, post=PostConfig(lip_align=True, alignment_offset=-0.02))
    result, _ = generation.make_video(inputs, components, config, output=tmp_path / "a.mp4", timer=StageTimer())
    late, correlation = offset_between(load_soundtrack(tmp_path / "a.mp4"), inputs.speech.samples, RATE)
    assert correlation > 0.9 and late / RATE == pytest.approx(result.sound["later_s"], abs=1 / RATE)
    assert late / RATE == pytest.approx(0.06 - 0.02, abs=0.01)
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"] and len(list(read_frames(tmp_path / "a.mp4"))) == len(pixels)


@pytest.mark.parametrize("live", [False, True])
def test_a_stream_holds_the_first_sure_measure(live, drawn, monkeypatch):
    pixels, samples = drawn
    monkeypatch.setattr(sound_offset, "WINDOW_S", 3.0)
    inputs = inputs_of(pixels, mouth_later(samples, 60))
    sound = LiveAudio([inputs.speech.samples]) if live else None
    if live:
        sound.receive(len(samples))
        inputs = replace(inputs, speech=replace(inputs.speech, samples=np.zeros(0, np.float32)))
    chunks = (FrameChunk(pixels[k : k + 12], k) for k in range(0, len(pixels), 12))
    offset = SoundOffset(inputs, PostConfig(lip_align=True, alignment_offset=0.1))
    later = {chunk.start: chunk.sound_later_s for chunk in offset.stream(chunks, Settings(ALIGNED, sound=sound))}
    assert {later[start] for start in range(0, 60, 12)} == {0.1}
    held = {later[start] for start in range(72, 100, 12)}
    assert len(held) == 1 and held.pop() == pytest.approx(0.16, abs=0.01)


def test_a_stream_goes_on_to_the_next_window_where_one_is_silent(drawn, monkeypatch):
    pixels, samples = drawn
    monkeypatch.setattr(sound_offset, "WINDOW_S", 3.0)
    quiet = np.concatenate([np.repeat(pixels[:1], 75, axis=0), pixels])
    inputs = inputs_of(quiet, np.concatenate([np.zeros(3 * RATE, np.float32), mouth_later(samples, 60)]))
    chunks = (FrameChunk(quiet[k : k + 25], k) for k in range(0, len(quiet), 25))
    offset = SoundOffset(inputs, PostConfig(lip_align=True))
    found = [chunk.sound_later_s for chunk in offset.stream(chunks, Settings(ALIGNED))]
    assert found[:5] == [0.0] * 5 and found[5:] == pytest.approx([0.06] * 2, abs=0.01)


def test_a_stream_that_is_too_short_to_measure_says_so(drawn, caplog):
    pixels, samples = drawn
    offset = SoundOffset(inputs_of(pixels, samples), PostConfig(lip_align=True))
    chunks = (FrameChunk(each, 0) for each in [pixels])
    with caplog.at_level("INFO", "sonic.inference"):
        assert [chunk.sound_later_s for chunk in offset.stream(chunks, Settings(ALIGNED))] == [0.0]
    assert "lip_align changes nothing: a stream is measured over 8 s, and this one is shorter" in caplog.text


def test_a_python_caller_gets_the_shifted_sound_in_memory_in_the_file_and_with_every_chunk(folder, tmp_path):
    pipe = AvatarPipeline.from_pretrained("preview", **pipeline_options(folder))
    sound = babble(0.5)
    plain, late, early = (pipe(folder / "me.png", (sound, RATE), alignment_offset=offset) for offset in (0.0, 0.1, -0.05))
    assert np.array_equal(plain.frames, late.frames)
    assert np.array_equal(late.audio[0], np.pad(sound, (1600, 0))) and np.array_equal(early.audio[0], sound[800:])
    found = load_soundtrack(late.save(tmp_path / "late.mp4"))
    assert offset_between(found, sound, RATE)[0] == 1600
    for given in ((sound, RATE), iter([(sound, RATE)])):
        assert {chunk.sound_later_s for chunk in pipe.stream(folder / "me.png", given, alignment_offset=0.1)} == {0.1}
    assert pipe(folder / "me.png", (sound, RATE), lip_align=True).speech.later_s == 0.0  # noise, and too short


def test_the_command_line_shifts_the_sound_of_a_preview_and_says_so(folder, tmp_path, capfd):
    def infer(*argv: str) -> int:
        given = [f"image={folder / 'me.png'}", f"audio={write_wav(tmp_path / 'a.wav', babble(0.5))}", f"weights={folder / 'weights'}"]
        return run_command(
            infer_command.ENTRY, infer_command.infer, [*TINY, *FACE, *given, "run.threads=1", f"run.folder={tmp_path / 'runs'}", *argv]
        )

    assert infer("post.alignment_offset=-0.0321", "post.lip_align=true", f"output={tmp_path / 'a.mp4'}", "name=a") == 0
    assert offset_between(load_soundtrack(tmp_path / "a.mp4"), babble(0.5), RATE)[0] == round(-0.0321 * RATE)
    found = json.loads((tmp_path / "runs/a/result.json").read_text())
    assert found["sound"]["later_s"] == -0.0321 and "are needed" in found["sound"]["lip_align"]["unsure"]
    assert "lip_align changes nothing: " in capfd.readouterr().out
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert [stream.start_time for stream in container.streams] == [0, 0]  # no player has to read an edit list
    for wrong, sentence in (("post.alignment_offset=0.3", "must lie between -0.2 and 0.2 s"), ("post.lip_align=maybe", "lip_align")):
        assert infer(wrong) == 2
        assert sentence in capfd.readouterr().err
