"""Colours of picture files: profiles, PNG chunks and EXIF are honoured, and sRGB in any form changes nothing."""

from __future__ import annotations

import io
import logging
import struct
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from sonic.data.colors import ADOBE, D65, PRIMARIES, SRGB, SRGB_CURVE, rgb_profile
from sonic.data.image import load_image

ORIENTATION, EXIF_FOLDER, COLOR_SPACE, INTEROP = 0x0112, 0x8769, 0xA001, 0xA005
PROPHOTO = (0.7347, 0.2653, 0.1596, 0.8404, 0.0366, 0.0001, 0.3457, 0.3585)
P3 = PRIMARIES[12]
LINEAR_FROM = {  # linear sRGB from linear P3 and Adobe RGB: published matrices (W3C, CSS Color 4, sample code)
    "p3": [[1.2249401763, -0.2249401763, 0], [-0.0420569547, 1.0420569547, 0], [-0.0196375546, -0.0786360456, 1.0982736001]],
    "adobe": [[1.3983557440, -0.3983557440, 0], [0, 1, 0], [0, -0.0429289891, 1.0429289891]],
}
PROFILES = {"p3": rgb_profile(P3, SRGB_CURVE), "adobe": rgb_profile(ADOBE, (563 / 256,))}


@pytest.fixture
def numbers() -> np.ndarray:
    """Numbers that are inside the sRGB gamut in any of the tested spaces, uint8 [130,200,3]."""
    y, x = np.mgrid[0:130, 0:200] / 200
    return np.stack([120 + 80 * x, 110 + 100 * y, 150 - 50 * x * y], axis=-1).round().astype(np.uint8)


def shown(numbers: np.ndarray, space: str) -> np.ndarray:
    """Convert these numbers to sRGB by the published equations."""
    part = numbers / 255
    linear = part ** (563 / 256) if space == "adobe" else np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)
    linear = (linear @ np.transpose(LINEAR_FROM[space])).clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def difference(path, expected: np.ndarray) -> float:
    found = load_image(path)
    assert found.shape == expected.shape
    return float(np.abs(found.astype(float) - expected).max())


def with_chunks(path, numbers: np.ndarray, **chunks: bytes):
    """A PNG with these chunks before all others."""
    file = io.BytesIO()
    Image.fromarray(numbers).save(file, "PNG")
    packed = [(name.encode() + data) for name, data in chunks.items()]
    inside = b"".join(struct.pack(">I", len(each) - 4) + each + struct.pack(">I", zlib.crc32(each)) for each in packed)
    path.write_bytes(file.getvalue()[:33] + inside + file.getvalue()[33:])
    return path


def grey_profile(gamma: float) -> bytes:
    white = struct.pack(">3i", 63190, 65536, 54061)
    tags = b"XYZ \0\0\0\0" + white + b"curv\0\0\0\0" + struct.pack(">IHxx", 1, round(gamma * 256))
    table = struct.pack(">I4sII4sII", 2, b"wtpt", 156, 20, b"kTRC", 176, 16)
    return struct.pack(">I4xI4s4s4s12x4s28x12s48x", 192, 0x02400000, b"mntr", b"GRAY", b"XYZ ", b"acsp", white) + table + tags


def cmyk_profile() -> bytes:
    """The profile of an ideal CMYK press (XYZ from 1 - C, 1 - M, 1 - Y less K): a table of 2 x 2 x 2 x 2 colours in Lab."""
    grid = [(c, m, y, k) for c in (0, 1) for m in (0, 1) for y in (0, 1) for k in (0, 1)]
    colors = np.array([[[(1 - ink) * (1 - k) * 255 for ink in (c, m, y)] for c, m, y, k in grid]], np.uint8)
    lab = ImageCms.profileToProfile(
        Image.fromarray(colors), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB", renderingIntent=1
    )
    table = np.asarray(lab).copy()
    table[..., 1:] ^= 128  # signed outside of Pillow, offset in lut8
    ramp = bytes(range(256))
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + struct.pack(">9i", *(65536 * (n in (0, 4, 8)) for n in range(9)))
    lut += 4 * ramp + table.tobytes() + 3 * ramp
    white = struct.pack(">3i", 63190, 65536, 54061)
    tags = b"XYZ \0\0\0\0" + white + lut
    heads = struct.pack(">I4sII4sII", 2, b"wtpt", 156, 20, b"A2B0", 176, len(lut))
    size = 156 + len(tags)
    return struct.pack(">I4xI4s4s4s12x4s28x12s48x", size, 0x02400000, b"prtr", b"CMYK", b"Lab ", b"acsp", white) + heads + tags


@pytest.mark.parametrize("space", PROFILES)
@pytest.mark.parametrize("suffix", ["png", "tif", "jpg", "webp", "avif"])
def test_numbers_of_another_space_become_srgb(space, suffix, numbers, tmp_path):
    lossless = {
        "webp": {"lossless": True},
        "jpg": {"quality": 100, "subsampling": 0, "progressive": True},
        "avif": {"quality": 100, "subsampling": "4:4:4"},
    }
    path = tmp_path / f"picture.{suffix}"
    Image.fromarray(numbers).save(path, icc_profile=PROFILES[space], **lossless.get(suffix, {}))
    assert np.abs(shown(numbers, space) - numbers).max() > 8
    assert difference(path, shown(numbers, space)) < (1.5 if suffix in ("png", "tif", "webp") else 7)


