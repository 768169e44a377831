"""Recorded numbers of RIFE and of frame counts against the library."""

import torch
from golden_sonic_case import SonicCase

from sonic.inference.decode_windows import doubled, shown_frames
from sonic.vae.rife import UNUSED, Rife, warp


def check(case: SonicCase) -> None:
    if "warped" in case.outputs:
        case.close(warp(case.inputs["image"], case.inputs["flow"]), case.outputs["warped"])
    elif "rows" in case.outputs:
        frame_counts(case)
    elif "video" in case.outputs:
        frames = doubled([case.inputs["video"][0].transpose(0, 1)], network(case), upstream=True)
        case.close(torch.cat(list(frames)).transpose(0, 1)[None], case.outputs["video"])
    else:
        found = network(case)(case.inputs["img0"], case.inputs["img1"])
        case.close(found.middle, case.outputs["middle"])
        if "flow" in case.outputs:
            case.close(found.flow, case.outputs["flow"])
            case.close(found.weight, case.outputs["mask"])


def frame_counts(case: SonicCase) -> None:
    """Frames of the clip for a number of samples, and of the video that the published code makes of them."""
    columns = [list(case.sizes["columns"]).index(name) for name in ("samples_16k", "model_frames_12_5fps", "output_frames")]
    for samples, frames, shown in case.outputs["rows"][:, columns].tolist():
        assert samples // 1280 == frames
        assert shown_frames(frames, upstream=True) == shown


def network(case: SonicCase) -> Rife:
    rife = Rife(case.sizes["c"]).eval()
    rife.load_state_dict({name: tensor for name, tensor in case.weights().items() if not name.startswith(UNUSED)})
    return rife
