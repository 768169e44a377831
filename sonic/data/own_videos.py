"""A folder of one's own videos becomes clips: one shard per video, an index, and a report of what was left out and why."""

from __future__ import annotations

import hashlib
import json
import logging
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from sonic.data import clips
from sonic.data.audio import SAMPLE_RATE, NoSound, load_soundtrack
from sonic.data.data_config import PrecomputeConfig
from sonic.data.motion import encode_motion
from sonic.data.pixels import to_signed
from sonic.data.segments import Take, aligned, find_videos, takes
from sonic.data.shards import Build, Encoders, begin_again, built, each_made, facts_of, made_with, outdated, whole, write_shard
from sonic.system.files import save_tensors
from sonic.system.paths import shown
from sonic.system.worker import Crashed
from sonic.types import pick

LOG = logging.getLogger(__name__)
REPORT = "report.jsonl"
PASSAGE = 6  # takes that are held at once and whose sync is judged together


class NoText(ValueError):
    """The text beside a video cannot be read."""


REASONS = {  # of faults, the first that fits
    NoSound: "no sound",
    NoText: "its text is not UTF-8",
    ValueError: "damaged",
    OSError: "cannot be read",
    MemoryError: "out of memory",
    Crashed: "the decoder crashed",
    Exception: "a fault of the program",
}
LASTING = (ValueError,)  # faults that the same file has again; after others it is tried again by the next command


def precompute_videos(config: PrecomputeConfig, build: Build, hashes: Mapping[str, str]) -> int:
    """Make the shards that are missing or not made by encoders of these hashes, the index, the statistics and the report. Gives the
    number of clips.

    A shard is named by its video and what it is made with, so a run that was stopped continues, and videos can be added. Raises
    ValueError when there is no video, or none of them gives a clip; the report then says why.
    """
    source, folder = Path(config.data.source), Path(config.folder)
    shards = {_name(path, config): path for path in find_videos(source)}
    folder.mkdir(parents=True, exist_ok=True)
    there = {name for name in shards if whole(folder / name)}
    old = {name for name in there if outdated(folder / name, hashes)}
    begin_again(len(old), folder)
    kept = {name for name in there - old if not facts_of(folder / name).get("again")}
    missing = [(config, build, (path, name)) for name, path in shards.items() if name not in kept]
    done = each_made(_write_video, missing, config.workers, crashed=_write_crashed)
    for _ in tqdm(done, total=len(shards), initial=len(shards) - len(missing), unit="video", desc=source.name):
        pass
    told = [facts_of(folder / name) for name in shards]
    lines = [line for facts in told for line in facts["report"]]
    aside = folder / f".{REPORT}"
    aside.write_text("".join(json.dumps(line) + "\n" for line in lines))
    aside.rename(folder / REPORT)
    show(lines)
    entries = [entry for facts in told for entry in facts["clips"]]
    if not entries:
        raise ValueError(f"data.source={source} gave no clip: {_reasons(lines)}; {folder / REPORT} has every video")
    facts = {"kind": config.kind, "source": config.data.source, **made_with(told, config)}
    clips.write_index(folder, entries, **facts)
    if config.model.autoencoder == "warp":  # latents that are zero where nothing moves
        save_tensors(clips.statistics(folder), folder / clips.STATISTICS)
    LOG.info("%d clips in %s; %s says what was left out", len(entries), folder, folder / REPORT)
    return len(entries)


