"""Score a model: python launch/evaluate.py +preset=fast_preview eval.clips=20 eval.seed=1 json=out.json."""

from __future__ import annotations

from sonic.app import Entry, launch
from sonic.runs import Run
from sonic.train.settings import EvaluateConfig


def score(config: EvaluateConfig, run: Run) -> None:
    """Score, print the table, write the JSON."""
    from sonic.train.evaluate import evaluate

    evaluate(config)


if __name__ == "__main__":
    launch(Entry("evaluate", EvaluateConfig), score)
