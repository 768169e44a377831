"""Every way of making a published model's video runs on a (fake) CUDA device, without a tensor on the wrong one."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import pytest
import torch
from fake_cuda import CUDA, Record, fake_cuda_mode, on_cuda

from sonic.cli import compose
from sonic.commands.infer_command import ENTRY as INFER
from sonic.config import SamplerConfig
from sonic.inference.generate_wan import EncodedInputs, WanNetworks, generate_blocks, generate_clips
from sonic.model.dit import AvatarDiT
from sonic.sampling.samplers import SAMPLERS
from sonic.vae.wan_vae import WanAutoencoder

GENERATE = {"live_avatar_14b": generate_blocks, "wan_s2v_14b": generate_clips}
PIXELS = (384, 704)


def frames_of(name: str, sampler: SamplerConfig, chunks: int = 2, layers: int = 5) -> tuple[list[tuple], list[Record]]:
    """Shape, dtype and device of the first chunks of a video by model `name` at its true width, and what each asked of the device."""
    streams = name == "live_avatar_14b"
    model_config = compose(INFER, [f"model={name}"]).model
    model_config = replace(
        model_config, trunk=replace(model_config.trunk, num_layers=layers), audio=replace(model_config.audio, inject_layers=[0, layers - 1])
    )
    with torch.device("meta"):
        model, vae = AvatarDiT(model_config), WanAutoencoder()
    found, records = [], []
    with fake_cuda_mode() as record, torch.no_grad():
        networks = WanNetworks(on_cuda(model, torch.bfloat16).eval(), on_cuda(vae, torch.bfloat16 if streams else None).eval())
        clip_frames = 48 if streams else 80
        audio = torch.empty(1, model_config.audio.num_audio_layers, model_config.audio.audio_dim, chunks * clip_frames)
        text = torch.empty(1, model_config.text.text_len, model_config.text.text_dim, device=CUDA)
        encoded = EncodedInputs(torch.empty(1, 3, *PIXELS, device=CUDA), text, text, audio, clip_frames)
        for frames in islice(GENERATE[name](networks, encoded, sampler=sampler), chunks):
            found.append((tuple(frames.shape), frames.dtype, str(frames.device)))
            records.append(Record(*(type(part)(part) for part in vars(record).values())))
            record.clear()
    return found, records


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(("name", "guide"), [("live_avatar_14b", 1.0), ("wan_s2v_14b", 4.5)])
def test_fake_cuda_makes_videos_with_every_sampler(fake_cuda, name, guide, sampler):
    settings = SamplerConfig(name=sampler, schedule="linear", sample_steps=3, sample_guide_scale=guide)
    frames, records = fake_cuda(frames_of, name, settings)
    assert {(shape[-2:], device) for shape, _, device in frames} == {(PIXELS, "cuda:0")}
    assert all(record.launches["mm"] + record.launches["addmm"] for record in records)
