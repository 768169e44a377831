"""Writes what can be read off the code: docs/options.md, and the tree in docs/architecture.md.   usage: python docs/generate.py"""

from __future__ import annotations

import ast
import dataclasses
import re
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from sonic import cli  # noqa: E402  (of this checkout, installed or not)
from sonic.config import help_of  # noqa: E402
from sonic.main import COMMANDS  # noqa: E402

DOCS = ROOT / "docs"
OPTIONS, ARCHITECTURE = DOCS / "options.md", DOCS / "architecture.md"
TREE = re.compile(r"(?<=<!-- tree -->\n```\n).*?(?=```\n<!-- end of the tree -->)", re.S)
COLUMN = 30  # where descriptions begin in the tree
FOLDERS = ("conf", "recipes", "tests")  # shown as folders, without their files
FILES = ("README.md", "setup.py", "setup.cfg", "pyproject.toml", "MANIFEST.in", "LICENSE", ".ci/run")

Row = tuple[str, str, str, str]  # name, type, default, meaning


# --- what is read from the command line's own tables -----------------------------------------------------------------------------


def entry(command: str) -> cli.Entry:
    """The entry point of a command."""
    return import_module(f"sonic.commands.{command}_command").ENTRY


def rows(schema: type, prefix: str = "") -> list[Row]:
    """Every option under a config class."""
    return [_row(name, kind, field) for name, (kind, field) in cli.config_options(schema, prefix).items()]


def choices(command: str) -> Mapping[str, list[str]]:
    """What a command lets one choose by name, from conf/ and recipes/."""
    return cli.groups(entry(command))


def short_names(command: str) -> dict[str, str]:
    """Short names of options, and the full ones."""
    known = cli.entry_options(entry(command))
    return {short: full for short, full in cli.SHORT.items() if full in known and short not in known}


def _row(name: str, kind: object, field: dataclasses.Field) -> Row:
    default = field.default_factory() if field.default is dataclasses.MISSING else field.default
    text = "" if default in (None, "") else str(default)
    type_name = (kind.__name__ if isinstance(kind, type) and not hasattr(kind, "__args__") else str(kind)).replace(" | None", "")
    return name, type_name.replace("typing.", ""), text, help_of(field)


# --- docs/options.md -------------------------------------------------------------------------------------------------------------

HEAD = """# Options

<!-- written by docs/generate.py; do not edit -->

An option is written `name=value`, a choice `group=name`; choices marked `+` are laid over the whole config and are written
`+preset=NAME`. `--help` of a command prints its list, `--cfg` prints the config that a command line gives and stops. Defaults below
are those of the config classes; a choice may set others. A group of options that an earlier command has with the same defaults is
named and not repeated. [inference.md](inference.md) says more about the options of `infer`."""


def options_page() -> str:
    """The text of docs/options.md."""
    known: set[Row] = set()
    sections = [_section(command, about, known) for command, about in COMMANDS.items()]
    return "\n\n".join([HEAD, *sections]) + "\n"


def _section(command: str, about: str, known: set[Row]) -> str:
    """One command: its choices, the options that no command before it has, and where the others are."""
    parts = [f"## {command}", f"`sonic {command}`: {about}.", _choices(command), *_options(rows(entry(command).schema), known)]
    if short := short_names(command):
        parts.append("Short names: " + ", ".join(f"`{one}` for `{full}`" for one, full in short.items()) + ".")
    for group, members in entry(command).variants.items():
        for name, schema in members.items():
            parts += [f"### {command} {group}={name}", _first_line(schema), *_options(rows(schema, f"{group}."), known)]
    return "\n\n".join(part for part in parts if part)


def _options(found: list[Row], known: set[Row]) -> list[str]:
    """A table of the options that are not known yet, and the names of the others, whole groups as one."""
    new = [row for row in found if row not in known]
    shared = dict.fromkeys(_group(name, {each[0] for each in new}) for name, *rest in found if (name, *rest) in known)
    known.update(new)
    return [_table(new), f"As above: {', '.join(f'`{name}`' for name in shared)}." if shared else ""]


def _group(name: str, new: set[str]) -> str:
    """The largest group of an option in which nothing is new, or its own name."""
    parts = name.split(".")
    groups = (".".join(parts[:end]) for end in range(1, len(parts)))
    return next((f"{group}.*" for group in groups if not any(other.startswith(f"{group}.") for other in new)), name)


