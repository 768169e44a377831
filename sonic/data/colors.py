"""Conversion of picture files to sRGB by their ICC profile, PNG chunks, EXIF tags or HEIF colour box.

The conversion is relative colorimetric with black point compensation, the default of browsers and photo editors: colours inside
the sRGB gamut stay exact, those outside are clipped.
"""

from __future__ import annotations

import io
import logging
import struct
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

MODE_OF = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}  # a profile's colour space -> Pillow's mode
RELATIVE, BLACK_TO_BLACK = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
FLAGS = dict.fromkeys(MODE_OF.values(), BLACK_TO_BLACK) | {"L": BLACK_TO_BLACK | ImageCms.Flags.NOOPTIMIZE}  # else dark greys are wrong
AS_SRGB, WHITE_AT_LEAST = 2, 200  # levels of 0..255: a profile that changes no colour by more is sRGB; a darker white is broken
D65, D50 = (0.3127, 0.3290), (0.96422, 1.0, 0.82521)
SRGB = (0.64, 0.33, 0.30, 0.60, 0.15, 0.06)  # x, y of red, green and blue
PRIMARIES = {  # ITU-T H.273
    1: (*SRGB, *D65),
    5: (0.64, 0.33, 0.29, 0.60, 0.15, 0.06, *D65),
    6: (0.630, 0.340, 0.310, 0.595, 0.155, 0.070, *D65),
    9: (0.708, 0.292, 0.170, 0.797, 0.131, 0.046, *D65),
    11: (0.680, 0.320, 0.265, 0.690, 0.150, 0.060, 0.314, 0.351),
    12: (0.680, 0.320, 0.265, 0.690, 0.150, 0.060, *D65),
}
ADOBE = (0.64, 0.33, 0.21, 0.71, 0.15, 0.06, *D65)
SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
ADOBE_GAMMA = 563 / 256
CURVES = {1: SRGB_CURVE, 2: SRGB_CURVE, 4: (2.2,), 5: (2.8,), 6: SRGB_CURVE, 8: (1.0,), 13: SRGB_CURVE, 14: SRGB_CURVE, 15: SRGB_CURVE}
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
GAMMAS = 0.2, 2.0  # valid range of the gamma of PNG files
EXIF_FOLDER, INTEROP_FOLDER, COLOR_SPACE, INTEROP_INDEX = 0x8769, 0xA005, 0xA001, 1
HEADER_BYTES = 1 << 16  # of an AVIF or HEIF file that are searched for its boxes
MISREAD = (OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, struct.error)

log = logging.getLogger("sonic.data")


def in_srgb(colors: Image.Image, original: Image.Image, *, path: Path, called: str) -> Image.Image:
    """Convert a picture without alpha, in any mode of `MODE_OF`, to sRGB; `original` is the opened file with its colour profile.

    When the profile cannot be used, logs a warning and takes the values as sRGB.
    """
    try:
        profile = ImageCms.createProfile("LAB") if colors.mode == "LAB" else _profile(original, path)
        return colors.convert("RGB") if profile is None else _converted(colors, ImageCms.ImageCmsProfile(profile))
    except (ImageCms.PyCMSError, np.linalg.LinAlgError, *MISREAD) as error:
        log.warning("%s: its colour profile cannot be used (%s); its colours are taken as sRGB", called, " ".join(str(error).split()))
        return colors.convert("RGB")


def rgb_profile(colors: Sequence[float], curve: Sequence[float]) -> bytes:
    """Build an ICC profile (version 4) of an RGB colour space.

    `colors` are x, y of its red, green, blue and white; `curve` is its transfer curve, a gamma or the five parameters of a parametric
    curve. Raises ValueError when the primaries span no colours.

    Source: ICC.1:2010, 8.3 (three-component matrix-based profiles), 10.15 (parametric curves) and annex E (Bradford).
    """
    x, y = np.array(colors, float).reshape(4, 2).T
    red_green_blue_white = np.array([x / y, np.ones(4), (1 - x - y) / y])
    primaries, white = red_green_blue_white[:, :3], red_green_blue_white[:, 3]
    cone = np.diag(BRADFORD @ D50 / (BRADFORD @ white))
    to_d50 = np.linalg.inv(BRADFORD) @ cone @ BRADFORD @ primaries @ np.diag(np.linalg.solve(primaries, white))
    if not np.isfinite(to_d50).all() or np.abs(to_d50).max() > 4:
        raise ValueError("its primaries span no colours")
    points = [b"XYZ \0\0\0\0" + _fixed(point) for point in (D50, *to_d50.T)]
    response = b"para\0\0\0\0" + struct.pack(">HH", 0 if len(curve) == 1 else 3, 0) + _fixed(curve)
    tags = dict(zip((b"wtpt", b"rXYZ", b"gXYZ", b"bXYZ", b"rTRC", b"gTRC", b"bTRC"), [*points, *[response] * 3], strict=True))
    table, network, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">II", start + len(network), len(data))
        network += data
    head = (
        struct.pack(">I4xI4s4s4s12x4s28x", start + len(network), 0x04200000, b"mntr", b"RGB ", b"XYZ ", b"acsp") + _fixed(D50) + bytes(48)
    )
    return head + struct.pack(">I", len(tags)) + table + network


