"""Clips from a folder of the user's own videos: one shard per video, an index, and a report of what was left out and why."""

from __future__ import annotations

import hashlib
import json
import logging
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sonic.data import clips
from sonic.data.audio import SAMPLE_RATE, NoSound, load_soundtrack
from sonic.data.data_config import PrecomputeConfig
from sonic.data.faces import FaceFinder
from sonic.data.segments import Segment, checked_sync, find_videos, read_segments
from sonic.data.shards import Build, Encoders, common_encoders, encoders_here, make_shards, write_shard
from sonic.families import FAMILIES
from sonic.system.files import save_tensors, written_temporary
from sonic.system.paths import printable
from sonic.system.worker import Crashed

LOG = logging.getLogger(__name__)
REPORT = "report.jsonl"
GROUP = 6  # segments that are held at once and whose audio-visual sync is measured together


class NoText(ValueError):
    """Raised when the text file beside a video cannot be read."""


REASONS = {  # what the report calls an exception; the first class that matches counts
    NoSound: "no sound",
    NoText: "its text is not UTF-8",
    ValueError: "damaged",
    OSError: "cannot be read",
    MemoryError: "out of memory",
    Crashed: "the decoder crashed",
    Exception: "a fault of the program",
}


def precompute_videos(config: PrecomputeConfig, build: Build, hashes: Mapping[str, str]) -> int:
    """Make the shards that are missing or were made by encoders of other hashes, then the index, the statistics and the report.
    Returns the number of clips.

    The name of a shard depends on its video and on everything it is made with, so a run that was stopped continues and videos can be
    added. Raises ValueError when there is no video, or when no video gives a clip (the report says why).
    """
    source, folder = Path(config.data.source), Path(config.folder)
    FaceFinder()  # raises when the networks are missing, which would look like damage in every video
    jobs = {(name := _shard_name(path, config)): (path, name) for path in find_videos(source)}
    crashed = partial(_write_crashed, config)
    shard_metadata = make_shards(config, jobs, partial(_write_video, config, build), complete=_complete, hashes=hashes, crashed=crashed)
    lines = [line for metadata in shard_metadata for line in metadata["report"]]
    with written_temporary(folder / REPORT) as file:
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    show(lines)
    entries = [entry for metadata in shard_metadata for entry in metadata["clips"]]
    if not entries:
        counts = sorted(Counter(line["reason"] for line in lines).items())
        reasons = ", ".join(f"{reason} ({count})" for reason, count in counts)
        raise ValueError(f"data.source={source} gave no clip: {reasons}; {folder / REPORT} has every video")
    metadata = {"kind": config.kind, "source": config.data.source, **common_encoders(shard_metadata, config)}
    clips.write_index(folder, entries, **metadata)
    if FAMILIES[config.model.family].moves_portrait:
        save_tensors(clips.latent_statistics(folder), folder / clips.STATISTICS)
    LOG.info("%d clips in %s; %s says what was left out", len(entries), folder, folder / REPORT)
    return len(entries)


