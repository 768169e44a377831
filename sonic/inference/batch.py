"""One film or a file of them: parts under a plan, requests shared out among copies of the model, and who could not be served."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from sonic.config import Ranks
from sonic.data.video import check_output
from sonic.inference.choose_plan import Forecast, forecast
from sonic.inference.components import Parts, ReadyParts, build_parts, find_device
from sonic.inference.distributed_rollout import shutdown, worker_loop
from sonic.inference.generate import generate
from sonic.inference.generate_wan import read_ahead
from sonic.inference.infer_config import InferConfig
from sonic.inference.input_reader import SceneReader
from sonic.inference.inputs import Settings, open_scene, refuse_overwriting
from sonic.inference.report import Clock, Result, Watch, sampling_of, sampling_words
from sonic.inference.requests import Request, all_requests
from sonic.parallel.context import context_of
from sonic.parallel.mesh import World, open_world
from sonic.parallel.vae_rank import serve_vae
from sonic.system.paths import shown
from sonic.types import Scene

log = logging.getLogger("sonic.inference")


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


def checked_scene(config: InferConfig, *written: Path, read: Callable[[InferConfig], Scene] = open_scene) -> Scene:
    """The scene of a request, once it is known that its film can be written, and that neither it nor what else is `written` would
    take the place of an input."""
    refuse_overwriting(config, *([Path(config.output)] if config.output else []), *written)
    scene = read(config)
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

    A film that is there already is not made again. Outputs without a name lie in the job's folder, numbered by line. Whatever goes
    wrong with one line, the others are made, unless ranks that make films together may be out of step afterwards: an error in the
    middle of a film, other than ValueError and OSError, is then raised.
    """
    mine: list[Outcome] = []
    parts, world = opened.parts, opened.world
    copies, place = world.size("dp_replicate"), world.place("dp_replicate")
    share = all_requests(requests, config, opened.output_of)[place::copies] if world.leads else ()
    if isinstance(parts, ReadyParts):
        read_ahead(parts, _prompts(share))
    with closing(SceneReader()) as reader:
        for request in share:
            filming = False
            try:
                if request.wanted is None:
                    raise ValueError(request.fault)
                if os.path.isfile(request.wanted.output):
                    log.info("line %d: %s is there already", request.line, shown(request.wanted.output))
                    continue
                scene = checked_scene(request.wanted, read=reader.open)
                filming = True
                result, _ = make_film(scene, parts, request.wanted, output=Path(request.wanted.output), clock=Clock())
                mine.append(Outcome(request.line, result))
                log.info("line %d: %s", request.line, shown(result.summary()))
            except Exception as error:
                if filming and not _alone(world) and not isinstance(error, ValueError | OSError):
                    raise
                mine.append(Outcome(request.line, fault=_fault(error, request.line)))
    return mine


def _alone(world: World) -> bool:
    """Whether this rank makes its films without others, so that nobody is out of step with it after an error."""
    return world.film is None or world.film.size() == 1


def _fault(error: Exception, line: int) -> str:
    """What is wrong with a line, in one sentence, which is logged; a fault of the program is logged with its traceback."""
    sentence = shown(" ".join(str(error).split())) or type(error).__name__
    if isinstance(error, ValueError | OSError):
        log.warning("line %d: %s", line, sentence)
        return sentence
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        log.warning("line %d: out of memory: %s", line, sentence)
        return f"out of memory: {sentence}"
    sentence = f"a fault of the program, not of the input ({type(error).__name__}: {sentence})"
    log.critical("line %d: %s", line, sentence, exc_info=error)
    return sentence


def _prompts(requests: Sequence[Request]) -> Iterator[str]:
    """What the films that are still to be made are told; bad requests tell nothing."""
    for _, wanted, _ in requests:
        if wanted and not os.path.isfile(wanted.output):
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
