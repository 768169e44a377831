"""The preview moves its mouth by motion.dynamic_scale, its head and lids by motion.motion_scale, and neither moves the other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from infer_command import FACE, TINY

from sonic.cli import Entry, compose
from sonic.data.motion import estimate_motion, head_pose
from sonic.evaluation.evaluate import drawn_cases, generate_frames
from sonic.evaluation.evaluate_config import EvalConfig
from sonic.evaluation.metrics import correlation, dynamics_ratio, mouth_opening
from sonic.families.family import family_of
from sonic.inference.infer_config import InferConfig
from sonic.inference.inputs import InMemory
from sonic.inference.motion_config import HeadConfig
from sonic.pipeline import AvatarPipeline

SCALES = (0.7, 1.3)


@pytest.fixture(scope="module")
def case():
    """A drawn person and two seconds of speech."""
    pytest.importorskip("espeakng_loader")
    return next(drawn_cases(EvalConfig(seed=1, seconds=2.0), 192))


def video_of(case, samples: np.ndarray, **motion) -> torch.Tensor:
    options = {f"motion.{name}": value for name, value in motion.items()}
    return generate_frames(case, samples, AvatarPipeline.from_pretrained(preset="fast_preview", **options), seed=0)


def test_the_mouth_moves_dynamic_scale_times_as_far(case):
    spoken, *scaled = (
        mouth_opening(video_of(case, case.samples, dynamic_scale=scale), case.rest, case.person.mouth) for scale in (1.0, *SCALES)
    )
    assert dynamics_ratio(spoken, case.track) > 0.5
    for scale, opening in zip(SCALES, scaled, strict=True):
        assert dynamics_ratio(opening, spoken) == pytest.approx(scale, rel=0.1)
        assert correlation(opening, case.track) >= 0.97 * correlation(spoken, case.track)


def test_the_head_moves_motion_scale_times_as_far(case):
    silence = np.zeros_like(case.samples)

    def pose(scale: float) -> torch.Tensor:
        frames = video_of(case, silence, head="gentle", motion_scale=scale)[9::8]
        return head_pose(estimate_motion(frames, case.rest).flow)[:, :3]

    usual, *scaled = (pose(scale) for scale in (1.0, *SCALES))
    assert usual.square().mean().sqrt() > 0.003
    for scale, found in zip(SCALES, scaled, strict=True):
        assert float((found * usual).sum() / usual.square().sum()) == pytest.approx(scale, rel=0.1)


def test_motion_scale_without_motion_is_pointed_out(caplog, tmp_path):
    config = compose(Entry("infer", InferConfig), [*TINY, *FACE, "motion.motion_scale=1.3"])
    family_of(config.model).open(config, InMemory())
    assert "motion.motion_scale=1.3 has no effect: the head is still; motion.head=gentle moves it" in caplog.text


@pytest.mark.parametrize(("ratio", "warns"), [(0.3, False), (0.4, False), (0.45, True), (1.0, True)])
def test_a_crop_that_is_too_wide_for_the_preview_is_pointed_out(ratio, warns, caplog):
    config = compose(Entry("infer", InferConfig), [*TINY, *FACE, f"expand_ratio={ratio}"])
    family_of(config.model).open(config, InMemory())
    sentence = f"face.expand_ratio={ratio:g}: the preview, which was trained at 0.3, paints mouths wider than the lips; use 0.4 or less"
    assert (sentence in caplog.text) == warns


@pytest.mark.parametrize("name", ["dynamic_scale", "motion_scale"])
@pytest.mark.parametrize("value", [0.4, 2.1, float("nan")])
def test_a_scale_out_of_range_is_refused(name, value):
    with pytest.raises(ValueError, match=rf"motion\.{name}={value} must lie between 0\.5 and 2\.0"):
        HeadConfig(**{name: value})
