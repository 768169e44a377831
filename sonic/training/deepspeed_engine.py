"""Training with DeepSpeed through accelerate: ZeRO-2 shards gradients and optimizer state, ZeRO-3 the weights as well."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor, zeros

from sonic.model.adapters import AdaptedLinear
from sonic.model.dit import AvatarDiT
from sonic.parallel.deepspeed_inference import use_gloo
from sonic.parallel.mesh import World
from sonic.training.checkpoint import State
from sonic.training.deepspeed_masters import (
    MOMENTS,
    gathered,
    link_moments,
    make_moments,
    masters_of,
    put_master,
    spread_masters,
    whole_master,
)
from sonic.training.ema import Ema
from sonic.training.engine import EXPORTED, LocalEngine, recompute_layers, transformers, whole
from sonic.training.objectives import Objective
from sonic.training.optim import adamw
from sonic.training.train_config import TrainConfig


class ZeroEngine(LocalEngine):
    """Wraps each role's module in a DeepSpeed engine; under ZeRO-3 frozen transformers are sharded too.

    Checkpoints have the same names and shapes as those of the other engines, so that any engine can continue from them.
    """

    stage = 2

    def __init__(self, config: TrainConfig, world: World, folder: Path) -> None:
        super().__init__(config, world, folder)
        _check_installed(config.speed.engine, world.device)

    def prepare(self, objective: Objective) -> None:
        """Give every role its DeepSpeed engine, place the other modules, and start the student's running average."""
        self.allocate(objective)
        self.roles = dict(objective.roles)
        others = {name: network for name, network in objective.modules.items() if all(network is not role for role in self.roles.values())}
        for module in {**others, **self.roles}.values():
            if self.config.speed.recompute:
                recompute_layers(module)
        stages = {role: self.stage if _transformers(module) else 2 for role, module in self.roles.items()}
        stages |= dict.fromkeys(others, 3) if self.stage == 3 else {}
        if self.config.speed.precision == "bfloat16":
            _halve_beside_slices(self.roles.values())
        accelerator = self._accelerator(stages)
        if self.stage == 3:
            shared = {name: _prepared(accelerator, name, network) for name, network in others.items()}
        else:
            shared = {}
            for network in others.values():
                self.to_device(network)
        self.engines = {
            role: _prepared(accelerator, role, module, adamw(module.parameters(), self.optim)) for role, module in self.roles.items()
        }
        self.sharded = [engine for name, engine in {**shared, **self.engines}.items() if stages[name] == 3]
        for module in self.roles.values():
            module.train()
        self.masters = nn.ParameterList(masters_of(self.engines[EXPORTED]))
        self.ema = Ema(self.masters, self.optim.ema_decay)
        self.shards = DeviceMesh.from_group(self.world.writers, "cpu")

    def to_device(self, module: nn.Module) -> None:
        """Move a module to the device, unsharded, in the precision it computes in."""
        super().to_device(module)
        if self.config.speed.precision == "bfloat16":
            module.to(torch.bfloat16)

    def precision(self) -> AbstractContextManager:
        """Context around a loss. An objective may call its transformers several times; DeepSpeed counts them as one forward pass."""
        for engine in self.sharded:
            _begin_pass(engine)
        return super().precision()

    def backward(self, role: str, loss: Tensor) -> None:
        """Accumulate the gradient of `loss`, averaged over all processes, until `step`."""
        engine = self.engines[role]
        engine.optimizer.clear_backward_seen_flag()  # an earlier part of the loss has already accumulated its gradient
        engine.backward(loss)

    def step(self, role: str, *, rate: float, step: int) -> Tensor:
        """Take an optimizer step of `role` at learning rate `rate`. Returns the gradients' norm."""
        engine = self.engines[role]
        for group in engine.optimizer.param_groups:
            group["lr"] = rate
        engine.step()
        norm = torch.as_tensor(engine.get_global_grad_norm(), dtype=torch.float32, device=self.world.device)
        if role == EXPORTED and torch.isfinite(norm):
            self.ema.update(self.masters, step)
        return norm

    def weights(self) -> dict[str, Tensor]:
        """The student's averaged weights, unsharded, by its parameter names, on the main process; {} on the others."""
        found = {}
        with self._averages_in_force():
            for name, value in self._named_values(EXPORTED):
                if self.world.main:
                    found[name] = value.detach().to("cpu", copy=True)
        return found

    def load(self) -> dict:
        """As LocalEngine.load; then copies the loaded state into DeepSpeed's tensors."""
        self.read: State = {}
        metadata = super().load()
        if self.read:
            self._take(self.read)
        self.read = {}
        return metadata

    def _accelerator(self, stages: dict[str, int]) -> Any:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from accelerate.utils import DeepSpeedPlugin

        AcceleratorState._reset_state(reset_partial_state=True)  # of an earlier training in the same process
        plugins = {name: DeepSpeedPlugin(hf_ds_config=deepcopy(self._settings(stage))) for name, stage in stages.items()}
        return Accelerator(deepspeed_plugins=plugins, mixed_precision="bf16" if self.config.speed.precision == "bfloat16" else "no")

    def _settings(self, stage: int) -> dict:
        """DeepSpeed's config. The training loop decides when to step and scales the losses, so no accumulation is set here."""
        speed, away = self.config.speed, {"device": "cpu", "pin_memory": self.world.device.type == "cuda"}
        zero: dict[str, Any] = {
            "stage": stage,
            "stage3_param_persistence_threshold": 3 * self.config.model.trunk.hidden_dim,  # see _begin_pass
            "memory_efficient_linear": False,  # it would replace torch's F.linear in the whole process
        }
        if speed.cpu_offload:
            zero |= {"offload_optimizer": away} | ({"offload_param": away} if stage == 3 else {})
        half = {"bf16": {"enabled": True}, "communication_data_type": "fp32"} if speed.precision == "bfloat16" else {}
        return {
            "train_micro_batch_size_per_gpu": self.config.budget.batch_size,
            "gradient_accumulation_steps": 1,
            "managed_gradient_accumulation": False,
            "gradient_clipping": self.optim.clip_norm,
            "zero_optimization": zero,
            "zero_force_ds_cpu_optimizer": False,
            **half,
        }

    @contextmanager
    def _averages_in_force(self) -> Iterator[None]:
        """Context in which the student's weights are swapped with their averages."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, live in self.masters.named_parameters():
            kept = live.detach().clone()
            live.copy_(self.ema.averages[name])
            self.ema.averages[name].copy_(kept)

    def _named_values(self, role: str, *, frozen: bool = True) -> Iterator[tuple[str, Tensor]]:
        """All of a role's state in float32, one unsharded tensor at a time. Collective: every process must call it."""
        module = self.roles[role]
        parameters = dict(module.named_parameters())
        for name, parameter in parameters.items():
            if parameter.requires_grad:
                yield name, whole_master(parameter)
            elif frozen:
                with gathered(parameter):
                    yield name, parameter.detach()
        yield from ((name, value) for name, value in module.state_dict().items() if name not in parameters)

    def _state(self) -> State:
        """The state for a checkpoint: this process's slice of each tensor, in host memory; one tensor is gathered at a time."""
        tensors: State = {}
        with self._averages_in_force():
            averages = self._named_values(EXPORTED, frozen=False)
            tensors |= {f"average.{name}": self._slice(value) for name, value in averages if name in self._learning(EXPORTED)}
        for role in self.roles:
            tensors |= {f"weights.{role}.{name}": self._slice(value) for name, value in self._named_values(role, frozen=False)}
            steps = [memory["step"] for memory in self.engines[role].optimizer.optimizer.state.values() if "step" in memory]
            if not steps:
                continue
            link_moments(self.engines[role])
            for name, parameter in self._learning(role).items():
                start = f"moments.{role}.{name}."
                tensors[f"{start}step"] = steps[0].detach().cpu().clone()
                tensors |= {f"{start}{key}": self._slice(whole_master(parameter, key)) for key in MOMENTS}
        return tensors

    def _to_fill(self, names: set[str]) -> State:
        """Tensors to load a checkpoint into: all of the state, and the optimizer moments that the checkpoint has."""
        for role, module in self.roles.items():
            shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in self._learning(role).items()}
            parameters = {name for name, _ in module.named_parameters()}
            kept = {name: value.detach().cpu().clone() for name, value in module.state_dict().items() if name not in parameters}
            self.read |= {f"weights.{role}.{name}": value for name, value in kept.items()}
            for name, shape in shapes.items():
                start = f"moments.{role}.{name}."
                wanted = [f"weights.{role}.{name}", *(f"{start}{key}" for key in MOMENTS if f"{start}{key}" in names)]
                wanted += [f"average.{name}"] if role == EXPORTED else []
                self.read |= {key: zeros(shape, device_mesh=self.shards, placements=[Shard(0)]) for key in wanted}
                self.read |= {f"{start}step": torch.zeros(())} if f"{start}step" in names else {}
        return self.read

    @torch.no_grad()
    def _take(self, read: State) -> None:
        """Copy the loaded state into DeepSpeed's tensors. The averages come first, because they are written through the weights."""
        for name, parameter in self._learning(EXPORTED).items():
            put_master(parameter, whole(read[f"average.{name}"]))
        self.ema = Ema(self.masters, self.optim.ema_decay)
        for role, module in self.roles.items():
            engine, learning = self.engines[role], self._learning(role)
            for name, value in module.state_dict().items():
                if f"weights.{role}.{name}" in read and name not in learning:
                    value.copy_(read[f"weights.{role}.{name}"])
            steps = [read[key] for key in (f"moments.{role}.{name}.step" for name in learning) if key in read]
            if steps:
                make_moments(engine, steps[0])
            for name, parameter in learning.items():
                put_master(parameter, whole(read[f"weights.{role}.{name}"]))
                for key in MOMENTS:
                    if (found := read.get(f"moments.{role}.{name}.{key}")) is not None:
                        put_master(parameter, whole(found), key)
            spread_masters(engine)

    def _learning(self, role: str) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.roles[role].named_parameters() if p.requires_grad}

    def _slice(self, value: Tensor) -> Tensor:
        """This process's slice of a tensor that is complete on all processes."""
        if not value.ndim:
            return value.detach().cpu().clone()
        part = distribute_tensor(value.detach().cpu(), self.shards, [Shard(0)], src_data_rank=None)
        return part.clone()  # a view would keep the whole tensor alive


