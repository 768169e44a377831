"""Recorded numbers of the picture (size rule, crop, mask, CLIP pixels) and of the VAE against the library."""

import torch
from golden_sonic_case import SonicCase
from torch.testing import assert_close

from sonic.inference.svd_picture import SvdPicture, face_square, published_svd_size
from sonic.types import FaceBox
from sonic.vae.svd_vae import SvdAutoencoder


def check(case: SonicCase) -> None:
    if "rows" in case.outputs:
        columns = case.sizes["columns"]
        for row in case.outputs["rows"].tolist():
            (crop if "crop_x1" in columns else size)(dict(zip(columns, row, strict=True)))
    elif "ref_img" in case.outputs:
        picture(case)
    elif "frames" in case.outputs:
        decoded = network(case).decode(case.inputs["latents"][0], chunk=case.sizes["decode_chunk_size"])
        case.close(torch.cat(list(decoded)).transpose(0, 1)[None], case.outputs["frames"])
    else:
        encoded(case)


def size(row: dict) -> None:
    assert published_svd_size(row["w"], row["h"], row["min_resolution"]) == (row["new_w"], row["new_h"])


def crop(row: dict) -> None:
    face = FaceBox(row["x1"], row["y1"], row["x2"] - row["x1"], row["y2"] - row["y1"])
    found = face_square(face, int(row["width"]), int(row["height"]), margin=row["expand_ratio"])
    assert found == tuple(row[f"crop_{name}"] for name in ("x1", "y1", "x2", "y2")), row


def picture(case: SonicCase) -> None:
    pixels = case.inputs["image_uint8_hwc"].numpy()
    wide_high = published_svd_size(*pixels.shape[1::-1], case.sizes["res"])
    found = SvdPicture.of(pixels, FaceBox(*case.inputs["box_xywh"].tolist()), wide_high, upstream=True, mask_sides=case.sizes["area"])
    case.close(found.ref, case.outputs["ref_img"])
    case.close(found.face_mask, case.outputs["face_mask"])
    case.close(found.clip_pixels[:, ::4, ::4], case.outputs["clip_images_every4"])
    per_channel = found.clip_pixels.flatten(1)
    case.close(torch.stack([per_channel.mean(1), per_channel.std(1)]), case.outputs["clip_images_mean_std"])


def encoded(case: SonicCase) -> None:
    autoencoder = network(case)
    mean = autoencoder.encode(case.inputs["image"])
    case.close(autoencoder.blocks.encode(case.inputs["image"]).latent_dist.parameters, case.outputs["moments"])
    case.close(mean, case.outputs["mode"])
    case.close(mean * autoencoder.scaling_factor, case.outputs["ref_latents_scaled"])
    assert_close(torch.stack([torch.zeros_like(mean[0]), mean[0], mean[0]]), case.outputs["cfg_image_latents"].reshape(3, *mean.shape[1:]))


def network(case: SonicCase) -> SvdAutoencoder:
    autoencoder = SvdAutoencoder({name: value for name, value in case.sizes.items() if name != "decode_chunk_size"})
    autoencoder.blocks.load_state_dict(case.weights())
    return autoencoder