def clips_of(path: Path, config: PrecomputeConfig, encoders: Encoders) -> Iterator[tuple[Take, dict[str, Tensor]]]:
    """Every take of a video, with the tensors of a clip where nothing speaks against it. Raises ValueError for a damaged video."""
    samples = load_soundtrack(path)
    heard = prompt = None
    stream = takes(path, samples, config, fps=encoders.fps)
    while passage := list(islice(stream, PASSAGE)):
        for take in aligned(passage, config, encoders.fps):
            if take.fault:
                yield take, {}
                continue
            if heard is None:
                heard = encoders.hear(samples, 1 + len(samples) * encoders.fps // SAMPLE_RATE).half()
                prompt = encoders.read(_prompt(path)) if encoders.read else None
            clip = pick(ENCODINGS, config.model.autoencoder, "model.autoencoder")(encoders.autoencoder, take)
            clip = {name: value if name == "head" else value.half() for name, value in clip.items()}
            audio = _columns(heard, take.first, take.frames)
            yield take, {**clip, "audio": audio, **({} if prompt is None else {"text": prompt.half()})}


@torch.no_grad()
def _moved(autoencoder: Any, take: Take) -> dict[str, Tensor]:
    """How the face moves."""
    frames = _channels_first(take.pixels)[1:]
    return encode_motion(autoencoder, frames, frames[take.rest])


@torch.no_grad()
def _painted(autoencoder: Any, take: Take) -> dict[str, Tensor]:
    """The pictures themselves; the frame of the past makes the first latent, which is left out, so that every other has four."""
    frames = rearrange(_channels_first(take.pixels), "f c h w -> 1 c f h w").to(next(autoencoder.parameters()))
    latents, _ = autoencoder.encode(frames)
    ref, _ = autoencoder.encode(frames[:, :, 1 + take.rest : 2 + take.rest])
    return {"latents": latents[0, :, 1:].float().cpu(), "ref": ref[0].float().cpu()}


ENCODINGS: dict[str, Callable[[Any, Take], dict[str, Tensor]]] = {"warp": _moved, "wan": _painted}  # by model.autoencoder


def show(lines: list[dict]) -> None:
    """The table: how much was kept, and how much was left out for which reason."""
    table = Table("", "clips", "seconds", "videos", title="own videos")
    for reason in sorted({line["reason"] for line in lines}):
        some = [line for line in lines if line["reason"] == reason]
        seconds, videos = sum(line["seconds"] for line in some), len({line["video"] for line in some})
        table.add_row(f"left out: {reason}" if reason else "kept", str(len(some)), f"{seconds:.1f}", str(videos))
    Console(width=120).print(table)


def _write_video(config: PrecomputeConfig, build: Build, job: tuple[Path, str]) -> None:
    """Make the shard of one video: its clips, none where it gives none, and what was left out."""
    (path, name), tensors, entries, report, encoders = job, {}, [], [], built(config, build)
    video = _video(path, config)
    try:
        for take, clip in clips_of(path, config, encoders):
            report.append(_line(video, take, encoders.fps))
            if clip:
                known = f"{Path(name).stem}_{len(entries):04d}"
                entries.append({"name": known, "shard": name, "latent_frames": config.latent_frames, "tensors": sorted(clip)})
                tensors |= {f"{known}/{key}": value.contiguous() for key, value in clip.items()}
    except Exception as error:  # what a damaged video gave before is not to be trusted either
        _write_fault(config, (path, name), error)
        return
    write_shard(Path(config.folder) / name, tensors, clips=entries, report=report, fps=encoders.fps, **encoders.hashes)


def _write_crashed(config: PrecomputeConfig, build: Build, job: tuple[Path, str], *, error: Crashed) -> None:
    """Make the shard of a video that crashed its worker."""
    path, name = job
    told = f"video={path}: the decoder crashed on this file ({error}); convert it, for example: ffmpeg -i {path} converted.mp4"
    _write_fault(config, job, Crashed(told))


def _write_fault(config: PrecomputeConfig, job: tuple[Path, str], error: Exception) -> None:
    """Make the shard of a video that gives no clip because of a fault, and say what that was."""
    path, name = job
    reason = next(told for kind, told in REASONS.items() if isinstance(error, kind))
    told = shown(" ".join(str(error).split())) or type(error).__name__
    if reason == REASONS[Exception]:
        where = traceback.extract_tb(error.__traceback__)[-1]
        told = f"{type(error).__name__}: {told} ({Path(where.filename).name}:{where.lineno})"
        LOG.error("video=%s: a fault of the program, not of the video", path, exc_info=error)
    line = {"video": _video(path, config), "start_s": 0.0, "seconds": 0.0, "kept": False, "reason": reason, "told": told}
    write_shard(Path(config.folder) / name, {}, clips=[], report=[line], again=not isinstance(error, LASTING))


def _video(path: Path, config: PrecomputeConfig) -> str:
    """What the report calls a video."""
    return shown(str(path.relative_to(config.data.source)))


def _line(video: str, take: Take, fps: int) -> dict:
    """What the report says of a take."""
    line = {"video": video, "start_s": round(take.first / fps, 2), "seconds": round(take.frames / fps, 2)}
    line |= {"kept": not take.fault, "reason": take.fault}
    if take.sync is not None:
        line |= {"sync_correlation": round(take.sync, 3), "mouth_late_s": round(take.lag_s, 3)}
    return line


def _reasons(lines: list[dict]) -> str:
    counts = {line["reason"]: sum(other["reason"] == line["reason"] for other in lines) for line in lines}
    return ", ".join(f"{reason} ({count})" for reason, count in sorted(counts.items()))


def _name(path: Path, config: PrecomputeConfig) -> str:
    """The shard of a video: named by the file as it is now and by everything that its clips depend on."""
    seen, told = path.stat(), path.with_suffix(".txt")
    try:
        said = told.read_text(encoding="utf-8", errors="backslashreplace").strip() if told.is_file() else ""
    except OSError as error:  # which the video's own line will tell
        said = str(error)
    words = [str(path.relative_to(config.data.source)), seen.st_size, seen.st_mtime_ns, said]
    words += [config.latent_frames, config.autoencoder, {**asdict(config.data), "source": ""}, asdict(config.model)]
    return f"video_{hashlib.sha256(json.dumps(words, default=str).encode()).hexdigest()[:16]}.safetensors"


def _prompt(path: Path) -> str:
    """What the text beside the video says of it; nothing where there is none. Raises NoText when it is none."""
    told = path.with_suffix(".txt")
    try:
        return told.read_text(encoding="utf-8").strip() if told.is_file() else ""
    except UnicodeDecodeError as error:
        raise NoText(f"{told} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error


def _columns(heard: Tensor, first: int, frames: int) -> Tensor:
    """The features of so many frames, nothing after the end of the sound.  [N,A,F] -> [N,A,frames]"""
    found = heard[..., first : first + frames]
    return torch.nn.functional.pad(found, (0, frames - found.shape[-1]))


def _channels_first(pixels: Tensor) -> Tensor:
    """uint8 [F,h,w,3] -> [F,3,h,w] in [-1,1]"""
    return to_signed(rearrange(pixels, "f h w c -> f c h w"))
