"""Ranks that share the tokens of every frame, where neither tokens nor heads come out even."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks

from sonic.model.attention import Projected
from sonic.parallel.context import Group, Spatial

FRAMES, TOKENS, MEMORY, HEADS = 2, 7, 4, 5


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("whole", [0, 1, 7, 8, 16, 25])
def test_shares_come_to_the_whole_and_the_first_is_the_largest_by_one_at_most(size, whole):
    for rank in range(size):
        shares = Group(None, rank, size).shares(whole)
        assert (len(shares), sum(shares)) == (size, whole)
        assert shares == sorted(shares, reverse=True) and shares[0] - shares[-1] <= 1


def there_and_back() -> tuple[list[bool], int]:
    """Whether a rank attends to what it should, and has its own tokens and all of them again; with how many heads."""
    spatial = Spatial(Group(dist.group.WORLD, dist.get_rank(), dist.get_world_size()), HEADS)
    rng = torch.Generator().manual_seed(0)
    draw = lambda frames, size: torch.randn(1, frames, size, HEADS * 3, generator=rng)  # noqa: E731
    parts = [draw(FRAMES, TOKENS), draw(1, MEMORY)]  # of a block, and of the memory
    split = lambda tokens: tokens.flatten(1, 2).unflatten(-1, (HEADS, 3))  # noqa: E731
    mine = torch.cat([split(spatial.part(part)) for part in parts], dim=1)
    everybody = torch.cat([split(part) for part in parts], dim=1)
    exchange = spatial.exchange(((FRAMES, TOKENS), (1, MEMORY)))
    start = sum(spatial.group.shares(HEADS)[: spatial.group.rank])
    heads = everybody[:, :, start : start + spatial.heads(HEADS)]
    found = exchange.heads(Projected(mine, 2 * mine, 3 * mine))
    right = [torch.equal(each, factor * heads) for factor, each in enumerate(found, start=1)]
    right.append(torch.equal(exchange.tokens(found.queries), mine))
    right += [torch.equal(spatial.whole(spatial.part(part), part.shape[2]), part) for part in parts]
    return right, heads.shape[2]


@pytest.mark.parametrize("ranks", [2, 3])
def test_each_rank_attends_with_its_heads_to_all_tokens_in_the_order_of_one_rank(ranks):
    found = on_ranks(ranks, there_and_back, timeout_s=60)
    assert [right for right, _ in found] == [[True] * 6] * ranks
    assert sum(heads for _, heads in found) == HEADS
