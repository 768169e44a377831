"""From the words of a command line to a typed config: hydra's config groups, files of one's own, and errors in one sentence."""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import reduce
from pathlib import Path

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from sonic.checkpoint.header import carried_options, read_header
from sonic.option_names import FILES, SHORT, SYNONYMS
from sonic.plugins import load_plugins
from sonic.registry import closest_first, unknown_choice
from sonic.system.paths import expanded
from sonic.system.program import data_root

ROOT = data_root()
KINDS = {  # types of options in words; those of others are "of the right kind"
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list[int]: "a list of whole numbers such as [1,2,3]",
    list[float]: "a list of numbers such as [1,2,3]",
    list[str]: "a list of words such as [a,b]",
}
DEFAULT_MODEL, PUBLISHED_PRESET = "preview", "standard"
RECIPE, OWN_FILE = "recipe", "own_file"  # the choice that stands for a command's collections; hydra's name of a file from anywhere


class _Texts(yaml.BaseLoader):
    """A YAML loader of lists whose items stay text, with any characters: a file name may have bytes that are not UTF-8."""

    NON_PRINTABLE = re.compile("\0")


@dataclasses.dataclass(frozen=True)
class Entry:
    """A command: its YAML file `name` in conf/, its schema, and its config groups.

    `collections` are groups whose files override the whole config (preset=NAME); `variants` has the schemas of groups whose members
    have different options (objective: {flow_match: FlowMatchConfig}); `rewrite` turns its arguments into options; `location` gives the
    (folder, name) of a config's run; `example` is an example of the command's arguments; `would_help` is the import path of a function
    that says what would need less memory, by (config, ranks, the error of memory that ran out).
    """

    name: str
    schema: type
    collections: tuple[str, ...] = ("preset",)
    variants: Mapping[str, Mapping[str, type]] = dataclasses.field(default_factory=dict)
    rewrite: Callable[[list[str]], list[str]] = list
    location: Callable[[typing.Any], tuple[str, str]] = lambda config: (config.run.folder, config.run.name)
    max_ranks: int = 1
    example: str = ""
    command: str = ""  # the command that it is a form of, where that has another name
    would_help: str = ""


class Chosen(typing.NamedTuple):
    """A command line in parts: hydra's overrides, the files of one's own by config group, and the options with their texts."""

    overrides: list[str]
    files: dict[str, Path]
    values: dict[str, str]


def compose(entry: Entry, argv: Sequence[str]) -> typing.Any:
    """The typed config of a command line. Raises ValueError with one sentence and the choices for every error in it."""
    return _composed(entry, argv, OmegaConf.to_object)


def plain_values(entry: Entry, argv: Sequence[str]) -> dict[str, typing.Any]:
    """The values of all options of a command line in nested dictionaries, before their checks. Raises ValueError as `compose` does."""
    return _composed(entry, argv, OmegaConf.to_container)


def _composed(entry: Entry, argv: Sequence[str], form: Callable[[DictConfig], typing.Any]) -> typing.Any:
    """A form of the config of a command line."""
    load_chosen_plugins(entry, argv)
    chosen = _split(entry, argv)
    store = ConfigStore.instance()
    store.store(name=f"{entry.name}_schema", node=entry.schema)
    for group, members in entry.variants.items():
        for name, schema in members.items():
            store.store(group=group, name=name, node=schema)
    for group, file in chosen.files.items():
        store.store(group=group, name=OWN_FILE, node=read_config(file), package="_global_" if group in entry.collections else None)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            raw = hydra_compose(entry.name, overrides=[_recipes(), *chosen.overrides])
        for key, text in chosen.values.items():
            _assign(raw, key, text, kind=entry_options(entry)[key][0])
        given = {*chosen.values, *(item.lstrip("+").partition("=")[0] for item in argv)}
        for key, text in carried_options(OmegaConf.to_container(raw), given).items():
            _assign(raw, key, text, kind=entry_options(entry)[key][0])
        load_plugins(raw.plugins)  # those of a recipe that the chosen one is based on
        return form(raw)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(_in_file(_reworded(entry, error), entry, chosen)) from error
    except ValueError as error:
        raise ValueError(_in_file(str(error), entry, chosen)) from error