class Zero3Engine(ZeroEngine):
    """ZeRO-3: the weights are sharded as well."""

    stage = 3

    def allocate(self, objective: Objective) -> None:
        """Allocate a transformer on the meta device module by module and keep this process's slices; adapters are not sharded."""
        for model in transformers(objective):
            if not any(weight.is_meta for weight in model.parameters()):
                continue
            with _without_adapters(model) as adapters:
                if self.config.speed.precision == "bfloat16":
                    model.bfloat16()
                for module in reversed(list(model.modules())):  # submodules first, because DeepSpeed also visits the submodules of a module
                    self._slice_up(module)
            adapters.to_empty(device="cpu")

    def _slice_up(self, module: nn.Module) -> None:
        from deepspeed.runtime.zero import Init

        if list(module.parameters(recurse=False)):
            module.to_empty(device="cpu" if self.config.speed.cpu_offload else self.world.device, recurse=False)
            Init(module=module, config_dict_or_path=self._settings(3))


def _check_installed(engine: str, device: torch.device) -> None:
    """Raise ValueError unless DeepSpeed is installed. Selects its CPU backend when training on the CPU of a machine with a GPU."""
    try:
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
        from deepspeed.accelerator.real_accelerator import set_accelerator
    except ImportError:
        raise ValueError(f"speed.engine={engine} needs the package deepspeed: pip install deepspeed; fsdp needs nothing") from None
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    if device.type == "cpu":
        set_accelerator(CPU_Accelerator())
        use_gloo()


