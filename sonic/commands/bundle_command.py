"""The command bundle: copy exported weights and their card into the package."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sonic.checkpoint.bundled import BUNDLED, weight_files
from sonic.checkpoint.header import read_header
from sonic.cli import Entry, launch
from sonic.config import CommandConfig, ModelConfig, option, require
from sonic.system.files import written_temporary
from sonic.system.run_folder import Run

log = logging.getLogger("sonic")


@dataclass
class BundleConfig(CommandConfig):
    """Copy exported weights and their card into the package, where commands find them without a path."""

    source: str = option("", "the .safetensors file that a training exported, with its card beside it")
    overwrite: bool = option(False, "replace what the package has under that name")


ENTRY = Entry(
    "bundle", BundleConfig, collections=(), location=lambda config: ("runs", "bundle"), example="source=runs/NAME/FILE.safetensors"
)


def bundle(config: BundleConfig, run: Run) -> None:
    """Check that the weights fit those in the package, then copy them. Their name is that of their model and what they are of it."""
    from sonic.checkpoint.tensor_files import weights_hash  # imports torch, so only after the command line is checked

    source, header, made_with = Path(config.source), read_header(config.source), {}
    target, card = BUNDLED / source.name, source.parent / f"{source.stem}.md"
    require(source.is_file() and card.is_file(), f"source={source}: name a file that a training exported, with its card beside it")
    if header:
        fault = "the package has whole weights that are not distilled, and students that are adapters"
        require(bool(header.base) == bool(header.sampler), f"source={source} cannot be bundled: {fault}")
        files = weight_files(ModelConfig(name=header.model["name"], family=header.model["family"]))
        target = BUNDLED / f"{header.model['name']}_{header.sampler['sample_steps']}step.safetensors" if header.base else files.dit
        known = header.encoders.get("autoencoder_hash"), header.encoders.get("speech_hash"), header.base_hash
        made_with = dict(zip((files.autoencoder, files.speech, files.dit), known, strict=True))
    require(bool(header) or target.exists(), f"source={source} does not say what it is, and the package has no {target.name}")
    for file, wanted in made_with.items():
        found = weights_hash(file) if wanted else wanted
        fault = f"source={source} was trained with a {file.stem} of hash {wanted}, the package's has {found}; train it on that"
        require(found == wanted, fault)
    require(config.overwrite or not target.exists(), f"the package has {target.name} already; add overwrite=true to replace it")
    for suffix in (".safetensors", ".md"):
        with written_temporary(target.with_suffix(suffix)) as partial_copy:
            shutil.copyfile(source.with_suffix(suffix), partial_copy)
    log.info("%s", target)


main = partial(launch, ENTRY, bundle)
