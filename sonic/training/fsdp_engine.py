"""Training on several devices with torch FSDP2: transformers are sharded, other (small) modules are replicated."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard, register_fsdp_forward_method

from sonic.model.dit import TRAINING_ENTRY_POINTS, AvatarDiT
from sonic.training.engine import LocalEngine, is_sharded, transformers
from sonic.training.objectives import Objective

ENDS = ("frame_pack", "time_embed", "text_embed")  # units of their own, so that the root keeps little


class ShardedEngine(LocalEngine):
    """Shards every transformer: each process keeps a slice of every unit (block, audio injector, end) and gathers it while in use."""

    def allocate(self, objective: Objective) -> None:
        """Shard every transformer; of one on the meta device only this process's slices are allocated."""
        self.mesh = init_device_mesh(self.world.device.type, (self.world.ranks,))
        for model in transformers(objective):
            if not is_sharded(next(model.parameters())):
                self._shard(model)
            if any(parameter.is_meta for parameter in model.parameters()):
                model.to_empty(device="cpu" if self.config.speed.cpu_offload else self.world.device)

    def prepare(self, objective: Objective) -> None:
        """Shard transformers that are not sharded yet, then as LocalEngine. Weights loaded before must be equal on all processes."""
        self.allocate(objective)
        super().prepare(objective)

    def to_device(self, module: nn.Module) -> None:
        """Move what is not sharded to the device."""
        for part in module.modules():
            for name, tensor in part.named_parameters(recurse=False):
                if not is_sharded(tensor):
                    part._parameters[name] = nn.Parameter(tensor.detach().to(self.world.device), tensor.requires_grad)
            for name, buffer in part.named_buffers(recurse=False):
                part._buffers[name] = buffer.to(self.world.device)

    def step(self, role: str, *, rate: float, step: int) -> torch.Tensor:
        """As LocalEngine, after averaging the gradients and buffers of replicated modules over all processes."""
        for parameter in self.roles[role].parameters():
            if parameter.grad is not None and not is_sharded(parameter.grad):
                self.world.mean(parameter.grad)
        norm = super().step(role, rate=rate, step=step)
        for buffer in self.roles[role].buffers():
            if buffer.is_floating_point() and not is_sharded(buffer):
                self.world.mean(buffer)
        return norm

    def _shard(self, model: AvatarDiT) -> None:
        """Shard a transformer with its adapters. Parameter names do not change."""
        speed = self.config.speed
        half = speed.precision == "bfloat16"
        if half:
            halve_frozen(model)
        policy = MixedPrecisionPolicy(torch.bfloat16 if half else None, torch.float32 if half else None, cast_forward_inputs=False)
        offload = CPUOffloadPolicy(pin_memory=self.world.device.type == "cuda") if speed.cpu_offload else OffloadPolicy()
        settings = {"mesh": self.mesh, "mp_policy": policy, "offload_policy": offload}
        units = [getattr(model, name) for name in ENDS] + [*model.blocks, *model.audio_injectors]
        for unit in units:
            if unit is not None:
                fully_shard(unit, **settings)
        fully_shard(model, **settings, reshard_after_forward=False)
        for name in TRAINING_ENTRY_POINTS:
            register_fsdp_forward_method(model, name)


def halve_frozen(model: nn.Module) -> None:
    """Convert frozen parameters to bfloat16, the precision they compute in, which halves their memory."""
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
