"""Options of the command evaluate (stdlib only)."""

from __future__ import annotations

from dataclasses import dataclass

from sonic.config import DecodeConfig, ModelConfig, RunConfig, SamplerConfig, VideoConfig, one_of, option, require
from sonic.inference.motion_config import HeadConfig
from sonic.parallel.parallel_config import ParallelConfig
from sonic.training.train_config import WandbConfig

OTHERS = {"sync_correlation": "≥ 0.85", "silence_gap": "≤ 0.03", "identity_psnr_db": "≥ 34"}
PORTRAITS = {  # kinds of drawn portraits, and what is asked of their figures beside what is asked of all
    "any": {},
    "closed": {"sync_correlation": "≥ 0.92", "silence_gap": "≤ 0.02", "identity_psnr_db": "≥ 38"},
    "smile": {"sync_correlation": "≥ 0.88", "silence_gap": "≤ 0.03", "identity_psnr_db": "≥ 36"},
    **dict.fromkeys(("open", "beard", "moustache", "glasses", "profile"), OTHERS),
}


@dataclass
class EvalConfig:
    """The evaluation set: people, voices and sentences of the test split, without head motion."""

    clips: int = option(20, "drawn people, each with its own recording")
    seed: int = option(0, "seed of the people and sentences")
    seconds: float = option(8.0, "length of each recording, at least 2")
    portraits: str = option(
        "any",
        f"their kind: {', '.join(PORTRAITS)}; any = as in training, with mouth and crop known; of the others the face is found as in the "
        "command infer, and lips that are apart in the portrait must meet in silence",
    )
    noisy: bool = option(False, "add noise, echo and band limits of real recordings to the speech")
    videos: str = option("", "folder for a contact sheet of every clip; empty = none")
    num_videos: int = option(0, "clips whose videos are saved too, in the same folder")

    def __post_init__(self) -> None:
        one_of(self.portraits, list(PORTRAITS), "eval.portraits")
        require(self.clips >= 1, f"eval.clips={self.clips}: need at least 1")
        require(self.seconds >= 2, f"eval.seconds={self.seconds}: a correlation needs at least 2 seconds")


@dataclass
class EvaluateConfig:
    """Scores a model on drawn people with exactly known mouths, beside the true video and a still one."""

    json: str = option("", "JSON file for the figures")
    eval: EvalConfig = option(EvalConfig)
    run: RunConfig = option(RunConfig)
    model: ModelConfig = option(ModelConfig)
    sampler: SamplerConfig = option(SamplerConfig)
    video: VideoConfig = option(VideoConfig)
    decode: DecodeConfig = option(DecodeConfig)
    motion: HeadConfig = option(HeadConfig)
    parallel: ParallelConfig = option(ParallelConfig)
    log: WandbConfig = option(WandbConfig)
