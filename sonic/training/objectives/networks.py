"""Who computes in a training: transformers by their roles, one each or adapters on one that they share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor, nn

from sonic.config import AdapterConfig, ModelConfig
from sonic.model.adapters import Adapters, export_adapters
from sonic.model.dit import AvatarDiT
from sonic.model.lora import ALPHA

STUDENT, CRITIC, TEACHER = "student", "critic", "teacher"
Make = Callable[[ModelConfig], AvatarDiT]  # a transformer, or one without memory whose weights come later


class Cast(Protocol):
    """Modules that learn by role, modules that compute, and the transformer that plays a role for a while."""

    roles: Mapping[str, nn.Module]
    bodies: Mapping[str, nn.Module]
    facts: Mapping[str, str]

    def play(self, role: str): ...

    def export(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]: ...


class SharedBase:
    """One frozen transformer is the teacher; every other role is a set of adapters on it, so that it is held once."""

    def __init__(self, config: ModelConfig, learn: AdapterConfig, roles: Sequence[str], *, make: Make = AvatarDiT) -> None:
        self.base = make(config)
        self.adapters = Adapters(self.base, [role for role in roles if role != TEACHER], learn)
        self.roles, self.bodies = self.adapters.roles, {"base": self.base}
        self.facts = {ALPHA: str(learn.alpha)}

    @contextmanager
    def play(self, role: str) -> Iterator[AvatarDiT]:
        """The base with the role's adapters in force, the gradients taken meanwhile included."""
        with self.adapters.play(None if role == TEACHER else role):
            yield self.base

    def export(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Adapters in peft's format."""
        return export_adapters(weights)


class OwnModels:
    """A transformer for every role; the teacher's stays as it is."""

    def __init__(self, config: ModelConfig, learn: AdapterConfig, roles: Sequence[str], *, make: Make = AvatarDiT) -> None:
        self.bodies = {role: make(config) for role in roles}
        self.roles = {role: model for role, model in self.bodies.items() if role != TEACHER}
        self.facts: Mapping[str, str] = {}
        for role, model in self.bodies.items():
            for name, parameter in model.named_parameters():
                learns = not learn.targets or any(word in name.split(".") for word in learn.targets)
                parameter.requires_grad_(role != TEACHER and learns)
        if not any(p.requires_grad for p in self.bodies[STUDENT].parameters()):
            raise ValueError(f"objective.learn.targets={learn.targets} names nothing of this model; use such as audio_injectors")

    @contextmanager
    def play(self, role: str) -> Iterator[AvatarDiT]:
        """The role's own transformer."""
        yield self.bodies[role]

    def export(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The whole transformer."""
        return dict(weights)


def cast_of(config: ModelConfig, learn: AdapterConfig, roles: Sequence[str], *, make: Make = AvatarDiT) -> Cast:
    """The cast of these roles, as `learn` says it learns."""
    return (SharedBase if learn.rank else OwnModels)(config, learn, roles, make=make)
