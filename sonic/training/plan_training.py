"""Plans a training: takes from its recipe what memory and time depend on, and searches the plans. Standard library only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from sonic.config import PHOTO_SIZE, Ranks, VideoConfig, option, require
from sonic.parallel.parallel_config import HardwareConfig, ParallelConfig
from sonic.planner.search import PlanResult, changes_for_less, in_words, search
from sonic.planner.workload import ASSUMED_SIZE, Training, learnt, size_for, training_of
from sonic.system.program import written
from sonic.training.objective_config import DmdConfig, FlowMatchConfig
from sonic.training.train_config import TrainConfig

ENGINES = ("auto", "fsdp")


@dataclass
class PlanTrainingConfig(TrainConfig):
    """What the training of a recipe needs on which hardware, how long a step takes at least, and why."""

    verify: bool = option(False, "run a step of the chosen plan on fake tensors and ranks, and hold what it took against the prediction")
    json: str = option("", "where the plans go as JSON")
    hardware: HardwareConfig = option(HardwareConfig)
    parallel: ParallelConfig = option(ParallelConfig)
    video: VideoConfig = option(VideoConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        size = self.video.size
        require(self.video == VideoConfig(size), f"video.size={size} is all that a training has of video.*; leave the others out")


def plan_training(config: PlanTrainingConfig) -> PlanResult:
    """Ranked plans for a training. What the recipe says of speed.context, replicas, cpu_offload and reshard also holds under parallel=auto.

    Raises ValueError when the named plan is not possible on this hardware, or the planner does not support the recipe.
    """
    asked, speed = config.parallel, config.speed
    require(speed.engine in ENGINES, f"speed.engine={speed.engine} is not planned; the planner knows trainings under fsdp: use fsdp")
    asked = replace(asked, reshard=asked.reshard and speed.reshard)
    if speed.context > 1 or speed.replicas > 1 or speed.cpu_offload:
        degrees = {name: getattr(speed, name) for name in ("context", "replicas") if getattr(speed, name) > 1}
        name = "fsdp" if asked.name == "auto" else asked.name
        asked = replace(asked, name=name, cpu_offload=asked.cpu_offload or speed.cpu_offload, **degrees)
    work = training(config)
    return replace(search(work, config.hardware, asked), notes=tuple(_notes(config, work)))


def would_help(config: TrainConfig, ranks: Ranks, error: BaseException) -> str:
    """In words, the changes that make a training need less of the memory that ran out than its plan; "" when there are none.

    Raises ValueError when the planner does not support the recipe."""
    from sonic.planner.hardware import machine_here  # imports torch, as the training has

    machines = HardwareConfig("here", devices=ranks.local_world, nodes=max(1, ranks.world // ranks.local_world))
    hardware, speed = machine_here(machines), config.speed
    running = ParallelConfig("fsdp", context=speed.context, replicas=speed.replicas, cpu_offload=speed.cpu_offload)
    found = plan_training(PlanTrainingConfig(**vars(config), hardware=hardware, parallel=running))
    possible = [change for change in changes_for_less(found) if not change.options[0].startswith("video.")]  # clips have their size
    return in_words(possible).replace("parallel=auto ", "")  # which is an option of planning only


def training(config: PlanTrainingConfig) -> Training:
    """The training of a recipe. Raises ValueError when the size cannot be cut into patches, the window is not whole blocks, or the
    planner does not support the recipe."""
    goal, model, window = config.objective, config.model, config.data.window
    known = "the planner knows dmd and flow_match, as in +distill=live_avatar_4step and +train=audio_adapter"
    require(isinstance(goal, DmdConfig | FlowMatchConfig), f"objective={goal.name} is not planned; {known}")
    past, reach, block = goal.window.past, goal.window.reach, model.rollout.block_frames
    require(reach == "clip", f"objective.window.reach={reach} is not planned; the planner knows windows of full attention: clip")
    require(window > 0, "data.window=0: the planner knows no whole clips; set the latent frames of a sample")
    require(past < window, f"objective.window.past={past} must lie between 0 and data.window={window}")
    require(not past or bool(model.motion.buckets), f"objective.window.past={past}: model={model.name} has no motion memory; use 0")
    if isinstance(goal, DmdConfig):
        below = max(block, window // block * block)
        require(window % block == 0, f"data.window={window} is not whole blocks of {block} latent frames; use {below} or {below + block}")
        sentence = "each role would be a transformer of its own; the planner knows adapters on a shared one, of rank 128 in the recipes"
        require(goal.learn.rank > 0, f"objective.learn.rank=0: {sentence}")
    found = training_of(config, *size_for(model, config.video))
    targets = goal.learn.targets
    require(bool(learnt(found)), f"objective.learn.targets={targets} names nothing of this model; use such as audio_injectors")
    return found


def _notes(config: PlanTrainingConfig, work: Training) -> Iterator[str]:
    """Sentences on the assumptions of the plans."""
    rank, budget = work.learn.rank, config.budget
    learns = f"adapters of rank {rank}" if rank else "weights themselves"
    yield f"a 'block' below is a step of {budget.accumulate} batches of {budget.batch_size}; {learns} learn, in {config.speed.precision}"
    if not config.model.resolution and config.video.size == PHOTO_SIZE:
        usual = f"a training has no photograph, so the usual {ASSUMED_SIZE} is planned"
        yield f"video.size=photo: {usual}; video.size=WIDTHxHEIGHT plans another"
    yield f"latents, text rows and speech features are made beforehand ({written('precompute')}), so that no encoder is here"
