"""Block-causal diffusion forcing: the DiT learns to denoise all blocks of a window at once, each hearing its own audio.

At step i of a block the rollout reads the keys that step i of the blocks before it wrote, which are keys of latents at the same
noise level; so one sigma per clip is exactly what inference needs, and blocks learn to follow from noisy pasts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from sonic.data.clips import pose_latents
from sonic.flow.path import interpolate
from sonic.model.dit import AvatarDiT
from sonic.train.objectives import Batch
from sonic.train.objectives.viseme import VisemeHead, hear_blocks, viseme_loss
from sonic.train.settings import FlowMatchConfig, TrainConfig
from sonic.types import Conditions, pick

TIMESTEPS = 1000.0


def clean_target(clean: Tensor, noise: Tensor, sigma: Tensor, *, cap: float) -> tuple[Tensor, Tensor]:
    """The model names the clean latents; an error there is 1/sigma² in velocity, bounded by `cap`."""
    return clean, sigma.square().reciprocal().clamp(max=cap)


def velocity_target(clean: Tensor, noise: Tensor, sigma: Tensor, *, cap: float) -> tuple[Tensor, Tensor]:
    """The model names noise - clean, at equal weight."""
    return noise - clean, torch.ones_like(sigma)


TARGETS = {"clean": clean_target, "velocity": velocity_target}


class FlowMatch:
    """One role: the DiT, with a viseme head beside it that is not exported."""

    def __init__(self, config: TrainConfig, dataset: object = None) -> None:
        assert isinstance(config.objective, FlowMatchConfig)
        self.config, self.model_config = config.objective, config.model
        self.target = pick(TARGETS, config.model.prediction, "model.prediction")
        self.student = nn.ModuleDict({"model": AvatarDiT(config.model), "viseme_head": VisemeHead(config.model)})
        self.roles: Mapping[str, nn.Module] = {"student": self.student}
        spread = getattr(dataset, "statistics", dict)().get("cell_std")
        self.cell_weights = None if spread is None else cell_weights(spread, self.config.cell_gain)

    def turn(self, step: int) -> Sequence[str]:
        """The one role, always."""
        return ("student",)

    def loss(self, role: str, batch: Batch, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted error of the prediction and of its change between latent frames, plus that of the visemes.

        batch: latents [B,C,T,h,w] (T whole blocks), ref [B,C,1,h,w], audio [B,N,A,4T], visemes [B,4T,5], head [B,4T,4]
        """
        clean, config = batch["latents"], self.config
        sigma = self._sigmas(clean.shape[0], rng)
        noise = torch.randn(clean.shape, generator=rng, device=rng.device)
        wide = rearrange(sigma, "b -> b 1 1 1 1")
        first_block = int(torch.randint(config.max_first_block + 1, (), generator=rng, device=rng.device))
        model = self.student["model"]
        noisy = interpolate(clean, noise, sigma)
        found = model.forward_blocks(noisy, TIMESTEPS * sigma, self._conditions(batch, rng), first_block=first_block).float()
        target, weight = self.target(clean, noise, wide, cap=config.weight_cap)
        cells = 1.0 if self.cell_weights is None else self.cell_weights.to(clean)
        wrong = found - target
        error = (weight * cells * wrong.square()).mean()
        jerk = (weight * cells * wrong.diff(dim=2).square()).mean()  # errors that change from frame to frame are seen as trembling
        heard = hear_blocks(model.audio_encoder, batch["audio"], self.model_config)
        named, figures = viseme_loss(self.student["viseme_head"](*heard), batch["visemes"])
        left = _relative_error(found, target, sigma, cells=cells)
        loss = error + config.change_weight * jerk + config.viseme_weight * named
        return loss, {"flow_error": error.detach(), "change_error": jerk.detach(), "error_from_noise": left, **figures}

    def export(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The DiT alone."""
        return {name.removeprefix("model."): t for name, t in weights.items() if name.startswith("model.")}

    def _sigmas(self, count: int, rng: torch.Generator) -> Tensor:
        """A noise level per clip: from the inference schedule, or uniform in (0, 1].  -> [B]"""
        draw = {"generator": rng, "device": rng.device}
        steps = torch.tensor(self.config.schedule, device=rng.device)
        scheduled = steps[torch.randint(len(steps), (count,), **draw)]
        uniform = (1 - torch.rand(count, **draw)).clamp(min=0.02)
        return torch.where(torch.rand(count, **draw) < self.config.schedule_share, scheduled, uniform)

    def _conditions(self, batch: Batch, rng: torch.Generator) -> Conditions:
        """What the rollout will give: portrait, audio (sometimes dropped, for guidance), head motion, no text, no past."""
        clean, audio = batch["latents"], batch["audio"]
        kept = torch.rand(audio.shape[0], 1, 1, 1, generator=rng, device=rng.device) >= self.config.audio_dropout
        text = self.model_config.text
        return Conditions(
            ref=batch["ref"],
            text=clean.new_zeros(clean.shape[0], text.text_len, text.text_dim),
            audio=audio * kept,
            pose=pose_latents(batch["head"], *clean.shape[-2:]),
        )


def cell_weights(spread: Tensor, gain: float) -> Tensor:
    """Loss weight of each latent cell from how much it moves: 1 + gain · std / max std, with mean 1.  [h,w] -> [h,w]"""
    weights = 1 + gain * spread / spread.max().clamp(min=1e-6)
    return weights / weights.mean()


def _relative_error(found: Tensor, target: Tensor, sigma: Tensor, *, cells: Tensor | float) -> Tensor:
    """Error of clips that start from pure noise, as a share of the target's own size: 1.0 = nothing learnt, 0.0 = perfect (and
    what a batch without such clips counts)."""
    pure = rearrange((sigma >= 0.999).float(), "b -> b 1 1 1 1")
    wrong = (pure * cells * (found.detach() - target).square()).sum()
    return wrong / (pure * cells * target.square()).sum().clamp(min=1.0)
