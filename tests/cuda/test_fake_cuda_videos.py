"""Every way of making a video runs on a (fake) CUDA device, without a tensor on the wrong one, and without a wait of the host for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch
from fake_cuda import CUDA, Record, fake_cuda_mode, on_cuda
from infer_command import babble
from run_files import save_weights
from safetensors.torch import save_file

from sonic.checkpoint.lora import read_lora
from sonic.cli import compose
from sonic.commands.infer_command import ENTRY as INFER
from sonic.config import AdapterConfig, ModelConfig, SamplerConfig
from sonic.data.live_audio import LiveAudio
from sonic.encoders.logmel import LogMelEncoder
from sonic.encoders.speech_encoder import SpeechEncoder
from sonic.encoders.wav2vec import Wav2VecEncoder
from sonic.geometry import FRAMES_PER_LATENT, plan_blocks
from sonic.inference.generate_wan import EncodedInputs, WanNetworks, generate_blocks, generate_blocks_upstream, generate_clips, unmeasured
from sonic.inference.live_features import LiveFeatures
from sonic.inference.rollout import NoiseSource, Sampling, rollout, seeded
from sonic.inference.stream import decode_motion, with_events
from sonic.model.adapters import Adapters
from sonic.model.dit import AvatarDiT
from sonic.model.embed import rotate
from sonic.model.execution import LOCAL, Execution
from sonic.parallel.context import DistributedContext
from sonic.parallel.host_rings import HostRings
from sonic.parallel.mesh import World
from sonic.parallel.parallel_config import OffloadConfig, ParallelConfig
from sonic.parallel.parallelize import build_parallel_model
from sonic.sampling.samplers import SAMPLERS
from sonic.types import Conditions
from sonic.vae.motion_vae import WarpAutoencoder
from sonic.vae.wan_vae import WanAutoencoder

BLOCKS, CLIPS, PREVIEW = "live_avatar_14b", "wan_s2v_14b", "preview"
SIDE = 64  # pixels; larger sizes take the same paths
SMALL_VAE = {"base_dim": 8, "num_res_blocks": 1}
SPEECH = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "conv_dim": [8] * 7, "conv_bias": True,
    "feat_extract_norm": "layer", "do_stable_layer_norm": True, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Video:
    """One way of making a video: the model, the sampler, and what else the path of the code depends on.

    `lora` is the folder of weights and an adapter that are loaded together, or "beside" for an adapter that is computed separately.
    """

    model: str
    sampler: str = "euler"
    guide: float = 1.0
    voices: int = 0
    pose: bool = False
    lora: str = ""
    kv: str = "device"
    inflight: int = 1
    upstream: bool = False
    live: bool = False

    def __str__(self) -> str:
        changed = [f"{name}={value}" for name, value in vars(self).items() if value != getattr(Video, name, None)]
        return " ".join(word.removeprefix("model=").removesuffix("=True") for word in changed)


@dataclass(frozen=True)
class Chunk:
    """A block or clip as it was made: shape, dtype and device of its frames, and what it asked of the device."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str
    record: Record


def chunks_of(video: Video, number: int = 2) -> list[Chunk]:
    """The first chunks of a video."""
    found = []
    with ExitStack() as stack:
        record = stack.enter_context(fake_cuda_mode())
        stack.enter_context(torch.no_grad())
        stack.enter_context(patch("sonic.inference.generate_wan.PAST_FRAMES", 5))
        generate = preview_frames if video.model == PREVIEW else wan_frames
        chunks = generate(video, stack, number)
        record.clear()  # of the weights being loaded
        for frames in islice(chunks, number):
            found.append(Chunk(tuple(frames.shape), frames.dtype, str(frames.device), Record(*(type(p)(p) for p in vars(record).values()))))
            record.clear()
    return found


def devices_of_rotations(video: Video) -> set[str]:
    """Kinds of device on which a video rotates keys and queries by their positions."""
    spy = Mock(wraps=rotate)
    with patch("sonic.model.kv_cache.rotate", spy), patch("sonic.parallel.host_rings.rotate", spy):
        chunks_of(video)
    return {place.type for heads, turns in (call.args for call in spy.call_args_list) for place in (heads.device, turns.device)}


