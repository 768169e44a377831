"""The command evaluate: score a model on synthetic, drawn faces."""

from __future__ import annotations

from functools import partial

from sonic.cli import Entry, launch
from sonic.evaluation.evaluate_config import EvaluateConfig
from sonic.system.run_folder import Run

ENTRY = Entry("evaluate", EvaluateConfig, example="+preset=fast_preview eval.clips=20 eval.seed=1 json=out.json")


def score(config: EvaluateConfig, run: Run) -> None:
    """Score, print the table, write the JSON; with log.wandb on, log all of it as a run that uses the model's weights."""
    from sonic.evaluation.evaluate import evaluate
    from sonic.training.evaluation_log import log_evaluated
    from sonic.training.wandb_log import wants_wandb

    logged = wants_wandb(config.log)  # a missing package is found before anything is scored
    figures = evaluate(config)
    if logged:
        run.keep()
        log_evaluated(config, figures, run.open(), origin=(run.commit, run.command))


main = partial(launch, ENTRY, score)
