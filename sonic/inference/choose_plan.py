"""Which plan a job of videos runs under: the planner is asked first, and what cannot fit is not started."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image

from sonic.config import PHOTO_SIZE, Ranks, parse_size
from sonic.data.image import BROKEN_FILE, SMALLEST_SIDE, load_image
from sonic.data.image import LARGEST_AREA as LARGEST_PICTURE
from sonic.evaluation.metrics import peak_rss_gib
from sonic.geometry import wan_size
from sonic.inference.components import settled_model
from sonic.inference.conditions import LARGEST_AREA
from sonic.inference.infer_config import InferConfig
from sonic.inference.inputs import PORTRAITS
from sonic.inference.requests import read_requests, request_of
from sonic.parallel.mesh import World, degrees
from sonic.parallel.parallel_config import HardwareConfig, ParallelConfig, PlanConfig
from sonic.planner.hardware import hardware_here
from sonic.planner.memory import GIB
from sonic.planner.plans import Plan
from sonic.planner.search import PlanResult, search_plans
from sonic.system.paths import check_input

log = logging.getLogger("sonic.inference")


@dataclass
class Estimate:
    """The plan that runs, and what it takes against what was foretold. On a CPU memory counts from when the plan was made."""

    plan: Plan
    config: PlanConfig
    started: float = field(default_factory=lambda: peak_rss_gib() * GIB)
    measured_gib: list[float] = field(default_factory=list)

    @property
    def parallel(self) -> ParallelConfig:
        """The options that the plan runs with."""
        return self.plan.parallel

    def measure(self, world: World) -> None:
        """Take down the peak of every rank. Every rank must ask."""
        on_gpu = world.device.type == "cuda"
        peak = torch.cuda.max_memory_reserved(world.device) if on_gpu else peak_rss_gib() * GIB - self.started
        peaks = [peak]
        if world.mesh is not None:
            peaks = [0.0] * dist.get_world_size()
            dist.all_gather_object(peaks, peak)
        self.measured_gib = [round(each / GIB, 3) for each in peaks]

    def as_json(self) -> dict:
        """For result.json."""
        return {
            "plan": self.plan.name,
            "predicted_gib_per_rank": [round(each, 3) for each in self.plan.peak_gib],
            "measured_gib_per_rank": self.measured_gib,
            "predicted_seconds_per_block": round(self.plan.seconds.total, 4),
            "predicted_frames_per_second": round(self.plan.frames_per_second, 3),
        }


def estimate(
    config: InferConfig, ranks: Ranks, device: torch.device, *, trained: bool = True, size: tuple[int, int] | None = None
) -> Estimate:
    """The planner's answer for a job: its choice for parallel=auto, or what was asked for. `trained`: a checkpoint says what runs.
    `size` = (width, height) of the video where it is known already, so that no photograph is opened for it.

    Raises ValueError when that cannot fit, with what would; plan.force=true starts it all the same.
    """
    hardware = hardware_here(config.hardware, device, ranks=ranks.world, local_ranks=ranks.local_world)
    model = settled_model(config.model) if trained else config.model
    video = replace(config.video, size="x".join(map(str, size)) if size else _video_size(config))
    plan_config = _plan_config(replace(config, model=model, video=video), hardware, ranks)
    found = search_plans(plan_config, idle=False)
    if not found.fits and not config.plan.force:
        raise ValueError(_refusal(found))
    if not found.fits:
        log.warning("plan.force: %s", _refusal(found))
    plan, asked = found.chosen, config.parallel
    if asked.name == "auto" and ranks.world > 1:
        log.info("parallel=auto: %s, %.1f GiB on the fullest rank", plan.name, max(plan.peak_gib))
    if asked.name not in ("auto", "pipeline"):
        plan = replace(plan, parallel=_with_residents(asked, plan, device))
    return Estimate(plan, plan_config)


def refuse_larger(found: Estimate, size: tuple[int, int], *, force: bool) -> None:
    """Raise ValueError where a video of (height, width) is larger than the one the plan was made for, and does not fit."""
    video, (height, width) = found.config.video, size
    if video.size == PHOTO_SIZE or height * width <= prod(parse_size(video.size)):
        return
    larger = replace(found.config, video=replace(video, size=f"{width}x{height}"))
    answer = search_plans(replace(larger, parallel=replace(found.parallel, replicas=1)), idle=False)
    if not answer.fits and not force:
        raise ValueError(_refusal(answer))


def _with_residents(asked: ParallelConfig, plan: Plan, device: torch.device) -> ParallelConfig:
    """What was asked for by name; how much of the weights stays on a GPU is the planner's figure, which leaves room for the rest of
    the video. On a CPU nothing stays: a copy there gains nothing."""
    if asked.name != "offload" or asked.offload.resident_gib >= 0 or device.type != "cuda":
        return asked
    return replace(asked, offload=replace(asked.offload, resident_gib=plan.parallel.offload.resident_gib))


def _plan_config(config: InferConfig, hardware: HardwareConfig, ranks: Ranks) -> PlanConfig:
    """The planner's view of a job: one video on the ranks that make it together, with their share of a machine's memory."""
    parallel = config.parallel
    if parallel.name == "auto":
        sharing = max(1, parallel.replicas)
        if parallel.replicas == -1 or hardware.devices % sharing:
            raise ValueError(
                f"parallel.replicas={parallel.replicas} needs a plan by name on {hardware.devices} ranks, such as parallel=single"
            )
    else:
        sharing, _, context = degrees(parallel, parallel.name, hardware.devices)
        parallel = replace(parallel, context=context)
    copies_here = max(1, sharing * ranks.local_world // ranks.world)
    alone = replace(hardware, devices=hardware.devices // sharing, host_gib=hardware.host_gib / copies_here)
    one_each = parallel.name == "fsdp" and alone.devices == 1  # copies side by side, nothing to share
    per_video = replace(parallel, replicas=1, name="single" if one_each else parallel.name)
    return PlanConfig(run=config.run, model=config.model, hardware=alone, parallel=per_video, sampler=config.sampler, video=config.video)


def _video_size(config: InferConfig) -> str:
    """video.size, that of the photograph looked up; of several photographs, the size of the largest video."""
    if config.model.resolution or config.video.size != PHOTO_SIZE:
        return config.video.size
    if config.requests:
        wanted = {_portrait_of(line, config) for _, line in read_requests(config.requests)}
        pictures = [size for name in wanted if (size := _size_of_picture(name))]
    else:
        pixels = load_image(PORTRAITS.get(config.image, config.image))
        pictures = [(pixels.shape[1], pixels.shape[0])]
    sizes = [wan_size(width, height, min(LARGEST_AREA, width * height)) for width, height in pictures]
    return "x".join(map(str, max(sizes, key=prod))) if sizes else PHOTO_SIZE


def _portrait_of(line: str, config: InferConfig) -> str:
    """The picture that a request names; none for a bad line, of which its own video will tell."""
    try:
        return request_of(line, config, Path()).image
    except (ValueError, OSError):
        return ""


def _size_of_picture(name: str) -> tuple[int, int] | None:
    """(width, height) as they lie in a file, whose pixels are not read; None for what its own video will refuse."""
    try:
        check_input(name, "image")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(PORTRAITS.get(name, name)) as image:
                return image.size if min(image.size) >= SMALLEST_SIDE and prod(image.size) <= LARGEST_PICTURE else None
    except (*BROKEN_FILE, Image.DecompressionBombError):
        return None


def _refusal(found: PlanResult) -> str:
    """What is missing, and what would fit."""
    best, hardware = found.chosen, found.hardware
    lacks = (
        f"{best.missing_gib(hardware):.1f} GiB are missing for parallel={best.name} on {hardware.devices} x {hardware.usable_gib:.1f} GiB"
    )
    would = "; ".join(f"{change.sentence} ({' '.join(change.options)})" for change in found.changes)
    return f"{lacks}; {f'would fit: {would}' if would else 'nothing smaller fits either'}; plan.force=true starts it all the same"
