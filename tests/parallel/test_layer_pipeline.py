"""The layer pipeline: any number of ranks at any number of steps gives the video of one rank, bit for bit."""

from __future__ import annotations

import weakref
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from tiny import conditions, latents_of, tiny_model

from sonic.config import AudioConfig, ModelConfig, TrunkConfig
from sonic.parallel.channel import HEADER_BYTES, P2PChannel
from sonic.parallel.context import DistributedContext
from sonic.parallel.layer_pipeline import PipelineForwards, keep_range, layer_ranges, stage_loop
from sonic.parallel.parallel_config import MESSAGES

COUNTS = range(1, 9)
BLOCKS = 3


def videos_on_every_number_of_ranks() -> list[tuple[int, int]]:
    """(ranks, steps) whose video differs from that of one rank, made by the first 1, 2, ... 8 ranks of the world."""
    torch.use_deterministic_algorithms(True)
    rank, given = dist.get_rank(), conditions(2 * BLOCKS)
    alone = {steps: latents_of(tiny_model(), given, BLOCKS, sample_steps=steps) for steps in COUNTS} if rank == 0 else {}
    wrong = []
    for count in COUNTS[1:]:
        if rank >= count:
            continue
        model, context = tiny_model(), DistributedContext(channel=P2PChannel(range(count), torch.device("cpu")))
        keep_range(model, rank, layer_ranges(model.config, count))
        if rank:
            stage_loop(model, context, dtype=torch.float32)
            continue
        found = {steps: latents_of(model, given, BLOCKS, context=context, sample_steps=steps) for steps in COUNTS}
        wrong += [(count, steps) for steps in COUNTS if not torch.equal(found[steps], alone[steps])]
        context.channel.shut_down()
    return wrong


def test_any_number_of_ranks_at_any_number_of_steps_gives_the_video_of_one_rank():
    assert on_ranks(max(COUNTS), videos_on_every_number_of_ranks)[0] == []


def caches_alive() -> list[int]:
    """Number of old caches on the second rank when it makes the next one, and on the first after each video."""
    model, context = tiny_model(), DistributedContext(channel=P2PChannel(range(2), torch.device("cpu")))
    keep_range(model, dist.get_rank(), layer_ranges(model.config, 2))
    if dist.get_rank() == 0:
        kept = []
        for scale in (2.0, 1.0, 1.0):  # the first video has two caches
            latents_of(model, conditions(2), 1, context=context, sample_guide_scale=scale)
            kept.append(len(context.channel.forwards.caches))
        context.channel.shut_down()
        return kept
    make, made, alive = model.cache_of, [], []

    def counted(*arguments, **settings):
        alive.append(sum(each() is not None for each in made))
        cache = make(*arguments, **settings)
        made.append(weakref.ref(cache))
        return cache

    model.cache_of = counted
    stage_loop(model, context, dtype=torch.float32)
    return alive


def test_a_rank_frees_the_caches_of_a_video_before_the_next():
    assert on_ranks(2, caches_alive, timeout_s=240) == [[0, 0, 0], [0, 1, 0, 0]]


class Sent:
    """A send that is done, or one that is done only after waiting for it, as those of gloo are."""

    def __init__(self, done: bool) -> None:
        self.is_completed = lambda: done

    def wait(self) -> None:
        """Return, because it can be."""


@pytest.mark.parametrize("done", [True, False])
@pytest.mark.parametrize("stages", [2, 4, 8])
def test_no_more_payloads_are_kept_than_the_planner_counts(stages, done):
    sent: list[weakref.ref] = []

    def isend(payload, *_, **__) -> Sent:
        sent.append(weakref.ref(payload))
        return Sent(done)

    with patch.object(dist, "get_rank", lambda: 0), patch.object(dist, "isend", isend):
        channel = P2PChannel(range(stages), torch.device("cpu"))
        for _ in range(30):
            channel.send_next(torch.randn(HEADER_BYTES))
    alive = [payload() for payload in sent if payload() is not None and payload().is_floating_point()]
    assert len(sent) == 60 and 0 < len(alive) <= (1 if done else MESSAGES)


def half_precision() -> tuple[set[torch.dtype], bool]:
    """Precisions of the first rank's outputs for a model in bfloat16, and whether the video equals that of one rank."""
    alone, model = tiny_model().bfloat16(), tiny_model().bfloat16()
    context = DistributedContext(channel=P2PChannel(range(2), torch.device("cpu")))
    keep_range(model, dist.get_rank(), layer_ranges(model.config, 2))
    if dist.get_rank():
        stage_loop(model, context, dtype=torch.bfloat16)
        return set(), True
    found, collect = set(), PipelineForwards.collect

    def collected(forwards: PipelineForwards) -> list[torch.Tensor]:
        predictions = collect(forwards)
        found.update(each.dtype for each in predictions)
        return predictions

    with patch.object(PipelineForwards, "collect", collected):
        same = torch.equal(latents_of(model, conditions(4), 2, context=context), latents_of(alone, conditions(4), 2))
    context.channel.shut_down()
    return found, same


def test_a_pipeline_in_half_precision_answers_in_the_precision_of_the_latents():
    assert on_ranks(2, half_precision, timeout_s=60)[0] == ({torch.float32}, True)


@pytest.mark.parametrize("stages", COUNTS)
def test_the_ranges_cover_all_layers_once_and_are_as_even_as_they_can_be(stages):
    config = ModelConfig(trunk=TrunkConfig(num_layers=40), audio=AudioConfig(inject_layers=[0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39]))
    ranges = layer_ranges(config, stages)
    assert [layer for layers in ranges for layer in layers] == list(range(40))
    assert max(map(len, ranges)) - min(map(len, ranges)) <= 2


def test_a_rank_keeps_the_parameter_names_of_its_layers():
    whole = set(tiny_model().state_dict())
    kept = []
    for stage in range(2):
        model = tiny_model()
        keep_range(model, stage, layer_ranges(model.config, 2))
        kept.append(set(model.state_dict()))
    assert kept[0] | kept[1] == whole
    assert not kept[0] & kept[1]


def test_layer_counts_that_do_not_add_up_are_refused_with_the_right_sum():
    config = tiny_model().config
    assert layer_ranges(config, 2, [1, 2]) == [range(1), range(1, 3)]
    with pytest.raises(ValueError, match="give 2 numbers that add up to 3"):
        layer_ranges(config, 2, [1, 1])
