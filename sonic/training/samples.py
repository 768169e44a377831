"""Sample videos during training: the student generates a video with its current weights, which is saved and scored. Training is not
affected."""

from __future__ import annotations

import logging
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from sonic.config import DecodeConfig, SamplerConfig
from sonic.data.audio import envelope, load_speech
from sonic.data.faces import FaceFinder, find_speaker
from sonic.data.image import covering, load_image
from sonic.data.pixels import to_signed
from sonic.data.segments import follow_face, minus_running_mean, mouth_opening
from sonic.evaluation import metrics
from sonic.evaluation.evaluate import drawn_cases, generate_frames, save_video, score_clip
from sonic.evaluation.evaluate_config import EvalConfig
from sonic.families import FAMILIES
from sonic.families.family import family_of
from sonic.geometry import FPS, wan_size
from sonic.inference.components import Components
from sonic.inference.infer_config import InferConfig
from sonic.inference.inputs import PORTRAITS, RECORDINGS
from sonic.parallel.context import DistributedContext
from sonic.parallel.fsdp import free_gathered
from sonic.parallel.mesh import World
from sonic.pipeline import AvatarPipeline
from sonic.training.engine import Engine
from sonic.training.log import Sample, SampleMaker
from sonic.training.objectives.networks import STUDENT
from sonic.training.train_config import TrainConfig
from sonic.types import Inputs, Portrait, Speech

LOG = logging.getLogger(__name__)
FIGURES = ("sync_correlation", "dynamics_ratio", "silent_motion_ratio", "identity_psnr_db")
SAMPLES = "samples"  # folder of the videos in the run folder
AREA = 384 * 256  # pixels per frame of a published model's sample videos
MAX_LAG = 5  # largest lag in frames, in both directions


@dataclass(frozen=True)
class Student:
    """The student of a training, and the run folder for its sample videos."""

    config: TrainConfig
    objective: Any
    engine: Engine
    folder: Path

    @contextmanager
    def use_role(self):
        """Context with the student's transformer and its current weights.

        Unsharded weights are float32, and so is the video. Sharded weights are gathered in the training's precision, in which the
        transformer (and nothing else) then computes."""
        with torch.no_grad(), self.objective.networks.use_role(STUDENT) as model:
            yield model
            free_gathered(model)  # FSDP keeps the root, or with speed.reshard=false every unit, until a backward pass

    def save_video(self, step: int, frames: Tensor, speech: Speech, *, fps: int = FPS) -> Path | None:
        """Write the video of a step. Returns its path, or None on other processes or after an error.  frames [F,3,H,W] in [-1,1]"""
        path = self.folder / SAMPLES / f"step_{step:08d}.mp4"
        if not self.engine.world.main:
            return None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_video(path, frames, speech, fps=fps)
        except (OSError, ValueError) as error:
            LOG.warning("the sample video of step %d could not be written (%s); training goes on", step, error)
            return None
        return path


def sample_maker(student: Student) -> SampleMaker | None:
    """The function that makes sample videos of the student; None when log.samples_every=0.

    Raises ValueError when the objective trains no model that generates videos.
    """
    config = student.config
    if not config.log.samples_every:
        return None
    if not student.objective.makes_videos:
        raise ValueError(f"log.samples_every={config.log.samples_every}: objective={config.objective.name} makes no videos; use 0")
    sampler = getattr(config.objective, "sampler", None) or SamplerConfig(sample_steps=config.log.sample_steps)
    context = DistributedContext(World("single", student.engine.world.device))
    components = family_of(config.model).components(config.model, context, torch.float32)
    make = drawn_sampler if FAMILIES[config.model.family].moves_portrait else portrait_sampler
    return make(student, components, sampler)


def drawn_sampler(student: Student, components: Components, sampler: SamplerConfig) -> SampleMaker:
    """Sample maker of a drawn person of the test split, who speaks a sentence and is scored against the known mouth motion."""
    config = student.config
    eval_config = EvalConfig(clips=1, seed=config.seed, seconds=config.log.sample_seconds)
    case = next(drawn_cases(eval_config, config.model.resolution))
    asked = InferConfig(model=config.model, sampler=sampler, decode=DecodeConfig(online=False))

    def make_sample(step: int) -> Sample:
        with student.use_role() as model:
            pipe = AvatarPipeline(asked, components.with_model(model))
            clip = score_clip(case, partial(generate_frames, pipe=pipe, seed=config.seed), config.model.rollout.block_frames)
        video = student.save_video(step, clip.frames, Speech(case.samples.astype(np.float32)))
        return Sample({f"eval/{name}": clip.figures[name] for name in FIGURES}, video)

    return make_sample


def portrait_sampler(student: Student, components: Components, sampler: SamplerConfig) -> SampleMaker:
    """Sample maker of the bundled portrait, which speaks the start of the bundled recording.

    There is no reference video, so the metrics are the correlation of mouth opening and loudness, and the amount of mouth motion."""
    config = student.config
    photo = load_image(PORTRAITS["astronaut"])
    pixels = covering(photo, *wan_size(*photo.shape[1::-1], AREA))
    finder = FaceFinder()
    face = find_speaker(pixels, finder)
    fps = config.model.rollout.fps
    recording = load_speech(RECORDINGS["sample"])
    speech = Speech(recording.samples[: round(config.log.sample_seconds * recording.sample_rate)])
    inputs = Inputs(Portrait(pixels), speech, round(config.log.sample_seconds * fps), config.seed, fps)
    asked = InferConfig(model=components.config, sampler=sampler, decode=DecodeConfig(online=False))

    def make_sample(step: int) -> Sample:
        with student.use_role() as model:
            pipe = AvatarPipeline(asked, components.with_model(model))
            with closing(pipe.generate(inputs)) as chunks:
                frames_out = torch.cat([torch.as_tensor(chunk.pixels).cpu() for chunk in chunks])
        mouth = np.nan_to_num(
            mouth_opening(follow_face(frames_out.numpy(), face, finder))
        )  # a face that is not seen does not move its mouth
        level = minus_running_mean(envelope(speech.samples, speech.sample_rate, len(mouth), fps=fps))
        figures = {"eval/sync_correlation": metrics.best_lag(mouth, level, MAX_LAG)[0], "eval/mouth_motion": float(np.std(mouth))}
        frames = to_signed(rearrange(frames_out, "f h w c -> f c h w"))
        return Sample(figures, student.save_video(step, frames, speech, fps=fps))

    return make_sample
