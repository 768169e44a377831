"""Official folders become a ready checkpoint, and a ready checkpoint official again; tensor by tensor, in little memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from sonic.checkpoint import official
from sonic.checkpoint.official import Component
from sonic.checkpoint.ready import FORMAT, MANIFEST, REPORT, STEM, TOKENIZER, Ready
from sonic.checkpoint.tensor_files import Stored, read, sha256
from sonic.config import ConvertConfig, ModelConfig
from sonic.model.lora import Adapter, check_lora, lora_alpha, lora_file, read_lora
from sonic.model.weights import to_ours

SHARD_BYTES = 1 << 30  # of one file; this and a copy of it are in memory while it is written
WIDTHS = {"F32": 4, "F16": 2, "BF16": 2}


def to_ready(config: ConvertConfig, base: ModelConfig) -> Path:
    """Convert the downloaded folders as configured; the result appears under its name when it is complete.

    Raises ValueError, before anything is written, for whatever is missing, damaged or does not fit.
    """
    folder, output = Path(config.source), _free(config.output)
    dit, model = official.transformer(folder, base)
    components = {
        "dit": dit,
        "text_encoder": official.text_encoder(folder),
        "vae": official.autoencoder(folder),
        "speech_encoder": official.speech_encoder(folder),
    }
    adapters, alpha = _adapters(config, dit)
    tokens = official.tokenizer_files(folder)
    _check_space(output, components)
    sources = sorted({tensor.file for part in components.values() for tensor in part.tensors.values()})
    lora = lora_file(config.lora.path) if config.lora.path else None
    with _aside(output) as partial:
        report = []
        for name, part in components.items():
            report += _write(partial / name, part, adapters if name == "dit" else {}, alpha=alpha)
        (partial / TOKENIZER).mkdir()
        for file in tokens:
            shutil.copyfile(file, partial / TOKENIZER / file.name)
        (partial / REPORT).write_text(json.dumps(report, indent=1) + "\n")
        manifest = {
            "format": FORMAT,
            "model": base.name,
            "config": {part: asdict(getattr(model, part)) for part in ("trunk", "audio", "text", "motion")},
            "lora": {"file": str(lora.name), "alpha": alpha, "weights": len(adapters)} if lora else None,
            "sources": {file.name: sha256(file) for file in tqdm([*sources, *tokens, *filter(None, [lora])], desc="hash", unit=" files")},
            "tensors": {name: len(part.tensors) for name, part in components.items()},
        }
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return output


def to_official(config: ConvertConfig, base: ModelConfig) -> Path:
    """A transformer as a published folder: its shards, their index, and config.json. It is a ready checkpoint's, or a student's in a
    file of its own; a student's adapter is merged."""
    source, output = Path(config.source), _free(config.output)
    if source.is_file():
        dit = official.bare_transformer(source, base)
    else:
        ready = Ready.open(source)
        dit = Component(ready.tensors("dit"), official.official_config(ready.config(base)))
    adapters, alpha = _adapters(config, dit)
    with _aside(output) as partial:
        _write(partial, dit, adapters, alpha=alpha, stem=official.DIT_STEM)
    return output


DIRECTIONS = {"ready": to_ready, "official": to_official}


def _adapters(config: ConvertConfig, dit: Component) -> tuple[dict[str, Adapter], float]:
    """Adapters by our name of the weight they change, all of them in use, and their strength."""
    if not config.lora.path:
        return {}, 1.0
    adapters = read_lora(config.lora.path)
    check_lora({to_ours(name) or name: tensor.shape for name, tensor in dit.tensors.items()}, adapters)
    return adapters, config.lora.alpha or lora_alpha(config.lora.path)


def _write(folder: Path, part: Component, adapters: Mapping[str, Adapter], *, alpha: float = 1.0, stem: str = STEM) -> list[dict[str, Any]]:
    """Shards, index and config of one component; a line of the report for every tensor."""
    folder.mkdir(exist_ok=True)
    shards = list(shards_of(part))
    names = [f"{stem}-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
    report, weight_map, size = [], {}, 0
    for shard, file in zip(tqdm(shards, desc=folder.name, unit=" shards"), names, strict=True):
        held: dict[str, Tensor] = {}
        by_place = {(stored.file, stored.name): name for name, stored in shard.items()}
        for stored, tensor in read(shard.values()):
            name = by_place[stored.file, stored.name]
            adapter = adapters.get(to_ours(name) or name)
            held[name] = _changed(tensor, adapter, alpha, halve=part.halve)
            line = {"component": folder.name, "tensor": name, "file": stored.file.name, "shape": list(stored.shape)}
            report.append({**line, "dtype": stored.dtype, "merged": adapter is not None, "shard": file})
            weight_map[name] = file
            size += held[name].numel() * held[name].element_size()
        save_file(held, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    (folder / "config.json").write_text(json.dumps(dict(part.config), indent=1) + "\n")
    return report


def _changed(tensor: Tensor, adapter: Adapter | None, alpha: float, *, halve: bool) -> Tensor:
    if adapter is not None:
        tensor = (tensor.float() + adapter.delta(alpha)).to(tensor.dtype)
    return tensor.to(torch.bfloat16 if halve else tensor.dtype).contiguous()


def shards_of(part: Component) -> Iterator[dict[str, Stored]]:
    """Tensors in the order they lie in their files, in portions that fit a shard."""
    shard: dict[str, Stored] = {}
    size = 0
    for name, stored in sorted(part.tensors.items(), key=lambda item: (item[1].file, item[0])):
        weight = stored.numel * (2 if part.halve else WIDTHS[stored.dtype])
        if shard and size + weight > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = stored
        size += weight
    yield shard


class _aside:  # noqa: N801 - used as a function
    """A folder beside the final one that takes its place when the block ends well, and is removed when not."""

    def __init__(self, output: Path) -> None:
        self.output, self.partial = output, output.with_name(output.name + ".partial")

    def __enter__(self) -> Path:
        shutil.rmtree(self.partial, ignore_errors=True)  # of a run that was cut off
        self.partial.mkdir(parents=True)
        return self.partial

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self.partial.rename(self.output)
        else:
            shutil.rmtree(self.partial, ignore_errors=True)


def _free(output: str) -> Path:
    path = Path(output)
    if path.exists():
        raise ValueError(f"output={output} exists already; choose another folder, or remove it first")
    return path


def _check_space(output: Path, components: Mapping[str, Component]) -> None:
    width = lambda part, tensor: 2 if part.halve else WIDTHS[tensor.dtype]  # noqa: E731
    needed = sum(tensor.numel * width(part, tensor) for part in components.values() for tensor in part.tensors.values())
    place = next(folder for folder in output.resolve().parents if folder.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        room = f"{free / 2**30:.1f} GiB are free in {place}, {needed / 2**30:.1f} GiB are needed"
        raise ValueError(f"output={output}: {room}; free some space or choose another folder")
