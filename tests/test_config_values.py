"""Configs are values: after they were composed nothing writes to them, read from the source with `ast`."""

from __future__ import annotations

import ast
import re

import pytest
from test_house_rules import SOURCES, is_dataclass, name_of, tree

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
