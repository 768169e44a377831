"""Decodes latent blocks to frames as they arrive, and runs stages in threads with bounded queues between them."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import torch
from einops import rearrange
from torch import Tensor, nn

from sonic.config import DecodeConfig
from sonic.geometry import FRAMES_PER_LATENT
from sonic.inference.report import StageTimer
from sonic.system.device_stream import HIGH, DeviceStream, Event, current_stream, stream_for, to_host
from sonic.system.heartbeat import waiting_for_others
from sonic.types import FrameChunk, LatentBlock, MotionLayers
from sonic.vae.motion_vae import Reference
from sonic.vae.warp import Canvas

T = TypeVar("T")

SEAM = 0.15  # weight of the previous frame in the first frame of every latent frame
CHUNK_BYTES = 64 << 20  # upper limit for the pixels of one chunk, which bounds memory
_END = object()
IDLE_THREADS: defaultdict[str, list[ThreadPoolExecutor]] = defaultdict(list)  # they run later videos: cuDNN plans attention per thread


def prefetch(items: Iterable[T], size: int, *, name: str, prepare: Callable[[], None] = lambda: None) -> Iterator[T]:
    """Yield the items in order, produced in a background thread; at most `size` of them wait while the thread produces another one.

    An exception in the thread is raised here. When the caller stops early (an error, Ctrl-C, `close`), the thread stops after the current
    item. `prepare` runs first in the thread.
    """
    source, threads = iter(items), torch.get_num_threads()
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None  # of this thread, and with it the current device

    def begin() -> None:
        if stream is not None:
            torch.cuda.set_stream(stream)
        torch.set_num_threads(threads)
        prepare()

    def next_item() -> object:
        with waiting_for_others():
            return waiting.popleft().result()

    try:
        thread = IDLE_THREADS[name].pop()
    except IndexError:
        thread = ThreadPoolExecutor(1, name)
    waiting = deque([thread.submit(begin)])
    try:
        next_item()
        waiting.extend(thread.submit(next, source, _END) for _ in range(size + 1))
        while (item := next_item()) is not _END:
            waiting.append(thread.submit(next, source, _END))
            yield item
    finally:
        for each in waiting:
            each.cancel()
        thread.submit(int).result()  # after the current item
        IDLE_THREADS[name].append(thread)
        if isinstance(source, Generator):
            source.close()


def buffer_all(items: Iterable[T]) -> Iterator[T]:
    """Yield the items after all of them have been produced."""
    yield from list(items)


def with_events(blocks: Iterable[LatentBlock]) -> Iterator[tuple[LatentBlock, Event]]:
    """Yield each block with the point in the work of its device at which the latents are there."""
    for block in blocks:
        yield block, current_stream(block.latents.device).record()


def decoding_stream(device: torch.device) -> DeviceStream:
    """The stream that decodes blocks, whose work goes before that of the next blocks."""
    return stream_for("decoding", device, HIGH)


def hand_over(items: Iterable[T], decode: DecodeConfig, *, name: str, prepare: Callable[[], None] = lambda: None) -> Iterator[T]:
    """The items from a background thread (see `prefetch`), or without decode.online after all of them have been produced."""
    return prefetch(items, decode.queue, name=name, prepare=prepare) if decode.online else buffer_all(items)


def windows(chunks: Iterable[Iterable[T]], radius: int) -> Iterator[list[tuple[T, ...]]]:
    """For every frame, that frame between the `radius` frames before and those after it; the first and the last one are repeated.

    The windows that a chunk completes come together, and none depends on how the frames are cut into chunks.
    """
    held: deque[T] = deque(maxlen=2 * radius + 1)

    def completed(frames: Iterable[T]) -> Iterator[tuple[T, ...]]:
        for frame in frames:
            held.extend([frame] * (1 if held else radius + 1))
            if len(held) == held.maxlen:
                yield tuple(held)

    for chunk in chunks:
        if group := list(completed(chunk)):
            yield group
    if group := list(completed([held[-1]] * radius if held else ())):
        yield group


def half_the_threads() -> Callable[[], None]:
    """A function that sets torch's number of CPU threads to half, for two stages that run at the same time.

    The present number is read now, in the caller's thread, because a new thread inherits the number that was set last.
    """
    return partial(torch.set_num_threads, max(1, torch.get_num_threads() // 2))


FramesLeft = Callable[[int, int], int]  # (start, count) -> how many of the `count` frames from `start` belong to the video


@torch.no_grad()
def decode_motion(
    blocks: Iterable[tuple[LatentBlock, Event]], frames_left: FramesLeft, *, autoencoder: nn.Module, reference: Reference, timer: StageTimer
) -> Iterator[MotionLayers]:
    """Yield the motion layers of each latent block in host memory, where they are rendered, up to the end of the video."""
    cache, last = None, None
    for block, made in blocks:
        decoding = decoding_stream(block.latents.device)
        decoding.wait(made)
        with timer.stage("decode", decoding):
            found, cache = decoding.run(autoencoder.decode, block.latents, reference, cache)
            tracks, copied = to_host(found, decoding)
            copied.synchronize()
            last = smooth_seams(MotionLayers(*tracks), last)
        if count := frames_left(block.span.first_frame, block.span.frames):
            yield MotionLayers(*(track[:, :count] for track in last))


@torch.no_grad()
def render_motion(motion: Iterable[MotionLayers], canvas: Canvas, *, timer: StageTimer) -> Iterator[FrameChunk]:
    """Yield the finished frames of the motion layers in chunks."""
    start = 0
    for layers in motion:
        for part in _portions(layers, canvas.pixels.nbytes):
            with timer.stage("decode"):
                pixels = canvas.render(part, start)
            yield FrameChunk(pixels, start)
            start += len(pixels)


def smooth_seams(layers: MotionLayers, before: MotionLayers | None) -> MotionLayers:
    """The motion layers with the first frame of every latent frame blended towards the frame before it by SEAM.

    Latent frames are decoded separately, and without this their seams would be visible. `before` holds the layers of the previous block.
    """

    def closed(track: Tensor, past: Tensor | None) -> Tensor:
        shifted = torch.cat((track[:, :1] if past is None else past[:, -1:], track[:, :-1]), dim=1)
        seam = torch.zeros(track.shape[1], device=track.device)
        seam[::FRAMES_PER_LATENT] = SEAM
        return torch.lerp(track, shifted, rearrange(seam, "f -> f 1 1 1"))

    return MotionLayers(*(closed(track, past) for track, past in zip(layers, before or (None, None, None), strict=True)))


def _portions(layers: MotionLayers, frame_bytes: int) -> Iterator[MotionLayers]:
    """Split the frames of the layers so that the pixels of each part take at most CHUNK_BYTES."""
    size = max(1, CHUNK_BYTES // frame_bytes)
    for first in range(0, layers.flow.shape[1], size):
        yield MotionLayers(*(track[:, first : first + size] for track in layers))
