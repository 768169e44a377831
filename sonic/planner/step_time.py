"""Lower bounds of the time of a plan: operations and bytes divided by the rates of the hardware.

A time is that of a hand-over, the frames that are delivered together: a block of a stream, or a clip. Copying is assumed to overlap
with computing completely, so the larger of the two sums counts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd

from sonic.families import FAMILIES
from sonic.model.counts import injector_multiply_adds, layer_multiply_adds
from sonic.parallel.parallel_config import HardwareConfig
from sonic.planner.workload import Workload

GIGA, TERA = 1e9, 1e12
VAE_FLOPS = 8.47e6  # operations per pixel and frame that the Wan decoder takes (2.29e12 for a frame of 704x384)
VAE_EFFICIENCY = 0.35  # fraction of the nominal TFLOPS that its convolutions reach
PAST_FRAMES, WARM_FRAMES = 73, 25  # frames that are encoded, and decoded, once before the first block
TEXT_FLOPS = 2 * 5.7e9 * 512  # operations of the text encoder for a prompt


@dataclass(frozen=True)
class Seconds:
    """Seconds of a hand-over on the busiest rank, by part; `first` is the delay until the first hand-over is ready."""

    compute: float
    weights: float = 0.0
    activations: float = 0.0
    vae: float = 0.0
    first: float = 0.0

    @property
    def total(self) -> float:
        """Seconds of a hand-over: computing or copying, whichever is longer, and then the autoencoder."""
        return max(self.compute, self.weights + self.activations) + self.vae


def rate(hardware: HardwareConfig) -> float:
    """Operations per second that a transformer reaches."""
    return hardware.tflops * TERA * hardware.efficiency


def forwards(work: Workload) -> int:
    """Number of forwards of the model in a hand-over."""
    return work.steps * work.passes


def compute_seconds(work: Workload, hardware: HardwareConfig) -> float:
    """Seconds of computing of all forwards of a hand-over on one device."""
    return forwards(work) * work.forward_flops / rate(hardware)


def layer_seconds(work: Workload, hardware: HardwareConfig) -> list[float]:
    """Seconds of computing of a hand-over in each layer, without the parts outside the blocks."""
    keys = work.memory + (work.window or work.query_tokens)
    injector = injector_multiply_adds(work.model, work.latent_frames, work.grid)
    plain = layer_multiply_adds(work.model, work.tokens, keys=keys)
    inject = set(work.model.audio.inject_layers)
    scale = 2 * forwards(work) / rate(hardware)
    return [scale * (plain + injector * (layer in inject)) for layer in range(work.model.trunk.num_layers)]


def vae_seconds(work: Workload, hardware: HardwareConfig, frames: int | None = None) -> float:
    """Seconds to decode `frames` frames; by default those of a hand-over."""
    operations = FAMILIES[work.model.family].decode_time * VAE_FLOPS * work.pixels * (work.frames if frames is None else frames)
    return operations / (hardware.tflops * TERA * VAE_EFFICIENCY)


def memory_seconds(size: float, hardware: HardwareConfig) -> float:
    """Seconds to read `size` bytes from device memory."""
    return size / (hardware.memory_gbps * GIGA)


def link_seconds(size: float, hardware: HardwareConfig) -> float:
    """Seconds to send `size` bytes to another device of the same machine."""
    return size / (hardware.link_gbps * GIGA)


def node_seconds(size: float, hardware: HardwareConfig) -> float:
    """Seconds in which a machine sends `size` bytes to another machine."""
    return size / (hardware.node_link_gbps * GIGA)


def hop_seconds(size: float, hardware: HardwareConfig, *, senders: int = 1) -> float:
    """Seconds in which each of `senders` ranks sends `size` bytes to the next stage, which with several machines may be on another one."""
    between = node_seconds(senders * size, hardware) if hardware.nodes > 1 else 0.0
    return max(link_seconds(size, hardware), between)


def ring_seconds(size: float, hardware: HardwareConfig, ranks: int) -> float:
    """Seconds in which `ranks` neighbours gather, or reduce and scatter, `size` bytes in a ring, also from machine to machine."""
    moved = size * (ranks - 1) / ranks
    return max(link_seconds(moved, hardware), node_seconds(moved, hardware) if hardware.devices % ranks else 0.0)


def host_seconds(size: float, hardware: HardwareConfig) -> float:
    """Seconds to copy `size` bytes from host memory."""
    return size / (hardware.host_gbps * GIGA)


def exchange_seconds(work: Workload, hardware: HardwareConfig, ranks: int) -> float:
    """Seconds of the Ulysses all-to-all exchanges: queries, keys, values and attention outputs in every layer."""
    return all_to_all_seconds(4 * forwards(work) * work.model.trunk.num_layers * work.activation_bytes / ranks, hardware, ranks)


def all_to_all_seconds(size: float, hardware: HardwareConfig, ranks: int) -> float:
    """Seconds in which each of `ranks` neighbours divides `size` bytes among all of them."""
    near = gcd(ranks, hardware.devices)  # that surely are in the same machine
    leaving = hardware.devices * size * (ranks - near) / ranks
    return max(link_seconds(size * (ranks - 1) / ranks, hardware), node_seconds(leaving, hardware))


def before_seconds(work: Workload, hardware: HardwareConfig) -> float:
    """Seconds before the first block: encode prompt and motion frames, prefill the KV caches, warm up the decoder."""
    published = FAMILIES[work.model.family].decode_time
    text = published * TEXT_FLOPS / rate(hardware)
    prefill = work.passes * 2 * work.model.trunk.num_layers * layer_multiply_adds(work.model, work.memory, keys=work.memory)
    past = vae_seconds(work, hardware, PAST_FRAMES + WARM_FRAMES)
    return text + past + (0 if work.clip_frames else prefill / rate(hardware))


def with_decoding(work: Workload, hardware: HardwareConfig, seconds: Seconds) -> Seconds:
    """The times of a plan in which all ranks work on the same hand-over, which is decoded after its denoising."""
    found = replace(seconds, vae=vae_seconds(work, hardware))
    return replace(found, first=before_seconds(work, hardware) + found.total)
