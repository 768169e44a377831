"""Reads a file of requests: splits it into lines, turns each line into a config, and finds outputs that would overwrite other files."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sonic.inference.infer_config import InferConfig, RequestConfig
from sonic.inference.inputs import BUNDLED_INPUTS, input_files
from sonic.system.paths import check_input, check_name, expanded, file_key, printable

LINE_END = re.compile("\r\n|\r|\n")  # not str.splitlines: U+2028 is allowed inside a JSON string
NOT_TEXT = re.compile("[\ud800-\udfff]")  # surrogates that stand for bytes that could not be decoded
log = logging.getLogger("sonic.inference")

BEGINNING = 40  # characters of a line or name that an error message quotes


class Request(NamedTuple):
    """A line of the file: the config of its video, or one sentence that says why the video cannot be made."""

    line: int
    wanted: InferConfig | None = None
    fault: str = ""


def read_requests(path: str) -> list[tuple[int, str]]:
    """The (line number, text) of every non-empty line in a file of requests, in UTF-8, UTF-16 or UTF-32.

    A byte that is not UTF-8 becomes a surrogate and fails only its own line. Raises ValueError when the file cannot be read or
    has no request.
    """
    check_input(path, "requests")
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"requests={path} cannot be read ({error.strerror}); give a file with one JSON object per line") from error
    encoding = json.detect_encoding(data)
    try:
        text = data.decode(encoding, "surrogateescape" if encoding.startswith("utf-8") else "surrogatepass")
    except UnicodeDecodeError as error:
        given = f"{error.reason} at byte {error.start}"
        raise ValueError(f"requests={path} looks like {encoding.upper()} and is not ({given}); save it as UTF-8") from error
    lines = [(number, line.strip("\ufeff")) for number, line in enumerate(LINE_END.split(text), start=1)]
    lines = [(number, line) for number, line in lines if line.strip()]
    if not lines:
        raise ValueError(f'requests={path} holds no request; write one JSON object per line, such as {{"image": "me.jpg"}}')
    return lines


def all_requests(lines: Sequence[tuple[int, str]], config: InferConfig, output_of: Callable[[int], Path]) -> list[Request]:
    """One Request per line, with its config or its error; a line without an output gets `output_of(line)`.

    It is an error when an output is also an input of any line or the output of an earlier line, even if the paths are spelt differently.
    """
    found = []
    for line, text in lines:
        try:
            found.append(Request(line, request_of(text, config, output_of(line))))
        except (ValueError, OSError) as error:
            found.append(Request(line, fault=" ".join(str(error).split())))
    good = [request for request in found if request.wanted]
    read = {file_key(name): (each.line, option, name) for each in reversed(good) for option, name in input_files(each.wanted)}
    written: dict[Any, int] = {}
    return [_without_clash(request, read, written) if request.wanted else request for request in found]


def request_of(text: str, config: InferConfig, output: Path) -> InferConfig:
    """The config of one line: its values override those of the command line.

    A picture or recording is searched in the working folder, then in the folder of the file of requests. Raises ValueError for a bad line.
    """
    given = _parsed(text)
    for name in sorted(BUNDLED_INPUTS.keys() & given.keys()):
        given[name] = _found(expanded(given[name]), name, config)
    if given.get("output"):
        given["output"] = expanded(given["output"])
        check_name(given["output"], "output")
    return dataclasses.replace(config, **{**given, "output": given.get("output") or str(output)})


def _parsed(text: str) -> dict[str, Any]:
    """The values of a line, keyed by option. Raises ValueError unless the line is a JSON object with values of the right types."""
    kinds = typing.get_type_hints(RequestConfig)
    known = [field.name for field in dataclasses.fields(RequestConfig)]
    if wrong := NOT_TEXT.search(text):
        given = f"character {wrong.start() + 1} is {printable(wrong[0])}"
        raise ValueError(f"the line is not UTF-8 text ({given}); save the file of requests as UTF-8")
    try:
        given = json.loads(text, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        raise ValueError(f"the line is not JSON ({error}); write an object with some of: {', '.join(known)}") from error
    except RecursionError as error:
        raise ValueError(f"the line is nested too deeply; write an object with some of: {', '.join(known)}") from error
    strange = [name for name in given if name not in known] if isinstance(given, dict) else [text]
    if strange:
        raise ValueError(f"{_beginning(strange[0])} is not known in a request; use: {', '.join(known)}")
    for name, value in given.items():
        if type(value) is not kinds[name]:
            message = f"{name}={_beginning(json.dumps(value))} is {type(value).__name__}"
            raise ValueError(f"{message}; a request needs {kinds[name].__name__} there")
    return given


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs of a JSON object as a dict. Raises ValueError for a repeated key."""
    names = [name for name, _ in pairs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{_beginning(twice)} is there twice in the line; leave one of them out")
    return dict(pairs)


def _found(names: str, option: str, config: InferConfig) -> str:
    """The path of an input: as given if it exists in the working folder, else in the folder of the file of requests.

    With face.masks, audio may name several files joined by "+"; each is searched. Raises ValueError when neither folder has the file.
    """
    several = option == "audio" and config.face.masks
    found = []
    for name in names.split("+") if several else [names]:
        check_name(name, option)
        folder = Path(config.requests).parent
        apart = bool(config.requests) and not os.path.isabs(name) and folder.resolve() != Path.cwd()
        if not name or name in BUNDLED_INPUTS[option] or not apart or os.path.lexists(name):
            found.append(name)
        elif os.path.lexists(folder / name):
            found.append(str(folder / name))
            log.info("%s=%s is taken from %s, beside the file of requests", option, printable(name), printable(str(folder)))
        else:
            raise ValueError(
                f"{option}={name} is neither in the working folder nor in {folder}, beside the file of requests; check the name"
            )
    return "+".join(found)


def _without_clash(request: Request, read: dict[Any, tuple[int, str, str]], written: dict[Any, int]) -> Request:
    """The request, or a failed one if its output would overwrite an input (`read`) or the output of an earlier line (`written`)."""
    output = request.wanted.output
    key = file_key(output)
    if key in read:
        line, option, name = read[key]
        return Request(request.line, fault=f"output={output} is the file {option}={name} that line {line} reads; choose another output")
    first = written.setdefault(key, request.line)
    if first != request.line:
        return Request(request.line, fault=f"output={output} is the video of line {first} already; give each video a name of its own")
    return request


def _beginning(text: str) -> str:
    return text if len(text) <= BEGINNING else f"{text[:BEGINNING]}..."
