"""From latent blocks to frames as they come, each stage on a thread of its own with a bounded queue between them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TypeVar

import torch
from einops import rearrange
from torch import Tensor, nn

from sonic.geometry import FRAMES_PER_LATENT
from sonic.inference.report import Clock
from sonic.types import FrameChunk, LatentBlock, MotionLayers
from sonic.vae.motion_vae import Reference
from sonic.vae.warp import Canvas

T = TypeVar("T")

SEAM = 0.15  # how far the first frame of a latent gives way to the one before
CHUNK_BYTES = 64 << 20  # pixels handed over at once; more would only fill memory
_END = object()
_PATIENCE_S = 0.1  # how soon a thread that cannot hand over notices that nobody wants its results any more


class _Failure:
    """An exception on its way to the other thread."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


def ahead(items: Iterable[T], size: int, *, name: str, prepare: Callable[[], None] = lambda: None) -> Iterator[T]:
    """The same items in the same order, made on a thread of their own while the caller works; at most `size` wait.

    What the thread raises is raised here. When the caller stops early (an error, Ctrl-C, `close`) the thread ends after the
    item it is making. `prepare` runs first on the thread.
    """
    waiting: queue.Queue = queue.Queue(size)
    place = torch.cuda.current_device() if torch.cuda.is_initialized() else None  # a new thread begins on the first one
    unwanted = threading.Event()

    def hand_over(item: object) -> bool:
        while not unwanted.is_set():
            try:
                waiting.put(item, timeout=_PATIENCE_S)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        source = iter(items)
        try:
            if place is not None:
                torch.cuda.set_device(place)
            prepare()
            if all(hand_over(item) for item in source):
                hand_over(_END)
        except BaseException as error:  # noqa: BLE001 - it is raised again in the caller's thread
            hand_over(_Failure(error))
        finally:
            if isinstance(source, Iterator) and hasattr(source, "close"):
                source.close()

    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    try:
        while (item := waiting.get()) is not _END:
            if isinstance(item, _Failure):
                raise item.error
            yield item
    finally:
        unwanted.set()
        thread.join()


def at_the_end(items: Iterable[T], size: int = 0, *, name: str = "", prepare: Callable[[], None] = lambda: None) -> Iterator[T]:
    """The same items, handed on only when all of them are made."""
    yield from list(items)


HANDOVERS = {True: ahead, False: at_the_end}  # by decode.online


def half_the_threads() -> Callable[[], None]:
    """For two stages that work at once, each with half of torch's threads: so they wait for each other less.

    The threads are counted here, by who starts the stages: a new thread begins with what the last one set.
    """
    return partial(torch.set_num_threads, max(1, torch.get_num_threads() // 2))


@torch.no_grad()
def decoded(
    blocks: Iterable[LatentBlock], num_frames: int, *, autoencoder: nn.Module, reference: Reference, canvas: Canvas, clock: Clock
) -> Iterator[FrameChunk]:
    """Finished frames of the blocks as they come; what the last block makes beyond `num_frames` is left out."""
    cache, last, start = None, None, 0
    for block in blocks:
        with clock.stage("decode"):
            found, cache = autoencoder.decode(block.latents, reference, cache)
            layers = MotionLayers(found.flow.cpu(), found.opacity.cpu(), found.interior.cpu())  # the canvas is in host memory
            layers = close_seams(layers, last)
            last = layers
        for part in _portions(layers, canvas.pixels.nbytes, min(block.span.frames, num_frames - start)):
            with clock.stage("decode"):
                pixels = canvas.render(part)
            yield FrameChunk(pixels, start)
            start += len(pixels)


def close_seams(layers: MotionLayers, before: MotionLayers | None) -> MotionLayers:
    """The same motion with the first frame of every latent drawn a little towards the frame before it, since latents are made
    apart and their seams would be seen; `before` is what came last."""

    def closed(track: Tensor, past: Tensor | None) -> Tensor:
        shifted = torch.cat((track[:, :1] if past is None else past[:, -1:], track[:, :-1]), dim=1)
        seam = torch.zeros(track.shape[1], device=track.device)
        seam[::FRAMES_PER_LATENT] = SEAM
        return torch.lerp(track, shifted, rearrange(seam, "f -> f 1 1 1"))

    names = ("flow", "opacity", "interior")
    return MotionLayers(*(closed(getattr(layers, name), before and getattr(before, name)) for name in names))


def _portions(layers: MotionLayers, frame_bytes: int, count: int) -> Iterator[MotionLayers]:
    """The first `count` frames of the layers, in portions that do not fill memory."""
    size = max(1, CHUNK_BYTES // frame_bytes)
    for first in range(0, count, size):
        last = min(first + size, count)
        yield MotionLayers(layers.flow[:, first:last], layers.opacity[:, first:last], layers.interior[:, first:last])