def wan_frames(video: Video, stack: ExitStack, number: int) -> Iterator[torch.Tensor]:
    """The frames of a video by a published model, whose layers are few and whose autoencoder is small."""
    config, streams = model_config(video), video.model == BLOCKS
    clip_frames = FRAMES_PER_LATENT * config.rollout.block_frames
    voices, frames, context = max(1, video.voices), number * clip_frames, context_of(video)
    with torch.device("meta"):
        vae = WanAutoencoder(SMALL_VAE)
    networks = WanNetworks(transformer(video, config, context, stack), on_cuda(vae, torch.bfloat16 if streams else None).eval(), context)
    text = torch.empty(1, config.text.text_len, config.text.text_dim, device=CUDA)
    encoded = EncodedInputs(
        torch.empty(1, 3, SIDE, SIDE, device=CUDA), text, text,
        torch.zeros(voices, config.audio.num_audio_layers, config.audio.audio_dim, frames), clip_frames,
        pose=np.zeros((frames, SIDE, SIDE, 3), np.uint8) if video.pose else None,
        masks=torch.empty(voices, 1, SIDE // 16, SIDE // 16, device=CUDA) if video.voices else None,
        live=live_features(Wav2VecEncoder(SPEECH)) if video.live else None,
    )  # fmt: skip
    settings: dict[str, Any] = {"sampler": sampler_config(video), "on_step": lambda *step: None}
    if not streams:
        return generate_clips(networks, encoded, upstream=video.upstream, **settings)
    return (generate_blocks_upstream if video.upstream else generate_blocks)(networks, encoded, **settings)


def preview_frames(video: Video, stack: ExitStack, number: int) -> Iterator[torch.Tensor]:
    """The displacements of a video by the preview, which the photograph is drawn with on the CPU."""
    config, context = model_config(video), context_of(video)
    model = transformer(video, config, context, stack)
    with torch.device("meta"):
        autoencoder = WarpAutoencoder().requires_grad_(False)
    reference = on_cuda(autoencoder).reference(torch.empty(1, 3, config.resolution, config.resolution, device=CUDA))
    text = torch.zeros(1, config.text.text_len, config.text.text_dim, device=CUDA)
    conditions, frames = Conditions(reference.latents, text), number * FRAMES_PER_LATENT * config.rollout.block_frames
    if video.live:
        live = live_features(LogMelEncoder())
        conditions, spans = live.conditions(conditions), live.spans(config.rollout.block_frames)
    else:
        audio = torch.zeros(1, config.audio.num_audio_layers, config.audio.audio_dim, frames)
        conditions, spans = replace(conditions, audio=audio), plan_blocks(frames, config.rollout.block_frames)
    sampling = Sampling(sampler_config(video), NoiseSource(seeded(0)), on_step=lambda *step: None)
    blocks = rollout(model, conditions, spans, sampling=sampling, context=context)
    timer = SimpleNamespace(stage=unmeasured)
    layers = decode_motion(with_events(blocks), lambda start, count: count, autoencoder=autoencoder, reference=reference, timer=timer)
    return (each.flow for each in layers)


def model_config(video: Video, layers: int = 2) -> ModelConfig:
    """The config of the model, with few layers and a reference whose time id changes from the second block on."""
    found = compose(INFER, [f"model={video.model}"]).model
    found = replace(found, trunk=replace(found.trunk, num_layers=layers), audio=replace(found.audio, inject_layers=[0, layers - 1]))
    found = replace(found, rollout=replace(found.rollout, ref_distance=found.rollout.ref_position))
    if video.lora not in ("", "beside"):  # its weights are on the disk
        found = replace(found, trunk=replace(found.trunk, hidden_dim=24, ffn_dim=32, num_heads=2))
    if video.live and video.model == BLOCKS:
        found = replace(found, audio=replace(found.audio, num_audio_layers=3, audio_dim=SPEECH["hidden_size"]))
    return found


def transformer(video: Video, config: ModelConfig, context: DistributedContext, stack: ExitStack) -> AvatarDiT:
    """The transformer on the device, in bfloat16, with its adapters."""
    if video.lora not in ("", "beside"):
        weights, lora = Path(video.lora, "weights.safetensors"), read_lora(Path(video.lora, "lora.safetensors"))
        return build_parallel_model(config, weights, context, lora=lora, dtype=torch.bfloat16)
    with torch.device("meta"):
        model = AvatarDiT(config)
        adapters = Adapters(model, ["student"], AdapterConfig(rank=4, targets=["self_attention"])) if video.lora else None
    if adapters:
        stack.enter_context(adapters.use_role("student"))
    return on_cuda(model, torch.bfloat16).eval()


def context_of(video: Video) -> DistributedContext:
    """The context of one process that has the KV rings where the video wants them, and as many forwards at a time."""
    rings = HostRings(CUDA)
    host = Execution(run_blocks=rings.run_blocks, cache_device=torch.device("cpu"), windows=rings)
    plan, options = "offload" if video.inflight > 1 else "single", OffloadConfig(inflight=video.inflight)
    return DistributedContext(World(plan, CUDA), ParallelConfig(plan, offload=options), host if video.kv == "host" else LOCAL)


def live_features(encoder: SpeechEncoder) -> LiveFeatures:
    """Features of sound that arrives while they are computed, on the device."""
    return LiveFeatures(LiveAudio(iter([babble(4.0)])), on_cuda(encoder.requires_grad_(False)))


def sampler_config(video: Video) -> SamplerConfig:
    return SamplerConfig(name=video.sampler, schedule="linear", sample_steps=3, sample_guide_scale=video.guide)


EVERY_SAMPLER = [Video(model, name, guide=4.5 if model == CLIPS else 1.0) for model in (BLOCKS, CLIPS, PREVIEW) for name in SAMPLERS]
EVERY_PATH = [
    Video(BLOCKS, guide=2.0, voices=2, pose=True),
    Video(BLOCKS, guide=2.0, kv="host"),
    Video(BLOCKS, "unipc", guide=2.0, inflight=3),
    Video(BLOCKS, "dpmpp", guide=2.0, upstream=True),
    Video(BLOCKS, guide=2.0, live=True),
    Video(BLOCKS, lora="beside"),
    Video(CLIPS, "unipc", guide=4.5, voices=2, pose=True),
    Video(CLIPS, lora="beside", upstream=True),
    Video(PREVIEW, "heun", guide=2.0, live=True),
    Video(PREVIEW, kv="host"),
    Video(PREVIEW, guide=2.0, inflight=3, lora="beside"),
]


@pytest.mark.parametrize("video", [*EVERY_SAMPLER, *EVERY_PATH], ids=str)
def test_fake_cuda_makes_every_video_and_the_host_does_not_wait_for_it(fake_cuda, video):
    check_chunks(fake_cuda(chunks_of, video), video)


@pytest.mark.parametrize("model", [BLOCKS, CLIPS])
def test_fake_cuda_makes_a_video_with_an_adapter_merged_into_weights_from_a_file(fake_cuda, model, tmp_path):
    video = Video(model, lora=str(tmp_path))
    config = model_config(video)
    save_weights(AvatarDiT(config), tmp_path / "weights.safetensors")
    halves = {"lora_A": torch.zeros(2, config.trunk.hidden_dim), "lora_B": torch.zeros(config.trunk.hidden_dim, 2)}
    save_file({f"blocks.0.self_attention.to_q.{half}.weight": value for half, value in halves.items()}, tmp_path / "lora.safetensors")
    check_chunks(fake_cuda(chunks_of, video), video)


@pytest.mark.parametrize("kv", ["device", "host"])
def test_fake_cuda_rotates_the_keys_of_the_reference_where_attention_runs(fake_cuda, kv):
    assert fake_cuda(devices_of_rotations, Video(BLOCKS, kv=kv)) == {"cuda"}


def check_chunks(chunks: list[Chunk], video: Video) -> None:
    """The chunks were computed on the device, and the host waited for nothing but the copy of the preview's motion, which it draws with;
    and in the first chunk for the memory's keys and values, where the rings lie in host memory."""
    drawn = video.model == PREVIEW
    assert len(chunks) == 2
    for number, chunk in enumerate(chunks):
        assert chunk.device == ("cpu" if drawn else "cuda:0")
        assert chunk.record.launches["mm"] + chunk.record.launches["addmm"] > 0
        waits = [(kind, line.partition(":")[0]) for kind, line in chunk.record.waits]
        if number == 0 and video.kv == "host":
            waits = [wait for wait in waits if wait != ("copy to the host", "kv_cache.py")]
        assert waits == [("event", "stream.py")] * drawn
