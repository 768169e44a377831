"""Engines carry an objective's roles: where parameters live, how gradients become steps, what a checkpoint holds."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from sonic.train import checkpoint
from sonic.train.ema import Ema
from sonic.train.objectives import Objective
from sonic.train.optim import adamw
from sonic.train.settings import OptimConfig

EXPORTED = "student"


class Engine(Protocol):
    """What the loop asks of an engine."""

    def prepare(self, objective: Objective) -> None: ...

    def backward(self, role: str, loss: Tensor) -> None: ...

    def step(self, role: str, *, rate: float, step: int) -> Tensor: ...

    def weights(self) -> dict[str, Tensor]: ...

    def save(self, folder: Path, step: int, facts: dict) -> None: ...

    def load(self, folder: Path, resume: str = "auto") -> dict: ...


class LocalEngine:
    """One process, one device, parameters whole and in float32."""

    def __init__(self, config: OptimConfig, device: torch.device, *, channels_last: bool = False) -> None:
        self.config, self.device, self.channels_last = config, device, channels_last

    def prepare(self, objective: Objective) -> None:
        """Move the roles to the device and give each its optimizer; the student gets its running average too."""
        self.roles = dict(objective.roles)
        for module in self.roles.values():
            module.to(self.device)
            if self.channels_last:
                module.to(memory_format=torch.channels_last)
            module.train()
        self.optimizers = {role: adamw(module.parameters(), self.config) for role, module in self.roles.items()}
        self.ema = Ema(self.roles[EXPORTED], self.config.ema_decay)

    def backward(self, role: str, loss: Tensor) -> None:
        """Add the gradient of `loss`; gradients wait for `step`."""
        loss.backward()

    def step(self, role: str, *, rate: float, step: int) -> Tensor:
        """Use up the gradients of `role` at learning rate `rate`. Gives their norm; a step that is not finite is not taken."""
        parameters = [p for p in self.roles[role].parameters() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.clip_norm)
        if torch.isfinite(norm):
            for group in self.optimizers[role].param_groups:
                group["lr"] = rate
            self.optimizers[role].step()
            if role == EXPORTED:
                self.ema.update(self.roles[EXPORTED], step)
        for module in self.roles.values():
            module.zero_grad(set_to_none=True)
        return norm

    def weights(self) -> dict[str, Tensor]:
        """Averaged weights of the student, by its own names."""
        return self.ema.weights(self.roles[EXPORTED])

    def save(self, folder: Path, step: int, facts: dict) -> None:
        """Write the whole state as the checkpoint of `step`."""
        tensors = {f"average.{name}": t for name, t in self.ema.state().items()}
        for role, module in self.roles.items():
            tensors |= {f"weights.{role}.{name}": t for name, t in module.state_dict().items()}
            for name, parameter in module.named_parameters():
                moments = self.optimizers[role].state.get(parameter, {})
                tensors |= {f"moments.{role}.{name}.{key}": value for key, value in moments.items()}
        checkpoint.write(folder, step, tensors={k: t.clone() for k, t in tensors.items()}, facts=facts)

    def load(self, folder: Path, resume: str = "auto") -> dict:
        """Continue from the newest good checkpoint (`resume=auto`) or from the one at path `resume`; {} = a fresh start."""
        if resume == "never":
            return {}
        if resume == "auto":
            found = checkpoint.newest(folder)
            if found is None:
                return {}
            _, tensors, facts = found
        else:
            tensors, facts = checkpoint.read(Path(resume))
        self._put_back(tensors)
        return facts

    def _put_back(self, tensors: dict[str, Tensor]) -> None:
        self.ema.load({name: tensors[f"average.{name}"].to(self.device) for name in self.ema.averages})
        for role, module in self.roles.items():
            start = f"weights.{role}."
            module.load_state_dict({k.removeprefix(start): t for k, t in tensors.items() if k.startswith(start)})
            for name, parameter in module.named_parameters():
                start = f"moments.{role}.{name}."
                moments = {k.removeprefix(start): t for k, t in tensors.items() if k.startswith(start)}
                if moments:
                    places = {key: "cpu" if key == "step" else self.device for key in moments}
                    self.optimizers[role].state[parameter] = {key: t.to(places[key]) for key, t in moments.items()}


ENGINES = {"local": LocalEngine}
