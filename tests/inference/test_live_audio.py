"""Sound that is still arriving: which block needs how much of it, and that nothing else decides what is seen."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from infer_command import babble, pipeline_options, write_files

from sonic import AvatarPipeline
from sonic.cli import Entry, compose
from sonic.data.live_audio import HELD_S, LiveAudio
from sonic.encoders.wav2vec import Wav2VecEncoder
from sonic.geometry import FPS, BlockSpan
from sonic.inference.infer_config import InferConfig
from sonic.inference.input_reader import open_inputs
from sonic.inference.inputs import InMemory
from sonic.inference.live_features import LiveFeatures
from sonic.types import Conditions

RATE = 16_000
SECONDS = 1.3
BLOCK = 12  # frames


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_files(tmp_path_factory.mktemp("live"), SECONDS)


@pytest.fixture(scope="module")
def pipe(folder) -> AvatarPipeline:
    return AvatarPipeline.from_pretrained("preview", **pipeline_options(folder))


def frames_of(chunks) -> np.ndarray:
    return np.concatenate([np.asarray(chunk.pixels) for chunk in chunks])


def pieces(samples: np.ndarray, *sizes: int):
    """The samples in chunks of these sizes, over and over."""
    first, index = 0, 0
    while first < len(samples):
        yield samples[first : first + sizes[index % len(sizes)]], RATE
        first, index = first + sizes[index % len(sizes)], index + 1


def test_frames_do_not_depend_on_how_the_sound_is_cut(pipe, folder):
    sound = babble(2.0) * np.linspace(0.1, 1, 32_000, dtype=np.float32)
    found = [frames_of(pipe.stream(folder / "me.png", pieces(sound, *sizes))) for sizes in ((32_000,), (1, 7, 5000), (640,))]
    assert len(found[0]) == 50
    assert all(np.array_equal(found[0], other) for other in found[1:])


def test_sound_at_another_rate_is_resampled_alike_however_it_is_cut():
    sound = np.sin(np.arange(48_000) / 48_000 * 2 * np.pi * 300).astype(np.float32) / 2
    found = []
    for size in (48_000, 441):
        live = LiveAudio([(sound[first : first + size], 48_000) for first in range(0, 48_000, size)])
        live.receive(20_000)
        found.append(live.window(0, 20_000))
    assert len(found[0]) == 16_000 and np.allclose(found[0], found[1], atol=1e-6)
    wanted = np.sin(np.arange(16_000) / 16_000 * 2 * np.pi * 300) / 2
    assert np.abs(found[0] - wanted)[200:-200].max() < 1e-3


def test_a_recording_within_the_look_ahead_of_the_first_block_gives_the_frames_of_its_file(pipe, folder):
    sound = babble(SECONDS)
    assert len(sound) < RATE * (BLOCK / FPS + pipe.look_ahead_s)
    live = frames_of(pipe.stream(folder / "me.png", pieces(sound, 1000), seed=7))
    whole = pipe(folder / "me.png", (sound, RATE), seed=7).frames
    assert live.shape == whole.shape and np.abs(live.astype(int) - whole).max() <= 1


def test_a_block_comes_once_its_look_ahead_is_there_and_asks_for_no_more(pipe, folder):
    """The microphone gives the samples that block k needs and waits until its frames have been seen."""
    sound, seen = babble(4.0), []
    needed = [round(((index + 1) * BLOCK / FPS + pipe.look_ahead_s) * RATE) for index in range(6)]

    def microphone():
        first = 0
        for index, stop in enumerate(needed):
            yield sound[first:stop], RATE
            first = stop
            deadline = 20.0
            while len(seen) <= index:
                assert deadline > 0, f"block {index} wants more sound than it is said to"
                waited.wait(0.01)
                deadline -= 0.01
        yield sound[first:], RATE

    waited = threading.Event()
    total = 0
    for chunk in pipe.stream(folder / "me.png", microphone()):
        seen.append(chunk.start)
        total += len(chunk)
    assert pipe.look_ahead_s == pytest.approx(0.97) and total == 100
    assert seen[:6] == [BLOCK * index for index in range(6)]


def test_what_comes_after_the_look_ahead_changes_nothing_before_it(pipe, folder):
    sound = babble(3.0)
    stop = round((2 * BLOCK / FPS + pipe.look_ahead_s) * RATE)
    other = np.concatenate([sound[:stop], np.float32(5) * babble(1.0, seed=3)])
    first, second = (frames_of(pipe.stream(folder / "me.png", pieces(each, 800))) for each in (sound, other))
    assert np.array_equal(first[: 2 * BLOCK], second[: 2 * BLOCK])
    assert not np.array_equal(first[2 * BLOCK : 3 * BLOCK], second[2 * BLOCK : 3 * BLOCK])


def test_a_minute_is_held_of_sound_that_goes_on_for_long():
    live = LiveAudio((np.full(RATE, index / 400, np.float32), RATE) for index in range(400))
    for second in range(1, 401):
        live.receive(second * RATE)
        assert len(live.before(second * RATE)) <= HELD_S * RATE
    assert live.before(400 * RATE)[-1] == np.float32(399 / 400)
    live.receive(401 * RATE)
    assert live.ended and live.num_frames == 400 * FPS


def test_num_clip_ends_a_stream_that_would_never_end(folder):
    limited = AvatarPipeline.from_pretrained("preview", **pipeline_options(folder), **{"video.num_clip": 1, "video.infer_frames": 20})

    def endless():
        while True:
            yield babble(0.5), RATE

    assert len(frames_of(limited.stream(folder / "me.png", endless()))) == 20


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["model=wan_s2v_14b"], "model=wan_s2v_14b makes clips of 80 frames whose sound it needs whole"),
        (["motion.head=gentle"], "motion.head=gentle does not go with audio that is still arriving"),
        (["duration=3"], "video.duration=3.0 does not go with audio that is still arriving: its length is not known"),
        (["decode.online=false"], "decode.online=false does not go with audio"),
        (["model=live_avatar_14b", "compat=upstream"], "video.compat=upstream does not go with audio"),
    ],
)
def test_what_needs_the_whole_recording_refuses_an_iterator(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        open_inputs(compose(Entry("infer", InferConfig), given), InMemory(sound=LiveAudio(iter(()))))


@pytest.mark.parametrize(
    ("chunks", "sentence"),
    [
        ([], r"audio lasts 0.00 s, the shortest recording is 0.2 s"),
        ([(np.zeros(900, np.float32), RATE)], r"audio lasts 0.06 s"),
        ([(np.full(9000, np.nan, np.float32), RATE)], "chunk 0 of audio holds numbers that are not finite"),
        (
            [(np.zeros(900, np.float32), RATE), (np.zeros(900, np.float32), 8000)],
            "chunk 1 of audio has sample_rate=8000, the chunks before",
        ),
        ([("loud", RATE)], "chunk 0 of audio is"),
    ],
)
def test_chunks_that_are_no_sound_end_the_video_with_a_sentence(chunks, sentence, pipe, folder):
    with pytest.raises(ValueError, match=sentence):
        list(pipe.stream(folder / "me.png", iter(chunks)))


def test_a_stream_that_is_closed_asks_for_no_more_sound(pipe, folder):
    asked = []

    def endless():
        while True:
            asked.append(1)
            yield babble(0.5), RATE

    chunks = pipe.stream(folder / "me.png", endless())
    next(chunks)
    chunks.close()
    count = len(asked)
    assert count < 40 and len(asked) == count


def test_wav2vec2_reads_a_window_around_a_block_and_gives_its_states_at_its_frames():
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    encoder = Wav2VecEncoder({**small, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2})
    sound = babble(8.0)
    features = LiveFeatures(LiveAudio(pieces(sound, 3000)), encoder)
    found = [features.of(span) for span in features.spans(3)]
    assert len(found) == 17 and found[0].shape == (1, 3, 16, 12)
    for index in (0, 7, 12):  # at the beginning, and where the window has left it
        span = BlockSpan(index, 3 * index, 3)
        stop, start = features.stop(span), max(0, int((span.first_frame / FPS - encoder.context_s) * 50)) * 320
        wave = (sound[start:stop] - sound[:stop].mean()) / np.sqrt(sound[:stop].var() + 1e-7)
        with torch.no_grad():
            states = encoder.hidden_states(torch.from_numpy(wave.astype(np.float32)))
        for frame in (0, 11):
            position = round((span.first_frame + frame) / FPS * 30) * 5 / 3 - start / 320
            low, share = int(position), position - int(position)
            wanted = (1 - share) * states[:, low] + share * states[:, low + 1]
            assert torch.allclose(found[index][0, ..., frame], wanted, atol=1e-4), (index, frame)
    assert not found[-1][..., 8:].any()  # after the end


def test_weights_of_the_audio_hold_for_every_block():
    live = LiveFeatures(None, None)
    live.of = lambda span: torch.ones(1, 2, 3, span.frames)
    whole = Conditions(torch.zeros(1, 4, 1, 2, 2), torch.zeros(1, 1, 1), masks=torch.full((1, 1, 2, 2), 1.5))
    for conditions in (live.conditions(whole), live.conditions(whole).drop("audio")):
        assert conditions.at(BlockSpan(1, 3, 3)).masks is whole.masks
