"""Closed output streams and signals: the work is finished anyway, or leaves no files."""

from __future__ import annotations

import os
import signal
import subprocess
import time

import pytest
from mounts import ROOT, ran, script

SAYS = """
import os, sys
from sonic.system.stdio import keep_streams_usable
keep_streams_usable()
from sonic.system.run_folder import start_logging
import logging
start_logging(main=True)
for _ in range(300):
    logging.getLogger("sonic").info("a sentence that is longer than a word, again and again" * 10)
print("and a table" * 10000)
open("video", "w").write("whole")
os.write(1, b"what a library says")
"""
ASKS = """
from sonic.cli import Entry, launch
from sonic.inference.infer_config import InferConfig
launch(Entry("infer", InferConfig), lambda config, run: None, {given})
"""
WORKS = """
import pathlib, sys, time
from sonic.cli import Entry, launch
from sonic.inference.infer_config import InferConfig
def job(config, run):
    run.open()
    partial = pathlib.Path("partial")
    partial.touch()
    try:
        time.sleep(60)
    finally:
        time.sleep(0.3)
        partial.unlink()
launch(Entry("infer", InferConfig), job, ["run.folder=runs", "name=r"])
"""


def shell(redirection: str, text: str, folder) -> subprocess.CompletedProcess:
    return ran(["bash", "-c", f'set -o pipefail; "$@" {redirection}', "bash", *script(text)], folder=folder)


@pytest.mark.parametrize("redirection", ["| head -1", ">&-", ">/dev/full", "2>&-", "<&- >&- 2>&-", "2>/dev/full", ">&- 2>/dev/full"])
def test_the_work_is_done_even_when_output_streams_are_closed(redirection, tmp_path):
    found = shell(redirection, SAYS, tmp_path)
    assert found.returncode == 0 and "Traceback" not in found.stderr and "Error" not in found.stderr
    assert (tmp_path / "video").read_text() == "whole"


def test_help_that_cannot_be_written_is_an_error_but_a_reader_that_stops_early_is_not(tmp_path):
    for given in (["--help"], ["--cfg"]):
        lost, enough = (shell(where, ASKS.format(given=given), tmp_path) for where in (">/dev/full", "| head -1"))
        assert (lost.returncode, lost.stderr) == (2, "sonic: error: stdout: No space left on device\n")
        assert (enough.returncode, enough.stderr, len(enough.stdout.splitlines())) == (0, "", 1)


def started(folder, **named) -> subprocess.Popen:
    """Start a program and wait until its work has begun."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(script(WORKS), cwd=folder, env=environment, stderr=subprocess.PIPE, text=True, **named)
    until = time.monotonic() + 60
    while not (folder / "partial").exists() and time.monotonic() < until and process.poll() is None:
        time.sleep(0.05)
    assert (folder / "partial").exists() and (folder / "runs/r").is_dir(), process.communicate()
    return process


@pytest.mark.parametrize("signals", [["SIGHUP"], ["SIGTERM"], ["SIGINT"], ["SIGUSR1"], ["SIGHUP", "SIGHUP", "SIGTERM"]])
def test_a_signal_that_ends_a_program_leaves_no_files(signals, tmp_path):
    process = started(tmp_path)
    for name in signals:
        process.send_signal(getattr(signal, name))
        time.sleep(0.1)
    message = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + getattr(signal, signals[0]) and "nothing was kept" in message and "Traceback" not in message
    assert list(tmp_path.iterdir()) == []


def test_a_program_under_nohup_goes_on_when_the_terminal_is_closed(tmp_path):
    process = started(tmp_path, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert process.poll() is None and (tmp_path / "partial").exists()
    process.terminate()
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
