"""The transformers of a training by role: one for each role, or one shared base with adapters for each role."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from sonic.checkpoint.lora import ALPHA, peft_name
from sonic.config import AdapterConfig, ModelConfig
from sonic.model.adapters import Adapters
from sonic.model.dit import AvatarDiT

STUDENT, CRITIC, TEACHER = "student", "critic", "teacher"
Make = Callable[[ModelConfig], AvatarDiT]  # builds a transformer, perhaps on the meta device


class Networks:
    """A separate transformer for every role; the teacher's is frozen.

    `roles` are the trainable modules, by role, `modules` all modules that compute; `metadata` goes into the exported file.
    """

    def __init__(self, config: ModelConfig, learn: AdapterConfig, roles: Sequence[str], *, make: Make = AvatarDiT) -> None:
        self.modules: Mapping[str, nn.Module] = {role: make(config) for role in roles}
        self.roles: Mapping[str, nn.Module] = {role: model for role, model in self.modules.items() if role != TEACHER}
        self.metadata: Mapping[str, str] = {}
        for role, model in self.modules.items():
            for name, parameter in model.named_parameters():
                learns = not learn.targets or any(word in name.split(".") for word in learn.targets)
                parameter.requires_grad_(role != TEACHER and learns)
        if not any(p.requires_grad for p in self.modules[STUDENT].parameters()):
            raise ValueError(f"objective.learn.targets={learn.targets} names nothing of this model; use such as audio_injectors")

    @contextmanager
    def use_role(self, role: str) -> Iterator[AvatarDiT]:
        """Context that gives the role's transformer, for forward and backward passes."""
        yield self.modules[role]

    def export(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The student's weights by their names in a file: the whole transformer."""
        return dict(weights)


class SharedNetworks(Networks):
    """One frozen transformer, the teacher, with a set of adapters for every other role, so that memory holds one transformer."""

    def __init__(self, config: ModelConfig, learn: AdapterConfig, roles: Sequence[str], *, make: Make = AvatarDiT) -> None:
        self.base = make(config)
        self.adapters = Adapters(self.base, [role for role in roles if role != TEACHER], learn)
        self.roles, self.modules = self.adapters.roles, {"base": self.base}
        self.metadata = {ALPHA: str(learn.alpha)}

    @contextmanager
    def use_role(self, role: str) -> Iterator[AvatarDiT]:
        """Context that gives the base with the role's adapters active."""
        with self.adapters.use_role(None if role == TEACHER else role):
            yield self.base

    def export(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The adapters in peft's format."""
        return {peft_name(name): tensor for name, tensor in weights.items()}
