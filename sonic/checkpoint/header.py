"""What a training writes about its model into the header of a weights file, and the options that commands take from there.

The header of a safetensors file is JSON, so nothing here needs torch. Its values are taken and checked like options of a command line.
"""

from __future__ import annotations

import json
import logging
import os
import typing
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sonic.checkpoint.bundled import IN_PACKAGE, named_weights
from sonic.config import ModelConfig, require

KEY, FORMAT = "sonic", 1  # the key in a file's metadata, and the version of what is written there
LENGTH_BYTES, LONGEST = 8, 100_000_000  # of a header's length; the longest header that safetensors reads
RUN_OPTIONS = ("model.rollout.", "model.resolution", "model.speech_weights")  # of running a model: a user may change them

log = logging.getLogger("sonic")


@dataclass(frozen=True)
class Header:
    """What a weights file says of itself.

    `model` are the fields of its ModelConfig, `sampler` those that a student was distilled for ({} for others), and `encoders` the
    hashes of the encoders whose latents it learnt. With a `base`, the file holds adapters for the weights of that name: "bundled:NAME" in
    the package, or a path from the file's folder.
    """

    model: dict
    objective: str
    minutes: float
    sampler: dict
    encoders: dict
    base: str = ""
    base_hash: str = ""

    def metadata(self) -> dict[str, str]:
        """The entry of a safetensors file's metadata."""
        return {KEY: json.dumps({"format": FORMAT, **asdict(self)})}


def model_fields(config: ModelConfig) -> dict[str, Any]:
    """The fields of a config that describe the model, without the files of its weights."""
    fields = {name: value for name, value in asdict(config).items() if name not in ("weights", "lora", "speech_weights")}
    return fields | ({"speech_weights": os.path.abspath(config.speech_weights)} if config.speech_weights else {})


def read_header(path: str | Path) -> Header | None:
    """What a weights file says of itself; None for files that say nothing, as older ones and those of other programs.

    Raises ValueError when another version wrote it, or it is damaged.
    """
    if not Path(path).is_file():
        return None
    try:
        with Path(path).open("rb") as file:
            length = int.from_bytes(file.read(LENGTH_BYTES), "little")
            found = dict(json.loads(json.loads(file.read(length if length <= LONGEST else 0))["__metadata__"][KEY]))
    except (ValueError, KeyError, TypeError, RecursionError):
        return None  # what reads the tensors says what is wrong with a damaged file
    version, kinds = found.pop("format", None), typing.get_type_hints(Header)
    require(version == FORMAT, f"{path}: its header has format {version}, this version of the program reads {FORMAT}; export it again")
    wrong = [name for name in {**kinds, **found} if name not in kinds or not isinstance(found.get(name), kinds[name])]
    require(not wrong, f"{path}: {', '.join(wrong)} in its header is damaged; export the weights again")
    return Header(**found)


def carried_options(config: Mapping[str, Any], given: Collection[str]) -> dict[str, str]:
    """The options that the weights named in a command's config bring along, as texts of a command line.

    `config` has the values of all options, `given` the names of options and choices on the command line. A file of adapters named as
    weights becomes model.lora.path on its base. Raises ValueError when an option on the command line contradicts a file.
    """
    model = config.get("model") or {}
    if "weights" not in model or "lora" not in model:
        return {}
    weights, lora, options = model["weights"], model["lora"]["path"], {}
    header, adapter = read_header(weights), read_header(lora)
    if header and header.base:
        require(not lora, f"model.weights={weights} holds adapters, and so does model.lora.path={lora}; leave one of them out")
        lora, weights, adapter, header = weights, _base(weights, header), header, None
        options = {"model.weights": weights, "model.lora.path": lora}
        log.info("%s holds adapters: they are added to %s", lora, weights)
    elif adapter and adapter.base and not weights:
        options = {"model.weights": _base(lora, adapter)}
    path, described = (weights, header) if header else (lora, adapter)
    if described:
        options |= _of_model(path, described, config, given=given)
    elif "init_from" in given and (started := read_header(config["init_from"])):
        found = _of_model(config["init_from"], started, config, given=())
        options |= {key: text for key, text in found.items() if not {key, "model"} & {*given}}
    if "sampler" in config and "sampler" not in given and (distilled := adapter or header):
        steps = {f"sampler.{name}": _text(value) for name, value in distilled.sampler.items() if name in config["sampler"]}
        steps = {key: text for key, text in steps.items() if key not in given}
        if steps:
            log.info("%s was distilled for these steps: %s", lora or weights, " ".join(f"{name}={value}" for name, value in steps.items()))
        options |= steps
    return options


def _of_model(path: str, header: Header, config: Mapping[str, Any], *, given: Collection[str]) -> dict[str, str]:
    """The options of the model in a file that differ from the config's. Raises ValueError when one of those was given."""
    found, present = {}, dict(_flat(config["model"], "model."))
    for key, value in _flat(header.model, "model."):
        known = key in present and not key.startswith(("model.weights", "model.lora."))
        require(known, f"{path}: its header sets {key}, which is no option of a model here; export the weights again")
        ours = present[key]
        named = key == "model.name" and "model" in given  # a name alone changes nothing
        if ours == value or named or (key in given and key.startswith(RUN_OPTIONS)):
            continue
        asked = key if key in given else "model" if "model" in given else ""
        require(not asked, f"{key}={ours} contradicts {path}, which holds a model with {key}={value}; leave {asked}= out")
        found[key] = _text(value)
    return found


def _base(path: str, header: Header) -> str:
    """The weights that the adapters in a file are for. Raises ValueError when they are not where the file says."""
    base = named_weights(header.base) if header.base.startswith(IN_PACKAGE) else Path(os.path.normpath(Path(path).parent / header.base))
    way_out = f"name their place: weights=FILE model.lora.path={path}"
    require(base.exists(), f"{path} holds adapters for {base} (hash {header.base_hash}), which does not exist; {way_out}")
    return str(base)


def _flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """(full name, value) of all fields of nested ones."""
    for name, value in values.items():
        yield from _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]


def _text(value: Any) -> str:
    """A value as written on the command line."""
    return value if isinstance(value, str) else json.dumps(value)
