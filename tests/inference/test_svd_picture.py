"""The picture of a Sonic video: sides, crop, the mask of the face and the pixels for CLIP."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from sonic.config import VideoConfig
from sonic.data.image import covering
from sonic.inference.fit_picture import wan_video_size
from sonic.inference.svd_picture import CLIP_MEAN, CLIP_STD, SvdPicture, face_square, squeezed
from sonic.types import FaceBox

SIZES = [(501, 703), (703, 501), (1081, 1919), (640, 641), (999, 333)]
FACE = FaceBox(140, 100, 120, 120)


def picture_of_face(width, height, sides=1.1):
    """A black picture with a white square where the mask of FACE is."""
    pixels, grow = np.zeros((height, width, 3), np.uint8), FACE.width * (sides - 1) / 2
    pixels[int(FACE.y - grow) : int(FACE.y + FACE.height + grow), int(FACE.x - grow) : int(FACE.x + FACE.width + grow)] = 255
    return pixels


def sides_of(mask):
    """Height and width of what is white in a mask [1,H,W]."""
    return [int((mask[0].amax(axis) > 0.5).sum()) for axis in (1, 0)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_picture_of_any_size_gets_sides_in_multiples_of_64_and_keeps_its_aspect(size):
    pixels = picture_of_face(*size)
    wide_high = wan_video_size(*size, VideoConfig(min_resolution=384))
    found = SvdPicture.of(pixels, FACE, wide_high)
    assert found.ref.shape == (3, *wide_high[::-1]) and found.face_mask.shape == (1, *wide_high[::-1])
    assert min(wide_high) == 384 and all(side % 64 == 0 for side in wide_high)
    high, wide = sides_of(found.face_mask)
    assert abs(high - wide) <= 1, "a square face has a square mask"
    covered = max(wide_high[0] / size[0], wide_high[1] / size[1])
    assert abs(wide - 132 * covered) <= 2, "the sides of the mask are 1.1 times those of the face"


@pytest.mark.parametrize("upstream", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_mask_is_where_the_face_is_in_the_picture(size, upstream):
    found = SvdPicture.of(picture_of_face(*size), FACE, wan_video_size(*size, VideoConfig(min_resolution=384)), upstream=upstream)
    different = ((found.ref[:1] > 0) != (found.face_mask > 0.5)).sum()
    assert different <= 0.02 * (found.face_mask > 0.5).sum()


def test_only_upstream_squeezes_the_picture():
    size, wide_high = (500, 544), (512, 512)
    high, wide = sides_of(SvdPicture.of(picture_of_face(*size), FACE, wide_high, upstream=True).face_mask)
    assert wide - high >= 8
    high, wide = sides_of(SvdPicture.of(picture_of_face(*size), FACE, wide_high).face_mask)
    assert abs(wide - high) <= 1


def test_without_a_face_the_mask_is_the_whole_picture():
    assert_close(SvdPicture.of(picture_of_face(501, 703), None, (384, 512)).face_mask, torch.ones(1, 512, 384))


def test_clip_sees_the_fitted_picture(rng):
    pixels = torch.randint(0, 256, (301, 203, 3), generator=rng).to(torch.uint8).numpy()
    fitted = torch.from_numpy(squeezed(covering(pixels, 128, 192), 224, 224)).permute(2, 0, 1) / 255
    expected = torch.stack([(fitted[k] - CLIP_MEAN[k]) / CLIP_STD[k] for k in range(3)])
    assert_close(SvdPicture.of(pixels, None, (128, 192)).clip_pixels, expected)


@pytest.mark.parametrize("margin", [0.0, 0.3, 1.0])
def test_the_square_around_a_face_stays_in_the_photograph_and_holds_the_face(margin):
    left, top, right, bottom = face_square(FACE, 300, 260, margin=margin)
    assert right - left == bottom - top and min(left, top) >= 0 and right <= 300 and bottom <= 260
    assert left <= FACE.x and right >= FACE.x + FACE.width and top <= FACE.y and bottom >= FACE.y + FACE.height
