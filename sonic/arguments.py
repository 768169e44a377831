"""Translates the arguments of Python calls into options of the command line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from PIL import Image

from sonic.checkpoint.converted import MANIFEST, ConvertedFolder
from sonic.checkpoint.header import read_header
from sonic.cli import group_choices, typed_values
from sonic.inference.infer_config import InferConfig
from sonic.system.paths import expanded

FIELDS = {  # keyword of a call -> option of the command line
    "prompt": "prompt",
    "negative_prompt": "sampler.negative_prompt",
    "num_inference_steps": "sampler.sample_steps",
    "guidance_scale": "sampler.sample_guide_scale",
    "audio_guidance_scale": "sampler.audio_guide_scale",
    "seed": "seed",
    "size": "video.size",
    "min_resolution": "video.min_resolution",
    "duration": "video.duration",
    "duration_policy": "video.duration_policy",
    "face_box": "face.box",
    "mouth": "face.mouth",
    "expand_ratio": "face.expand_ratio",
    "masks": "face.masks",
    "pose": "motion.pose",
    "alignment_offset": "post.alignment_offset",
    "lip_align": "post.lip_align",
    "dynamic_scale": "motion.dynamic_scale",
    "motion_scale": "motion.motion_scale",
    "smooth_motion": "post.smooth_motion",
    "interpolate": "post.interpolate",
}

Picture = str | os.PathLike | Image.Image | np.ndarray
Sound = str | os.PathLike | tuple[Any, int]  # a path, or (samples, sample rate)
Callback = Callable[[Any, int, float, dict[str, Any]], Any]  # (pipe, sampling step, timestep, {"block": index})


class VideoOptions(TypedDict, total=False):
    """Keyword arguments of a call besides image and audio. A missing argument, or None, keeps the value of the pipeline.

    size: "704x384", (width, height) or "photo"; min_resolution: short side in pixels. duration in seconds, with duration_policy follow,
    strict, trim or pad. face_box [x,y,width,height] and mouth [x,y,half_width(,angle)]: in pixels of the photo. masks and pose: files,
    as in face.masks and motion.pose. alignment_offset, lip_align, smooth_motion and interpolate: as in post; dynamic_scale and
    motion_scale: as in motion. generator: a CPU generator, used in place of the seed; one that was just seeded gives the same video as
    that seed. callback_on_step_end(pipe, step, timestep, {"block": index}): called after every sampling step of every block or clip, in
    the thread that denoises; an exception in it stops the video, its return value is ignored.
    """

    prompt: str | None
    negative_prompt: str | None
    num_inference_steps: int | None
    guidance_scale: float | None
    audio_guidance_scale: float | None
    generator: torch.Generator | None
    seed: int | None
    size: str | tuple[int, int] | None
    min_resolution: int | None
    duration: float | None
    duration_policy: str | None
    face_box: Sequence[float] | None
    mouth: Sequence[float] | None
    expand_ratio: float | None
    masks: Sequence[str | os.PathLike] | None
    pose: str | os.PathLike | None
    alignment_offset: float | None
    lip_align: bool | None
    dynamic_scale: float | None
    motion_scale: float | None
    smooth_motion: float | None
    interpolate: int | None
    callback_on_step_end: Callback | None


def with_options(config: InferConfig, values: Mapping[str, Any]) -> InferConfig:
    """A copy of the config with some options changed; `values` maps full option names to values.

    Raises ValueError for a value of the wrong type or outside its range.
    """
    top: dict[str, Any] = {}
    groups: dict[str, dict[str, Any]] = {}
    for name, value in typed_values(InferConfig, {name: option_text(value) for name, value in values.items()}).items():
        group, _, field = name.rpartition(".")
        (groups.setdefault(group, {}) if group else top)[field] = value
    return replace(config, **top, **{group: replace(getattr(config, group), **fields) for group, fields in groups.items()})


def model_choice(model: str) -> dict[str, str]:
    """The options that select a model: by its name, by a file of trained weights, or by a folder with them or a converted checkpoint."""
    folder = Path(expanded(model))
    if folder.is_file() and read_header(folder):
        return {"model.weights": str(folder)}
    if model in group_choices("model") or not folder.is_dir():
        return {"model": model}
    if not (folder / MANIFEST).is_file() and any(folder.glob("*_dit.safetensors")):
        return {"model": next(folder.glob("*_dit.safetensors")).name.removesuffix("_dit.safetensors"), "model.weights": str(folder)}
    return {"model": ConvertedFolder.open(folder).manifest["model"], "model.weights": str(folder)}


def option_text(value: Any) -> str:
    """A value as text for the command line."""
    if isinstance(value, str | os.PathLike | torch.device):
        return str(value)
    return json.dumps(value, default=_plain, ensure_ascii=False)


def _plain(value: Any) -> Any:
    """Numbers of an array or a tensor; the text of anything else that JSON has no form for."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic | torch.Tensor) else str(value)


def seed_of(generator: Any) -> int:
    """The initial seed of a generator. Raises ValueError unless it is a CPU generator."""
    if not isinstance(generator, torch.Generator) or generator.device.type != "cpu":
        given = f"on {generator.device}" if isinstance(generator, torch.Generator) else f"a {type(generator).__name__}"
        raise ValueError(
            f"generator is {given}; use torch.Generator().manual_seed(...): noise comes from the CPU, to be the same everywhere"
        )
    return generator.initial_seed() % 2**63
