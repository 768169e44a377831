"""The options of the command judge."""

from __future__ import annotations

from dataclasses import dataclass

from sonic.config import PHOTO_SIZE, FaceLocationConfig, option, require
from sonic.training.train_config import WandbConfig


@dataclass
class JudgeConfig:
    """Compare a finished video with the photograph and the recording it was made from; exit code 1 when its sound does not match."""

    mp4: str = option("", "the MP4 to judge")
    image: str = option("astronaut", "the photograph it was made from")
    audio: str = option("sample", "the recording it was made from")
    size: str = option(PHOTO_SIZE, "video.size it was made with")
    min_resolution: int = option(0, "video.min_resolution it was made with; 0 = by size")
    json: str = option("", "JSON file to write the results to")
    face: FaceLocationConfig = option(FaceLocationConfig)
    log: WandbConfig = option(WandbConfig)

    def __post_init__(self) -> None:
        require(self.mp4 != "", "mp4= is empty; name the MP4 to judge")
