"""The base of the objectives that train a UNet to denoise windows of frames: its networks, its conditions, and noise on its latents.

x = clean + sigma·noise; the UNet reads x / sqrt(sigma² + 1) and predicts v = (noise - sigma·clean) / sqrt(sigma² + 1). The plain error of v
is the error of the clean latents weighted by (sigma² + 1) / sigma², as Stable Video Diffusion was trained (arXiv 2311.15127, appendix D).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor, nn

from sonic.checkpoint.lora import PREFIX, Lora
from sonic.config import ModelConfig, require
from sonic.data.clips import ClipDataset
from sonic.encoders.clip_sound import FrameBuckets, FrameTokens
from sonic.families.family import family_of
from sonic.sampling.path import expand_like
from sonic.system.program import written
from sonic.training.objective_config import SvdAudioConfig, SvdConsistencyConfig
from sonic.training.objectives.networks import Networks, SharedNetworks
from sonic.training.objectives.objective import Batch, Figure, Objective
from sonic.training.objectives.transformer import by_noise_level
from sonic.training.train_config import TrainConfig

if TYPE_CHECKING:
    from sonic.model.svd_unet import UNetConditions

FRAMES_PER_SECOND = 12.5
TENSORS = ("latents", "image_latents", "image_embed", "face_mask", "buckets", "token_ticks", "bucket_ticks")  # of a clip
BOUNDS = (0.0, 0.7, 16.0, 135.0, 700.0)  # quarters of the Karras levels
LEVELS = (0.1, 0.7, 4.0, 16.0, 50.0, 200.0)  # of validations


class WindowObjective(Objective):
    """Trains a UNet, and perhaps the networks of its audio conditions, on windows of latents.

    A batch: latents [B,4,F,h,w] (scaled), image_latents [B,4,h,w] (not scaled), image_embed [B,D], face_mask [B,8h,8w], buckets [B,F,2],
    token_ticks [B,F,10,K,E] and bucket_ticks [B,F,50,E], the states of the sound around each frame.
    """

    config: SvdAudioConfig | SvdConsistencyConfig
    networks: Networks
    exports_changes = True
    validation_levels = LEVELS
    changes: Mapping[str, Tensor] = {}  # of the published weights, with which the training began, by their names in a file

    @staticmethod
    def network(config: ModelConfig) -> nn.Module:
        """The UNet, in host memory."""
        from sonic.model.svd_unet import SvdUNet  # its import takes seconds, which other objectives do not need

        return SvdUNet(config.unet)

    def build_networks(self, config: TrainConfig, dataset: object, roles: Sequence[str]) -> None:
        """Build the networks of the roles. Raises ValueError when the dataset's clips are of other models, the window is not this model's,
        or processes would share its tokens."""
        window, frames, context = config.data.window, config.model.unet.window_frames, config.speed.context
        if isinstance(dataset, ClipDataset) and (absent := [name for name in TENSORS if not dataset.has(name)]):
            again = f"make clips with {written('precompute')} model={config.model.name}"
            raise ValueError(f"data.folder={dataset.folder} holds clips without {', '.join(absent)}; {again}")
        require(window == frames, f"data.window={window}: model={config.model.name} denoises windows of {frames} frames; use {frames}")
        require(context == 1, f"speed.context={context}: objective={self.config.name} does not divide a window among processes; use 1")
        kind = SharedNetworks if self.config.learn.rank else Networks
        self.networks = kind(config.model, self.config.learn, roles, make=self.make)
        self.pretrained = tuple(self.networks.modules.values())
        tokens, buckets = self.sound_networks(config.model)
        self.sound = nn.ModuleDict({"audio2token": tokens, "audio2bucket": buckets})

    @staticmethod
    def sound_networks(config: ModelConfig) -> tuple[FrameTokens, FrameBuckets]:
        """The networks of audio tokens and motion buckets in the model's checkpoint. Raises ValueError without one."""
        from sonic.checkpoint.sonic_checkpoint import SonicCheckpoint  # which imports the UNet too

        checkpoint = SonicCheckpoint.open(family_of(config).transformer_weights(config).parent)
        found = checkpoint.speech(torch.device("cpu")).requires_grad_(True)
        return found.tokens, found.buckets

    def load(self, weights: Path, lora: Lora) -> None:
        """Fill the UNets from the model's checkpoint, changed by `lora`, which may also have tensors of the networks of the sound."""
        super().load(weights, lora)
        lora.replace_beside(self.sound)
        self.changes = {f"{PREFIX}{name}": stored.whole() for name, stored in lora.replaced.items()}
        self.changes |= {name: stored.whole() for name, stored in lora.beside.items()}

    def conditions(self, batch: Batch, image: Tensor, audio: Tensor) -> tuple[UNetConditions, Tensor]:
        """The conditions of the UNet and the latents of the picture, zeros or the tokens of zero states where `image` or `audio` is 0.

        image, audio [B] of 0 or 1 -> conditions, [B,1,4,h,w]
        """
        from sonic.model.svd_unet import UNetConditions

        embed = rearrange(image, "b -> b 1") * batch["image_embed"]
        buckets = reduce(batch["buckets"], "b f k -> b k", "mean")
        rate = torch.full_like(buckets[:, :1], FRAMES_PER_SECOND)
        conditions = UNetConditions(
            image_embeds=rearrange(embed, "b d -> b 1 1 d"),
            audio_tokens=self.tokens(batch["token_ticks"] * expand_like(audio, batch["token_ticks"])),
            added_ids=torch.cat((rate, buckets), dim=1),
            face_mask=rearrange(batch["face_mask"], "b h w -> b 1 h w"),
        )
        return conditions, rearrange(rearrange(image, "b -> b 1 1 1") * batch["image_latents"], "b c h w -> b 1 c h w")

    def tokens(self, windows: Tensor) -> Tensor:
        """The audio tokens of frames with these states around them.  [B,F,10,K,E] -> [B,F,T,D]"""
        found = self.sound["audio2token"](rearrange(windows, "b f t k e -> (b f) t k e"))
        return rearrange(found, "(b f) t d -> b f t d", b=len(windows))

    def predict(self, model: nn.Module, x: Tensor, sigma: Tensor, *, given: tuple[UNetConditions, Tensor]) -> Tensor:
        """The prediction v at the noisy latents.  x [B,F,4,h,w], sigma [B] -> like x"""
        conditions, picture = given
        scaled = x * (expand_like(sigma, x).square() + 1).rsqrt()
        sample = torch.cat((scaled, repeat(picture, "b 1 c h w -> b f c h w", f=x.shape[1])), dim=2)
        return model(sample, sigma.log() / 4, conditions).float()

    def error(self, prediction: Tensor, target: Tensor, sigma: Tensor) -> tuple[Tensor, dict[str, Figure]]:
        """The squared error of v, and the same by noise level."""
        losses = reduce((prediction - target).square(), "b f c h w -> b", "mean")
        error = losses.mean()
        by_level = by_noise_level(losses.detach(), sigma, BOUNDS)
        return error, {"v_error": error.detach(), **by_level}

    def validation_losses(self, model: nn.Module, batch: Batch, rng: torch.Generator) -> Tensor:
        """The squared error of v for one noise, at each of LEVELS, with all conditions.  -> [levels]"""
        clean = frames_of(batch)
        noise = torch.randn(clean.shape, generator=rng, device=rng.device)
        every = clean.new_ones(len(clean))
        given, losses = self.conditions(batch, every, every), []
        for level in LEVELS:
            sigma = level * every
            prediction = self.predict(model, noised(clean, noise, sigma), sigma, given=given)
            losses.append((prediction - v_target(clean, noise, sigma)).square().mean())
        return torch.stack(losses)


def frames_of(batch: Batch) -> Tensor:
    """The clean latents of a batch, frame by frame.  -> [B,F,4,h,w]"""
    return rearrange(batch["latents"], "b c f h w -> b f c h w")


def noised(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """clean + sigma·noise.  sigma [B]"""
    return clean + expand_like(sigma, clean) * noise


def v_target(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """v = (noise - sigma·clean) / sqrt(sigma² + 1).  sigma [B]"""
    level = expand_like(sigma, clean)
    return (noise - level * clean) * (level.square() + 1).rsqrt()


def velocity_of(v: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """dx/dsigma = (x - clean) / sigma where the clean latents are x / (sigma² + 1) - v·sigma / sqrt(sigma² + 1).  sigma [B]"""
    level = expand_like(sigma, x)
    size = level.square() + 1
    return x * level / size + v * size.rsqrt()


def v_of(velocity: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """The prediction v with this velocity: the inverse of `velocity_of`.  sigma [B]"""
    level = expand_like(sigma, x)
    size = level.square() + 1
    return (velocity - x * level / size) * size.sqrt()
