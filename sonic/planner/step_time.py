"""The least time that a plan can take: operations and bytes of a hand-over (a block of a stream, or a clip) over the machine's rates.

Copying hides behind computing as far as it can; what is left is the largest of the sums.
"""

from __future__ import annotations

from dataclasses import dataclass

from sonic.model.counts import injector_multiply_adds, layer_multiply_adds
from sonic.parallel.parallel_config import HardwareConfig
from sonic.planner.memory import model_bytes, ring_bytes
from sonic.planner.workload import Workload

GIGA, TERA = 1e9, 1e12
VAE_FLOPS = 8.47e6  # operations per pixel and frame that the Wan decoder takes (2.29e12 for a frame of 704x384)
VAE_EFFICIENCY = 0.35  # share of the paper rate that its convolutions reach
VAE_SHARE = {"wan": 1.0, "warp": 0.002}
PAST_FRAMES, WARM_FRAMES = 73, 25  # encoded and decoded once, before the first block
TEXT_FLOPS = 2 * 5.7e9 * 512  # of the prompt's encoder


@dataclass(frozen=True)
class Seconds:
    """Parts of the time of a hand-over on the busiest rank; `first` is the time until the first of it is seen."""

    compute: float
    weights: float = 0.0
    activations: float = 0.0
    vae: float = 0.0
    first: float = 0.0

    @property
    def total(self) -> float:
        """Computing, or what moves if that takes longer; then the autoencoder."""
        return max(self.compute, self.weights + self.activations) + self.vae


def rate(hardware: HardwareConfig) -> float:
    """Operations a second that a transformer reaches."""
    return hardware.tflops * TERA * hardware.efficiency


def forwards(work: Workload) -> int:
    """Forwards in a hand-over."""
    return work.steps * work.passes


def compute_seconds(work: Workload, hardware: HardwareConfig) -> float:
    """All forwards of a hand-over on one device."""
    return forwards(work) * work.forward_flops / rate(hardware)


def layer_seconds(work: Workload, hardware: HardwareConfig) -> list[float]:
    """The same, layer by layer, without what lies outside the blocks."""
    keys = work.memory + (work.window or work.noisy)
    heard = injector_multiply_adds(work.model, work.latent_frames, work.grid)
    plain = layer_multiply_adds(work.model, work.tokens, keys=keys)
    inject = set(work.model.audio.inject_layers)
    scale = 2 * forwards(work) / rate(hardware)
    return [scale * (plain + heard * (layer in inject)) for layer in range(work.model.trunk.num_layers)]


def vae_seconds(work: Workload, hardware: HardwareConfig, frames: int | None = None) -> float:
    """Decoding a hand-over, or so many frames."""
    operations = VAE_SHARE[work.model.autoencoder] * VAE_FLOPS * work.pixels * (work.frames if frames is None else frames)
    return operations / (hardware.tflops * TERA * VAE_EFFICIENCY)


def read_seconds(work: Workload, hardware: HardwareConfig, *, share: float = 1.0) -> tuple[float, float]:
    """Reading the weights and the rings from device memory, once per forward; `share` of them lie on this device."""
    rings = work.model.trunk.num_layers * ring_bytes(work)  # all steps' rings together are read once per hand-over
    once = forwards(work) * model_bytes(work)
    return (share * size / (hardware.memory_gbps * GIGA) for size in (once, rings))


def link_seconds(size: float, hardware: HardwareConfig) -> float:
    """Moving bytes to another device."""
    return size / (hardware.link_gbps * GIGA)


def host_seconds(size: float, hardware: HardwareConfig) -> float:
    """Moving bytes from host memory."""
    return size / (hardware.host_gbps * GIGA)


def exchange_seconds(work: Workload, hardware: HardwareConfig, ranks: int) -> float:
    """Ulysses: queries, keys, values and what was heard change hands in every layer."""
    if ranks == 1:
        return 0.0
    each = 4 * work.stream / ranks * (ranks - 1) / ranks
    return link_seconds(forwards(work) * work.model.trunk.num_layers * each, hardware)


def before_seconds(work: Workload, hardware: HardwareConfig) -> float:
    """Encoding the prompt and the past, prefilling the memory, warming the decoder up."""
    published = VAE_SHARE[work.model.autoencoder]
    text = published * TEXT_FLOPS / rate(hardware)
    prefill = work.passes * 2 * work.model.trunk.num_layers * layer_multiply_adds(work.model, work.memory, keys=work.memory)
    past = vae_seconds(work, hardware, PAST_FRAMES + WARM_FRAMES)
    return text + past + (0 if work.clip_frames else prefill / rate(hardware))
