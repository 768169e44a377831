"""The Python face: it makes the videos of the command line, of inputs from anywhere, and of sound that is still arriving."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from infer_command import FACE, TINY, babble, pipeline_options, write_files
from PIL import Image
from skimage import data

import sonic
from sonic import AvatarPipeline
from sonic.checkpoint.bundled import BUNDLED
from sonic.cli import Entry, compose, run_command
from sonic.commands import infer_command
from sonic.data.image import load_image
from sonic.geometry import FPS
from sonic.parallel.parallel_config import PlanConfig
from sonic.planner.search import as_json, search_plans

ROOT = Path(__file__).resolve().parents[1]
RATE = 16_000
SECONDS = 1.3  # 32 frames, three blocks
BLOCK = 12  # frames
REAL = {"device": "cpu", "face_box": "[165,70,115,115]", "face.mouth": "[223,160,22]", "run.threads": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A portrait, a recording and weights of the tiny model."""
    return write_files(tmp_path_factory.mktemp("face"), SECONDS)


@pytest.fixture(scope="module")
def pipe(folder) -> AvatarPipeline:
    return AvatarPipeline.from_pretrained("preview", **pipeline_options(folder))


@pytest.fixture(scope="module")
def video(pipe, folder):
    return pipe(folder / "me.png", folder / "me.wav", seed=7)


@pytest.fixture(scope="module")
def real() -> AvatarPipeline:
    """The bundled preview."""
    return AvatarPipeline.from_pretrained(**REAL)


def frames_of(chunks) -> np.ndarray:
    return np.concatenate([np.asarray(chunk.pixels) for chunk in chunks])


def test_the_same_seed_gives_the_bytes_of_the_command_line(video, folder, tmp_path):
    output = tmp_path / "command.mp4"
    argv = [*TINY, *FACE, f"weights={folder / 'weights'}", "run.threads=1", f"image={folder / 'me.png'}", f"audio={folder / 'me.wav'}"]
    argv += ["seed=7", f"output={output}", f"run.folder={tmp_path / 'runs'}"]
    assert run_command(infer_command.ENTRY, infer_command.infer, argv) == 0
    assert video.save(tmp_path / "python.mp4").read_bytes() == output.read_bytes()
    assert video.frames.shape == (round(SECONDS * FPS), 512, 512, 3) and video.frames.dtype == np.uint8 and video.fps == FPS


def test_a_stream_gives_the_frames_of_the_whole_video_in_parts(pipe, video, folder):
    chunks = list(pipe.stream(folder / "me.png", folder / "me.wav", seed=7))
    assert [chunk.start for chunk in chunks] == [0, BLOCK, 2 * BLOCK]
    assert np.array_equal(frames_of(chunks), video.frames)


@pytest.mark.parametrize("kind", ["path", "pil", "array"])
def test_a_picture_counts_the_same_wherever_it_is(kind, pipe, video, folder):
    path = folder / "me.png"
    given = {"path": str(path), "pil": Image.open(path), "array": load_image(path)}[kind]
    assert np.array_equal(pipe(given, folder / "me.wav", seed=7).frames, video.frames)


def test_a_picture_of_pil_is_turned_and_laid_on_white_as_its_file_is(tmp_path):
    from sonic.data.image import image_in_memory

    image = Image.fromarray(np.dstack([data.astronaut(), np.full((512, 512), 90, np.uint8)])[:300])
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    found = image_in_memory(Image.open(tmp_path / "turned.png"))
    assert found.shape == (512, 300, 3) and np.array_equal(found, load_image(tmp_path / "turned.png"))


def test_a_recording_counts_the_same_wherever_it_is(pipe, video, folder):
    sound = babble(SECONDS)
    for given in ((sound, RATE), (torch.from_numpy(sound), RATE), (np.stack([sound, sound], axis=1), RATE)):
        assert np.array_equal(pipe(folder / "me.png", given, seed=7).frames, video.frames)
    whole = (sound * 2**15).round().astype(np.int16)
    assert np.abs(pipe(folder / "me.png", (whole, RATE), seed=7).frames.astype(int) - video.frames).max() <= 1


