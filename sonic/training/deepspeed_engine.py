"""Training with DeepSpeed through accelerate: ZeRO-2 shards gradients and optimizer state, ZeRO-3 the weights as well."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import functional as F

from sonic.model.adapters import AdaptedLinear
from sonic.parallel.deepspeed_inference import use_gloo
from sonic.parallel.mesh import World
from sonic.training.checkpoint import State
from sonic.training.engine import Engine, InUnits, recompute_layers, transformers, whole
from sonic.training.objectives.networks import STUDENT
from sonic.training.objectives.objective import Objective
from sonic.training.optim import adamw
from sonic.training.train_config import TrainConfig


class ZeroEngine(Engine):
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
        others = [module for module in objective.modules.values() if all(module is not role for role in self.roles.values())]
        for module in (*others, *self.roles.values()):
            if self.config.speed.recompute:
                recompute_layers(module)
        if self.config.speed.precision == "bfloat16":
            _halve_beside_slices(self.roles.values())
        self.sharded, self.accelerator = [], self._accelerator()
        for module in others:
            if self.stage == 3:
                with _without_adapters(module):  # these are left to the engines of their roles
                    self.sharded.append(self._engine(module, stage=3))
            else:
                self.to_device(module)
        self.engines = {}
        for role, module in self.roles.items():
            stage = self.stage if transformers([module]) else 2
            self.engines[role], _ = self._engine(module, adamw(module.parameters(), self.config.optim), stage=stage)
            self.sharded += [self.engines[role]] if stage == 3 else []
            module.train()
        self.optimizers = {role: engine.optimizer.optimizer for role, engine in self.engines.items()}
        for role, engine in self.engines.items():
            self._allocate_state(role, dict(enumerate(_flat_weights(engine))))
            if engine.zero_optimization_stage() < 3:  # links parameters to their slices of this state
                engine.optimizer._lazy_init_hp_params_optimizer_state()
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
        if role == STUDENT and torch.isfinite(norm):
            self.ema.update(step)
        return norm

    def _accelerator(self) -> Any:
        """Accelerate's Accelerator, with a DeepSpeed plugin for each stage."""
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from accelerate.utils import DeepSpeedPlugin

        AcceleratorState._reset_state(reset_partial_state=True)  # of an earlier training in the same process
        plugins = {str(stage): DeepSpeedPlugin(hf_ds_config=self._settings(stage)) for stage in (2, 3)}
        return Accelerator(deepspeed_plugins=plugins, mixed_precision="bf16" if self.config.speed.precision == "bfloat16" else "no")

    def _engine(self, *module: nn.Module | torch.optim.Optimizer, stage: int) -> Any:
        """The DeepSpeed engine of a module; with its optimizer, both as they were prepared."""
        self.accelerator.state.select_deepspeed_plugin(str(stage))
        return self.accelerator.prepare(*module)

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
            "gradient_clipping": self.config.optim.clip_norm,
            "zero_optimization": zero,
            "zero_force_ds_cpu_optimizer": False,
            "zero_allow_untested_optimizer": True,
            **half,
        }

    @torch.no_grad()
    def _restore(self, state: State) -> None:
        """Copy a loaded state into DeepSpeed's tensors."""
        for name, role, parameter, key in self._parts():
            if key == "step":
                for memory in self.optimizers[role].state.values():
                    memory[key].copy_(torch.maximum(memory[key], state[name]))
            else:
                _write(parameter, whole(state[name]), key)
        for engine in self.engines.values():
            _spread(engine)

    def _slice(self, role: str, parameter: nn.Parameter, key: str) -> Tensor:
        """This process's slice of a tensor, in host memory."""
        value = self._whole(role, parameter, key).detach().cpu()
        if not value.ndim:
            return value.clone()
        part = distribute_tensor(value, self.shards, [Shard(0)], src_data_rank=None)
        return part.clone()  # a view would keep the whole tensor alive

    def _whole(self, role: str, parameter: nn.Parameter, key: str) -> Tensor:
        """A parameter, or what the optimizer's state has of it under `key`, gathered in float32."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if key == "step":
            return next(iter(self.optimizers[role].state.values()))[key]
        return safe_get_full_optimizer_state(parameter, key) if key else safe_get_full_fp32_param(parameter)

    def _unsharded(self, tensor: Tensor) -> Tensor:
        """A frozen parameter or a buffer, gathered if it is sharded."""
        from deepspeed.runtime.zero import GatheredParameters

        if not hasattr(tensor, "ds_tensor"):
            return tensor
        with GatheredParameters([tensor]):
            return tensor.detach().to("cpu", copy=True)


class Zero3Engine(ZeroEngine):
    """ZeRO-3: the weights are sharded as well."""

    stage = 3

    def allocate(self, objective: Objective) -> None:
        """Allocate a transformer on the meta device module by module and keep this process's slices; adapters are not sharded."""
        from deepspeed.runtime.zero import Init

        for model in transformers(objective.modules.values()):
            if not any(weight.is_meta for weight in model.parameters()):
                continue
            with _without_adapters(model) as adapters:
                if self.config.speed.precision == "bfloat16":
                    model.bfloat16()
                for module in reversed(list(model.modules())):  # submodules first, because DeepSpeed also visits the submodules of a module
                    if list(module.parameters(recurse=False)):
                        module.to_empty(device="cpu" if self.config.speed.cpu_offload else self.world.device, recurse=False)
                        Init(module=module, config_dict_or_path=self._settings(3))
            adapters.to_empty(device="cpu")


