"""Options of the command ablate (stdlib only; hydra reads the values of a grid)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sonic.config import CommandConfig, RunConfig, names_in, one_of, option, require
from sonic.training.train_config import LogConfig

COMMON = {"evaluate": ["+preset=fast_preview"], "train": [], "plan": []}  # job -> `common` where it is not given
CLIPS = ("clips", "seconds", "num_videos")  # options eval.* that a sweep sets for its cells
OWN = {
    "evaluate": ["json", "eval.seed", "eval.videos", *(f"eval.{name}" for name in CLIPS)],
    "train": ["seed", "name", "export"],
    "plan": ["json"],
}


@dataclass
class CellsConfig:
    """How the cells of a sweep are run."""

    jobs: int = option(1, "runs (a cell with one seed) at once")
    engine: str = option("local", "what runs them: local (processes here), submitit (Slurm) or ray")
    minutes: int = option(240, "minutes after which a run is stopped (engine=local and submitit); a training continues with retry=true")
    retry: bool = option(False, "try failed runs again")

    def __post_init__(self) -> None:
        one_of(self.engine, names_in("evaluation.sweep.ENGINES"), "engine")
        for name in ("jobs", "minutes"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)}: need at least 1")


@dataclass
class AblateConfig(CellsConfig, CommandConfig):
    """Trains, evaluates or plans every combination of a grid of options and writes a report; the grid is a recipe such as +ablate=steps,
    or given as grid.OPTION=value,value."""

    job: str = option("evaluate", f"what a cell does: {', '.join(COMMON)}; the grid has options of that command")
    grid: dict[str, Any] = option(dict, "options and the values each takes: grid.OPTION=2,3 or [2,3] or range(1,5), or grid.GROUP=a,b")
    exclude: list[dict[str, Any]] = option([], "combinations that are left out: [{weights: student, sampler.sample_steps: 40}]")
    common: list[str] | None = option(None, "further options of every cell; empty = +preset=fast_preview for job=evaluate, else none")
    score: bool | None = option(None, "job=train: evaluate what was trained; empty = where it is a transformer of the preview's kind")
    clips: int = option(8, "clips of each evaluation")
    seeds: list[int] = option([1], "seeds of each cell: of the evaluated clips, which all count together, or of the trainings")
    seconds: float = option(8.0, "length of each clip")
    num_videos: int = option(2, "clips of each evaluation that the report shows")
    run: RunConfig = option(RunConfig)
    log: LogConfig = option(LogConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self.job, list(COMMON), "job")
        require(bool(self.grid), "grid is empty; choose +ablate=steps, or give grid.OPTION=value,value")
        self.grid = {name: _values(name, given) for name, given in self.grid.items()}
        self.common = COMMON[self.job] if self.common is None else self.common
        given = {item.lstrip("+").partition("=")[0] for item in (*self.grid, *self.common)}
        taken = sorted(given.intersection(OWN[self.job]))
        require(not taken, f"{', '.join(taken)}: a sweep sets this itself, by its own options seeds, {', '.join(CLIPS)} and name")
        for combination in self.exclude:
            known = bool(combination) and all(name in self.grid for name in combination)
            require(known, f"exclude has {combination}, which does not name options of the grid ({', '.join(self.grid)})")
        require(bool(self.seeds), "seeds=[] scores nothing; give at least one")
        require(self.job != "plan" or len(self.seeds) == 1, f"seeds={self.seeds}: a plan has nothing random; leave seeds out")
        require(self.score is None or self.job == "train", f"score={self.score} is for job=train; under job={self.job} leave it out")
        require(self.clips >= 1, f"clips={self.clips}: need at least 1")
        require(0 <= self.num_videos <= self.clips, f"num_videos={self.num_videos} must lie between 0 and clips={self.clips}")


def _values(name: str, given: Any) -> list[Any]:
    """The values of an option of the grid, which a text gives in the syntax of hydra's sweeps. Raises ValueError when it gives none."""
    reason = "it has no values to try"
    if isinstance(given, str):
        from hydra.core.override_parser.overrides_parser import OverridesParser
        from hydra.errors import HydraException

        try:
            override = OverridesParser.create().parse_override(f"grid={given}")
            given = list(override.sweep_iterator()) if override.is_sweep_override() else override.value()
        except HydraException as error:
            reason = " ".join(str(error).split())
            given = []
    values = [_plain(each) for each in (given if isinstance(given, list) else [given])]
    usable = bool(values) and not any(each == "" or isinstance(each, dict) for each in values)
    require(usable, f"grid.{name}: {reason}; write 1,2 or [1,2] or range(1,5) or choice(a,b), and put texts with other signs in quotes")
    return values


def _plain(value: Any) -> Any:
    """A value of hydra's parser with texts in quotes as they are."""
    return [_plain(each) for each in value] if isinstance(value, list) else getattr(value, "text", value)
