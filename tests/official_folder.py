"""Miniature downloads in the formats of the published ones: official names, random weights, a small tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from sonic.checkpoint import official
from sonic.checkpoint.lora import PUBLISHED as LORA_FILE
from sonic.checkpoint.weights import export
from sonic.config import AudioConfig, ModelConfig, TextConfig, TrunkConfig
from sonic.encoders.text import NAMES, TIED, TextEncoder
from sonic.encoders.wav2vec import Wav2VecEncoder
from sonic.model.dit import AvatarDiT
from sonic.vae.wan_vae import WanAutoencoder, to_diffusers

WIDTH, TEXT, SPEECH_DIM = 48, 24, 16
GIVEN = {
    "_class_name": "WanModel_S2V",
    "dim": WIDTH, "ffn_dim": 64, "num_heads": 2, "num_layers": 2, "freq_dim": 32, "in_dim": 16, "out_dim": 16,
    "eps": 1e-6, "text_len": 12, "audio_dim": SPEECH_DIM, "num_audio_token": 2, "audio_inject_layers": [0], "cond_dim": 16,
}  # fmt: skip
SPEECH = {
    "hidden_size": SPEECH_DIM, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "conv_bias": True,
    "feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_dim": [8] * 7, "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2, "architectures": ["Wav2Vec2ForCTC"],
}  # fmt: skip
FULL = {
    **GIVEN,
    "dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40, "freq_dim": 256, "text_len": 512, "audio_dim": 1024,
    "num_audio_token": 4, "audio_inject_layers": [0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39],
}  # fmt: skip
UMT5 = {
    "vocab_size": 40, "d_model": TEXT, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 3, "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128, "feed_forward_proj": "gated-gelu",
}  # fmt: skip
VAE = {"base_dim": 4, "z_dim": 16}


def tiny_model(**trunk_sizes: int) -> ModelConfig:
    """The config of config.json in our form."""
    sizes = {"hidden_dim": WIDTH, "ffn_dim": 64, "num_heads": 2, "num_layers": 2, "freq_dim": 32}
    trunk = TrunkConfig(patch_size=[1, 2, 2], **{**sizes, **trunk_sizes})
    return ModelConfig(trunk=trunk, audio=AudioConfig(SPEECH_DIM, 3, 2, [0]), text=TextConfig(TEXT, 12), family="wan", resolution=0)


def write_official(folder: Path, seed: int = 0) -> Path:
    """Write a folder like Wan2.2-S2V-14B/."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(GIVEN))
    dit = {name: _random(tensor).bfloat16() for name, tensor in export(AvatarDiT(tiny_model())).items()}
    _shard(dit, folder)
    write_text_encoder(folder / official.TEXT_FILE, UMT5)
    torch.save(_wan_vae(), folder / official.VAE_FILE)
    speech = folder / official.SPEECH
    speech.mkdir()
    (speech / "config.json").write_text(json.dumps(SPEECH))
    (speech / "preprocessor_config.json").write_text(json.dumps({"do_normalize": True, "sampling_rate": 16000}))
    speech_tensors = {f"wav2vec2.{name}": _random(tensor) for name, tensor in Wav2VecEncoder(SPEECH_KEYS).encoder.state_dict().items()}
    save_file(
        {**speech_tensors, "lm_head.weight": torch.zeros(5, SPEECH_DIM), "lm_head.bias": torch.zeros(5)}, speech / "model.safetensors"
    )
    _tokenizer(folder / official.TOKENIZER)
    return folder


