"""Engines place an objective's modules on devices, take its optimizer steps, and save and load its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed._composable.checkpoint_activation import checkpoint as checkpoint_activations
from torch.distributed.tensor import DTensor

from sonic.model.audio_tokens import AudioInjector
from sonic.model.blocks import Block
from sonic.model.dit import AvatarDiT
from sonic.parallel.mesh import World
from sonic.system.heartbeat import heartbeat
from sonic.training.checkpoint import Checkpoints, State
from sonic.training.ema import Ema
from sonic.training.objectives import Objective
from sonic.training.optim import adamw
from sonic.training.train_config import OptimConfig, TrainConfig

EXPORTED = "student"


class Engine(Protocol):
    """The interface of an engine to the training loop."""

    world: World

    def allocate(self, objective: Objective) -> None: ...

    def prepare(self, objective: Objective) -> None: ...

    def precision(self) -> AbstractContextManager: ...

    def backward(self, role: str, loss: Tensor) -> None: ...

    def step(self, role: str, *, rate: float, step: int) -> Tensor: ...

    def weights(self) -> dict[str, Tensor]: ...

    def save(self, step: int, metadata: dict) -> None: ...

    def load(self) -> dict: ...

    def settle(self) -> None: ...


class LocalEngine:
    """Training in one process on one device, with unsharded float32 parameters."""

    def __init__(self, config: TrainConfig, world: World, folder: Path) -> None:
        self.config, self.world = config, world
        if world.ranks > 1 and type(self) is LocalEngine:
            raise ValueError(f"speed.engine=local trains in one process, but {world.ranks} were started; use speed.engine=fsdp")
        self.checkpoints = Checkpoints(folder / "checkpoints", keep=config.checkpoint.keep, world=world)

    @property
    def optim(self) -> OptimConfig:
        """The optimizer's options."""
        return self.config.optim

    def allocate(self, objective: Objective) -> None:
        """Allocate memory for transformers on the meta device, before their weights are loaded."""
        for model in transformers(objective):
            if any(parameter.is_meta for parameter in model.parameters()):
                model.to_empty(device="cpu")

    def prepare(self, objective: Objective) -> None:
        """Move all modules to the device; make an optimizer for each role, and the student's running average."""
        self.roles: Mapping[str, nn.Module] = dict(objective.roles)
        for module in {**objective.modules, **self.roles}.values():
            self.to_device(module)
            if self.config.speed.recompute:
                recompute_layers(module)
        for module in self.roles.values():
            module.train()
        self.optimizers = {role: adamw(module.parameters(), self.optim) for role, module in self.roles.items()}
        self.ema = Ema(self.roles[EXPORTED], self.optim.ema_decay)

    def to_device(self, module: nn.Module) -> None:
        """Move a module to the device, unsharded."""
        module.to(self.world.device)
        if self.config.speed.channels_last:
            module.to(memory_format=torch.channels_last)

    def precision(self) -> AbstractContextManager:
        """Context around a loss: autocast when speed.precision is bfloat16."""
        half = self.config.speed.precision == "bfloat16"
        return torch.autocast(self.world.device.type, torch.bfloat16) if half else nullcontext()

    def backward(self, role: str, loss: Tensor) -> None:
        """Accumulate the gradient of `loss` until `step`."""
        loss.backward()

    def step(self, role: str, *, rate: float, step: int) -> Tensor:
        """Take an optimizer step of `role` at learning rate `rate`, unless the gradients are not finite. Returns their norm."""
        norm = clip([p.grad for p in self.roles[role].parameters() if p.grad is not None], self.optim.clip_norm)
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
        """The student's averaged weights, unsharded, by its parameter names, in host memory of the main process; {} on the others."""
        found = {}
        for name, tensor in self.ema.weights(self.roles[EXPORTED]).items():
            gathered = whole(tensor)  # one at a time, because all of them together may not fit
            if self.world.main:
                found[name] = gathered.cpu()
        return found

    def save(self, step: int, metadata: dict) -> None:
        """Save the state as the checkpoint of `step`, written in the background."""
        self.checkpoints.save(step, self._state(), metadata)

    def settle(self) -> None:
        """Wait until the checkpoint that is being saved is written."""
        self.checkpoints.settle()

    def load(self) -> dict:
        """Load the newest valid checkpoint (checkpoint.resume=auto), or the named one and rename those that are newer. Returns its
        metadata; {} = the training starts from the beginning."""
        resume = self.config.checkpoint.resume
        if resume == "auto":
            return self.checkpoints.load(self._to_fill)
        metadata = {} if resume == "never" else self.checkpoints.read(Path(resume), self._to_fill)
        self.checkpoints.leave_behind(int(metadata.get("step", 0)))
        return metadata

    def _state(self) -> State:
        """Trainable weights, their averages and optimizer moments. Frozen weights are not saved: they come from the weights file."""
        tensors = {f"average.{name}": average for name, average in self.ema.averages.items()}
        for role, module in self.roles.items():
            frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
            tensors |= {f"weights.{role}.{name}": t.detach() for name, t in module.state_dict().items() if name not in frozen}
            for name, parameter in module.named_parameters():
                adam_moments = self.optimizers[role].state.get(parameter, {})
                tensors |= {f"moments.{role}.{name}.{key}": value for key, value in adam_moments.items()}
        return tensors

    def _to_fill(self, names: set[str]) -> State:
        """Tensors to load a checkpoint into: the state, and the optimizer moments that the checkpoint has."""
        for role, module in self.roles.items():
            for name, parameter in module.named_parameters():
                start, memory = f"moments.{role}.{name}.", self.optimizers[role].state
                for key in sorted(found.removeprefix(start) for found in names if found.startswith(start)):
                    empty = torch.zeros((), dtype=torch.float32) if key == "step" else torch.zeros_like(parameter)
                    memory[parameter].setdefault(key, empty)
        return self._state()


def transformers(objective: Objective) -> list[AvatarDiT]:
    """Every transformer among the objective's modules, once."""
    found = (module for network in {**objective.modules, **objective.roles}.values() for module in network.modules())
    return list(dict.fromkeys(module for module in found if isinstance(module, AvatarDiT)))


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process has only a part of the tensor."""
    return isinstance(tensor, DTensor)


def clip(gradients: list[Tensor], most: float) -> Tensor:
    """Scale gradients, sharded or not, to a total norm of at most `most`. Returns the norm before."""
    kinds = [kind for kind in ([g for g in gradients if is_sharded(g) == sharded] for sharded in (True, False)) if kind]
    norms = [whole(torch.nn.utils.get_total_norm(kind)) for kind in kinds]
    norm = torch.stack([each.to(norms[0].device) for each in norms]).norm()  # shards may be in host memory, unsharded ones are not
    shrink = float((most / (norm + 1e-6)).clamp(max=1.0))
    for kind in kinds:
        torch._foreach_mul_(kind, shrink)
    return norm


def recompute_layers(module: nn.Module) -> None:
    """Checkpoint activations: recompute blocks and audio injectors in the backward pass. Parameter names do not change."""
    for layer in module.modules():
        if isinstance(layer, Block | AudioInjector) and checkpoint_activations.state(layer) is None:
            checkpoint_activations(layer)


def whole(tensor: Tensor) -> Tensor:
    """Gather a tensor that may be sharded. Collective: every process must call it."""
    heartbeat()
    return tensor.full_tensor() if is_sharded(tensor) else tensor
