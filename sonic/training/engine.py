"""Engines place an objective's modules on devices, take its optimizer steps, and save and load its checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Protocol, runtime_checkable

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
from sonic.training.objectives.networks import STUDENT
from sonic.training.objectives.objective import Objective
from sonic.training.optim import MOMENTS, Ema, adam_state, adamw, local_part
from sonic.training.train_config import TrainConfig

AVERAGE = "average"  # the running average of a parameter in the state of its optimizer


@runtime_checkable
class InUnits(Protocol):
    """A network other than the transformer whose weights are sharded, and its activations computed again, in units."""

    def units(self) -> Sequence[nn.Module]:
        """The modules that a forward calls one after the other."""


class Engine:
    """Training in one process on one device, with unsharded float32 parameters; the base of the other engines."""

    def __init__(self, config: TrainConfig, world: World, folder: Path) -> None:
        self.config, self.world = config, world
        self.checkpoints = Checkpoints(folder / "checkpoints", keep=config.checkpoint.keep, world=world)

    def allocate(self, objective: Objective) -> None:
        """Allocate memory for transformers on the meta device, before their weights are loaded."""
        for model in transformers(objective.modules.values()):
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
        self.optimizers = {role: adamw(module.parameters(), self.config.optim) for role, module in self.roles.items()}
        for role, module in self.roles.items():
            self._allocate_state(role, trainable(module))

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
        """Take an optimizer step of `role` at learning rate `rate`. Returns the norm of the gradients, which nothing here waits for:
        the caller must end the training, without saving it, when the norm is not finite."""
        norm = clip([p.grad for p in self.roles[role].parameters() if p.grad is not None], self.config.optim.clip_norm)
        for group in self.optimizers[role].param_groups:
            group["lr"] = rate
        self.optimizers[role].step()
        if role == STUDENT:
            self.ema.update(step)
        for module in self.roles.values():
            module.zero_grad(set_to_none=True)
        return norm

    def weights(self, exports: Callable[[str], bool] = bool) -> dict[str, Tensor]:
        """The student's averaged weights that have a name which `exports` accepts, unsharded, by their parameter names, in host memory of
        the main process; {} on the others."""
        found, module = {}, self.roles[STUDENT]
        parameters, learning = dict(module.named_parameters()), trainable(module)
        for name, value in module.state_dict().items():  # one at a time, because all of them together may not fit
            if not exports(name):
                continue
            value = self._whole(STUDENT, learning[name], AVERAGE) if name in learning else self._unsharded(parameters.get(name, value))
            if self.world.main:
                found[name] = value.detach().to("cpu", copy=True)
        return found

    def save(self, step: int, metadata: dict) -> None:
        """Save the state as the checkpoint of `step`, written in the background."""
        self.checkpoints.save(step, self._state(), metadata)

    def load(self) -> dict:
        """Load the checkpoint that checkpoint.resume selects. Returns its metadata; {} = the training starts from the beginning."""
        return self.checkpoints.load(self.config.checkpoint.resume, self._state, self._restore)

    def _allocate_state(self, role: str, parameters: Mapping[str, Tensor]) -> None:
        """Allocate a role's optimizer moments and the student's averages, so that a checkpoint can be loaded into them."""
        state = self.optimizers[role].state
        state |= {parameter: adam_state(parameter) for parameter in parameters.values()}
        if role == STUDENT:
            self.ema = Ema(parameters, self.config.optim.ema_decay)
            for name, average in self.ema.averages.items():
                state[parameters[name]][AVERAGE] = average

    def _parts(self) -> Iterator[tuple[str, str, nn.Parameter, str]]:
        """What a checkpoint has of each trainable parameter: name there, role, parameter, key in the optimizer's state ("" = weight)."""
        for role, module in self.roles.items():
            for name, parameter in trainable(module).items():
                yield f"weights.{role}.{name}", role, parameter, ""
                for key in ("step", *MOMENTS):
                    yield f"moments.{role}.{name}.{key}", role, parameter, key
                if role == STUDENT:
                    yield f"average.{name}", role, parameter, AVERAGE

    def _state(self) -> State:
        """The tensors of a checkpoint. Frozen weights are not among them: they come from the weights file."""
        tensors = {name: self._slice(role, parameter, key) for name, role, parameter, key in self._parts()}
        for role, module in self.roles.items():
            parameters = dict(module.named_parameters())
            tensors |= {f"weights.{role}.{name}": buffer for name, buffer in module.state_dict().items() if name not in parameters}
        return tensors

    def _restore(self, state: State) -> None:
        """Use a loaded state. Here its tensors are the very ones that train."""

    def _slice(self, role: str, parameter: nn.Parameter, key: str) -> Tensor:
        """This process's part of a parameter, or of what the optimizer's state has of it under `key`."""
        return self.optimizers[role].state[parameter][key] if key else parameter.detach()

    def _whole(self, role: str, parameter: nn.Parameter, key: str) -> Tensor:
        """The same, unsharded. Collective: every process must call it."""
        return whole(self._slice(role, parameter, key))

    def _unsharded(self, tensor: Tensor) -> Tensor:
        """A frozen parameter or a buffer, unsharded. Collective."""
        return whole(tensor)


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that learn, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def transformers(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Every transformer, and every other network in units, among these modules and their parts, once."""
    return list(dict.fromkeys(part for module in modules for part in module.modules() if isinstance(part, AvatarDiT | InUnits)))


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process has only a part of the tensor."""
    return isinstance(tensor, DTensor)


def clip(gradients: list[Tensor], most: float) -> Tensor:
    """Scale gradients, sharded or not, to a total norm of at most `most`. Returns the norm before."""
    kinds = [kind for kind in ([g for g in gradients if is_sharded(g) == sharded] for sharded in (True, False)) if kind]
    norms = [whole(torch.nn.utils.get_total_norm(kind)) for kind in kinds]
    norm = torch.stack([each.to(norms[0].device) for each in norms]).norm()  # shards may be in host memory, unsharded ones are not
    shrink = (most / (norm + 1e-6)).clamp(max=1.0)
    for kind in kinds:
        torch._foreach_mul_([local_part(gradient) for gradient in kind], shrink.to(kind[0].device))
    return norm


def recompute_layers(module: nn.Module) -> None:
    """Checkpoint activations: recompute blocks, audio injectors and units in the backward pass. Parameter names do not change."""
    units = [unit for part in module.modules() if isinstance(part, InUnits) for unit in part.units()]
    for layer in (*units, *(part for part in module.modules() if isinstance(part, Block | AudioInjector))):
        if checkpoint_activations.state(layer) is None:
            checkpoint_activations(layer)


def whole(tensor: Tensor) -> Tensor:
    """Gather a tensor that may be sharded. Collective: every process must call it."""
    heartbeat()
    return tensor.full_tensor() if is_sharded(tensor) else tensor
