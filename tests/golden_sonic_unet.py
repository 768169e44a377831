"""Recorded calls of Sonic's UNet with audio attention, and its resized face masks."""

from __future__ import annotations

import torch
from golden_sonic_case import SonicCase

from sonic.config import UNetConfig
from sonic.model.svd_unet import SvdUNet, UNetConditions, level_masks

SIZES = ("block_out_channels", "num_attention_heads", "layers_per_block", "cross_attention_dim", "addition_time_embed_dim", "audio_tokens")


def unet_of(case: SonicCase, network: str = "") -> SvdUNet:
    """The UNet of a case with its recorded weights; every published tensor must be there, and no other."""
    sizes = case.sizes if "block_out_channels" in case.sizes else case.sizes["unet"]
    unet = SvdUNet(UNetConfig(**{name: sizes[name] for name in SIZES}, window_frames=sizes["num_frames"]))
    unet.load_state_dict(case.weights(network), strict=True)
    return unet.eval()


def check(case: SonicCase) -> None:
    """A whole call, or the masks of several sizes."""
    if "sample" in case.inputs:
        _check_call(case)
    else:
        _check_masks(case)


def _check_call(case: SonicCase) -> None:
    given = case.inputs
    conditions = UNetConditions(
        given["image_embeds"], given["audio_tokens"], given["added_time_ids"], given.get("face_mask"), case.call["ip_audio_scale"]
    )
    found = unet_of(case)(given["sample"], given["timestep"], conditions)
    case.close(found, case.outputs["out"])


def _check_masks(case: SonicCase) -> None:
    for name, given in case.inputs.items():
        kind, size, to = name.replace("_to_", "_").split("_")
        (height, width), level = (tuple(map(int, text.split("x"))) for text in (size, to))
        mask = given
        if kind == "box":
            mask = torch.zeros(1, 1, height, width)
            left, top, right, bottom = given.tolist()
            mask[..., top:bottom, left:right] = 1
        resized = level_masks(mask, torch.empty(level), 1)[level[0] * level[1]]
        case.close(resized.flatten().expand(2, -1), case.outputs[f"ds_{size}_to_{to}"])
