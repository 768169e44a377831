"""Score a model: python launch/evaluate.py +preset=fast_preview eval.clips=20 eval.seed=1 json=out.json."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sonic.app import Entry, launch  # noqa: E402
from sonic.runs import Run  # noqa: E402
from sonic.train.settings import EvaluateConfig  # noqa: E402


def score(config: EvaluateConfig, run: Run) -> None:
    """Score, print the table, write the JSON."""
    from sonic.train.evaluate import evaluate

    evaluate(config)


if __name__ == "__main__":
    launch(Entry("evaluate", EvaluateConfig), score)
