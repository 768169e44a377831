"""README and docs/ are current: every command line composes, every link leads somewhere, what is generated is as the code has it."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from sonic.cli import compose, groups
from sonic.main import COMMANDS
from sonic.system.program import LAUNCHERS

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
README_LINES = 200
STARTERS = re.compile(r"(sonic |torchrun |python launch/|python -m sonic |sbatch |\./launch/)(?!  )")
LAUNCHED = re.compile(r"(?:\./)?launch/(\w+)\.(?:py|sh)")
OF_SCRIPTS = {  # what these start, and what they add
    "quickstart": ("infer", ["+preset=fast_preview"]),
    **{script: (command, []) for command, script in LAUNCHERS.items()},
}
NO_OPTIONS = {"test"}  # scripts that take none of ours
CODE = re.compile(r"```(\w*)\n(.*?)```", re.S)
SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FILE = re.compile(r"(?:[\w.-]+/)+[\w-]+\.(?:py|yaml|md|sh)")
FOLDER = re.compile(r"(?:sonic|conf|recipes|launch|tests|docs)/(?:[\w.-]+/)*")
MADE = ("runs/",)  # files that a run makes


def generate():
    """The script that writes the generated parts."""
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs/generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(page: Path, language: str) -> list[str]:
    return [code for found, code in CODE.findall(page.read_text()) if found == language]


def written() -> Iterator[tuple[str, str]]:
    """Every command line on every page, in blocks and between backticks, with where it is."""
    for page in PAGES:
        text = page.read_text()
        lines = [line for code in blocks(page, "") for line in code.splitlines()]
        lines += [code for code in SPAN.findall(CODE.sub("", text)) if "=" in code]  # others only name a command
        for line in lines:
            if STARTERS.match(line):
                yield page.name, line


LINES = sorted(set(written()))


def command_of(line: str) -> tuple[str, list[str]] | None:
    """The command of a line and its arguments as the config sees them; None where the line gives a script no options."""
    words = shlex.split(line, comments=True)
    for index, word in enumerate(words):
        name, added = word, []
        if script := LAUNCHED.fullmatch(word):
            if script[1] in NO_OPTIONS:
                return None
            name, added = OF_SCRIPTS.get(script[1], (script[1], []))
            if name == "slurm":  # takes any command
                name, index = words[index + 1], index + 1
        elif word != "sonic":
            continue
        else:
            name, index = words[index + 1], index + 1
        assert name in COMMANDS or name.startswith("--"), f"{line}: {name} is no command"
        return None if name.startswith("--") else (name, [*added, *words[index + 1 :]])
    raise AssertionError(f"{line}: names no command")


def composed(name: str, argv: list[str]) -> object:
    module = importlib.import_module(f"sonic.commands.{name}_command")
    entry = module.entry_of(argv) if hasattr(module, "entry_of") else module.ENTRY  # of a video or of a training
    return compose(entry, [item for item in argv if item not in ("--help", "--cfg")])


def test_there_are_command_lines():
    assert {command_of(line)[0] for _, line in LINES if command_of(line)} == set(COMMANDS)


@pytest.mark.parametrize(("page", "line"), LINES)
def test_a_command_line_composes(page, line):
    if found := command_of(line):
        composed(*found)


def test_the_check_rejects_wrong_command_lines():
    with pytest.raises(ValueError, match="sampler.sample_step is not"):
        composed(*command_of("torchrun --nproc-per-node 4 launch/infer.py sampler.sample_step=2  # two steps"))
    with pytest.raises(AssertionError, match="is no command"):
        command_of("python launch/movies.py")


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= README_LINES


def test_the_readme_names_every_command_preset_and_model():
    text = README.read_text()
    assert all(f"`sonic {name} " in text for name in COMMANDS)
    found = groups(importlib.import_module("sonic.commands.infer_command").ENTRY)
    assert all(f"`{name}`" in text for group in ("preset", "model") for name in found[group])


def test_what_is_generated_is_current():
    made = generate()
    assert made.options_page() == made.OPTIONS.read_text(), "run python docs/generate.py"
    text = made.ARCHITECTURE.read_text()
    assert made.TREE.search(text) and made.architecture_page(text) == text, "run python docs/generate.py"


def test_every_option_has_a_line_of_help():
    bare = {line.split("`")[1] for line in generate().options_page().splitlines() if line.startswith("| `") and line.endswith("|  |")}
    assert bare == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_exist(page):
    text = page.read_text()
    targets = [target for target in LINK.findall(CODE.sub("", text)) if "://" not in target]
    missing = [target for target in targets if not (page.parent / target.partition("#")[0]).exists()]
    for target in targets:
        file, _, anchor = target.partition("#")
        if anchor and anchor not in anchors((page.parent / file if file else page).read_text()):
            missing.append(target)
    words = [word for span in SPAN.findall(CODE.sub("", text)) for word in FILE.findall(span) if not word.startswith(MADE)]
    missing += [word for word in words if "NAME" not in word and not any((ROOT / top / word).exists() for top in ("", "sonic"))]
    folders = [span for span in SPAN.findall(CODE.sub("", text)) if FOLDER.fullmatch(span)]
    assert [*missing, *(folder for folder in folders if not (ROOT / folder).is_dir())] == []


def test_the_words_of_the_glossary_are_those_of_the_code():
    words = (ROOT / "docs/architecture.md").read_text().partition("\n## Words\n")[2].partition("\n## ")[0]
    cells = [row.split("|")[1] for row in words.splitlines() if row.startswith("| `")]
    named = {word for cell in cells for word in SPAN.findall(cell)}
    code = {word for path in (ROOT / "sonic").rglob("*.py") for word in re.findall(r"\w+", path.read_text())}
    assert len(named) > 40 and named <= code


def anchors(text: str) -> set[str]:
    """The names of a page's headings as links spell them."""
    headings = re.findall(r"^#+ (.*)$", CODE.sub("", text), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_is_reached_from_the_readme():
    reached, waiting = set(), [README]
    while waiting:
        page = waiting.pop()
        reached.add(page)
        links = {(page.parent / target.partition("#")[0]).resolve() for target in LINK.findall(page.read_text()) if "://" not in target}
        waiting += [link for link in links if link.suffix == ".md" and link not in reached and link.is_file()]
    assert set(PAGES) <= reached


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_on_a_page_compiles_and_imports_what_exists(page):
    for code in blocks(page, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


def test_the_readmes_python_uses_the_pipeline_as_it_is():
    from sonic.pipeline import AvatarPipeline, Video

    owners = {"AvatarPipeline": AvatarPipeline, "pipe": AvatarPipeline, "video": Video}
    calls = [node for code in blocks(README, "python") for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    checked = 0
    for call in calls:
        of = call.func.value if isinstance(call.func, ast.Attribute) else call.func
        owner = owners.get(getattr(of, "id", ""))
        if owner is None:
            continue
        method = getattr(owner, call.func.attr if isinstance(call.func, ast.Attribute) else "__call__")
        inspect.signature(method).bind_partial(**{keyword.arg: None for keyword in call.keywords})
        checked += 1
    assert checked >= 4  # from_pretrained, the call, save, stream
