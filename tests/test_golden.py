"""Parity with recorded numbers of the published code; the variable SONIC_GOLDEN names another folder of cases."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import golden_sampling
import golden_speech
import golden_text
import golden_vae
import golden_video
import pytest
import torch
from golden_case import Case, conditions_of, half_precision_rotations, model_of
from torch import Tensor
from torch.testing import assert_close

from sonic.checkpoint.load import fill
from sonic.checkpoint.lora import read_lora
from sonic.checkpoint.weights import export
from sonic.geometry import BlockSpan
from sonic.model import kv_cache
from sonic.model.dit import AvatarDiT
from sonic.model.embed import ref_time_id, rotate
from sonic.sampling.schedules import SCHEDULES

FOLDER = Path(os.environ.get("SONIC_GOLDEN") or Path(__file__).parent / "golden")


def whole_clip(case: Case) -> None:
    motion = None if case.call["drop_motion_frames"] else case.inputs["motion_latents"]
    conditions = conditions_of(case, audio=case.inputs["audio_input"], motion=motion)
    found = model_of(case)(case.inputs["x"], case.inputs["t"], conditions)
    case.close(found, case.outputs["out"])


def audio_encoder(case: Case) -> None:
    encoder = model_of(case).audio_encoder
    for name, features in case.inputs.items():
        tokens, summary = encoder(features)
        length = name.removeprefix("features_")
        case.close(tokens, case.outputs[f"local_{length}"])
        case.close(summary, case.outputs[f"global_{length}"].squeeze(2))


def per_frame_timesteps(case: Case) -> None:
    """Recorded with rotations rounded to half precision: exact with the same rounding, within the tolerance without."""
    case.close(_per_frame(case), case.outputs["out"], strict=False)
    with half_precision_rotations():
        case.close(_per_frame(case), case.outputs["out"])


def streaming(case: Case) -> None:
    """Two clips on rolling rings: exact rotations against the exact recording, rounded ones against everything else."""
    outputs = case.outputs
    _, final, _ = _stream(case)
    case.close(final, outputs["final_exactrope"])
    case.close(final, outputs["final"], strict=False, slack=case.manifest["exactrope_maxdiff"])
    with half_precision_rotations():
        predictions, final, cache = _stream(case)
    case.close(predictions, outputs["pred_per_call"])
    case.close(final, outputs["final"])
    for name, expected in outputs.items():
        words = name.split(".")
        layer = int(words[-1].removeprefix("layer")) if words[-1].startswith("layer") else None
        if name.startswith("sink.cond_k"):
            raw = cache.ref_keys[layer]
            case.close(raw, expected[:, : raw.shape[1]])
            with half_precision_rotations():
                turn = kv_cache.rotation(kv_cache.memory_positions(cache.buckets, cache.grid, 0), cache.head_dim)
            turned = rotate(expected, turn)[:, raw.shape[1] :]
            case.close(cache.rings[0].keys[layer][:, cache.rings[0].memory][:, raw.shape[1] :], turned)
        if name.startswith("sink.cond_v"):
            case.close(cache.rings[0].values[layer][:, cache.rings[0].memory], expected)
        if name.startswith("kv_end"):
            ring = cache.rings[int(words[2].removeprefix("step"))]
            buffer = {"k": ring.keys, "v": ring.values}[words[1]][layer]
            case.close(torch.cat([buffer[:, ring.slot(ref_position)] for ref_position in range(ring.window)], dim=1), expected)


def merged_lora(case: Case) -> None:
    lora = case.manifest["lora"]
    adapters = read_lora(case.folder / lora["file"], lora["alpha"])
    assert len(adapters.adapters) == case.manifest["n_modules"]
    merged = lambda model: fill(model, case.weights(0), lora=adapters)  # noqa: E731
    model = model_of(case)
    merged(model)
    weights = export(model)
    for name, expected in case.outputs.items():
        if name.startswith("merged."):
            case.close(weights[name.removeprefix("merged.")], expected)
    for name, (total, size) in case.manifest["checksums_sum_abssum"].items():
        found = weights[name].double()
        assert_close(torch.stack([found.sum(), found.abs().sum()]), torch.tensor([total, size]).double(), atol=1e-4, rtol=1e-5)
    with half_precision_rotations():
        predictions, _, _ = _stream(case, change=merged)
    case.close(predictions, case.outputs["after_merge.pred_per_call"], slack=1.2e-4)


def two_actors(case: Case) -> None:
    masks = case.inputs["mask"].squeeze(-1)
    predictions, final, _ = _stream(case, masks=masks)
    case.close(predictions, case.outputs["pred_per_call"], strict=False)
    case.close(final, case.outputs["final"], strict=False)
    with half_precision_rotations():
        predictions, final, _ = _stream(case, masks=masks)
    case.close(predictions, case.outputs["pred_per_call"])
    case.close(final, case.outputs["final"])


HANDLERS = {
    "case01": whole_clip,
    "case02": whole_clip,
    "case03": whole_clip,
    "case04": audio_encoder,
    "case06_liveavatar_per_frame_t": per_frame_timesteps,
    "case06_liveavatar_streaming": streaming,
    "case06_liveavatar_two_actors": two_actors,
    "case05": golden_sampling.guided_clip,
    "case07": merged_lora,
    "case08_audio_bucketing": golden_speech.bucketing,
    "case08_wav2vec2_features": golden_speech.wav2vec_features,
    "case09_vae_decode": golden_vae.decode,
    "case09_vae_encode": golden_vae.encode,
    "case09_vae_stream_decode": golden_vae.stream_decode,
    "case09_vae_stream_encode": golden_vae.stream_encode,
    "case10": golden_text.prompts,
    "case11_schedules": golden_sampling.schedules,
    "case11_liveavatar_flow_match_omni": golden_sampling.training_schedule,
    "case11_step_trajectories": golden_sampling.trajectories,
    "case12": golden_video.clips,
    "case13": golden_video.blocks,
    "case14": golden_sampling.sizes,
}


def _handler(folder: Path):
    return next((check for prefix, check in HANDLERS.items() if folder.name.startswith(prefix)), None)


FOLDERS = sorted(folder for folder in FOLDER.glob("case*") if folder.is_dir())


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
@torch.no_grad()
def test_golden(folder: Path) -> None:
    check = _handler(folder)
    assert check, f"nobody checks {folder.name}: its name must begin with one of {sorted(HANDLERS)}"
    check(Case.read(folder))


def test_the_folder_holds_cases() -> None:
    assert FOLDERS, f"{FOLDER} holds no case of {sorted(HANDLERS)}"


def _per_frame(case: Case) -> Tensor:
    call, noise = case.call, case.inputs["noise"]
    model = model_of(case, window_blocks=call["kv_cache_blocks"])
    conditions = conditions_of(case, audio=case.inputs["audio_input"], motion=case.inputs["motion_latents"])
    cache = model.prefill(conditions, model.new_cache(conditions, steps=1))
    found = []
    for turn, (timestep, index, scale) in enumerate(zip(call["t"], call["current_start_blocks"], call["x_scale"], strict=True)):
        span = BlockSpan(index, index * len(timestep), len(timestep))
        level = torch.tensor([timestep], dtype=torch.float32)
        inputs = model.prepare_block(conditions, span)._replace(ref_position=_ref_position(case, turn, span))
        latents = noise[:1, :, : len(timestep)] * scale
        found.append(model.denoise_block(latents, level, inputs, cache=cache, ring=cache.rings[0]))
    return torch.cat(found)


def _ref_position(case: Case, turn: int, span: BlockSpan) -> int:
    distances = case.manifest["relative_dist"]
    return ref_time_id(span.start, distance=distances[turn % len(distances)])


def _stream(case: Case, *, masks: Tensor | None = None, change: Callable[[AvatarDiT], None] = lambda model: None):
    """Prefill, then denoise block by block with Euler steps; a ring holds one clip. `change` modifies the model first."""
    call, noise = case.call, case.inputs["noise"]
    frames = call["frames_per_block"]
    blocks, clips = noise.shape[2] // frames, noise.shape[0]
    model = model_of(case, window_blocks=blocks)
    change(model)
    audio = case.inputs["audio_input"] if masks is None else None
    whole = conditions_of(case, audio=audio, motion=case.inputs["motion_latents"])
    sigmas = torch.tensor(SCHEDULES["twice_shifted"](call["steps"], 3.0))
    cache = model.prefill(whole, model.new_cache(whole, steps=call["steps"]))
    predictions, final, turn = [], [], 0
    for index in range(clips * blocks):
        clip, block = divmod(index, blocks)
        span = BlockSpan(index, index * frames, frames)
        within = BlockSpan(block, block * frames, frames)
        audio = whole.at(span).audio if masks is None else case.inputs["audio_input"]
        conditions = replace(whole, audio=audio, pose=whole.at(within).pose, masks=masks)
        inputs = model.prepare_block(conditions, span)
        latents = noise[clip : clip + 1, :, within.start : within.stop]
        for step, ring in enumerate(cache.rings):
            inputs = inputs._replace(ref_position=_ref_position(case, turn, span))
            velocity = model.denoise_block(latents, 1000 * sigmas[step : step + 1], inputs, cache=cache, ring=ring)
            latents = latents + (sigmas[step + 1] - sigmas[step]) * velocity
            predictions.append(velocity[0])
            turn += 1
        final.append(latents[0])
    return torch.stack(predictions).unflatten(0, (-1, call["steps"])), torch.cat(final, dim=1), cache
