"""Training of the preview's motion autoencoder: displacement, opacity and interior of the mouth, given a reference picture."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from sonic.training.objective_config import AutoencodeConfig
from sonic.training.objectives.networks import STUDENT
from sonic.training.objectives.objective import Batch, Losses, Objective
from sonic.training.train_config import TrainConfig
from sonic.types import MotionLayers
from sonic.vae.motion_vae import WarpAutoencoder


class Autoencode(Objective):
    """Trains the autoencoder with noise on the latents, so that small errors of the DiT stay small in the picture."""

    config: AutoencodeConfig
    options = AutoencodeConfig

    def build(self, config: TrainConfig, dataset: object) -> None:
        self.autoencoder = WarpAutoencoder()
        if self.config.decoder_only:
            for part in (self.autoencoder.portrait, self.autoencoder.squeeze, self.autoencoder.merge):
                part.requires_grad_(False)
        self.roles = {STUDENT: self.autoencoder}

    def losses(self, role: str, batch: Batch, rng: torch.Generator) -> Losses:
        """Distance of the decoded motion from the true motion.  batch: see synthetic/drawn_people.py"""
        model, config = self.autoencoder, self.config
        reference = model.reference(batch["picture"])
        latents = model.encode(MotionLayers(batch["flow"], batch["opacity"], batch["interior"]))
        strength = config.latent_noise * torch.rand(latents.shape[0], 1, 1, 1, 1, generator=rng, device=rng.device)
        noise = torch.randn(latents.shape, generator=rng, device=rng.device)
        layers, _ = model.decode(latents + strength * noise, reference)
        if not self.config.decoder_only:
            self._track_scale(latents)
        with torch.autocast(latents.device.type, enabled=False):
            exact = MotionLayers(*(track.float() for track in layers))
            distances = self._distances(batch, exact, latents.float())
        yield distances

    def _distances(self, batch: Batch, layers: MotionLayers, latents: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        focus = 1 + self.config.focus * rearrange(batch["focus"], "b h w -> b 1 1 h w")
        shown = focus * (1 - batch["opacity"])
        pixels = batch["picture"].shape[-1]
        flow = (shown * F.smooth_l1_loss(layers.flow * pixels, batch["flow"] * pixels, beta=0.25, reduction="none")).mean()
        opacity = (focus * F.smooth_l1_loss(layers.opacity, batch["opacity"], beta=0.1, reduction="none")).mean()
        interior = (focus * batch["opacity"] * (layers.interior - batch["shown"]).abs()).mean()
        loss = flow + 16 * opacity + 8 * interior + 1e-3 * latents.square().mean()
        figures = {"flow_px": flow, "opacity": opacity, "interior": interior, "latent_rms": latents.square().mean().sqrt()}
        return loss, {name: value.detach() for name, value in figures.items()}

    @torch.no_grad()
    def _track_scale(self, latents: Tensor) -> None:
        """Update the running scale of the latents where something moves, so that moving cells have unit size in every channel."""
        raw = latents.float() * rearrange(self.autoencoder.latent_scale, "c -> c 1 1 1")
        energy = raw.square()
        size = (energy.square().sum((0, 2, 3, 4)) / energy.sum((0, 2, 3, 4)).clamp(min=1e-12)).sqrt()
        self.autoencoder.latent_scale = self.autoencoder.latent_scale.lerp(size.clamp(min=1e-3), 0.02)
