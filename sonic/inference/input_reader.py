"""Reads the scenes of requests in a process beside this one: a file that crashes a decoder costs its own film and no other."""

from __future__ import annotations

import logging
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from sonic.data.audio import load_speech
from sonic.data.image import load_image
from sonic.data.video import timed_frames
from sonic.inference.infer_config import InferConfig
from sonic.inference.inputs import inputs_of, open_scene
from sonic.system.worker import Crashed, Worker
from sonic.types import Scene

log = logging.getLogger("sonic.inference")

READERS: Mapping[str, Callable] = {"image": load_image, "audio": load_speech, "face.masks": load_image, "motion.pose": timed_frames}


class SceneRead(NamedTuple):
    """A scene, and what was said while it was read: log records, and warnings as (text, category, file, line)."""

    scene: Scene
    records: list[logging.LogRecord]
    warned: list[tuple[str, type[Warning], str, int]]


class SceneReader:
    """Opens scenes in another process with as many threads as this one has, so that they are the same to the last bit."""

    def __init__(self) -> None:
        self.worker = Worker(partial(_prepare, torch.get_num_threads()))

    def open(self, config: InferConfig) -> Scene:
        """The scene of a request. Raises what open_scene raises, and ValueError for a file that crashes its decoder."""
        try:
            scene, records, warned = self.worker.call(_read, config)
        except Crashed as crash:
            raise ValueError(self._blame(config, crash)) from crash
        for record in records:
            logging.getLogger(record.name).handle(record)
        for told in warned:
            warnings.warn_explicit(*told)
        return scene

    def close(self) -> None:
        """End the process."""
        self.worker.close()

    def _blame(self, config: InferConfig, crash: Crashed) -> str:
        """The sentence for a crash: each input is read once more by itself, to see which of them it was."""
        given = [(option, name) for option, name in inputs_of(config) if option in READERS]
        for option, name in given:
            if self._crashes(option, name):
                format = "png" if READERS[option] is load_image else "wav" if option == "audio" else "mp4"
                other = Path(name).with_suffix(f".converted.{format}")
                return f"{option}={name}: the decoder crashed on this file ({crash}); convert it, for example: ffmpeg -i {name} {other}"
        named = " ".join(f"{option}={name}" for option, name in given)
        return f"{named}: the process that reads them died ({crash}), though each can be read alone; is there enough memory?"

    def _crashes(self, option: str, name: str) -> bool:
        """Whether an input that is read by itself ends the process, too."""
        try:
            self.worker.call(_probe, option, name)
        except Crashed:
            return True
        except Exception as error:
            log.debug("%s=%s: %s", option, name, error)
        return False


class _Collected(logging.Handler):
    """Keeps log records in a form that can be sent."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        record.msg, record.args, record.exc_info = record.getMessage(), None, None
        self.records.append(record)


def _prepare(threads: int) -> None:
    torch.set_num_threads(threads)
    logging.getLogger("sonic").setLevel(logging.INFO)


def _read(config: InferConfig) -> SceneRead:
    log, collected = logging.getLogger("sonic"), _Collected()
    log.addHandler(collected)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            scene = open_scene(config)
    finally:
        log.removeHandler(collected)
    warned = [(str(each.message), each.category, each.filename, each.lineno) for each in caught]
    return SceneRead(scene, collected.records, warned)


def _probe(option: str, name: str) -> None:
    """Read one input to its end."""
    found = READERS[option](name)
    if option == "motion.pose":
        deque(found, maxlen=0)
