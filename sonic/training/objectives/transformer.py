"""The base of the objectives that train the transformer on windows of latents, from noise level to weighted error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor, nn

from sonic.config import ModelConfig
from sonic.data.clips import STATISTICS, ClipDataset, pose_latents
from sonic.geometry import FRAMES_PER_LATENT
from sonic.model.dit import AvatarDiT
from sonic.registry import Registry
from sonic.sampling.path import expand_like, interpolate
from sonic.sampling.schedules import TIMESTEPS
from sonic.training.objective_config import DistillConfig, ErrorConfig, FlowMatchConfig, WindowConfig
from sonic.training.objectives.networks import Networks, SharedNetworks
from sonic.training.objectives.objective import Batch, Figure, Objective, Weighted
from sonic.training.train_config import TrainConfig
from sonic.types import Conditions, pick, upload

QUARTERS = (0.0, 0.25, 0.5, 0.75, 1.0)  # bounds of the noise levels whose losses are logged apart
SIGMAS = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)  # of validations


def clean_target(clean: Tensor, noise: Tensor, sigma: Tensor, *, cap: float) -> tuple[Tensor, Tensor]:
    """Target and weight of a model that predicts clean latents: weight 1/sigma², as for the velocity, but at most `cap`."""
    return clean, sigma.square().reciprocal().clamp(max=cap)


def velocity_target(clean: Tensor, noise: Tensor, sigma: Tensor, *, cap: float) -> tuple[Tensor, Tensor]:
    """Target and weight of a model that predicts the velocity noise - clean: weight 1."""
    return noise - clean, torch.ones_like(sigma)


TARGETS = Registry("model.prediction", {"clean": clean_target, "velocity": velocity_target})  # of the predictions that can be trained


class TransformerObjective(Objective):
    """Trains transformers, one for each role, to denoise windows of latents."""

    config: FlowMatchConfig | DistillConfig
    networks: Networks
    makes_videos = True
    validation_levels = SIGMAS

    def build_transformers(self, config: TrainConfig, dataset: object, roles: Sequence[str]) -> None:
        """Build a transformer for each role. Raises ValueError when the clips of the dataset do not fit the options."""
        if self.config.window.reach == "blocks":
            check_whole_blocks(config, dataset)
        self.execution = replace(self.execution, flex_blocks=self.config.window.attention == "flex")
        kind = SharedNetworks if self.config.learn.rank else Networks
        self.networks = kind(config.model, self.config.learn, roles, make=self.make)
        self.roles, self.metadata = self.networks.roles, self.networks.metadata
        self.exports_changes = bool(self.config.learn.rank)
        self.pretrained = tuple(self.networks.modules.values())
        self.target = pick(TARGETS, config.model.prediction, "model.prediction")
        std = dataset.statistics().get("cell_std") if isinstance(dataset, ClipDataset) else None
        gain = self.config.error.cell_gain
        if std is None and gain != ErrorConfig().cell_gain:
            raise ValueError(f"objective.error.cell_gain={gain} has no effect on clips without {STATISTICS}; leave it out")
        self.cell_weights = torch.ones(()) if std is None else cell_weights(std, gain)

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """The transformers."""
        return self.networks.modules

    def export(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The student's adapters in peft's format, or its transformer."""
        return self.networks.export(super().export(weights))

    def validation_losses(self, model: AvatarDiT, batch: Batch, rng: torch.Generator) -> Tensor:
        """The error of the model's prediction for one noise, at each of SIGMAS, with all conditions.  -> [levels]"""
        batch, motion = split_past(batch, self.config.window, rng)
        clean = batch["latents"]
        conditions = replace(conditions_of(batch, self.model_config), motion=motion)
        noise = torch.randn(clean.shape, generator=rng, device=rng.device)
        losses = []
        for level in SIGMAS:
            sigma = torch.full(clean.shape[:1], level, device=clean.device)
            prediction = self.predict(model, interpolate(clean, noise, sigma), sigma, conditions=conditions, first_block=0)
            losses.append(self.error(prediction, clean, noise, sigma=sigma)[0])
        return torch.stack(losses).float()

    def first_block(self, host: torch.Generator) -> int:
        """A random position of the window in a video, in blocks."""
        return int(torch.randint(self.config.window.max_first_block + 1, (), generator=host))

    def predict(self, model: AvatarDiT, noisy: Tensor, sigma: Tensor, *, conditions: Conditions, first_block: int) -> Tensor:
        """The model's prediction for a window: as in a rollout from `first_block` on, or with full attention over the clip."""
        timestep = TIMESTEPS * sigma
        if self.config.window.reach == "blocks":
            return model.forward_blocks(noisy, timestep, conditions, first_block=first_block, execution=self.execution).float()
        return model(noisy, timestep, conditions, execution=self.execution).float()

    def error(self, prediction: Tensor, clean: Tensor, noise: Tensor, *, sigma: Tensor) -> tuple[Tensor, dict[str, Figure]]:
        """Weighted squared error of a prediction and of its change between frames, which would be visible as jitter.  sigma [B] or [B,T]"""
        target, weight = self.target(clean, noise, expand_like(sigma, clean), cap=self.config.error.weight_cap)
        weight = weight * upload(self.cell_weights, prediction.device)
        difference = prediction - target
        error = (weight * difference.square()).mean()
        later = weight[:, :, 1:] if weight.shape[2] > 1 else weight
        jerk = (later * difference.diff(dim=2).square()).mean()
        levels = by_noise_level(reduce(weight * difference.detach().square(), "b c t h w -> b t", "mean"), sigma)
        figures = {"flow_error": error.detach(), "change_error": jerk.detach(), **levels}
        return error + self.config.error.change_weight * jerk, figures


