"""One film or a file of them: parts under a plan, requests shared out among copies of the model, and who could not be served."""

from __future__ import annotations

import dataclasses
import json
import logging
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from sonic.config import Ranks
from sonic.data.video import check_output
from sonic.infer.build import Parts, ReadyParts, build_parts, find_device
from sonic.infer.painted import read_ahead
from sonic.infer.pipeline import generate
from sonic.infer.planning import Forecast, forecast
from sonic.infer.ranks import shutdown, worker_loop
from sonic.infer.report import Clock, Result, Watch, sampling_of, sampling_words
from sonic.infer.scene import Settings, open_scene
from sonic.infer.settings import InferConfig, RequestConfig
from sonic.parallel.distributed import context_of
from sonic.parallel.mesh import World, open_world
from sonic.parallel.vae_rank import serve_vae
from sonic.types import Scene

log = logging.getLogger("sonic.infer")


class Outcome(NamedTuple):
    """What became of a request: its line in the file, and a result or the sentence that says why there is none."""

    line: int
    result: Result | None = None
    fault: str = ""


class Opened(NamedTuple):
    """The parts of this rank, its place among the ranks, the plan they run under, and the folder of the job's films."""

    parts: Parts | ReadyParts
    world: World
    forecast: Forecast
    folder: Path

    def output_of(self, line: int) -> Path:
        """The film of a request that names none."""
        return self.folder / f"{line:04d}.mp4"


@contextmanager
def open_parts(config: InferConfig, ranks: Ranks, *, folder: Path = Path()) -> Iterator[Opened]:
    """The parts of this rank, under the plan that fits. Ranks that do not lead come back when all is done.

    All ranks use the first one's `folder`: without a name it is called after the time, which each of them sees differently.
    """
    device = find_device(config.run.device, ranks.local_rank if ranks.world > 1 else None)
    found = forecast(config, ranks, device)
    parallel = replace(found.parallel, replicas=config.parallel.replicas)
    with open_world(parallel, parallel.name, ranks, device=device) as world:
        context, folder = context_of(world, parallel), world.said_by_first(folder)
        parts = build_parts(config.model, config.run, steps=config.sampler.sample_steps, context=context)
        if world.keeps_vae:
            serve_vae(parts.autoencoder, context.vae_channel)
        elif not world.leads:
            worker_loop(parts.model, context, parts.dtype)
        yield Opened(parts, world, found, folder)
        if world.leads:
            shutdown(context)
        found.measure(world)


def announce(opened: Opened, config: InferConfig) -> None:
    """Log which noise levels and weights the films of this job are made with."""
    log.info("%s", sampling_words(sampling_of(config.sampler, opened.parts.weights, opened.parts.dtype)))


def checked_scene(config: InferConfig) -> Scene:
    """The scene of a request, once it is known that its film can be written."""
    scene = open_scene(config)
    height, width = scene.portrait.pixels.shape[:2]
    if config.output:
        check_output(config.output, width, height, num_frames=scene.num_frames, fps=scene.fps)
    return scene


def make_film(scene: Scene, parts: Parts | ReadyParts, config: InferConfig, *, output: Path, clock: Clock) -> tuple[Result, Watch]:
    """One film, and what was seen of it on its way."""
    if config.prompt and config.model.autoencoder == "warp":
        log.warning("prompt is not read: the preview was trained without text")
    watch = Watch(scene)
    return generate(scene, parts, Settings.of(config), output=output, clock=clock, watch=watch), watch


def make_films(requests: Sequence[tuple[int, str]], opened: Opened, config: InferConfig) -> list[Outcome]:
    """The films of this copy of the model, the bad requests (line number, text) among them left out; what became of them.

    A film that is there already is not made again. Outputs without a name lie in the job's folder, numbered by line.
    """
    mine: list[Outcome] = []
    parts, world = opened.parts, opened.world
    copies, place = world.size("dp_replicate"), world.place("dp_replicate")
    share = requests[place::copies] if world.leads else ()
    if isinstance(parts, ReadyParts):
        read_ahead(parts, _prompts(share, opened, config))
    for line, text in share:
        try:
            wanted = _request(text, config, opened.output_of(line))
            if Path(wanted.output).exists():
                log.info("line %d: %s is there already", line, wanted.output)
                continue
            result, _ = make_film(checked_scene(wanted), parts, wanted, output=Path(wanted.output), clock=Clock())
            mine.append(Outcome(line, result))
            log.info("line %d: %s", line, result.summary())
        except (ValueError, OSError) as error:
            mine.append(Outcome(line, fault=" ".join(str(error).split())))
            log.warning("line %d: %s", line, mine[-1].fault)
    return mine


def _prompts(requests: Sequence[tuple[int, str]], opened: Opened, config: InferConfig) -> Iterator[str]:
    """What the films that are still to be made are told; bad requests tell nothing."""
    for line, text in requests:
        with suppress(ValueError, OSError):
            wanted = _request(text, config, opened.output_of(line))
            if not Path(wanted.output).exists():
                yield wanted.prompt
                if wanted.sampler.sample_guide_scale != 1:
                    yield wanted.sampler.negative_prompt


def all_outcomes(mine: Sequence[Outcome], opened: Opened) -> list[Outcome]:
    """What became of the requests of all copies, in the order of the lines. Every rank must ask; no film is made after it."""
    found, world = [list(mine)], opened.world
    if world.leads:
        shutdown(opened.parts.context)
    if world.mesh is not None:
        found = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(found, list(mine))
    return sorted((outcome for some in found for outcome in some), key=lambda outcome: outcome.line)


def read_requests(path: str) -> list[tuple[int, str]]:
    """Lines of a file of requests that are not empty, each with its number."""
    lines = [(number, line) for number, line in enumerate(Path(path).read_text().splitlines(), start=1) if line.strip()]
    if not lines:
        raise ValueError(f'requests={path} holds no request; write one JSON object per line, such as {{"image": "me.jpg"}}')
    return lines


def _request(text: str, config: InferConfig, output: Path) -> InferConfig:
    """The config of one line: what the line says, and for the rest what the command line says."""
    kinds = typing.get_type_hints(RequestConfig)
    known = [field.name for field in dataclasses.fields(RequestConfig)]
    try:
        told = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"the line is not JSON ({error}); write an object with some of: {', '.join(known)}") from error
    strange = [name for name in told if name not in known] if isinstance(told, dict) else [text[:40]]
    if strange:
        raise ValueError(f"{strange[0]} is not known in a request; use: {', '.join(known)}")
    for name, value in told.items():
        if type(value) is not kinds[name]:
            raise ValueError(f"{name}={json.dumps(value)} is {type(value).__name__}; a request needs {kinds[name].__name__} there")
    return dataclasses.replace(config, **{**told, "output": told.get("output") or str(output)})
