"""Options for running on several devices, or on one that is too small. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import gcd
from typing import NamedTuple

from sonic.config import CommandConfig, DecodeConfig, ModelConfig, RunConfig, SamplerConfig, VideoConfig, settled_video
from sonic.families import FAMILIES
from sonic.parallel.shard_units import UNITS
from sonic.registry import one_of, option, require


class PlanCode(NamedTuple):
    """The parts of a plan, by their names in the modules that hold them: the table can be read without torch.

    `parallelizer` is a name in parallel/parallelize.py, `estimate` in planner/plans.py, `tracker` in planner/track.py; without a tracker
    the memory is only estimated. `one_rank`: each copy of the model is on one rank; `optional`: it needs an optional package.
    """

    parallelizer: str
    estimate: str
    tracker: str = ""
    one_rank: bool = False
    optional: bool = False


PLANS: Mapping[str, PlanCode] = {  # by parallel.name
    "single": PlanCode("WHOLE_MODEL", "whole_model", "equal_ranks", one_rank=True),
    "fsdp": PlanCode("SHARDED", "sharded", "equal_ranks"),
    "offload": PlanCode("OFFLOADED", "offloaded", "offloaded", one_rank=True),
    "pipeline": PlanCode("STAGES", "stages", "stages"),
    "context": PlanCode("WHOLE_MODEL", "whole_model", "equal_ranks"),
    "windows": PlanCode("WHOLE_MODEL", "whole_model", "equal_ranks"),
    "zero3": PlanCode("ZERO3", "zero3", optional=True),
}
PLAN_NAMES = tuple(PLANS)
SINGLE_RANK_PLANS = tuple(name for name, plan in PLANS.items() if plan.one_rank)
STORES = ("pinned", "mmap")
KV_DEVICES = ("device", "host")
LINKS = ("nvlink", "pcie", "host", "none")
NVLINKED = 8  # devices that NVLink joins in a machine
MESSAGES = 2  # activations buffered between two stages of a pipeline: one received, one not sent yet


@dataclass
class OffloadConfig:
    """Offloading of block weights to host memory: how much stays on the device, and how many blocks are loaded at a time."""

    resident_gib: float = option(-1.0, "GiB of block weights that stay on the device; -1 = what fits")
    slots: int = option(2, "blocks whose weights are loaded to the device at a time: the one in use and those that follow it")
    inflight: int = option(0, "items (block of the video, step) that share each pass over the weights; 0 = one per sampling step")
    store: str = option("pinned", "where offloaded weights are: pinned (host memory) or mmap (mapped from the file)")
    kv: str = option("device", "where the KV caches are: device or host")

    def __post_init__(self) -> None:
        resident, slots, inflight = self.resident_gib, self.slots, self.inflight
        require(resident == -1 or resident >= 0, f"offload.resident_gib={resident}: need 0 or more, or -1 for what fits")
        require(slots >= 1, f"offload.slots={slots}: need at least 1; 2 lets copying hide behind computing")
        require(inflight >= 0, f"offload.inflight={inflight}: need 1 or more, or 0 for one per sampling step")
        one_of(self.store, STORES, "offload.store")
        one_of(self.kv, KV_DEVICES, "offload.kv")


@dataclass
class ParallelConfig:
    """How the transformer is distributed over ranks. Degrees of -1 take the ranks that the others leave."""

    name: str = option("auto", f"auto (the planner chooses), {', '.join(PLAN_NAMES)}")
    context: int = option(1, "ranks that share the tokens of each frame; combines with fsdp and pipeline")
    replicas: int = option(1, "groups of ranks that hold the model each: HSDP over nodes, or requests side by side")
    vae_rank: bool | None = option(None, "the last rank of a pipeline has the VAE and no layers; empty = where that is faster")
    layers: list[int] | None = option(None, "blocks of each stage of a pipeline; empty = divided as equally as possible")
    unshard_unit: str = option("sublayer", f"what fsdp gathers at a time: {', '.join(UNITS)}")
    prefetch: int = option(1, "units that fsdp gathers ahead of the one in use")
    reshard: bool = option(True, "fsdp frees a unit's gathered weights after use")
    cpu_offload: bool = option(False, "fsdp and zero3 store their shards, windows its weights, in host memory")
    timeout_s: float = option(45.0, "seconds without a heartbeat of a rank after which the job is stopped")
    offload: OffloadConfig = option(OffloadConfig)

    def __post_init__(self) -> None:
        one_of(self.name, ("auto", *PLAN_NAMES), "parallel.name")
        one_of(self.unshard_unit, list(UNITS), "parallel.unshard_unit")
        for degree in ("context", "replicas"):
            value = getattr(self, degree)
            require(value == -1 or value >= 1, f"parallel.{degree}={value}: need 1 or more, or -1 for the ranks that are left")
        require(self.context != -1 or self.replicas != -1, "parallel.context=-1 and parallel.replicas=-1: only one can take what is left")
        require(
            not self.vae_rank or self.name in ("auto", "pipeline"),
            f"parallel.vae_rank=true goes with parallel=pipeline; under parallel={self.name} leave it out",
        )
        require(
            not self.vae_rank or self.context == 1, "parallel.vae_rank=true needs a rank that shares no tokens: leave parallel.context at 1"
        )
        require(all(size >= 0 for size in self.layers or []), f"parallel.layers={self.layers}: a stage has 0 blocks or more")
        require(0 <= self.prefetch <= 16, f"parallel.prefetch={self.prefetch} must lie between 0 and 16; 1 is usual")
        require(1 <= self.timeout_s <= 3600, f"parallel.timeout_s={self.timeout_s} must lie between 1 and 3600")


@dataclass(kw_only=True)
class DeviceConfig:
    """A device. Rates (gbps) are for one direction, in 10^9 bytes per second."""

    memory_gib: float = option(0.0, "GiB of memory on a device; 0 = unknown")
    usable_gib: float = option(12.0, "GiB of a device's memory that a process can use")
    reserve_gib: float = option(0.5, "GiB of usable_gib for workspaces, communication and fragmentation")
    tflops: float = option(1.0, "nominal 10^12 operations per second of a device, bfloat16 without sparsity")
    efficiency: float = option(0.6, "share of tflops that a transformer reaches")
    memory_gbps: float = option(50.0, "rate of device memory")
    host_gbps: float = option(20.0, "rate from host memory to a device")
    disk_gbps: float = option(3.0, "rate from the disk to a device")


@dataclass
class HardwareConfig(DeviceConfig):
    """One machine, or several equal ones, with equal devices: a rank for each device."""

    name: str = option("cpu", "one of the files in conf/hardware")
    devices: int = option(1, "number of devices in a machine; 0 = all that hardware=here finds")
    nodes: int = option(1, "number of machines")
    link: str = option("none", "connection between the devices of a machine: nvlink, pcie (direct), host (through host memory) or none")
    link_gbps: float = option(10.0, "rate between two devices of a machine")
    node_link_gbps: float = option(10.0, "rate from a machine to another one, over all its network adapters together")
    host_gib: float = option(14.0, "GiB of host memory of a machine that the job may use")

    def __post_init__(self) -> None:
        one_of(self.link, LINKS, "hardware.link")
        devices, name, memory, usable = self.devices, self.name, self.memory_gib, self.usable_gib
        require((0 if name == "here" else 1) <= devices <= 4096, f"hardware.devices={devices}: need 1 to 4096")
        require(1 <= self.nodes <= 4096, f"hardware.nodes={self.nodes}: need 1 to 4096")
        for rate in ("usable_gib", "tflops", "memory_gbps", "link_gbps", "node_link_gbps", "host_gbps", "host_gib", "disk_gbps"):
            require(getattr(self, rate) > 0, f"hardware.{rate}={getattr(self, rate)}: need more than 0")
        require(0 <= self.reserve_gib < usable, f"hardware.reserve_gib={self.reserve_gib} must lie between 0 and usable_gib={usable}")
        require(0 < self.efficiency <= 1, f"hardware.efficiency={self.efficiency} must lie between 0 and 1")
        larger = "choose the file of a larger card, whose speeds are others, or give hardware.memory_gib too"
        require(not memory or usable <= memory, f"hardware.usable_gib={usable} is more than the {memory:g} GiB of {name}; {larger}")
        linked, ways = devices <= 1 or self.link != "none" or name == "here", "hardware.link=pcie, host or nvlink and hardware.link_gbps"
        require(linked, f"hardware.devices={devices} and hardware.link=none: {name} says of no link between devices; give {ways}")
        several = f"use hardware.devices={NVLINKED} hardware.nodes={-(-devices // NVLINKED)}"
        joined = self.link != "nvlink" or devices <= NVLINKED or name == "here"
        require(joined, f"hardware.devices={devices}: NVLink joins {NVLINKED} devices in a machine; {several}")

    @property
    def ranks(self) -> int:
        """Number of devices in all machines together."""
        return self.devices * self.nodes

    def part(self, ranks: int) -> HardwareConfig:
        """The hardware of `ranks` neighbouring devices; those that are not whole machines, nor inside one, count as spread over more."""
        devices = gcd(ranks, self.devices)
        return replace(self, devices=devices, nodes=ranks // devices)


def check_plan(parallel: ParallelConfig, model: ModelConfig) -> None:
    """Raise ValueError for a plan that cannot divide the network of this model's family, or a share of tokens that it does not have."""
    own = FAMILIES[model.family].plans
    sentence = f"parallel={parallel.name} does not divide model={model.name}; use parallel=auto, {', '.join(own[:-1])} or {own[-1]}"
    require(parallel.name in ("auto", *own), sentence)
    shared = parallel.context == 1 or "context" in own
    require(shared, f"parallel.context={parallel.context}: model={model.name} has no tokens that ranks can share; leave it at 1")


@dataclass
class PlanConfig(CommandConfig):
    """What fits on which hardware, how fast it can be, and why: of a video, or with +train=NAME or +distill=NAME of a recipe's training."""

    verify: bool = option(False, "run the chosen plan on fake tensors and ranks, and compare its memory with the estimate")
    json: str = option("", "JSON file to write the plans to")
    run: RunConfig = option(RunConfig)
    model: ModelConfig = option(ModelConfig)
    hardware: HardwareConfig = option(HardwareConfig)
    parallel: ParallelConfig = option(ParallelConfig)
    sampler: SamplerConfig = option(SamplerConfig)
    video: VideoConfig = option(VideoConfig)
    decode: DecodeConfig = option(DecodeConfig)

    def __post_init__(self) -> None:
        check_plan(self.parallel, self.model)
        self.video, self.model = settled_video(self.video, self.model)