def load_chosen_plugins(entry: Entry, argv: Sequence[str]) -> None:
    """Import the modules that plugins= names on the command line, or else in the chosen recipes, before any name is checked.

    Raises ValueError for a module or a file that cannot be read.
    """
    chosen = dict(item.lstrip("+").partition("=")[::2] for item in argv)
    if "plugins" in chosen:
        load_plugins(typed_values(entry.schema, {"plugins": _as_list(chosen["plugins"])})["plugins"])
        return
    recipes = [_collection(entry, key, chosen[key]) for key in (RECIPE, *entry.collections) if entry.collections and key in chosen]
    for group, text in recipes:
        ours = (ROOT / place / group / f"{text}.yaml" for place in ("conf", "recipes"))
        for file in [own] if (own := own_file(text)) else filter(Path.is_file, ours):
            given = read_config(file).get("plugins") or []
            load_plugins([given] if isinstance(given, str) else [str(name) for name in given])


def own_file(choice: str) -> Path | None:
    """The file that the choice of a config group names; None for a name in conf/ or recipes/."""
    return Path(expanded(choice)) if choice.endswith((".yaml", ".yml")) else None


def read_config(file: Path) -> DictConfig:
    """The options in a YAML file. Raises ValueError, which names the file, when it is missing or is none."""
    try:
        config = OmegaConf.load(file)
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}; a file is looked for in the current folder, {Path.cwd()}") from error
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no YAML: {error}") from error
    if not isinstance(config, DictConfig):
        raise ValueError(f"{file} holds no options; write lines such as name: mine")
    return config


def typed_values(schema: type, texts: Mapping[str, str]) -> dict[str, typing.Any]:
    """The values of options that are written as on the command line. Raises ValueError for one that is not of its option's type."""
    raw = OmegaConf.structured(schema)
    for key, text in texts.items():
        _assign(raw, key, text, kind=config_options(schema)[key][0])
    plain = OmegaConf.to_container(raw, resolve=True)
    return {key: reduce(dict.__getitem__, key.split("."), plain) for key in texts}


def _recipes() -> str:
    """The override that makes hydra search recipes/ too."""
    location = f"file://{ROOT / 'recipes'}".replace("\\", "\\\\").replace("'", r"\'")
    return f"hydra.searchpath=['{location}']"


def config_options(schema: type, prefix: str = "") -> dict[str, tuple[typing.Any, dataclasses.Field]]:
    """All options of a schema in order: full name -> (type, field)."""
    found = {}
    kinds = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        kind = kinds[field.name]
        inner = config_options(kind, f"{prefix}{field.name}.") if dataclasses.is_dataclass(kind) else {prefix + field.name: (kind, field)}
        found |= inner
    return found


def entry_options(entry: Entry) -> dict[str, tuple[typing.Any, dataclasses.Field]]:
    """All options of a command, including those of all variants of a group."""
    found = config_options(entry.schema)
    for group, members in entry.variants.items():
        for schema in members.values():
            found |= config_options(schema, f"{group}.")
    return found


def group_choices(group: str) -> list[str]:
    """The choices of a config group in conf/ and recipes/: YAML files, and folders with a file for each model."""
    found = [path for location in ("conf", "recipes") for path in (ROOT / location / group).glob("*")]
    return sorted({path.stem for path in found if path.suffix == ".yaml" or path.is_dir()})


def groups(entry: Entry) -> dict[str, list[str]]:
    """The config groups of a command with their choices: collections first, then fields of the schema that have variants or a folder."""
    names = [*entry.collections, *(field.name for field in dataclasses.fields(entry.schema))]
    return {name: found for name in names if (found := sorted(entry.variants.get(name, ())) or group_choices(name))}


