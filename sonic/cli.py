"""From a command line to a job and its exit code: help, errors in one sentence, ranks and the run folder.

Nothing that takes long to import is imported here, so that `--help` and errors in options are printed at once.
"""

from __future__ import annotations

import atexit
import dataclasses
import logging
import os
import shlex
import signal
import sys
import typing
from collections.abc import Callable, Sequence
from functools import reduce

import yaml

from sonic.compose import SHORT, Entry, compose, entry_options, groups, load_chosen_plugins, plain_values
from sonic.compose import config_options as config_options
from sonic.compose import group_choices as group_choices
from sonic.compose import typed_values as typed_values
from sonic.config import OtherRank, Ranks
from sonic.option_names import OUTPUTS
from sonic.registry import help_of
from sonic.system.allocator import keep_freed_memory
from sonic.system.caches import make_room_for_caches
from sonic.system.files import check_writable
from sonic.system.out_of_memory import out_of_memory
from sonic.system.paths import printable
from sonic.system.program import data_root, written
from sonic.system.run_folder import Run, start_logging
from sonic.system.stdio import StopSignal, exit_code_of, failure_of_stdout, interrupt_on_signals, keep_streams_usable

ROOT = data_root()
USER_ERROR, FAULT = 2, 1

Job = Callable[[typing.Any, Run], int | None]  # (config, run) -> exit code, None = 0

log = logging.getLogger("sonic")


def launch(entry: Entry, job: Job, argv: Sequence[str] | None = None) -> typing.NoReturn:
    """Run `job(config, run)` with the config of the command line, or of `argv`, and end the process with its exit code."""
    interrupt_on_signals()
    keep_streams_usable()
    make_room_for_caches()
    keep_freed_memory()
    code = run_command(entry, job, sys.argv[1:] if argv is None else argv)
    if ranks_here().world > 1:
        # without Python's own teardown, during which threads of the connections between ranks sometimes abort the process
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def run_command(entry: Entry, job: Job, argv: Sequence[str]) -> int:
    """The exit code of a command: the job's, or 2 for an error of the user, with one sentence on stderr and no files left behind."""
    ranks = ranks_here()
    start_logging(main=ranks.rank == 0)
    run = config = None
    try:
        load_chosen_plugins(entry, argv)
        if {"--help", "-h"} & set(argv):
            return _answer(help_text(entry, [item for item in argv if item not in ("--help", "-h", "--cfg")]))
        config = compose(entry, [item for item in argv if item != "--cfg"])
        resolved = yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)
        if "--cfg" in argv:
            return _answer(resolved)
        for option in OUTPUTS:
            if path := getattr(config, option, ""):
                check_writable(path, option)
        if ranks.world > entry.max_ranks:
            raise ValueError(f"{ranks.world} ranks were started but this job runs on {entry.max_ranks}; leave --nproc-per-node out")
        command = [printable(word) for word in (*shlex.split(written(entry.command or entry.name)), *argv)]
        run = Run(entry.location(config), resolved, command=command, root=ROOT, ranks=ranks)
        return job(config, run) or 0
    except (ValueError, OSError) as error:
        if ranks.rank and run:  # the first rank may know nothing of it
            log.critical("rank %d: %s", ranks.rank, _sentence(error))
        return _given_up(_sentence(error), USER_ERROR)
    except OtherRank as error:
        return _given_up(str(error), FAULT)
    except KeyboardInterrupt as stop:
        code = stop.code if isinstance(stop, StopSignal) else exit_code_of(signal.SIGINT)
        return _given_up(f"stopped; {'what was finished stays' if run and run.kept else 'nothing was kept'}", code)
    except Exception as error:
        sentence = out_of_memory(error, entry.would_help if run else "", config, ranks)
        fault = sentence or "a fault of the program, not of the input"
        log.critical("rank %d: %s", ranks.rank, printable(fault), exc_info=not sentence or "SONIC_DEBUG" in os.environ)
        return FAULT
    finally:
        if run:
            run.close()


def _answer(text: str) -> int:
    """Print the text on stdout and give exit code 0. Raises OSError when it cannot be written completely."""
    sys.stdout.write(text)
    if failure := failure_of_stdout():
        raise failure
    return 0


def ranks_here() -> Ranks:
    """The rank of this process among those that torchrun started; a single one without torchrun."""
    names = ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)
    return Ranks(*(int(os.environ.get(name, alone)) for name, alone in names))


def help_text(entry: Entry, argv: Sequence[str] = ()) -> str:
    """The text of `--help`: usage, choices, and every option of what `argv` chooses, with the value that it has there."""
    values = plain_values(entry, argv)
    command = written(entry.command or entry.name)
    lines = [
        (entry.schema.__doc__ or "").strip(),
        "",
        f"usage: {command} [choice=name ...] [option=value ...]     --cfg shows the config and stops",
        *([f"example: {command} {entry.example}"] if entry.example else []),
        "",
        "choices:",
        *(f"  {name + '=' + '|'.join(found)}" for name, found in groups(entry).items()),
        *(["  a choice may also be a file: model=FILE.yaml; recipe=FILE.yaml is one of the whole config"] if entry.collections else []),
        "",
        f"options of {' '.join(argv) or 'the plain command'} and their values:",
    ]
    for name, (_, field) in entry_options(entry).items():
        *inside, last = name.split(".")
        group = reduce(lambda found, part: found.get(part, {}), inside, values)
        if last in group:
            assignment = f"{name}={_typed(group[last])}"
            lines.append(f"  {assignment:<44} {help_of(field)}".rstrip())
    lines += [f"  {group}=NAME --help lists those of another {group}" for group in entry.variants]
    short = [f"{short} for {full}" for short, full in SHORT.items() if full in entry_options(entry)]
    return "\n".join([*lines, "", *([f"short: {', '.join(short)}", ""] if short else [])])


def _typed(value: typing.Any) -> str:
    """A value as it is typed on the command line."""
    return str(value).lower() if isinstance(value, bool) else "" if value is None else str(value)


def _sentence(error: Exception) -> str:
    """The message of an error, on one line."""
    if isinstance(error, OSError) and error.strerror:
        return printable(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
    return printable(" ".join(str(error).split())) or type(error).__name__


def _given_up(sentence: str, code: int) -> int:
    log.debug("where it happened", exc_info=True)
    log.error(sentence, exc_info="SONIC_DEBUG" in os.environ)
    return code