def check_whole_blocks(config: TrainConfig, dataset: object) -> None:
    """Raise ValueError when a window of the dataset's clips is not a whole number of rollout blocks."""
    if not isinstance(dataset, ClipDataset):
        return
    block, past = config.model.rollout.block_frames, config.objective.window.past
    for length in sorted({config.data.window or clip["latent_frames"] for clip in dataset.clips}):
        if (length - past) % block or length <= past:
            below, suffix = max(1, (length - past) // block) * block + past, f" after {past} of past" if past else ""
            raise ValueError(
                f"data.window={config.data.window} makes windows of {length} latent frames, which are not whole blocks of {block}{suffix}; "
                f"use data.window={below} or {below + block}"
            )


def conditions_of(batch: Batch, config: ModelConfig) -> Conditions:
    """Conditions of a batch of windows: portrait, audio, and head motion and prompt if the clips have them; no motion memory."""
    clean, text = batch["latents"], config.text
    rows = batch["text"] if "text" in batch else clean.new_zeros(clean.shape[0], text.text_len, text.text_dim)
    pose = pose_latents(batch["head"], *clean.shape[-2:]) if "head" in batch else None
    return Conditions(ref=batch["ref"], text=rows, audio=batch["audio"], pose=pose)


def by_noise_level(losses: Tensor, sigma: Tensor, bounds: Sequence[float] = QUARTERS) -> dict[str, Weighted]:
    """The loss of the samples between neighbouring bounds of the noise level, by its name in the log.  losses [B] or [B,T], sigma the same
    or [B]"""
    levels = sigma if sigma.ndim == losses.ndim else repeat(sigma, "b -> b t", t=losses.shape[1])
    part = rearrange(torch.bucketize(levels.contiguous(), upload(torch.tensor(bounds[1:-1]), sigma.device)), "... -> (...) 1")
    inside = part == torch.arange(len(bounds) - 1, device=sigma.device)  # [samples, parts]
    totals = torch.where(inside, rearrange(losses, "... -> (...) 1"), 0.0).sum(0)
    names = [f"loss_sigma_{low:.2f}_{high:.2f}" for low, high in pairwise(bounds)]
    return {name: Weighted(*pair) for name, *pair in zip(names, totals, inside.sum(0), strict=True)}


def cell_weights(std: Tensor, gain: float) -> Tensor:
    """Loss weight of each latent cell by its standard deviation: 1 + gain · std / max std, scaled to mean 1.  [h,w] -> [h,w]"""
    weights = 1 + gain * std / std.max().clamp(min=1e-6)
    return weights / weights.mean()


def split_past(batch: Batch, config: WindowConfig, rng: torch.Generator) -> tuple[Batch, Tensor | None]:
    """Split off the first `past` latent frames of the window: the rest of the batch, and these frames, noised, as motion memory."""
    if not config.past:
        return batch, None
    past, frames = batch["latents"][:, :, : config.past], FRAMES_PER_LATENT * config.past
    level = config.past_noise * torch.rand(past.shape[0], generator=rng, device=rng.device)
    motion = interpolate(past, torch.randn(past.shape, generator=rng, device=rng.device), level)
    rest = {"latents": batch["latents"][:, :, config.past :], "audio": batch["audio"][..., frames:]}
    rest |= {name: batch[name][:, frames:] for name in ("visemes", "head") if name in batch}
    return {**batch, **rest}, motion
