"""A recorded case of Sonic's published code: one folder of numbers, and the tolerance within which they must be met."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close


@dataclass(frozen=True)
class SonicCase:
    """One folder of recorded numbers; tensors whose names begin with `debug.` are in the open set only."""

    folder: Path
    config: dict[str, Any]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]

    @classmethod
    def read(cls, folder: Path) -> SonicCase:
        config = json.loads((folder / "config.json").read_text())
        inputs, outputs = (load_file(folder / config["files"][name]) if name in config["files"] else {} for name in ("inputs", "outputs"))
        return cls(folder, config, inputs, outputs)

    @property
    def call(self) -> dict[str, Any]:
        """The arguments of the recorded call."""
        return self.config.get("call", {})

    @property
    def sizes(self) -> dict[str, Any]:
        """The config of the case's networks."""
        return self.config["config"]

    def weights(self, network: str = "") -> dict[str, Tensor]:
        """The weights of the case's network, widened to float32; of a case of several networks, those of one."""
        named = self.config["weights"]
        return {name: tensor.float() for name, tensor in load_file(self.folder / (named[network] if network else named)).items()}

    def close(self, found: Tensor, expected: Tensor, *, strict: bool = True) -> None:
        """Assert closeness within the recorded tolerance and, unless told otherwise, the strict one of a faithful port."""
        tolerance = self.config["tolerance"]
        for name in ("atol", "strict_atol")[: 1 + strict]:
            assert_close(found, expected, atol=tolerance.get(name, tolerance["atol"]), rtol=tolerance["rtol"])

    def close_at_every_step(self, found: Sequence[Tensor], expected: Tensor) -> None:
        """Assert closeness of the latents before each step, each within its own tolerance."""
        tolerance = self.config["tolerance"]
        limits = tolerance["per_step_atol"]
        assert len(found) == len(expected) == len(limits)
        for latents, wanted, limit in zip(found, expected, limits, strict=True):
            assert_close(latents, wanted, atol=limit, rtol=tolerance["rtol"])
