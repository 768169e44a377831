"""Paths, schedules, samplers and guidance, for every row of their tables."""

from __future__ import annotations

import pytest
import torch
from diffusers import UniPCMultistepScheduler
from torch.testing import assert_close

from sonic.sampling.guidance import guided_velocity
from sonic.sampling.path import PREDICTIONS, interpolate, velocity_from
from sonic.sampling.samplers import SAMPLERS, Query, answer_all, unipc
from sonic.sampling.schedules import SCHEDULES, TIMESTEPS, is_table, sigmas_of

ORDER = {
    "euler": 1,
    "heun": 2,
    "unipc": 2,
    "dpmpp": 1,
}  # dpmpp: of order 2 in log-SNR, but its steps from pure noise and to clean latents are of order 1
SPREAD = 0.5  # standard deviation of the Gaussian data that curve the flow


def curved(x, sigma):
    """The exact velocity for clean latents drawn from N(0, SPREAD²)."""
    level = sigma[0].item()
    variance = ((1 - level) * SPREAD) ** 2 + level**2
    return x * (level - (1 - level) * SPREAD**2) / variance


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 4])
def test_every_sampler_is_exact_on_a_straight_path(name, schedule, steps, rng):
    clean, noise = torch.randn(2, 1, 4, 3, 8, 8)
    sigmas = sigmas_of(schedule, steps, 3.0)
    start = interpolate(clean, noise, sigmas[:1].float())
    found = SAMPLERS[name](lambda x, sigma: noise - clean, start, sigmas, rng)
    assert_close(found, clean, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 8, 20])
def test_a_sampler_queries_the_steps_and_timesteps_that_its_entry_says(name, schedule, steps, rng):
    sampler, queried, timesteps = SAMPLERS[name], [], []
    sigmas = sigmas_of(schedule, steps, 3.0)
    sampling = sampler.coroutine(torch.randn(1, 2, 3, 4, 4), sigmas, rng)
    query = next(sampling)
    try:
        while True:
            queried.append(query.step)
            timesteps.append(TIMESTEPS * query.sigma)
            query = sampling.send(torch.zeros_like(query.x))
    except StopIteration:
        assert queried == sampler.steps_queried(steps)
        assert timesteps == pytest.approx(sampler.timesteps(sigmas), abs=1e-3)


@pytest.mark.parametrize("name", SAMPLERS)
def test_errors_shrink_with_the_order_of_the_sampler(name, rng):
    noise = torch.randn(1, 4, 3, 4, 4, dtype=torch.float64)
    errors = []
    for steps in (20, 40):
        sigmas = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        # levels are read from the schedule: the sampler rounds them to whole timesteps
        found = SAMPLERS[name](lambda x, sigma, at=sigmas: curved(x, at[(at - sigma[0]).abs().argmin()][None]), noise, sigmas, rng)
        errors.append((found - SPREAD * noise).norm().item())
    assert errors[0] / errors[1] > 0.8 * 2 ** ORDER[name]


def of_diffusers(noise, sigmas, rng):
    """UniPC by diffusers, as a sampler."""
    solver = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    solver.set_timesteps(sigmas=sigmas[:-1].numpy())
    solver.set_begin_index(0)
    x = noise
    for step, timestep in enumerate(solver.timesteps):
        x = solver.step((yield Query(x, int(timestep) / TIMESTEPS, step)), timestep, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 40])
def test_unipc_has_the_bits_of_diffusers(schedule, steps, rng):
    noise, sigmas = torch.randn(1, 4, 3, 8, 8), sigmas_of(schedule, steps, 3.0)
    assert torch.equal(*(answer_all(solver(noise, sigmas, rng), curved) for solver in (unipc, of_diffusers)))


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_same_seed_gives_the_same_result(name):
    sigmas = sigmas_of("linear", 3, 3.0)
    noise = torch.randn(1, 2, 3, 4, 4)
    first, second = (SAMPLERS[name](curved, noise, sigmas, torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_leaves_its_noise_alone(name, rng):
    noise = torch.randn(1, 2, 3, 4, 4)
    before = noise.clone()
    SAMPLERS[name](curved, noise, sigmas_of("linear", 3, 3.0), rng)
    assert torch.equal(noise, before)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 4, 40])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_every_schedule_falls_from_high_noise_to_zero(name, steps, shift):
    sigmas = sigmas_of(name, steps, shift)
    assert len(sigmas) == steps + 1
    assert 0.99 < sigmas[0] <= 1 and sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()


def test_the_unipc_schedule_has_the_published_timesteps():
    timesteps = (1000 * sigmas_of("unipc", 40, 3.0)).long().tolist()
    assert timesteps[:5] == [999, 991, 982, 973, 963]
    assert timesteps[-3:] == [136, 71, 0]


def test_the_twice_shifted_schedule_has_the_published_sigmas():
    assert_close(sigmas_of("twice_shifted", 4, 3.0).float(), torch.tensor([1, 0.857692, 0.602151, 0.008929, 0]), atol=1e-6, rtol=0)


def test_the_schedule_of_live_avatar_gives_its_published_tables():
    published = [1.0, 0.8576923076923076, 0.6021505376344086]
    assert sigmas_of("live_avatar", 3, 3.0).tolist() == [*published, 0.0]
    assert sigmas_of("live_avatar", 4, 3.0).tolist() == [*published, 0.008928571428571334, 0.0]
    assert [steps for steps in range(1, 9) if is_table("live_avatar", steps)] == [3, 4]


def test_few_steps_of_live_avatar_all_count_and_many_end_with_the_published_touch_up():
    assert_close(sigmas_of("live_avatar", 2, 3.0).float(), torch.tensor([1, 0.751121, 0]), atol=1e-6, rtol=0)
    assert sigmas_of("live_avatar", 1, 3.0).tolist() == [1, 0]
    for steps in range(4, 9):
        assert torch.equal(sigmas_of("live_avatar", steps, 3.0), sigmas_of("twice_shifted", steps, 3.0))


def test_an_unknown_schedule_lists_the_choices():
    with pytest.raises(ValueError, match="sampler.schedule=lineer is unknown; choose one of: linear"):
        sigmas_of("lineer", 4, 3.0)


@pytest.mark.parametrize("levels", [torch.tensor([0.3, 0.9]), torch.tensor([[0.3, 0.5, 1.0], [0.9, 0.1, 0.2]])])
def test_every_prediction_of_the_truth_is_the_same_velocity(levels):
    clean, noise = torch.randn(2, 2, 4, 3, 4, 4)
    x = interpolate(clean, noise, levels)
    truth = {"velocity": noise - clean, "clean": clean}
    assert truth.keys() == PREDICTIONS.keys()
    for kind, prediction in truth.items():
        assert_close(velocity_from(kind)(prediction, x, levels), noise - clean, atol=1e-4, rtol=1e-4)


def test_guidance_extrapolates_and_costs_nothing_when_off():
    def never(x, sigma):
        raise AssertionError("the unconditional velocity was asked for")

    conditional = lambda x, sigma: x * 2  # noqa: E731
    x, sigma = torch.ones(1, 1, 1, 1, 1), torch.ones(1)
    assert guided_velocity(never, conditional, 1.0) is conditional
    assert guided_velocity(lambda x, sigma: x, conditional, 4.5)(x, sigma).item() == 1 + 4.5
    assert guided_velocity(lambda x, sigma: x, conditional, 0.0)(x, sigma).item() == 1
