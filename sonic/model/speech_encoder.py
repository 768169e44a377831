"""Speech features for the audio encoder of the DiT: hidden layers by features by video frames, whatever makes them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from sonic.data.speech import COLUMNS_PER_FRAME, MELS, SILENT_COLUMN, log_mel

CONTEXT = 3  # frames heard before and after each frame
LOG_MEL_DIM = (2 * CONTEXT + 1) * COLUMNS_PER_FRAME * MELS


def log_mel_features(samples: np.ndarray, num_frames: int) -> Tensor:
    """Log-mel columns of frames k-3 .. k+3 for every video frame k.  samples float32 [n] at 16 kHz -> [1, 560, F]

    Feature order is (frame, column, mel); before the beginning and after the end there is silence.
    """
    columns = torch.from_numpy(log_mel(samples, num_frames))
    edge = torch.full((CONTEXT * COLUMNS_PER_FRAME, MELS), SILENT_COLUMN)
    frames = rearrange(torch.cat([edge, columns, edge]), "(f c) m -> f (c m)", c=COLUMNS_PER_FRAME)
    return rearrange(frames.unfold(0, 2 * CONTEXT + 1, 1), "f d context -> 1 (context d) f").contiguous()


def vary_throat(features: Tensor, factor: Tensor) -> Tensor:
    """The same words from throats that are shorter (factor < 1) or longer: log-mel features with their mel axis stretched.

    features [B,1,560,F], factor [B] -> [B,1,560,F].  Source: vocal tract length perturbation, Jaitly and Hinton 2013.
    """
    mels = rearrange(features, "b 1 (c m) f -> b c m f", m=MELS)
    place = ((torch.arange(MELS, device=factor.device) + 0.5) * rearrange(factor, "b -> b 1") - 0.5).clamp(0, MELS - 1)
    below = place.long().clamp(max=MELS - 2)
    share = rearrange((place - below).to(mels.dtype), "b m -> b 1 m 1")
    pick_row = lambda rows: mels.gather(2, rearrange(rows, "b m -> b 1 m 1").expand_as(mels))  # noqa: E731
    return rearrange(torch.lerp(pick_row(below), pick_row(below + 1), share), "b c m f -> b 1 (c m) f")


# name -> function of (samples float32 [n] at 16 kHz, number of video frames) giving [N, A, F]: N hidden layers of A features
SPEECH_ENCODERS: dict[str, Callable[[np.ndarray, int], Tensor]] = {"logmel": log_mel_features}
