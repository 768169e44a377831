"""Chooses the parallel plan of a job before anything is loaded, and refuses a job that does not fit in memory."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image

from sonic.config import PHOTO_SIZE, Ranks, VideoConfig, parse_size
from sonic.data.audio_decode import track_seconds
from sonic.data.image import BROKEN_FILE, LARGEST_PICTURE, SMALLEST_SIDE, load_image
from sonic.evaluation.metrics import peak_rss_gib
from sonic.families.family import Family, family_of
from sonic.geometry import GIB
from sonic.inference.components import find_device
from sonic.inference.fit_picture import wan_video_size
from sonic.inference.infer_config import InferConfig
from sonic.inference.inputs import PORTRAITS, RECORDINGS
from sonic.inference.requests import read_requests, request_of
from sonic.parallel.mesh import World, degrees
from sonic.parallel.parallel_config import HardwareConfig, ParallelConfig, PlanConfig
from sonic.planner.hardware import hardware_here
from sonic.planner.plans import Plan
from sonic.planner.search import PlanResult, changes_for_less, in_words, search_plans
from sonic.system.paths import check_input

WOULD_HELP = "sonic.inference.choose_plan.would_help"
log = logging.getLogger("sonic.inference")


@dataclass
class Estimate:
    """The plan that runs, with its estimated and measured peak memory.

    `started` is the peak resident memory in bytes when the plan was made; on a CPU the measured peak is what was added since.
    """

    plan: Plan
    config: PlanConfig
    seconds: float = 0.0  # of the recording; 0 = not known
    started: float = field(default_factory=lambda: peak_rss_gib() * GIB)
    measured_gib: list[float] = field(default_factory=list)

    def measure(self, world: World) -> None:
        """Store the peak memory of every rank in GiB. A collective call: every rank must make it."""
        on_gpu = world.device.type == "cuda"
        peak = torch.cuda.max_memory_reserved(world.device) if on_gpu else peak_rss_gib() * GIB - self.started
        peaks = [peak]
        if world.mesh is not None:
            peaks = [0.0] * dist.get_world_size()
            dist.all_gather_object(peaks, peak)
        self.measured_gib = [round(each / GIB, 3) for each in peaks]

    def as_json(self) -> dict:
        """The estimated and measured memory and speed as they are written to result.json."""
        return {
            "plan": self.plan.name,
            "predicted_gib_per_rank": [round(each, 3) for each in self.plan.peak_gib],
            "measured_gib_per_rank": self.measured_gib,
            "predicted_seconds_per_block": round(self.plan.seconds.total, 4),
            "predicted_frames_per_second": round(self.plan.frames_per_second, 3),
        }


def choose_plan(
    config: InferConfig, ranks: Ranks, device: torch.device, *, size: tuple[int, int] | None = None, family: Family | None = None
) -> Estimate:
    """The plan of a job with its estimates: the planner's choice for parallel=auto, else the plan that the options name.

    `size` is (width, height) of the video if it is known; otherwise the photographs are opened to find it. `family` replaces that of the
    config. Raises ValueError when the plan does not fit, with changes that would make it fit;
    plan.force=true logs a warning instead.
    """
    found, plan_config = _search(config, ranks, device, size=size, family=family)
    if not found.fits and not config.plan.force:
        raise ValueError(_refusal(found))
    if not found.fits:
        log.warning("plan.force: %s", _refusal(found))
    plan, asked = found.chosen, config.parallel
    if asked.name == "auto" and ranks.world > 1:
        log.info("parallel=auto: %s, %.1f GiB on the fullest rank", plan.name, max(plan.peak_gib))
    if asked.name not in ("auto", "pipeline"):  # the planner has also chosen the stages of a pipeline
        plan = replace(plan, parallel=_with_residents(asked, plan, device))
    return Estimate(plan, plan_config, _seconds(config))


def would_help(config: InferConfig, ranks: Ranks, error: BaseException) -> str:
    """In words, the changes that make a video need less of the memory that ran out than its plan; "" when there are none."""
    device = find_device(config.run.device)
    found, _ = _search(config, ranks, device)
    return in_words(changes_for_less(found, host=device.type == "cuda" and not any(name in str(error) for name in ("CUDA", "CUDNN"))))


def refuse_larger(found: Estimate, size: tuple[int, int], *, force: bool) -> None:
    """Raise ValueError when a video of `size` (height, width) is larger than the planned one and does not fit; `force` skips this."""
    video, (height, width) = found.config.video, size
    if video.size == PHOTO_SIZE or height * width <= prod(parse_size(video.size)):
        return
    larger = replace(found.config, video=replace(video, size=f"{width}x{height}"))
    answer = search_plans(replace(larger, parallel=replace(found.plan.parallel, replicas=1)), idle=False, seconds=found.seconds)
    if not answer.fits and not force:
        raise ValueError(_refusal(answer))


def _search(
    config: InferConfig, ranks: Ranks, device: torch.device, *, size: tuple[int, int] | None = None, family: Family | None = None
) -> tuple[PlanResult, PlanConfig]:
    """The planner's answer for a job, and its input."""
    hardware = hardware_here(config.hardware, device, ranks=ranks.world, local_ranks=ranks.local_world)
    model, video_size = (family or family_of(config.model)).settled_model(config.model), _video_size(config, size)
    video = config.video if video_size == PHOTO_SIZE else replace(config.video, size=video_size, min_resolution=0)
    plan_config = _plan_config(replace(config, model=model, video=video), hardware, ranks)
    return search_plans(plan_config, idle=False, seconds=_seconds(config)), plan_config


