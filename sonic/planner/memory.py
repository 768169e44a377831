"""How many bytes a rank needs, item by item, from the config alone. Counted as this code runs, not as it might."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from sonic.geometry import FRAMES_PER_LATENT, GIB
from sonic.model.counts import block_weights, end_weights, injector_weights, weights
from sonic.parallel.parallel_config import HardwareConfig, ParallelConfig
from sonic.parallel.shard_units import WHOLE, all_units
from sonic.planner.workload import Workload

GENERATE = ("weights", "unshard_prefetch", "kv_rings", "memory_tokens", "activations", "vae", "reserve")
ENCODE = ("text_encoder", "speech_encoder", "reserve")

Items = Mapping[str, float]  # bytes by item
Phases = Mapping[str, Items]  # of a rank, one after the other

VAE_NUMBERS = {"wan": 126_892_531, "warp": 1_686_264}
TEXT_NUMBERS = {4096: 5_680_910_336}  # umT5-xxl's encoder, by the width of its rows; other models read no text
SPEECH_NUMBERS = {"wav2vec2": 315_438_720, "logmel": 1_317_440}
PAST_LATENTS = 19  # decoded in front of every clip, and thrown away
VAE_CACHE = {"wan": 2366, "warp": 8}  # numbers per pixel that the decoder keeps from one latent to the next
VAE_WORKSPACE = {"wan": 5085, "warp": 400}  # numbers per pixel while it decodes one latent, the new memory included
COPIES = {"attention": 12, "mlp": 5, "other": 8}  # of the stream that are alive at once; rotations are made in float32
CLIP_COPIES = 2  # more where the parts of a clip are put together and its keys are not in a ring
HOST_GIB = 2.5  # of a process by itself: Python, torch, drivers


def block_bytes(work: Workload) -> float:
    """Weights of one block."""
    return sum(block_weights(work.model).values()) * work.dtype_bytes


def layer_bytes(work: Workload, layers: range) -> float:
    """Weights of some blocks with their injectors."""
    injectors = sum(layer in layers for layer in work.model.audio.inject_layers)
    return len(layers) * block_bytes(work) + injectors * sum(injector_weights(work.model).values()) * work.dtype_bytes


def end_bytes(work: Workload) -> float:
    """Weights outside the blocks."""
    return sum(end_weights(work.model).values()) * work.dtype_bytes


def model_bytes(work: Workload) -> float:
    """Weights of the transformer."""
    return weights(work.model) * work.dtype_bytes


def whole_bytes(work: Workload) -> float:
    """Weights that fsdp leaves whole on every device, because no unit gathers them."""
    return sum(end_weights(work.model)[name] for name in WHOLE) * work.dtype_bytes


def slice_bytes(work: Workload, shards: int) -> float:
    """A rank's part of all other weights; in host memory under cpu_offload."""
    return (model_bytes(work) - whole_bytes(work)) / shards


def ring_bytes(work: Workload) -> float:
    """What one layer remembers of the video: keys and values, a ring for each sampling step."""
    return work.passes * work.steps * 2 * work.window * work.token_bytes


def memory_bytes(work: Workload) -> float:
    """What one layer keeps of reference, past and prompt: once for two rings, the reference's keys once more unrotated."""
    if work.clip_frames:
        return 0
    copies = -(-work.steps // 2)
    return work.passes * (2 * copies * work.memory + prod(work.grid) + 2 * work.model.text.text_len) * work.token_bytes


def activation_bytes(work: Workload, *, share: int = 1) -> dict[str, float]:
    """What a forward needs besides weights and memories, by moment; `share` ranks share the tokens.

    Attention rotates in float32, the MLP has its hidden layer twice, and before the blocks the noise level's projection is
    widened to float32, a sixth at a time.
    """
    trunk = work.model.trunk
    activations = work.activation_bytes / share
    rotations = work.tokens / share * 3 * 4 * trunk.hidden_dim / trunk.num_heads
    more = CLIP_COPIES if work.clip_frames else 0
    widened = 4 * trunk.hidden_dim**2 if work.dtype_bytes == 2 else 0
    other = (COPIES["other"] + more) * activations + rotations
    return {
        "ends": activations + widened,
        "attention": (COPIES["attention"] + more) * activations + rotations,
        "text": other,
        "prompt": other,
        "mlp": (COPIES["mlp"] + more + 2 * trunk.ffn_dim / trunk.hidden_dim) * activations + rotations,
        "injector": other,
    }


def gathered_bytes(work: Workload, parallel: ParallelConfig, shards: int) -> dict[str, float]:
    """Bytes of all-gathered parameters per phase: the current unit twice (gather buffer and unpacked), prefetched units once;
    under cpu_offload also the slices copied from host memory."""
    found: dict[str, float] = {}
    for unit in all_units(work.model, parallel.unshard_unit):
        found[unit.phase] = max(found.get(unit.phase, 0), unit.numbers * work.dtype_bytes)
    ahead = parallel.prefetch * max(size for phase, size in found.items() if phase != "ends")
    copied = 1 / shards if parallel.cpu_offload else 0.0
    return {phase: (2 + copied) * size + (1 + copied) * ahead * (phase != "ends") for phase, size in found.items()}


def vae_bytes(work: Workload, *, idle: float = 0) -> float:
    """The autoencoder with what it remembers and works in. A stream decodes while later blocks are denoised; a clip
    afterwards, in the `idle` bytes that its denoising needed, and keeps all its frames; it is decoded in float32."""
    name = work.model.autoencoder
    working = VAE_WORKSPACE[name] * work.pixels
    if work.clip_frames:
        frames = 3 * work.pixels * (work.clip_frames + FRAMES_PER_LATENT * PAST_LATENTS)
        return VAE_NUMBERS[name] * 4 + max(0, (working + frames) * 4 - idle)
    return (VAE_NUMBERS[name] + VAE_CACHE[name] * work.pixels + working) * work.dtype_bytes


def frame_bytes(work: Workload) -> float:
    """The frames of a hand-over on their way from an autoencoder on another rank; those of a clip are in float32."""
    return 3 * work.pixels * work.frames * (4 if work.clip_frames else work.dtype_bytes)


def encoder_bytes(work: Workload) -> dict[str, float]:
    """The encoders of text and speech, which are gone before the transformer's weights come; whatever run.dtype is, the prompt's
    runs in bfloat16, in which a converted checkpoint has it, and that of speech in float32."""
    text = TEXT_NUMBERS.get(work.model.text.text_dim, 0) * 2
    return {"text_encoder": text, "speech_encoder": SPEECH_NUMBERS[work.model.speech_encoder] * 4}


def video_phases(hardware: HardwareConfig, *, first: Items | None = None, **generation: float) -> Phases:
    """All items of a rank in both phases of a video, those not given at nothing: encoders first, the video afterwards."""
    given = {**generation, **(first or {}), "reserve": hardware.reserve_gib * GIB}
    return {phase: {item: given.get(item, 0.0) for item in items} for phase, items in (("encode", ENCODE), ("generate", GENERATE))}


def with_more(rank: Phases, **items: float) -> Phases:
    """The same with so many bytes more of some items of the video."""
    return {**rank, "generate": {item: size + items.get(item, 0.0) for item, size in rank["generate"].items()}}


def union(rank: Phases) -> dict[str, float]:
    """Every item of a rank once, as it is in the fullest phase that has it."""
    return {item: size for items in sorted(rank.values(), key=lambda items: sum(items.values())) for item, size in items.items()}


def peak(rank: Phases) -> float:
    """What the fullest phase takes."""
    return max(sum(items.values()) for items in rank.values())
