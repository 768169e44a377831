"""The size of a model and the arithmetic of its forward, counted from its config: weights, tokens, multiply-adds. No tensors."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from sonic.config import ModelConfig
from sonic.geometry import FRAMES_PER_LATENT

Grid = tuple[int, int]  # rows and columns of patches
WIDENED = 1 << 24  # weights that a GPU converts to float32 at a time, 64 MiB: few enough to need no memory that activations do not have
PACK_SCALES = (1, 2, 4)  # factors by which the patches of each FramePack bucket are larger, newest bucket first


def block_weights(config: ModelConfig) -> Mapping[str, int]:
    """Number of weights in each part of one block."""
    dim, ffn = config.trunk.hidden_dim, config.trunk.ffn_dim
    return {
        "self_attention": _attention(dim),
        "text_attention": _attention(dim),
        "mlp_in": _linear(dim, ffn),
        "mlp_out": _linear(ffn, dim),
        "rest": 8 * dim,  # modulation, and the norm before text attention
    }


def injector_weights(config: ModelConfig) -> Mapping[str, int]:
    """Number of weights in each part of one audio injector."""
    dim = config.trunk.hidden_dim
    return {"attention": _attention(dim), "modulation": _linear(dim, 2 * dim)}


def end_weights(config: ModelConfig) -> Mapping[str, int]:
    """Number of weights in each part before the first block and after the last one."""
    trunk, audio, text = config.trunk, config.audio, config.text
    dim, patch = trunk.hidden_dim, _patch(config)
    quarter, half = dim // 4, dim // 2
    convolutions = ((audio.audio_dim, quarter * audio.num_audio_token), (audio.audio_dim, quarter), (quarter, half), (half, dim))
    scales = PACK_SCALES[: len(config.motion.buckets)]
    return {
        "patch_embed": _linear(patch, dim),
        "pose_embed": _linear(patch, dim),
        "frame_pack": sum(_linear(patch * scale**3, dim) for scale in scales),
        "roles": 3 * dim,
        "time_embed": _linear(trunk.freq_dim, dim) + _linear(dim, dim) + _linear(dim, 6 * dim),
        "text_embed": _linear(text.text_dim, dim) + _linear(dim, dim),
        "audio_encoder": audio.num_audio_layers + sum(_linear(3 * a, b) for a, b in convolutions) + _linear(dim, dim) + dim,
        "head": 2 * dim + _linear(dim, patch),
    }


def weights(config: ModelConfig) -> int:
    """Number of weights in the whole transformer."""
    blocks = config.trunk.num_layers * sum(block_weights(config).values())
    injectors = len(config.audio.inject_layers) * sum(injector_weights(config).values())
    return blocks + injectors + sum(end_weights(config).values())


def memory_tokens(config: ModelConfig, grid: Grid, *, motion: bool) -> int:
    """Tokens of the reference, and of the motion memory when there is one."""
    return prod(grid) + (sum(packed_tokens(config, grid)) if motion else 0)


def packed_tokens(config: ModelConfig, grid: Grid) -> list[int]:
    """Tokens of the motion memory in each bucket."""
    scales = zip(config.motion.buckets, PACK_SCALES, strict=False)
    return [(bucket // scale) * (grid[0] // scale) * (grid[1] // scale) for bucket, scale in scales]


def forward_multiply_adds(config: ModelConfig, latent_frames: int, grid: Grid, *, motion: bool = False) -> int:
    """Multiply-adds of `AvatarDiT.forward` on one clip with pose and audio; norms and activations are not counted."""
    noisy, memory = latent_frames * prod(grid), memory_tokens(config, grid, motion=motion)
    text, dim = config.text, config.trunk.hidden_dim
    layers = config.trunk.num_layers * (layer_multiply_adds(config, noisy + memory, keys=noisy + memory) + 2 * text.text_len * dim**2)
    embedding = text.text_len * dim * (text.text_dim + dim) + _time(config, levels=2) + _memory_embedding(config, grid, motion=motion)
    audio = _audio(config, latent_frames) + injector_multiply_adds(config, latent_frames, grid) * len(config.audio.inject_layers)
    return 3 * noisy * _embed(config) + embedding + layers + audio  # embedding of latents, embedding of pose, head


def block_multiply_adds(config: ModelConfig, grid: Grid, *, blocks: int, motion: bool = False) -> int:
    """Multiply-adds of one `denoise_block` with `blocks` blocks in its ring, the new one included."""
    frames = config.rollout.block_frames
    noisy = frames * prod(grid)
    keys = memory_tokens(config, grid, motion=motion) + blocks * noisy
    layers = config.trunk.num_layers * layer_multiply_adds(config, noisy, keys=keys)
    injectors = injector_multiply_adds(config, frames, grid) * len(config.audio.inject_layers)
    return 2 * noisy * _embed(config) + _time(config, levels=1) + layers + injectors


def layer_multiply_adds(config: ModelConfig, tokens: int, *, keys: int) -> int:
    """Multiply-adds of one block on `tokens` tokens that attend to `keys` keys, without projecting the prompt's keys and values."""
    dim = config.trunk.hidden_dim
    projections = 6 * tokens * dim**2  # self q, k, v, out; text q, out
    return projections + 2 * tokens * dim * (keys + config.text.text_len) + 2 * tokens * dim * config.trunk.ffn_dim


def injector_multiply_adds(config: ModelConfig, frames: int, grid: Grid) -> int:
    """Multiply-adds of one audio injector on `frames` latent frames."""
    dim, audio_tokens = config.trunk.hidden_dim, config.audio.num_audio_token + 1
    noisy = frames * prod(grid)
    return 2 * noisy * dim**2 + 2 * frames * audio_tokens * dim**2 + 2 * noisy * audio_tokens * dim + 2 * frames * dim**2


def _linear(inner: int, outer: int) -> int:
    return inner * outer + outer


def _attention(dim: int) -> int:
    """Weights of four projections and two norms."""
    return 4 * _linear(dim, dim) + 2 * dim


def _patch(config: ModelConfig) -> int:
    """Latent values in one patch."""
    return config.trunk.latent_channels * prod(config.trunk.patch_size)


def _embed(config: ModelConfig) -> int:
    """Multiply-adds of embedding one patch, or of projecting a token back to one."""
    return _patch(config) * config.trunk.hidden_dim


def _audio(config: ModelConfig, frames: int) -> int:
    """Multiply-adds of the audio encoder on one clip, the one repeated column in front included."""
    dim, audio = config.trunk.hidden_dim, config.audio
    columns = [1 + FRAMES_PER_LATENT * frames]
    columns += [-(-columns[-1] // 2)]
    columns += [-(-columns[-1] // 2)]
    branches = audio.num_audio_token + 1
    first = columns[0] * 3 * audio.audio_dim * branches * (dim // 4)
    shrink = branches * 3 * (columns[1] * (dim // 4) * (dim // 2) + columns[2] * (dim // 2) * dim)
    return first + shrink + columns[2] * dim**2


def _time(config: ModelConfig, *, levels: int) -> int:
    dim = config.trunk.hidden_dim
    return levels * (config.trunk.freq_dim * dim + 7 * dim**2)


def _memory_embedding(config: ModelConfig, grid: Grid, *, motion: bool) -> int:
    packed = 0
    if motion:
        packed = sum(tokens * scale**3 for tokens, scale in zip(packed_tokens(config, grid), PACK_SCALES, strict=False))
    return (prod(grid) + packed) * _embed(config)
