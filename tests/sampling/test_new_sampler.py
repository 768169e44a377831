"""A sampler is added in one place: a coroutine, and its line in the table."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from infer_command import babble, pipeline_options, write_files

from sonic import AvatarPipeline
from sonic.cli import compose, help_text
from sonic.commands.infer_command import ENTRY
from sonic.sampling.samplers import SAMPLERS, Query, Sampler, SamplerCoroutine

RATE = 16_000


def damped(noise: torch.Tensor, sigmas: torch.Tensor, rng: torch.Generator) -> SamplerCoroutine:
    """Euler steps with the velocity scaled by 0.9."""
    x = noise
    for step, (now, then) in enumerate(pairwise(sigmas.tolist())):
        x = x + 0.9 * (then - now) * (yield Query(x, now, step))
    return x


def test_a_sampler_that_is_added_to_its_table_is_in_help_and_checks_and_makes_a_video(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="sampler.name=damped is unknown"):
        compose(ENTRY, ["sampler.name=damped"])
    monkeypatch.setitem(SAMPLERS, "damped", Sampler(damped))
    line = next(line for line in help_text(ENTRY).splitlines() if line.startswith("  sampler.name="))
    assert line.endswith(", damped")
    options = pipeline_options(write_files(tmp_path, 1.0))
    made = [
        AvatarPipeline.from_pretrained("preview", **options, **{"sampler.name": name})(tmp_path / "me.png", (babble(0.4), RATE)).frames
        for name in ("euler", "damped")
    ]
    assert made[0].shape == made[1].shape and not np.array_equal(*made)
