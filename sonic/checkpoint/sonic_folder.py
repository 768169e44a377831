"""The folder that Sonic is downloaded as: its six networks, their sizes and tensor names, and checks that all is there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from sonic.checkpoint.official import Component, Download, check_published, read_json, shape_in, shapes_of, speech_encoder
from sonic.checkpoint.tensor_files import StoredTensor, survey
from sonic.config import ModelConfig, UNetConfig
from sonic.encoders.clip_image import VIT_H14, ClipImageEncoder
from sonic.encoders.clip_sound import BUCKET_TICKS, TOKEN_TICKS, FrameBuckets, FrameTokens
from sonic.model.svd_unet import SvdUNet
from sonic.vae.rife import PREFIX, UNUSED, Rife
from sonic.vae.svd_vae import SvdAutoencoder

SVD = "stable-video-diffusion-img2vid-xt"
UNET, TOKENS, BUCKETS, RIFE = "Sonic/unet.pth", "Sonic/audio2token.pth", "Sonic/audio2bucket.pth", "RIFE/flownet.pkl"
PARTS = (UNET, TOKENS, BUCKETS, RIFE, "whisper-tiny", f"{SVD}/vae", f"{SVD}/image_encoder")
ABOVE = ("", "checkpoints", "Sonic")  # folders of the given one in which the parts may lie
STORED = (".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin")  # ends of the files of a library's network
HEAD = 64  # channels of an attention head of the published UNet
UNREAD = "position_ids"  # 0, 1, 2 ..., in older files of CLIP
LICENCE = "Sonic's weights and code may not be used commercially (CC BY-NC-SA 4.0); those of Stable Video Diffusion have their own licence"


def networks(folder: Path, base: ModelConfig) -> Download:
    """All that the folder holds. The sizes are those of its tensors; everything else is from `base`.

    Raises ValueError when a file is missing, damaged or for another model.
    """
    found = {part: _found(folder, part) for part in PARTS}
    tokens, buckets = _tokens(found[TOKENS]), _buckets(found[BUCKETS])
    heads = found[f"{SVD}/vae"].parent / "unet" / "config.json"
    unet = replace(_unet_config(found[UNET], heads, base.unet), audio_tokens=tokens.config["tokens"])
    components = {
        "unet": exported(survey(found[UNET]), replace(base, unet=unet)),
        "audio2token": tokens,
        "audio2bucket": buckets,
        "whisper": speech_encoder(found["whisper-tiny"], "whisper"),
        "image_encoder": _image_encoder(found[f"{SVD}/image_encoder"]),
        "vae": _autoencoder(found[f"{SVD}/vae"]),
        "rife": _rife(found[RIFE]),
    }
    _check_together(folder, unet, components)
    sizes = {name: value for name, value in asdict(unet).items() if not name.startswith("window_")}
    return Download(components, {"unet": sizes}, licence=LICENCE)


def exported(tensors: Mapping[str, StoredTensor], config: ModelConfig) -> Component:
    """The UNet, whose tensors have their published names everywhere. Raises ValueError when it has other sizes than the config."""
    return _component(tensors, lambda: SvdUNet(config.unet).state_dict(), "UNet", sizes=asdict(config.unet))


def _found(folder: Path, part: str) -> Path:
    """Where a part lies: as it is published, in the folder above, or beside the other parts."""
    candidates = [folder / above / name for name in (part, Path(part).name) for above in ABOVE]
    if found := next((path for path in candidates if path.exists()), None):
        return found
    raise ValueError(
        f"{folder / part} does not exist, nor in {folder / ABOVE[1]}; fetch it, or name the folder that holds all parts of Sonic"
    )


def _unet_config(file: Path, config: Path, base: UNetConfig) -> UNetConfig:
    """The sizes of the UNet in a file; the number of its heads is in no tensor, but in `config` if that exists."""
    tensors = survey(file)
    shape = partial(shape_in, tensors, file)
    levels = 1 + max((int(name.split(".")[1]) for name in tensors if name.startswith("down_blocks.")), default=0)
    channels = [shape(f"down_blocks.{level}.resnets.0.spatial_res_block.conv1.weight")[0] for level in range(levels)]
    heads = read_json(config).get("num_attention_heads") if config.is_file() else [count // HEAD for count in channels]
    if not isinstance(heads, list) or len(heads) != levels or any(not n or c % n for n, c in zip(heads, channels, strict=False)):
        raise ValueError(f"{file} has {channels} channels, which {heads} heads do not divide; write num_attention_heads in {config}")
    return replace(
        base,
        block_out_channels=channels,
        num_attention_heads=heads,
        layers_per_block=len({name.split(".")[3] for name in tensors if name.startswith("down_blocks.0.resnets.")}),
        cross_attention_dim=shape("down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight")[1],
        addition_time_embed_dim=shape("add_embedding.linear_1.weight")[1] // 3,
    )


def _tokens(file: Path) -> Component:
    tensors = survey(file)
    shape = partial(shape_in, tensors, file)
    (hidden, inputs), (width,) = shape("proj1.weight"), shape("norm.weight")
    sizes = {"inputs": inputs, "hidden": hidden, "tokens": shape("proj3.weight")[0] // width, "width": width}
    return _component(tensors, lambda: FrameTokens(**sizes).state_dict(), "network of audio tokens", sizes=sizes)


def _buckets(file: Path) -> Component:
    tensors = survey(file)
    hidden, inputs = shape_in(tensors, file, "proj1.weight")
    sizes = {"inputs": inputs, "hidden": hidden}
    return _component(tensors, lambda: FrameBuckets(**sizes).state_dict(), "network of motion buckets", sizes=sizes)


def _image_encoder(folder: Path) -> Component:
    given = read_json(folder / "config.json")
    sizes = {name: given.get(name, usual) for name, usual in VIT_H14.items()}
    found = {name: tensor for name, tensor in _stored(folder, "model", "pytorch_model").items() if not name.endswith(UNREAD)}
    return _component(found, lambda: ClipImageEncoder(sizes).network.state_dict(), "image encoder", sizes=sizes)


def _autoencoder(folder: Path) -> Component:
    sizes = {name: value for name, value in read_json(folder / "config.json").items() if not name.startswith("_")}
    found = _stored(folder, "diffusion_pytorch_model")
    return _component(found, lambda: SvdAutoencoder(sizes).blocks.state_dict(), "VAE", sizes=sizes)


def _rife(file: Path) -> Component:
    """RIFE without the stage that only its training used."""
    named = {name.removeprefix(PREFIX): tensor for name, tensor in survey(file).items()}
    sizes = {"channels": shape_in(named, file, "block0.conv0.1.0.weight")[0]}
    found = {name: tensor for name, tensor in named.items() if not name.startswith(UNUSED)}
    return _component(found, lambda: Rife(**sizes).state_dict(), "interpolation of frames", sizes=sizes)


def _stored(folder: Path, *stems: str) -> dict[str, StoredTensor]:
    """The tensors of a library's network, in full precision if the folder has it, by name."""
    files = [folder / f"{stem}{end}" for end in STORED for stem in stems]
    return survey(next((file for file in files if file.is_file()), files[0]))