def _choices(command: str) -> str:
    plus = entry(command).collections
    named = {f"{'+' * (group in plus)}{group}": names for group, names in choices(command).items()}
    lines = [f"| `{group}` | {', '.join(f'`{name}`' for name in names)} |" for group, names in named.items()]
    return "\n".join(["| choice | names |", "|---|---|", *lines]) if lines else ""


def _table(found: list[Row]) -> str:
    if not found:
        return ""
    lines = [f"| `{name}` | {kind} | {f'`{default}`' if default else ''} | {_cell(meaning)} |" for name, kind, default, meaning in found]
    return "\n".join(["| option | type | default | meaning |", "|---|---|---|---|", *lines])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _first_line(schema: type) -> str:
    return (schema.__doc__ or "").strip().splitlines()[0]


# --- the tree in docs/architecture.md --------------------------------------------------------------------------------------------


def architecture_page(text: str) -> str:
    """docs/architecture.md with the tree as it is on disk. A file that is in the tree already keeps its position and description; a
    new one comes last in its folder, with the first sentence of its docstring."""
    return TREE.sub(lambda match: tree(described(match[0])), text)


def described(block: str) -> dict[str, str]:
    """Path -> description of every line of a tree."""
    found, folders = {}, []
    for line in block.splitlines():
        name, _, words = line.strip().partition(" ")
        depth = (len(line) - len(line.lstrip())) // 2
        folders = [*folders[:depth], name]
        found["".join(folders)] = words.strip()
    return found


def tree(known: Mapping[str, str]) -> str:
    """The lines of the tree. A file that was moved keeps its description."""
    wanted = set(on_disk())
    moved = {path.rpartition("/")[2]: words for path, words in known.items() if path not in wanted and path[-1] != "/"}
    order = [path for path in known if path in wanted]
    for path in sorted(wanted - set(order)):
        folder = _folder(path)
        beside = [index for index, other in enumerate(order) if folder and other.startswith(folder)]
        order.insert(beside[-1] + 1 if beside else len(order), path)
    return "".join(_line(path, known.get(path) or moved.get(path.rpartition("/")[2]) or _sentence(path)) for path in order)


def on_disk() -> Iterator[str]:
    """Files and folders that the tree shows, relative to the root; folders end in a slash."""
    yield from FILES
    library = ROOT / "sonic"
    for path in library.rglob("*.py"):
        if path.name != "__init__.py" or path.parent == library:
            yield path.relative_to(ROOT).as_posix()
        else:
            yield f"{path.parent.relative_to(ROOT).as_posix()}/"
    for folder in ("sonic", "launch", "docs", *FOLDERS):
        yield f"{folder}/"
    for folder, suffixes in (("launch", (".py", ".sh", ".txt", ".jpg")), ("docs", (".py", ".md"))):
        yield from (f"{folder}/{path.name}" for path in (ROOT / folder).iterdir() if path.suffix in suffixes)
    for folder in FOLDERS:
        files = (path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix != ".pyc")
        yield from {f"{folder}/{path.parts[0]}/" for path in files if len(path.parts) > 1 and not path.parts[0].startswith((".", "_"))}


def _folder(path: str) -> str:
    """The folder that a path is in, with its slash; nothing at the top."""
    head, slash, _ = path.rstrip("/").rpartition("/")
    return head + slash


def _line(path: str, words: str) -> str:
    depth = path.rstrip("/").count("/") if path not in FILES else 0
    name = path if path in FILES else path[len(_folder(path)) :]
    left = "  " * depth + name
    return f"{left:<{COLUMN}}{words}".rstrip() + "\n" if len(left) < COLUMN else f"{left} {words}".rstrip() + "\n"


def _sentence(path: str) -> str:
    """The first sentence of a module's docstring."""
    file = ROOT / path / "__init__.py" if path.endswith("/") else ROOT / path
    if file.suffix != ".py" or not file.is_file():
        return ""
    docstring = (ast.get_docstring(ast.parse(file.read_text())) or "").partition("\n\n")[0].replace("\n", " ")
    return re.split(r"(?<=[a-z0-9)`])[.:;] ", docstring)[0].rstrip(".")


if __name__ == "__main__":
    OPTIONS.write_text(options_page())
    ARCHITECTURE.write_text(architecture_page(ARCHITECTURE.read_text()))
