"""The Python interface of the library: `AvatarPipeline` makes videos with the options, checks and error messages of `sonic infer`."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

import numpy as np
import torch

from sonic.arguments import (
    FIELDS,
    Picture,
    Sound,
    VideoOptions,
    model_choice,
    option_text,
    seed_of,
    with_options,
)
from sonic.cli import Entry, compose, ranks_here
from sonic.config import PRECISIONS, Ranks, VideoConfig, closest_first
from sonic.data.image import image_in_memory
from sonic.data.live_audio import LiveAudio, speech_in_memory
from sonic.data.video import VideoWriter
from sonic.encoders.speech import SPEECH_ENCODERS
from sonic.families.family import build_components, family_of
from sonic.inference.batch import Opened, Outcome, all_outcomes, make_videos, open_components
from sonic.inference.choose_plan import refuse_larger
from sonic.inference.components import Components, find_device, lora_of
from sonic.inference.generate import generate, make_video
from sonic.inference.infer_config import InferConfig
from sonic.inference.input_reader import open_inputs
from sonic.inference.inputs import InMemory, Settings, at_duration, input_files, refuse_overwriting
from sonic.inference.post_process import as_displayed
from sonic.inference.report import FrameRecorder, Result, StageTimer, sampling_of, sampling_words
from sonic.inference.sound_offset import SoundOffset
from sonic.parallel.parallel_config import PlanConfig
from sonic.planner.hardware import machine_here
from sonic.planner.search import PlanResult, search_plans
from sonic.system.paths import expanded
from sonic.types import FrameChunk, Inputs, Speech

log = logging.getLogger("sonic.inference")

INFER, PLAN = Entry("infer", InferConfig), Entry("plan", PlanConfig)


@dataclass(frozen=True)
class Video:
    """A finished video: frames uint8 [F,H,W,3] at `fps` frames per second, its sound, and the files that it was made from."""

    frames: np.ndarray
    fps: float
    speech: Speech
    made_from: tuple[tuple[str, str], ...] = ()  # (option, path), never overwritten by `save`

    @property
    def audio(self) -> tuple[np.ndarray, int]:
        """The sound as (float32 mono samples [n], sample rate in Hz), from the first frame on."""
        late, rate = round(self.speech.later_s * self.speech.sample_rate), self.speech.sample_rate
        return np.pad(self.speech.samples, (max(0, late), 0))[max(0, -late) :], rate

    def save(self, path: str | os.PathLike) -> Path:
        """Write the video with its sound to an MP4, which appears only when it is complete, and return its path.

        Raises ValueError when the file cannot be written or is one of the files that the video was made from.
        """
        target = Path(expanded(os.fspath(path)))
        refuse_overwriting(self.made_from, target)
        height, width = self.frames.shape[1:3]
        with VideoWriter(target, width, height, num_frames=len(self.frames), speech=self.speech, fps=self.fps) as writer:
            writer.write(self.frames)
        return target


class AvatarPipeline:
    """Makes talking videos from a portrait and a recording.

    With torchrun, every rank creates the pipeline; one rank leads, and the others serve it inside the constructor until it closes:

        with AvatarPipeline.from_pretrained("checkpoints/live", parallel="fsdp") as pipe:  # the other ranks get here at the end
            if pipe.leads:
                pipe(image="me.jpg", audio="me.wav").save("me.mp4")
    """

    def __init__(
        self,
        config: InferConfig,
        components: Components | None = None,
        *,
        ranks: Ranks | None = None,
        folder: Path = Path(),
        size: tuple[int, int] | None = None,
    ) -> None:
        """Use `components`, or build those that `config` names under a plan that fits.

        On ranks that do not lead, this serves the leading rank and returns when that closes its pipeline. `folder` is where videos of
        requests without an output are written, `size` the (width, height) of the video where it is known, so that the planner need not
        open the photograph.
        """
        self.config, self.ranks, self._given = config, ranks or Ranks(), components
        self._folder, self._stack, self._by_student = folder, ExitStack(), {}
        self._opened: Opened | None = None
        self._open(config, size)
        with ExitStack() as on_error:
            on_error.push(self)  # closes this pipeline when serving fails
            self._opened.serve()
            on_error.pop_all()

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike = "preview",
        *,
        torch_dtype: torch.dtype | str | None = None,
        device: torch.device | str = "auto",
        preset: str | None = None,
        lora: str | os.PathLike | None = None,
        parallel: str | None = None,
        **options: Any,
    ) -> Self:
        """Create the pipeline of a model: a name, or a folder made by `sonic convert`.

        The model preview is bundled; wan_s2v_14b and live_avatar_14b need checkpoint=FOLDER. `options` are options of `sonic infer`, such
        as seed=7 or **{"video.size": "704x384"}. Raises ValueError for bad options, with the message of the command line.
        """
        chosen = {**model_choice(os.fspath(model)), "preset": preset, "parallel": parallel, "model.lora.path": lora}
        chosen |= {"run.device": device, "run.dtype": torch_dtype and str(torch_dtype).removeprefix("torch.")}
        argv = [f"{name}={option_text(value)}" for name, value in {**chosen, **options}.items() if value is not None]
        return cls(compose(INFER, argv), ranks=ranks_here())

    def __call__(self, image: Picture, audio: Sound, **options: Unpack[VideoOptions]) -> Video:
        """Make a whole video in memory.

        `image` is a path, a PIL image, or uint8 [H,W,3]. `audio` is a path, or (samples, sample rate in Hz) with samples [n] or
        [n,channels], floats in [-1,1] or int16; with masks, "a.wav+b.wav" names one file per voice. Raises ValueError with one sentence
        for bad inputs or options.
        """
        if not isinstance(audio, str | os.PathLike | tuple):
            raise ValueError(f"audio is {type(audio).__name__}; give a path or (samples, sample_rate), or hand an iterator to stream()")
        settings, memory = self._request(image, audio, options)
        inputs = self._inputs(settings.config, memory)
        displayed = as_displayed(inputs, settings.config.post)
        offset, frames = SoundOffset(displayed, settings.config.post), []
        with closing(generate(inputs, self._components(settings.config), settings)) as chunks:
            for chunk in chunks:
                offset.record(chunk)
                frames.append(np.asarray(chunk.pixels))
        speech = replace(memory.original or inputs.speech, later_s=offset.speech().later_s)
        return Video(np.concatenate(frames), displayed.fps, speech, tuple(input_files(settings.config, memory)))

    def stream(self, image: Picture, audio: Sound | Iterable[Any], **options: Unpack[VideoOptions]) -> Iterator[FrameChunk]:
        """Yield the frames as soon as they are decoded, in chunks uint8 [F,H,W,3]; closing the iterator stops the work.

        `audio` may also be an iterator of chunks of any length, each (samples, sample rate) or samples at 16 kHz. A block is generated as
        soon as the sound until `look_ahead_s` seconds after its last frame has arrived. The iterator is read in the thread that denoises.
        Memory does not grow with the length. The sound of a chunk is to be played its `sound_later_s` later: post.alignment_offset, and
        with post.lip_align, from the first 8 s on whose measure is sure, also what those showed.
        """
        settings, memory = self._request(image, audio, options)
        inputs = self._inputs(settings.config, memory)
        chunks = generate(inputs, self._components(settings.config), settings)
        return SoundOffset(as_displayed(inputs, settings.config.post), settings.config.post).stream(chunks, settings)

    @property
    def leads(self) -> bool:
        """Whether videos are made on this rank; always true with one rank."""
        return self.opened.world.leads

    @property
    def opened(self) -> Opened:
        """The components, the world and the plan of this rank. Raises ValueError after the pipeline is closed."""
        self._must_be_open()
        return self._opened

    @property
    def look_ahead_s(self) -> float:
        """Seconds of sound that a block needs after its last frame, when the sound comes from an iterator."""
        return SPEECH_ENCODERS[self.config.model.speech_encoder].look_ahead_s

    def load_lora(self, path: str | os.PathLike, alpha: float | None = None) -> Self:
        """Reload the weights with this adapter merged, in place of any other adapter, including that of a bundled student.

        `path` is a file in peft's format or the LiveAvatar folder; with `alpha` None the file's value is used. Raises ValueError and
        changes nothing when the adapter does not fit.
        """
        lora = replace(self.config.model.lora, path=expanded(os.fspath(path)), alpha=0.0 if alpha is None else alpha)
        lora_of(lora)  # raises before the present weights are freed
        return self._reopen(replace(self.config, model=replace(self.config.model, lora=lora)))

    def to(self, *targets: torch.device | torch.dtype | str) -> Self:
        """Reload the weights on another device or in another precision (float32, bfloat16), under a plan that fits."""
        run = self.config.run
        for target in targets:
            name = str(target).removeprefix("torch.")
            is_dtype = isinstance(target, torch.dtype) or name in PRECISIONS
            run = replace(run, **{"dtype" if is_dtype else "device": name})
        find_device(run.device)
        return self._reopen(replace(self.config, run=run))

    def plan(self, hardware: str = "here") -> PlanResult:
        """The answer of `sonic plan` for the options of this pipeline.

        It says which plans fit on the hardware, how fast they are, and which changes would make the video fit. `hardware` is a name in
        conf/hardware, or "here" for this machine.
        """
        own, asked = self.config, compose(PLAN, [f"hardware={hardware}"])
        same = {name: getattr(own, name) for name in ("run", "parallel", "sampler", "video", "decode")}
        return search_plans(
            replace(asked, model=family_of(own.model).settled_model(own.model), hardware=machine_here(asked.hardware), **same)
        )

    def plan_report(self) -> dict:
        """The plan of this pipeline as in result.json: name, estimated speed and memory, and after closing the measured memory.

        {} when the components were passed to the constructor.
        """
        return {} if self._estimate is None else self._estimate.as_json()

    def close(self) -> None:
        """Shut the other ranks down and leave the process group. Needed with several ranks only; a `with` block does it."""
        self.__exit__(None, None, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        try:
            return bool(self._stack.__exit__(kind, error, trace))
        finally:
            self._opened, self._by_student = None, {}

    def announce(self) -> None:
        """Log the sampler, the timesteps and the weights of the videos."""
        components, sampler = self.opened.components, self.config.sampler
        timesteps = family_of(components.config).timesteps(sampler)
        log.info("%s", sampling_words(sampling_of(sampler, components.weights, components.dtype, timesteps=timesteps)))

    def generate(self, inputs: Inputs, *, timer: StageTimer | None = None) -> Iterator[FrameChunk]:
        """Yield the frames of a video from inputs that are already open, as soon as they are decoded."""
        self._must_lead()
        return generate(inputs, self.opened.components, Settings(self.config), timer=timer)

    def write(self, inputs: Inputs, output: Path, *, timer: StageTimer | None = None) -> tuple[Result, FrameRecorder]:
        """Write the video of inputs that are already open to an MP4. Returns its result and the recorder for the contact sheet."""
        self._must_lead()
        return make_video(inputs, self.opened.components, self.config, output=output, timer=timer or StageTimer())

    def make_videos(self, requests: Sequence[tuple[int, str]]) -> list[Outcome]:
        """Make the videos of a file of requests (line number, text), divided among the copies of the model; one outcome for each attempt.

        A collective call: every rank must make it, and no video can be made afterwards.
        """
        return all_outcomes(make_videos(requests, self.opened, self.config), self.opened)

    def _open(self, config: InferConfig, size: tuple[int, int] | None = None) -> None:
        """Set `opened` to the given components, or build those of `config`."""
        if self._given is not None:
            self._opened = Opened(self._given, None, self._folder)
        else:
            self._opened = self._stack.enter_context(open_components(config, self.ranks, folder=self._folder, size=size))
        self._estimate, self._by_student = self._opened.estimate, {}

    def _reopen(self, config: InferConfig) -> Self:
        """Free the components and build those of another config; if that fails, build the previous ones again and raise.

        Raises ValueError when the components were given or the pipeline has several ranks.
        """
        if self._given is not None or self.ranks.world > 1:
            raise ValueError(
                "the weights of this pipeline cannot be replaced: it was given them, or shares them with other ranks; make another"
            )
        self._must_be_open()
        before = self.config
        self.close()
        try:
            self._open(config)
        except BaseException:
            self._open(before)
            raise
        self.config = config
        return self

    def _must_be_open(self) -> None:
        if self._opened is None:
            raise ValueError("this pipeline is closed; make another with AvatarPipeline.from_pretrained")

    def _must_lead(self) -> None:
        if not self.leads:
            raise ValueError(f"rank {self.ranks.rank} serves the leading rank and makes no videos of its own; ask where pipe.leads is true")

    def _components(self, config: InferConfig) -> Components:
        """The components for the sampling steps of a request. If these need another bundled student, it is loaded once and kept.

        Raises ValueError when that student would have to be loaded on several ranks.
        """
        opened, steps, family = self.opened.components, config.sampler.sample_steps, family_of(config.model)
        if self._given is not None or steps == self.config.sampler.sample_steps:
            return opened
        student = family.student(config.model, steps)
        if student != family.student(config.model, self.config.sampler.sample_steps):
            if self.opened.world.mesh is not None:
                raise ValueError(
                    f"num_inference_steps={steps} needs other weights than those that all ranks have loaded; "
                    f"make the pipeline with **{{'sampler.sample_steps': {steps}}}"
                )
            if student not in self._by_student:
                self._by_student[student] = build_components(config.model, config.run, steps=steps, context=replace(opened.context))
            opened = self._by_student[student]
        words = family.weights_in_words(config.model, steps)
        return opened if words == opened.weights else replace(opened, weights=words)

    def _inputs(self, config: InferConfig, memory: InMemory) -> Inputs:
        """Open the inputs of a request. Raises ValueError when the video is larger than planned and does not fit in memory."""
        inputs = open_inputs(config, memory)
        if self.opened.estimate is not None and not config.model.resolution:
            refuse_larger(self.opened.estimate, inputs.portrait.pixels.shape[:2], force=config.plan.force)
        return inputs

    def _request(self, image: Picture, audio: Sound | Iterable[Any], options: Mapping[str, Any]) -> tuple[Settings, InMemory]:
        """Check the arguments of a call and turn them into settings and inputs in memory."""
        self._must_lead()
        names = [*VideoOptions.__annotations__]
        for name in options:
            if name not in names:
                raise ValueError(f"{name} is not an option of a video; choose one of: {', '.join(closest_first(name, names))}")
        given = {name: value for name, value in options.items() if value is not None}
        generator, callback = given.get("generator"), given.get("callback_on_step_end")
        values = {FIELDS[name]: value for name, value in given.items() if name in FIELDS}
        if isinstance(given.get("size"), tuple | list):
            values["video.size"] = "x".join(map(str, given["size"]))
        if generator is not None:
            values["seed"] = seed_of(generator)
        files = {name: each for name, each in (("image", image), ("audio", audio)) if isinstance(each, str | os.PathLike)}
        memory = InMemory(None if "image" in files else image_in_memory(image))
        config = with_options(self.config, values | {name: expanded(os.fspath(file)) for name, file in files.items()})
        if isinstance(audio, tuple):
            if len(audio) != 2:
                raise ValueError(f"audio is a tuple of {len(audio)}; give (samples, sample_rate)")
            speech, original = speech_in_memory(*audio)
            memory = memory._replace(speech=speech, original=at_duration(original, config.video))
        elif "audio" not in files:
            memory = memory._replace(sound=self._live_audio(audio, config.video))
        on_step = callback and (lambda block, step, timestep: callback(self, step, timestep, {"block": block}))
        return Settings(config, generator, on_step, memory.sound), memory

    def _live_audio(self, chunks: Any, video: VideoConfig) -> LiveAudio:
        """Sound that is still arriving. Raises ValueError when several ranks make the video, or it does not come from an iterator."""
        world = self.opened.world
        if not world.alone:
            raise ValueError(
                f"parallel={world.plan}: sound that is still arriving cannot be sent to other ranks; use parallel=single or offload"
            )
        if isinstance(chunks, np.ndarray | torch.Tensor) or not isinstance(chunks, Iterable):
            raise ValueError(f"audio is {type(chunks).__name__}; give a path, (samples, sample_rate), or an iterator of such chunks")
        return LiveAudio(chunks, fps=video.fps, max_frames=video.num_clip * video.infer_frames)
