"""Options of the command ablate (stdlib only)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sonic.config import CommandConfig, RunConfig, names_in, one_of, option, require
from sonic.training.train_config import LogConfig


@dataclass
class CellsConfig:
    """How the cells of a sweep are run."""

    jobs: int = option(1, "evaluations (a cell with one seed) that run at once")
    engine: str = option("local", "what runs them: local (processes here), submitit (Slurm) or ray")
    minutes: int = option(240, "minutes after which an evaluation is stopped (engine=local and submitit)")
    retry: bool = option(False, "try failed evaluations again")

    def __post_init__(self) -> None:
        one_of(self.engine, names_in("evaluation.sweep.ENGINES"), "engine")
        for name in ("jobs", "minutes"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)}: need at least 1")


@dataclass
class AblateConfig(CellsConfig, CommandConfig):
    """Scores every combination of a grid of options and writes a report; the grid is a recipe such as +ablate=steps, or given as
    grid.OPTION=[...]."""

    grid: dict[str, Any] = option(dict, "options of the command evaluate and the values each takes; grid.sampler.sample_steps=[2,3,4]")
    exclude: list[dict[str, Any]] = option([], "combinations that are left out: [{weights: student, sampler.sample_steps: 40}]")
    common: list[str] = option(["+preset=fast_preview"], "further options of every cell")
    clips: int = option(8, "clips of each seed")
    seeds: list[int] = option([1], "seeds; all their clips count together")
    seconds: float = option(8.0, "length of each clip")
    num_videos: int = option(2, "clips of each seed that the report shows")
    run: RunConfig = option(RunConfig)
    log: LogConfig = option(LogConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.grid), "grid is empty; choose +ablate=steps, or give grid.OPTION=[value,value]")
        for name, values in self.grid.items():
            require(isinstance(values, list) and bool(values), f"grid.{name}={values} is not a list of values such as [2,3,4]")
        for combination in self.exclude:
            known = bool(combination) and all(name in self.grid for name in combination)
            require(known, f"exclude has {combination}, which does not name options of the grid ({', '.join(self.grid)})")
        require(bool(self.seeds), "seeds=[] scores nothing; give at least one")
        require(self.clips >= 1, f"clips={self.clips}: need at least 1")
        require(0 <= self.num_videos <= self.clips, f"num_videos={self.num_videos} must lie between 0 and clips={self.clips}")
