"""Training of the portrait encoder: portrait latents from which, with visemes and head pose, the motion latents can be predicted."""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from sonic.encoders.logmel import VISEMES
from sonic.geometry import FRAMES_PER_LATENT
from sonic.training.objective_config import PortraitConfig
from sonic.training.objectives.networks import STUDENT
from sonic.training.objectives.objective import Batch, Losses, Objective
from sonic.training.train_config import TrainConfig
from sonic.types import MotionLayers
from sonic.vae.motion_vae import Residual, WarpAutoencoder

POSE = 4  # numbers of a head pose: roll, shift x, shift y, blink
WIDTH = 96  # channels of the motion predictor


class MotionPredictor(nn.Module):
    """Predicts motion latents from portrait latents, visemes and head pose, as a small stand-in for the DiT. Used in training only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = FRAMES_PER_LATENT * (VISEMES + POSE)
        self.join = nn.Conv2d(channels + inner, WIDTH, 3, padding=1)
        self.layers = nn.Sequential(Residual(WIDTH), Residual(WIDTH), nn.ReLU(), nn.Conv2d(WIDTH, channels, 3, padding=1))

    def forward(self, latents: Tensor, visemes_and_pose: Tensor) -> Tensor:
        """latents [B,C,h,w], visemes_and_pose [B,4·9] -> [B,C,h,w]"""
        height, width = latents.shape[-2:]
        return self.layers(self.join(torch.cat([latents, repeat(visemes_and_pose, "n k -> n k h w", h=height, w=width)], 1)))


class PortraitLatents(Objective):
    """Trains the autoencoder's portrait encoder together with a motion predictor; the rest of the autoencoder is frozen."""

    config: PortraitConfig
    options = PortraitConfig
    exported = "autoencoder."

    def build(self, config: TrainConfig, dataset: object) -> None:
        autoencoder = WarpAutoencoder().requires_grad_(False)
        autoencoder.portrait.requires_grad_(True)
        self.student = nn.ModuleDict({"autoencoder": autoencoder, "predictor": MotionPredictor(autoencoder.latent_scale.numel())})
        self.roles = {STUDENT: self.student}

    def losses(self, role: str, batch: Batch, rng: torch.Generator) -> Losses:
        """Weighted error of the predicted motion latents.  batch: see synthetic/drawn_people.py"""
        autoencoder = self.student["autoencoder"]
        with torch.no_grad():
            moved = autoencoder.encode(MotionLayers(batch["flow"], batch["opacity"], batch["interior"]))
        visemes_and_pose = torch.cat([batch["visemes"], batch["head"]], dim=-1)
        portrait = autoencoder.portrait(batch["picture"])
        prediction = self.student["predictor"](
            repeat(portrait, "b c h w -> (b t) c h w", t=moved.shape[2]),
            rearrange(visemes_and_pose, "b (t f) k -> (b t) (f k)", f=FRAMES_PER_LATENT),
        )
        target = rearrange(moved, "b c t h w -> (b t) c h w")
        focus = 1 + self.config.focus * F.interpolate(batch["focus"].unsqueeze(1), moved.shape[-2:], mode="area")
        weight = repeat(focus / focus.mean(), "b 1 h w -> (b t) 1 h w", t=moved.shape[2])
        error = (weight * (prediction.float() - target).square()).mean()
        unexplained = error.detach() / (weight * target.square()).mean()
        yield error + 1e-3 * portrait.float().square().mean(), {"motion_error": error.detach(), "motion_unexplained": unexplained}
