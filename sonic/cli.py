"""From a command line to a job: hydra's config groups, typed configs, errors in one sentence, ranks and the run folder.

Nothing that takes long to import is imported here, so that `--help` and errors in options are printed at once.
"""

from __future__ import annotations

import atexit
import dataclasses
import difflib
import logging
import os
import re
import shlex
import signal
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import reduce

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from sonic.config import OtherRank, Ranks, closest_first, help_of, unknown_choice
from sonic.option_names import FILES, OUTPUTS, SHORT, SYNONYMS
from sonic.system.allocator import keep_freed_memory
from sonic.system.caches import make_room_for_caches
from sonic.system.files import check_writable
from sonic.system.out_of_memory import out_of_memory
from sonic.system.paths import expanded, printable
from sonic.system.program import data_root, written
from sonic.system.run_folder import Run, start_logging
from sonic.system.stdio import StopSignal, exit_code_of, failure_of_stdout, interrupt_on_signals, keep_streams_usable

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
USER_ERROR, FAULT = 2, 1

Job = Callable[[typing.Any, Run], int | None]  # (config, run) -> exit code, None = 0

log = logging.getLogger("sonic")


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


def launch(entry: Entry, job: Job, argv: Sequence[str] | None = None) -> typing.NoReturn:
    """Run `job(config, run)` with the config of the command line, or of `argv`, and end the process with its exit code."""
    interrupt_on_signals()
    keep_streams_usable()
    make_room_for_caches()
    keep_freed_memory()
    code = run_command(entry, job, sys.argv[1:] if argv is None else argv)
    if ranks_here().world > 1:
        # without Python's own teardown, during which threads of the connections between ranks sometimes abort the process
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def run_command(entry: Entry, job: Job, argv: Sequence[str]) -> int:
    """The exit code of a command: the job's, or 2 for an error of the user, with one sentence on stderr and no files left behind."""
    ranks = ranks_here()
    start_logging(main=ranks.rank == 0)
    run = config = None
    try:
        if {"--help", "-h"} & set(argv):
            return _answer(help_text(entry, [item for item in argv if item not in ("--help", "-h", "--cfg")]))
        config = compose(entry, [item for item in argv if item != "--cfg"])
        resolved = yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)
        if "--cfg" in argv:
            return _answer(resolved)
        for option in OUTPUTS:
            if path := getattr(config, option, ""):
                check_writable(path, option)
        if ranks.world > entry.max_ranks:
            raise ValueError(f"{ranks.world} ranks were started but this job runs on {entry.max_ranks}; leave --nproc-per-node out")
        command = [printable(word) for word in (*shlex.split(written(entry.command or entry.name)), *argv)]
        run = Run(entry.location(config), resolved, command=command, root=ROOT, ranks=ranks)
        return job(config, run) or 0
    except (ValueError, OSError) as error:
        if ranks.rank and run:  # the first rank may know nothing of it
            log.critical("rank %d: %s", ranks.rank, _sentence(error))
        return _given_up(_sentence(error), USER_ERROR)
    except OtherRank as error:
        return _given_up(str(error), FAULT)
    except KeyboardInterrupt as stop:
        code = stop.code if isinstance(stop, StopSignal) else exit_code_of(signal.SIGINT)
        return _given_up(f"stopped; {'what was finished stays' if run and run.kept else 'nothing was kept'}", code)
    except Exception as error:
        sentence = out_of_memory(error, entry.would_help if run else "", config, ranks)
        fault = sentence or "a fault of the program, not of the input"
        log.critical("rank %d: %s", ranks.rank, printable(fault), exc_info=not sentence or "SONIC_DEBUG" in os.environ)
        return FAULT
    finally:
        if run:
            run.close()


def _answer(text: str) -> int:
    """Print the text on stdout and give exit code 0. Raises OSError when it cannot be written completely."""
    sys.stdout.write(text)
    if failure := failure_of_stdout():
        raise failure
    return 0


def ranks_here() -> Ranks:
    """The rank of this process among those that torchrun started; a single one without torchrun."""
    names = ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)
    return Ranks(*(int(os.environ.get(name, alone)) for name, alone in names))


