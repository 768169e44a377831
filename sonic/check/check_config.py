"""Options of `sonic check`. Imports the standard library and other option modules only."""

from __future__ import annotations

from dataclasses import dataclass

from sonic.config import CommandConfig, one_of, option, require

LIMITS = {  # sections in the order in which they run, and the seconds that each may take: nine minutes together
    **{"env": 10, "numerics": 35, "kernels": 30, "single": 125, "offload": 80, "vae": 45, "video": 70, "train": 70},
    **{"ranks": 55, "memory": 20},
}


@dataclass
class CheckConfig(CommandConfig):
    """The device of this machine is checked: numbers, kernels, speed, memory and errors of the 14B model with random weights."""

    sections: list[str] = option([], f"what is checked, such as [single,train]; empty = all: {', '.join(LIMITS)}")
    limit: float = option(
        0.0, "seconds after which a section is stopped; 0 = its own limit: nine minutes for all, four times that on a CPU"
    )
    device: str = option("auto", "auto, cpu or cuda; a CPU runs every section with small shapes, and skips what only a GPU can show")
    folder: str = option("runs", "folder in which the run folder with check.jsonl is made")

    def __post_init__(self) -> None:
        for name in self.sections:
            one_of(name, list(LIMITS), "sections")
        require(self.limit >= 0, f"limit={self.limit}: need a number of seconds, or 0 for the limit of each section")
        one_of(self.device.split(":")[0], ("auto", "cpu", "cuda"), "device")
