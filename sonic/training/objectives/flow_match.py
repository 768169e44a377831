"""Diffusion forcing: trains the DiT to denoise a whole window, block-causally as in a rollout or with full attention.

In a rollout, step i of a block attends to keys that earlier blocks wrote at step i, that is at the same noise level. So one sigma per
clip matches inference exactly, and blocks learn to continue from noisy earlier blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from sonic.config import ModelConfig
from sonic.data.clips import ClipDataset, pose_latents
from sonic.geometry import FRAMES_PER_LATENT
from sonic.model.dit import AvatarDiT
from sonic.model.execution import LOCAL, Execution
from sonic.sampling.path import expand_like, interpolate
from sonic.sampling.schedules import TIMESTEPS
from sonic.training.objective_config import ErrorConfig, FlowMatchConfig, WindowConfig
from sonic.training.objectives import Batch, Losses, Objective
from sonic.training.objectives.networks import STUDENT, Make, build_networks
from sonic.training.objectives.viseme import VisemeHead, encode_audio_blocks, viseme_loss
from sonic.training.train_config import TrainConfig
from sonic.types import Conditions, pick


def clean_target(clean: Tensor, noise: Tensor, sigma: Tensor, *, cap: float) -> tuple[Tensor, Tensor]:
    """Target and weight of a model that predicts clean latents: weight 1/sigma², as for the velocity, but at most `cap`."""
    return clean, sigma.square().reciprocal().clamp(max=cap)


def velocity_target(clean: Tensor, noise: Tensor, sigma: Tensor, *, cap: float) -> tuple[Tensor, Tensor]:
    """Target and weight of a model that predicts the velocity noise - clean: weight 1."""
    return noise - clean, torch.ones_like(sigma)


TARGETS = {"clean": clean_target, "velocity": velocity_target}


def forward_window_blocks(
    model: AvatarDiT, noisy: Tensor, timestep: Tensor, *, conditions: Conditions, first_block: int, execution: Execution
) -> Tensor:
    """Block-causal forward: every block attends to itself and earlier blocks, as in a rollout from `first_block` on."""
    return model.forward_blocks(noisy, timestep, conditions, first_block=first_block, execution=execution)


def forward_window_clip(
    model: AvatarDiT, noisy: Tensor, timestep: Tensor, *, conditions: Conditions, first_block: int, execution: Execution
) -> Tensor:
    """Forward with full attention over the clip."""
    return model(noisy, timestep, conditions, execution=execution)


WINDOW_FORWARDS: dict[str, Callable[..., Tensor]] = {"blocks": forward_window_blocks, "clip": forward_window_clip}


class FlowMatch(Objective):
    """Trains the DiT, together with a viseme head that is not exported."""

    def __init__(self, config: TrainConfig, dataset: object = None, *, make: Make = AvatarDiT, execution: Execution = LOCAL) -> None:
        assert isinstance(config.objective, FlowMatchConfig)
        self.config, self.model_config, self.execution = config.objective, config.model, execution
        if self.config.window.reach == "blocks":
            need_blocks(config, dataset)
        self.target = pick(TARGETS, config.model.prediction, "model.prediction")
        self.run_window = pick(WINDOW_FORWARDS, self.config.window.reach, "objective.window.reach")
        from_weights = bool(self.config.learn.rank or self.config.learn.targets)
        self.networks = build_networks(config.model, self.config.learn, (STUDENT,), make=make if from_weights else AvatarDiT)
        parts = {"model": self.networks.roles[STUDENT]}
        if self.config.viseme_weight:
            need_visemes(dataset)
            parts["viseme_head"] = VisemeHead(config.model)
        self.student = nn.ModuleDict(parts)
        self.roles: Mapping[str, nn.Module] = {STUDENT: self.student}
        self.metadata = self.networks.metadata
        self.pretrained = tuple(self.networks.modules.values()) if from_weights else ()
        self.cells = cells_of(dataset, self.config.error)

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """The transformer, and the modules trained with it."""
        return {**self.networks.modules, STUDENT: self.student}

    def losses(self, role: str, batch: Batch, rng: torch.Generator) -> Losses:
        """Weighted error of the prediction and of its change between latent frames, plus the viseme loss.

        batch: latents [B,C,T,h,w] (T = whole blocks), ref [B,C,1,h,w], audio [B,K,E,4T]; visemes [B,4T,5], head [B,4T,4] and
        text [B,L,E] if the clips have them
        """
        config, window = self.config, self.config.window
        batch, motion = past_of(batch, window, rng)
        clean = batch["latents"]
        sigma = self._sigmas(clean, rng)
        noise = torch.randn(clean.shape, generator=rng, device=rng.device)
        first_block = int(torch.randint(window.max_first_block + 1, (), generator=rng, device=rng.device))
        conditions = replace(self._dropout_conditions(batch, rng), motion=motion)
        with self.networks.use_role(role) as model:
            noisy = interpolate(clean, noise, sigma)
            position = {"first_block": first_block, "execution": self.execution}
            prediction = self.run_window(model, noisy, TIMESTEPS * sigma, conditions=conditions, **position).float()
            target, weight = self.target(clean, noise, expand_like(sigma, clean), cap=config.error.weight_cap)
            loss, figures = clip_error(prediction, target, weight, cells=self.cells, config=config.error)
            figures["error_from_noise"] = _relative_error(prediction, target, expand_like(sigma, clean), cells=self.cells)
            if config.viseme_weight:
                encoded = encode_audio_blocks(model.audio_encoder, batch["audio"], self.model_config)
                viseme_error, viseme_figures = viseme_loss(self.student["viseme_head"](*encoded), batch["visemes"])
                loss, figures = loss + config.viseme_weight * viseme_error, {**figures, **viseme_figures}
            yield loss, figures

    def export(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The DiT without the viseme head."""
        return self.networks.export({name.removeprefix("model."): t for name, t in weights.items() if name.startswith("model.")})

    def _sigmas(self, clean: Tensor, rng: torch.Generator) -> Tensor:
        """Random noise levels: from the schedule, or uniform in (0, 1].  -> [B], or [B,T] if they differ within a clip"""
        draw = {"generator": rng, "device": rng.device}
        batch, frames = clean.shape[0], clean.shape[2]
        block = self.model_config.rollout.block_frames
        columns = {"clip": 1, "block": -(-frames // block), "frame": frames}[self.config.window.levels]
        steps = torch.tensor(self.config.schedule, device=rng.device)
        scheduled = steps[torch.randint(len(steps), (batch, columns), **draw)]
        uniform = (1 - torch.rand(batch, columns, **draw)).clamp(min=0.02)
        sigmas = torch.where(torch.rand(batch, columns, **draw) < self.config.schedule_share, scheduled, uniform)
        if columns == 1:
            return rearrange(sigmas, "b 1 -> b")
        return repeat(sigmas, "b k -> b (k f)", f=-(-frames // columns))[:, :frames]

    def _dropout_conditions(self, batch: Batch, rng: torch.Generator) -> Conditions:
        """The conditions of a rollout, with the audio of some clips dropped for guidance."""
        conditions = conditions_of(batch, self.model_config)
        kept = torch.rand(conditions.audio.shape[0], 1, 1, 1, generator=rng, device=rng.device) >= self.config.audio_dropout
        return replace(conditions, audio=conditions.audio * kept)


def need_blocks(config: TrainConfig, dataset: object) -> None:
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


def need_visemes(dataset: object) -> None:
    """Raise ValueError when the dataset's clips have no visemes."""
    if isinstance(dataset, ClipDataset) and not dataset.has("visemes"):
        raise ValueError(f"data.folder={dataset.folder} holds clips without visemes, as of one's own videos; add objective.viseme_weight=0")


def conditions_of(batch: Batch, config: ModelConfig) -> Conditions:
    """Conditions of a batch of windows: portrait, audio, and head motion and prompt if the clips have them; no motion memory."""
    clean, text = batch["latents"], config.text
    rows = batch["text"] if "text" in batch else clean.new_zeros(clean.shape[0], text.text_len, text.text_dim)
    pose = pose_latents(batch["head"], *clean.shape[-2:]) if "head" in batch else None
    return Conditions(ref=batch["ref"], text=rows, audio=batch["audio"], pose=pose)


def past_of(batch: Batch, config: WindowConfig, rng: torch.Generator) -> tuple[Batch, Tensor | None]:
    """Split off the first `past` latent frames of the window: the rest of the batch, and these frames, noised, as motion memory."""
    if not config.past:
        return batch, None
    past, frames = batch["latents"][:, :, : config.past], FRAMES_PER_LATENT * config.past
    level = config.past_noise * torch.rand(past.shape[0], generator=rng, device=rng.device)
    motion = interpolate(past, torch.randn(past.shape, generator=rng, device=rng.device), level)
    rest = {"latents": batch["latents"][:, :, config.past :], "audio": batch["audio"][..., frames:]}
    rest |= {name: batch[name][:, frames:] for name in ("visemes", "head") if name in batch}
    return {**batch, **rest}, motion


def cells_of(dataset: object, config: ErrorConfig) -> Tensor | None:
    """Loss weights of the latent cells from the dataset's statistics; None if it has none."""
    std = getattr(dataset, "statistics", dict)().get("cell_std")
    return None if std is None else cell_weights(std, config.cell_gain)


def cell_weights(std: Tensor, gain: float) -> Tensor:
    """Loss weight of each latent cell by its standard deviation: 1 + gain · std / max std, scaled to mean 1.  [h,w] -> [h,w]"""
    weights = 1 + gain * std / std.max().clamp(min=1e-6)
    return weights / weights.mean()


def clip_error(
    prediction: Tensor, target: Tensor, weight: Tensor, *, cells: Tensor | None, config: ErrorConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted squared error of latents and of their change between frames, which would be visible as jitter."""
    weight = weight if cells is None else weight * cells.to(prediction)
    difference = prediction - target
    error = (weight * difference.square()).mean()
    later = weight[:, :, 1:] if weight.shape[2] > 1 else weight
    jerk = (later * difference.diff(dim=2).square()).mean()
    return error + config.change_weight * jerk, {"flow_error": error.detach(), "change_error": jerk.detach()}


def _relative_error(prediction: Tensor, target: Tensor, sigma: Tensor, *, cells: Tensor | None) -> Tensor:
    """Squared error of clips at pure noise, relative to the target's squared size: 1.0 = nothing learnt, 0.0 = perfect (or no such
    clip in the batch)."""
    pure = (sigma >= 0.999).float() * (1.0 if cells is None else cells.to(prediction))
    error = (pure * (prediction.detach() - target).square()).sum()
    return error / (pure * target.square()).sum().clamp(min=1.0)
