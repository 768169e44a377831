"""The UNet with audio attention at its published size, and its exact savings: each shown equal to the plain way."""

from __future__ import annotations

from hashlib import sha256

import pytest
import torch
from diffusers.models.upsampling import Upsample2D
from plain_sonic_unet import PlainUNet
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from sonic.config import UNetConfig
from sonic.model.svd_unet import MergedUpsample, SvdUNet, UNetConditions

PUBLISHED = "d6eb9410e3245902ac8f6341b8c5563fe7f872a17b7fa48146a7166ca9a05d70"  # hash of the lines "name [shape]" in order
TINY = UNetConfig([32, 64, 64], [2, 4, 4], layers_per_block=1, cross_attention_dim=24, addition_time_embed_dim=16, audio_tokens=5)
FRAMES, WIDTH = 3, TINY.cross_attention_dim


@pytest.fixture(scope="module")
def unet() -> SvdUNet:
    torch.manual_seed(0)
    return SvdUNet(TINY).eval()


@pytest.fixture
def sample() -> torch.Tensor:
    return torch.randn(3, FRAMES, 8, 8, 16)


@pytest.fixture
def given() -> UNetConditions:
    """Three rows that differ in everything, with a face mask."""
    audio, ids = torch.randn(3, FRAMES, TINY.audio_tokens, WIDTH), torch.tensor([[12.5, 30.0, 20.0]] * 3)
    return UNetConditions(torch.randn(3, FRAMES, 1, WIDTH), audio, ids, torch.rand(1, 1, 64, 128), audio_scale=0.7)


def guidance() -> tuple[UNetConditions, UNetConditions]:
    """Nothing, the picture, and the picture with frames 4, 1, 4 of a clip of 5: by what the rows share, and in full."""
    embed, tokens, ids = torch.randn(1, 1, 1, WIDTH), torch.randn(6, TINY.audio_tokens, WIDTH), torch.tensor([[12.5, 30.0, 20.0]] * 3)
    rows = [[0, 0, 0], [0, 0, 0], [5, 2, 5]]
    shared = UNetConditions(embed.expand(2, -1, -1, -1), tokens, ids, frames=rows)
    images = torch.cat((0 * embed, embed, embed)).expand(-1, FRAMES, -1, -1)
    return shared, UNetConditions(images, tokens[torch.tensor(rows)], ids)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert_close(found, expected, atol=5e-6, rtol=1e-5)


