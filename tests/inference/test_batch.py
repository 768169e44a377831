"""Files of requests: how the text is read, which lines are refused, and that a bad line fails only itself."""

from __future__ import annotations

import json
import os
import signal
import warnings
from pathlib import Path

import pytest
import torch
from infer_command import FACE, TINY, babble, write_wav, write_weights
from PIL import Image
from skimage import data

from sonic.cli import Entry, compose, run_command
from sonic.commands import infer_command
from sonic.config import Ranks
from sonic.inference import batch, input_reader, inputs
from sonic.inference.batch import make_videos, open_components
from sonic.inference.infer_config import InferConfig
from sonic.inference.input_reader import InputReader, open_inputs
from sonic.inference.requests import all_requests, read_requests, request_of

ENTRY = Entry("infer", InferConfig)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"seed": "7"}', 'seed="7" is str; a request needs int'),
        ('{"seed": 1.5}', "seed=1.5 is float"),
        ('{"seed": true}', "seed=true is bool"),
        ('{"image": null}', "image=null is NoneType; a request needs str"),
        ('{"audio": 5}', "audio=5 is int"),
        ('{"picture": "a.jpg"}', "picture is not known"),
        ("[1]", "is not known"),
        ("7", "is not known"),
        ("{", "not JSON"),
        ('{"seed": 1},', "not JSON"),
        ('{"seed": 1,}', "not JSON"),
        ('{"seed": 1}\0', "not JSON"),
        ('{"seed": 1, "seed": 2}', "seed is there twice"),
        ("[" * 100_000, "nested too deeply"),
        ('{"seed": ' + "9" * 5000 + "}", "limit"),
        ('{"image": "a\\u0000.png"}', r"image='a\x00.png' holds a character"),
        ('{"output": "\\ud800.mp4"}', r"output='\ud800.mp4' holds a character"),
        ('{"image": "caf\udce9.png"}', "not UTF-8"),
    ],
)
def test_a_line_that_is_no_request_is_refused_in_one_sentence(text, expected):
    with pytest.raises(ValueError) as found:
        request_of(text, compose(ENTRY, []), Path("a.mp4"))
    assert expected in str(found.value)


def test_a_very_long_line_is_not_repeated():
    for text in ("[" + "1," * 10**6 + "1]", json.dumps({"x" * 10**6: 1}), json.dumps({"seed": "x" * 10**6})):
        with pytest.raises(ValueError) as found:
            request_of(text, compose(ENTRY, []), Path("a.mp4"))
        assert len(str(found.value)) < 300


def test_a_request_without_an_output_gets_a_unique_name():
    for text in ('{"seed": 3}', '{"seed": 3, "output": ""}'):
        wanted = request_of(text, compose(ENTRY, []), Path("runs/0003.mp4"))
        assert (wanted.seed, wanted.output) == (3, "runs/0003.mp4")


def test_requests_have_the_numbers_of_their_lines(tmp_path):
    (tmp_path / "requests.jsonl").write_text('{"seed": 1}\n\n{"seed": 2}\n')
    assert read_requests(str(tmp_path / "requests.jsonl")) == [(1, '{"seed": 1}'), (3, '{"seed": 2}')]


LINES = ['{"prompt": "é\u2028 \x85"}', "", '{"seed": 2}']


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_files_of_any_encoding_and_line_end_give_the_same_lines(encoding, end, tmp_path):
    (tmp_path / "requests.jsonl").write_bytes(end.join(LINES).encode(encoding))
    assert read_requests(str(tmp_path / "requests.jsonl")) == [(1, LINES[0]), (3, LINES[2])]


@pytest.mark.parametrize("mark", [b"\xff\xfe", b"\xfe\xff"])
def test_a_byte_order_mark_of_either_order_is_read(mark, tmp_path):
    encoding = "utf-16-le" if mark == b"\xff\xfe" else "utf-16-be"
    (tmp_path / "requests.jsonl").write_bytes(mark + "\n".join(LINES).encode(encoding))
    assert read_requests(str(tmp_path / "requests.jsonl")) == [(1, LINES[0]), (3, LINES[2])]


