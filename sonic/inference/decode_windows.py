"""Decodes the latents of a whole clip to frames as bytes, chunk by chunk, in memory that does not grow with the length of the clip."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing

import torch
from einops import rearrange
from torch import Tensor

from sonic.config import DecodeConfig
from sonic.inference.report import StageTimer
from sonic.inference.stream import prefetch, windows
from sonic.system.device_stream import Event, current_stream, to_host
from sonic.vae.rife import Rife
from sonic.vae.svd_vae import SvdAutoencoder

PUBLISHED = {"chunk": 8, "overlap": 0}  # frames that the published code decodes together, and with them on each side


def decode_clip(
    latents: Tensor, autoencoder: SvdAutoencoder, rife: Rife | None, *, decode: DecodeConfig, timer: StageTimer, upstream: bool = False
) -> Iterator[Tensor]:
    """Yield the frames of latents [n,4,h,w] in host memory, uint8 [F,8h,8w,3], while later ones are decoded.

    With RIFE there are 2n frames. Chunks and their overlap are those of `decode`: each frame of overlap about halves the step at the
    seams between chunks. `upstream` decodes as published, without overlap, and leaves out the frame after the last one.
    """

    def queued() -> Iterator[tuple[Tensor, Event]]:
        lengths = PUBLISHED if upstream else {"chunk": decode.chunk_frames, "overlap": decode.overlap_frames}
        chunks = ((frames.float() * 0.5 + 0.5).clamp(0, 1) for frames in autoencoder.decode(latents, **lengths))
        for frames in chunks if rife is None else doubled(chunks, rife, upstream=upstream):
            rounded = rearrange(frames * 255, "f c h w -> f h w c").round().to(torch.uint8)
            (pixels,), copied = to_host([rounded.contiguous()], stream)
            yield pixels, copied

    stream = current_stream(next(autoencoder.parameters()).device)
    timed = timer.each("decode", queued(), stream)
    with closing(prefetch(timed, decode.queue, name="decode") if decode.online else timed) as pairs:
        for pixels, copied in pairs:
            copied.synchronize()
            yield pixels


def doubled(chunks: Iterable[Tensor], rife: Rife, *, upstream: bool = False) -> Iterator[Tensor]:
    """Every frame followed by the one halfway to the next; the last frame is shown twice, `upstream` once.  [f,3,H,W] in [0,1]"""
    for group in windows(chunks, 1):
        frames = []
        for _, now, after in group:
            last = after is now
            halfway = now if last else rife.middle(now[None], after[None])[0]
            frames += [now] if last and upstream else [now, halfway]
        yield torch.stack(frames)


def shown_frames(frames: int, *, upstream: bool = False) -> int:
    """Frames of the video that `doubled` makes of the frames of a clip."""
    return max(0, 2 * frames - upstream)
