"""The families of models by name. The module of a family is imported when it is asked for, so that checks and plans need no torch."""

from __future__ import annotations

from typing import NamedTuple

from sonic.registry import Registry


class FamilyEntry(NamedTuple):
    """What is known of a family before its class is imported: where that is, and the sizes of its autoencoder for the planner.

    `cache` and `workspace` are elements per pixel: what the decoder caches between latent frames, and what it holds while it decodes one,
    its new cache included; `decode_time` is relative to the Wan VAE. `moves_portrait` is true for latents that are the motion of a face:
    zero latents move nothing, and drawn people, whose motion is known, serve as data and as tests. The published weights of the models
    `adapted` are an adapter for another model's. `short_side` is the usual short side in pixels of a model that makes 12.5 frames per
    second, which are interpolated; 0 = all others. `download` is the module that reads the downloaded folder. `workload` is the
    function that describes a video to the planner. `plans` are the names in parallel_config.PLANS of what can divide its network among
    ranks.
    """

    path: str
    about: str
    parameters: int
    cache: int
    workspace: int
    decode_time: float
    moves_portrait: bool = False
    adapted: tuple[str, ...] = ()
    short_side: int = 0
    download: str = "sonic.checkpoint.official"
    workload: str = "sonic.planner.workload:video_workload"
    plans: tuple[str, ...] = ("single", "fsdp", "offload", "pipeline", "context", "zero3")

    @property
    def times_transformer(self) -> bool:
        """Whether its models are published transformers, which bench fit and bench roofline time."""
        return "context" in self.plans and not self.moves_portrait


_PREVIEW = FamilyEntry("sonic.families.preview.Preview", "moves the photograph", 1_686_264, 8, 400, 0.002, moves_portrait=True)
_WAN = FamilyEntry("sonic.families.wan.Wan", "generates the whole picture", 126_892_531, 2366, 5085, 1.0, adapted=("live_avatar_14b",))
_SONIC = FamilyEntry(
    *("sonic.families.sonic_svd.SonicSvd", "denoises windows of frames with a UNet", 97_742_847, 0, 5085, 1.0),
    short_side=512,
    download="sonic.checkpoint.sonic_folder",
    workload="sonic.planner.window_workload:window_workload",
    plans=("single", "windows", "fsdp", "offload"),
)
FAMILIES = Registry("model.family", {"preview": _PREVIEW, "wan": _WAN, "sonic_svd": _SONIC})
