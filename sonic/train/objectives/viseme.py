"""Name the mouth shapes from the sound: the audio encoder's pre-training, and the helping loss beside the DiT's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from sonic.config import ModelConfig
from sonic.geometry import FRAMES_PER_LATENT
from sonic.model.audio_tokens import AudioEncoder
from sonic.model.speech_encoder import vary_throat
from sonic.train.objectives import Batch
from sonic.train.settings import TrainConfig, VisemeConfig

VISEMES = 5
# what an error in each number costs: the opening is what people see first
COST = (2.0, 1.0, 1.0, 0.5, 0.5)


class VisemeHead(nn.Linear):
    """Reads the visemes of the four video frames of a latent frame from its audio tokens. Used in training only."""

    def __init__(self, config: ModelConfig) -> None:
        tokens = config.audio.num_audio_token + 1  # and the summary
        super().__init__(tokens * config.trunk.hidden_dim, FRAMES_PER_LATENT * VISEMES)

    def forward(self, tokens: Tensor, summary: Tensor) -> Tensor:
        """tokens [B,T,A+1,D] (the last one is padding), summary [B,T,D] -> [B,4T,5]"""
        heard = torch.cat((rearrange(tokens[:, :, :-1], "b t a d -> b t (a d)"), summary), dim=-1)
        return rearrange(super().forward(heard), "b t (f v) -> b (t f) v", f=FRAMES_PER_LATENT)


def hear_blocks(encoder: AudioEncoder, audio: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Audio tokens as the rollout makes them, every block alone.  audio [B,N,A,4T] -> tokens [B,T,A+1,D], summary [B,T,D]"""
    frames = FRAMES_PER_LATENT * config.rollout.block_frames
    apart = rearrange(audio, "b n a (k f) -> (b k) n a f", f=frames)
    tokens, summary = encoder.clip(apart, tuple(config.motion.motion_frames))
    batch = audio.shape[0]
    return rearrange(tokens, "(b k) t a d -> b (k t) a d", b=batch), rearrange(summary, "(b k) t d -> b (k t) d", b=batch)


def other_throats(audio: Tensor, reach: float, rng: torch.Generator) -> Tensor:
    """Log-mel features as speakers of other sizes would give them; 0 leaves them as they are.  [B,1,A,F]"""
    if not reach:
        return audio
    return vary_throat(audio, torch.exp(reach * (2 * torch.rand(audio.shape[0], generator=rng, device=rng.device) - 1)))


def viseme_loss(found: Tensor, visemes: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Squared error by COST, and how much of the opening's variance is left unexplained.  both [B,F,5]"""
    cost = torch.tensor(COST, device=found.device)
    loss = (cost * (found.float() - visemes).square()).mean()
    opening = visemes[..., 0]
    unexplained = F.mse_loss(found.detach()[..., 0].float(), opening) / opening.var().clamp(min=1e-6)
    return loss, {"viseme_error": loss.detach(), "opening_unexplained": unexplained}


class VisemePretraining:
    """The audio encoder and a viseme head, alone. Exported under the names that they have beside the DiT."""

    def __init__(self, config: TrainConfig, dataset: object = None) -> None:
        assert isinstance(config.objective, VisemeConfig)
        self.config, self.model = config.objective, config.model
        audio = config.model.audio
        width, layers, tokens = config.model.trunk.hidden_dim, audio.num_audio_layers, audio.num_audio_token
        encoder = AudioEncoder(audio.audio_dim, width, num_layers=layers, num_tokens=tokens)
        for module in encoder.modules():
            if isinstance(module, nn.Linear | nn.Conv1d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                nn.init.zeros_(module.bias)
        self.student = nn.ModuleDict({"audio_encoder": encoder, "viseme_head": VisemeHead(config.model)})
        self.roles: Mapping[str, nn.Module] = {"student": self.student}

    def turn(self, step: int) -> Sequence[str]:
        """The one role, always."""
        return ("student",)

    def loss(self, role: str, batch: Batch, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Error of the visemes read from noised features.  batch: audio [B,N,A,4T], visemes [B,4T,5]"""
        audio = other_throats(batch["audio"], self.config.throat, rng)
        noise = torch.randn(audio.shape, generator=rng, device=rng.device)
        heard = hear_blocks(self.student["audio_encoder"], audio + self.config.audio_noise * noise, self.model)
        return viseme_loss(self.student["viseme_head"](*heard), batch["visemes"])

    def export(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Everything: the head serves the DiT's training as well."""
        return dict(weights)