def test_the_tensors_have_the_published_names_and_shapes():
    with torch.device("meta"):
        tensors = SvdUNet(UNetConfig()).state_dict()
    lines = sorted(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
    assert len(lines) == 1492
    assert sum(tensor.numel() for tensor in tensors.values()) == 1_575_741_162
    assert sha256("\n".join(lines).encode()).hexdigest() == PUBLISHED
    assert {tensor.device.type for tensor in tensors.values()} == {"meta"}


@torch.no_grad()
@pytest.mark.parametrize("change", [{}, {"face_mask": None}, {"audio_scale": 0.0}], ids=["masked", "unmasked", "silent"])
def test_a_call_equals_the_plain_wiring(unet, sample, given, change):
    given = given._replace(**change)
    close(unet(sample, 0.3, given), PlainUNet(TINY, unet)(sample, 0.3, given))


@torch.no_grad()
def test_each_row_may_have_a_mask_of_its_own(unet, sample, given):
    masks = torch.rand(3, 1, 64, 128)
    each = [unet(sample, 0.3, given._replace(face_mask=mask[None]))[row] for row, mask in enumerate(masks)]
    close(unet(sample, 0.3, given._replace(face_mask=masks)), torch.stack(each))


@torch.no_grad()
def test_latents_of_odd_sides_equal_the_plain_wiring(unet, given):
    sample = torch.randn(3, FRAMES, 8, 7, 10)
    given = given._replace(face_mask=None)
    close(unet(sample, 0.3, given), PlainUNet(TINY, unet)(sample, 0.3, given))


@torch.no_grad()
def test_rows_of_guidance_that_share_audio_and_have_no_picture_equal_full_ones(unet, sample):
    shared, full = guidance()
    close(unet(sample, 0.3, shared), PlainUNet(TINY, unet)(sample, 0.3, full))
    close(unet(sample, 0.3, shared), unet(sample, 0.3, full))


@torch.no_grad()
def test_one_embedding_and_one_set_of_tokens_stand_for_all_frames(unet, sample, given):
    one = given._replace(image_embeds=given.image_embeds[:, :1], audio_tokens=given.audio_tokens[:, :1])
    full = one._replace(
        image_embeds=one.image_embeds.expand(-1, FRAMES, -1, -1), audio_tokens=one.audio_tokens.expand(-1, FRAMES, -1, -1).contiguous()
    )
    close(unet(sample, 0.3, one), unet(sample, 0.3, full))


@torch.no_grad()
def test_later_calls_take_keys_and_values_of_the_clip_from_the_cache(unet, sample):
    shared, _ = guidance()
    cached, cost, found = shared._replace(cache={}), [], []
    for conditions in (shared, cached, cached._replace(frames=[[0] * 3, [0] * 3, [1, 2, 3]]), cached):
        with FlopCounterMode(display=False) as counter:
            found.append(unet(sample, 0.3, conditions))
        cost.append(counter.get_total_flops())
    close(found[1], found[0])
    close(found[3], found[0])
    channels = sum(layer[0].out_features for name, layer in unet.named_modules() if name.endswith("to_k_ip") and "temporal" not in name)
    projection = 2 * 2 * TINY.audio_tokens * WIDTH * channels  # of one frame
    assert cost[1] - cost[3] == 6 * projection  # the first call projects the whole clip, later ones nothing
    assert cost[0] - cost[3] == 3 * projection  # without a cache, silence and two frames


@torch.no_grad()
def test_no_context_is_repeated_for_frames_or_pixels(unet, sample):
    """Of all tensors that a call makes, those as wide as the context hold each set of tokens once, and the mean of each row."""

    class Widest(TorchDispatchMode):
        rows = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            tensors = [each for each in tree_leaves(out) if isinstance(each, torch.Tensor) and each.shape[-1:] == (WIDTH,)]
            self.rows = max([self.rows, *(each.untyped_storage().nbytes() // 4 // WIDTH for each in tensors)])
            return out

    def widest(model, conditions) -> int:
        with Widest() as seen:
            model(sample, 0.3, conditions)
        return seen.rows

    shared, full = guidance()
    assert widest(unet, shared) <= 6 * TINY.audio_tokens
    assert widest(PlainUNet(TINY, unet), full) >= 3 * 8 * 16 * TINY.audio_tokens


@torch.no_grad()
def test_merged_upsampling_equals_repeated_pixels_and_a_convolution():
    ours, plain = MergedUpsample(6, use_conv=True), Upsample2D(6, use_conv=True)
    plain.load_state_dict(ours.state_dict())
    pixels, counts = torch.randn(2, 6, 5, 4), []
    for model in (ours, plain):
        with FlopCounterMode(display=False) as counter:
            model(pixels)
        counts.append(counter.get_total_flops())
    assert_close(ours(pixels), plain(pixels))
    assert_close(ours(pixels, (9, 8)), plain(pixels, (9, 8)))
    assert 9 * counts[0] == 4 * counts[1]


def test_training_gives_the_same_prediction_and_gradients_with_and_without_checkpointing(unet, sample, given):
    adapters = [weight for name, weight in unet.named_parameters() if "_ip." in name]
    audio = given.audio_tokens.requires_grad_()
    found = []
    for switch in (unet.disable_gradient_checkpointing, unet.enable_gradient_checkpointing):
        switch()
        out = unet(sample, 0.3, given)
        found.append([out.detach(), *torch.autograd.grad(out.square().mean(), [audio, *adapters])])
    unet.disable_gradient_checkpointing()
    assert all(gradient.abs().max() > 0 for gradient in found[0])
    assert_close(found[1], found[0], atol=1e-7, rtol=1e-4)
    with torch.no_grad():
        close(unet(sample, 0.3, given), found[0][0])


def test_merged_layers_round_no_more_in_bfloat16_than_separate_ones(unet, sample, given):
    half = SvdUNet(TINY).eval()
    half.load_state_dict(unet.state_dict())
    half.to(torch.bfloat16)
    with torch.no_grad():
        exact = unet(sample, 0.3, given)
        merged = half(sample.bfloat16(), 0.3, given)
    separate = half(sample.bfloat16(), 0.3, given)
    errors = [(out.float() - exact).pow(2).mean().sqrt() for out in (merged, separate)]
    assert merged.dtype == torch.bfloat16
    assert errors[0] < 1.2 * errors[1]


def test_units_are_all_blocks_in_order(unet):
    names = {module: name for name, module in unet.named_modules()}
    down, up = ([f"{side}_blocks.{index}" for index in range(3)] for side in ("down", "up"))
    assert [names[unit] for unit in unet.units()] == [*down, "mid_block", *up]