def test_concatenated_files_with_byte_order_marks_are_read(tmp_path):
    (tmp_path / "requests.jsonl").write_bytes(b'\xef\xbb\xbf{"seed": 1}\n\xef\xbb\xbf{"seed": 2}\n')
    assert [text for _, text in read_requests(str(tmp_path / "requests.jsonl"))] == ['{"seed": 1}', '{"seed": 2}']


def found_in(folder: Path, *lines: bytes | dict) -> list:
    file = folder / "requests.jsonl"
    file.write_bytes(b"\n".join(each if isinstance(each, bytes) else json.dumps(each).encode() for each in lines))
    config = compose(ENTRY, [f"requests={file}"])
    return all_requests(read_requests(config.requests), config, lambda line: folder / f"{line:04d}.mp4")


def test_a_line_in_another_encoding_fails_only_itself(tmp_path):
    found = found_in(tmp_path, {"seed": 1}, '{"prompt": "café"}'.encode("latin-1"), {"seed": 3})
    assert [bool(each.wanted) for each in found] == [True, False, True]
    assert "not UTF-8 text (character 16 is \\xe9)" in found[1].fault


@pytest.mark.parametrize(
    ("content", "expected"), [(b"", "holds no request"), (b"\n \n", "holds no request"), (b"\xff\xfe{\0}", "looks like UTF-16 and is not")]
)
def test_a_file_that_cannot_be_read_is_refused(content, expected, tmp_path):
    (tmp_path / "requests.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=f"requests=.*{expected}"):
        read_requests(str(tmp_path / "requests.jsonl"))


@pytest.mark.parametrize(("name", "expected"), [("absent.jsonl", "No such file or directory"), ("", "Is a directory")])
def test_a_path_that_is_no_file_of_requests_is_refused_with_its_option(name, expected, tmp_path):
    with pytest.raises(ValueError, match=rf"^requests=.* cannot be read \({expected}\); give a file"):
        read_requests(str(tmp_path / name))


def test_requests_from_a_pipe_do_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="requests=.* is a named pipe"):
        read_requests(str(tmp_path / "pipe"))


