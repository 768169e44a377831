"""Speech encoders from downloaded folders: what they give is what transformers gives, and what does not fit is one sentence."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from infer_command import babble
from run_files import save_weights
from speech_folders import LAYERS, TINY, WIDTH, write_speech_folder
from torch.testing import assert_close

from sonic.checkpoint.convert_config import ConvertConfig
from sonic.checkpoint.speech_weights import open_speech_encoder, speech_hash
from sonic.config import AudioConfig, ModelConfig, RolloutConfig
from sonic.encoders.hidden_states import states_at
from sonic.encoders.speech import SPEECH_ENCODERS

CPU = torch.device("cpu")


def model_of(name, folder="", *, layers=LAYERS, width=WIDTH, **more):
    return ModelConfig(speech_encoder=name, speech_weights=str(folder), audio=AudioConfig(width, layers, 2, [0]), **more)


def opened(name, folder):
    return open_speech_encoder(model_of(name, folder), {})(CPU)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """A tiny encoder of every name."""
    folder = tmp_path_factory.mktemp("speech")
    for name in TINY:
        write_speech_folder(folder / name, name)
    torch.manual_seed(0)
    return {"logmel": SPEECH_ENCODERS["logmel"]().eval(), **{name: opened(name, folder / name) for name in TINY}}


@torch.no_grad()
def states_of_transformers(folder, name, network, sound):
    """All hidden states as transformers computes them from the files and by its own preparation of the sound."""
    if name == "whisper":
        extractor = transformers.WhisperFeatureExtractor(feature_size=network.config.num_mel_bins)
        encoder = transformers.WhisperModel.from_pretrained(folder).eval().get_encoder()
        inputs = extractor(sound, sampling_rate=16_000, return_tensors="pt").input_features
    else:
        inputs = transformers.Wav2Vec2FeatureExtractor(do_normalize=True)(sound, sampling_rate=16_000, return_tensors="pt").input_values
        encoder = getattr(transformers, f"{TINY[name][0]}Model").from_pretrained(folder).eval()
    out = encoder(inputs, output_hidden_states=True)
    return torch.cat([*out.hidden_states[:-1], out.last_hidden_state]), out.hidden_states[-1]


@pytest.mark.parametrize(
    ("name", "head", "changes"),
    [
        ("hubert", "Model", {}),
        ("hubert", "ForCTC", {}),
        ("hubert", "Model", {"do_stable_layer_norm": False, "feat_extract_norm": "group", "conv_bias": False}),  # as hubert-base
        ("wav2vec2", "ForCTC", {}),
        ("whisper", "Model", {}),
        ("whisper", "ForConditionalGeneration", {"num_mel_bins": 128}),  # as whisper-large-v3
    ],
)
def test_features_are_the_hidden_states_of_transformers(tmp_path, name, head, changes):
    network, sound = write_speech_folder(tmp_path, name, head=head, **changes), babble(2.0)
    wanted, listed = states_of_transformers(tmp_path, name, network, sound)
    encoder = opened(name, tmp_path)
    found = encoder.encode_audio(sound, 50)
    positions = encoder.positions(50, 25, encoder.num_states(len(sound)))
    assert found.shape == (LAYERS, WIDTH, 50) and len(positions) >= 49
    assert_close(found[..., : len(positions)], states_at(wanted, positions), atol=1e-5, rtol=1e-4)
    normed_last = name != "whisper" and encoder.encoder.config.do_stable_layer_norm  # whose list ends before the last norm
    assert torch.equal(wanted[-1:], listed) != normed_last


@pytest.mark.parametrize("name", ["hubert", "whisper"])
def test_a_frame_has_the_states_of_its_time(encoders, name):
    assert encoders[name].positions(4, 25).tolist() == [0, 2, 4, 6]
    assert encoders[name].positions(4, 16).tolist() == [0, 3.125, 6.25, 9.375]
    assert encoders[name].positions(40, 25, total=50).tolist() == list(range(0, 50, 2))  # later frames are after the end


def test_a_recording_longer_than_whisper_reads_at_once_has_the_states_of_overlapping_windows(encoders):
    encoder, sound = encoders["whisper"], babble(49.0)
    found = encoder.encode_audio(sound, 49 * 25)
    for first, start, stop in ((0, 0, 22), (18, 22, 44), (40, 44, 49)):  # seconds: of the window, and of what is kept of it
        states = encoder.hidden_states(torch.from_numpy(sound[first * 16_000 : (stop + 4) * 16_000]))
        wanted = states[:, 50 * (start - first) : 50 * (stop - first) : 2].mT
        assert_close(found[..., 25 * start : 25 * stop], wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", SPEECH_ENCODERS)
def test_a_live_block_depends_on_no_sound_before_its_context(encoders, name):
    encoder, frames = encoders[name], range(150, 162)
    held = babble(frames.stop / 25 + encoder.look_ahead_s)
    inside = round((frames.start / 25 - encoder.context_s) * 50) * 320
    found = encoder.encode_block(held, frames, start=0)
    assert found.shape == (encoder.num_layers, encoder.width, 12)
    pieces = held[:inside].reshape(-1, 320)
    mixed = np.concatenate([pieces[::-1].ravel(), held[inside:]])  # as loud as before
    assert_close(encoder.encode_block(mixed, frames, start=0), found, atol=1e-4, rtol=1e-3)
    quiet = held.copy()
    quiet[inside + 3200 : inside + 19_200] = 0
    assert (encoder.encode_block(quiet, frames, start=0) - found).abs().max() > 1e-2
    assert_close(encoder.encode_block(held[3200:], frames, start=3200), found, atol=0.2, rtol=0.1)  # only its loudness is of other sound


@pytest.mark.parametrize("name", ["logmel", "hubert", "whisper"])
def test_a_live_block_of_a_short_recording_has_the_features_of_the_recording(encoders, name):
    encoder, sound = encoders[name], babble(1.3)
    assert_close(encoder.encode_block(sound, range(12), start=0), encoder.encode_audio(sound, 33)[..., :12], atol=1e-4, rtol=1e-3)


def test_the_hash_is_that_of_the_weights_and_of_nothing_else(tmp_path):
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        write_speech_folder(tmp_path / name, "hubert", seed=seed)
    one, same, other = (speech_hash(model_of("hubert", tmp_path / name), {}) for name in ("one", "same", "other"))
    assert len(one) == 16 and one == same != other
    assert speech_hash(model_of("hubert"), {"logmel": tmp_path}) == ""  # without weights


def test_a_folder_with_pickled_tensors_or_shards_is_read_too(tmp_path):
    network = write_speech_folder(tmp_path, "hubert")
    wanted = opened("hubert", tmp_path).encode_audio(babble(1.0), 25)
    (tmp_path / "model.safetensors").unlink()
    torch.save(network.state_dict(), tmp_path / "pytorch_model.bin")
    assert torch.equal(opened("hubert", tmp_path).encode_audio(babble(1.0), 25), wanted)
    (tmp_path / "pytorch_model.bin").unlink()
    network.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert torch.equal(opened("hubert", tmp_path).encode_audio(babble(1.0), 25), wanted)
    assert len(speech_hash(model_of("hubert", tmp_path), {})) == 16


def refused(model, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        open_speech_encoder(model, {})
    assert "\n" not in str(error.value)


def test_an_encoder_that_does_not_fit_is_refused_in_one_sentence(tmp_path):
    write_speech_folder(tmp_path, "hubert")
    refused(model_of("hubert", tmp_path, width=160), "gives 3 hidden layers of width 16, model=preview reads 3 of width 160; .*_dim=16")
    refused(model_of("hubert", tmp_path, layers=1), "reads 1 of width 16; .*num_audio_layers=3")
    refused(model_of("wav2vec2", tmp_path), "holds hubert, not wav2vec2; name the folder of a wav2vec2, or choose another")
    refused(model_of("whisper"), "model=preview has no weights of speech_encoder=whisper; name them as model.speech_weights=PATH, a folder")
    refused(model_of("whisper", tmp_path / "none"), "none.config.json does not exist")
    refused(model_of("logmel", tmp_path / "none", layers=1, width=160), "none do not exist; give the path of a safetensors file")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    refused(model_of("hubert", tmp_path, layers=4), r"tensor hubert.encoder.layers.2\S+ of the speech encoder is missing")


def test_the_previews_own_encoder_is_for_25_frames_a_second(tmp_path):
    file = tmp_path / "speech.safetensors"
    save_weights(SPEECH_ENCODERS["logmel"](), file)
    fits = model_of("logmel", file, layers=1, width=160)
    assert open_speech_encoder(fits, {})(CPU).encode_audio(babble(1.0), 25).shape == (1, 160, 25)
    other = model_of("logmel", file, layers=1, width=160, rollout=RolloutConfig(fps=16))
    refused(other, "speech_encoder=logmel gives features of 25 video frames a second, model=preview makes 16; use another")


def test_a_conversion_refuses_weights_of_a_speech_encoder():
    with pytest.raises(ValueError, match="model.speech_weights=me is not read by a conversion; give it to the commands"):
        ConvertConfig(source="a", output="b", model=ModelConfig(name="wan_s2v_14b", family="wan", speech_weights="me"))


def test_the_encoder_of_the_page_on_extending_gives_a_live_block_what_it_gives_a_recording():
    page = (Path(__file__).parents[2] / "docs/extending.md").read_text()
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "SpeechEncoder)" in block)
    names = {}
    exec(code, names)  # noqa: S102
    encoder, sound = names["Envelope"](), babble(2.0)
    whole = encoder.encode_audio(sound, 50)
    assert whole.shape == (1, 1, 50) and torch.equal(encoder.encode_block(sound[3200:], range(24, 36), start=3200), whole[..., 24:36])