def _with_residents(asked: ParallelConfig, plan: Plan, device: torch.device) -> ParallelConfig:
    """The requested options, with the planner's value for offload.resident_gib if the user left it open.

    That value is the part of the weights that stays on the GPU beside everything else the video needs. On a CPU it stays unset,
    because a second copy in host memory would gain nothing.
    """
    if asked.name != "offload" or asked.offload.resident_gib >= 0 or device.type != "cuda":
        return asked
    return replace(asked, offload=replace(asked.offload, resident_gib=plan.parallel.offload.resident_gib))


def _plan_config(config: InferConfig, hardware: HardwareConfig, ranks: Ranks) -> PlanConfig:
    """The planner's input for a job: one video on the ranks that make it together, with their share of the host memory.

    Raises ValueError when parallel=auto cannot divide the ranks into parallel.replicas copies.
    """
    parallel = config.parallel
    if parallel.name == "auto":
        sharing = max(1, parallel.replicas)
        if parallel.replicas == -1 or hardware.ranks % sharing:
            raise ValueError(
                f"parallel.replicas={parallel.replicas} needs a plan by name on {hardware.ranks} ranks, such as parallel=single"
            )
    else:
        sharing, _, context = degrees(parallel, hardware.ranks)
        parallel = replace(parallel, context=context)
    copies_here = max(1, sharing * ranks.local_world // ranks.world)
    alone = replace(hardware.part(hardware.ranks // sharing), host_gib=hardware.host_gib / copies_here)
    one_each = parallel.name == "fsdp" and alone.ranks == 1  # every rank has a whole copy of the model, so nothing is sharded
    per_video = replace(parallel, replicas=1, name="single" if one_each else parallel.name)
    return PlanConfig(
        run=config.run,
        model=config.model,
        hardware=alone,
        parallel=per_video,
        sampler=config.sampler,
        video=config.video,
        decode=config.decode,
    )


def _video_size(config: InferConfig, known: tuple[int, int] | None) -> str:
    """video.size, with "photo" replaced by the size for the photograph, or for the largest photograph in a file of requests."""
    if config.model.resolution or config.video.size != PHOTO_SIZE:
        return config.video.size
    if known:
        return "x".join(map(str, known))
    if config.requests:
        wanted = {_portrait_of(line, config) for _, line in read_requests(config.requests)}
        sizes = [size for name in wanted if (size := _size_for_picture(name, config.video))]
    else:
        pixels = load_image(PORTRAITS.get(config.image, config.image))
        sizes = [wan_video_size(pixels.shape[1], pixels.shape[0], config.video)]
    return "x".join(map(str, max(sizes, key=prod))) if sizes else PHOTO_SIZE


def _seconds(config: InferConfig) -> float:
    """Length of the recording by its time stamps; 0 when it is no file, or one that is refused when its video is made."""
    path = Path(RECORDINGS.get(config.audio, config.audio))
    try:
        return track_seconds(path) if path.is_file() and not config.requests else 0.0
    except (ValueError, OSError):
        return 0.0


def _portrait_of(line: str, config: InferConfig) -> str:
    """The image that a request names; "" for a bad line, which is reported when its video is made."""
    try:
        return request_of(line, config, Path()).image
    except (ValueError, OSError):
        return ""


def _size_for_picture(name: str, video: VideoConfig) -> tuple[int, int] | None:
    """(width, height) of the video from the header of a picture file, or None for a picture that is refused when its video is made."""
    try:
        check_input(name, "image")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(PORTRAITS.get(name, name)) as image:
                fine = min(image.size) >= SMALLEST_SIDE and prod(image.size) <= LARGEST_PICTURE
                return wan_video_size(*image.size, video) if fine else None
    except (*BROKEN_FILE, Image.DecompressionBombError):
        return None


def _refusal(found: PlanResult) -> str:
    """The error message: how much memory is missing, and which changes would make the video fit."""
    best, hardware = found.chosen, found.hardware
    lacks = f"{best.missing_gib(hardware):.1f} GiB are missing for parallel={best.name} on {hardware.ranks} x {hardware.usable_gib:.1f} GiB"
    would = in_words(found.changes)
    return f"{lacks}; {f'would fit: {would}' if would else 'nothing smaller fits either'}; plan.force=true starts it all the same"
