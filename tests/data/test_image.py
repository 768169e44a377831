"""Loading of pictures of every kind, and the face crop, a similarity transform that can be inverted."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from sonic.data.faces import portrait_of
from sonic.data.image import MOUTH_IN_FACE, crop_around, crop_to_photo, cut, face_crop, load_image
from sonic.geometry import MOUTH_ANCHOR
from sonic.types import Crop, FaceBox, Mouth, Portrait

CORNER = 0x0112  # the EXIF tag that says which way is up
TURNS = {1: 0, 3: 180, 6: 90, 8: -90}  # counter-clockwise rotation of the stored picture
CROP = Crop(center_x=41.3, center_y=55.9, side=37.0, angle=0.3, resolution=24)


@pytest.fixture
def scene() -> np.ndarray:
    """A smooth colour picture [150,200,3] whose four corners differ."""
    y, x = np.mgrid[0:150, 0:200] / 200
    return np.stack([255 * x, 255 * y, 200 - 150 * x * y], axis=-1).round().astype(np.uint8)


def as_grey(scene: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(scene).convert("L"))


@pytest.mark.parametrize("orientation", TURNS)
def test_the_orientation_in_the_file_is_honoured(orientation, scene, tmp_path):
    stored = Image.fromarray(scene).rotate(TURNS[orientation], expand=True)
    exif = Image.Exif()
    exif[CORNER] = orientation
    stored.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(load_image(tmp_path / "turned.png"), scene)


@pytest.mark.parametrize("orientation", [2, 4, 5, 7])
def test_mirrored_orientations_are_honoured(orientation, scene, tmp_path):
    exif = Image.Exif()
    exif[CORNER] = orientation
    Image.fromarray(scene).save(tmp_path / "mirrored.png", exif=exif)
    flipped = {2: scene[:, ::-1], 4: scene[::-1], 5: scene.swapaxes(0, 1), 7: scene[::-1, ::-1].swapaxes(0, 1)}
    assert np.array_equal(load_image(tmp_path / "mirrored.png"), flipped[orientation])


def test_transparent_pixels_become_white(scene, tmp_path):
    alpha = np.full(scene.shape[:2], 255, np.uint8)
    alpha[:, :60], alpha[:, 60:120] = 0, 128
    Image.fromarray(np.dstack([scene, alpha])).save(tmp_path / "cut_out.png")
    found = load_image(tmp_path / "cut_out.png").astype(int)
    assert (found[:, :60] == 255).all() and np.array_equal(found[:, 120:], scene[:, 120:])
    assert np.abs(found[:, 60:120] - (scene[:, 60:120] / 2 + 127.5)).max() <= 2


def test_a_transparent_palette_colour_shows_white(tmp_path):
    picture = Image.new("P", (130, 130), 1)
    picture.putpalette([0, 0, 0, 10, 200, 30])
    picture.paste(0, (0, 0, 65, 130))
    picture.save(tmp_path / "palette.png", transparency=0)
    found = load_image(tmp_path / "palette.png")
    assert tuple(found[0, 0]) == (255, 255, 255) and tuple(found[0, 129]) == (10, 200, 30)


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "P", "CMYK", "RGBA", "1"])
def test_every_kind_of_picture_becomes_rgb(mode, scene, tmp_path):
    picture = Image.fromarray(scene).convert(mode)
    name = tmp_path / ("picture.tif" if mode == "CMYK" else "picture.png")
    picture.save(name)
    found = load_image(name)
    assert found.shape == scene.shape and found.dtype == np.uint8
    assert np.array_equal(found, np.asarray(picture.convert("RGB")))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_keep_their_brightness(suffix, scene, tmp_path):
    grey = as_grey(scene)
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / f"deep.{suffix}")
    found = load_image(tmp_path / f"deep.{suffix}")
    assert np.array_equal(found, np.repeat(grey[..., None], 3, axis=-1))


def test_float_pictures_keep_their_brightness(scene, tmp_path):
    Image.fromarray(as_grey(scene).astype(np.float32) / 255).save(tmp_path / "float.tif")
    assert np.array_equal(load_image(tmp_path / "float.tif")[..., 0], as_grey(scene))


def test_the_smallest_picture_is_128_px(tmp_path):
    Image.new("RGB", (128, 128)).save(tmp_path / "small.png")
    assert load_image(tmp_path / "small.png").shape == (128, 128, 3)


def not_a_picture(folder):
    (folder / "words.jpg").write_text("not a picture at all")
    return folder / "words.jpg"


def cut_off(folder, format_name):
    rng = np.random.default_rng(0)
    whole = folder / f"whole.{format_name}"
    Image.fromarray(rng.integers(0, 255, (160, 160, 3), np.uint8)).save(whole)
    whole.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    return whole


def plain(folder, *size):
    Image.new("1", size).save(folder / "plain.png")
    return folder / "plain.png"


BAD = {
    "missing": (lambda folder: folder / "nowhere.png", "does not exist"),
    "folder": (lambda folder: folder, "is a directory"),
    "words": (not_a_picture, "not a picture"),
    "cut_jpg": (lambda folder: cut_off(folder, "jpg"), "damaged or cut off"),
    "cut_png": (lambda folder: cut_off(folder, "png"), "damaged or cut off"),
    "cut_webp": (lambda folder: cut_off(folder, "webp"), "image="),
    "small": (lambda folder: plain(folder, 63, 400), "63x400 px, too small"),
    "large": (lambda folder: plain(folder, 9000, 6000), "too large"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_picture_file_is_refused_in_one_sentence_that_names_it(case, tmp_path):
    make, words = BAD[case]
    path = make(tmp_path)
    with pytest.raises(ValueError, match=words) as caught:
        load_image(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_decompression_bomb_is_refused_unopened(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)
    with pytest.raises(ValueError, match="too large"):
        load_image(plain(tmp_path, 400, 400))


@pytest.mark.parametrize(
    ("face_box", "words"),
    [([10, 10, 400, 60], "leaves the photo"), ([-40, 0, 60, 60], "leaves"), ([10, 10, 5, 5], "too small"), ([1, 2, 3], "3 numbers")],
)
def test_an_impossible_face_box_is_refused(face_box, words, scene, tmp_path):
    Image.fromarray(scene).save(tmp_path / "scene.png")
    with pytest.raises(ValueError, match=words) as caught:
        portrait_of(load_image(tmp_path / "scene.png"), face_box)
    assert "face_box=[x,y,w,h]" in str(caught.value)


def test_face_and_mouth_can_be_given(scene, tmp_path):
    Image.fromarray(scene).save(tmp_path / "scene.png")
    portrait = portrait_of(load_image(tmp_path / "scene.png"), [40, 30, 80, 90], [82, 101.5, 14, 0.1])
    assert portrait.face == FaceBox(40, 30, 80, 90) and portrait.mouth == Mouth(82, 101.5, 14, 0.1)


@pytest.mark.parametrize("mouth", [[500, 20, 10], [80, 80, 0.5], [80, 80], [80, 80, 150]])
def test_an_impossible_mouth_is_refused(mouth, scene, tmp_path):
    Image.fromarray(scene).save(tmp_path / "scene.png")
    with pytest.raises(ValueError, match="mouth="):
        portrait_of(load_image(tmp_path / "scene.png"), [40, 30, 80, 90], mouth)


def back(crop, xy):
    """Transform points from photo px to crop px, by the corners of the crop.  [...,2] -> [...,2]"""
    origin, right, down = crop_to_photo(crop, torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=xy.dtype))
    return (xy - origin) @ torch.linalg.inv(torch.stack([right - origin, down - origin]))


def test_mapping_from_crop_to_photo_and_back_changes_nothing():
    points = torch.rand(7, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 24
    assert_close(back(CROP, crop_to_photo(CROP, points)), points)


def test_the_crop_turns_with_the_head():
    right = crop_to_photo(CROP, torch.tensor([[12.0, 12.0], [13.0, 12.0]])).diff(dim=0)[0]
    assert_close(right, 37 / 24 * torch.tensor([math.cos(0.3), math.sin(0.3)]))


def test_the_mouth_lies_at_its_anchor_whatever_the_roll():
    for angle in (-0.4, 0.0, 0.25):
        mouth = Mouth(60.0, 80.0, 10.0, angle)
        portrait = Portrait(np.zeros((150, 150, 3), np.uint8), FaceBox(30, 30, 60, 60), mouth)
        crop = face_crop(portrait, resolution=96)
        point = back(crop, torch.tensor([60.0, 80.0], dtype=torch.float64))
        assert_close(point, 96 * torch.tensor(MOUTH_ANCHOR).double(), atol=1e-4, rtol=0)
        assert crop.angle == angle and crop == crop_around(mouth, crop.side, 96)


@pytest.mark.parametrize(("margin", "sides"), [(0, 1), (0.15, 1.3), (0.3, 1.6), (1, 3)])
def test_the_crop_has_a_margin_of_expand_ratio_face_sizes_on_every_side(margin, sides):
    face, mouth = FaceBox(30, 30, 60, 60), Mouth(60, 80, 60 * MOUTH_IN_FACE)
    assert face_crop(Portrait(np.zeros((150, 150, 3), np.uint8), face, mouth), margin).side == sides * 60


@pytest.mark.parametrize("resolution", [48, 17, 5])
def test_a_ramp_stays_a_ramp_at_every_scale(resolution):
    y, x = np.mgrid[0:120, 0:160] + 0.5
    ramp = np.stack([x, y, x + y - 20], axis=-1).clip(0, 255).astype(np.uint8)  # value = left edge of the pixel
    crop = Crop(82.0, 61.0, 48.0, 0.2, resolution)
    index = torch.arange(resolution) + 0.5
    at = crop_to_photo(crop, torch.stack(torch.meshgrid(index, index, indexing="xy"), -1))
    found = (cut(ramp, crop) + 1) * 127.5
    assert_close(found[0], at[..., 0] - 0.5, atol=0.15, rtol=0)
    assert_close(found[1], at[..., 1] - 0.5, atol=0.15, rtol=0)


def test_a_straight_crop_of_the_same_size_is_the_photo_itself(scene):
    found = cut(scene, Crop(60.0, 70.0, 40.0, 0.0, 40))
    assert_close(((found + 1) * 127.5).round().byte(), torch.from_numpy(scene[50:90, 40:80]).permute(2, 0, 1))


def test_fine_stripes_do_not_survive_shrinking():
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    for resolution in (100, 40, 8):
        assert cut(stripes, Crop(128.0, 128.0, 200.0, 0.1, resolution)).abs().max() < 0.08


def test_beyond_the_photo_its_border_is_repeated(scene):
    found = (cut(scene, Crop(0.0, 75.0, 40.0, 0.0, 40)) + 1) * 127.5
    assert_close(found[:, :, 0], found[:, :, 19])
    assert cut(scene, Crop(-500.0, -500.0, 40.0, 0.0, 8)).std((1, 2)).max() < 1e-3
