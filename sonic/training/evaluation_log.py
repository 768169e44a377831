"""Evaluations and judged videos as runs in W&B, joined to the weights and the video that they are of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sonic.evaluation.evaluate_config import EvaluateConfig
from sonic.evaluation.judge_config import JudgeConfig
from sonic.families.family import family_of
from sonic.training.lineage import Artifact, digest, evaluation_artifact, weights_artifact
from sonic.training.provenance import keep_provenance, provenance
from sonic.training.wandb_log import log_evaluation


def log_evaluated(config: EvaluateConfig, figures: Mapping[str, Any], folder: Path, *, origin: tuple[str, str]) -> None:
    """Log an evaluation as a run that uses the transformer's weights and adapters. origin = (git commit, command)."""
    family = family_of(config.model)
    files = [family.transformer_weights(config.model), config.model.lora.path or family.student(config.model, config.sampler.sample_steps)]
    made = evaluation_artifact(folder.name, figures, config.eval.videos)
    _log(config, folder, made, job_type="evaluate", inputs=[weights_artifact(Path(file)) for file in files if file], origin=origin)


def log_judged(config: JudgeConfig, figures: Mapping[str, Any], folder: Path, *, origin: tuple[str, str]) -> None:
    """Log the judgement of a video as a run that uses the video, which is named by its digest and not uploaded."""
    video = Path(config.mp4).absolute()
    used = Artifact(video.stem, "video", {"sha256_of_pieces": digest([video])}, {"path": str(video)}, reference=video)
    _log(config, folder, evaluation_artifact(video.stem, figures), job_type="judge", inputs=[used], origin=origin)


def _log(
    config: EvaluateConfig | JudgeConfig, folder: Path, made: Artifact, *, job_type: str, inputs: list[Artifact], origin: tuple[str, str]
) -> None:
    facts = provenance(config, command=origin[1], commit=origin[0])
    log_evaluation(folder, config.log, made, job_type=job_type, facts=facts, inputs=[keep_provenance(facts, folder), *inputs])
