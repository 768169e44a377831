"""A file of requests: its text in lines, each line as a config, and which lines name each other's files."""

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
from sonic.inference.inputs import BUNDLED_INPUTS, inputs_of
from sonic.system.paths import check_input, check_name, expanded, file_key, shown

LINE_END = re.compile("\r\n|\r|\n")  # and nothing else: U+2028 may stand inside a string
NOT_TEXT = re.compile("[\ud800-\udfff]")  # in a line: bytes that are not of its encoding
log = logging.getLogger("sonic.inference")

BEGINNING = 40  # characters of a line or name that an error repeats


class Request(NamedTuple):
    """A line of the file: the film it wants, or the sentence that says why it cannot be made."""

    line: int
    wanted: InferConfig | None = None
    fault: str = ""


def read_requests(path: str) -> list[tuple[int, str]]:
    """Lines of a file of requests that are not empty, each with its number; UTF-8, or UTF-16 and UTF-32 as editors write them.

    A byte that is not UTF-8 is left to the line it stands in. Raises ValueError when the file cannot be read or holds no line.
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
        told = f"{error.reason} at byte {error.start}"
        raise ValueError(f"requests={path} looks like {encoding.upper()} and is not ({told}); save it as UTF-8") from error
    lines = [(number, line.strip("\ufeff")) for number, line in enumerate(LINE_END.split(text), start=1)]
    lines = [(number, line) for number, line in lines if line.strip()]
    if not lines:
        raise ValueError(f'requests={path} holds no request; write one JSON object per line, such as {{"image": "me.jpg"}}')
    return lines


def all_requests(lines: Sequence[tuple[int, str]], config: InferConfig, output_of: Callable[[int], Path]) -> list[Request]:
    """Every line as a film that is wanted, with the output `output_of(line)` where it names none, or with its fault.

    An output that is an input of any line, or the output of a line before, is such a fault, however the two are spelt.
    """
    found = []
    for line, text in lines:
        try:
            found.append(Request(line, request_of(text, config, output_of(line))))
        except (ValueError, OSError) as error:
            found.append(Request(line, fault=" ".join(str(error).split())))
    good = [request for request in found if request.wanted]
    read = {file_key(name): (each.line, option, name) for each in reversed(good) for option, name in inputs_of(each.wanted)}
    written: dict[Any, int] = {}
    return [_without_clash(request, read, written) if request.wanted else request for request in found]


def request_of(text: str, config: InferConfig, output: Path) -> InferConfig:
    """The config of one line: what the line says, and for the rest what the command line says.

    A picture or recording is looked for in the working folder, then beside the file of requests.
    """
    told = _parsed(text)
    for name in sorted(BUNDLED_INPUTS.keys() & told.keys()):
        told[name] = _found(expanded(told[name]), name, config)
    if told.get("output"):
        told["output"] = expanded(told["output"])
        check_name(told["output"], "output")
    return dataclasses.replace(config, **{**told, "output": told.get("output") or str(output)})


def _parsed(text: str) -> dict[str, Any]:
    """The values of a line by their names. Raises ValueError unless it is an object with values of the right kinds."""
    kinds = typing.get_type_hints(RequestConfig)
    known = [field.name for field in dataclasses.fields(RequestConfig)]
    if wrong := NOT_TEXT.search(text):
        told = f"character {wrong.start() + 1} is {shown(wrong[0])}"
        raise ValueError(f"the line is not UTF-8 text ({told}); save the file of requests as UTF-8")
    try:
        told = json.loads(text, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        raise ValueError(f"the line is not JSON ({error}); write an object with some of: {', '.join(known)}") from error
    except RecursionError as error:
        raise ValueError(f"the line is nested too deeply; write an object with some of: {', '.join(known)}") from error
    strange = [name for name in told if name not in known] if isinstance(told, dict) else [text]
    if strange:
        raise ValueError(f"{_beginning(strange[0])} is not known in a request; use: {', '.join(known)}")
    for name, value in told.items():
        if type(value) is not kinds[name]:
            said = f"{name}={_beginning(json.dumps(value))} is {type(value).__name__}"
            raise ValueError(f"{said}; a request needs {kinds[name].__name__} there")
    return told


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object that says everything once."""
    names = [name for name, _ in pairs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{_beginning(twice)} is there twice in the line; leave one of them out")
    return dict(pairs)


def _found(names: str, option: str, config: InferConfig) -> str:
    """The name of an input, with the folder of the file of requests in front where only that has it; so too each of several voices.

    Raises ValueError when neither that folder nor the working folder has it.
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
            log.info("%s=%s is taken from %s, beside the file of requests", option, shown(name), shown(str(folder)))
        else:
            raise ValueError(
                f"{option}={name} is neither in the working folder nor in {folder}, beside the file of requests; check the name"
            )
    return "+".join(found)


def _without_clash(request: Request, read: dict[Any, tuple[int, str, str]], written: dict[Any, int]) -> Request:
    """The request, or its fault where its film would take the place of an input or of the film of a line before."""
    output = request.wanted.output
    key = file_key(output)
    if key in read:
        line, option, name = read[key]
        return Request(request.line, fault=f"output={output} is the file {option}={name} that line {line} reads; choose another output")
    first = written.setdefault(key, request.line)
    if first != request.line:
        return Request(request.line, fault=f"output={output} is the film of line {first} already; give each film a name of its own")
    return request


def _beginning(text: str) -> str:
    return text if len(text) <= BEGINNING else f"{text[:BEGINNING]}..."
