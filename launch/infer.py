"""A portrait and a recording become a talking video: python launch/infer.py +preset=fast_preview image=me.jpg audio=me.wav"""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sonic.app import Entry, launch  # noqa: E402
from sonic.config import InferConfig  # noqa: E402
from sonic.runs import Run  # noqa: E402

ENTRY = Entry("infer", InferConfig)
log = logging.getLogger("sonic")


def infer(config: InferConfig, run: Run) -> None:
    """Check the inputs, load the parts, make the video, leave its papers in the run folder."""
    begun = time.perf_counter()
    # torch and the models: not before the command line is known to be right
    from sonic.data.video import check_output
    from sonic.infer.build import build_parts
    from sonic.infer.pipeline import generate
    from sonic.infer.report import Clock, Watch, draw_contact_sheet
    from sonic.infer.scene import Settings, open_scene

    clock = Clock(begun)
    with clock.stage("load"):
        scene = open_scene(config)
        height, width = scene.portrait.pixels.shape[:2]
        if config.output:
            check_output(config.output, width, height, num_frames=scene.num_frames, fps=scene.fps)
        parts = build_parts(config.model, config.run, steps=config.sampler.sample_steps)
    if config.prompt and config.model.name == "preview":
        log.warning("prompt is not read: the preview was trained without text")
    output = Path(config.output) if config.output else run.open() / "out.mp4"
    run.open()
    watch = Watch(scene)
    result = generate(scene, parts, Settings.of(config), output=output, clock=clock, watch=watch)
    run.write_json("result.json", asdict(result))
    draw_contact_sheet(watch, run.path / "contact_sheet.png")
    log.info("%s\npapers in %s", result.summary(), run.path)


if __name__ == "__main__":
    launch(ENTRY, infer)
