"""The command infer: make talking videos from portraits and recordings."""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path

from sonic.cli import Entry, launch
from sonic.inference.infer_config import InferConfig
from sonic.system.paths import printable
from sonic.system.run_folder import Run

VIDEO, SHEET = "out.mp4", "contact_sheet.png"  # in the run folder
EXAMPLE = "+preset=fast_preview image=me.jpg audio=me.wav output=me.mp4"
ENTRY = Entry("infer", InferConfig, max_ranks=4096, example=EXAMPLE, would_help="sonic.inference.choose_plan.would_help")
log = logging.getLogger("sonic")


def infer(config: InferConfig, run: Run) -> int | None:
    """Check the inputs, load the networks, make one video or those of a file of requests, and write the results to the run folder."""
    begun = time.perf_counter()
    # these import torch, so only after the command line is checked
    from sonic.inference.batch import checked_inputs
    from sonic.inference.report import StageTimer, draw_contact_sheet, versions
    from sonic.inference.requests import read_requests
    from sonic.pipeline import AvatarPipeline

    timer = StageTimer(begun)
    if config.requests:
        requests, folder = read_requests(config.requests), run.open()
        with AvatarPipeline(config, ranks=run.ranks, folder=folder) as pipe:
            run.keep()  # finished videos survive a failed run
            pipe.announce()
            outcomes = pipe.make_videos(requests)
        return report(outcomes, run, job={"plan": pipe.plan_report(), "versions": versions()})
    with ExitStack() as stack:
        with timer.stage("load"):
            inputs = checked_inputs(config, *(run.path / name for name in (VIDEO, SHEET))) if run.main else None
            if inputs is not None:
                run.open()  # early, to fail before the work if it cannot be written
            size = None if inputs is None else inputs.portrait.pixels.shape[1::-1]  # (width, height)
            pipe = stack.enter_context(AvatarPipeline(config, ranks=run.ranks, size=size))
        if inputs is None:
            return None
        output = Path(config.output) if config.output else run.path / VIDEO
        pipe.announce()
        result, recorder = pipe.write(inputs, output, timer=timer)
        run.keep()
    with run.warn_if_unwritten("result.json", f"the video {printable(str(output))}"):
        run.write_json("result.json", {**asdict(result), "plan": pipe.plan_report(), "versions": versions()})
    with run.warn_if_unwritten("the contact sheet", f"the video {printable(str(output))}"):
        draw_contact_sheet(recorder, run.path / SHEET)
    log.info("%s\nresults in %s", printable(result.summary()), printable(str(run.path)))
    return None


def report(outcomes: list, run: Run, *, job: dict) -> int:
    """Write the outcomes of all requests to videos.json and log the errors. Returns exit code 1 if any request failed.

    `job` is what holds for all of them. Only the first rank returns 1: a launcher ends all ranks as soon as one fails, which could
    be before the first rank has written its report.
    """
    bad = [outcome for outcome in outcomes if outcome.fault]
    results = {each.line: {"error": each.fault} if each.fault else {**asdict(each.result), **job} for each in outcomes}
    with run.warn_if_unwritten("videos.json", "every video that was made"):
        run.write_json("videos.json", results)
    log.info("%d videos made, %d requests bad; results in %s", len(outcomes) - len(bad), len(bad), printable(str(run.path)))
    for outcome in bad:
        log.error("line %d: %s", outcome.line, outcome.fault)
    return 1 if bad and run.main else 0


main = partial(launch, ENTRY, infer)
