"""The benchmarks of the command bench: frames per second, time to the first frame, memory, and use of the arithmetic."""

from __future__ import annotations

import json
import math
import platform
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from sonic.bench.arithmetic import gemm_fraction
from sonic.bench.dit_forward import bench_dit
from sonic.bench.face_finding import bench_faces
from sonic.bench.plan_check import bench_fit
from sonic.bench.scaling import bench_scaling
from sonic.config import ModelConfig, Ranks, parse_size
from sonic.data.image import resized
from sonic.geometry import FPS
from sonic.inference.infer_config import BenchConfig, InferConfig
from sonic.inference.inputs import open_inputs
from sonic.inference.report import Result, StageTimer, versions
from sonic.pipeline import AvatarPipeline
from sonic.types import FaceBox, Inputs, Mouth, Portrait, Speech, pick


def bench(config: BenchConfig, begun: float, *, ranks: Ranks) -> dict:
    """Run the benchmark `config.target`; the first rank prints the figures as a table and writes the JSON.

    `begun` is the time.perf_counter() at the start of the process. Returns the figures, {} on other ranks.
    """
    if config.target == "fit":
        measured = bench_fit(config, begun, ranks=ranks)
    elif ranks.world == 1:
        measured = pick(BENCHES, config.target, "target")(config, begun)
    else:
        raise ValueError(f"bench {config.target} times one process; {ranks.world} ranks are for bench fit")
    if ranks.rank:
        return {}
    figures = {**measured, "machine": _machine(), "versions": versions()}
    show(figures)
    if config.json:
        Path(config.json).write_text(json.dumps(figures, indent=2) + "\n")
    return figures


def bench_preview(config: BenchConfig, begun: float) -> dict:
    """Frames per second of the preview, time to its first frame, and the throughput of its arithmetic relative to a matrix product."""
    timer = StageTimer(begun)
    with timer.stage("load"):
        inputs = _timed_inputs(config)
        pipe = AvatarPipeline(
            InferConfig(**{name: getattr(config, name) for name in ("run", "model", "sampler", "decode", "parallel", "hardware")})
        )
    results = [_timed_video(pipe, inputs, timer=timer)]
    results += [_timed_video(pipe, inputs, timer=StageTimer()) for _ in range(config.repeats)]  # the first one warmed up
    best = max(results[1:], key=lambda result: result.frames_per_second)
    return {
        "frames_per_second": best.frames_per_second,
        "first_frame_s": results[0].first_frame_s,
        "peak_rss_gib": best.peak_rss_gib,
        **{f"gemm_fraction_{name}": round(gemm_fraction(_wide(config), dtype), 3) for name, dtype in _DTYPES.items()},
        "first_frame_warm_s": best.first_frame_s,
        "stages_s": {name: seconds for name, seconds in best.stages_s.items() if name != "load"},
        "load_s": results[0].stages_s["load"],
        "video": f"{config.timing.photo}, {inputs.num_frames} frames, {config.model.resolution} px crop, "
        f"{config.sampler.sample_steps} steps",
    }


BENCHES = {"preview": bench_preview, "dit_medium": bench_dit, "scaling": bench_scaling, "faces": bench_faces}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def show(figures: dict) -> None:
    """Print the figures as a table."""
    table = Table("figure", "value", title=figures["machine"])
    for name, value in figures.items():
        rows = value.items() if isinstance(value, dict) else [("", value)]
        for part, number in rows:
            table.add_row(f"{name} {part}".strip(), str(number))
    Console().print(table)


def _timed_video(pipe: AvatarPipeline, inputs: Inputs, *, timer: StageTimer) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        return pipe.write(inputs, Path(folder) / "out.mp4", timer=timer)[0]


def _timed_inputs(config: BenchConfig) -> Inputs:
    """The bundled portrait cropped to timing.photo with the face in it, and the bundled speech repeated to timing.seconds."""
    inputs = open_inputs(InferConfig())
    samples = np.resize(inputs.speech.samples, round(config.timing.seconds * inputs.speech.sample_rate))
    portrait = _cover(inputs.portrait, *parse_size(config.timing.photo, "timing.photo"))
    return replace(
        inputs, portrait=portrait, speech=Speech(samples, inputs.speech.sample_rate), num_frames=round(config.timing.seconds * FPS)
    )


def _cover(portrait: Portrait, width: int, height: int) -> Portrait:
    """Scale the portrait to cover width x height and crop it around the face."""
    high, wide = portrait.pixels.shape[:2]
    scale = max(width / wide, height / high)
    large = resized(portrait.pixels, math.ceil(high * scale), math.ceil(wide * scale))
    face, mouth = portrait.face, portrait.mouth
    left, top = (
        int(np.clip(scale * middle - length / 2, 0, whole - length))
        for middle, length, whole in (
            (face.x + face.width / 2, width, large.shape[1]),
            (face.y + face.height / 2, height, large.shape[0]),
        )
    )
    return Portrait(
        np.ascontiguousarray(large[top : top + height, left : left + width]),
        FaceBox(scale * face.x - left, scale * face.y - top, scale * face.width, scale * face.height),
        Mouth(scale * mouth.x - left, scale * mouth.y - top, scale * mouth.half_width, mouth.angle),
    )


def _wide(config: BenchConfig) -> ModelConfig:
    """The model with hidden_dim = timing.gemm_dim, heads of 128 as in published models, and two layers."""
    dim = config.timing.gemm_dim
    trunk = replace(config.model.trunk, hidden_dim=dim, ffn_dim=4 * dim, num_heads=dim // 128, num_layers=2)
    return replace(config.model, trunk=trunk, audio=replace(config.model.audio, inject_layers=[0]))


def _machine() -> str:
    """Description of processor, threads, system and date."""
    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads, {platform.system()}, {time.strftime('%Y-%m-%d')}"


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