def _transformers(module: nn.Module) -> list[AvatarDiT]:
    return [part for part in module.modules() if isinstance(part, AvatarDiT)]


def _halve_beside_slices(modules: Iterable[nn.Module]) -> None:
    """Convert unsharded weights to bfloat16 in modules that also have sharded ones, for which DeepSpeed does not do it."""
    for module in modules:
        if any(hasattr(weight, "ds_tensor") for weight in module.parameters()):
            for weight in module.parameters():
                weight.data = weight.data.bfloat16()


def _prepared(accelerator: Any, name: str, module: nn.Module, *optimizer: torch.optim.Optimizer) -> Any:
    """Wrap a module in a DeepSpeed engine. Adapters on a frozen transformer are left to the engines of their roles."""
    accelerator.state.select_deepspeed_plugin(name)
    if optimizer:
        engine, _ = accelerator.prepare(module, *optimizer)
        return engine
    with _without_adapters(module):
        return accelerator.prepare(module)


@contextmanager
def _without_adapters(module: nn.Module) -> Iterator[nn.ModuleList]:
    """Context that detaches the adapters from a module; yields them."""
    adapted = [part for part in module.modules() if isinstance(part, AdaptedLinear)]
    temporary = [part._modules.pop("adapters") for part in adapted]
    try:
        yield nn.ModuleList(temporary)
    finally:
        for part, adapters in zip(adapted, temporary, strict=True):
            part.adapters = adapters


def _begin_pass(engine: Any) -> None:
    """Tell DeepSpeed that a forward pass starts, and gather the parameters that the transformer reads without calling their module."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    getattr(engine.optimizer, "parameter_offload", engine.optimizer).get_param_coordinator().reset_step()
    read = [weight for model in _transformers(engine.module) for weight in (model.roles.weight, model.pose_embed.bias)]
    missing = [weight for weight in read if weight.ds_status == ZeroParamStatus.NOT_AVAILABLE]
    if missing:
        missing[0].all_gather(missing)
