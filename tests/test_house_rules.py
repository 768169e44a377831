"""The laws of the house, read from the source with `ast`: who imports whom, how large things are, what is not written here."""

from __future__ import annotations

import ast
import re
import sys
import tokenize
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = sorted((ROOT / "sonic").rglob("*.py"))
LAUNCH = sorted((ROOT / "launch").glob("*.py"))
SOURCES = LIBRARY + LAUNCH
TESTS = sorted((ROOT / "tests").rglob("*.py"))

GROUND = {"types", "config", "geometry", "system"}
BELOW_INFERENCE = {"assets", "sampling", "model", "encoders", "vae", "checkpoint", "data", "parallel", "planner", "evaluation.metrics"}
JOBS = {"inference", "training", "evaluation", "bench"}
MAY_IMPORT = {  # folder or module -> what it may import from sonic, besides itself
    "config": set(),
    "geometry": set(),
    "system": {"config"},
    "assets": set(),
    "types": {"geometry"},
    "sampling": {"types"},
    "model": {*GROUND, "checkpoint.weights"},
    "encoders": {*GROUND, "model.pointwise", "data.audio", "checkpoint.weights"},
    "vae": GROUND,
    "checkpoint": {*GROUND, "model", "encoders", "vae"},
    "synthetic": {*GROUND, "data.audio", "data.pixels"},
    "data": {*GROUND, "synthetic", "evaluation.metrics"},
    "parallel": {*GROUND, "model", "vae", "checkpoint.load", "planner.training_job"},
    "planner": {*GROUND, "model", "vae", "parallel"},
    "inference": {*GROUND, *BELOW_INFERENCE, "synthetic.draw_face"},
    "arguments": {*GROUND, "cli", "checkpoint", "inference.infer_config"},
    "pipeline": {*GROUND, *BELOW_INFERENCE, "cli", "inference", "arguments"},
    "evaluation": {*GROUND, *BELOW_INFERENCE, "inference", "pipeline", "synthetic", "training.train_config"},
    "training": {*GROUND, *BELOW_INFERENCE, "inference", "pipeline", "synthetic", "evaluation"},
    "bench": {*GROUND, *BELOW_INFERENCE, "inference", "pipeline"},
    "cli": {"config", "system"},
    "commands": {*GROUND, "cli", "checkpoint", "data", "planner", "parallel", "pipeline", *JOBS},
    "main": {"commands", "config", "system"},
    "__main__": {"main"},
    "launch": {"main"},
}
DOORS = {  # third party -> the only places that may import it
    "hydra": {"sonic/cli.py"},
    "omegaconf": {"sonic/cli.py"},
    "wandb": {"sonic/training/log.py"},
    "deepspeed": {"sonic/parallel/deepspeed_inference.py", "sonic/training/deepspeed_engine.py", "sonic/training/deepspeed_masters.py"},
    "accelerate": {"sonic/parallel/deepspeed_inference.py", "sonic/training/deepspeed_engine.py"},
    "xformers": {"sonic/model/attention.py"},
    "diffusers": {"sonic/sampling/samplers.py", "sonic/vae/wan_vae.py", "sonic/checkpoint/weights.py"},
    "transformers": {"sonic/encoders/text.py", "sonic/encoders/wav2vec.py"},
    "ftfy": {"sonic/encoders/text.py"},
    "librosa": {"sonic/data/audio.py"},
    "av": {"sonic/data/audio_decode.py", "sonic/data/media.py", "sonic/data/audio.py", "sonic/data/video.py"},
    "pillow_heif": {"sonic/data/image.py"},
    "espeakng_loader": {"sonic/synthetic/espeak.py"},
}
WITHOUT_TORCH = (
    "sonic/config.py",
    "sonic/geometry.py",
    "sonic/system/run_folder.py",
    "sonic/cli.py",
    "sonic/main.py",
    "sonic/system/program.py",
    "sonic/system/allocator.py",
    "sonic/system/stdio.py",
    "sonic/system/caches.py",
    "sonic/system/paths.py",
    "sonic/system/worker.py",
    "sonic/training/train_config.py",
    "sonic/data/data_config.py",
    "sonic/model/counts.py",
    "sonic/planner/extrapolate.py",
    "sonic/parallel/parallel_config.py",
    "sonic/parallel/shard_units.py",
    "sonic/planner/workload.py",
    "sonic/planner/memory.py",
    "sonic/planner/step_time.py",
    "sonic/parallel/layer_ranges.py",
    "sonic/planner/plans.py",
    "sonic/planner/search.py",
    "sonic/planner/training_job.py",
    "sonic/planner/training_workload.py",
    "sonic/planner/training_memory.py",
    "sonic/planner/training_plans.py",
)
FILE_LINES, LAUNCH_LINES, FUNCTION_LINES, FIELDS, ARGUMENTS, POSITIONAL = 400, 16, 60, 12, 6, 3
OUT_WORDS = {  # private words of the first edition: docs/architecture.md says what stands for them
    *("told", "heard", "hear", "hears", "hearing", "said", "film", "films", "filmed", "filming", "knob", "knobs", "papers", "places"),
    *("trip", "trips", "travel", "depart", "arrive", "arrived", "arrives", "visit", "visits", "reaches", "walk", "walks", "walked"),
    *("company", "cast", "bodies", "wire", "shuttle", "station", "stations", "dismiss", "dismissed", "beat", "beats", "aside"),
    *("foretold", "foretell", "forecast"),
}
OUT_NAMES = {"Reach", "Exchange", "Whole", "Spatial", "Take", "Line", "Note", "Kept", "Draws", "Held", "Company", "Ready", "Scene", "Shot"}
RANK_WORDS = {"world", "mesh", "distributed", "ranks", "process"}  # what single-device networks do not speak of
NAMES_OF_OTHERS = {"cast_forward_inputs", "walk"}  # torch's FSDP policy, Python's ast.walk
LEFTOVERS = ("TO" + "DO", "FIX" + "ME", "NotImplemented" + "Error")
ONE_MACHINE = ("/tm" + "p/", "/ro" + "ot/", "/wo" + "rk/", "/ho" + "me/")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


