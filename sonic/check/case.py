"""What the device check runs: the published 14B on a GPU and a small model on a CPU, with random weights and random inputs."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sonic.bench.plan_check import RandomWan
from sonic.check.check_config import CheckConfig
from sonic.checkpoint.load import fill_randomly, without_memory
from sonic.cli import Entry, compose
from sonic.config import Ranks
from sonic.geometry import PIXELS_PER_LATENT, plan_blocks
from sonic.inference.batch import Opened, open_components
from sonic.inference.components import DTYPES, find_device
from sonic.inference.distributed_rollout import distributed_rollout
from sonic.inference.infer_config import BenchConfig, InferConfig, PlanChoiceConfig
from sonic.inference.rollout import NoiseSource, Sampling, seeded
from sonic.model.dit import AvatarDiT
from sonic.parallel.context import DistributedContext
from sonic.parallel.parallel_config import ParallelConfig
from sonic.planner.workload import Workload, workload
from sonic.training.objective_config import OBJECTIVE_CONFIGS
from sonic.training.plan_training import PlanTrainingConfig
from sonic.types import Conditions, LatentBlock

BENCH = Entry("bench", BenchConfig)
TRAINING = Entry("plan_training", PlanTrainingConfig, ("train", "distill"), {"objective": OBJECTIVE_CONFIGS})

VIDEO = ("model=live_avatar_14b", "sampler=live_avatar", "video.size=704x384", "parallel=single", "hardware=here")
DISTILL = ("+distill=live_avatar_4step", "video.size=384x256", "hardware=here", "hardware.devices=1", "parallel=fsdp")
TURNS = ("objective.critic_turns=1", "budget.max_steps=2", "budget.accumulate=1", "log.samples_every=0", "log.every_steps=1")
SMALL = (  # what a CPU runs in seconds
    *("model.trunk.hidden_dim=128", "model.trunk.ffn_dim=256", "model.trunk.num_heads=2", "model.trunk.num_layers=4"),
    *("model.audio.inject_layers=[0,2]", "model.text.text_dim=64", "model.text.text_len=16", "video.size=64x64"),
)
SMALL_TURNS = ("objective.learn.rank=8", "data.window=6")
SMALL_VAE = {"base_dim": 4, "num_res_blocks": 1}


@dataclass(frozen=True)
class CheckCase:
    """What every section is given: the device, the folder for files, a video and a distillation."""

    device: torch.device
    folder: Path
    bench: BenchConfig
    training: PlanTrainingConfig

    @property
    def on_gpu(self) -> bool:
        """Whether the figures of a GPU can be measured."""
        return self.device.type == "cuda"

    @property
    def vae(self) -> dict[str, int]:
        """The shape of the VAE in diffusers' names; {} is the published one."""
        return {} if self.on_gpu else SMALL_VAE

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the transformer."""
        return DTYPES[self.bench.model.rollout.dtype]

    def work(self, layers: int = 0) -> Workload:
        """The video by a model of so many layers (0 = all) as the planner sees it."""
        whole = workload(self.bench)
        count = whole.model.trunk.num_layers
        return whole.with_layers(range(min(layers, count) or count))

    def video(self, parallel: ParallelConfig, layers: int = 0, *, steps: int = 4) -> InferConfig:
        """The config of the video under a plan, by a model of so many layers (0 = all)."""
        same = {name: getattr(self.bench, name) for name in ("run", "video", "hardware", "decode")}
        sampler, force = replace(self.bench.sampler, sample_steps=steps), PlanChoiceConfig(force=not self.on_gpu)
        return InferConfig(**same, model=self.work(layers).model, parallel=parallel, sampler=sampler, plan=force)

    @contextmanager
    def opened(self, config: InferConfig, *, ranks: Ranks | None = None, decodes: bool = False) -> Iterator[tuple[Opened, RandomWan]]:
        """The loaded networks of a video and its family; their memory is free again after the `with` block."""
        family = RandomWan(decodes=decodes, vae=self.vae)
        with open_components(config, ranks or Ranks(), family=family) as found:
            found.components.load()
            yield found, family
            found.components.model = found.components.autoencoder = None
        self.release()

    def model(self, layers: int, dtype: torch.dtype) -> AvatarDiT:
        """A transformer of so many layers on the device; its random weights are the same each time."""
        model = without_memory(self.work(layers).model).to(dtype).eval().requires_grad_(False).to_empty(device=self.device)
        fill_randomly(model)
        return model

    def blocks(self, model: AvatarDiT, context: DistributedContext, *, count: int) -> Iterator[LatentBlock]:
        """Yield so many blocks of a video, as the library makes them; on every call the same."""
        work = replace(self.work(), model=model.config)
        conditions = random_conditions(work, count).to(device=context.world.device, dtype=self.dtype)
        spans, sampling = plan_blocks(count * work.frames, work.latent_frames), Sampling(self.bench.sampler, NoiseSource(seeded(0)))
        return distributed_rollout(model, conditions, spans, sampling=sampling, context=context)

    def release(self) -> None:
        """Free what is no longer used of the GPU, and begin to measure its peak anew."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)


def case_of(config: CheckConfig, folder: Path) -> CheckCase:
    """The case of a command line. Raises ValueError when this machine has no such device."""
    device = find_device(config.device)
    small = device.type == "cpu"
    training = compose(TRAINING, [*DISTILL, *TURNS, *SMALL * small, *SMALL_TURNS * small, f"speed.device={device}"])
    return CheckCase(device, folder, compose(BENCH, [*VIDEO, f"run.device={device}", *SMALL * small]), training)


def random_conditions(work: Workload, blocks: int) -> Conditions:
    """Random conditions of so many blocks or clips, in host memory."""
    rng, model, size = seeded(0), work.model, (work.height // PIXELS_PER_LATENT, work.width // PIXELS_PER_LATENT)
    draw = lambda *shape: torch.randn(1, *shape, generator=rng)  # noqa: E731
    channels, audio = model.trunk.latent_channels, model.audio
    return Conditions(
        ref=draw(channels, 1, *size),
        text=draw(model.text.text_len, model.text.text_dim),
        audio=draw(audio.num_audio_layers, audio.audio_dim, blocks * work.frames),
        motion=draw(channels, sum(model.motion.buckets), *size),
    )
