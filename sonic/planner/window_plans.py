"""Predicts memory and time of a video in windows under each plan, and lists the plans and what would help when none fits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from sonic.families import FAMILIES
from sonic.parallel.layer_ranges import resident_layers
from sonic.parallel.parallel_config import PLANS, HardwareConfig, ParallelConfig
from sonic.planner import step_time as s
from sonic.planner import video_candidates as videos
from sonic.planner.memory import GIB, HOST_GIB, Phases
from sonic.planner.plans import SPARE_GIB, Plan
from sonic.planner.step_time import Seconds
from sonic.planner.window_workload import (
    LATENT_BYTES,
    WindowWorkload,
    call_bytes,
    clip_bytes,
    decoder_bytes,
    end_bytes,
    first_bytes,
    sublayer_bytes,
    unet_bytes,
    unit_bytes,
)  # fmt: skip

DECODE_FLOPS = 11.6e6  # operations per pixel and frame of the VAE's decoder (24.3e12 for eight frames of 512x512)
RIFE_FLOPS = 256e3  # operations per pixel between two frames (67e9 for 512x512)
ENCODE_FLOPS, IMAGE_FLOPS = 4.2e6, 0.33e12  # of the VAE's encoder per pixel, and of CLIP
SHORTER_CHUNKS = (8, 2), (4, 2), (2, 2), (2, 1), (1, 1)  # frames decoded together, and more on each side
SIDE, SMALLEST = 64, 384  # pixels by which a short side is reduced, and the shortest

Changed = Iterator[tuple[str, tuple[str, ...], WindowWorkload]]  # a sentence, the options that make this change, the changed job
instead = videos.instead


def plan(work: WindowWorkload, hardware: HardwareConfig, parallel: ParallelConfig) -> Plan:
    """The plan of this config, with the command-line options that select it, and the size, which is made of the short side."""
    makers = {"fsdp": sharded, "offload": offloaded, "windows": offloaded if parallel.cpu_offload else whole}
    found = makers.get(parallel.name, whole)(work, hardware, parallel)
    short = f"video.min_resolution={min(work.width, work.height)}"
    return replace(found, options=(*instead(found.parallel, ParallelConfig()), short))


def candidates(asked: ParallelConfig, work: WindowWorkload, hardware: HardwareConfig) -> Iterator[ParallelConfig]:
    """The configs to try: the named one, or for auto every plan that is possible. Raises ValueError when the named one is not."""
    if asked.name != "auto":
        if sentence := why_not(asked, hardware):
            raise ValueError(f"parallel={asked.name}: {sentence}")
        yield asked
        return
    every = [replace(asked, name=name) for name in FAMILIES[work.model.family].plans]
    every += [replace(asked, name=name, cpu_offload=True) for name in ("fsdp", "windows")]
    every += [replace(asked, name="offload", offload=replace(asked.offload, store="mmap"))]
    yield from (each for each in every if not why_not(each, hardware))


def why_not(parallel: ParallelConfig, hardware: HardwareConfig) -> str:
    """The reason why a plan is not possible here; "" when it is."""
    if hardware.ranks == 1 and parallel.name == "windows":
        return "it divides windows among devices, and there is one; use single or offload"
    if hardware.ranks == 1 and parallel.name == "fsdp" and not parallel.cpu_offload:
        return "it shares weights between devices, and there is one; use single or offload"
    if parallel.name == "offload" and parallel.offload.kv == "host":
        return "windows of frames have no KV rings to move; leave offload.kv at device"
    if parallel.name == "fsdp" and parallel.unshard_unit not in ("block", "sublayer"):
        return f"parallel.unshard_unit={parallel.unshard_unit}: a UNet is gathered by block or sublayer; use one of them"
    return ""


def whole(work: WindowWorkload, hardware: HardwareConfig, parallel: ParallelConfig) -> Plan:
    """Plan in which a rank holds all weights: one rank alone, or all ranks, each of which evaluates a share of the windows."""
    count = 1 if PLANS[parallel.name].one_rank else hardware.ranks
    ranks = _ranks(work, hardware, count, weights=unet_bytes(work), denoise={"activations": call_bytes(work)})
    weights = work.calls(count) * s.memory_seconds(unet_bytes(work), hardware)
    return _plan(work, parallel, ranks, seconds=_seconds(work, hardware, count, weights=weights))


def sharded(work: WindowWorkload, hardware: HardwareConfig, parallel: ParallelConfig) -> Plan:
    """Plan with the weights sharded over all ranks, each of which evaluates a share of the windows and gathers the parts in turn."""
    count, away = hardware.ranks, parallel.cpu_offload
    piece = unet_bytes(work) / count
    denoise = {"gathered": _gathered(work, parallel, count), "activations": call_bytes(work)}
    ranks = _ranks(work, hardware, count, weights=end_bytes(work) + (0.0 if away else piece), denoise=denoise)
    moved = s.ring_seconds(unet_bytes(work), hardware, count) if count > 1 else 0.0
    moved = work.calls(count) * max(moved, s.host_seconds(piece, hardware) if away else 0.0)
    name = f"fsdp{'+cpu_offload' * away}"
    host = HOST_GIB * GIB + (piece if away else 0.05 * piece)
    return _plan(work, parallel, ranks, name=name, host=host, seconds=_seconds(work, hardware, count, weights=moved))


def _gathered(work: WindowWorkload, parallel: ParallelConfig, shards: int) -> float:
    """Bytes of gathered weights where the activations are largest: of the part that runs twice (gather buffer and unpacked), and of the
    prefetched ones once; with shards on the host also their copies on the device."""
    parts = unit_bytes(work, parallel.unshard_unit)
    copied = 1 + parallel.cpu_offload / shards
    ahead = {place: sum(size for _, size in parts[place + 1 : place + 1 + parallel.prefetch]) for place in range(len(parts))}
    return max((1 + copied) * size + copied * ahead[place] for place, (level, size) in enumerate(parts) if level == 0)


def offloaded(work: WindowWorkload, hardware: HardwareConfig, parallel: ParallelConfig) -> Plan:
    """Plan in which as many parts of the UNet stay on each device as fit; the others wait in host memory, or in their file."""
    count = 1 if PLANS[parallel.name].one_rank else hardware.ranks
    options, sizes = parallel.offload, [size for _, size in sublayer_bytes(work)]
    largest, slots, mapped = max(sizes), options.slots * max(sizes), options.store == "mmap"
    needs = _ranks(work, hardware, count, weights=end_bytes(work) + slots, denoise={"activations": call_bytes(work)})
    room = (hardware.usable_gib - SPARE_GIB) * GIB - max(sum(items.values()) for items in needs[0].values())
    number = min(len(sizes), int(max(0.0, room if options.resident_gib == -1 else options.resident_gib * GIB) // largest))
    stay = sum(sizes[place] for place in resident_layers(len(sizes), number))
    waiting = sum(sizes) - stay
    weights = end_bytes(work) + stay + (slots if waiting else 0)
    ranks = _ranks(work, hardware, count, weights=weights, denoise={"activations": call_bytes(work)})
    rate = hardware.disk_gbps if mapped else hardware.host_gbps
    settled = replace(parallel, offload=replace(options, resident_gib=round(number * largest / GIB + 0.001, 3)))
    where = "their file" if mapped else "host memory"
    name = f"{parallel.name}{'+cpu_offload' * parallel.cpu_offload}{'+mmap' * mapped}"
    seconds = _seconds(work, hardware, count, weights=work.calls(count) * waiting / s.GIGA / rate)
    found = _plan(work, settled, ranks, name=name, host=HOST_GIB * GIB + waiting * (not mapped), seconds=seconds)
    return replace(found, given_up=f"{waiting / GIB:.1f} GiB of weights wait in {where}" if waiting else "")


def _ranks(
    work: WindowWorkload, hardware: HardwareConfig, count: int, *, weights: float, denoise: Mapping[str, float]
) -> tuple[Phases, ...]:
    """Phases of the ranks of a video: all denoise; the first also encodes and decodes."""
    reserve, clip, decoder = hardware.reserve_gib * GIB, clip_bytes(work, count), decoder_bytes(work)
    own = {"weights": weights, **denoise, **clip}
    held = {"latents": 2 * work.frames * work.latent_pixels * LATENT_BYTES, "audio_tokens": clip["audio_tokens"]}
    phases = {
        "encode": first_bytes(work),
        "denoise": {**own, "vae": decoder["vae"]},
        "decode": {"weights": weights, **decoder, **held},
    }
    leader = {phase: {**items, "reserve": reserve} for phase, items in phases.items()}
    return (leader, *[{"denoise": {**own, "reserve": reserve}}] * (count - 1))


def _plan(work: WindowWorkload, parallel: ParallelConfig, ranks: tuple[Phases, ...], *, seconds: Seconds, **more: Any) -> Plan:
    """A plan with its name, host memory and what else `more` has; its times are of the whole video."""
    given = {"name": parallel.name, "host": HOST_GIB * GIB, **more}
    return Plan(parallel=parallel, ranks=ranks, seconds=seconds, frames=work.shown, unit="video", **given)


def _seconds(work: WindowWorkload, hardware: HardwareConfig, ranks: int, *, weights: float) -> Seconds:
    """Times of a video whose windows are divided among ranks that exchange their results after each step; the first one decodes all."""
    own = -(-work.windows // ranks) * work.model.unet.window_frames * work.latent_pixels * LATENT_BYTES
    moved = work.steps * s.ring_seconds(ranks * own, hardware, ranks) if ranks > 1 else 0.0
    rate = hardware.tflops * s.TERA * s.VAE_EFFICIENCY
    seen = DECODE_FLOPS * (work.chunk + 2 * work.overlap) / work.chunk + RIFE_FLOPS * work.doubled
    vae = seen * work.pixels * work.frames / rate
    found = Seconds(work.calls(ranks) * work.call_flops / s.rate(hardware), weights, moved, vae)
    before = ENCODE_FLOPS * work.pixels / rate + IMAGE_FLOPS / s.rate(hardware)
    return replace(found, first=before + found.total - vae + vae * min(1.0, work.chunk / work.frames))


def notes(work: WindowWorkload) -> Iterator[str]:
    """Sentences on the assumptions of the plans."""
    length = f"{work.frames} frames at {work.model.rollout.fps / 2:g} a second are planned, {work.display_s:g} s"
    yield f"{length}; video.duration=SECONDS plans another length, which changes the time, and of the memory latents and tokens alone"
    yield "encoders of picture and sound run first and are gone before the UNet comes; frames are decoded when all windows are denoised"


def fewer_rows(work: WindowWorkload) -> Changed:
    """Changes to guidance with fewer rows: towards picture and sound by one weight, then none; then also fewer frames decoded together."""
    weights = {2: (2, "one guidance weight for picture and sound"), 1: (1, "no guidance")}
    fewer = [
        (sentence, tuple(f"sampler.{name}_guide_scale={weight}" for name in ("sample", "audio")), replace(work, rows=rows))
        for rows, (weight, sentence) in weights.items()
        if rows < work.rows
    ]
    yield from fewer
    for chunk in SHORTER_CHUNKS:
        for sentence, options, changed in fewer:
            for decoding, more, both in _decoded_together(changed, *chunk):
                yield f"{sentence}, and {decoding}", (*options, *more), both


def smaller_chunks(work: WindowWorkload) -> Changed:
    """Changes to fewer frames that are decoded together."""
    for chunk in SHORTER_CHUNKS:
        yield from _decoded_together(work, *chunk)


def _decoded_together(work: WindowWorkload, chunk: int, overlap: int) -> Changed:
    """The change to so many frames decoded together, with so many more on each side, if they are fewer."""
    if chunk + 2 * overlap < work.chunk + 2 * work.overlap:
        sentence = f"{chunk} + {2 * overlap} frames decoded together instead of {work.chunk} + {2 * work.overlap}"
        options = f"decode.chunk_frames={chunk}", f"decode.overlap_frames={overlap}"
        yield sentence, options, replace(work, chunk=chunk, overlap=overlap)


def smaller_sizes(work: WindowWorkload) -> Changed:
    """Changes to a shorter short side, of the same shape."""
    short = min(work.width, work.height)
    for side in range(short - SIDE, SMALLEST - 1, -SIDE):
        width, height = (round(each * side / short / SIDE) * SIDE for each in (work.width, work.height))
        yield f"a short side of {side} instead of {short}", (f"video.min_resolution={side}",), replace(work, width=width, height=height)


CHANGES = (fewer_rows, smaller_chunks, smaller_sizes)