def _split(entry: Entry, argv: Sequence[str]) -> Chosen:
    """The parts of a command line; of repeated choices and options the last counts."""
    choices: dict[str, str] = {}
    values: dict[str, str] = {}
    known, chooseable = entry_options(entry), groups(entry)
    for item in entry.rewrite(argv):
        key, equals, text = item.lstrip("+").partition("=")
        if key not in known and SHORT.get(key) in known:
            key = SHORT[key]
        if not equals or item.startswith("-"):
            word = key.strip("- ").partition(" ")[0]
            name = next((name for name in known if name.rpartition(".")[2] == word), [*_meant(word, [*known]), *known][0])
            raise ValueError(f"{item} is not understood; write option=value such as {name}=..., or --help for all of them")
        if key == RECIPE and entry.collections:
            key, text = _collection(entry, key, text)
        if key in chooseable:
            if text not in chooseable[key] and not own_file(text):
                raise ValueError(f"{unknown_choice(text, chooseable[key], key)}; or name a file, {key}=FILE.yaml")
            choices[key] = text
        elif key in known:
            values[key] = _as_list(text) if key == "plugins" else text
        else:
            raise ValueError(_unknown_key(entry, key))
    carried = read_header(expanded(values.get("model.weights", "")))
    if carried and "model" not in choices and (name := carried.model.get("name")) in chooseable.get("model", ()):
        choices["model"] = name  # with the sampler and the presets of that model
    model = _published(choices.get("model", DEFAULT_MODEL))
    if "sampler" in chooseable and not {"preset", "sampler"} & set(choices):
        choices |= _own_sampler(model)
    for key in entry.collections:
        if key in choices and (ROOT / "conf" / key / choices[key]).is_dir():
            choices[key] += "/" + _for_model(key, choices[key], model)
    files = {group: file for group, text in choices.items() if (file := own_file(text))}
    names = {group: OWN_FILE if group in files else text for group, text in choices.items()}
    return Chosen([f"{'+' if group in entry.collections else ''}{group}={name}" for group, name in names.items()], files, values)


def _collection(entry: Entry, key: str, text: str) -> tuple[str, str]:
    """The collection of a recipe, and the recipe: recipe=NAME is of the collection that has it, recipe=FILE.yaml of the first."""
    if key == RECIPE:
        key = next((group for group in entry.collections if text in group_choices(group)), entry.collections[0])
    return key, text


def _as_list(text: str) -> str:
    """One word or several as a list on the command line: plugins=a,b is plugins=[a,b]."""
    return text if text.startswith("[") else f"[{text}]"


def _published(model: str) -> str:
    """The model in conf/model whose presets a choice of a model uses: for a file, that on which it is based; "" without one."""
    based_on = read_config(file).get("defaults", []) if (file := own_file(model)) else [model]
    return next((name for name in based_on if name in group_choices("model")), "")


def _for_model(key: str, name: str, model: str) -> str:
    """The model, if a choice with one file per model has a file for it. Raises ValueError without, or with that file's refusal."""
    file = ROOT / "conf" / key / name / f"{model}.yaml"
    if not file.is_file():
        raise ValueError(f"{key}={name} has no options for this model; leave it out, or base the model's file on a published one")
    refused = read_config(file).get("refused")
    if refused:
        raise ValueError(f"{key}={name} does not go with model={model}: {refused}")
    return model


def _own_sampler(model: str) -> dict[str, str]:
    """The choice of the sampler that a model is published with, from its standard preset; empty for the default model and for models
    without presets.

    The default sampler has four steps and no guidance, which gives bad videos with other models.
    """
    file = ROOT / "conf/preset" / PUBLISHED_PRESET / f"{model}.yaml"
    if model == DEFAULT_MODEL or not file.is_file():
        return {}
    chosen = [each["override /sampler"] for each in read_config(file).get("defaults", []) if "override /sampler" in each]
    return {"sampler": chosen[0]} if chosen else {}


def _in_file(sentence: str, entry: Entry, chosen: Chosen) -> str:
    """The sentence of an error, with the file of one's own where the option that it begins with is set."""
    for group, file in chosen.files.items():
        sentence = sentence.replace(f"'{group}/{OWN_FILE}'", str(file))
    key = re.match(r"[\w.]*", sentence)[0].rstrip(".")
    for group, file in chosen.files.items():
        inside = f".{key}" if group in entry.collections else key.removeprefix(group)
        if inside.startswith(".") and key not in chosen.values and OmegaConf.select(read_config(file), inside[1:]) is not None:
            return f"{file}: {sentence}"
    return sentence


