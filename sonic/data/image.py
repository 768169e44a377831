"""Photographs: loading (oriented, sRGB, no alpha), the square face crop that the model works on, and its coordinates.

Coordinates are continuous everywhere: pixel k of a row covers [k, k+1), so its centre is k + 0.5.  Finding the face and the
mouth is in faces.py.
"""

from __future__ import annotations

import math
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import ExifTags, Image, ImageOps, PngImagePlugin
from torch import Tensor

from sonic.data.colors import MODE_OF, in_srgb
from sonic.data.pixels import to_signed
from sonic.geometry import MOUTH_ANCHOR, pixels_around
from sonic.types import Crop, Mouth, Portrait

SMALLEST_SIDE = 64  # px, as for video.size; in heads of 40 px the first faces are missed
LARGEST_PICTURE = 50 * 1024 * 1024
PAPER = (255, 255, 255)  # background of transparent pixels: cut-out portraits are meant for a white page
MOUTH_IN_FACE = 0.20  # half width of a resting mouth as a share of the face's size

HEIC_BRANDS = b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"
UNREAD = {
    "": "not a picture that can be read; use JPEG, PNG, WebP, TIFF or BMP",
    "heic": "a HEIC picture, which cannot be read yet; pip install pillow-heif for that, or save it as JPEG or PNG",
    "jpeg_xl": "a JPEG XL picture, which cannot be read; save it as JPEG or PNG",
}
JPEG_XL = b"\xff\x0a", b"\0\0\0\x0cJXL "
PngImagePlugin.MAX_TEXT_CHUNK = 16 << 20  # bytes of a decompressed PNG chunk: ICC profiles of printers take several megabytes
BROKEN_FILE = (OSError, RuntimeError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, IndexError, KeyError)


def load_image(path: str | Path, option: str = "image") -> np.ndarray:
    """Load the (first) picture of a file, upright and without transparency, as uint8 sRGB [H,W,3].

    Grey, palette, CMYK and 16-bit pictures and colour profiles are converted to sRGB; the EXIF orientation is applied;
    transparent pixels become white.
    Raises ValueError when the file is no readable picture, a side is below 64 px, or it has more than 50 megapixels; `option`
    is the option that named the file, for the message.
    """
    path, called = Path(path), f"{option}={path}"
    if path.is_dir():
        raise ValueError(f"{called} is a directory; name one picture file in it")
    if not path.exists():
        raise ValueError(f"{called} does not exist; check the spelling and the folder")
    kind = ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of decompression bombs (our own limit is stricter) and damaged metadata (the pixels are fine)
        try:
            kind = _kind(path)
            image = Image.open(path)
        except PermissionError as error:
            raise ValueError(f"{called} cannot be read: permission denied") from error
        except Image.DecompressionBombError as error:
            raise ValueError(f"{called} is too large: at most {LARGEST_PICTURE / 2**20:.0f} megapixels; make it smaller") from error
        except BROKEN_FILE as error:
            raise ValueError(f"{called} is {UNREAD[kind]}") from error
        with image:
            _check_size(called, *image.size)
            try:
                return _upright(image, _flat(image, path, called))
            except BROKEN_FILE as error:
                raise ValueError(f"{called} is damaged or cut off ({error}); export or copy it again") from error


def image_in_memory(image: Image.Image | np.ndarray) -> np.ndarray:
    """A picture that is in memory as load_image gives it: a PIL picture, or uint8 [H,W,3] in sRGB, which stays as it is.

    Raises ValueError for anything else, and for a size that load_image refuses.
    """
    if isinstance(image, Image.Image):
        _check_size("image", *image.size)
        own = image.copy()  # without the name of its file, which may be gone
        return _upright(own, _flat(own, Path(), "image"))
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        given = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f"image is {given}; give a path, a PIL picture, or an array uint8 [height,width,3]")
    _check_size("image", image.shape[1], image.shape[0])
    return np.ascontiguousarray(image)