def compose(entry: Entry, argv: Sequence[str], form: Callable[[DictConfig], typing.Any] = OmegaConf.to_object) -> typing.Any:
    """The typed config of a command line, or another form of it. Raises ValueError with one sentence and the choices for every error."""
    selections, values = _split(entry, argv)
    store = ConfigStore.instance()
    store.store(name=f"{entry.name}_schema", node=entry.schema)
    for group, members in entry.variants.items():
        for name, schema in members.items():
            store.store(group=group, name=f"{name}_schema", node=schema)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            raw = hydra_compose(entry.name, overrides=[_recipes(), *selections])
        for key, text in values.items():
            _assign(raw, key, text, kind=entry_options(entry)[key][0])
        return form(raw)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(_reworded(entry, error)) from error


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
    """The config groups of a command with their choices: collections first, then the fields of the schema that have a folder."""
    names = [*entry.collections, *(field.name for field in dataclasses.fields(entry.schema))]
    return {name: found for name in names if (found := group_choices(name))}


def help_text(entry: Entry, argv: Sequence[str] = ()) -> str:
    """The text of `--help`: usage, choices, and every option of what `argv` chooses, with the value that it has there."""
    values = compose(entry, argv, form=OmegaConf.to_container)
    command = written(entry.command or entry.name)
    lines = [
        (entry.schema.__doc__ or "").strip(),
        "",
        f"usage: {command} [choice=name ...] [option=value ...]     --cfg shows the config and stops",
        *([f"example: {command} {entry.example}"] if entry.example else []),
        "",
        "choices:",
        *(f"  {name + '=' + '|'.join(found)}" for name, found in groups(entry).items()),
        "",
        f"options of {' '.join(argv) or 'the plain command'} and their values:",
    ]
    for name, (_, field) in entry_options(entry).items():
        *inside, last = name.split(".")
        group = reduce(lambda found, part: found.get(part, {}), inside, values)
        if last in group:
            assignment = f"{name}={_typed(group[last])}"
            lines.append(f"  {assignment:<44} {help_of(field)}".rstrip())
    lines += [f"  {group}=NAME --help lists those of another {group}" for group in entry.variants]
    short = [f"{short} for {full}" for short, full in SHORT.items() if full in entry_options(entry)]
    return "\n".join([*lines, "", *([f"short: {', '.join(short)}", ""] if short else [])])


def _typed(value: typing.Any) -> str:
    """A value as it is typed on the command line."""
    return str(value).lower() if isinstance(value, bool) else "" if value is None else str(value)


def _split(entry: Entry, argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The choices of config groups as hydra's overrides, and the options with their texts; of repeated ones the last counts."""
    selections: dict[str, str] = {}
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
        if key in chooseable:
            if text not in chooseable[key]:
                raise ValueError(unknown_choice(text, chooseable[key], key))
            selections[key] = f"{'+' if key in entry.collections else ''}{key}={text}"
        elif key in known:
            values[key] = text
        else:
            raise ValueError(_unknown_key(entry, key))
    if "sampler" in chooseable and not {"preset", "sampler"} & set(selections):
        selections |= _own_sampler(selections.get("model", ""))
    for key in entry.collections:
        if key in selections and (ROOT / "conf" / key / (name := selections[key].partition("=")[2])).is_dir():
            selections[key] += "/" + _for_model(key, name, selections.get("model", ""))
    return list(selections.values()), values


def _for_model(key: str, name: str, selection: str) -> str:
    """The model whose file a choice with one file per model uses. Raises ValueError with that file's reason when it refuses the model."""
    model = selection.partition("=")[2] or DEFAULT_MODEL
    refused = (yaml.safe_load((ROOT / "conf" / key / name / f"{model}.yaml").read_text()) or {}).get("refused")
    if refused:
        raise ValueError(f"{key}={name} does not go with model={model}: {refused}")
    return model


def _own_sampler(selection: str) -> dict[str, str]:
    """The choice of the sampler that a model is published with, from its standard preset; empty for the default model and for models
    without presets.

    The default sampler has four steps and no guidance, which gives bad videos with other models.
    """
    model = selection.partition("=")[2] or DEFAULT_MODEL
    file = ROOT / "conf/preset" / PUBLISHED_PRESET / f"{model}.yaml"
    if model == DEFAULT_MODEL or not file.is_file():
        return {}
    defaults = (yaml.safe_load(file.read_text()) or {}).get("defaults", [])
    chosen = [each["override /sampler"] for each in defaults if "override /sampler" in each]
    return {"sampler": f"sampler={chosen[0]}"} if chosen else {}


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
    first = str(error).split("full_key:")[0]
    return " ".join(f"{found[1]}: {first}".split() if found else str(error).split())


def _sentence(error: Exception) -> str:
    """The message of an error, on one line."""
    if isinstance(error, OSError) and error.strerror:
        return printable(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
    return printable(" ".join(str(error).split())) or type(error).__name__


def _given_up(sentence: str, code: int) -> int:
    log.debug("where it happened", exc_info=True)
    log.error(sentence, exc_info="SONIC_DEBUG" in os.environ)
    return code
