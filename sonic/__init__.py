"""Talking video from one portrait and one recording: the Wan2.2-S2V family, from a laptop preview to sharded 14B.

    from sonic import AvatarPipeline

    pipe = AvatarPipeline.from_pretrained("preview")  # or a folder made by `sonic convert`
    pipe(image="me.jpg", audio="me.wav", num_inference_steps=2, seed=7).save("me.mp4")
    for chunk in pipe.stream(image="me.jpg", audio=microphone):  # frames as soon as they are decoded
        show(chunk.pixels)

AvatarDiT is the transformer, ModelConfig its sizes, SAMPLERS the solvers by name, and parallelize builds the transformer under a plan on
this rank; load_plugins imports modules that register variants of one's own. `AvatarPipeline.from_pretrained(NAME).config` is the whole
config of a model with weights; `ModelConfig()` and `InferConfig()` alone have plain defaults, for which there are none. Each is imported
when it is first asked for: `import sonic` alone loads nothing.
"""

import os
from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {  # name -> (module, name there)
    "AvatarPipeline": ("sonic.pipeline", "AvatarPipeline"),
    "Video": ("sonic.pipeline", "Video"),
    "AvatarDiT": ("sonic.model.dit", "AvatarDiT"),
    "ModelConfig": ("sonic.config", "ModelConfig"),
    "SAMPLERS": ("sonic.sampling.samplers", "SAMPLERS"),
    "load_plugins": ("sonic.plugins", "load_plugins"),
    "parallelize": ("sonic.parallel.parallelize", "build_parallel_model"),
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sonic' has no attribute '{name}'; it offers {', '.join(_HOMES)}")
    module, there = _HOMES[name]
    return getattr(import_module(module), there)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])


if "SONIC_PLUGINS" in os.environ:  # set by load_plugins for the processes that it starts
    import_module("sonic.plugins").import_inherited()