@cache
def imports(path: Path) -> tuple[tuple[str, int], ...]:
    """Full names of everything a file imports, wherever in the file, with the line."""
    found = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno} imports relative to itself; write the full name"
            found += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
    return tuple(found)


def nodes(kind, paths=SOURCES):
    """Every node of a kind, with where it is."""
    for path in paths:
        for node in ast.walk(tree(path)):
            if isinstance(node, kind):
                yield f"{name_of(path)}:{node.lineno}", node


def is_dataclass(node: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)


def test_imports_follow_the_table():
    wrong = []
    for path in SOURCES:
        parts = path.relative_to(ROOT).with_suffix("").parts
        room = parts[0] if parts[0] == "launch" else parts[1]
        if room == "__init__":
            continue
        assert room in MAY_IMPORT, f"{name_of(path)}: give it a row in MAY_IMPORT"
        for name, line in imports(path):
            head, _, rest = name.partition(".")
            if head == "launch":
                wrong.append(f"{name_of(path)}:{line} imports launch")
            if head != "sonic" or rest.split(".")[0] == room or rest in ("", "__version__", "__doc__"):
                continue
            if not any(rest == allowed or rest.startswith(f"{allowed}.") for allowed in MAY_IMPORT[room]):
                wrong.append(f"{name_of(path)}:{line} {room} may not import sonic.{rest}")
    assert not wrong, "\n".join(wrong)