@pytest.mark.parametrize(("rate", "written"), [(44_100, 44_100), (50_000, 48_000)])
def test_a_video_has_the_sound_at_its_own_rate_or_the_nearest_that_can_be_written(rate, written, pipe, folder, tmp_path):
    sound = np.sin(np.arange(rate // 2) / rate * 2 * np.pi * 440).astype(np.float32) / 2
    found = pipe(folder / "me.png", (sound, rate))
    assert len(found.frames) == 12 and found.audio[1] == rate and np.array_equal(found.audio[0], sound)
    with av.open(found.save(tmp_path / "a.mp4")) as container:
        assert container.streams.audio[0].rate == written
        assert float(container.streams.audio[0].duration * container.streams.audio[0].time_base) == pytest.approx(0.48, abs=0.03)


@pytest.mark.parametrize(("policy", "seconds"), [("trim", 0.3), ("pad", 0.7)])
def test_frames_and_sound_of_a_call_have_the_duration_and_the_size(policy, seconds, pipe, folder):
    sound = babble(0.5, seed=3)
    found = pipe(folder / "me.png", (sound, RATE), duration=seconds, duration_policy=policy, min_resolution=384, expand_ratio=0.2)
    assert found.frames.shape == (round(FPS * seconds), 384, 384, 3)
    count = round(RATE * seconds)
    assert np.array_equal(found.audio[0], np.pad(sound[:count], (0, max(0, count - len(sound)))))


def test_a_generator_that_was_just_seeded_gives_what_its_seed_gives_and_goes_on_from_there(pipe, video, folder):
    generator = torch.Generator().manual_seed(7)
    first, second = (pipe(folder / "me.png", folder / "me.wav", generator=generator).frames for _ in range(2))
    assert np.array_equal(first, video.frames) and not np.array_equal(second, first)


def test_every_step_of_every_block_is_reported_once(pipe, folder):
    for steps, solver in ((3, "euler"), (3, "heun")):
        seen = []
        own = AvatarPipeline.from_pretrained(
            "preview", **{**pipeline_options(folder), "sampler.name": solver, "sampler.sample_steps": steps}
        )
        note = lambda which, step, timestep, kwargs, own=own, seen=seen: seen.append((which is own, kwargs["block"], step, timestep))  # noqa: E731
        own(folder / "me.png", folder / "me.wav", callback_on_step_end=note)
        assert [each[:3] for each in seen] == [(True, block, step) for block in range(3) for step in range(steps)]
        assert [each[3] for each in seen[:3]] == pytest.approx([1000, 857.142857, 600])


def test_what_a_callback_raises_ends_the_video(pipe, folder):
    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe(folder / "me.png", folder / "me.wav", callback_on_step_end=stop)


def test_the_number_of_steps_chooses_the_bundled_student(real):
    assert real.config.sampler.sample_steps == 4
    sound = (babble(0.4), RATE)
    for steps in (1, 2):
        wanted = AvatarPipeline.from_pretrained(**REAL, **{"sampler.sample_steps": steps})("astronaut", sound).frames
        assert np.array_equal(real("astronaut", sound, num_inference_steps=steps).frames, wanted)


def test_an_adapter_that_is_loaded_is_that_of_from_pretrained_and_a_bad_one_changes_nothing(tmp_path):
    sound, adapter = (babble(0.3), RATE), BUNDLED / "preview_1step.safetensors"
    own = AvatarPipeline.from_pretrained(**REAL)
    before = own("astronaut", sound).frames
    (tmp_path / "bad.safetensors").write_bytes(b"no adapter")
    with pytest.raises(ValueError, match="bad.safetensors"):
        own.load_lora(tmp_path / "bad.safetensors")
    assert np.array_equal(own("astronaut", sound).frames, before)
    after = own.load_lora(adapter)("astronaut", sound).frames
    assert np.array_equal(after, AvatarPipeline.from_pretrained(**REAL, lora=adapter)("astronaut", sound).frames)
    assert not np.array_equal(after, before)


def test_to_a_precision_is_as_made_in_it_and_to_an_unknown_one_changes_nothing(folder):
    own, sound = AvatarPipeline.from_pretrained("preview", **pipeline_options(folder)), (babble(0.3), RATE)
    with pytest.raises(ValueError, match="run.dtype=float16 is unknown"):
        own.to(torch.float16)
    made = AvatarPipeline.from_pretrained("preview", torch_dtype=torch.bfloat16, **pipeline_options(folder))
    assert np.array_equal(own.to(torch.bfloat16)(folder / "me.png", sound).frames, made(folder / "me.png", sound).frames)
    assert own.opened.components.dtype == torch.bfloat16


def test_the_plan_is_that_of_the_command(real):
    given = ["model=preview", "sampler.sample_steps=4", "device=cpu", "run.threads=1", "hardware=4x24gb"]
    wanted = as_json(search_plans(compose(Entry("plan", PlanConfig), given)))
    assert json.dumps(as_json(real.plan(hardware="4x24gb"))) == json.dumps(wanted)


WRONG_CALLS = [
    ({"cfg": 3}, "cfg is not an option of a video; choose one of:"),
    ({"num_inference_steps": 0}, "sampler.sample_steps=0 is impossible"),
    ({"num_inference_steps": 2.5}, "sampler.sample_steps=2.5 is not a whole number"),
    ({"seed": -1}, "seed=-1 must lie between 0 and 2"),
    ({"seed": True}, "seed=true is not a whole number"),
    ({"guidance_scale": 99}, "sampler.sample_guide_scale=99.0 must lie between 0 and 30"),
    ({"size": (1, 1)}, "video.size=1x1 is impossible"),
    ({"duration": 9, "duration_policy": "strict"}, "me.wav lasts 1.30 s and video.duration=9: video.duration_policy=strict"),
    ({"audio": (babble(1.0), RATE), "duration": 9, "duration_policy": "strict"}, "audio lasts 1.00 s and video.duration=9"),
    ({"expand_ratio": 1.6}, "a crop of 1.6 sides of the box is face.expand_ratio=0.3"),
    ({"face_box": [1, 2, 3]}, r"face.box=\[1.0, 2.0, 3.0\] is not a rectangle"),
    ({"generator": 7}, "generator is a int"),
    ({"masks": ["a.png"]}, r"face.masks=\['a.png'\]: model=preview moves one face"),
    ({"image": "absent.png"}, "image=absent.png does not exist"),
    ({"image": ""}, "image= is empty"),
    ({"image": np.zeros((200, 200), np.uint8)}, r"image is uint8 \[200, 200\]; give a path"),
    ({"image": np.zeros((20, 200, 3), np.uint8)}, "image is 200x20 px, too small"),
    ({"image": None}, "image is NoneType"),
    ({"audio": "absent.wav"}, "audio=absent.wav does not exist"),
    ({"audio": (babble(0.1), RATE)}, "audio lasts 0.10 s"),
    ({"audio": (np.zeros(9000, np.float32), RATE)}, "audio is silent throughout"),
    ({"audio": (np.full(9000, np.inf, np.float32), RATE)}, "audio holds numbers that are not finite"),
    ({"audio": (np.zeros(9000, np.int64), RATE)}, "audio is int64"),
    ({"audio": (babble(1.0), 0)}, "audio has sample_rate=0"),
    ({"audio": (babble(1.0),)}, r"audio is a tuple of 1; give \(samples, sample_rate\)"),
    ({"audio": iter(())}, "hand an iterator to stream"),
]


@pytest.mark.parametrize(("given", "sentence"), WRONG_CALLS)
def test_a_wrong_call_is_refused_in_one_sentence(given, sentence, pipe, folder):
    with pytest.raises(ValueError, match=sentence):
        pipe(**{"image": folder / "me.png", "audio": folder / "me.wav", **given})


@pytest.mark.parametrize(
    ("model", "given", "sentence"),
    [
        ("previw", {}, "model=previw is unknown; choose one of: preview"),
        ("preview", {"preset": "fastest"}, "preset=fastest is unknown"),
        ("preview", {"sampler.steps": 2}, "sampler.steps is not an option; sampler has"),
        ("preview", {"device": "tpu"}, "run.device=tpu is unknown"),
        ("preview", {"torch_dtype": torch.float16}, "run.dtype=float16 is unknown"),
        ("wan_s2v_14b", {"device": "cpu"}, "model=wan_s2v_14b has no bundled weights"),
        (str(ROOT / "conf"), {}, "is no converted checkpoint"),
    ],
)
def test_a_wrong_pipeline_is_refused_with_the_sentence_of_the_command_line(model, given, sentence):
    with pytest.raises(ValueError, match=sentence):
        AvatarPipeline.from_pretrained(model, **given)


def test_a_folder_of_weights_is_a_model(folder, video):
    given = {name: value for name, value in pipeline_options(folder).items() if name != "weights"}
    own = AvatarPipeline.from_pretrained(folder / "weights", **given)
    assert np.array_equal(own(folder / "me.png", folder / "me.wav", seed=7).frames, video.frames)


def test_a_video_never_takes_the_place_of_what_it_was_made_from(pipe, folder, tmp_path):
    named = tmp_path / "me.mp4"
    named.write_bytes((folder / "me.wav").read_bytes())
    found = pipe(folder / "me.png", named)
    with pytest.raises(ValueError, match="me.mp4 is the file audio=.*me.mp4 that the video is made from"):
        found.save(named)
    with pytest.raises(ValueError, match="is not an MP4"):
        found.save(tmp_path / "a.avi")
    assert [path.name for path in tmp_path.iterdir()] == ["me.mp4"]


def test_a_closed_pipeline_says_so(folder):
    with AvatarPipeline.from_pretrained("preview", **pipeline_options(folder)) as own:
        assert own.leads
    with pytest.raises(ValueError, match="this pipeline is closed"):
        own(folder / "me.png", folder / "me.wav")


# The package


def test_importing_the_package_loads_nothing_and_says_what_there_is():
    script = (
        "import sys, sonic, pydoc; assert not {'torch', 'numpy', 'hydra'} & set(sys.modules); "
        "import sonic.main, sonic.commands.infer_command; assert 'torch' not in sys.modules; "
        "text = pydoc.render_doc(sonic); assert 'from_pretrained' in text and 'AvatarDiT' in text"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, timeout=120)


@pytest.mark.parametrize("name", sonic.__all__)
def test_every_name_of_the_package_is_there(name):
    assert getattr(sonic, name) is not None and name in dir(sonic)


def test_an_unknown_name_of_the_package_lists_the_known():
    with pytest.raises(AttributeError, match="'Pipeline'; it offers AvatarPipeline"):
        sonic.Pipeline  # noqa: B018


def test_only_the_pipeline_puts_the_parts_together():
    random = {"bench/plan_check.py", "check/case.py"}  # time random weights, with a family of their own, and write no video
    users = {"open_components": {"pipeline.py", *random}, "build_components": {"pipeline.py", "inference/batch.py"}}
    found = {name: set() for name in users}
    for path in (ROOT / "sonic").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if alias.name in found:
                        found[alias.name].add(path.relative_to(ROOT / "sonic").as_posix())
    assert found == users
