"""Diffusion forcing: the DiT learns to denoise a window at once, block-causally as a rollout or with full attention.

At step i of a block the rollout reads the keys that step i of the blocks before it wrote, which are keys of latents at the same
noise level; so one sigma per clip is exactly what inference needs, and blocks learn to follow from noisy pasts.
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
from sonic.sampling.path import interpolate, spread
from sonic.sampling.schedules import TIMESTEPS
from sonic.training.objective_config import ErrorConfig, FlowMatchConfig, WindowConfig
from sonic.training.objectives import Batch, Losses, Objective
from sonic.training.objectives.networks import STUDENT, Make, cast_of
from sonic.training.objectives.viseme import VisemeHead, hear_blocks, viseme_loss
from sonic.training.train_config import TrainConfig
from sonic.types import Conditions, pick


def clean_target(clean: Tensor, noise: Tensor, sigma: Tensor, *, cap: float) -> tuple[Tensor, Tensor]:
    """The model names the clean latents; an error there is 1/sigma² in velocity, bounded by `cap`."""
    return clean, sigma.square().reciprocal().clamp(max=cap)


def velocity_target(clean: Tensor, noise: Tensor, sigma: Tensor, *, cap: float) -> tuple[Tensor, Tensor]:
    """The model names noise - clean, at equal weight."""
    return noise - clean, torch.ones_like(sigma)


TARGETS = {"clean": clean_target, "velocity": velocity_target}


def see_blocks(model: AvatarDiT, noisy: Tensor, timestep: Tensor, *, told: Conditions, first_block: int, execution: Execution) -> Tensor:
    """Every block sees itself and those before it, as in a rollout that has come to `first_block`."""
    return model.forward_blocks(noisy, timestep, told, first_block=first_block, execution=execution)


def see_clip(model: AvatarDiT, noisy: Tensor, timestep: Tensor, *, told: Conditions, first_block: int, execution: Execution) -> Tensor:
    """Every frame sees every frame."""
    return model(noisy, timestep, told, execution=execution)


REACHES: dict[str, Callable[..., Tensor]] = {"blocks": see_blocks, "clip": see_clip}


class FlowMatch(Objective):
    """One role: the DiT, with a viseme head beside it that is not exported."""

    def __init__(self, config: TrainConfig, dataset: object = None, *, make: Make = AvatarDiT, execution: Execution = LOCAL) -> None:
        assert isinstance(config.objective, FlowMatchConfig)
        self.config, self.model_config, self.execution = config.objective, config.model, execution
        if self.config.window.reach == "blocks":
            need_blocks(config, dataset)
        self.target = pick(TARGETS, config.model.prediction, "model.prediction")
        self.see = pick(REACHES, self.config.window.reach, "objective.window.reach")
        from_weights = bool(self.config.learn.rank or self.config.learn.targets)
        self.cast = cast_of(config.model, self.config.learn, (STUDENT,), make=make if from_weights else AvatarDiT)
        parts = {"model": self.cast.roles[STUDENT]}
        if self.config.viseme_weight:
            need_visemes(dataset)
            parts["viseme_head"] = VisemeHead(config.model)
        self.student = nn.ModuleDict(parts)
        self.roles: Mapping[str, nn.Module] = {STUDENT: self.student}
        self.facts = self.cast.facts
        self.pretrained = tuple(self.cast.bodies.values()) if from_weights else ()
        self.cells = cells_of(dataset, self.config.error)

    @property
    def bodies(self) -> Mapping[str, nn.Module]:
        """The transformer, and what is trained beside it."""
        return {**self.cast.bodies, STUDENT: self.student}

    def losses(self, role: str, batch: Batch, rng: torch.Generator) -> Losses:
        """Weighted error of the prediction and of its change between latent frames, plus that of the visemes.

        batch: latents [B,C,T,h,w] (T whole blocks), ref [B,C,1,h,w], audio [B,N,A,4T]; visemes [B,4T,5], head [B,4T,4] and
        text [B,L,D] where clips have them
        """
        config, window = self.config, self.config.window
        batch, motion = past_of(batch, window, rng)
        clean = batch["latents"]
        sigma = self._sigmas(clean, rng)
        noise = torch.randn(clean.shape, generator=rng, device=rng.device)
        first_block = int(torch.randint(window.max_first_block + 1, (), generator=rng, device=rng.device))
        told = replace(self._told(batch, rng), motion=motion)
        with self.cast.play(role) as model:
            noisy = interpolate(clean, noise, sigma)
            place = {"first_block": first_block, "execution": self.execution}
            found = self.see(model, noisy, TIMESTEPS * sigma, told=told, **place).float()
            target, weight = self.target(clean, noise, spread(sigma, clean), cap=config.error.weight_cap)
            loss, figures = clip_error(found, target, weight, cells=self.cells, config=config.error)
            figures["error_from_noise"] = _relative_error(found, target, spread(sigma, clean), cells=self.cells)
            if config.viseme_weight:
                heard = hear_blocks(model.audio_encoder, batch["audio"], self.model_config)
                named, more = viseme_loss(self.student["viseme_head"](*heard), batch["visemes"])
                loss, figures = loss + config.viseme_weight * named, {**figures, **more}
            yield loss, figures

    def export(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The DiT alone."""
        return self.cast.export({name.removeprefix("model."): t for name, t in weights.items() if name.startswith("model.")})

    def _sigmas(self, clean: Tensor, rng: torch.Generator) -> Tensor:
        """Noise levels from the inference schedule, or uniform in (0, 1].  -> [B], or [B,T] where they differ within a clip"""
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

    def _told(self, batch: Batch, rng: torch.Generator) -> Conditions:
        """What the rollout will give, the audio sometimes dropped for guidance."""
        told = conditions_of(batch, self.model_config)
        kept = torch.rand(told.audio.shape[0], 1, 1, 1, generator=rng, device=rng.device) >= self.config.audio_dropout
        return replace(told, audio=told.audio * kept)