def test_third_parties_have_one_door():
    wrong = []
    for path in SOURCES:
        for name, line in imports(path):
            door = DOORS.get(name.partition(".")[0])
            where = name_of(path)
            if door is not None and where not in door and where.partition("/")[0] not in door:
                wrong.append(f"{where}:{line} imports {name}; its place is {sorted(door)}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_what_answers_at_once_imports_nothing_heavy(name):
    glue = {"hydra", "omegaconf", "yaml"} if name == "sonic/cli.py" else set()
    light = {*sys.stdlib_module_names, "sonic", *glue}
    heavy = [f"{found}:{line}" for found, line in imports(ROOT / name) if found.partition(".")[0] not in light]
    assert not heavy


def test_models_do_not_know_of_ranks():
    """Neither by import nor as an argument or an attribute, which the type `object` would hide."""
    models = [path for path in LIBRARY if "model" in path.parts]
    wrong = [f"{name_of(path)}:{line} {name}" for path in models for name, line in imports(path) if "torch.distributed" in name]
    for where, node in nodes(ast.arg | ast.Attribute | ast.AnnAssign | ast.Name, models):
        name = {ast.arg: "arg", ast.Attribute: "attr", ast.Name: "id"}.get(type(node))
        typed = node.annotation if name in (None, "arg") else None
        if name and words(getattr(node, name)) & RANK_WORDS or typed is not None and "object" in ast.unparse(typed):
            wrong.append(f"{where} {ast.unparse(node)}")
    assert not wrong, "\n".join(wrong)


def test_files_are_short():
    wrong = []
    for path in [*SOURCES, *TESTS]:
        lines, limit = len(path.read_text().splitlines()), LAUNCH_LINES if path in LAUNCH else FILE_LINES
        if lines > limit:
            wrong.append(f"{name_of(path)}: {lines} lines, at most {limit}")
    assert not wrong, "\n".join(wrong)


def test_functions_are_short():
    wrong = []
    for where, node in nodes((ast.FunctionDef, ast.AsyncFunctionDef)):
        lines = node.end_lineno - node.lineno + 1
        if lines > FUNCTION_LINES:
            wrong.append(f"{where} {node.name}: {lines} lines")
    assert not wrong, "\n".join(wrong)


def test_dataclasses_have_few_fields():
    wrong = []
    for where, node in nodes(ast.ClassDef):
        fields = [item for item in node.body if isinstance(item, ast.AnnAssign) and "ClassVar" not in ast.unparse(item.annotation)]
        if is_dataclass(node) and len(fields) > FIELDS:
            wrong.append(f"{where} {node.name}: {len(fields)} fields")
    assert not wrong, "\n".join(wrong)


def test_signatures_are_short_and_name_what_comes_after_the_third():
    wrong = []
    for where, node in nodes((ast.FunctionDef, ast.AsyncFunctionDef)):
        positional = [argument.arg for argument in [*node.args.posonlyargs, *node.args.args] if argument.arg not in ("self", "cls")]
        total = len(positional) + len(node.args.kwonlyargs)
        limit = POSITIONAL + 1 if where.startswith("sonic/sampling/samplers.py") else POSITIONAL  # velocity, noise, sigmas, rng
        if total > ARGUMENTS or len(positional) > limit:
            wrong.append(f"{where} {node.name}: {len(positional)} positional, {total} in all")
    assert not wrong, "\n".join(wrong)


def test_nothing_prints():
    wrong = [where for where, node in nodes(ast.Call) if isinstance(node.func, ast.Name) and node.func.id == "print"]
    assert not wrong


def test_no_error_is_swallowed():
    wrong = []
    for where, node in nodes(ast.ExceptHandler):
        caught = "" if node.type is None else ast.unparse(node.type)
        silent = all(isinstance(item, ast.Pass | ast.Continue) for item in node.body)
        if not caught or (silent and caught in ("Exception", "BaseException")):
            wrong.append(where)
    assert not wrong


def test_nothing_is_left_for_later():
    wrong = [f"{name_of(path)}: {word}" for path in [*SOURCES, *TESTS] for word in LEFTOVERS if word in path.read_text()]
    assert not wrong


def test_no_path_of_one_machine():
    files = [path for room in ("sonic", "launch", "conf", "recipes", ".ci") for path in (ROOT / room).rglob("*")]
    texts = [path for path in [*files, ROOT / "README.md"] if path.is_file() and path.suffix in (".py", ".yaml", ".md", ".sh", "")]
    wrong = [f"{name_of(path)}: {word}" for path in texts for word in ONE_MACHINE if word in path.read_text()]
    assert not wrong


def test_only_the_app_reads_the_environment():
    readers = [where for where, node in nodes(ast.Attribute, LIBRARY) if node.attr in ("environ", "getenv")]
    allowed = (
        "sonic/cli.py",
        "sonic/system/caches.py",
        "sonic/parallel/deepspeed_inference.py",
    )  # the latter two write what packages read nowhere else
    assert [where for where in readers if not where.startswith(allowed)] == []


CONFIG = re.compile(r"\b\w*Config\b")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def root_of(node: ast.AST) -> str:
    """The name that an attribute or an item is reached from: config for config.video.size."""
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def is_config(value: ast.AST | None, known: set[str]) -> bool:
    """Whether a value is a config, a part of one or a changed copy, as far as names tell."""
    if isinstance(value, ast.Call):
        called = ast.unparse(value.func)
        return bool(CONFIG.fullmatch(called)) or (called.endswith("replace") and root_of(value.args[0] if value.args else value) in known)
    return isinstance(value, ast.Attribute | ast.Subscript | ast.Name) and root_of(value) in known


def config_writes(module: ast.Module) -> list[tuple[int, str]]:
    """Where a module writes to a config: to an annotated argument, to what is taken from one or made, or to self after __post_init__."""
    own = {item: node for node in ast.walk(module) if isinstance(node, ast.ClassDef) for item in node.body if isinstance(item, FUNCTIONS)}
    found = set()
    for function in (node for node in ast.walk(module) if isinstance(node, FUNCTIONS)):
        owner = own.get(function)
        itself = owner is not None and owner.name.endswith("Config") and is_dataclass(owner)
        arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        known = {each.arg for each in arguments if each.annotation is not None and CONFIG.search(ast.unparse(each.annotation))}
        known |= {"config", "cfg", *(["self"] if itself else [])}
        assigned = [node for node in ast.walk(function) if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign | ast.Delete)]
        for node in sorted(assigned, key=lambda node: node.lineno):
            targets = [node.target] if isinstance(node, ast.AugAssign | ast.AnnAssign) else node.targets
            for target in [each for one in targets for each in getattr(one, "elts", [one])]:
                text = ast.unparse(target)
                if isinstance(target, ast.Name) and is_config(getattr(node, "value", None), known):
                    known.add(target.id)
                settles = itself and function.name == "__post_init__" and re.fullmatch(r"self\.\w+", text)
                inside = root_of(target) in known or re.search(r"\.(config|cfg)[.[]", text)
                if isinstance(target, ast.Attribute | ast.Subscript) and inside and not settles:
                    found.add((node.lineno, text))
    return sorted(found)


