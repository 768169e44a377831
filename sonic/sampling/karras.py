"""The Euler sampler of Stable Video Diffusion: noise levels from 700 down to 0, and a network that predicts v. Tensors, no models."""

from __future__ import annotations

import math

import torch
from torch import Tensor

HIGHEST, LOWEST, RHO = 700.0, 0.002, 7.0  # first and last noise level, and the power that crowds levels at low noise
LATENT_SCALE = 0.18215  # of the VAE: its latents times this have about unit variance


def karras_sigmas(steps: int) -> Tensor:
    """The noise levels of `steps` sampling steps and a final 0, float32 [steps+1]. Source: EDM, arXiv 2206.00364, eq. 5."""
    share = torch.linspace(0, 1, steps, dtype=torch.float64)
    high, low = HIGHEST ** (1 / RHO), LOWEST ** (1 / RHO)
    return torch.cat([(high + share * (low - high)) ** RHO, torch.zeros(1, dtype=torch.float64)]).float()


def timestep_of(sigma: float) -> float:
    """The timestep that the network is given at a noise level: ln(sigma) / 4."""
    return math.log(sigma) / 4


def flow_sigma(sigma: float) -> float:
    """The noise level in [0,1], the share of noise in clean + sigma·noise when both are scaled to sum to 1."""
    return sigma / (1 + sigma)


def noisy_start(clean: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """Latents at the first noise level, from unscaled latents of the VAE: the picture below the noise."""
    return LATENT_SCALE * clean + sigma * noise


def network_input(x: Tensor, sigma: float) -> Tensor:
    """Latents scaled to about unit variance, as the network reads them."""
    return x / math.sqrt(sigma**2 + 1)


def clean_from(x: Tensor, v: Tensor, sigma: float) -> Tensor:
    """The clean latents that a predicted v means. Source: progressive distillation, arXiv 2202.00512, with noise level sigma."""
    return x / (sigma**2 + 1) - v * (sigma / math.sqrt(sigma**2 + 1))


def euler_step(x: Tensor, clean: Tensor, *, sigma: float, following: float) -> Tensor:
    """Latents at the following noise level, along the line to the predicted clean latents."""
    return x + (x - clean) / sigma * (following - sigma)