def face_crop(portrait: Portrait, expand_ratio: float = 0.3, resolution: int = 192) -> Crop:
    """The square crop of the face, rotated with it: the mouth is always at MOUTH_ANCHOR and about equally wide.

    `expand_ratio` is the margin around the face on every side, in sizes of the face.
    """
    face, mouth = portrait.face, portrait.mouth
    size = math.sqrt((face.width + face.height) / 2 * mouth.half_width / MOUTH_IN_FACE)
    return crop_around(mouth, (1 + 2 * expand_ratio) * size, resolution)


def crop_around(mouth: Mouth, side: float, resolution: int) -> Crop:
    """The crop with that side (photo px) and the mouth's rotation, in which the mouth lies at MOUTH_ANCHOR."""
    right, down = ((0.5 - share) * side for share in MOUTH_ANCHOR)
    sin, cos = math.sin(mouth.angle), math.cos(mouth.angle)
    return Crop(mouth.x + cos * right - sin * down, mouth.y + sin * right + cos * down, side, mouth.angle, resolution)


def crop_to_photo(crop: Crop, uv: Tensor) -> Tensor:
    """Transform points from crop px to photo px.  uv [...,2] (u right, v down) -> [...,2]"""
    sin, cos = math.sin(crop.angle), math.cos(crop.angle)
    turn = uv.new_tensor([[cos, -sin], [sin, cos]])
    return (uv - crop.resolution / 2) @ (turn.T * (crop.side / crop.resolution)) + uv.new_tensor([crop.center_x, crop.center_y])


def pixel_centers(height: int, width: int) -> Tensor:
    """Coordinates of the pixel centres of a picture.  -> [height,width,2] (x, y)"""
    rows, columns = torch.arange(height) + 0.5, torch.arange(width) + 0.5
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([x, y], dim=-1)


def cut(pixels: np.ndarray | Tensor, crop: Crop) -> Tensor:
    """Sample the crop from a photo, antialiased; outside the photo its border repeats.  uint8 [H,W,3] -> [3,R,R] in [-1,1]"""
    region, left, top = _region(torch.as_tensor(pixels), crop)
    picture = to_signed(rearrange(region, "h w c -> 1 c h w"))
    shrink = crop.side / crop.resolution  # photo px per crop px
    whole = max(1, int(shrink / 2))  # average whole pixels first, so that the blur below stays small
    if whole > 1:
        high, wide = (whole * math.ceil(n / whole) for n in picture.shape[-2:])
        picture = F.pad(picture, (0, wide - picture.shape[-1], 0, high - picture.shape[-2]), mode="replicate")
        picture = F.avg_pool2d(picture, whole)
    picture = blur(picture, 0.5 * math.sqrt(max(0.0, (shrink / whole) ** 2 - 1)))
    points = crop_to_photo(crop, pixel_centers(crop.resolution, crop.resolution).double())
    points = (points - torch.tensor([left, top])) / whole
    size = torch.tensor([picture.shape[-1], picture.shape[-2]])
    grid = (2 * points / size - 1).float()
    mode = "bicubic" if shrink < 1 else "bilinear"
    sampled = F.grid_sample(picture, grid[None], mode=mode, padding_mode="border", align_corners=False)
    return rearrange(sampled, "1 c h w -> c h w").clamp(-1, 1)


def blur(picture: Tensor, sigma: float) -> Tensor:
    """Gaussian blur with the border repeated.  [B,C,H,W]"""
    if sigma < 0.1:
        return picture
    radius = math.ceil(3 * sigma)
    taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2).to(picture)
    taps = taps / taps.sum()
    count = picture.shape[1]
    padded = F.pad(picture, (radius, radius, radius, radius), mode="replicate")
    columns = F.conv2d(padded, taps.reshape(1, 1, -1, 1).expand(count, 1, -1, 1), groups=count)
    return F.conv2d(columns, taps.reshape(1, 1, 1, -1).expand(count, 1, 1, -1), groups=count)


