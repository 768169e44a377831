"""Predicts the bytes that a rank needs for a video, item by item, from the config alone. It models how this implementation runs."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from sonic.families import FAMILIES
from sonic.geometry import FRAMES_PER_LATENT, GIB
from sonic.model.counts import WIDENED, block_weights, end_weights, injector_weights, weights
from sonic.parallel.parallel_config import HardwareConfig, ParallelConfig
from sonic.parallel.shard_units import WHOLE, all_units
from sonic.planner.workload import Workload

GENERATE = ("weights", "unshard_prefetch", "kv_rings", "memory_tokens", "activations", "vae", "reserve")
ENCODE = ("text_encoder", "speech_encoder", "reserve")

Items = Mapping[str, float]  # bytes by item
Phases = Mapping[str, Items]  # items of a rank in each phase; phases follow each other

TEXT_NUMBERS = {4096: 5_680_910_336}  # parameters of umT5-xxl's encoder, by the width of its outputs; other models have no text encoder
# parameters of the published sizes that Wan2.2-S2V reads: wav2vec2-large, hubert-large and whisper-medium
SPEECH_NUMBERS = {"logmel": 1_317_440, "wav2vec2": 315_438_720, "hubert": 315_438_720, "whisper": 307_216_384}
PAST_LATENTS = 19  # latent frames decoded in front of every clip and discarded
COPIES = {"attention": 12, "mlp": 5, "other": 8}  # copies of the activations alive at once; rotary embeddings and the stream are float32
EXCHANGE_COPIES = 7  # additional copies in attention when ranks exchange tokens for heads
CLIP_COPIES = 2  # additional copies for a clip: its parts are concatenated, and its keys are not in a KV ring
HOST_GIB = 2.5  # GiB of host memory that Python, torch and drivers take in a process


def layer_bytes(work: Workload, layers: range) -> float:
    """Bytes of the weights of these blocks and their audio injectors."""
    injectors = sum(layer in layers for layer in work.model.audio.inject_layers)
    numbers = len(layers) * sum(block_weights(work.model).values()) + injectors * sum(injector_weights(work.model).values())
    return numbers * work.dtype_bytes


def end_bytes(work: Workload) -> float:
    """Bytes of the weights outside the blocks and audio injectors."""
    return sum(end_weights(work.model).values()) * work.dtype_bytes


def model_bytes(work: Workload) -> float:
    """Bytes of all weights of the transformer."""
    return weights(work.model) * work.dtype_bytes


def whole_bytes(work: Workload) -> float:
    """Bytes of the weights that FSDP does not shard, because they are in no unit."""
    return sum(end_weights(work.model)[name] for name in WHOLE) * work.dtype_bytes


def slice_bytes(work: Workload, shards: int) -> float:
    """Bytes of a rank's shards of all other weights; they are in host memory under cpu_offload."""
    return (model_bytes(work) - whole_bytes(work)) / shards


def ring_bytes(work: Workload) -> float:
    """Bytes of one layer's KV rings: keys and values of the video, one ring for each sampling step and guidance pass."""
    return work.passes * work.steps * 2 * work.window * work.token_bytes


def memory_bytes(work: Workload) -> float:
    """Bytes of one layer's keys and values of reference, motion and prompt; 0 for clips.

    Two rings share a copy of those of reference and motion; the reference's keys are also stored before rotary embedding."""
    if work.clip_frames:
        return 0
    copies = -(-work.steps // 2)
    return work.passes * (2 * copies * work.memory + prod(work.grid)) * work.token_bytes + prompt_bytes(work)


def prompt_bytes(work: Workload) -> float:
    """Bytes of one layer's keys and values of the prompt."""
    return work.passes * 2 * work.model.text.text_len * work.token_bytes


def activation_bytes(work: Workload, *, share: int = 1) -> dict[str, float]:
    """Bytes of activations by phase of a forward, without weights and KV caches; `share` ranks divide the tokens.

    Attention applies rotary embeddings in float32, the MLP's hidden layer exists once, before the blocks the projection of the
    time embedding is converted to float32 in parts, and after them the head normalises the float32 tokens.
    """
    trunk = work.model.trunk
    activations = work.activation_bytes / share
    rotations = work.tokens / share * 4 * trunk.hidden_dim / trunk.num_heads
    more = CLIP_COPIES if work.clip_frames else 0
    widened = 4 * min(WIDENED, 6 * trunk.hidden_dim**2) if work.dtype_bytes == 2 else 0
    embedded = (1 - 1 / share) * work.query_tokens * work.token_bytes if work.clip_frames else 0.0  # each rank embeds all of a clip
    other = (COPIES["other"] + more) * activations + rotations + embedded
    return {
        "ends": max(activations + widened, 2 * work.stream_bytes / share) + embedded,
        "attention": (COPIES["attention"] + more + EXCHANGE_COPIES * (share > 1)) * activations + rotations + embedded,
        "text": other,
        "prompt": other,
        "mlp": (COPIES["mlp"] + more + trunk.ffn_dim / trunk.hidden_dim) * activations + rotations + embedded,
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
    """Bytes of the autoencoder: weights, cache and workspace.

    A stream is decoded while later blocks are denoised. A clip is decoded in float32 after its denoising, reusing the `idle` bytes that
    the denoising needed, and all its frames are held."""
    family = FAMILIES[work.model.family]
    working = family.workspace * work.pixels
    if work.clip_frames:
        frames = 3 * work.pixels * (work.clip_frames + FRAMES_PER_LATENT * PAST_LATENTS)
        return family.parameters * 4 + max(0, (working + frames) * 4 - idle)
    return (family.parameters + family.cache * work.pixels + working) * work.dtype_bytes


def frame_bytes(work: Workload) -> float:
    """Bytes of the message with the frames of a block or clip from an autoencoder on another rank; frames of a clip are float32."""
    return 3 * work.pixels * work.frames * (4 if work.clip_frames else work.dtype_bytes)


def encoder_bytes(work: Workload) -> dict[str, float]:
    """Bytes of the weights of the text and speech encoders, which are freed before the transformer is loaded.

    For any run.dtype the text encoder runs in bfloat16, its precision in a converted checkpoint, and the speech encoder in float32."""
    text = TEXT_NUMBERS.get(work.model.text.text_dim, 0) * 2
    return {"text_encoder": text, "speech_encoder": SPEECH_NUMBERS.get(work.model.speech_encoder, 0) * 4}


def video_phases(hardware: HardwareConfig, *, first: Items | None = None, **generation: float) -> Phases:
    """Bytes of all items of a rank in the phases "encode" (from `first`) and "generate"; items not given are 0."""
    given = {**generation, **(first or {}), "reserve": hardware.reserve_gib * GIB}
    return {phase: {item: given.get(item, 0.0) for item in items} for phase, items in (("encode", ENCODE), ("generate", GENERATE))}


def with_more(rank: Phases, **items: float) -> Phases:
    """The same phases with `items` bytes added in the phase "generate"."""
    return {**rank, "generate": {item: size + items.get(item, 0.0) for item, size in rank["generate"].items()}}


def union(rank: Phases) -> dict[str, float]:
    """Bytes of every item of a rank; an item of several phases has its value in the largest of these phases."""
    return {item: size for items in sorted(rank.values(), key=lambda items: sum(items.values())) for item, size in items.items()}


def peak(rank: Phases) -> float:
    """Bytes of the largest phase of a rank."""
    return max(sum(items.values()) for items in rank.values())
