"""Conversion of the published folders to a converted checkpoint, and of its transformer back; one tensor in memory at a time."""

from __future__ import annotations

import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor
from tqdm import tqdm

from sonic.checkpoint import official
from sonic.checkpoint.convert_config import ConvertConfig
from sonic.checkpoint.converted import FORMAT, MANIFEST, REPORT, STEM, TOKENIZER, ConvertedFolder
from sonic.checkpoint.lora import NO_LORA, Lora, read_lora
from sonic.checkpoint.official import Component
from sonic.checkpoint.tensor_files import FLOATS, StoredTensor, joined_hash, read, sha256, survey, write
from sonic.checkpoint.weights import to_ours
from sonic.config import ModelConfig
from sonic.families import FAMILIES
from sonic.registry import Registry

log = logging.getLogger("sonic.checkpoint")

SHARD_BYTES = 1 << 30  # size of a shard; a conversion that is interrupted and run again reuses whole shards
PLAN = "plan.json"  # in an incomplete folder: the inputs of the conversion that writes it


def to_ready(config: ConvertConfig, base: ModelConfig) -> Path:
    """Convert the downloaded folders and give the path of the result, which has its name only when it is complete.

    Tensors are read, changed and written one at a time. A process that is killed leaves output.partial, whose shards the same
    conversion reuses. Raises ValueError, before anything is written, when a file is missing, damaged or for another model.
    """
    output = _free(config.output)
    found = _module(base).networks(Path(config.source), base)
    denoiser = next(iter(found.components))
    lora = _lora(config, found.components[denoiser])
    _check_space(output, found.components)
    sources = _files(found.components.values(), lora)
    for name, part in found.components.items():
        log.info("%s: %d tensors of %s", name, len(part.tensors), ", ".join(map(str, _files([part], NO_LORA))))
    if found.licence:
        log.warning("%s", found.licence)
    with _partial_folder(output, _plan(config, sources)) as partial:
        report = []
        for name, part in found.components.items():
            report += _write(partial / name, part, lora if name == denoiser else NO_LORA)
        for file in found.tokenizer:
            (partial / TOKENIZER).mkdir(exist_ok=True)
            shutil.copyfile(file, partial / TOKENIZER / file.name)
        (partial / REPORT).write_text(json.dumps(report, indent=1) + "\n")
        digests = {file: sha256(file) for file in tqdm([*sources, *found.tokenizer], desc="hash", unit=" files")}
        manifest = {
            "format": FORMAT,
            "model": base.name,
            "config": found.config,
            "licence": found.licence,
            "lora": {"file": lora.file.name, "alpha": lora.alpha, "weights": len(lora.adapters)} if lora.file else None,
            "sources": _named(digests),
            "hashes": {name: joined_hash([digests[file] for file in _files([part], NO_LORA)]) for name, part in found.components.items()},
            "tensors": {name: len(part.tensors) for name, part in found.components.items()},
        }
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return output


def to_official(config: ConvertConfig, base: ModelConfig) -> Path:
    """Write a transformer as a published folder: shards, their index, and config.json. It comes from a converted checkpoint or from a
    trained student's file, and the configured adapter is merged.

    The other networks are never trained, so other programs load them from the downloaded folders.
    """
    source, output = Path(config.source), _free(config.output)
    if source.is_file():
        tensors, model = survey(source), base
    else:
        checkpoint = ConvertedFolder.open(source)
        tensors, model = checkpoint.tensors(next(iter(checkpoint.manifest["tensors"]))), checkpoint.config(base)
    dit = _module(base).exported(tensors, model)
    lora = _lora(config, dit)
    _check_space(output, {"dit": dit})
    with _partial_folder(output, _plan(config, _files([dit], lora))) as partial:
        _write(partial, dit, lora, stem=official.DIT_STEM)
    return output


DIRECTIONS: Registry[Callable[[ConvertConfig, ModelConfig], Path]] = Registry("to", {"ready": to_ready, "official": to_official})


def _module(model: ModelConfig) -> ModuleType:
    """The module that reads the downloaded folder of a model."""
    return import_module(FAMILIES[model.family].download)


def _lora(config: ConvertConfig, dit: Component) -> Lora:
    """The configured adapters. Raises ValueError when they do not fit the transformer."""
    lora = read_lora(config.lora.path, config.lora.alpha) if config.lora.path else NO_LORA
    lora.check({to_ours(name): tensor.shape for name, tensor in dit.tensors.items()})
    return lora


