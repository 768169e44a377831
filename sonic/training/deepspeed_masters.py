"""Access to DeepSpeed's float32 master weights and optimizer moments, by parameter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")


def masters_of(engine: Any) -> Sequence[Tensor]:
    """This process's float32 slices of the parameters that an engine trains."""
    zero = engine.optimizer
    return getattr(zero, "fp32_partitioned_groups_flat", None) or zero.single_partition_of_fp32_groups


def whole_master(parameter: nn.Parameter, key: str = "") -> Tensor:
    """A parameter, or its optimizer moment `key`, gathered in float32."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    return safe_get_full_optimizer_state(parameter, key) if key else safe_get_full_fp32_param(parameter)


def put_master(parameter: nn.Parameter, value: Tensor, key: str = "") -> None:
    """Set a parameter, or its optimizer moment `key`, to an unsharded value that all processes have."""
    from deepspeed import utils

    if hasattr(parameter, "ds_tensor"):
        size = parameter.partition_numel()
        padded = torch.zeros(size * dist.get_world_size(), dtype=torch.float32)
        padded[: value.numel()] = value.flatten()
        part = padded[size * dist.get_rank() :][:size].to(parameter.device)
        arguments = (parameter, part, key) if key else (parameter, part)
        (utils.safe_set_local_optimizer_state if key else utils.safe_set_local_fp32_param)(*arguments)
    else:
        arguments = (parameter, value.to(parameter.device), *([key] if key else []))
        (utils.safe_set_full_optimizer_state if key else utils.safe_set_full_fp32_param)(*arguments)


@torch.no_grad()
def make_moments(engine: Any, step: Tensor) -> None:
    """Allocate the optimizer moments, which DeepSpeed itself allocates only in the first step."""
    zero = engine.optimizer
    for flat in masters_of(engine):
        zero.optimizer.state[flat] = {"step": step.clone(), **{key: torch.zeros_like(flat) for key in MOMENTS}}
    link_moments(engine)


def link_moments(engine: Any) -> None:
    """Link parameters to their slices of the optimizer moments; DeepSpeed itself does so for the first group only."""
    if engine.zero_optimization_stage() < 3:
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def spread_masters(engine: Any) -> None:
    """Update the low-precision weights from the float32 slices."""
    zero = engine.optimizer
    if engine.zero_optimization_stage() < 3:
        zero.update_lp_params()
        return
    engine.empty_partition_cache()
    for group in range(len(zero.fp32_partitioned_groups_flat)):
        zero._reassign_or_swap_out_partitioned_parameters(group)


@contextmanager
def gathered(parameter: nn.Parameter) -> Iterator[None]:
    """Context in which a parameter is gathered, if it is sharded."""
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([parameter], enabled=hasattr(parameter, "ds_tensor")):
        yield
