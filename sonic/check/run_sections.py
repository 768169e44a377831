"""Runs the sections of the device check, each in a process of its own with a time limit, and shows figures and a summary."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from sonic.check.case import CheckCase, case_of
from sonic.check.check_config import LIMITS, CheckConfig
from sonic.check.figures import Figures, as_line
from sonic.check.job_sections import memory, offload, ranks, single, train, video
from sonic.check.kernel_sections import env, kernels, numerics, vae
from sonic.system.run_folder import Run, start_logging

PRELOADED = ["sonic.check.run_sections", "torch._dynamo", "torch.distributed.fsdp"]
CPU_PATIENCE = 4  # times as long as a GPU may a CPU take, which others may use too
LAST_LINES = 3  # of the output of a section that did not end by itself
Section = Callable[[CheckCase, Figures], None]
SECTIONS: dict[str, Section] = dict(zip(LIMITS, (env, numerics, kernels, single, offload, vae, video, train, ranks, memory), strict=True))
PASSED, FAILED, SKIPPED = "pass", "fail", "skipped"

log = logging.getLogger("sonic.check")


class SectionResult(NamedTuple):
    """How a section ended: pass, fail or skipped, its seconds, and a sentence for each failure."""

    section: str
    result: str
    seconds: float
    sentences: list[str]


def run_sections(config: CheckConfig, run: Run) -> int:
    """Run the sections in their order. Gives exit code 1 when one has failed, else 0."""
    case_of(config, run.path)  # raises for a device that is not there before a folder is made
    folder = run.open()
    run.keep()
    case, outcomes = case_of(config, folder), []
    context = multiprocessing.get_context("forkserver")  # its server imports once what all sections need
    context.set_forkserver_preload(PRELOADED)
    first = context.Process()
    first.start()
    first.join()  # when the server is ready, so that the first section does not wait for it
    for name in [each for each in LIMITS if each in (config.sections or LIMITS)]:
        limit = config.limit or LIMITS[name] * (1 if case.on_gpu else CPU_PATIENCE)
        outcomes.append(_outcome(name, case, section=SECTIONS[name], limit=limit))
        log.info("%s: %s after %.1f s", name, outcomes[-1].result, outcomes[-1].seconds)
        _write(folder, {**outcomes[-1]._asdict(), "figure": None})
    table = Table("section", "result", "s", "what it means", title=f"{case.device}, figures in {folder / 'check.jsonl'}")
    for outcome in outcomes:
        table.add_row(outcome.section, outcome.result, f"{outcome.seconds:.1f}", "\n".join(outcome.sentences))
    Console(width=None if Console().is_terminal else 150).print(table)
    return int(any(outcome.result == FAILED for outcome in outcomes))


def _outcome(name: str, case: CheckCase, *, section: Section, limit: float) -> SectionResult:
    """Run a section in its process to its end, or to the end of its time."""
    begun, records, context = time.monotonic(), [], multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_run_section, args=(name, case, theirs), kwargs={"section": section})
    process.start()
    theirs.close()
    try:
        for record in _received(ours, begun + limit):
            records.append(record)
            log.info(as_line(record))
            _write(case.folder, record)
        process.join(max(0.0, begun + limit - time.monotonic()))
    finally:
        code = process.exitcode
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its own group, with the processes that it has started
        process.kill()
        process.join()
    sentences = [f"{record['figure']}: {record['failed']}" for record in records if record.get("failed")]
    if code != 0:
        ended = "" if code is None else signal.Signals(-code).name if code < 0 else f"exit code {code}"
        how = f"ended with {ended}" if ended else f"was stopped after {limit:g} s"
        sentences.append(f"it {how}, and figures after that are missing: {_last_lines(case.folder / f'{name}.txt')}")
    shown = [record for record in records if record["value"] is not None]
    return SectionResult(name, FAILED if sentences else PASSED if shown else SKIPPED, round(time.monotonic() - begun, 1), sentences)


def _received(pipe: Connection, until: float) -> Iterator[dict]:
    """The figures of a section as they come, until it ends or its time is over."""
    with suppress(EOFError):
        while pipe.poll(max(0.0, until - time.monotonic())):
            yield pipe.recv()


def _run_section(name: str, case: CheckCase, pipe: Connection, *, section: Section) -> None:
    """What the process of a section does; its output goes to a file beside the figures."""
    os.setsid()
    parent = multiprocessing.parent_process()
    Thread(target=lambda: (parent.join(), os.killpg(0, signal.SIGKILL)), daemon=True).start()
    with (case.folder / f"{name}.txt").open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    start_logging(main=True)
    if case.device.index is not None:
        torch.cuda.set_device(case.device)
    figures = Figures(name, pipe.send, torch.cuda.get_device_name(case.device) if case.on_gpu else "cpu")
    section(case, figures)
    for figure in figures.missing:
        figures.skip(figure, "only a GPU can show it")


def _last_lines(file: Path) -> str:
    lines = file.read_text(errors="replace").split("\n") if file.exists() else []
    return " | ".join([line.strip() for line in lines if line.strip()][-LAST_LINES:]) or "it wrote nothing"


def _write(folder: Path, record: dict) -> None:
    with (folder / "check.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
