"""A file of requests, and what stays of it when it is stopped."""

from __future__ import annotations

from pathlib import Path

import pytest

from sonic.app import Entry, compose, run_command
from sonic.infer.films import _request, read_requests
from sonic.infer.settings import InferConfig

ENTRY = Entry("infer", InferConfig)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"seed": "7"}', 'seed="7" is str; a request needs int'),
        ('{"seed": 1.5}', "seed=1.5 is float"),
        ('{"seed": true}', "seed=true is bool"),
        ('{"image": null}', "image=null is NoneType; a request needs str"),
        ('{"audio": 5}', "audio=5 is int"),
        ('{"picture": "a.jpg"}', "picture is not known"),
        ("[1]", "is not known"),
        ("{", "not JSON"),
    ],
)
def test_a_value_of_another_type_is_a_bad_request_and_no_fault(text, said):
    with pytest.raises(ValueError) as found:
        _request(text, compose(ENTRY, []), Path("a.mp4"))
    assert said in str(found.value)


def test_a_request_without_an_output_has_a_name_of_its_own():
    for text in ('{"seed": 3}', '{"seed": 3, "output": ""}'):
        wanted = _request(text, compose(ENTRY, []), Path("runs/0003.mp4"))
        assert (wanted.seed, wanted.output) == (3, "runs/0003.mp4")


def test_requests_have_the_numbers_of_their_lines(tmp_path):
    (tmp_path / "films.jsonl").write_text('{"seed": 1}\n\n{"seed": 2}\n')
    assert read_requests(str(tmp_path / "films.jsonl")) == [(1, '{"seed": 1}'), (3, '{"seed": 2}')]


@pytest.mark.parametrize("keeps", [True, False])
def test_what_is_finished_stays_when_a_job_is_stopped(keeps, tmp_path, capsys):
    def job(config, run) -> None:
        (run.open() / "0001.mp4").touch()
        if keeps:
            run.keep()
        raise KeyboardInterrupt

    assert run_command(ENTRY, job, [f"run.folder={tmp_path / 'runs'}", "name=films"]) == 130
    assert (tmp_path / "runs/films/0001.mp4").exists() == keeps
    assert ("what was finished stays" if keeps else "nothing was kept") in capsys.readouterr().err
