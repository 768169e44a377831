"""Checks of recorded schedules, solvers, guided sampling and picture sizes."""

from __future__ import annotations

from itertools import count

import torch
from golden_case import Case, model_of
from torch.testing import assert_close

from sonic.geometry import wan_size
from sonic.sampling.guidance import guided_velocity
from sonic.sampling.samplers import SAMPLERS
from sonic.sampling.schedules import SCHEDULES, sigmas_of
from sonic.types import Conditions

# their name of a solver -> our solver and schedule
SOLVERS = {"unipc": ("unipc", "unipc"), "dpmpp": ("dpmpp", "linear"), "dpm++": ("dpmpp", "linear")}
EULERS = {"euler": ("euler", "twice_shifted"), "liveavatar_euler": ("euler", "twice_shifted")}


def _read(name: str) -> tuple[str, str, int, float]:
    """ "unipc.s40.shift3.sigmas" -> our solver, our schedule, steps, shift."""
    solver, steps, shift = name.split(".")[:3]
    return *(SOLVERS | EULERS)[solver], int(steps[1:]), float(shift.removeprefix("shift"))


def schedules(case: Case) -> None:
    for name, expected in case.outputs.items():
        _, schedule, steps, shift = _read(name)
        sigmas = sigmas_of(schedule, steps, shift)
        if name.endswith("sigmas"):
            case.close(sigmas.float(), expected)
        elif expected.is_floating_point():
            assert_close(1000 * sigmas[:-1].float(), expected, atol=1e-3, rtol=0)
        else:
            assert torch.equal((1000 * sigmas[:-1]).to(expected.dtype), expected)


def training_schedule(case: Case) -> None:
    for name, expected in case.outputs.items():
        _, shift, steps, what = name.split(".")
        sigmas = torch.tensor(SCHEDULES["linear"](int(steps[1:]), float(shift.removeprefix("shift"))))[:-1]
        case.close(sigmas if what == "sigmas" else (1000 * sigmas), expected, slack=2e-4 if what == "timesteps" else 0.0)


def trajectories(case: Case) -> None:
    for name in (name for name in case.inputs if name.endswith(".noise")):
        solver, schedule, steps, shift = _read(name)
        recorded, visited, turn = case.inputs[name.replace("noise", "model_outputs")], [], count()

        def velocity(x, sigma, recorded=recorded, visited=visited, turn=turn):
            visited.append(x)
            return recorded[next(turn)]

        last = SAMPLERS[solver](velocity, case.inputs[name], sigmas_of(schedule, steps, shift), torch.Generator())
        case.close(torch.stack([*visited[1:], last]), case.outputs[name.replace("noise", "trajectory")])


def guided_clip(case: Case) -> None:
    """Guidance away from the negative prompt and zeroed audio, through a solver, on a whole clip."""
    call, inputs = case.call, case.inputs
    model, recorded = model_of(case), {}
    motion = None if call["drop_motion_frames"] else inputs["motion_latents"]
    for name, loudness in (("context", 1.0), ("context_null", 0.0)):
        text = inputs[name].unsqueeze(0) if name in inputs else inputs["context"].unsqueeze(0)
        audio = loudness * inputs["audio_input"]
        recorded[name] = Conditions(ref=inputs["ref_latents"], text=text, audio=audio, motion=motion, pose=inputs["cond_states"])
    seen, predictions = [], []
    ask = lambda conditions: lambda x, sigma: model(x, 1000 * sigma, conditions)  # noqa: E731
    guided = guided_velocity(ask(recorded["context_null"]), ask(recorded["context"]), call["guide_scale"])

    def velocity(x, sigma):
        seen.append(x)
        predictions.append(guided(x, sigma))
        return predictions[-1]

    solver, schedule = SOLVERS[call["solver"]]
    sigmas = sigmas_of(schedule, call["steps"], call["shift"])
    last = SAMPLERS[solver](velocity, inputs["noise"], sigmas, torch.Generator())
    if "guided_pred_per_step" in case.outputs:
        case.close(torch.cat(predictions), case.outputs["guided_pred_per_step"])
    case.close(torch.cat([*seen[1:], last]), case.outputs["latents_per_step"])
    case.close(sigmas.float(), case.outputs["sigmas"])


def sizes(case: Case) -> None:
    for height, width, area, *expected in case.outputs["table"].tolist():
        found_width, found_height = wan_size(width, height, area)
        assert [found_height, found_width] == expected, (height, width, area)
