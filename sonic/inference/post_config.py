"""Options of what is done to the frames and the sound of a video after the model made them."""

from __future__ import annotations

from dataclasses import dataclass

from sonic.config import option, require

MOST_OFFSET_S = 0.2


@dataclass
class PostConfig:
    """What is done to a video after the model made it."""

    alignment_offset: float = option(
        0.0, "seconds by which the sound is later than the picture, as by ffmpeg -itsoffset; negative = earlier"
    )
    lip_align: bool = option(False, "measure by how much the mouth of this very video is late, and make the sound as late, on top of that")
    smooth_motion: float = option(0.0, "0 = off to 1: how much of the motion that is too fast for a face is taken out; frames stay sharp")
    interpolate: int = option(1, "2 = twice the frame rate: between two frames comes the one halfway, by their motion")

    def __post_init__(self) -> None:
        within = abs(self.alignment_offset) <= MOST_OFFSET_S
        require(within, f"post.alignment_offset={self.alignment_offset} must lie between -{MOST_OFFSET_S} and {MOST_OFFSET_S} s")
        require(0 <= self.smooth_motion <= 1, f"post.smooth_motion={self.smooth_motion} must lie between 0 (off) and 1")
        require(self.interpolate in (1, 2), f"post.interpolate={self.interpolate} must be 1 (off) or 2")