@pytest.mark.parametrize("again", ["a.mp4", "./a.mp4", "inside/../a.mp4", "soft/a.mp4"])
def test_the_second_video_of_a_name_is_refused_however_it_is_spelt(again, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inside").mkdir()
    (tmp_path / "soft").symlink_to(".")
    for make in (Path("a.mp4").touch, Path("b.mp4").touch):  # before the first video is there, and after
        found = found_in(tmp_path, {"output": "a.mp4"}, {"output": again}, {"output": "b.mp4"})
        assert [each.fault for each in found] == [
            "",
            f"output={again} is the video of line 1 already; give each video a name of its own",
            "",
        ]
        make()


@pytest.mark.parametrize("output", ["voice.mp4", "./voice.mp4", "hard.mp4", "soft.mp4"])
@pytest.mark.parametrize("order", [1, -1])
def test_a_video_that_is_an_input_of_any_line_is_refused(output, order, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "voice.mp4").touch()
    os.link("voice.mp4", "hard.mp4")
    os.symlink("voice.mp4", "soft.mp4")
    found = found_in(tmp_path, *[{"output": output}, {"audio": "voice.mp4", "output": "b.mp4"}][::order])[::order]
    assert found[0].fault.startswith(f"output={output} is the file audio=voice.mp4 that line") and not found[1].fault


def test_the_file_of_requests_itself_is_no_output(tmp_path):
    (tmp_path / "videos.mp4").symlink_to("requests.jsonl")
    assert "is the file requests=" in found_in(tmp_path, {"output": str(tmp_path / "videos.mp4")})[0].fault


def test_inputs_are_searched_in_the_working_folder_and_then_beside_the_file(tmp_path, monkeypatch, caplog):
    (here := tmp_path / "here").mkdir()
    (there := tmp_path / "there").mkdir()
    monkeypatch.chdir(here)
    for file in (here / "both.png", there / "both.png", there / "there.wav"):
        file.touch()
    with caplog.at_level("INFO", "sonic"):
        found = found_in(there, {"image": "both.png", "audio": "there.wav", "output": "a.mp4"}, {"image": "none.png"})
    assert (found[0].wanted.image, found[0].wanted.audio) == ("both.png", str(there / "there.wav"))
    assert found[0].wanted.output == "a.mp4"  # videos go where they are asked for
    assert f"audio=there.wav is taken from {there}" in caplog.text
    assert f"image=none.png is neither in the working folder nor in {there}" in found[1].fault


def test_a_tilde_in_a_request_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    wanted = request_of('{"image": "~/a.png", "audio": "~/b.wav", "output": "~/c.mp4"}', compose(ENTRY, []), Path())
    assert [wanted.image, wanted.audio, wanted.output] == [f"{tmp_path}/{name}" for name in ("a.png", "b.wav", "c.mp4")]


@pytest.mark.parametrize("keeps", [True, False])
def test_finished_videos_stay_when_a_job_is_stopped(keeps, tmp_path, capsys):
    def job(config, run) -> None:
        folder = run.open()
        if keeps:
            run.keep()
            (folder / "0001.mp4").touch()
        raise KeyboardInterrupt

    assert run_command(ENTRY, job, [f"run.folder={tmp_path / 'runs'}", "name=videos"]) == 130
    assert (tmp_path / "runs/videos/0001.mp4").exists() == (tmp_path / "runs").exists() == keeps
    assert ("what was finished stays" if keeps else "nothing was kept") in capsys.readouterr().err


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return write_weights(tmp_path_factory.mktemp("parts") / "weights")


@pytest.fixture
def videos_of(tmp_path, monkeypatch, weights):
    """Runs the command over lines of requests; gives its exit code and the result of each line."""
    monkeypatch.chdir(tmp_path)
    write_wav(tmp_path / "voice.wav", babble(0.5))

    def run(*lines: dict) -> tuple[int, dict]:
        Path("requests.jsonl").write_text("\n".join(json.dumps({"audio": "voice.wav", **line}) for line in lines))
        code = run_command(
            infer_command.ENTRY, infer_command.infer, ["requests=requests.jsonl", "name=r", f"weights={weights}", *FACE, *TINY]
        )
        return code, json.loads(Path("runs/r/videos.json").read_text())

    return run


def crashing(threads: int) -> None:
    """Set up the reading process so that recordings named crash kill it."""
    torch.set_num_threads(threads)
    load, suffix = input_reader.READERS["audio"]

    def crash(path):
        if "crash" in str(path):
            signal.raise_signal(signal.SIGSEGV)
        return load(path)

    input_reader.READERS = {**input_reader.READERS, "audio": (crash, suffix)}
    inputs.load_speech = crash


def test_a_recording_that_crashes_its_decoder_fails_only_its_own_video(videos_of, monkeypatch):
    monkeypatch.setattr(input_reader, "_prepare", crashing)
    write_wav(Path("crash.wav"), babble(0.5))
    code, given = videos_of({"output": "a.mp4"}, {"audio": "crash.wav", "output": "b.mp4"}, {"output": "c.mp4"})
    assert code == 1 and [*given] == ["1", "2", "3"]
    assert given["2"]["error"].startswith("audio=crash.wav: the decoder crashed on this file (SIGSEGV); convert it")
    assert Path("a.mp4").read_bytes() == Path("c.mp4").read_bytes() and not Path("b.mp4").exists()


def test_an_unexpected_error_in_one_line_fails_only_its_own_video(videos_of, monkeypatch, capsys):
    make = batch.make_video

    def broken(scene, parts, config, **named):
        return {}["lost"] if config.seed == 2 else make(scene, parts, config, **named)

    monkeypatch.setattr(batch, "make_video", broken)
    code, given = videos_of(*({"seed": seed, "output": f"{seed}.mp4"} for seed in (1, 2, 3)))
    assert code == 1 and Path("1.mp4").exists() and Path("3.mp4").exists()
    assert given["2"]["error"] == "a fault of the program, not of the input (KeyError: 'lost')"
    assert 'return {}["lost"]' in capsys.readouterr().err


def test_names_that_are_not_utf8_are_read_and_written(videos_of):
    name = os.fsdecode(b"caf\xe9")
    Image.fromarray(data.astronaut()).save(f"{name}.png")
    code, given = videos_of({"image": f"{name}.png", "output": f"{name}.mp4"}, {"image": f"{name}2.png", "output": "b.mp4"})
    if "error" not in given["1"]:  # where FFmpeg can be given such a name
        assert Path(f"{name}.mp4").is_file()
    assert code == 1 and "caf\\xe92.png does not exist" in given["2"]["error"]


def test_an_output_that_no_file_system_takes_is_refused_with_its_option(videos_of):
    code, given = videos_of({"output": f"{'x' * 300}.mp4"}, {"output": "b.mp4"})
    assert code == 1 and Path("b.mp4").is_file()
    assert given["1"]["error"].startswith("output=xxx") and "cannot be written (File name too long)" in given["1"]["error"]


def test_errors_in_the_middle_of_a_video_of_several_ranks_end_the_job(monkeypatch, weights, tmp_path):
    """The other ranks wait in the middle of a forward, so no further video can be started."""
    config = compose(ENTRY, [f"weights={weights}", *FACE, *TINY])
    kinds = [
        ("make_video", KeyError("lost"), "raised"),
        ("make_video", OSError("full"), "details"),
        ("checked_inputs", KeyError("x"), "details"),
    ]

    def raising(error):
        def broken(*_, **__):
            raise error

        return broken

    with open_components(config, Ranks(), folder=tmp_path) as opened:
        monkeypatch.setattr("sonic.parallel.mesh.World.alone", False)
        for name, error, ends in kinds:
            with monkeypatch.context() as patch:
                patch.setattr(batch, "checked_inputs", lambda *_, **__: None)
                patch.setattr(batch, name, raising(error))
                if ends == "raised":
                    with pytest.raises(KeyError):
                        make_videos([(1, "{}")], opened, config)
                else:
                    assert make_videos([(1, "{}")], opened, config)[0].fault


def test_inputs_read_in_another_process_are_the_same_and_so_are_its_messages(tmp_path, caplog):
    face = data.astronaut()[:300, 60:360]
    pair = torch.cat([torch.from_numpy(face.copy())] * 2, 1).numpy()
    Image.fromarray(pair).save(tmp_path / "twins.png")
    write_wav(tmp_path / "voice.wav", babble(0.5))
    config = compose(ENTRY, [f"image={tmp_path / 'twins.png'}", f"audio={tmp_path / 'voice.wav'}"])
    expected = []
    other = InputReader()
    try:
        for opens in (open_inputs, other.open):
            caplog.clear()
            with caplog.at_level("INFO", "sonic"), warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                scene = opens(config)
            expected.append((caplog.messages[:], [str(each.message) for each in warned], scene))
    finally:
        other.close()
    here, there = expected
    assert here[:2] == there[:2] and here[0] and here[1]
    assert (here[2].portrait.pixels == there[2].portrait.pixels).all() and (here[2].speech.samples == there[2].speech.samples).all()
    assert (here[2].portrait.face, here[2].portrait.mouth) == (there[2].portrait.face, there[2].portrait.mouth)