@pytest.mark.parametrize("suffix", ["jpg", "avif"])
def test_a_rotated_picture_keeps_its_colours(suffix, numbers, tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    turned = Image.fromarray(numbers).transpose(Image.Transpose.ROTATE_90)
    turned.save(tmp_path / f"t.{suffix}", icc_profile=PROFILES["p3"], exif=exif, quality=100, subsampling="4:4:4")
    assert difference(tmp_path / f"t.{suffix}", shown(numbers, "p3")) < 5


def test_the_colours_of_a_transparent_picture_are_converted_but_not_its_alpha(numbers, tmp_path):
    alpha = np.full(numbers.shape[:2], 255, np.uint8)
    alpha[:, :50], alpha[:, 50:100] = 0, 128
    Image.fromarray(np.dstack([numbers, alpha])).save(tmp_path / "cut.png", icc_profile=PROFILES["p3"])
    found, colors = load_image(tmp_path / "cut.png"), shown(numbers, "p3")
    assert (found[:, :50] == 255).all() and np.abs(found[:, 100:] - colors[:, 100:]).max() < 1.5
    assert np.abs(found[:, 50:100] - (colors * 128 + 255 * 127)[:, 50:100] / 255).max() < 2.5


def test_a_wide_space_keeps_what_srgb_can_show(numbers, tmp_path):
    wide, plain = rgb_profile(PROPHOTO, (1.8,)), ImageCms.createProfile("sRGB")
    stored = ImageCms.profileToProfile(Image.fromarray(numbers), plain, ImageCms.ImageCmsProfile(io.BytesIO(wide)), renderingIntent=1)
    stored.save(tmp_path / "wide.png", icc_profile=wide)
    assert np.abs(np.asarray(stored).astype(int) - numbers).max() > 15
    assert difference(tmp_path / "wide.png", numbers) <= 2


@pytest.mark.parametrize("gamma", [1.0, 1.8])
@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_grey_pictures_are_converted_by_their_profile(gamma, mode, tmp_path):
    grey = np.tile(np.arange(256, dtype=np.uint8), (130, 1))
    picture = Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(grey).convert(mode)
    picture.save(tmp_path / "grey.png", icc_profile=grey_profile(gamma))
    linear = (grey / 255) ** gamma
    wanted = 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    found = load_image(tmp_path / "grey.png")
    assert np.abs(found - wanted[..., None]).max() < 2.5 and np.ptp(found.astype(int), axis=-1).max() == 0


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_cmyk_pictures_are_converted_by_their_profile(suffix, tmp_path):
    profile = cmyk_profile()
    inks = np.zeros((130, 200, 4), np.uint8)
    inks[:, 50:100, 1], inks[:, 100:150, 3], inks[:, 150:, 2] = 255, 255, 255
    Image.fromarray(inks, "CMYK").save(tmp_path / f"print.{suffix}", icc_profile=profile, quality=100)
    found = load_image(tmp_path / f"print.{suffix}")[60, [25, 75, 125, 175]].astype(int)
    assert np.abs(found - [[255, 255, 255], [255, 0, 255], [0, 0, 0], [255, 255, 0]]).max() < 12
    paper = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    there = ImageCms.profileToProfile(Image.fromarray(inks, "CMYK"), paper, ImageCms.createProfile("sRGB"), 1, "RGB")
    assert np.abs(np.asarray(there)[60, [25, 75, 175]].astype(int) - found[[0, 1, 3]]).max() < 6


def test_lab_pictures_are_read(numbers, tmp_path):
    lab = ImageCms.profileToProfile(
        Image.fromarray(numbers), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB", renderingIntent=1
    )
    lab.save(tmp_path / "lab.tif")
    assert difference(tmp_path / "lab.tif", numbers) < 5


def srgb_profiles() -> dict[str, bytes]:
    return {
        "none": b"",
        "lcms": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        "v4": rgb_profile((*SRGB, *D65), SRGB_CURVE),
    }


@pytest.mark.parametrize("profile", ["none", "lcms", "v4"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_srgb_pictures_are_unchanged_to_the_bit(profile, mode, tmp_path, caplog):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (130, 200, 3), np.uint8)).convert(mode)
    noise.save(tmp_path / "noise.png", icc_profile=srgb_profiles()[profile])
    assert np.array_equal(load_image(tmp_path / "noise.png"), np.asarray(noise.convert("RGB")))
    assert not caplog.records


@pytest.mark.parametrize("chunks", [{"gAMA": struct.pack(">I", 45455)}, {"sRGB": b"\0", "gAMA": struct.pack(">I", 100_000)}])
def test_chunks_that_say_srgb_change_nothing(chunks, numbers, tmp_path):
    assert np.array_equal(load_image(with_chunks(tmp_path / "a.png", numbers, **chunks)), numbers)


def test_chunks_that_say_another_space_are_honoured(numbers, tmp_path):
    white_first = struct.pack(">8I", *(round(100_000 * value) for value in (*P3[6:], *P3[:6])))
    for chunks in ({"cICP": bytes([12, 13, 0, 1])}, {"cHRM": white_first}, {"gAMA": struct.pack(">I", 45455), "cHRM": white_first}):
        assert difference(with_chunks(tmp_path / "p3.png", numbers, **chunks), shown(numbers, "p3")) < 1.5
    linear = load_image(with_chunks(tmp_path / "linear.png", numbers, gAMA=struct.pack(">I", 100_000)))
    assert np.abs(linear - 255 * (1.055 * (numbers / 255) ** (1 / 2.4) - 0.055)).max() < 2


def test_adobe_rgb_in_exif_alone_is_honoured(numbers, tmp_path):
    exif = Image.Exif()
    exif.get_ifd(EXIF_FOLDER)[COLOR_SPACE] = 0xFFFF
    Image.fromarray(numbers).save(tmp_path / "other.jpg", exif=exif, quality=100, subsampling=0)
    exif.get_ifd(EXIF_FOLDER)[INTEROP] = {1: "R03"}
    Image.fromarray(numbers).save(tmp_path / "adobe.jpg", exif=exif, quality=100, subsampling=0)
    assert difference(tmp_path / "adobe.jpg", shown(numbers, "adobe")) < 5
    assert difference(tmp_path / "other.jpg", numbers) < 5


DAMAGED = {
    "cut": {"icc_profile": PROFILES["p3"][:300]},
    "nonsense": {"icc_profile": b"nonsense" * 40},
    "of_another_mode": {"icc_profile": grey_profile(1.8)},
    "white_is_black": {"icc_profile": rgb_profile(P3, (2.4, 0.0, 0.0, 0.0, 1.0))},
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_profile_is_reported_in_one_sentence(case, numbers, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        Image.fromarray(numbers).save(tmp_path / "a.png", **DAMAGED[case])
        assert np.array_equal(load_image(tmp_path / "a.png"), numbers)
    assert len(caplog.records) == 1 and f"image={tmp_path / 'a.png'}: its colour profile cannot be used" in caplog.text


@pytest.mark.parametrize(
    "chunks",
    [{"iCCP": b"name\0\0not packed"}, {"cICP": bytes([9, 16, 0, 1])}, {"gAMA": bytes(4)}, {"gAMA": b"\0\0\xb1\x8f", "cHRM": bytes(32)}],
)
def test_damaged_chunks_are_reported_in_one_sentence(chunks, numbers, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(load_image(with_chunks(tmp_path / "a.png", numbers, **chunks)), numbers)
    assert len(caplog.records) == 1 and "its colours are taken as sRGB" in caplog.text


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_huge_profile_is_read(suffix, numbers, tmp_path):
    huge = PROFILES["p3"] + np.random.default_rng(0).bytes(2_500_000)
    Image.fromarray(numbers).save(tmp_path / f"a.{suffix}", icc_profile=huge, quality=100)
    assert difference(tmp_path / f"a.{suffix}", shown(numbers, "p3")) < 5


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
def test_of_several_pictures_the_first_is_taken(suffix, tmp_path):
    first, second = (Image.new("RGB", (150, 150), color) for color in ("red", "blue"))
    first.save(tmp_path / f"a.{suffix}", save_all=True, append_images=[second], **({"lossless": True} if suffix == "webp" else {}))
    assert (load_image(tmp_path / f"a.{suffix}") == (255, 0, 0)).all()


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("given", ["icc", "nclx"])
def test_heic_pictures_of_phones_are_read(orientation, given, numbers, tmp_path):
    plugin = pytest.importorskip("pillow_heif", reason="HEIC is read with the extra heic, which is not installed")
    plugin.register_heif_opener()
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    picture = Image.fromarray(numbers)
    picture = picture if orientation == 1 else picture.transpose(Image.Transpose.ROTATE_90)
    codes = {"color_primaries": 12, "transfer_characteristic": 13, "save_nclx_profile": True}
    colors = {"icc_profile": PROFILES["p3"]} if given == "icc" else codes
    picture.save(tmp_path / "phone.heic", exif=exif.tobytes(), quality=100, chroma=444, **colors)
    assert difference(tmp_path / "phone.heic", shown(numbers, "p3")) < 6


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (b"\0\0\0\x1cftypheic\0\0\0\0mif1heicmiaf", "a HEIC picture, which cannot be read yet; pip install pillow-heif"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1heicmiaf", "pip install pillow-heif"),
        (b"\xff\x0a\x00\x10", "a JPEG XL picture"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL picture"),
    ],
)
def test_a_format_that_needs_a_plugin_is_named(head, words, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "picture").write_bytes(head + bytes(500))
    with pytest.raises(ValueError) as found:
        load_image(tmp_path / "picture")
    assert words in str(found.value) and str(found.value).startswith(f"image={tmp_path / 'picture'} is ")
