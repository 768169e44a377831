"""Learn what a DiT has to know of a portrait: latents from which known visemes and head pose give the motion latents."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from sonic.geometry import FRAMES_PER_LATENT
from sonic.training.objective_config import PortraitConfig
from sonic.training.objectives import Batch, Losses, Objective
from sonic.training.objectives.viseme import VISEMES
from sonic.training.train_config import TrainConfig
from sonic.types import MotionLayers
from sonic.vae.motion_vae import Residual, WarpAutoencoder

POSE = 4
WIDTH = 96


class Foretell(nn.Module):
    """Motion latents from a portrait's latents and what is said; a small stand-in for the DiT. Used in training only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        told = FRAMES_PER_LATENT * (VISEMES + POSE)
        self.join = nn.Conv2d(channels + told, WIDTH, 3, padding=1)
        self.layers = nn.Sequential(Residual(WIDTH), Residual(WIDTH), nn.ReLU(), nn.Conv2d(WIDTH, channels, 3, padding=1))

    def forward(self, latents: Tensor, told: Tensor) -> Tensor:
        """latents [N,C,h,w], told [N,4·9] -> [N,C,h,w]"""
        height, width = latents.shape[-2:]
        return self.layers(self.join(torch.cat([latents, repeat(told, "n k -> n k h w", h=height, w=width)], 1)))


class PortraitLatents(Objective):
    """One role: the autoencoder's portrait encoder and a small network that uses it; the autoencoder itself stays as it is."""

    def __init__(self, config: TrainConfig, dataset: object = None) -> None:
        assert isinstance(config.objective, PortraitConfig)
        self.config = config.objective
        autoencoder = WarpAutoencoder().requires_grad_(False)
        autoencoder.portrait.requires_grad_(True)
        self.student = nn.ModuleDict({"autoencoder": autoencoder, "foretell": Foretell(autoencoder.latent_scale.numel())})
        self.roles: Mapping[str, nn.Module] = {"student": self.student}

    def losses(self, role: str, batch: Batch, rng: torch.Generator) -> Losses:
        """Weighted error of the foretold motion latents.  batch: see synthetic/drawn_people.py"""
        autoencoder = self.student["autoencoder"]
        with torch.no_grad():
            moved = autoencoder.encode(MotionLayers(batch["flow"], batch["opacity"], batch["interior"]))
        told = torch.cat([batch["visemes"], batch["head"]], dim=-1)
        portrait = autoencoder.portrait(batch["picture"])
        found = self.student["foretell"](
            repeat(portrait, "b c h w -> (b t) c h w", t=moved.shape[2]), rearrange(told, "b (t f) k -> (b t) (f k)", f=FRAMES_PER_LATENT)
        )
        target = rearrange(moved, "b c t h w -> (b t) c h w")
        focus = 1 + self.config.focus * F.interpolate(batch["focus"].unsqueeze(1), moved.shape[-2:], mode="area")
        weight = repeat(focus / focus.mean(), "b 1 h w -> (b t) 1 h w", t=moved.shape[2])
        error = (weight * (found.float() - target).square()).mean()
        left = error.detach() / (weight * target.square()).mean()
        yield error + 1e-3 * portrait.float().square().mean(), {"motion_error": error.detach(), "motion_unexplained": left}

    def export(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The whole autoencoder."""
        start = "autoencoder."
        return {name.removeprefix(start): tensor for name, tensor in weights.items() if name.startswith(start)}