def clips_of(path: Path, config: PrecomputeConfig, encoders: Encoders) -> Iterator[tuple[Segment, dict[str, Tensor]]]:
    """Every segment of a video, with the tensors of its clip ({} when it has a fault). Raises ValueError for a damaged video."""
    samples = load_soundtrack(path)
    features = prompt = None
    stream = read_segments(path, samples, config, fps=encoders.fps, frame=encoders.frame)
    while group := list(islice(stream, GROUP)):
        for segment in checked_sync(group, config, encoders.fps):
            if segment.fault:
                yield segment, {}
                continue
            if features is None:
                features = encoders.encode_audio(samples, 1 + len(samples) * encoders.fps // SAMPLE_RATE).half()
                prompt = encoders.read(_prompt(path)) if encoders.read else None
            clip = {name: value if name == "head" else value.half() for name, value in encoders.encode(segment).items()}
            yield segment, {**clip, **encoders.audio_of(features, segment), **({} if prompt is None else {"text": prompt.half()})}


def show(lines: list[dict]) -> None:
    """Print a table of how much was kept and how much was left out, by reason."""
    table = Table("", "clips", "seconds", "videos", title="own videos")
    for reason in sorted({line["reason"] for line in lines}):
        matching = [line for line in lines if line["reason"] == reason]
        seconds, videos = sum(line["seconds"] for line in matching), len({line["video"] for line in matching})
        table.add_row(f"left out: {reason}" if reason else "kept", str(len(matching)), f"{seconds:.1f}", str(videos))
    Console(width=120).print(table)


def _complete(job: tuple[Path, str], metadata: Mapping[str, Any]) -> bool:
    """Whether a shard stays: not after an error that may not come again."""
    return not metadata.get("again")


def _write_video(config: PrecomputeConfig, build: Build, job: tuple[Path, str]) -> None:
    """Write the shard of one video: its clips, if any, and the report lines of its segments."""
    (path, name), tensors, entries, report, encoders = job, {}, [], [], encoders_here(config, build)
    video = _reported_name(path, config)
    try:
        for segment, clip in clips_of(path, config, encoders):
            report.append(_report_line(video, segment, encoders.fps))
            if clip:
                known = f"{Path(name).stem}_{len(entries):04d}"
                frames = clip["latents"].shape[1]
                entries.append({"name": known, "video": video, "shard": name, "latent_frames": frames, "tensors": sorted(clip)})
                tensors |= {f"{known}/{key}": value.contiguous() for key, value in clip.items()}
    except torch.OutOfMemoryError:  # of the encoders' device, so that every video would be left out
        raise
    except Exception as error:  # clips from before the damage are not trusted either
        _write_fault(config, (path, name), error)
        return
    write_shard(Path(config.folder) / name, tensors, clips=entries, report=report, fps=encoders.fps, **encoders.hashes)


def _write_crashed(config: PrecomputeConfig, job: tuple[Path, str], *, error: Crashed) -> None:
    """Write the shard of a video that crashed its worker process."""
    path, _ = job
    message = f"video={path}: the decoder crashed on this file ({error}); convert it, for example: ffmpeg -i {path} converted.mp4"
    _write_fault(config, job, Crashed(message))


def _write_fault(config: PrecomputeConfig, job: tuple[Path, str], error: Exception) -> None:
    """Write the shard of a video that gives no clip because of an error, with the error in its report line."""
    path, name = job
    reason = next(text for kind, text in REASONS.items() if isinstance(error, kind))
    message = printable(" ".join(str(error).split())) or type(error).__name__
    if reason == REASONS[Exception]:
        where = traceback.extract_tb(error.__traceback__)[-1]
        message = f"{type(error).__name__}: {message} ({Path(where.filename).name}:{where.lineno})"
        LOG.error("video=%s: a fault of the program, not of the video", path, exc_info=error)
    line = {"video": _reported_name(path, config), "start_s": 0.0, "seconds": 0.0, "kept": False, "reason": reason, "details": message}
    again = not isinstance(error, ValueError)  # which the same file will always raise
    write_shard(Path(config.folder) / name, {}, clips=[], report=[line], again=again)


def _reported_name(path: Path, config: PrecomputeConfig) -> str:
    """Name of a video in the report: its path inside data.source."""
    return printable(str(path.relative_to(config.data.source)))


def _report_line(video: str, segment: Segment, fps: int) -> dict:
    """The report line of a segment."""
    line = {"video": video, "start_s": round(segment.first / fps, 2), "seconds": round(segment.frames / fps, 2)}
    line |= {"kept": not segment.fault, "reason": segment.fault}
    if segment.sync is not None:
        line |= {"sync_correlation": round(segment.sync, 3), "mouth_late_s": round(segment.lag_s, 3)}
    return line


def _shard_name(path: Path, config: PrecomputeConfig) -> str:
    """File name of a video's shard: a hash of the file's state and of everything else that its clips depend on."""
    seen, text_file = path.stat(), path.with_suffix(".txt")
    try:
        text = text_file.read_text(encoding="utf-8", errors="backslashreplace").strip() if text_file.is_file() else ""
    except OSError as error:  # reported later, in the video's own line
        text = str(error)
    words = [str(path.relative_to(config.data.source)), seen.st_size, seen.st_mtime_ns, text]
    words += [config.latent_frames, config.autoencoder, {**asdict(config.data), "source": ""}, asdict(config.model)]
    return f"video_{hashlib.sha256(json.dumps(words, default=str).encode()).hexdigest()[:16]}.safetensors"


def _prompt(path: Path) -> str:
    """The prompt in the text file beside a video, "" without one. Raises NoText when the file is not UTF-8."""
    text_file = path.with_suffix(".txt")
    try:
        return text_file.read_text(encoding="utf-8").strip() if text_file.is_file() else ""
    except UnicodeDecodeError as error:
        raise NoText(f"{text_file} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error