def write_lora(folder: Path, rank: int = 2, seed: int = 1, *, tensors: dict[str, Tensor] | None = None) -> Path:
    """Write a folder like LiveAvatar/; `tensors` are those of a transformer other than the tiny one."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True)
    pairs = {}
    for name, tensor in (tensors or export(AvatarDiT(tiny_model()))).items():
        if name.endswith((".q.weight", ".k.weight", ".v.weight", ".o.weight", ".ffn.0.weight", ".ffn.2.weight")):
            module = name.removesuffix(".weight")
            pairs[f"{module}.lora_A.weight"] = torch.randn(rank, tensor.shape[1]).bfloat16()
            pairs[f"{module}.lora_B.weight"] = (0.05 * torch.randn(tensor.shape[0], rank)).bfloat16()
    save_file(pairs, folder / LORA_FILE)
    return folder


def write_text_encoder(file: Path, config: dict) -> None:
    """Write a umT5 encoder under its published names."""
    text = TextEncoder(config).encoder.state_dict()
    text.pop(TIED)
    torch.save({_published(name): _random(tensor).bfloat16() for name, tensor in text.items()}, file)


def write_sparse(tensors: dict[str, Tensor], folder: Path, *, shards: int) -> None:
    """Write bfloat16 shards as sparse files, which take no disk space, and their index."""
    names, weight_map = sorted(tensors), {}
    for number in range(shards):
        file = f"{official.DIT_STEM}-{number + 1:05d}-of-{shards:05d}.safetensors"
        header, end = {}, 0
        for name in names[number::shards]:
            size = 2 * tensors[name].numel()
            header[name] = {"dtype": "BF16", "shape": list(tensors[name].shape), "data_offsets": [end, end + size]}
            weight_map[name] = file
            end += size
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + end)
    (folder / f"{official.DIT_STEM}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


SPEECH_KEYS = {name: value for name, value in SPEECH.items() if name in Wav2VecEncoder.KEYS}


def _random(tensor: Tensor) -> Tensor:
    """The initial tensor plus small noise, so that nothing is zero and every weight affects the video."""
    return tensor + 0.05 * torch.randn_like(tensor) if tensor.is_floating_point() else tensor.clone()


def _shard(tensors: dict[str, Tensor], folder: Path, count: int = 2) -> None:
    names = sorted(tensors)
    weight_map = {}
    for number in range(count):
        file = f"{official.DIT_STEM}-{number + 1:05d}-of-{count:05d}.safetensors"
        some = {name: tensors[name].contiguous() for name in names[number::count]}
        save_file(some, folder / file)
        weight_map |= dict.fromkeys(some, file)
    (folder / f"{official.DIT_STEM}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _published(name: str) -> str:
    """The published name of one of transformers' umT5 tensors."""
    for theirs, ours in NAMES.items():
        for layer in ("0", "1"):
            if name == ours.replace("{i}", layer) + ".weight":
                return theirs.replace("{i}", layer) + ".weight"
    raise KeyError(name)


def _wan_vae() -> dict[str, Tensor]:
    """A VAE under its published names, found by diffusers' own conversion of each name."""
    state = WanAutoencoder(VAE).blocks.state_dict()
    candidates = _published_vae_names()
    where = to_diffusers({name: name for name in candidates})
    return {theirs: _random(state[ours]) for ours, theirs in where.items() if ours in state}


def _published_vae_names() -> list[str]:
    """All names that the published VAE may have, and a few that it does not have."""
    tails = ("residual.0.gamma", "residual.2.weight", "residual.2.bias", "residual.3.gamma", "residual.6.weight", "residual.6.bias",
             "shortcut.weight", "shortcut.bias", "resample.1.weight", "resample.1.bias", "time_conv.weight", "time_conv.bias")  # fmt: skip
    ends = ("weight", "bias")
    names = [f"{conv}.{end}" for conv in ("conv1", "conv2", "encoder.conv1", "decoder.conv1") for end in ends]
    for side, stages in (("encoder", "downsamples"), ("decoder", "upsamples")):
        names += [f"{side}.{stages}.{number}.{tail}" for number in range(16) for tail in tails]
        names += [f"{side}.middle.{number}.{tail}" for number in (0, 2) for tail in tails[:6]]
        names += [f"{side}.middle.1.{part}" for part in ("norm.gamma", *(f"{conv}.{end}" for conv in ("to_qkv", "proj") for end in ends))]
        names += [f"{side}.head.0.gamma", f"{side}.head.2.weight", f"{side}.head.2.bias"]
    return names


def _tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    folder.mkdir(parents=True, exist_ok=True)
    spoken = "a person speaks to the camera calm and bright"
    words = ["<pad>", "</s>", "<unk>", *(f"▁{word}" for word in spoken.split()), *"abcdefghij"]
    tokenizer = Tokenizer(models.Unigram([(word, -float(index)) for index, word in enumerate(words)], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