def _files(components: Iterable[Component], lora: Lora) -> list[Path]:
    """The files that a conversion reads, without those of the tokenizer."""
    files = sorted({tensor.file for part in components for tensor in part.tensors.values()})
    return [*files, lora.file] if lora.file else files


def _named(digests: Mapping[Path, str]) -> dict[str, str]:
    """The digest of each file by its name, or by that and its folder's where another file has the same name."""
    names = Counter(file.name for file in digests)
    return {file.name if names[file.name] == 1 else f"{file.parent.name}/{file.name}": digest for file, digest in digests.items()}


def _write(folder: Path, part: Component, lora: Lora, *, stem: str = STEM) -> list[dict[str, Any]]:
    """Write the shards that do not exist yet, the index and the config of a component. Gives the report's entry of every tensor."""
    folder.mkdir(exist_ok=True)
    shards = list(shards_of(part))
    names = [f"{stem}-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
    report, weight_map, size = [], {}, 0
    for shard, file in zip(tqdm(shards, desc=folder.name, unit=" shards"), names, strict=True):
        if not (folder / file).exists():
            parts = {name: (part.dtype(stored), stored.shape) for name, stored in shard.items()}
            write(folder / file, parts, _changed(shard, part, lora))
        for name, stored in shard.items():
            line = {"component": folder.name, "tensor": name, "file": stored.file.name, "shape": list(stored.shape)}
            report.append({**line, "dtype": stored.dtype, "merged": to_ours(name) in {**lora.adapters, **lora.replaced}, "shard": file})
            weight_map[name] = file
            size += part.nbytes(stored)
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    (folder / "config.json").write_text(json.dumps(dict(part.config), indent=1) + "\n")
    return report


def _changed(shard: Mapping[str, StoredTensor], part: Component, lora: Lora) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a shard one at a time, with the adapter merged, in the precision in which they are written."""
    for name, (stored, tensor) in zip(shard, read(shard.values()), strict=True):
        if replacing := lora.replaced.get(to_ours(name)):
            tensor = replacing.whole().to(tensor.dtype)
        if adapter := lora.adapters.get(to_ours(name)):
            tensor = adapter.delta(lora.alpha).add_(tensor).to(tensor.dtype)
        yield name, tensor.to(FLOATS[part.dtype(stored)])


def shards_of(part: Component) -> Iterator[dict[str, StoredTensor]]:
    """The tensors of each shard: sorted by file and name, up to SHARD_BYTES together."""
    shard: dict[str, StoredTensor] = {}
    size = 0
    for name, stored in sorted(part.tensors.items(), key=lambda item: (item[1].file, item[0])):
        if shard and size + part.nbytes(stored) > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = stored
        size += part.nbytes(stored)
    yield shard


def _plan(config: ConvertConfig, sources: Iterable[Path]) -> dict[str, Any]:
    """All that the shards of a conversion depend on: the same plan gives the same shards."""
    state = {str(file.resolve()): [file.stat().st_size, file.stat().st_mtime_ns] for file in sources}
    return {"format": FORMAT, "to": config.to, "model": config.model.name, "alpha": config.lora.alpha, "sources": state}


@contextmanager
def _partial_folder(output: Path, plan: Mapping[str, Any]) -> Iterator[Path]:
    """A folder beside the final one: it is renamed to it when the `with` block succeeds, and removed when it fails.

    What a killed process left there is reused when its plan was the same, and deleted otherwise.
    """
    partial, text = _beside(output), json.dumps(plan, indent=1) + "\n"
    plan_file = partial / PLAN
    if plan_file.is_file() and plan_file.read_text() == text:
        log.info("%s of an interrupted conversion is reused", partial)
    else:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        plan_file.write_text(text)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    plan_file.unlink()
    partial.rename(output)


def _free(output: str) -> Path:
    path = Path(output)
    if path.exists():
        raise ValueError(f"output={output} exists already; choose another folder, or remove it first")
    return path


def _beside(output: Path) -> Path:
    return output.with_name(f"{output.name}.partial")


def _check_space(output: Path, components: Mapping[str, Component]) -> None:
    needed = sum(part.nbytes(tensor) for part in components.values() for tensor in part.tensors.values())
    parent = next(folder for folder in output.resolve().parents if folder.exists())
    free = shutil.disk_usage(parent).free + sum(file.stat().st_size for file in _beside(output).rglob("*") if file.is_file())
    if free < needed:
        space = f"{free / 2**30:.1f} GiB are free in {parent}, {needed / 2**30:.1f} GiB are needed"
        raise ValueError(f"output={output}: {space}; free some space or choose another folder")