def need_blocks(config: TrainConfig, dataset: object) -> None:
    """Raise ValueError when the clips are known and a window of them is not whole blocks of the rollout."""
    if not isinstance(dataset, ClipDataset):
        return
    block, past = config.model.rollout.block_frames, config.objective.window.past
    for length in sorted({config.data.window or clip["latent_frames"] for clip in dataset.clips}):
        if (length - past) % block or length <= past:
            below, told = max(1, (length - past) // block) * block + past, f" after {past} of past" if past else ""
            raise ValueError(
                f"data.window={config.data.window} makes windows of {length} latent frames, which are not whole blocks of {block}{told}; "
                f"use data.window={below} or {below + block}"
            )


def need_visemes(dataset: object) -> None:
    """Raise ValueError when the clips are known and do not know which shape the mouth has."""
    if isinstance(dataset, ClipDataset) and not dataset.has("visemes"):
        raise ValueError(f"data.folder={dataset.folder} holds clips without visemes, as of one's own videos; add objective.viseme_weight=0")


def conditions_of(batch: Batch, config: ModelConfig) -> Conditions:
    """What a rollout is told of a window of clips: portrait, audio, head motion and prompt where the clips have them, no past."""
    clean, text = batch["latents"], config.text
    rows = batch["text"] if "text" in batch else clean.new_zeros(clean.shape[0], text.text_len, text.text_dim)
    pose = pose_latents(batch["head"], *clean.shape[-2:]) if "head" in batch else None
    return Conditions(ref=batch["ref"], text=rows, audio=batch["audio"], pose=pose)


def past_of(batch: Batch, config: WindowConfig, rng: torch.Generator) -> tuple[Batch, Tensor | None]:
    """The window without its first `past` latent frames, and these, noised, as motion memory."""
    if not config.past:
        return batch, None
    past, frames = batch["latents"][:, :, : config.past], FRAMES_PER_LATENT * config.past
    level = config.past_noise * torch.rand(past.shape[0], generator=rng, device=rng.device)
    motion = interpolate(past, torch.randn(past.shape, generator=rng, device=rng.device), level)
    rest = {"latents": batch["latents"][:, :, config.past :], "audio": batch["audio"][..., frames:]}
    rest |= {name: batch[name][:, frames:] for name in ("visemes", "head") if name in batch}
    return {**batch, **rest}, motion


def cells_of(dataset: object, config: ErrorConfig) -> Tensor | None:
    """Loss weights of the latent cells from the data's statistics; None without any."""
    spread_of = getattr(dataset, "statistics", dict)().get("cell_std")
    return None if spread_of is None else cell_weights(spread_of, config.cell_gain)


def cell_weights(spread: Tensor, gain: float) -> Tensor:
    """Loss weight of each latent cell from how much it moves: 1 + gain · std / max std, with mean 1.  [h,w] -> [h,w]"""
    weights = 1 + gain * spread / spread.max().clamp(min=1e-6)
    return weights / weights.mean()


def clip_error(
    found: Tensor, target: Tensor, weight: Tensor, *, cells: Tensor | None, config: ErrorConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted squared error of latents and of their change from frame to frame, which is seen as trembling."""
    weight = weight if cells is None else weight * cells.to(found)
    wrong = found - target
    error = (weight * wrong.square()).mean()
    later = weight[:, :, 1:] if weight.shape[2] > 1 else weight
    jerk = (later * wrong.diff(dim=2).square()).mean()
    return error + config.change_weight * jerk, {"flow_error": error.detach(), "change_error": jerk.detach()}


def _relative_error(found: Tensor, target: Tensor, sigma: Tensor, *, cells: Tensor | None) -> Tensor:
    """Error of what starts from pure noise, as a share of the target's own size: 1.0 = nothing learnt, 0.0 = perfect (and
    what a batch without such clips counts)."""
    pure = (sigma >= 0.999).float() * (1.0 if cells is None else cells.to(found))
    wrong = (pure * (found.detach() - target).square()).sum()
    return wrong / (pure * target.square()).sum().clamp(min=1.0)