def covering(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """Scale a picture to cover that size and crop it centrally.  uint8 [H,W,3] -> uint8 [height,width,3]"""
    high, wide = pixels.shape[:2]
    scale = max(width / wide, height / high)
    large = resized(pixels, max(height, round(high * scale)), max(width, round(wide * scale)))
    top, left = (large.shape[0] - height) // 2, (large.shape[1] - width) // 2
    return np.ascontiguousarray(large[top : top + height, left : left + width])


def resized(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize a picture, antialiased.  uint8 [H,W,3] -> uint8 [height,width,3]"""
    picture = rearrange(torch.from_numpy(pixels), "h w c -> 1 c h w")
    small = F.interpolate(picture, (height, width), mode="bicubic", antialias=True, align_corners=False)
    return rearrange(small, "1 c h w -> h w c").contiguous().numpy()


def _check_size(called: str, width: int, height: int) -> None:
    if min(width, height) < SMALLEST_SIDE:
        raise ValueError(f"{called} is {width}x{height} px, too small: at least {SMALLEST_SIDE} px a side; use a larger picture")
    if width * height > LARGEST_PICTURE:
        limit = LARGEST_PICTURE / 2**20
        raise ValueError(f"{called} has {width * height / 2**20:.0f} megapixels, too large: at most {limit:.0f}; make it smaller")


def _kind(path: Path) -> str:
    """The key of `UNREAD` for a file format that cannot be read; "" for all others, HEIC among them when pillow-heif is installed."""
    with path.open("rb") as file:
        head = file.read(64)
    if head[4:8] == b"ftyp" and any(brand in head[8:] for brand in HEIC_BRANDS):
        try:
            from pillow_heif import register_heif_opener
        except ImportError:
            return "heic"
        register_heif_opener()
    return "jpeg_xl" if head.startswith(JPEG_XL) else ""


def _flat(image: Image.Image, path: Path, called: str) -> Image.Image:
    """Convert a picture to 8-bit sRGB without transparency."""
    image.load()
    source, alpha = image, None
    if image.mode.startswith(("I", "F")):
        source = Image.fromarray(_eight_bit(np.asarray(image)))
    elif image.has_transparency_data:
        source = image.convert("LA" if image.mode in ("1", "L", "LA", "La") else "RGBA")
        alpha = source.getchannel("A")
        source = source.convert(source.mode[:-1])
    elif image.mode not in MODE_OF.values():
        source = image.convert("L" if image.mode == "1" else "RGB")
    flat = in_srgb(source, image, path=path, called=called)
    if alpha is None:
        return flat
    flat.putalpha(alpha)
    return Image.alpha_composite(Image.new("RGBA", image.size, (*PAPER, 255)), flat).convert("RGB")


def _eight_bit(values: np.ndarray) -> np.ndarray:
    """Convert 16-bit grey values, or floats in 0..1, 0..255 or 0..65535, to uint8."""
    values = np.nan_to_num(values.astype(np.float32))
    peak = float(values.max())
    white = 1.0 if peak <= 1 else 255.0 if peak <= 255 else 65535.0
    return np.rint(values.clip(0, white) * (255 / white)).astype(np.uint8)


def _upright(original: Image.Image, picture: Image.Image) -> np.ndarray:
    """The picture, turned as the metadata of the opened file say."""
    picture.info.clear()  # of everything else, which may be damaged
    picture.getexif()[ExifTags.Base.Orientation] = original.getexif().get(ExifTags.Base.Orientation)
    return np.array(ImageOps.exif_transpose(picture))


def _region(pixels: Tensor, crop: Crop) -> tuple[Tensor, int, int]:
    """The part of the photo that the crop covers, and the (left, top) position of its corner."""
    radius = crop.side * (abs(math.sin(crop.angle)) + abs(math.cos(crop.angle))) / 2 + 4 * crop.side / crop.resolution + 4
    rows, columns = pixels_around(crop.center_y, radius, pixels.shape[0]), pixels_around(crop.center_x, radius, pixels.shape[1])
    return pixels[rows, columns], columns.start, rows.start
