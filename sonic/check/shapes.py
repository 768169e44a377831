"""The shapes of the device check, as options of other commands: those of the published 14B on a GPU, small ones on a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from sonic.bench.plan_check import RandomWan
from sonic.check.check_config import CheckConfig
from sonic.cli import Entry, compose
from sonic.inference.components import DTYPES, find_device
from sonic.inference.infer_config import BenchConfig, InferConfig, PlanChoiceConfig
from sonic.parallel.parallel_config import ParallelConfig
from sonic.planner.workload import Workload, workload
from sonic.training.objective_config import OBJECTIVE_CONFIGS
from sonic.training.plan_training import PlanTrainingConfig

BENCH = Entry("bench", BenchConfig)
TRAINING = Entry("plan_training", PlanTrainingConfig, ("train", "distill"), {"objective": OBJECTIVE_CONFIGS})

MODEL = ("model=live_avatar_14b",)
VIDEO = ("sampler=live_avatar", "video.size=704x384", "parallel=single", "hardware=here")
DISTILL = ("+distill=live_avatar_4step", "video.size=384x256", "hardware=here", "hardware.devices=1", "parallel=fsdp")
TURNS = ("objective.critic_turns=1", "budget.max_steps=2", "budget.accumulate=1", "log.samples_every=0", "log.every_steps=1")
SMALL = (  # what a CPU runs in seconds
    *("model.trunk.hidden_dim=128", "model.trunk.ffn_dim=256", "model.trunk.num_heads=2", "model.trunk.num_layers=4"),
    *("model.audio.inject_layers=[0,2]", "model.text.text_dim=64", "model.text.text_len=16", "video.size=64x64"),
)
SMALL_TURNS = ("objective.learn.rank=8", "data.window=6")
SMALL_VAE = {"base_dim": 4, "num_res_blocks": 1}  # of diffusers' AutoencoderKLWan
CPU_GIB = 16  # address space of a CPU process in which the 14B does not fit, but Python and torch do


@dataclass(frozen=True)
class Case:
    """What every section is given: the device, the folder for files, the configs of a video and of a distillation, and the shape of the VAE.

    `options` are the options of the full-sized video on this device.
    """

    device: torch.device
    folder: Path
    bench: BenchConfig
    training: PlanTrainingConfig
    options: tuple[str, ...] = ()
    vae: Mapping[str, Any] = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        """Whether figures of a GPU can be measured."""
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the transformer."""
        return DTYPES[self.bench.model.rollout.dtype]

    def video(self, parallel: ParallelConfig, layers: int = 0, *, steps: int = 4) -> InferConfig:
        """The config of a video under a plan, by a model of so many layers (0 = all)."""
        same = {name: getattr(self.bench, name) for name in ("run", "video", "hardware", "decode")}
        sampler, force = replace(self.bench.sampler, sample_steps=steps), PlanChoiceConfig(force=not self.on_gpu)
        return InferConfig(**same, model=self.work(layers).model, parallel=parallel, sampler=sampler, plan=force)

    def work(self, layers: int = 0) -> Workload:
        """The video of a model of so many layers (0 = all) as the planner sees it."""
        whole = workload(self.bench)
        count = whole.model.trunk.num_layers
        return whole.with_layers(range(min(layers, count) or count))

    def family(self, *, decodes: bool = False) -> RandomWan:
        """The model's family with random weights."""
        return RandomWan(decodes=decodes, vae=self.vae)


def case_of(config: CheckConfig, folder: Path) -> Case:
    """The case of a command line. Raises ValueError when this machine has no such device."""
    device = find_device(config.device)
    small, where = device.type == "cpu", (f"run.device={device}", "run.threads=0")
    video = (*MODEL, *VIDEO, *where, *SMALL * small)
    bench = compose(BENCH, video)
    training = compose(TRAINING, [*DISTILL, *TURNS, *SMALL * small, *SMALL_TURNS * small, f"speed.device={device}"])
    training = replace(training, log=replace(training.log, bar=False))
    return Case(device, folder, bench, training, (*MODEL, *VIDEO, *where), SMALL_VAE if small else {})
