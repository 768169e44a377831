"""Weights and operations of the UNet by formula equal those of the network on the meta device."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sonic.config import UNetConfig
from sonic.model.svd_unet import SvdUNet, UNetConditions
from sonic.model.unet_counts import WindowCall, cached_numbers, unet_end_weights, unet_operations, unet_units, unet_weights, unit_weights

PUBLISHED = UNetConfig()
SMALL = UNetConfig([32, 64, 64], [2, 4, 1], layers_per_block=3, cross_attention_dim=24, addition_time_embed_dim=16, audio_tokens=5)
MANY_TOKENS = UNetConfig([32, 64], [2, 1], layers_per_block=1, cross_attention_dim=24, addition_time_embed_dim=16, audio_tokens=40)


def on_meta(config: UNetConfig) -> SvdUNet:
    with torch.device("meta"):
        return SvdUNet(config)


def counted(config: UNetConfig, call: WindowCall) -> int:
    """Operations that torch counts in one call of guidance: the first row without a picture, all rows but the last without sound."""
    frames, width, rows = call.frames, config.cross_attention_dim, call.rows
    unet = on_meta(config)
    with torch.no_grad(), torch.device("meta"), FlopCounterMode(display=False) as counter:
        conditions = UNetConditions(
            image_embeds=torch.empty(min(rows, 2), 1, 1, width),
            audio_tokens=torch.empty(frames + 1, config.audio_tokens, width),
            added_ids=torch.empty(rows, 3),
            face_mask=torch.empty(1, 1, 8 * call.height, 8 * call.width),
            frames=[*[[0] * frames] * (rows - 1), range(1, frames + 1)],
        )
        unet(torch.empty(rows, frames, 8, call.height, call.width), torch.tensor(1.0), conditions)
    return counter.get_total_flops()


@pytest.mark.parametrize("config", [PUBLISHED, SMALL, MANY_TOKENS])
def test_weights_equal_those_of_the_network(config):
    unet = on_meta(config)
    assert unet_weights(config) == sum(weight.numel() for weight in unet.parameters())
    per_unit = [sum(weight.numel() for weight in unit.parameters()) for unit in unet.units()]
    assert [unit_weights(config, unit) for unit in unet_units(config)] == per_unit
    assert unet_end_weights(config) == unet_weights(config) - sum(per_unit)


@pytest.mark.parametrize("config", [SMALL, MANY_TOKENS])
@pytest.mark.parametrize("call", [WindowCall(8, 16, 3, 4), WindowCall(10, 7, 2, 3), WindowCall(8, 8, 1, 1)])
def test_operations_equal_what_torch_counts(config, call):
    assert unet_operations(config, call) == counted(config, call)


def test_a_window_call_of_the_published_size_takes_less_than_92_of_the_published_100_tflop():
    call = WindowCall(64, 64, rows=3, frames=25)
    assert unet_operations(PUBLISHED, call) == counted(PUBLISHED, call) < 92e12


def test_the_cache_of_a_frame_holds_its_keys_and_values():
    unet, cache = SvdUNet(SMALL), {}
    conditions = UNetConditions(torch.zeros(1, 1, 1, 24), torch.zeros(3, 5, 24), torch.zeros(1, 3), frames=[[0, 2]], cache=cache)
    with torch.no_grad():
        unet(torch.zeros(1, 2, 8, 8, 8), 1.0, conditions)
    assert sum(each.numel() for known in cache.values() for each in known) == 3 * cached_numbers(SMALL)
