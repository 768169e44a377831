"""The user's own videos for the (small) model that Sonic was published with: latents, a reference, states of the sound, motion buckets."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange
from run_files import read_scalars
from sonic_folder_tiny import golden_checkpoint, golden_folder
from video_files import astronaut, read_frames, speech, talking, write

from sonic.cli import Entry, compose
from sonic.commands import train_command
from sonic.data import own_videos
from sonic.data.clips import ClipDataset, read_index
from sonic.data.data_config import PrecomputeConfig
from sonic.data.face_motion import motion_buckets
from sonic.data.faces import FaceFinder, find_speaker
from sonic.data.image import covering
from sonic.data.precompute import precompute
from sonic.data.segments import Segment, follow_face
from sonic.data.video import frames_at
from sonic.inference.svd_clips import _fitted_face, states_around
from sonic.inference.svd_picture import SvdPicture
from sonic.synthetic import draw_face
from sonic.training.build import run_training
from sonic.training.clip_encoders import build_encoders, clip_hashes

SIDE, FRAMES = 128, 26  # of a clip, at 12.5 a second
LONG = 2 * FRAMES + 1  # frames of a video at 25 a second: a clip, and the frame before it
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("espeakng_loader")
    root = tmp_path_factory.mktemp("videos")
    samples, visemes = speech(1, LONG)
    whole = write(root / "good.mp4", talking(visemes)[:, :200], samples).read_bytes()
    (root / "broken.mp4").write_bytes(whole[: len(whole) // 2])
    return root


def composed(source, clips, *options):
    argv = ["model=sonic_svd", f"checkpoint={golden_folder()}", f"data.source={source}", f"folder={clips}", "workers=0"]
    return compose(Entry("precompute", PrecomputeConfig), [*argv, f"data.size={SIDE}x{SIDE}", f"latent_frames={FRAMES // 2}", *options])


@pytest.fixture(scope="module")
def config(folder, tmp_path_factory):
    made = composed(folder, tmp_path_factory.mktemp("clips"))
    assert precompute(made, build_encoders, clip_hashes) == 1
    return made


def test_a_clip_has_all_that_a_training_reads_and_a_damaged_video_costs_nothing_else(config):
    (entry,) = read_index(Path(config.folder))["clips"]
    assert entry["latent_frames"] == FRAMES and entry["video"] == "good.mp4"
    found = ClipDataset(config.folder)[0, 0]
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {
        "latents": (4, FRAMES, SIDE // 8, SIDE // 8), "image_latents": (4, SIDE // 8, SIDE // 8), "image_embed": (24,),
        "face_mask": (SIDE, SIDE), "token_ticks": (FRAMES, 10, 5, 16), "bucket_ticks": (FRAMES, 50, 16), "buckets": (FRAMES, 2),
    }  # fmt: skip
    window = ClipDataset(config.folder, window=FRAMES - 1)
    starts = [
        next(start for start in (0, 1) if torch.equal(window[0, seed]["latents"], found["latents"][:, start:][:, : FRAMES - 1]))
        for seed in range(8)
    ]
    assert set(starts) == {0, 1}
    for name in ("token_ticks", "bucket_ticks", "buckets"):
        assert all(torch.equal(window[0, seed][name], found[name][start : start + FRAMES - 1]) for seed, start in enumerate(starts)), name
    lines = [json.loads(line) for line in (Path(config.folder) / "report.jsonl").read_text().splitlines()]
    assert [(line["video"], line["kept"]) for line in lines] == [("broken.mp4", False), ("good.mp4", True)]


def test_latents_are_those_of_every_other_frame_and_of_the_frame_whose_mouth_is_closed(config, folder):
    found, checkpoint = ClipDataset(config.folder)[0, 0], golden_checkpoint()
    pictures = [covering(frame, SIDE, SIDE) for frame in islice(frames_at(folder / "good.mp4", 25), 1, LONG)]
    vae = checkpoint.autoencoder(CPU, torch.float32)
    signed = rearrange(torch.from_numpy(np.stack(pictures)), "f h w c -> f c h w").float() / 127.5 - 1
    wanted = vae.encode(signed)
    torch.testing.assert_close(found["latents"], 0.18215 * rearrange(wanted[::2], "f c h w -> c f h w"), atol=2e-3, rtol=2e-3)
    (reference,) = [k for k, latents in enumerate(wanted) if torch.allclose(found["image_latents"], latents, atol=5e-3, rtol=2e-3)]
    face = find_speaker(pictures[reference], FaceFinder()).box
    picture = SvdPicture.of(pictures[reference], face, (SIDE, SIDE))
    embed = checkpoint.image_encoder(CPU, torch.float32)(picture.clip_pixels[None])[0]
    torch.testing.assert_close(found["image_embed"], embed, atol=2e-3, rtol=2e-3)
    both = torch.minimum(found["face_mask"], picture.face_mask[0]).sum()
    assert both / torch.maximum(found["face_mask"], picture.face_mask[0]).sum() > 0.85 and found["face_mask"].mean() < 0.5


def test_a_flash_and_a_click_at_the_same_time_meet_in_the_same_frame(tmp_path, monkeypatch):
    """Frame 10 of the clip is frame 21 of the video, since the clip begins with the second one and takes every other one."""
    monkeypatch.setattr(own_videos, "checked_sync", lambda group, config, fps: group)
    (tmp_path / "videos").mkdir()
    pixels, (here, later) = np.repeat(astronaut()[None], LONG, 0), np.zeros((2, LONG * 640), np.float32)
    pixels[21, :48, :48] = 255
    here[21 * 640], later[45 * 640] = 0.9, 0.9
    write(tmp_path / "videos/flash.mp4", pixels, here)
    made = composed(tmp_path / "videos", tmp_path / "clips")
    monkeypatch.setattr(own_videos, "load_soundtrack", lambda path: here)  # AAC spreads a click
    assert precompute(made, build_encoders) == 1
    clip = ClipDataset(made.folder)[0, 0]
    corner = clip["latents"][:, :, :2, :2]
    flash = (corner - corner.median(1, keepdim=True).values).square().sum((0, 2, 3))
    assert int(flash.argmax()) == 10 and flash[10] > 100 * torch.cat((flash[:10], flash[11:])).max()
    other = states_around(golden_checkpoint().speech(CPU).states(later), Segment(1, 2 * FRAMES))
    change = (clip["token_ticks"] - other["token_ticks"])[:, :, 0].square().sum(2)  # the first state knows no attention
    assert int(change[10].argmax()) in (3, 4) and change[5].max() < 0.01 * change[10].max()
    assert (change[9].argmax() - change[10].argmax(), change[10].argmax() - change[11].argmax()) == (4, 4)


def test_states_are_those_around_each_frame_and_zeros_where_there_is_no_sound():
    states = 1 + torch.arange(60.0).view(60, 1, 1).expand(60, 5, 2)  # tick t holds t + 1
    found = states_around(states, Segment(3, 28))
    for frame, window in enumerate(found["token_ticks"][..., 0, 0].tolist()):
        start = 2 * (3 + 2 * frame)
        assert window == [t + 1 if 0 <= t < 60 else 0 for t in range(start - 4, start + 6)]
    for frame, window in enumerate(found["bucket_ticks"][..., 0].tolist()):
        start = 2 * (3 + 2 * frame)
        assert window == [t + 1 if 0 <= t < 60 else 0 for t in range(start - 24, start + 26)]


def test_shards_are_kept_until_another_vae_or_speech_encoder_made_them(config, monkeypatch):
    state = lambda: {path.name: path.stat().st_mtime_ns for path in Path(config.folder).glob("*.safetensors")}  # noqa: E731
    before = state()
    assert precompute(config, build_encoders, clip_hashes) == 1 and state() == before
    hashes = clip_hashes(config)
    assert all(hashes.values()) and {name: read_index(Path(config.folder))[name] for name in hashes} == hashes
    ClipDataset(config.folder).check(config.model, lambda model: hashes)
    with pytest.raises(ValueError, match="another speech encoder"):
        ClipDataset(config.folder).check(config.model, lambda model: {**hashes, "speech_hash": "0"})


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("latent_frames=12", "clips of 24 frames at 12.5 a second: model=sonic_svd denoises windows of 25; use latent_frames=13"),
        ("data.size=208x208", "multiples of 64 for model=sonic_svd; use 512x512"),
        ("data.source=", "name a folder of them as data.source=FOLDER"),
    ],
)
def test_clips_that_the_model_cannot_learn_from_are_refused(option, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        build_encoders(composed(tmp_path, tmp_path, option))


def buckets_of(path, pixels):
    frames, finder = list(read_frames(write(path, pixels, None))), FaceFinder()
    return motion_buckets(follow_face(frames, find_speaker(frames[len(frames) // 2], finder), finder))


def test_a_moving_head_raises_the_first_bucket_and_a_talking_mouth_the_second(tmp_path, monkeypatch):
    pytest.importorskip("espeakng_loader")
    still = np.repeat(astronaut()[None], 40, 0)
    noise = np.random.default_rng(0).normal(0, 6, still.shape)
    assert not buckets_of(tmp_path / "still.mp4", (still + noise).clip(0, 255).astype(np.uint8)).any()
    sway = np.stack([np.roll(astronaut(), round(6 * np.sin(k / 4)), axis=1) for k in range(40)])
    head, expression = buckets_of(tmp_path / "sway.mp4", sway).T  # by 6 px, of the 47 px between the eyes
    assert head.min() > 30 and head.max() < 150 and expression.max() < 5
    monkeypatch.setattr(draw_face, "head_motion", lambda rng, length, strength: torch.zeros(length, 4))
    head, expression = buckets_of(tmp_path / "talk.mp4", talking(speech(1, 40)[1])).T
    assert head.max() < 3 and expression.min() > 5 and expression.max() < 60


def test_the_face_of_a_wide_video_lies_where_the_fitted_frames_show_it():
    wide, finder = np.zeros((260, 400, 3), np.uint8), FaceFinder()
    wide[:, 70:330] = astronaut()
    seen = find_speaker(wide, finder)
    segment = Segment(1, 1, pixels=torch.zeros(2, SIDE, SIDE, 3), landmarks=[seen.landmarks], size=(400, 260))
    fitted, direct = _fitted_face(segment, 0), find_speaker(covering(wide, SIDE, SIDE), finder).box
    assert np.allclose([fitted.x, fitted.y, fitted.width], [direct.x, direct.y, direct.width], atol=3)


def test_the_audio_recipe_trains_on_the_clips(config, tmp_path):
    small = ["budget.max_steps=1", "budget.accumulate=1", "speed.device=cpu", "speed.workers=0", "speed.precision=float32"]
    quiet = ["log.bar=false", "log.every_steps=1", "log.validation_every=0", "data.validation_share=0", "export="]
    where = [f"data.folder={config.folder}", f"checkpoint={golden_folder()}"]
    run_training(compose(train_command.ENTRY, ["+train=sonic_svd_audio", *small, *quiet, *where]), tmp_path / "run")
    (line,) = read_scalars(tmp_path / "run")
    assert line["student/v_error"] > 0
