"""Recorded numbers of Sonic's sound: mel columns and states of Whisper, windows of ticks, audio tokens and motion buckets."""

from __future__ import annotations

import torch
from golden_sonic_case import SonicCase
from torch import Tensor, nn

from sonic.data.audio import SAMPLE_RATE
from sonic.encoders.clip_sound import (
    BUCKET_SCALE,
    BUCKET_SHIFT,
    BUCKET_TICKS,
    TOKEN_TICKS,
    ClipSound,
    ClipSoundEncoder,
    FrameBuckets,
    FrameTokens,
    tick_windows,
)
from sonic.encoders.whisper import READ_S, WhisperEncoder


def check(case: SonicCase) -> None:
    if "raw" in case.outputs:
        bucket_network(case)
    elif "audio" in case.inputs:
        tokens = loaded(FrameTokens(**token_sizes(case.sizes)), case.weights())(case.inputs["audio"][0])
        case.close(tokens[None], case.outputs["tokens"])
    elif "hidden_states" in case.inputs:
        windows(case)
    else:
        recording(case)


def bucket_network(case: SonicCase) -> None:
    network = loaded(FrameBuckets(**bucket_sizes(case.sizes)), case.weights())
    for suffix in ("", "_batch"):
        pairs = zip(case.inputs[f"audio{suffix}"][0], case.inputs[f"image_embeds{suffix}"], strict=True)
        found = torch.cat([network(window[None, :, 0], embed) for window, embed in pairs])[None, ..., None]
        case.close((found - BUCKET_SHIFT) / BUCKET_SCALE, case.outputs[f"raw{suffix}"])
        if not suffix:
            case.close(found, case.outputs["bucket"])


def windows(case: SonicCase) -> None:
    """The states [K,ticks,E] of a clip, of which only those of whole frames at 25 per second count."""
    states = case.inputs["hidden_states"].float().transpose(0, 1)[: 2 * case.sizes["audio_len_25fps"]]
    picked = case.outputs["selected_frames"]
    case.close(tick_windows(states, TOKEN_TICKS)[picked], case.outputs["windows_token"])
    case.close(tick_windows(states[:, -1], BUCKET_TICKS)[picked], case.outputs["windows_bucket"])
    compare(case, networks(case).of_states(states, case.inputs["image_embeds"][0]))


def recording(case: SonicCase) -> None:
    period, length = case.inputs["audio_int16"].float() / 32768, case.sizes["samples"]
    samples = period.repeat(-(-length // len(period)))[:length].numpy()
    encoder = networks(case)
    chunks = [samples[start : start + READ_S * SAMPLE_RATE] for start in range(0, length, READ_S * SAMPLE_RATE)]
    mel = torch.cat([encoder.whisper.inputs(torch.from_numpy(chunk))[0] for chunk in chunks], dim=1)
    assert mel.shape[1] == case.sizes["mel_frames_total"]
    case.close(mel[:, case.outputs["mel_columns"]], case.outputs["mel"])
    case.close(encoder.whisper.chunk_states(samples)[case.outputs["selected_ticks"]], case.outputs["hidden_states"])
    assert len(encoder.states(samples)) == 2 * case.sizes["audio_len_25fps"]
    compare(case, encoder(samples, case.sizes["model_frames"], case.inputs["image_embeds"][0]))


def compare(case: SonicCase, found: ClipSound) -> None:
    assert len(found.tokens) == case.sizes["model_frames"]
    case.close(found.tokens, case.outputs["tokens"])
    case.close(found.silence[None], case.outputs["uncond_tokens"])
    case.close(found.buckets, case.outputs["motion_buckets"])


def networks(case: SonicCase) -> ClipSoundEncoder:
    """The networks of a case, Whisper with random weights if the case stores none of it."""
    sizes = case.sizes.get("whisper", case.sizes)
    whisper = WhisperEncoder({name: sizes[name] for name in WhisperEncoder.KEYS if name in sizes})
    if "whisper" in case.config["weights"]:
        stored = {WhisperEncoder.to_transformers(name): tensor for name, tensor in case.weights("whisper").items()}
        whisper.encoder.load_state_dict({name: tensor for name, tensor in stored.items() if name})
    tokens = loaded(FrameTokens(**token_sizes(case.sizes["token"])), case.weights("audio2token"))
    return ClipSoundEncoder(whisper, tokens, loaded(FrameBuckets(**bucket_sizes(case.sizes["bucket"])), case.weights("audio2bucket")))


def loaded(network: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    network.load_state_dict(weights)
    return network


def token_sizes(sizes: dict) -> dict[str, int]:
    inputs = sizes["seq_len"] * sizes["blocks"] * sizes["channels"]
    return {"inputs": inputs, "hidden": sizes["intermediate_dim"], "tokens": sizes["context_tokens"], "width": sizes["output_dim"]}


def bucket_sizes(sizes: dict) -> dict[str, int]:
    return {"inputs": sizes["seq_len"] * sizes["blocks"] * sizes["channels"] + sizes["clip_channels"], "hidden": sizes["intermediate_dim"]}