def _fixed(numbers: Sequence[float]) -> bytes:
    return struct.pack(f">{len(numbers)}i", *(round(float(number) * 65536) for number in numbers))


def _profile(image: Image.Image, path: Path) -> io.BytesIO | None:
    """The colour profile of a file as ICC data; None when it has none or is sRGB."""
    if image.format == "PNG" and (codes := _codes_of_png(path)):  # cICP takes precedence over all other tags
        return _coded(*codes)
    if "icc_profile" in image.info:
        if not image.info["icc_profile"]:
            raise ValueError("its profile cannot be unpacked")
        return io.BytesIO(image.info["icc_profile"])
    if image.format in ("AVIF", "HEIF") and (codes := _codes_of_heif(path)):
        return _coded(*codes)
    if image.format == "PNG" and "srgb" not in image.info and ("gamma" in image.info or "chromaticity" in image.info):
        return _measured(image.info.get("gamma", 1 / 2.2), image.info.get("chromaticity", (*D65, *SRGB)))
    return io.BytesIO(rgb_profile(ADOBE, (ADOBE_GAMMA,))) if _says_adobe(image) else None


def _converted(colors: Image.Image, profile: ImageCms.ImageCmsProfile) -> Image.Image:
    """Convert colours to sRGB; unchanged when the profile is sRGB already. Raises ValueError when profile and picture do not match."""
    mode = MODE_OF.get(profile.profile.xcolor_space.strip())
    if mode == "RGB" and colors.mode == "L":
        colors = colors.convert("RGB")
    if mode != colors.mode:
        raise ValueError(f"its profile is of {profile.profile.xcolor_space.strip()}, the picture {colors.mode}")
    change = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, "RGB", RELATIVE, FLAGS[mode])
    if mode in ("RGB", "L"):
        levels = range(0, 256, 15)  # colours over the whole gamut, in one row, white last
        samples = Image.fromarray(np.array([list(product(levels, repeat=3)) if mode == "RGB" else range(256)], np.uint8))
        before, after = (np.asarray(row)[0] for row in (samples.convert("RGB"), change.apply(samples)))
        if after[-1].min() < WHITE_AT_LEAST:
            raise ValueError("its profile shows white as dark")
        if np.abs(after.astype(int) - before).max() <= AS_SRGB:
            return colors.convert("RGB")
        if mode == "L":
            return Image.fromarray(after[np.asarray(colors)])
    return change.apply(colors)


def _codes_of_png(path: Path) -> tuple[int, int] | None:
    """H.273 codes of primaries and transfer in the cICP chunk of a PNG file, if it has one."""
    with path.open("rb") as file:
        file.seek(8)
        while (head := file.read(8))[4:] not in (b"", b"IDAT", b"IEND"):
            if head[4:] == b"cICP":
                return struct.unpack(">BB", file.read(2))
            file.seek(int.from_bytes(head[:4]) + 4, io.SEEK_CUR)
    return None


def _codes_of_heif(path: Path) -> tuple[int, int] | None:
    """H.273 codes of primaries and transfer in the colour boxes of a HEIF file, if all its boxes agree."""
    with path.open("rb") as file:
        codes = {box[:4] for box in file.read(HEADER_BYTES).split(b"colrnclx")[1:]}
    return struct.unpack(">HH", codes.pop()) if len(codes) == 1 else None


def _coded(primaries: int, transfer: int) -> io.BytesIO | None:
    """The ICC profile of H.273 codes; unspecified codes, and transfer curves of video, count as sRGB."""
    if transfer not in CURVES:
        raise ValueError(f"transfer {transfer} of H.273{', which is HDR,' if transfer in (16, 18) else ''} is not known here")
    if primaries not in PRIMARIES and primaries != 2:
        raise ValueError(f"primaries {primaries} of H.273 are not known here")
    return io.BytesIO(rgb_profile(PRIMARIES.get(primaries, PRIMARIES[1]), CURVES[transfer]))


def _measured(gamma: float, white_first: Sequence[float]) -> io.BytesIO:
    """The ICC profile of the PNG chunks gAMA and cHRM; a gamma of 1/2.2 means the sRGB curve, as programs that write it intend."""
    if not GAMMAS[0] <= gamma <= GAMMAS[1]:
        raise ValueError(f"a gamma of {gamma}")
    curve = SRGB_CURVE if abs(gamma - 1 / 2.2) < 0.005 else (1 / gamma,)
    return io.BytesIO(rgb_profile((*white_first[2:], *white_first[:2]), curve))


def _says_adobe(image: Image.Image) -> bool:
    """Whether EXIF marks the picture as Adobe RGB: colour space "uncalibrated" with R03 (DCF 2.0), or 2 as some cameras write."""
    exif = image.getexif()
    space = exif.get_ifd(EXIF_FOLDER).get(COLOR_SPACE)
    return space == 2 or space == 0xFFFF and str(exif.get_ifd(INTEROP_FOLDER).get(INTEROP_INDEX, "")).startswith("R03")
