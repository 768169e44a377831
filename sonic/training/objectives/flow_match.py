"""Diffusion forcing: trains the DiT to denoise a whole window, block-causally as in a rollout or with full attention.

In a rollout, step i of a block attends to keys that earlier blocks wrote at step i, that is at the same noise level. So one sigma per
clip matches inference exactly, and blocks learn to continue from noisy earlier blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from sonic.data.clips import ClipDataset
from sonic.sampling.path import expand_like, interpolate
from sonic.training.objective_config import FlowMatchConfig
from sonic.training.objectives.networks import STUDENT
from sonic.training.objectives.objective import Batch, Losses, Weighted, host_rng
from sonic.training.objectives.transformer import TransformerObjective, conditions_of, split_past
from sonic.training.objectives.viseme import VisemeHead, encode_audio_blocks, viseme_loss
from sonic.training.train_config import TrainConfig
from sonic.types import Conditions, upload


class FlowMatch(TransformerObjective):
    """Trains the DiT from model.weights, or as a whole from random weights if that is empty, with a viseme head that is not exported."""

    config: FlowMatchConfig
    options = FlowMatchConfig
    exported = "model."

    def build(self, config: TrainConfig, dataset: object) -> None:
        """Raises ValueError when the clips of the dataset do not fit the options."""
        from_nothing = not (self.config.learn.rank or self.config.learn.targets or config.model.weights)
        if from_nothing:
            self.make = self.network
        self.build_transformers(config, dataset, (STUDENT,))
        if from_nothing:
            self.pretrained = ()
        self.student = nn.ModuleDict({"model": self.networks.roles[STUDENT]})
        if self.config.viseme_weight:
            check_visemes(dataset)
            self.student["viseme_head"] = VisemeHead(config.model)
        self.roles = {STUDENT: self.student}

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """The transformer, and the modules trained with it."""
        return {**self.networks.modules, **self.roles}

    def losses(self, role: str, batch: Batch, rng: torch.Generator) -> Losses:
        """Weighted error of the prediction and of its change between latent frames, plus the viseme loss.

        batch: latents [B,C,T,h,w] (T = whole blocks), ref [B,C,1,h,w], audio [B,K,E,4T]; visemes [B,4T,5], head [B,4T,4] and
        text [B,L,E] if the clips have them
        """
        config, window = self.config, self.config.window
        batch, motion = split_past(batch, window, rng)
        clean = batch["latents"]
        sigma = self._sigmas(clean, rng)
        noise = torch.randn(clean.shape, generator=rng, device=rng.device)
        first_block = self.first_block(host_rng(rng))
        conditions = replace(self._dropout_conditions(batch, rng), motion=motion)
        with self.networks.use_role(role) as model:
            noisy = interpolate(clean, noise, sigma)
            prediction = self.predict(model, noisy, sigma, conditions=conditions, first_block=first_block)
            loss, figures = self.error(prediction, clean, noise, sigma=sigma)
            figures["error_from_noise"] = self._error_from_noise(prediction, clean, noise, sigma=sigma)  # nan without such clips
            if config.viseme_weight:
                encoded = encode_audio_blocks(model.audio_encoder, batch["audio"], self.model_config)
                viseme_error, viseme_figures = viseme_loss(self.student["viseme_head"](*encoded), batch["visemes"])
                loss, figures = loss + config.viseme_weight * viseme_error, {**figures, **viseme_figures}
            yield loss, figures

    def _sigmas(self, clean: Tensor, rng: torch.Generator) -> Tensor:
        """Random noise levels: from the schedule, or uniform in (0, 1].  -> [B], or [B,T] if they differ within a clip"""
        draw = {"generator": rng, "device": rng.device}
        batch, frames = clean.shape[0], clean.shape[2]
        block = self.model_config.rollout.block_frames
        columns = {"clip": 1, "block": -(-frames // block), "frame": frames}[self.config.window.levels]
        steps = upload(torch.tensor(self.config.schedule), rng.device)
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

    def _error_from_noise(self, prediction: Tensor, clean: Tensor, noise: Tensor, *, sigma: Tensor) -> Weighted:
        """Squared error of clips at pure noise, relative to the target's squared size: 1.0 = nothing learnt, 0.0 = perfect."""
        level = expand_like(sigma, clean)
        target, _ = self.target(clean, noise, level, cap=self.config.error.weight_cap)
        pure = (level >= 0.999).float() * upload(self.cell_weights, prediction.device)
        return Weighted((pure * (prediction.detach() - target).square()).sum(), (pure * target.square()).sum())


def check_visemes(dataset: object) -> None:
    """Raise ValueError when the dataset's clips have no visemes."""
    if isinstance(dataset, ClipDataset) and not dataset.has("visemes"):
        raise ValueError(f"data.folder={dataset.folder} holds clips without visemes, as of one's own videos; add objective.viseme_weight=0")
