"""Several ranks, one film: the first rank does what a single one would do, the others walk along until they are dismissed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, nullcontext
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sonic.config import SamplerConfig
from sonic.infer.rollout import Draws, rollout, sample_clip
from sonic.model.dit import AvatarDiT
from sonic.parallel.pipeline import serve, stop
from sonic.parallel.spread import Company
from sonic.types import BlockSpan, Conditions, LatentBlock

CPU = torch.device("cpu")


class Take(NamedTuple):
    """What ranks must know to walk the same way: blocks over `spans`, or one clip of so many latent frames."""

    told: tuple[Conditions, Conditions | None]
    sampler: SamplerConfig
    random: Tensor
    spans: Sequence[BlockSpan] = ()
    latent_frames: int = 0


def rollout_together(
    model: AvatarDiT,
    conditions: Conditions,
    spans: Iterable[BlockSpan],
    *,
    sampler: SamplerConfig,
    draws: Draws,
    unguided: Conditions | None = None,
) -> Iterator[LatentBlock]:
    """`rollout` by all ranks that share the model, as far as somebody wants it."""
    spans = list(spans)
    if _alone(model):
        yield from rollout(model, conditions, spans, sampler=sampler, draws=draws, unguided=unguided)
        return
    if draws.noise or draws.ref_position:
        raise ValueError("video.compat=upstream draws what other ranks cannot know; use parallel=single or parallel=pipeline with it")
    _tell(model, Take((conditions, unguided), sampler, draws.generator.get_state(), spans))
    with closing(rollout(model, conditions, spans, sampler=sampler, draws=draws, unguided=unguided)) as blocks:
        while _agree(model, go_on=True) and (block := next(blocks, None)) is not None:
            try:
                yield block
            except BaseException:  # nobody wants the rest; an error inside the rollout is not told, because nobody listens then
                _agree(model, go_on=False)
                raise


def clip_together(
    model: AvatarDiT,
    conditions: Conditions,
    latent_frames: int,
    *,
    sampler: SamplerConfig,
    generator: torch.Generator,
    unguided: Conditions | None = None,
) -> Tensor:
    """`sample_clip` by all ranks that share the model."""
    if _company(model).world.stages > 1:
        raise ValueError(
            "parallel=pipeline runs films block by block; a clip with full attention is one forward after the other, "
            "so ranks would wait for each other: use parallel=fsdp with parallel.context=-1"
        )
    if not _alone(model):
        _tell(model, Take((conditions, unguided), sampler, generator.get_state(), latent_frames=latent_frames))
    return sample_clip(model, conditions, latent_frames, sampler=sampler, generator=generator, unguided=unguided)


def follow(model: AvatarDiT, dtype: torch.dtype) -> None:
    """What every rank but the leading one does until it is dismissed."""
    company = _company(model)
    if company.world.stage:
        serve(model, company.line, dtype=dtype)
        return
    while (take := _tell(model, None)) is not None:
        rng = torch.Generator()
        rng.set_state(take.random)
        told, unguided = (each and each.to(device=company.world.device) for each in take.told)
        if take.latent_frames:
            sample_clip(model, told, take.latent_frames, sampler=take.sampler, generator=rng, unguided=unguided)
        if take.spans:
            with closing(rollout(model, told, take.spans, sampler=take.sampler, draws=Draws(rng), unguided=unguided)) as blocks:
                while _agree(model) and next(blocks, None) is not None:
                    pass
    _end_line(company)


def dismiss(model: AvatarDiT) -> None:
    """The leading rank's last word."""
    if not _alone(model):
        _tell(model, None)
    _end_line(_company(model))


def _company(model: AvatarDiT) -> Company:
    return model.company or Company()


def _alone(model: AvatarDiT) -> bool:
    return _company(model).world.cast is None


def _tell(model: AvatarDiT, take: Take | None) -> Take | None:
    """From the leading rank to those that walk along; None is the end."""
    if take is not None:
        take = take._replace(told=tuple(each and each.to(device=CPU) for each in take.told))
    said, world = [take], _company(model).world
    with world.at_work() if world.leads else nullcontext():
        dist.broadcast_object_list(said, group_src=0, group=world.cast, device=CPU)
    return said[0]


def _agree(model: AvatarDiT, *, go_on: bool = True) -> bool:
    """Whether to walk on to the next block; the leading rank knows."""
    said, world = torch.tensor([go_on], dtype=torch.uint8), _company(model).world
    with world.at_work() if world.leads else nullcontext():
        dist.broadcast(said, group_src=0, group=world.cast)
    return bool(said)


def _end_line(company: Company) -> None:
    if company.line is not None:
        stop(company.line)