def _component(
    tensors: Mapping[str, StoredTensor], wanted: Callable[[], Mapping[str, Tensor]], what: str, *, sizes: dict[str, Any]
) -> Component:
    """A network with exactly the wanted tensors. Raises ValueError when they are others."""
    check_published(tensors, shapes_of(wanted), what, mixed=True)
    return Component(tensors, sizes)


def _check_together(folder: Path, unet: UNetConfig, components: Mapping[str, Component]) -> None:
    """Raise ValueError when one network does not read what another one gives."""
    sizes = {name: part.config for name, part in components.items()}
    width, picture = sizes["whisper"]["d_model"], sizes["image_encoder"]["projection_dim"]
    states = width * (1 + sizes["whisper"]["encoder_layers"])
    for part, what, given, reader, wanted in (
        (TOKENS, "tokens of width", sizes["audio2token"]["width"], "UNet", unet.cross_attention_dim),
        (f"{SVD}/image_encoder", "embeddings of width", picture, "UNet", unet.cross_attention_dim),
        ("whisper-tiny", "states of a window:", sum(TOKEN_TICKS) * states, TOKENS, sizes["audio2token"]["inputs"]),
        ("whisper-tiny", "last states and picture:", sum(BUCKET_TICKS) * width + picture, BUCKETS, sizes["audio2bucket"]["inputs"]),
    ):
        if given != wanted:
            raise ValueError(f"{folder / part} gives {what} {given}, {reader} reads {wanted}; fetch the folder of one model again")
