"""Runs the sections of the device check, each in a process of its own with a time limit, and shows figures and a summary."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
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

log = logging.getLogger("sonic.check")


class SectionResult(NamedTuple):
    """How a section ended: pass, fail or skipped, its seconds, and a sentence for each failure."""

    section: str
    result: str
    seconds: float
    sentences: list[str]


def run_sections(config: CheckConfig, run: Run) -> int:
    """Run the sections in their order. Gives exit code 1 when one has failed, else 0."""
    case = case_of(config, run.path)  # raises for a device that is not there before a folder is made
    case = replace(case, folder=run.open())
    run.keep()
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)  # its server imports once what all sections need
    table = Table("section", "result", "s", "what it means", title=f"{case.device}, figures in {case.folder / 'check.jsonl'}")
    failed = 0
    for name in [each for each in LIMITS if each in (config.sections or LIMITS)]:
        limit = config.limit or LIMITS[name] * (1 if case.on_gpu else CPU_PATIENCE)
        found = _run_in_time(name, case, SECTIONS[name], limit=limit)
        log.info("%s: %s after %.1f s", *found[:3])
        _write(case.folder, {**found._asdict(), "figure": None})
        table.add_row(name, found.result, f"{found.seconds:.1f}", "\n".join(found.sentences))
        failed |= found.result == "fail"
    Console(width=None if Console().is_terminal else 150).print(table)
    return int(failed)


def _run_in_time(name: str, case: CheckCase, section: Section, *, limit: float) -> SectionResult:
    """Run a section in its process to its end, or to the end of its time; show and write each figure as it comes."""
    begun, records, context = time.monotonic(), [], multiprocessing.get_context("forkserver")
    left = lambda: max(0.0, begun + limit - time.monotonic())  # noqa: E731
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_run_section, args=(name, case, section), kwargs={"pipe": theirs})
    process.start()
    theirs.close()
    try:
        with suppress(EOFError):  # the section has ended
            while ours.poll(left()):
                records.append(ours.recv())
                log.info(as_line(records[-1]))
                _write(case.folder, records[-1])
        process.join(left())
    finally:
        code = process.exitcode
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its own group, with the processes that it has started
        process.kill()
        process.join()
    sentences = [f"{record['figure']}: {record['failed']}" for record in records if record.get("failed")]
    if code != 0:
        how = (
            f"was stopped after {limit:g} s"
            if code is None
            else f"ended with {signal.Signals(-code).name if code < 0 else f'exit code {code}'}"
        )
        sentences.append(f"it {how}, and figures after that are missing: {_last_lines(case.folder / f'{name}.txt')}")
    measured = any(record["value"] is not None for record in records)
    return SectionResult(name, "fail" if sentences else "pass" if measured else "skipped", round(time.monotonic() - begun, 1), sentences)


def _run_section(name: str, case: CheckCase, section: Section, *, pipe: Connection) -> None:
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
    lines = [line.strip() for line in file.read_text(errors="replace").splitlines()] if file.exists() else []
    return " | ".join([line for line in lines if line][-LAST_LINES:]) or "it wrote nothing"


def _write(folder: Path, record: dict) -> None:
    with (folder / "check.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
