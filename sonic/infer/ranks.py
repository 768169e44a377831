"""Several ranks, one film: the first rank does what a single one would do, the others walk along until they are dismissed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sonic.config import SamplerConfig
from sonic.infer.rollout import Draws, rollout, sample_clip
from sonic.model.dit import AvatarDiT
from sonic.parallel.pipeline import serve, stop
from sonic.parallel.plans import CLIPS_WAIT
from sonic.parallel.spread import Company
from sonic.parallel.vae_rank import hang_up, without_repeats
from sonic.types import BlockSpan, Conditions, LatentBlock

CPU = torch.device("cpu")
GO_ON, ENOUGH = True, False


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
    if _alone(model):
        yield from rollout(model, conditions, spans, sampler=sampler, draws=draws, unguided=unguided)
        return
    if draws.noise or draws.ref_position:
        raise ValueError("video.compat=upstream draws what other ranks cannot know; use parallel=single or parallel=pipeline with it")
    spans = list(spans)
    _tell(model, Take((conditions, unguided), sampler, draws.generator.get_state(), spans))
    company, take = _company(model), _company(model).takes
    with closing(rollout(model, conditions, spans, sampler=sampler, draws=draws, unguided=unguided)) as blocks:
        while _tell(model, GO_ON) and (block := next(blocks, None)) is not None:
            try:
                yield block
            except BaseException:  # nobody wants the rest; an error inside the rollout is not told, because nobody listens then
                if company.takes == take:  # or this is closed so late that the others are told of the next take already
                    _tell(model, ENOUGH)
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
        raise ValueError(f"parallel=pipeline: {CLIPS_WAIT}")
    if not _alone(model):
        _tell(model, Take((conditions, unguided), sampler, generator.get_state(), latent_frames=latent_frames))
    return sample_clip(model, conditions, latent_frames, sampler=sampler, generator=generator, unguided=unguided)


def follow(model: AvatarDiT, dtype: torch.dtype) -> None:
    """What every rank but the leading one does until it is dismissed."""
    company = _company(model)
    if company.world.stage:
        serve(model, company.line, dtype=dtype)
        return
    said = _tell(model)
    while said is not None:
        said = _walk_along(model, said) if isinstance(said, Take) else _tell(model)
    _end_line(company)


def _walk_along(model: AvatarDiT, take: Take) -> Take | bool | None:
    """A whole clip, or blocks for as long as the leading rank says so; what it says then."""
    rng = torch.Generator()
    rng.set_state(take.random)
    told, unguided = (each and _arrived(each, _company(model).world.device) for each in take.told)
    if take.latent_frames:
        sample_clip(model, told, take.latent_frames, sampler=take.sampler, generator=rng, unguided=unguided)
        return _tell(model)
    with closing(rollout(model, told, take.spans, sampler=take.sampler, draws=Draws(rng), unguided=unguided)) as blocks:
        while (said := _tell(model)) is GO_ON and next(blocks, None) is not None:
            pass
    return said


def dismiss(model: AvatarDiT) -> None:
    """The leading rank's last word; a second one is not said."""
    company = _company(model)
    if company.dismissed:
        return
    company.dismissed = True
    if not _alone(model):
        _tell(model)
    _end_line(company)
    if company.world.vae_rank:
        hang_up(company.wire)


def _company(model: AvatarDiT) -> Company:
    return model.company or Company()


def _alone(model: AvatarDiT) -> bool:
    return _company(model).world.cast is None


def _tell(model: AvatarDiT, said: Take | bool | None = None) -> Take | bool | None:
    """From the leading rank to those that walk along: what to walk, whether to go on to the next block; None is the end."""
    if isinstance(said, Take):
        _company(model).takes += 1
        said = said._replace(told=tuple(each and lean(each) for each in said.told))
    words = [said]
    dist.broadcast_object_list(words, group_src=0, group=_company(model).world.cast, device=CPU)
    return words[0]


def lean(told: Conditions) -> Conditions:
    """The same in host memory, to be sent: each tensor without what it only looks past, which would go along."""
    return replace(told, **{name: _lean(value) for name, value in vars(told).items() if value is not None})


def _lean(tensor: Tensor) -> Tensor:
    once = without_repeats(tensor)
    if once.device == CPU and once.untyped_storage().nbytes() <= once.nbytes:
        return tensor  # itself, so that what both conditions have in common goes once
    return once.to(CPU, copy=True).expand(tensor.shape)


def _arrived(told: Conditions, device: torch.device) -> Conditions:
    """What was sent, on the device of this rank; speech features, which may be gigabytes, stay outside until the model hears them."""
    return replace(told, **{name: value.to(device) for name, value in vars(told).items() if value is not None and name != "audio"})


def _end_line(company: Company) -> None:
    if company.line is not None:
        stop(company.line)
