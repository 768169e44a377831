"""Options of how far mouth and head move."""

from __future__ import annotations

from dataclasses import dataclass

from sonic.config import one_of, option, require


@dataclass
class HeadConfig:
    """Motion of the head and eyes."""

    head: str = option("off", "off = the head stays still, gentle = it sways a little and the eyes blink")
    pose: str = option("", "a video of drawn poses, which the published models follow; empty = none")
    dynamic_scale: float = option(1.0, "how far the mouth moves, 0.5 to 2.0 (published models: how strongly the sound drives them)")
    motion_scale: float = option(1.0, "how far the head moves and the eyes close (published models: how far poses move), 0.5 to 2.0")

    def __post_init__(self) -> None:
        one_of(self.head, ("off", "gentle"), "motion.head")
        for name in ("dynamic_scale", "motion_scale"):
            value = getattr(self, name)
            require(0.5 <= value <= 2, f"motion.{name}={value} must lie between 0.5 and 2.0")
