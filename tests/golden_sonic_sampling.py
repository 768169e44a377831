"""Recorded cases of the schedule, the sampler and the way from audio to frames."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import golden_sonic_audio
import torch
from einops import rearrange
from golden_sonic_case import SonicCase
from torch.testing import assert_close

from sonic.config import UNetConfig
from sonic.encoders.clip_image import ClipImageEncoder
from sonic.inference.denoise_windows import NOTHING, SILENT, SOUND, ClipConditions, WindowSampling, clip_noise, denoise_clip, guidance_batch
from sonic.model.svd_unet import SvdUNet
from sonic.sampling.karras import clean_from, euler_step, karras_sigmas, network_input, noisy_start, timestep_of
from sonic.sampling.windows import windows_of
from sonic.vae.svd_vae import SvdAutoencoder

SIZES = (
    "block_out_channels",
    "num_attention_heads",
    "layers_per_block",
    "cross_attention_dim",
    "addition_time_embed_dim",
    "audio_tokens",
)
WINDOWS = {"window_frames": "window", "window_overlap": "overlap", "window_shift": "shift"}  # our name -> that of a recorded call


def check(case: SonicCase) -> None:
    """Compare what the case recorded: a schedule, a trajectory of a toy network, the sampler, or audio to frames."""
    if isinstance(case.sizes.get("steps"), list):
        _check_schedules(case)
    elif "A" in case.inputs:
        _check_trajectory(case)
    else:
        _check_pipeline(case)


def _check_schedules(case: SonicCase) -> None:
    for steps in case.sizes["steps"]:
        sigmas = karras_sigmas(steps)
        case.close(sigmas, case.outputs[f"sigmas_{steps}"])
        case.close(torch.tensor([timestep_of(sigma) for sigma in sigmas[:-1].tolist()]), case.outputs[f"timesteps_{steps}"])


def _check_trajectory(case: SonicCase) -> None:
    """Latents along the recorded steps, each from the recorded ones before it, and the whole way from the start."""
    given, recorded = case.inputs, case.outputs
    levels = karras_sigmas(case.sizes["steps"]).tolist()
    x = noisy_start(given["ref_latents"].unsqueeze(1) / 0.18215, given["noise"], levels[0])
    case.close(x, recorded["x_init"])
    for step, (now, following) in enumerate(pairwise(levels)):
        scaled = network_input(x, now)
        case.close(scaled, recorded["scaled_input"][step])
        bias = rearrange(given["b"] * timestep_of(now), "c -> c 1 1")
        v = torch.tanh(torch.einsum("dc,bfchw->bfdhw", given["A"], scaled) + bias)
        clean = clean_from(x, v, now)
        case.close(clean, recorded["pred_original"][step])
        x = euler_step(x, clean, sigma=now, following=following)
        case.close(x, recorded["prev_sample"][step])


def _check_pipeline(case: SonicCase) -> None:
    """Latents before every step, the windows and ids of every step, and where they were recorded the decoded frames."""
    autoencoder = SvdAutoencoder(case.sizes["models"]["vae"])
    autoencoder.blocks.load_state_dict(case.weights("vae"))
    conditions, sampling = _conditions(case, autoencoder), _sampling(case)
    noise = case.inputs["noise"][0]
    found = [noisy_start(conditions.image_latents if conditions.start is None else conditions.start, noise, sampling.plan()[0].sigma)]
    last = denoise_clip(_unet(case), conditions, noise, sampling=sampling, on_step=lambda step, timestep, now: found.append(now))
    recorded = case.outputs["latents"]
    assert len(found) - len(recorded) in (0, 1)  # the last ones are not always recorded
    case.close_at_every_step(found[: len(recorded)], recorded)
    _check_plan(case, conditions, sampling)
    if "torch_manual_seed" in case.call:
        height, width = case.inputs["ref_image"].shape[-2:]
        seeded = torch.Generator().manual_seed(case.call["torch_manual_seed"])
        assert torch.equal(clip_noise(seeded, len(noise), height=height, width=width)[1], noise)
    if "frames" in case.outputs:
        frames = torch.cat([*autoencoder.decode(last, chunk=case.call["decode_chunk_size"])])
        case.close(rearrange(frames, "f c h w -> 1 c f h w"), case.outputs["frames"])
    if "video_every2" in case.outputs:
        case.close(conditions.image_embed[None], case.outputs["image_embeds"])
        frames = torch.cat([*autoencoder.decode(last, chunk=case.call["decode_chunk_size"])]) / 2 + 0.5
        case.close(rearrange(frames.clamp(0, 1)[..., ::2, ::2], "f c h w -> 1 c f h w"), case.outputs["video_every2"])


def _check_plan(case: SonicCase, conditions: ClipConditions, sampling: WindowSampling) -> None:
    """The steps of the call, and the windows, ids and network input of each, where they were recorded."""
    recorded, plan, frames = case.outputs, sampling.plan(), len(conditions.tokens)
    if "sigmas" in recorded:
        levels = karras_sigmas(sampling.steps)
        assert_close(levels, recorded["sigmas"])
        assert_close(torch.tensor([timestep_of(level) for level in levels[:-1].tolist()]), recorded["timesteps"])
        assert [step.sigma for step in plan] == levels[-1 - len(plan) : -1].tolist()
    if "window_indices" in recorded:
        windows = [windows_of(frames, number, sampling.windows) for number in range(len(plan))]
        assert torch.equal(torch.tensor(windows), recorded["window_indices"])
        x = torch.zeros(sampling.windows.window_frames, *conditions.image_latents.shape)
        given = [
            [guidance_batch(conditions, x, window, step=step, sampling=sampling)[1].added_ids for window in those]
            for step, those in zip(plan, windows, strict=True)
        ]
        for step, ids in enumerate(given):
            for row in torch.stack(ids).unbind(1):
                case.close(row, recorded["added_time_ids"][step])
    if "debug.unet_input_window0_step0" in recorded:
        window = recorded["window_indices"][0, 0].tolist()
        x = recorded["latents"][0][window]
        batch, _ = guidance_batch(conditions, x, window, step=plan[0], sampling=sampling)
        rows = [(NOTHING, SILENT, SOUND).index(row) for row in plan[0].weights]  # rows of weight 0 were computed there
        case.close(batch, recorded["debug.unet_input_window0_step0"][rows])


def _conditions(case: SonicCase, autoencoder: SvdAutoencoder) -> ClipConditions:
    """The conditions of a recorded call: its own tokens, buckets and embedding, or those of its sound and picture."""
    given, noise_aug = case.inputs, case.call["noise_aug"]
    pixels = given["ref_image"].reshape(1, 3, *given["ref_image"].shape[-2:])
    clean = autoencoder.encode(pixels)[0]
    noisy = autoencoder.encode(pixels + noise_aug * given["image_noise"])[0] if noise_aug else clean
    mask = given["face_mask"].reshape(1, 1, *pixels.shape[-2:])
    if "audio_tokens" in given:
        embed, tokens, silence, buckets = (given[name] for name in ("image_embeds", "audio_tokens", "uncond_tokens", "motion_buckets"))
        return ClipConditions(noisy, tokens, silence, buckets, embed[0], mask, start=clean)
    image_encoder = ClipImageEncoder(case.sizes["models"]["clip"])
    image_encoder.network.load_state_dict(case.weights("image_encoder"))
    embed = image_encoder(given["clip_image"].float()[None])[0]
    encoder = golden_sonic_audio.networks(replace(case, config={**case.config, "config": case.sizes["audio"]}))
    sound = encoder((given["audio_int16"].float() / 32768).numpy(), case.call["model_frames"], embed)
    return ClipConditions(noisy, *sound, embed, mask, start=clean)


def _sampling(case: SonicCase) -> WindowSampling:
    call = case.call
    pair = lambda scale: tuple(scale) if isinstance(scale, list) else (scale, scale)  # noqa: E731
    return WindowSampling(
        steps=call["steps"],
        sample_guide_scale=pair(call["g1"]),
        audio_guide_scale=pair(call["g2"]),
        dynamic_scale=call["dynamic_scale"],
        fps=call["fps"],
        strength=call.get("i2i", 1.0),
        windows=UNetConfig(**{name: call[key] for name, key in WINDOWS.items()}),
    )


def _unet(case: SonicCase) -> SvdUNet:
    sizes = case.sizes["models"]["unet"]
    unet = SvdUNet(UNetConfig(**{name: sizes[name] for name in SIZES}, window_overlap=0)).eval()
    unet.load_state_dict(case.weights("unet"))
    return unet
