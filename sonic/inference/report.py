"""Reports a run to the user: time per stage, the result for result.json, a summary for the log, and a contact sheet."""

from __future__ import annotations

import logging
import platform
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import sonic
from sonic.config import SamplerConfig
from sonic.model.compile import CompileTime
from sonic.sampling.schedules import is_table, sigmas_of
from sonic.system.device_stream import HOST, DeviceStream, Event
from sonic.system.files import written_temporary
from sonic.types import FrameChunk, Inputs, Portrait

log = logging.getLogger("sonic.inference")
STAGES = ("load", "encode", "denoise", "decode", "write")
PICTURES, PICTURE_WIDTH, GAP, STRIP = 12, 148, 4, 90
SHOWN_TIMESTEPS = 8
INK, PAPER, SOUND, MOUTH = (40, 40, 40), (250, 250, 248), (90, 120, 170), (190, 70, 60)


@dataclass(frozen=True)
class Result:
    """The result of one video, as written to result.json, where the plan of the job and the versions of the software are added to it.

    frames_per_second is measured from the loaded inputs to the finished file; first_frame_s from the start of the command, including
    imports.
    """

    output: str
    frames: int
    fps: float
    audio_seconds: float
    frames_per_second: float
    first_frame_s: float
    peak_rss_gib: float
    peak_vram_gib: float
    stages_s: dict[str, float]
    sampling: dict = field(default_factory=dict)  # solver, schedule, noise levels, guidance, weights and their precision
    face: dict = field(default_factory=dict)  # face_box, face.mouth and the crop in px of the photograph, for a preview
    sound: dict = field(default_factory=dict)  # by how much it is later than the pictures, and what lip_align measured

    def summary(self) -> str:
        """The result in two lines for the log."""
        memory = f"{self.peak_rss_gib:.2f} GiB memory" + (f", {self.peak_vram_gib:.2f} GiB on the GPU" if self.peak_vram_gib else "")
        seconds = self.frames / self.fps
        return f"{self.output}\n{self.frames} frames, {seconds:.2f} s of video at {self.frames_per_second:.1f} frames per second, {memory}"