def _check_installed(engine: str, device: torch.device) -> None:
    """Raise ValueError unless DeepSpeed is installed. Selects its CPU backend when training on the CPU of a machine with a GPU."""
    try:
        import accelerate  # noqa: F401
        from deepspeed.accelerator import set_accelerator
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
    except ImportError:
        ways = "pip install deepspeed accelerate, or choose speed.engine=fsdp"
        raise ValueError(f"speed.engine={engine} needs the packages deepspeed and accelerate: {ways}") from None
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    if device.type == "cpu":
        set_accelerator(CPU_Accelerator())
        use_gloo()


def _halve_beside_slices(modules: Iterable[nn.Module]) -> None:
    """Convert unsharded weights to bfloat16 in modules that also have sharded ones, for which DeepSpeed does not do it."""
    for module in modules:
        if any(hasattr(weight, "ds_tensor") for weight in module.parameters()):
            for weight in module.parameters():
                weight.data = weight.data.bfloat16()


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
    models = [model for model in transformers([engine.module]) if not isinstance(model, InUnits)]
    read = [weight for model in models for weight in (model.roles.weight, model.pose_embed.bias)]
    missing = [weight for weight in read if weight.ds_status == ZeroParamStatus.NOT_AVAILABLE]
    if missing:
        missing[0].all_gather(missing)


def _flat_weights(engine: Any) -> Sequence[Tensor]:
    """This process's float32 slices of the parameters that an engine trains, which are the keys of its optimizer's state."""
    zero = engine.optimizer
    return getattr(zero, "fp32_partitioned_groups_flat", None) or zero.single_partition_of_fp32_groups


def _write(parameter: nn.Parameter, value: Tensor, key: str) -> None:
    """Set a parameter, or what the optimizer's state has of it under `key`, to an unsharded value that all processes have."""
    from deepspeed import utils

    if hasattr(parameter, "ds_tensor"):  # of a value that cannot be cut into equal slices, DeepSpeed's own function fails to cut the last
        size = parameter.partition_numel()
        padded = F.pad(value.flatten(), (0, size * dist.get_world_size() - value.numel()))
        where, value = "local", padded.split(size)[dist.get_rank()]
    else:
        where = "full"
    kind, keys = ("optimizer_state", [key]) if key else ("fp32_param", [])
    getattr(utils, f"safe_set_{where}_{kind}")(parameter, value.to(parameter.device), *keys)


def _spread(engine: Any) -> None:
    """Update the low-precision weights from the float32 slices."""
    zero = engine.optimizer
    if engine.zero_optimization_stage() < 3:
        zero.update_lp_params()
        return
    engine.empty_partition_cache()
    for group in range(len(zero.fp32_partitioned_groups_flat)):
        zero._reassign_or_swap_out_partitioned_parameters(group)
