"""The command infer: a portrait and a recording become a talking video."""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import NoReturn

from sonic.app import Entry, launch
from sonic.infer.settings import InferConfig
from sonic.runs import Run

ENTRY = Entry("infer", InferConfig, max_ranks=4096, example="+preset=fast_preview image=me.jpg audio=me.wav output=me.mp4")
log = logging.getLogger("sonic")


def infer(config: InferConfig, run: Run) -> int | None:
    """Check the inputs, load the parts, make the video or videos, leave their papers in the run folder."""
    begun = time.perf_counter()
    # torch and the models: not before the command line is known to be right
    from sonic.infer.films import all_outcomes, checked_scene, make_film, make_films, open_parts, read_requests
    from sonic.infer.report import Clock, draw_contact_sheet

    clock = Clock(begun)
    if config.requests:
        requests, folder = read_requests(config.requests), run.open()
        with open_parts(config, run.ranks, folder=folder) as opened:
            run.keep()  # finished films
            outcomes = all_outcomes(make_films(requests, opened, config), opened)
        return report(outcomes, run, plan=opened.forecast.as_json())
    with ExitStack() as stack:
        with clock.stage("load"):
            scene = checked_scene(config) if run.main else None
            opened = stack.enter_context(open_parts(config, run.ranks))
        if scene is None:
            return None
        output = Path(config.output) if config.output else run.open() / "out.mp4"
        run.open()
        result, watch = make_film(scene, opened.parts, config, output=output, clock=clock)
        run.keep()
    run.write_json("result.json", asdict(replace(result, plan=opened.forecast.as_json())))
    draw_contact_sheet(watch, run.path / "contact_sheet.png")
    log.info("%s\npapers in %s", result.summary(), run.path)
    return None


def report(outcomes: list, run: Run, *, plan: dict) -> int:
    """What became of all requests, as films.json; exit code 1 when some were bad. `plan` is that of the whole job.

    Only the first rank's: a launcher ends all ranks as soon as one gives such a code, and the others may be faster than what it says.
    """
    bad = [outcome for outcome in outcomes if outcome.fault]
    films = {each.line: {"error": each.fault} if each.fault else asdict(replace(each.result, plan=plan)) for each in outcomes}
    run.write_json("films.json", films)
    log.info("%d films made, %d requests bad; papers in %s", len(outcomes) - len(bad), len(bad), run.path)
    for outcome in bad:
        log.error("line %d: %s", outcome.line, outcome.fault)
    return 1 if bad and run.main else 0


def main(argv: list[str]) -> NoReturn:
    """Leave the process with the exit code of the command."""
    launch(ENTRY, infer, argv)