class StageTimer:
    """Measures the seconds spent in each stage. Stages in different threads overlap, so their sum may exceed the elapsed time.

    A stage lasts from where its stream is when it begins to where it is when it ends; the host does not wait for either.
    """

    def __init__(self, begun: float | None = None) -> None:
        """`begun` is the time.perf_counter() of the start of the job (default: now); the time since then counts as loading."""
        now = time.perf_counter()
        self.start = now if begun is None else begun
        self._seconds = dict.fromkeys(STAGES, 0.0) | {"load": now - self.start}
        self._unread: deque[tuple[str, Event, Event]] = deque()  # stages whose end the device may not have reached
        self._lock = Lock()

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each stage, after waiting for the device."""
        self._read(lambda end: end.synchronize() is None)
        return dict(self._seconds)

    @contextmanager
    def stage(self, name: str, stream: DeviceStream = HOST) -> Iterator[None]:
        """Add the time of what is inside the `with` block, on the host or a stream of the device, to a stage."""
        begun = stream.record(timed=True)
        try:
            yield
        finally:
            self._unread.append((name, begun, stream.record(timed=True)))
            self._read(lambda end: end.query())

    def _read(self, reached: Callable[[Event], bool]) -> None:
        """Add up the stages, up to the first whose end is not reached."""
        with self._lock:
            while self._unread and reached(self._unread[0][2]):
                name, begun, end = self._unread.popleft()
                self._seconds[name] += begun.elapsed_time(end) / 1000

    def each(self, name: str, items: Iterable, stream: DeviceStream = HOST) -> Iterator:
        """Yield the items unchanged, and add the time to produce each one to a stage."""
        source = iter(items)
        while True:
            with self.stage(name, stream):
                item = next(source, None)
            if item is None:
                return
            yield item

    @contextmanager
    def compiling(self, time: CompileTime) -> Iterator[None]:
        """Add what is compiled inside the `with` block as the stage "compile", which is part of others, and log it."""
        number, seconds = time.number, time.seconds
        yield
        if time.number > number:
            self._seconds["compile"] = time.seconds - seconds
            log.info("%d pieces of the transformer were compiled in %.1f s", time.number - number, self._seconds["compile"])

    def passed(self) -> float:
        """Seconds since the start of the job."""
        return time.perf_counter() - self.start


class FrameRecorder:
    """Collects the data of the contact sheet while the frames are written.

    `pictures` are 12 small frames, keyed by index; `opening` is, for every frame, the mean absolute difference between the mouth region
    and the photograph, in levels of 0..255.
    """

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.opening = np.zeros(inputs.num_frames, np.float32)
        self.pictures: dict[int, Image.Image] = {}
        self._wanted = {int((index + 0.5) * inputs.num_frames / PICTURES) for index in range(PICTURES)}
        self._mouth = mouth_window(inputs.portrait)
        self._still = inputs.portrait.pixels[self._mouth].astype(np.int16)

    def record(self, chunk: FrameChunk) -> None:
        """Record a chunk of frames."""
        for index, picture in enumerate(np.asarray(chunk.pixels), chunk.start):
            self.opening[index] = np.abs(picture[self._mouth].astype(np.int16) - self._still).mean()
            if index in self._wanted:
                self.pictures[index] = self._strip(picture)

    def _strip(self, picture: np.ndarray) -> Image.Image:
        """A column of the contact sheet: the frame, and below it the region of the face if the face is known."""
        face = self.inputs.portrait.face
        if face is None:
            return _at_width(Image.fromarray(np.ascontiguousarray(picture)), PICTURE_WIDTH)
        left, top = max(0, int(face.x - face.width / 4)), max(0, int(face.y))
        near = picture[top : int(face.y + 1.3 * face.height), left : int(face.x + 1.25 * face.width)]
        views = [_at_width(Image.fromarray(np.ascontiguousarray(view)), PICTURE_WIDTH) for view in (picture, near)]
        strip = Image.new("RGB", (PICTURE_WIDTH, sum(view.height for view in views) + GAP), PAPER)
        strip.paste(views[0], (0, 0))
        strip.paste(views[1], (0, views[0].height + GAP))
        return strip


def mouth_window(portrait: Portrait) -> tuple[slice, slice]:
    """Rows and columns of the mouth region in the photograph; the whole photograph when the mouth is unknown."""
    if portrait.mouth is None:
        return slice(None), slice(None)
    mouth, (height, width) = portrait.mouth, portrait.pixels.shape[:2]
    top, bottom = int(mouth.y - 0.7 * mouth.half_width), int(mouth.y + 1.3 * mouth.half_width) + 1
    left, right = int(mouth.x - 1.2 * mouth.half_width), int(mouth.x + 1.2 * mouth.half_width) + 1
    top, left = min(max(0, top), height - 1), min(max(0, left), width - 1)
    return slice(top, max(top + 1, bottom)), slice(left, max(left + 1, right))


def draw_contact_sheet(recorder: FrameRecorder, path: Path) -> None:
    """Write the contact sheet as PNG: frames over time, above the waveform and the curve of the mouth movement."""
    pictures = [recorder.pictures[index] for index in sorted(recorder.pictures)]
    tall = max(picture.height for picture in pictures)
    width = len(pictures) * (PICTURE_WIDTH + GAP) + GAP
    sheet = Image.new("RGB", (width, tall + 2 * STRIP + 5 * GAP + 20), PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(12)
    for column, (index, picture) in enumerate(zip(sorted(recorder.pictures), pictures, strict=True)):
        left = GAP + column * (PICTURE_WIDTH + GAP)
        sheet.paste(picture, (left, GAP))
        draw.text((left + PICTURE_WIDTH / 2, tall + 2 * GAP), f"{index / recorder.inputs.fps:.2f} s", INK, font, "ma")
    below = tall + 3 * GAP + 16
    columns = width - 2 * GAP
    loud = _envelope(recorder.inputs, columns) * STRIP / 2
    for column, height in enumerate(loud):
        draw.line([(GAP + column, below + STRIP / 2 - height), (GAP + column, below + STRIP / 2 + height)], SOUND)
    times = np.linspace(0, len(recorder.opening) - 1, columns)
    open_ = np.interp(times, np.arange(len(recorder.opening)), recorder.opening) / max(1e-6, float(recorder.opening.max()))
    floor = below + 2 * STRIP + GAP
    draw.line([(GAP + column, floor - (STRIP - 4) * value) for column, value in enumerate(open_)], MOUTH, 2)
    draw.text((GAP, below), "speech", SOUND, font)
    draw.text((GAP, below + STRIP + GAP), "mouth (change from rest)", MOUTH, font)
    with written_temporary(path) as partial:
        sheet.save(partial, "PNG")


def sampling_of(sampler: SamplerConfig, weights: str, dtype: torch.dtype, *, timesteps: list[float]) -> dict:
    """The sampling section of result.json: solver, schedule, noise levels, timesteps passed to the model, guidance, weights and dtype."""
    sigmas = sigmas_of(sampler.schedule, sampler.sample_steps, sampler.sample_shift)
    return {
        "solver": sampler.name,
        "schedule": sampler.schedule,
        "table": is_table(sampler.schedule, sampler.sample_steps),
        "steps": sampler.sample_steps,
        "sigmas": [round(sigma, 6) for sigma in sigmas.tolist()],
        "timesteps": [round(timestep, 3) for timestep in timesteps],
        "guide_scale": sampler.sample_guide_scale,
        "audio_guide_scale": sampler.audio_guide_scale,
        "weights": weights,
        "dtype": str(dtype).removeprefix("torch."),
    }


def sampling_words(found: dict) -> str:
    """The output of `sampling_of` as one line for the log; more than 8 timesteps are shortened to the first three and the last two."""
    asked = [f"{round(timestep, 1):g}" for timestep in found["timesteps"]]
    shown = asked if len(asked) <= SHOWN_TIMESTEPS else [*asked[:3], "...", *asked[-2:]]
    way = "its table" if found["table"] else "computed"
    scales = [found["guide_scale"], *([found["audio_guide_scale"]] * (found["audio_guide_scale"] != 1))]
    guided = "no guidance" if scales == [1] else f"guidance {' and '.join(f'{scale:g}' for scale in scales)}"
    levels = f"{found['steps']} steps of schedule {found['schedule']} ({way}): timesteps {', '.join(shown)}"
    return f"{found['solver']}, {levels}; {guided}; weights: {found['weights']} in {found['dtype']}"


def versions() -> dict[str, str]:
    """Versions of the software that the result depends on."""
    packages = {name: metadata.version(name) for name in ("torch", "numpy", "av", "librosa", "scikit-image", "ai-edge-litert")}
    return {"sonic": sonic.__version__, "python": platform.python_version(), **packages}


def _at_width(picture: Image.Image, width: int) -> Image.Image:
    size = (width, max(1, round(picture.height * width / picture.width)))
    return picture.resize(size, Image.Resampling.BOX if picture.width > width else Image.Resampling.BICUBIC)


def _envelope(inputs: Inputs, columns: int) -> np.ndarray:
    """The waveform over the length of the video: the peak of the samples in each column, scaled to 0..1."""
    speech = inputs.speech
    length = inputs.num_frames * speech.sample_rate // inputs.fps
    edges = np.linspace(0, min(length, len(speech.samples)), columns + 1).astype(int)
    loud = np.array([np.abs(speech.samples[a : max(b, a + 1)]).max(initial=0) for a, b in zip(edges, edges[1:], strict=False)])
    return loud / max(1e-6, float(loud.max()))
