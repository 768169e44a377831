"""Training on several devices with torch FSDP2: transformers are sharded, other (small) modules are replicated."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from sonic.model.dit import ENTRY_POINTS
from sonic.parallel.fsdp import Sharding, free_gathered
from sonic.parallel.shard_units import TRAINING_ENDS, all_units
from sonic.training.engine import Engine, InUnits, is_sharded, transformers
from sonic.training.objectives.objective import Objective


class ShardedEngine(Engine):
    """Shards every transformer: each process keeps a slice of every unit (block, audio injector, end) and gathers it while in use.

    With speed.replicas (HSDP) only the processes of a group divide the units among themselves, and every group has all slices; gradients
    are reduced inside the groups and then averaged between them."""

    def allocate(self, objective: Objective) -> None:
        """Shard every transformer; for one on the meta device, allocate this process's slices only."""
        speed = self.config.speed
        half = speed.precision == "bfloat16"
        precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False) if half else MixedPrecisionPolicy()
        sharding = Sharding(self.world.sharding_mesh, reshard=speed.reshard, cpu_offload=speed.cpu_offload, precision=precision)
        for model in transformers(objective.modules.values()):
            if not is_sharded(next(model.parameters())):
                for parameter in model.parameters():
                    if half and not parameter.requires_grad:  # held in the precision it computes in, which halves its memory
                        parameter.data = parameter.data.to(torch.bfloat16)
                if isinstance(model, InUnits):
                    sharding.apply_to_units(model, model.units())
                else:
                    sharding.apply(model, all_units(model.config, ends=TRAINING_ENDS), ENTRY_POINTS)
            if any(parameter.is_meta for parameter in model.parameters()):
                model.to_empty(device="cpu" if speed.cpu_offload else self.world.device)

    def prepare(self, objective: Objective) -> None:
        """Shard transformers that are not sharded yet, then as Engine. Weights loaded before must be equal on all processes."""
        self.allocate(objective)
        self.transformers = transformers(objective.modules.values())
        super().prepare(objective)

    def to_device(self, module: nn.Module) -> None:
        """Move what is not sharded to the device."""
        for tensor in (*module.parameters(), *module.buffers()):
            if not is_sharded(tensor):
                tensor.data = tensor.data.to(self.world.device)

    def step(self, role: str, *, rate: float, step: int) -> torch.Tensor:
        """As Engine, after averaging the gradients and buffers of replicated modules over all processes."""
        for model in self.transformers:  # those without a backward pass still have what their forwards gathered
            free_gathered(model)
        for parameter in self.roles[role].parameters():
            if parameter.grad is not None and not is_sharded(parameter.grad):
                self.world.mean(parameter.grad)
        norm = super().step(role, rate=rate, step=step)
        for buffer in self.roles[role].buffers():
            if buffer.is_floating_point() and not is_sharded(buffer):
                self.world.mean(buffer)
        return norm
