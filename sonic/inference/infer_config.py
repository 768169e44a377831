"""Options of `sonic infer` and `sonic bench`. Imports the standard library and other option modules only."""

from __future__ import annotations

from dataclasses import dataclass

from sonic.config import (
    CommandConfig,
    DecodeConfig,
    FaceConfig,
    ModelConfig,
    RunConfig,
    SamplerConfig,
    VideoConfig,
    parse_size,
    settled_video,
)
from sonic.inference.motion_config import HeadConfig
from sonic.inference.post_config import PostConfig
from sonic.parallel.parallel_config import HardwareConfig, ParallelConfig, check_plan
from sonic.registry import names_in, one_of, option, require


@dataclass
class RequestConfig:
    """Options of one video, which a line in a file of requests may set."""

    image: str = option("astronaut", "the portrait, a picture file; astronaut = the photograph that comes with scikit-image")
    audio: str = option("sample", "the recording, an audio file; sample = the bundled one")
    prompt: str = option("", "text for the models that read it; the preview does not")
    output: str = option("", "the MP4 to write; empty = out.mp4 in the run folder")
    seed: int = option(0, "the same seed gives the same frames; every number means itself")

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**63, f"seed={self.seed} must lie between 0 and 2^63 - 1")
        for name in ("image", "audio"):
            require(getattr(self, name) != "", f"{name}= is empty; name a file")


@dataclass
class PlanChoiceConfig:
    """Options of how the planner's answer is used."""

    force: bool = option(False, "start even what the planner says cannot fit")


@dataclass
class InferConfig(RequestConfig, CommandConfig):
    """A portrait and a recording become a talking video."""

    requests: str = option(
        "", "JSONL file with a video per line (image, audio, prompt, output, seed); inputs are looked for here, then beside the file"
    )
    run: RunConfig = option(RunConfig)
    model: ModelConfig = option(ModelConfig)
    sampler: SamplerConfig = option(SamplerConfig)
    video: VideoConfig = option(VideoConfig)
    decode: DecodeConfig = option(DecodeConfig)
    face: FaceConfig = option(FaceConfig)
    motion: HeadConfig = option(HeadConfig)
    post: PostConfig = option(PostConfig)
    parallel: ParallelConfig = option(ParallelConfig)
    hardware: HardwareConfig = option(HardwareConfig)
    plan: PlanChoiceConfig = option(PlanChoiceConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_plan(self.parallel, self.model)
        self.video, self.model = settled_video(self.video, self.model)


@dataclass
class FitConfig:
    """Options of bench fit, which times a published model with random weights under a plan."""

    blocks: int = option(8, "hand-overs (blocks or clips) that are timed")
    warm_blocks: int = option(2, "hand-overs before these")
    vae: bool = option(True, "decode what is denoised; without it the transformer is timed alone")
    force: bool = option(False, "start even what the planner says cannot fit")
    cap_gib: float = option(0.0, "GiB of a GPU that each process may take, when several share one; 0 = all")

    def __post_init__(self) -> None:
        enough = self.blocks >= 1 and self.warm_blocks >= 1
        require(enough, f"fit.blocks={self.blocks} and fit.warm_blocks={self.warm_blocks} must be 1 or more")
        require(self.cap_gib >= 0, f"fit.cap_gib={self.cap_gib} must be 0 or more")


@dataclass
class TimingConfig:
    """Options of bench preview (the video that it makes, and the transformer whose matrix products it measures) and of bench faces."""

    photo: str = option("720x400", "the bundled portrait is scaled and cut to this before timing")
    seconds: float = option(8.0, "length of the video")
    gemm_dim: int = option(4096, "hidden_dim of the transformer that is held against a plain matrix product; the published one has 5120")
    portraits: str = option("", "folder of portraits whose faces bench faces looks for, besides the bundled one")

    def __post_init__(self) -> None:
        parse_size(self.photo, "timing.photo")
        require(0.5 <= self.seconds <= 3600, f"timing.seconds={self.seconds} must lie between 0.5 and 3600")
        wide = self.gemm_dim >= 128 and self.gemm_dim % 128 == 0
        require(wide, f"timing.gemm_dim={self.gemm_dim} must be a multiple of 128; use 512 or more")


@dataclass
class BenchConfig(CommandConfig):
    """The main job or one forward, timed; the word behind the command says which."""

    target: str = option(
        "preview",
        "preview = a video; dit_medium = one forward of 49.5 M weights; fit = a published model under a plan; scaling = two ranks; "
        "faces = what the face finder sees; roofline = what a published model needs on paper, and how fast known cards can be",
    )
    json: str = option("", "where the figures go as JSON")
    timing: TimingConfig = option(TimingConfig)
    repeats: int = option(3, "the best of so many videos counts, or of three times as many forwards")
    fit: FitConfig = option(FitConfig)
    run: RunConfig = option(RunConfig)
    model: ModelConfig = option(ModelConfig)
    sampler: SamplerConfig = option(SamplerConfig)
    video: VideoConfig = option(VideoConfig)
    decode: DecodeConfig = option(DecodeConfig)
    parallel: ParallelConfig = option(ParallelConfig)
    hardware: HardwareConfig = option(HardwareConfig)

    def __post_init__(self) -> None:
        one_of(self.target, names_in("bench.benchmark.BENCHES"), "target")
        check_plan(self.parallel, self.model)
        self.video, self.model = settled_video(self.video, self.model)
        require(1 <= self.repeats <= 100, f"repeats={self.repeats} must lie between 1 and 100")
