"""Prediction of visemes from sound: pretraining of the speech encoder, and the auxiliary loss of the DiT."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from sonic.checkpoint.bundled import weight_files
from sonic.checkpoint.weights import load_weights
from sonic.config import ModelConfig, require
from sonic.encoders.logmel import VISEMES, LogMelEncoder, vary_throat
from sonic.geometry import FRAMES_PER_LATENT
from sonic.model.audio_tokens import AudioEncoder
from sonic.training.objective_config import VisemeConfig
from sonic.training.objectives.networks import STUDENT
from sonic.training.objectives.objective import Batch, Losses, Objective
from sonic.training.train_config import TrainConfig
from sonic.types import upload

# weight of the error of each viseme component; the opening is the most visible
COST = (2.0, 1.0, 1.0, 0.5, 0.5)


class VisemeHead(nn.Linear):
    """Predicts the visemes of the four video frames of a latent frame from its audio tokens. Used in training only."""

    def __init__(self, config: ModelConfig) -> None:
        tokens = config.audio.num_audio_token + 1  # + 1 for the summary
        super().__init__(tokens * config.trunk.hidden_dim, FRAMES_PER_LATENT * VISEMES)

    def forward(self, tokens: Tensor, summary: Tensor) -> Tensor:
        """tokens [B,T,A+1,D] (the last one is padding), summary [B,T,D] -> [B,4T,5]"""
        features = torch.cat((rearrange(tokens[:, :, :-1], "b t a d -> b t (a d)"), summary), dim=-1)
        return rearrange(super().forward(features), "b t (f v) -> b (t f) v", f=FRAMES_PER_LATENT)


def encode_audio_blocks(encoder: AudioEncoder, audio: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Encode audio block by block, as in a rollout.  audio [B,K,E,4T] -> tokens [B,T,A+1,D], summary [B,T,D]"""
    frames = FRAMES_PER_LATENT * config.rollout.block_frames
    apart = rearrange(audio, "b n a (k f) -> (b k) n a f", f=frames)
    tokens, summary = encoder.clip(apart, tuple(config.motion.motion_frames))
    batch = audio.shape[0]
    return rearrange(tokens, "(b k) t a d -> b (k t) a d", b=batch), rearrange(summary, "(b k) t d -> b (k t) d", b=batch)


def viseme_loss(prediction: Tensor, visemes: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Squared error weighted by COST, and the unexplained share of the opening's variance.  both [B,F,5]"""
    cost = upload(torch.tensor(COST), prediction.device)
    loss = (cost * (prediction.float() - visemes).square()).mean()
    opening = visemes[..., 0]
    unexplained = F.mse_loss(prediction.detach()[..., 0].float(), opening) / opening.var().clamp(min=1e-6)
    return loss, {"viseme_error": loss.detach(), "opening_unexplained": unexplained}


class VisemePretraining(Objective):
    """Trains the speech encoder together with a viseme head that is not exported, or with head_only the head over a frozen encoder."""

    config: VisemeConfig
    options = VisemeConfig

    def build(self, config: TrainConfig, dataset: object) -> None:
        name = config.model.speech_encoder
        require(name == "logmel", f"objective=viseme trains logmel, not model.speech_encoder={name}, which is published")
        encoder = LogMelEncoder()
        self.exported = "viseme_head." if self.config.head_only else "speech_encoder."
        if self.config.head_only:
            load_weights(encoder.requires_grad_(False), weight_files(config.model).speech)
        self.student = nn.ModuleDict({"speech_encoder": encoder, "viseme_head": nn.Linear(config.model.audio.audio_dim, VISEMES)})
        self.roles = {STUDENT: self.student}

    def losses(self, role: str, batch: Batch, rng: torch.Generator) -> Losses:
        """Viseme loss on augmented log-mel columns.  batch: mel [B,8T,40], visemes [B,4T,5]"""
        encoder, columns = self.student["speech_encoder"], encoder_input(batch["mel"], self.config, rng)
        features = encoder(encoder.with_margin(columns))[:, encoder.MARGIN : -encoder.MARGIN]
        yield viseme_loss(self.student["viseme_head"](features), batch["visemes"])


def encoder_input(columns: Tensor, config: VisemeConfig, rng: torch.Generator) -> Tensor:
    """Augment log-mel columns [B,2F,40] to other speakers and microphones: vocal tract length, spectral tilt, noise."""
    count, _, mels = columns.shape
    draw = {"generator": rng, "device": rng.device}
    if config.throat or config.bend:
        whole, low = (2 * torch.rand(count, 1, **draw) - 1 for _ in range(2))
        columns = vary_throat(columns, torch.exp(config.throat * whole + config.bend * low * torch.linspace(1, 0, mels, device=rng.device)))
    tilt = torch.randn(count, 1, 1, **draw) * torch.linspace(-1, 1, mels, device=rng.device)
    return columns + config.tilt * tilt + config.audio_noise * torch.randn(columns.shape, **draw)
