"""A recorded case: one folder of numbers produced by the published code, and the model it describes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from sonic.checkpoint.tensor_files import read, survey
from sonic.checkpoint.weights import load_weights
from sonic.config import AudioConfig, ModelConfig, MotionConfig, RolloutConfig, TextConfig, TrunkConfig
from sonic.model import dit, kv_cache
from sonic.model.dit import AvatarDiT
from sonic.model.embed import rotation
from sonic.types import Conditions


@dataclass(frozen=True)
class Case:
    """One folder of recorded numbers."""

    folder: Path
    manifest: dict
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]

    @classmethod
    def read(cls, folder: Path) -> Case:
        manifest = json.loads((folder / "manifest.json").read_text())
        inputs, outputs = (_tensors(folder, manifest, name) for name in ("inputs", "outputs"))
        return cls(folder, manifest, inputs, outputs)

    @property
    def call(self) -> dict:
        return self.manifest["call"]

    def config(self, part: str) -> dict:
        """The config of a network of the case; a case of several networks has one for each."""
        return self.manifest["config"].get(part, self.manifest["config"])

    def weights(self, index: int) -> Path:
        """The weights file of a case; a case of several networks has several."""
        named = self.manifest["weights"]
        return self.folder / (named if isinstance(named, str) else named[index])

    def close(self, found: Tensor, expected: Tensor, *, strict: bool = True, slack: float = 0.0) -> None:
        """Assert closeness within the recorded tolerance (plus `slack`), or the strict one where the reference is exact."""
        tolerance = self.manifest["tolerance"]
        assert_close(found, expected, atol=tolerance["atol"] + slack, rtol=tolerance["rtol"])
        if strict and "strict_atol" in tolerance:
            assert_close(found, expected, atol=tolerance["strict_atol"], rtol=tolerance["rtol"])


def _tensors(folder: Path, manifest: dict, name: str) -> dict[str, Tensor]:
    return load_file(folder / manifest["files"][name]) if name in manifest["files"] else {}


def tensors_of(path: Path) -> dict[str, Tensor]:
    """The tensors of a published file."""
    return {stored.name: tensor for stored, tensor in read(survey(path).values())}


def model_of(case: Case, *, window_blocks: int = 1) -> AvatarDiT:
    """The model a manifest describes, with its weights."""
    given, call, weights = case.config("s2v"), case.manifest.get("call", {}), case.weights(0)
    layers = load_file(weights)["casual_audio_encoder.weights"].shape[1]
    trunk = TrunkConfig(
        hidden_dim=given["dim"],
        ffn_dim=given["ffn_dim"],
        num_heads=given["num_heads"],
        num_layers=given["num_layers"],
        patch_size=given["patch_size"],
        latent_channels=given["in_dim"],
        freq_dim=given["freq_dim"],
        eps=given["eps"],
    )
    config = ModelConfig(
        name="golden",
        trunk=trunk,
        audio=AudioConfig(given["audio_dim"], layers, given["num_audio_token"], given["audio_inject_layers"]),
        text=TextConfig(given["text_dim"], given["text_len"]),
        motion=MotionConfig(add_last_motion=int(call.get("add_last_motion", 2)), motion_frames=call.get("motion_frames", [73, 19])),
        rollout=RolloutConfig(block_frames=call.get("frames_per_block", 3), window_blocks=window_blocks),
        resolution=0,
    )
    model = AvatarDiT(config).eval()
    load_weights(model, weights)
    return model


def conditions_of(case: Case, *, audio: Tensor | None = None, motion: Tensor | None = None) -> Conditions:
    """The conditions of a case; prompts of different lengths are filled up with zero rows."""
    rows = [case.inputs[name] for name in sorted(case.inputs) if name.startswith("context_")]
    longest = max(len(prompt) for prompt in rows)
    text = torch.stack([F.pad(prompt, (0, 0, 0, longest - len(prompt))) for prompt in rows])
    return Conditions(ref=case.inputs["ref_latents"], text=text, audio=audio, motion=motion, pose=case.inputs["cond_states"])


@contextmanager
def half_precision_rotations() -> Iterator[None]:
    """Round the rotary tables as the published rollout stores them; ours are exact."""
    rounded = lambda positions, head_dim: rotation(positions, head_dim).half().float()  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        for module in (dit, kv_cache):
            patch.setattr(module, "rotation", rounded)
        yield
