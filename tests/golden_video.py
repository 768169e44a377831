"""Checks of recorded videos of both published pipelines, from a picture and speech features to pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import cycle

import torch
from golden_case import Case, half_precision_rotations, model_of
from golden_speech import pick_frames
from golden_vae import vae_of
from torch import Tensor

from sonic.config import SamplerConfig
from sonic.data.pixels import signed
from sonic.encoders.wav2vec import frame_positions, published_clips
from sonic.geometry import wan_size
from sonic.inference.fit_picture import published_picture
from sonic.inference.generate_wan import EncodedInputs, WanNetworks, generate_blocks_upstream, generate_clips
from sonic.vae.wan_vae import WanAutoencoder


class Noted(WanAutoencoder):
    """The autoencoder, with a record of its calls."""

    def __init__(self, vae: WanAutoencoder) -> None:
        torch.nn.Module.__init__(self)
        self.vae, self.encoded, self.decoded = vae, [], []

    def encode(self, frames, cache=None):
        found, cache = self.vae.encode(frames, cache)
        self.encoded.append(found)
        return found, cache

    def decode(self, latents, cache=None):
        self.decoded.append(latents)
        return self.vae.decode(latents, cache)


def _encode_inputs(case: Case, fps: int) -> EncodedInputs:
    call, inputs = case.call, case.inputs
    states = inputs["feat30"]
    frames = call["infer_frames"] * published_clips(states.shape[1], call["infer_frames"], fps)
    audio = pick_frames(states, frame_positions(frames, fps)).permute(1, 2, 0)[None]
    image = inputs["image"].numpy()
    return EncodedInputs(
        picture=signed(published_picture(image, *wan_size(*image.shape[1::-1], call["max_area"]))),
        text=inputs["context"][None],
        negative=inputs.get("context_null", inputs["context"])[None],
        audio=audio,
        clip_frames=call["infer_frames"],
        seed=call["seed"],
    )


def _check_video(case: Case, parts: Iterable[Tensor]) -> None:
    video = torch.cat(list(parts), dim=2)[0]
    case.close(video[:, :, ::2, ::2], case.outputs["video_half"].float(), strict=False, slack=5e-4)
    case.close(video.mean(dim=(0, 2, 3)), case.outputs["video_frame_mean"])
    case.close(video.std(dim=(0, 2, 3)), case.outputs["video_frame_std"])


def _near(case: Case) -> Callable[[Tensor, Tensor], None]:
    tolerance = case.manifest["tolerance_latents"]
    return lambda found, expected: torch.testing.assert_close(found, expected, atol=tolerance["atol"], rtol=tolerance["rtol"])


def clips(case: Case) -> None:
    """Wan2.2-S2V: whole clips, guided, each continuing from the frames of the last."""
    call, near = case.call, _near(case)
    sampler = SamplerConfig(call["sample_solver"], "unipc", call["sampling_steps"], call["guide_scale"], call["shift"])
    model, vae, encoded = model_of(case), Noted(vae_of(case)), _encode_inputs(case, case.manifest["pipeline"]["fps"])
    _check_video(case, generate_clips(WanNetworks(model, vae), encoded, sampler=sampler, upstream=True))
    near(vae.encoded[0], case.outputs["ref_latents"])
    near(vae.encoded[1], case.outputs["motion_latents_clip1"])
    for index, lead in enumerate((1, vae.encoded[1].shape[2])):
        near(vae.decoded[index][0, :, lead:], case.outputs[f"latents_clip{index}"])
        part = slice(index * call["infer_frames"], (index + 1) * call["infer_frames"])
        near(encoded.audio[..., part], case.outputs[f"audio_input_clip{index}"])


def blocks(case: Case) -> None:
    """Live Avatar on one card: blocks over rolling rings, the reference at the recorded distances."""
    call, near = case.call, _near(case)
    model = model_of(case, window_blocks=call["infer_frames"] // (4 * case.manifest["pipeline"]["frames_per_block"]))
    vae, encoded = Noted(vae_of(case)), _encode_inputs(case, case.manifest["pipeline"]["fps"])
    sampler = SamplerConfig(call["sample_solver"], "twice_shifted", call["sampling_steps"], 1.0)
    with half_precision_rotations():
        distances = cycle(case.manifest["relative_dist"])
        _check_video(case, generate_blocks_upstream(WanNetworks(model, vae), encoded, sampler=sampler, ref_distances=distances))
    near(vae.encoded[0][:, :, 1:], case.outputs["ref_latents"])
    near(vae.encoded[1][:, :, -19:], case.outputs["motion_latents_last19"])
    near(encoded.audio, case.outputs["audio_input"])
    length = call["infer_frames"] // 4
    near(torch.cat([latents[:, :, -length:] for latents in vae.decoded]), case.outputs["latents"])
