"""The command evaluate: score a model on synthetic, drawn faces."""

from __future__ import annotations

from functools import partial

from sonic.cli import Entry, launch
from sonic.evaluation.evaluate_config import EvaluateConfig
from sonic.system.run_folder import Run

ENTRY = Entry("evaluate", EvaluateConfig, example="+preset=fast_preview eval.clips=20 eval.seed=1 json=out.json")


def score(config: EvaluateConfig, run: Run) -> None:
    """Score, print the table, write the JSON."""
    from sonic.evaluation.evaluate import evaluate

    evaluate(config)


main = partial(launch, ENTRY, score)
