"""Opens the inputs of videos; those of requests in a child process, so that a file that crashes its decoder fails only its request."""

from __future__ import annotations

import logging
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch

from sonic.data.audio import load_speech
from sonic.data.image import load_image
from sonic.data.video import timed_frames
from sonic.families.family import family_of
from sonic.inference.infer_config import InferConfig
from sonic.inference.inputs import ALL_IN_FILES, InMemory, check_duration, input_files
from sonic.system.paths import check_input
from sonic.system.worker import Crashed, Worker
from sonic.types import Inputs

log = logging.getLogger("sonic.inference")

READERS: Mapping[str, tuple[Callable, str]] = {  # option -> what reads its files, and the format that damaged ones are converted to
    "image": (load_image, "png"),
    "audio": (load_speech, "wav"),
    "face.masks": (load_image, "png"),
    "motion.pose": (timed_frames, "mp4"),
}


def open_inputs(config: InferConfig, memory: InMemory = ALL_IN_FILES) -> Inputs:
    """Read and check the inputs of a video. Raises ValueError with one sentence for anything that is wrong with them."""
    _refuse_with_memory(config, memory)
    for option, name in input_files(config, memory):
        check_input(name, option)
    inputs = family_of(config.model).open(config, memory)
    if memory.sound is None:
        check_duration(config.video, inputs.speech.seconds, f"audio={config.audio}" if memory.speech is None else "audio")
    return inputs


def _refuse_with_memory(config: InferConfig, memory: InMemory) -> None:
    """Raise ValueError for options that cannot be combined with sound in memory, or with sound that is still arriving."""
    if config.face.masks and (memory.speech is not None or memory.sound is not None):
        raise ValueError("face.masks needs audio=a.wav+b.wav, a file for each voice; save the recordings first")
    if memory.sound is None:
        return
    rollout, model = config.model.rollout, config.model.name
    if rollout.clip_frames:
        raise ValueError(
            f"model={model} makes clips of {config.video.infer_frames} frames whose sound it needs whole; give audio as a file or as "
            "(samples, sample_rate), or use a model that goes block by block: preview or live_avatar_14b"
        )
    needed_whole = (
        (config.video.compat, f"video.compat={config.video.compat}", "its clips need their sound whole"),
        (config.video.duration, f"video.duration={config.video.duration}", "its length is not known before it ends"),
        (config.motion.pose, f"motion.pose={config.motion.pose}", "the poses are read for a length that is known"),
        (config.motion.head != "off", f"motion.head={config.motion.head}", "the motion is drawn for a length that is known"),
        (not config.decode.online, "decode.online=false", "nothing would be decoded before the sound ends"),
    )
    for asked, option, why in needed_whole:
        if asked:
            raise ValueError(f"{option} does not go with audio that is still arriving: {why}; leave it out, or give a recording")


class InputReader:
    """Opens the inputs of requests in a child process that has as many torch threads as this one, so that the result is bit-identical."""

    def __init__(self) -> None:
        self.worker = Worker(partial(_prepare, torch.get_num_threads()))

    def open(self, config: InferConfig) -> Inputs:
        """Read the inputs of a request and repeat its log records and warnings here.

        Raises what `open_inputs` raises, and ValueError for a file that crashes its decoder.
        """
        try:
            inputs, records, warned = self.worker.call(_read, config)
        except Crashed as crash:
            raise ValueError(self._blame(config, crash)) from crash
        for record in records:
            logging.getLogger(record.name).handle(record)
        for given in warned:
            warnings.warn_explicit(*given)
        return inputs

    def close(self) -> None:
        """End the child process."""
        self.worker.close()

    def _blame(self, config: InferConfig, crash: Crashed) -> str:
        """The error message for a crash. Each input is read once more on its own to find the one that crashes."""
        given = [(option, name) for option, name in input_files(config) if option in READERS]
        for option, name in given:
            if self._crashes(option, name):
                other = Path(name).with_suffix(f".converted.{READERS[option][1]}")
                return f"{option}={name}: the decoder crashed on this file ({crash}); convert it, for example: ffmpeg -i {name} {other}"
        named = " ".join(f"{option}={name}" for option, name in given)
        return f"{named}: the process that reads them died ({crash}), though each can be read alone; is there enough memory?"

    def _crashes(self, option: str, name: str) -> bool:
        """Whether reading this input alone crashes the child process."""
        try:
            self.worker.call(_probe, option, name)
        except Crashed:
            return True
        except Exception as error:
            log.debug("%s=%s: %s", option, name, error)
        return False


class _Collected(logging.Handler):
    """Log handler that keeps records in a form that can be pickled."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        record.msg, record.args, record.exc_info = record.getMessage(), None, None
        self.records.append(record)


def _prepare(threads: int) -> None:
    torch.set_num_threads(threads)
    logging.getLogger("sonic").setLevel(logging.INFO)


def _read(config: InferConfig) -> tuple[Inputs, list[logging.LogRecord], list[tuple[str, type[Warning], str, int]]]:
    """The inputs of a video, with the log records and the warnings (text, category, file, line) of reading them."""
    log, collected = logging.getLogger("sonic"), _Collected()
    log.addHandler(collected)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            inputs = open_inputs(config)
    finally:
        log.removeHandler(collected)
    warned = [(str(each.message), each.category, each.filename, each.lineno) for each in caught]
    return inputs, collected.records, warned


def _probe(option: str, name: str) -> None:
    """Read one input completely."""
    found = READERS[option][0](name)
    if option == "motion.pose":
        deque(found, maxlen=0)