def test_configs_are_never_changed():
    wrong = [f"{name_of(path)}:{line} {text}" for path in SOURCES for line, text in config_writes(tree(path))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("def settle(video: VideoConfig): video.fps = 25", "video.fps"),
        ("def settle(one: int, *, rollout: config.RolloutConfig | None): one, rollout.fps = 1, 2", "rollout.fps"),
        ("def settle(config): config.face.box[0] += 1", "config.face.box[0]"),
        ("class Run:\n def step(self): self.config.budget.max_steps -= 1", "self.config.budget.max_steps"),
        ("def settle(model: ModelConfig):\n ring = model.rollout\n ring.window_blocks = 1", "ring.window_blocks"),
        ("def settle(model: ModelConfig):\n copy = replace(model)\n del copy.lora.path", "copy.lora.path"),
        ("def made():\n video = VideoConfig()\n video.fps = 25", "video.fps"),
        ("@dataclass\nclass VideoConfig:\n def __post_init__(self): self.parts.fps = 1", "self.parts.fps"),
        ("@dataclass\nclass VideoConfig:\n def settle(self): self.fps = 1", "self.fps"),
        ("@dataclass\nclass VideoConfig:\n def __post_init__(self): self.fps = 1", None),
        ("class Run:\n def __init__(self, config: VideoConfig): self.config = config", None),
        ("def settle(video: VideoConfig): return replace(video, fps=25)", None),
    ],
)
def test_a_config_that_is_changed_is_seen(source, text):
    assert [found for _, found in config_writes(ast.parse(source))] == [text] * (text is not None)


def test_every_module_says_what_lives_in_it():
    silent = [name_of(path) for path in [*SOURCES, *TESTS] if path.read_text().strip() and not ast.get_docstring(tree(path))]
    assert not silent


def test_public_functions_of_the_library_say_what_they_give():
    silent = []
    for path in LIBRARY:
        for node in tree(path).body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            if public and not ast.get_docstring(node):
                silent.append(f"{name_of(path)}:{node.lineno} {node.name}")
    assert not silent, "\n".join(silent)


def test_no_two_files_share_a_name():
    names = [path.name for path in LIBRARY if path.name != "__init__.py"]
    assert sorted(names) == sorted(set(names))


def words(name: str) -> set[str]:
    """The words of an identifier, cut at underscores and capitals."""
    return {word.lower() for part in name.split("_") for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", part)}


def test_private_words_do_not_come_back():
    wrong = []
    for path in [*SOURCES, *TESTS]:
        with path.open("rb") as file:
            names = {(token.string, token.start[0]) for token in tokenize.tokenize(file.readline) if token.type == tokenize.NAME}
        out = [(name, line) for name, line in names if name not in NAMES_OF_OTHERS and (name in OUT_NAMES or words(name) & OUT_WORDS)]
        wrong += [f"{name_of(path)}:{line} {name}" for name, line in sorted(out, key=lambda each: each[1])]
        if re.search(r"(film|painted|travel|ranks_walk)", path.stem):
            wrong.append(f"{name_of(path)}: the name of the file")
    assert not wrong, "\n".join(wrong)
