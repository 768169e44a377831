"""The benchmarks of the command bench: frames per second, time to the first frame, memory, and use of the arithmetic."""

from __future__ import annotations

import platform
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from rich.console import Console
from rich.table import Table

from sonic.bench.face_finding import bench_faces
from sonic.bench.forward_time import DTYPES, bench_dit, gemm_fraction
from sonic.bench.plan_check import bench_fit
from sonic.bench.roofline import bench_roofline
from sonic.bench.scaling import bench_scaling
from sonic.config import ModelConfig, Ranks, parse_size
from sonic.inference.infer_config import BenchConfig, InferConfig
from sonic.inference.input_reader import open_inputs
from sonic.inference.inputs import ALL_IN_FILES, InMemory
from sonic.inference.report import StageTimer, versions
from sonic.pipeline import AvatarPipeline
from sonic.registry import Registry
from sonic.system.files import write_json
from sonic.types import Inputs, Speech

FACE = (0.43, 0.0)  # where the cut of the bundled portrait lies between left and right, top and bottom, so that the face is in it


def bench(config: BenchConfig, begun: float, *, ranks: Ranks) -> dict:
    """Run the benchmark `config.target`; the first rank prints the figures as a table and writes the JSON.

    `begun` is the time.perf_counter() at the start of the process. Returns the figures, {} on other ranks.
    """
    if ranks.world > 1 and config.target != "fit":
        raise ValueError(f"bench {config.target} times one process; {ranks.world} ranks are for bench fit")
    if config.target == "roofline":  # which measures nothing
        return bench_roofline(config)
    measure = partial(bench_fit, ranks=ranks) if config.target == "fit" else BENCHES[config.target]
    measured = measure(config, begun)
    if ranks.rank:
        return {}
    figures = {**measured, "machine": _machine(), "versions": versions()}
    table = Table("figure", "value", title=figures["machine"])
    for name, value in figures.items():
        for part, number in value.items() if isinstance(value, dict) else [("", value)]:
            table.add_row(f"{name} {part}".strip(), str(number))
    Console().print(table)
    if config.json:
        write_json(figures, config.json)
    return figures


def bench_preview(config: BenchConfig, begun: float) -> dict:
    """Frames per second of the preview, time to its first frame, and the throughput of its arithmetic relative to a matrix product."""
    timer = StageTimer(begun)
    with timer.stage("load"):
        names = ("run", "model", "sampler", "decode", "parallel", "hardware")
        asked = InferConfig(**{name: getattr(config, name) for name in names})
        inputs = _inputs(config, asked)
        pipe = AvatarPipeline(asked)
    with tempfile.TemporaryDirectory() as folder:
        results = [pipe.write(inputs, Path(folder) / "out.mp4", timer=timer)[0]]
        results += [pipe.write(inputs, Path(folder) / "out.mp4")[0] for _ in range(config.repeats)]
    best = max(results[1:], key=lambda result: result.frames_per_second)  # the first one warmed up
    return {
        "frames_per_second": best.frames_per_second,
        "first_frame_s": results[0].first_frame_s,
        "peak_rss_gib": best.peak_rss_gib,
        **{f"gemm_fraction_{name}": round(gemm_fraction(_wide(config), dtype), 3) for name, dtype in DTYPES.items()},
        "first_frame_warm_s": best.first_frame_s,
        "stages_s": {name: seconds for name, seconds in best.stages_s.items() if name != "load"},
        "load_s": results[0].stages_s["load"],
        "video": f"{config.timing.photo}, {inputs.num_frames} frames, {config.model.resolution} px crop, "
        f"{config.sampler.sample_steps} steps",
    }


BENCHES: Registry[Callable[..., dict]] = Registry(
    "target",
    {
        "preview": bench_preview,
        "dit_medium": bench_dit,
        "fit": bench_fit,
        "scaling": bench_scaling,
        "faces": bench_faces,
        "roofline": bench_roofline,
    },
)


def _inputs(config: BenchConfig, asked: InferConfig) -> Inputs:
    """The bundled portrait cut to timing.photo, and the bundled speech repeated to timing.seconds."""
    picture = ImageOps.fit(Image.fromarray(ALL_IN_FILES.picture_of(asked)), parse_size(config.timing.photo, "timing.photo"), centering=FACE)
    speech = ALL_IN_FILES.speech_of(asked)
    samples = np.resize(speech.samples, round(config.timing.seconds * speech.sample_rate))
    return open_inputs(asked, InMemory(np.array(picture), Speech(samples, speech.sample_rate)))


def _wide(config: BenchConfig) -> ModelConfig:
    """The model with hidden_dim = timing.gemm_dim, heads of 128 as in published models, and two layers."""
    dim = config.timing.gemm_dim
    trunk = replace(config.model.trunk, hidden_dim=dim, ffn_dim=4 * dim, num_heads=dim // 128, num_layers=2)
    return replace(config.model, trunk=trunk, audio=replace(config.model.audio, inject_layers=[0]))


def _machine() -> str:
    """Description of processor, threads, system and date."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.*)", info.read_text(), re.MULTILINE) if info.exists() else None
    name = found[1] if found else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads, {platform.system()}, {time.strftime('%Y-%m-%d')}"
