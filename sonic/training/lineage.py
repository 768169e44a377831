"""What a run uses and what it makes, in a form that says the same thing in both runs: data, weights, code, evaluations."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from sonic.data.clips import INDEX, ClipDataset
from sonic.training.train_config import DataConfig

PIECES, PIECE = 256, 1 << 16  # pieces of a large file that its digest is of, and their bytes


@dataclass(frozen=True)
class Artifact:
    """Something that a run uses or makes. Two runs mean the same version of it by an equal name, `identity` and `files`, which are kept
    with it; `metadata` says more, and `reference` is a file that is named with its digest and not kept."""

    name: str
    kind: str
    identity: Mapping[str, Any]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    files: Sequence[Path] = ()
    reference: Path | None = None


def dataset_artifact(config: DataConfig, dataset: Dataset) -> Artifact:
    """The data of a training: clips by the digest of their index, people drawn as needed by their options."""
    if not isinstance(dataset, ClipDataset):
        return Artifact(f"data-{config.source}", "dataset", asdict(config))
    index = (dataset.folder / INDEX).absolute()
    about = {name: value for name, value in dataset.index.items() if not isinstance(value, list)}
    about |= {"folder": str(index.parent), "clips": len(dataset.clips), "window": dataset.window}
    identity = {"index_sha256": hashlib.sha256(index.read_bytes()).hexdigest()}
    return Artifact(f"data-{dataset.folder.absolute().name}", "dataset", identity, about, reference=index)


def weights_artifact(path: Path) -> Artifact:
    """Weights, a file or a folder of them, by a digest of their content, with their card and without themselves."""
    files, card = sorted(path.glob("*.safetensors")) if path.is_dir() else [path], path.with_suffix(".md")
    identity = {"sha256_of_pieces": digest(files), "bytes": sum(file.stat().st_size for file in files)}
    return Artifact(path.name.removesuffix(".safetensors"), "model", identity, {"path": str(path.absolute())}, [card] * card.is_file())


def exported_artifacts(path: Path, *, figures: Mapping[str, float], whole: bool) -> list[Artifact]:
    """Exported weights with the figures of their last steps and, if `whole`, the file itself, apart so that the former stay equal where
    others use them."""
    exported = weights_artifact(path)
    exported = replace(exported, metadata={**exported.metadata, **figures})
    return [exported, *[Artifact(f"{exported.name}-file", "weights", exported.identity, files=[path])] * whole]


def evaluation_artifact(name: str, figures: Mapping[str, Any], folder: str = "") -> Artifact:
    """An evaluation: its figures, and the contact sheets and videos in a folder."""
    media = [path for path in sorted(Path(folder).glob("*")) if path.suffix in (".png", ".mp4")] if folder else []
    return Artifact(f"{name}-evaluation", "evaluation", json.loads(json.dumps(figures)), files=media)


def digest(files: Sequence[Path]) -> str:
    """SHA-256 of names' order and content; of a file above 16 MiB, of its size and pieces at equal distances, which takes no time."""
    found = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        found.update(str(size).encode())
        with path.open("rb") as file:
            for number in range(PIECES):
                file.seek(number * max(PIECE, (size - PIECE) // (PIECES - 1)))
                found.update(file.read(PIECE))
    return found.hexdigest()
