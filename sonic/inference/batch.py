"""Makes one video or a file of requests: loads the networks under a plan and divides the requests among the copies of the model."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from sonic.config import Ranks
from sonic.data.video import check_output
from sonic.families.family import Family, build_components, family_of
from sonic.inference.choose_plan import WOULD_HELP, Estimate, choose_plan
from sonic.inference.components import Components, find_device
from sonic.inference.distributed_rollout import shutdown
from sonic.inference.generate import make_video
from sonic.inference.infer_config import InferConfig
from sonic.inference.input_reader import InputReader, open_inputs
from sonic.inference.inputs import input_files, refuse_overwriting
from sonic.inference.post_process import as_displayed
from sonic.inference.report import Result, StageTimer
from sonic.inference.requests import Request, all_requests
from sonic.parallel.context import context_of
from sonic.parallel.mesh import World, open_world
from sonic.parallel.vae_rank import serve_vae
from sonic.system.heartbeat import pause_watchdog
from sonic.system.out_of_memory import out_of_memory
from sonic.system.paths import printable
from sonic.types import Inputs

log = logging.getLogger("sonic.inference")


class Outcome(NamedTuple):
    """The outcome of one request: its line number in the file, and either the result or one sentence that says why it failed."""

    line: int
    result: Result | None = None
    fault: str = ""


class Opened(NamedTuple):
    """The components of this rank, the plan that they run under, and the folder for the videos of the job."""

    components: Components
    estimate: Estimate | None  # None when the caller passed its own components
    folder: Path

    @property
    def world(self) -> World:
        """The ranks of the job as seen by this one."""
        return self.components.context.world

    def output_of(self, line: int) -> Path:
        """The path of the video for a request that names no output."""
        return self.folder / f"{line:04d}.mp4"

    def serve(self) -> None:
        """Run the forwards or decode, as the leading rank asks, until it shuts this rank down; on a rank that leads, return at once."""
        components, context = self.components, self.components.context
        if self.world.holds_vae:
            serve_vae(components.autoencoder, context.vae_channel)
        elif not self.world.leads:
            family_of(components.config).serve(components)


@contextmanager
def open_components(
    config: InferConfig, ranks: Ranks, *, folder: Path = Path(), size: tuple[int, int] | None = None, family: Family | None = None
) -> Iterator[Opened]:
    """Build the components of this rank under the plan of the job, and shut the other ranks down at the end of the block.

    Ranks that do not lead must call `serve` inside the block. All ranks use the first rank's `folder`, because its default name contains
    the time, which differs between ranks. `size` is (width, height) of the video where this rank knows it already; `family` replaces that
    of the config.
    """
    device = find_device(config.run.device, ranks.local_rank if ranks.world > 1 else None)
    family = family or family_of(config.model)
    found = choose_plan(config, ranks, device, size=size, family=family)
    parallel = replace(found.plan.parallel, replicas=config.parallel.replicas)
    with open_world(parallel, ranks, device) as world:
        context, folder = context_of(world, parallel), world.from_first_rank(folder)
        components = build_components(config.model, config.run, steps=config.sampler.sample_steps, context=context, family=family)
        if not world.leads:  # the leading rank may load after encoding
            components.load()
        yield Opened(components, found, folder)
        if world.leads:
            shutdown(context)
        found.measure(world)


def checked_inputs(config: InferConfig, *written: Path, read: Callable[[InferConfig], Inputs] = open_inputs) -> Inputs:
    """Read the inputs of a request and check that its video can be written.

    Raises ValueError or OSError for bad inputs, for an output that cannot be written, and when the output or one of the files `written`
    would overwrite an input.
    """
    refuse_overwriting(input_files(config), *([Path(config.output)] if config.output else []), *written)
    inputs = read(config)
    height, width = inputs.portrait.pixels.shape[:2]
    if config.output:
        displayed = as_displayed(inputs, config.post)
        check_output(config.output, width, height, num_frames=displayed.num_frames, fps=displayed.fps)
    return inputs


def make_videos(requests: Sequence[tuple[int, str]], opened: Opened, config: InferConfig) -> list[Outcome]:
    """Make the videos of the requests (line number, text) assigned to this copy of the model, and return one outcome for each attempt.

    A video that exists already is skipped and has no outcome. A request without an output is written to the job's folder, named after
    its line number. A failed request does not stop the others, with one exception: when several ranks make each video together, an
    error during generation other than ValueError and OSError is raised, because the ranks may no longer be in the same step.
    """
    outcomes: list[Outcome] = []
    components, world = opened.components, opened.world
    copies, replica = world.size("dp_replicate"), world.coordinate("dp_replicate")
    share = all_requests(requests, config, opened.output_of)[replica::copies] if world.leads else ()
    family_of(components.config).preload_prompts(components, _prompts(share))
    with closing(InputReader()) as reader:
        for request in share:
            generating = False
            try:
                if request.wanted is None:
                    raise ValueError(request.fault)
                if os.path.isfile(request.wanted.output):
                    log.info("line %d: %s is there already", request.line, printable(request.wanted.output))
                    continue
                inputs = checked_inputs(request.wanted, read=reader.open)
                generating = True
                result, _ = make_video(inputs, components, request.wanted, output=Path(request.wanted.output), timer=StageTimer())
                outcomes.append(Outcome(request.line, result))
                log.info("line %d: %s", request.line, printable(result.summary()))
            except Exception as error:
                if generating and not world.alone and not isinstance(error, ValueError | OSError):
                    raise
                outcomes.append(Outcome(request.line, fault=_fault(error, request.line, request.wanted or config)))
    return outcomes


def _fault(error: Exception, line: int, config: InferConfig) -> str:
    """Log an error of one request and return it as one sentence; an error of the program is logged with its traceback."""
    sentence = printable(" ".join(str(error).split())) or type(error).__name__
    if isinstance(error, ValueError | OSError):
        log.warning("line %d: %s", line, sentence)
        return sentence
    if lacking := out_of_memory(error, WOULD_HELP, config, Ranks()):
        log.warning("line %d: %s", line, lacking)
        return printable(lacking)
    sentence = f"a fault of the program, not of the input ({type(error).__name__}: {sentence})"
    log.critical("line %d: %s", line, sentence, exc_info=error)
    return sentence


def _prompts(requests: Sequence[Request]) -> Iterator[str]:
    """The prompts, and with guidance the negative prompts, of the valid requests whose videos do not exist yet."""
    for _, wanted, _ in requests:
        if wanted and not os.path.isfile(wanted.output):
            yield wanted.prompt
            if wanted.sampler.sample_guide_scale != 1:
                yield wanted.sampler.negative_prompt


def all_outcomes(outcomes: Sequence[Outcome], opened: Opened) -> list[Outcome]:
    """Gather the outcomes of all copies of the model, sorted by line number.

    A collective call: every rank must make it. It shuts the other ranks down, so no video can be made afterwards.
    """
    found, world = [list(outcomes)], opened.world
    if world.leads:
        shutdown(opened.components.context)
    if world.mesh is not None:
        found = [[] for _ in range(dist.get_world_size())]
        with pause_watchdog():  # the other copies may work for hours longer
            dist.all_gather_object(found, list(outcomes))
    return sorted((outcome for some in found for outcome in some), key=lambda outcome: outcome.line)