def _unknown_key(entry: Entry, key: str) -> str:
    """The error message for an unknown option: the options of its group, or else similar options, then those at the top level."""
    known = list(entry_options(entry))
    inside = [name for name in known if name.startswith(f"{key}.")]
    if inside:
        return f"{key} is a group of options; set one of: {', '.join(inside)}"
    head, dot, last = key.rpartition(".")
    beside = [name.removeprefix(f"{head}.") for name in known if dot and name.startswith(f"{head}.")]
    meant = _meant(last, known)
    if beside:
        inside = [name.removeprefix(f"{head}.") for name in meant if name.startswith(f"{head}.")]
        return f"{key} is not an option; {head} has: {', '.join(dict.fromkeys([*inside, *closest_first(last, beside)]))}"
    short = [name for name, full in SHORT.items() if full in known]
    top = list(dict.fromkeys([*groups(entry), *(name if "." not in name else f"{name.partition('.')[0]}.*" for name in known), *short]))
    ends = {name.rpartition(".")[2]: name for name in reversed(known)}
    exact = [ends[last]] if last in ends else []
    close = [ends[end] for end in difflib.get_close_matches(last, ends, n=3, cutoff=0.7)]
    choices = dict.fromkeys([*exact, *meant, *closest_first(key, [*top, *close])])
    return f"{key} is not an option; choose one of: {', '.join(choices)}"


def _meant(word: str, known: Sequence[str]) -> list[str]:
    """Options for which other programs use this word, or nearly this word."""
    close = difflib.get_close_matches(word, SYNONYMS, n=1, cutoff=0.8)
    return [name for end in SYNONYMS.get(close[0] if close else "", ()) for name in known if f".{name}".endswith(f".{end}")]


def _assign(raw: DictConfig, key: str, text: str, *, kind: typing.Any) -> None:
    """Set an option to its text on the command line, converted to the option's type.

    Hydra's own overrides are not used for values: their grammar gives spaces, commas and `=` in file names and prompts a meaning.
    """
    types = typing.get_args(kind)
    if type(None) in types:
        kind = next(each for each in types if each is not type(None))
    try:
        value = text if typing.get_origin(kind) is None else yaml.load(text, _Texts if kind in KINDS else yaml.SafeLoader)
        if type(None) in types and text in ("", "null"):
            value = None
        if isinstance(value, str):
            value = _word(value, key)
        elif isinstance(value, list):
            value = [_word(each, key) if isinstance(each, str) else each for each in value]
        with open_dict(raw) if typing.get_origin(kind) is dict else nullcontext():  # the keys of a dict are its own
            OmegaConf.update(raw, key, value, merge=False)
    except (ConfigKeyError, ConfigAttributeError) as error:
        raise ValueError(f"{key} is no option of the chosen {key.partition('.')[0]}; --cfg shows those it has") from error
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ValueError(f"{key}={text} is not {KINDS.get(kind, 'of the right kind')}") from error


def _word(text: str, key: str) -> str:
    """A text for OmegaConf: a file name with ~ expanded, and no interpolations."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", expanded(text) if key in FILES else text)


def _reworded(entry: Entry, error: Exception) -> str:
    """An error of hydra or OmegaConf about a YAML file, as one sentence with the choices."""
    found = re.search(r"full_key: (\S+)", str(error))
    if found and found[1] not in entry_options(entry):
        return _unknown_key(entry, found[1])
    group = found[1].partition(".")[0] if found else ""
    if having := [name for name, schema in entry.variants.get(group, {}).items() if found[1] in config_options(schema, f"{group}.")]:
        way_out = f"choose a recipe for that {group}, or {group}={having[0]}"
        return f"the recipe sets {found[1]}, which the chosen {group} does not have ({', '.join(having)} does); {way_out}"
    if missing := re.match(r"(In '[^']*': )?Could not \w+ '(\w+)/([^']+)'", str(error)):
        return f"{missing[1] or ''}{unknown_choice(missing[3], group_choices(missing[2]), missing[2])}"
    first = str(error).split("full_key:")[0]
    return " ".join(f"{found[1]}: {first}".split() if found else str(error).split())
