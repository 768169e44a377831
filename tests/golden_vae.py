"""Checks of recorded latents and frames of the Wan VAE, whole and in chunks."""

from __future__ import annotations

import torch
from golden_case import Case, tensors_of
from torch.testing import assert_close

from sonic.vae.wan_vae import WanAutoencoder


def vae_of(case: Case) -> WanAutoencoder:
    """The autoencoder of a case, with its weights."""
    config = dict(case.config("vae"))
    config["base_dim"] = config.pop("dim")
    means = {name: case.manifest[name] for name in ("latents_mean", "latents_std")}
    vae = WanAutoencoder({**config, **means})
    vae.load_tensors(tensors_of(case.weights(1)))
    return vae


def decode(case: Case) -> None:
    vae = vae_of(case)
    for name, latents in case.inputs.items():
        frames, _ = vae.decode(latents[None])
        case.close(frames[0], case.outputs[name.replace("latent", "video")])


def encode(case: Case) -> None:
    """Frames beyond the last whole latent frame are dropped, as the published code does silently."""
    vae = vae_of(case)
    for name, video in case.inputs.items():
        whole = 1 + (video.shape[1] - 1) // 4 * 4
        latents, _ = vae.encode(video[None, :, :whole])
        case.close(latents[0], case.outputs[name.replace("video", "latent")])


def stream_decode(case: Case) -> None:
    vae, cache = vae_of(case), None
    frames = []
    for index, part in enumerate(case.inputs["latent"][None].split(case.manifest["chunks"], dim=2)):
        found, cache = vae.decode(part, cache)
        case.close(found[0], case.outputs[f"chunk{index}"])
        frames.append(found)
    assert_close(torch.cat(frames, dim=2), vae.decode(case.inputs["latent"][None])[0], atol=1e-6, rtol=0)


def stream_encode(case: Case) -> None:
    vae, cache = vae_of(case), None
    for index, part in enumerate(case.inputs["video"][None].split(case.manifest["chunks"], dim=2)):
        found, cache = vae.encode(part, cache)
        case.close(found[0], case.outputs[f"chunk{index}"])
