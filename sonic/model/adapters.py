"""Trainable low-rank adapters: one set per role on a single frozen model, of which one set or none is active at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from sonic.config import AdapterConfig

DOWN, UP = "lora_A", "lora_B"  # names of the two matrices of an adapter
ADAPTERS = "adapters"  # the part of a tensor's name on the model that marks it as an adapter's
SLASH = "/"  # replaces the dot, which keys of a ModuleDict may not contain


class Switch:
    """The role whose adapters are active; None = the model without adapters."""

    role: str | None = None


class LowRank(nn.Module):
    """alpha / rank · up(down(x)), zero at initialisation. Source: LoRA, arXiv 2106.09685."""

    def __init__(self, linear: nn.Linear, config: AdapterConfig) -> None:
        super().__init__()
        device = linear.weight.device
        self.scale = config.alpha / config.rank
        self.lora_A = nn.Linear(linear.in_features, config.rank, bias=False, device=device)
        self.lora_B = nn.Linear(config.rank, linear.out_features, bias=False, device=device)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=5**0.5)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[...,in] -> [...,out]"""
        return self.scale * self.lora_B(self.lora_A(x.to(self.lora_A.weight.dtype)))


class AdaptedLinear(nn.Linear):
    """A frozen linear layer plus the adapter of the active role; the layer's parameters keep their names."""

    def __init__(self, linear: nn.Linear, adapters: Mapping[str, LowRank], switch: Switch) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.frozen_forward = type(linear).forward  # of a layer that may compute in float32
        self.adapters = nn.ModuleDict(adapters)
        self.switch = switch

    def forward(self, x: Tensor) -> Tensor:
        """[...,in] -> [...,out]"""
        out = self.frozen_forward(self, x)
        role = self.switch.role
        return out if role is None else out + self.adapters[role](x).to(out.dtype)


class Adapters:
    """Adapters of several roles on `model`, which is frozen and changed in place; its parameters keep their names.

    Without `config.targets` all linear layers are adapted. Raises ValueError when no linear layer has one of them in its name.
    """

    def __init__(self, model: nn.Module, roles: Sequence[str], config: AdapterConfig) -> None:
        self.config, self.switch = config, Switch()
        chosen = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and _chosen(name, config.targets)]
        if not chosen:
            raise ValueError(f"learn.targets={config.targets} names no linear layer of this model; use such as self_attention or mlp_in")
        model.requires_grad_(False)
        sets: dict[str, dict[str, nn.Module]] = {role: {} for role in roles}
        for name in chosen:
            parent, _, last = name.rpartition(".")
            linear = model.get_submodule(name)
            for role in roles:
                sets[role][name.replace(".", SLASH)] = LowRank(linear, config)
            by_role = {role: modules[name.replace(".", SLASH)] for role, modules in sets.items()}
            setattr(model.get_submodule(parent), last, AdaptedLinear(linear, by_role, self.switch))
        self.roles: Mapping[str, nn.Module] = {role: nn.ModuleDict(modules) for role, modules in sets.items()}

    @contextmanager
    def use_role(self, role: str | None) -> Iterator[None]:
        """Activate the adapters of `role` inside the `with` block; None deactivates all of them."""
        before, self.switch.role = self.switch.role, role
        try:
            yield
        finally:
            self.switch.role = before


def _chosen(name: str, targets: Sequence[str]) -> bool:
    words = name.split(".")
    return not targets or any(target in words for target in targets)
