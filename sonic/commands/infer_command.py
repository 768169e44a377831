"""The command infer: a portrait and a recording become a talking video."""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import NoReturn

from sonic.cli import Entry, launch
from sonic.inference.infer_config import InferConfig
from sonic.system.paths import shown
from sonic.system.run_folder import Run

ENTRY = Entry("infer", InferConfig, max_ranks=4096, example="+preset=fast_preview image=me.jpg audio=me.wav output=me.mp4")
FILM, SHEET = "out.mp4", "contact_sheet.png"  # in the run folder
log = logging.getLogger("sonic")


def infer(config: InferConfig, run: Run) -> int | None:
    """Check the inputs, load the parts, make the video or videos, leave their papers in the run folder."""
    begun = time.perf_counter()
    # torch and the models: not before the command line is known to be right
    from sonic.inference.batch import all_outcomes, announce, checked_scene, make_film, make_films, open_parts
    from sonic.inference.report import Clock, draw_contact_sheet
    from sonic.inference.requests import read_requests

    clock = Clock(begun)
    if config.requests:
        requests, folder = read_requests(config.requests), run.open()
        with open_parts(config, run.ranks, folder=folder) as opened:
            run.keep()  # finished films
            announce(opened, config)
            outcomes = all_outcomes(make_films(requests, opened, config), opened)
        return report(outcomes, run, plan=opened.forecast.as_json())
    with ExitStack() as stack:
        with clock.stage("load"):
            scene = checked_scene(config, *(run.path / name for name in (FILM, SHEET))) if run.main else None
            if scene is not None:
                run.open()  # before the work, should it not take anything
            opened = stack.enter_context(open_parts(config, run.ranks))
        if scene is None:
            return None
        output = Path(config.output) if config.output else run.path / FILM
        announce(opened, config)
        result, watch = make_film(scene, opened.parts, config, output=output, clock=clock)
        run.keep()
    with run.sparing("result.json", f"the film {shown(str(output))}"):
        run.write_json("result.json", asdict(replace(result, plan=opened.forecast.as_json())))
    with run.sparing("the contact sheet", f"the film {shown(str(output))}"):
        draw_contact_sheet(watch, run.path / SHEET)
    log.info("%s\npapers in %s", shown(result.summary()), shown(str(run.path)))
    return None


def report(outcomes: list, run: Run, *, plan: dict) -> int:
    """What became of all requests, as films.json; exit code 1 when some were bad. `plan` is that of the whole job.

    Only the first rank's: a launcher ends all ranks as soon as one gives such a code, and the others may be faster than what it says.
    """
    bad = [outcome for outcome in outcomes if outcome.fault]
    films = {each.line: {"error": each.fault} if each.fault else asdict(replace(each.result, plan=plan)) for each in outcomes}
    with run.sparing("films.json", "every film that was made"):
        run.write_json("films.json", films)
    log.info("%d films made, %d requests bad; papers in %s", len(outcomes) - len(bad), len(bad), shown(str(run.path)))
    for outcome in bad:
        log.error("line %d: %s", outcome.line, outcome.fault)
    return 1 if bad and run.main else 0


def main(argv: list[str]) -> NoReturn:
    """Leave the process with the exit code of the command."""
    launch(ENTRY, infer, argv)
