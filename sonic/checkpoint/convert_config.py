"""The options of the command convert."""

from __future__ import annotations

from dataclasses import dataclass

from sonic.config import CommandConfig, LoraConfig, ModelConfig, names_in, one_of, option, require
from sonic.families import FAMILIES


@dataclass
class ConvertConfig(CommandConfig):
    """Convert published checkpoints to the form that this program loads, or the network that denoises back to the published form."""

    source: str = option(
        "", "the downloaded folder, of Wan2.2-S2V-14B or Sonic; with to=official a converted checkpoint or a denoiser's .safetensors"
    )
    output: str = option("", "the folder to make")
    to: str = option("ready", "ready = the form that this program loads, or official = the transformer or UNet under its published names")
    lora: LoraConfig = option(LoraConfig)
    model: ModelConfig = option(ModelConfig)

    def __post_init__(self) -> None:
        one_of(self.to, names_in("checkpoint.convert.DIRECTIONS"), "to")
        for name in ("source", "output"):
            require(getattr(self, name) != "", f"{name}= is empty; name a folder")
        lora = self.model.lora
        unread = ("weights", self.model.weights, "source"), ("lora.path", lora.path, "lora.path"), ("lora.alpha", lora.alpha, "lora.alpha")
        for name, value, instead in unread:
            require(not value, f"model.{name}={value} is not read by a conversion; write {instead}={value}")
        folder = self.model.speech_weights
        require(not folder, f"model.speech_weights={folder} is not read by a conversion; give it to the commands that use the checkpoint")
        bare = self.to == "ready" and self.model.name in FAMILIES[self.model.family].adapted and not self.lora.path
        require(not bare, f"model={self.model.name} is Wan2.2-S2V with an adapter; add live_avatar=FOLDER, or choose model=wan_s2v_14b")
