"""Wan videos, in points where the published pipelines differ: frames follow the sound of their own time, and there are no black bars."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from infer_command import babble, write_wav
from official_folder import VAE
from PIL import Image

from sonic.cli import Entry, compose
from sonic.config import AudioConfig, ModelConfig, RolloutConfig, SamplerConfig, TextConfig, TrunkConfig
from sonic.inference import generate_wan
from sonic.inference.generate_wan import EncodedInputs, WanNetworks, generate_blocks, generate_clips
from sonic.inference.infer_config import InferConfig
from sonic.inference.input_reader import open_inputs
from sonic.model.dit import AvatarDiT
from sonic.vae.wan_vae import WanAutoencoder

CLIP = 12  # frames of a block and of a clip
GENERATORS = {"blocks": generate_blocks, "clips": generate_clips}


@pytest.fixture(scope="module")
def networks() -> WanNetworks:
    """A transformer and a VAE without zero weights."""
    torch.manual_seed(0)
    config = ModelConfig(
        trunk=TrunkConfig(hidden_dim=48, ffn_dim=64, num_heads=2, num_layers=2, patch_size=[1, 2, 2], freq_dim=32),
        audio=AudioConfig(audio_dim=16, num_audio_layers=3, num_audio_token=2, inject_layers=[0]),
        text=TextConfig(text_dim=24, text_len=12),
        rollout=RolloutConfig(window_blocks=4),
        resolution=0,
    )
    model, vae = AvatarDiT(config).eval(), WanAutoencoder(VAE).eval()
    with torch.no_grad():
        for weight in (*model.parameters(), *vae.parameters()):
            weight.add_(0.05 * torch.randn_like(weight))
    return WanNetworks(model, vae)


@pytest.mark.parametrize("kind", GENERATORS)
def test_sound_affects_the_frames_of_its_time_and_none_before(kind, networks):
    rng = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=rng)  # noqa: E731
    text, audio = draw(1, 4, 24), draw(1, 3, 16, 3 * CLIP)
    encoded = EncodedInputs(picture=draw(1, 3, 64, 64).clamp(-1, 1), text=text, negative=text, audio=audio, clip_frames=CLIP)
    later = encoded.audio.clone()
    later[..., 2 * CLIP :] = draw(1, 3, 16, CLIP)
    made = [
        torch.cat(list(GENERATORS[kind](networks, each, sampler=SamplerConfig(sample_steps=2))), dim=2)
        for each in (encoded, replace(encoded, audio=later))
    ]
    assert made[0].shape[2] == 3 * CLIP
    changed = (made[0] - made[1]).abs().amax((0, 1, 3, 4))
    assert not changed[: 2 * CLIP].any()
    assert (changed[2 * CLIP :] > 1e-4).all()


@torch.no_grad()
def test_latents_of_poses_do_not_depend_on_how_many_frames_are_encoded_at_once(networks, monkeypatch):
    pose = np.random.default_rng(0).integers(0, 256, (generate_wan.POSE_CHUNK + 8, 16, 16, 3), np.uint8)
    found = generate_wan._pose_latents(pose, networks.vae, device=torch.device("cpu"))
    monkeypatch.setattr(generate_wan, "POSE_CHUNK", len(pose))
    whole = generate_wan._pose_latents(pose, networks.vae, device=torch.device("cpu"))
    assert found.shape == (1, 16, len(pose) // 4, 2, 2) and torch.equal(found, whole)


@pytest.mark.parametrize(("compat", "darkest"), [("", 255), ("upstream", 0)])
@pytest.mark.parametrize("size", [(128, 204), (204, 128)])
def test_a_small_bright_picture_has_no_black_bars(compat, darkest, size, tmp_path):
    Image.fromarray(np.full((*size, 3), 255, np.uint8)).save(tmp_path / "bright.png")
    given = [f"image={tmp_path / 'bright.png'}", f"audio={write_wav(tmp_path / 'speech.wav', babble(0.5))}", "video.size=704x384"]
    found = open_inputs(compose(Entry("infer", InferConfig), ["model=live_avatar_14b", f"compat={compat}", *given]))
    assert found.portrait.pixels.min() == darkest
