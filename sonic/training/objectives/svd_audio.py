"""Training of the audio conditions of a UNet that denoises windows: its audio adapters, audio tokens and motion buckets.

Sonic's training code was not published. Its paper (arXiv 2411.16331) says that the plain diffusion loss is descended and conditions are
dropped. Here the picture, the audio or both are, as in arXiv 2211.09800, whose guidance with two scales is Sonic's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from sonic.checkpoint.lora import PREFIX, Lora
from sonic.config import require
from sonic.encoders.clip_sound import BUCKET_SCALE
from sonic.registry import Registry
from sonic.sampling.karras import HIGHEST, LOWEST, RHO
from sonic.training.objective_config import SvdAudioConfig
from sonic.training.objectives.networks import STUDENT
from sonic.training.objectives.objective import Batch, Losses
from sonic.training.objectives.svd_windows import WindowObjective, frames_of, noised, v_target
from sonic.training.train_config import TrainConfig
from sonic.types import pick


class SvdAudio(WindowObjective):
    """Trains the weights of the UNet in objective.learn.targets, and both networks of the sound; the rest of the UNet is frozen.

    The UNet reads the buckets that were measured in the clip; the network that predicts them from sound and picture, for inference, learns
    them by regression.
    """

    config: SvdAudioConfig
    options = SvdAudioConfig

    def build(self, config: TrainConfig, dataset: object) -> None:
        """Raises ValueError when the clips of the dataset do not fit the options."""
        self.build_networks(config, dataset, (STUDENT,))
        self.student = nn.ModuleDict({"unet": self.networks.roles[STUDENT], **self.sound})
        self.roles = {STUDENT: self.student}
        self.learnt = {name for name, weight in self.student.named_parameters() if weight.requires_grad}

    def load(self, weights: Path, lora: Lora) -> None:
        """Raises ValueError for low-rank adapters, which the exported file could not have."""
        way_out = "train on the checkpoint that they are for, or name the file of such a training as init_from"
        require(not lora.adapters, f"model.lora.path={lora.file} holds low-rank adapters, which would be lost; {way_out}")
        super().load(weights, lora)

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """The UNet, and the modules trained with it."""
        return {**self.networks.modules, **self.roles}

    def losses(self, role: str, batch: Batch, rng: torch.Generator) -> Losses:
        """Squared error of v, and of the predicted buckets.  batch: see WindowObjective"""
        clean, draw = frames_of(batch), {"generator": rng, "device": rng.device}
        sigma = pick(NOISE, self.config.noise, "objective.noise")(len(clean), rng)
        noise = torch.randn(clean.shape, **draw)
        given = self.conditions(batch, *self._kept(torch.rand(len(clean), **draw)))
        with self.networks.use_role(role) as model:
            prediction = self.predict(model, noised(clean, noise, sigma), sigma, given=given)
            loss, figures = self.error(prediction, v_target(clean, noise, sigma), sigma)
            found = self.sound["audio2bucket"](*self.bucket_inputs(batch)).float()
            bucket_error = ((found - rearrange(batch["buckets"], "b f k -> (b f) k")) / BUCKET_SCALE).square().mean()
            yield loss + self.config.bucket_weight * bucket_error, {**figures, "bucket_error": bucket_error.detach()}

    def bucket_inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The states around each frame, and the embedding of its picture.  -> [B·F,50,E], [B·F,D]"""
        windows = batch["bucket_ticks"]
        return rearrange(windows, "b f t e -> (b f) t e"), repeat(batch["image_embed"], "b d -> (b f) d", f=windows.shape[1])

    def _kept(self, drawn: Tensor) -> tuple[Tensor, Tensor]:
        """1 for clips that keep their picture, and their audio, 0 for others, by numbers drawn from [0, 1).  [B] -> [B], [B]"""
        image, audio, both = self.config.drop_image, self.config.drop_audio, self.config.drop_both
        drops_both, drops_image = drawn < both, (drawn >= both) & (drawn < both + image)
        drops_audio = (drawn >= both + image) & (drawn < both + image + audio)
        return (~(drops_both | drops_image)).float(), (~(drops_both | drops_audio)).float()

    def exports(self, name: str) -> bool:
        """Whether a weight was trained."""
        return name in self.learnt

    def export(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The trained weights: the UNet's as peft names tensors that replace others, those of the sound's networks by their own names."""
        return {name.replace("unet.", PREFIX, 1) if name.startswith("unet.") else name: w for name, w in super().export(weights).items()}


def karras(count: int, rng: torch.Generator) -> Tensor:
    """Noise levels drawn evenly along the levels of sampling. Source: arXiv 2206.00364, equation 5.  -> [count]"""
    high, low = HIGHEST ** (1 / RHO), LOWEST ** (1 / RHO)
    return (high + torch.rand(count, generator=rng, device=rng.device) * (low - high)) ** RHO


def lognormal(count: int, rng: torch.Generator) -> Tensor:
    """Noise levels, ln sigma of mean 1 and deviation 1.6, within those of sampling. Source: arXiv 2311.15127, appendix D.  -> [count]"""
    return torch.exp(1.0 + 1.6 * torch.randn(count, generator=rng, device=rng.device)).clamp(LOWEST, HIGHEST)


NOISE: Registry[Callable[[int, torch.Generator], Tensor]] = Registry("objective.noise", {"karras": karras, "lognormal": lognormal})
