"""Sequence parallelism: several ranks together equal one rank, whether or not tokens and heads divide evenly."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import Tensor

from sonic.model.attention import QKV
from sonic.model.blocks import join_parts, split_parts
from sonic.parallel.ulysses import Group, UlyssesSequence

RANKS = 3
LAYOUT = ((2, 7), (1, 2))  # two frames of seven tokens and a memory of two: the last rank has none of it
BATCH, HEAD_DIM = 2, 3


def broken(heads: int) -> list[str]:
    """Names of the checks that fail on this rank."""
    rank = dist.get_rank()
    share = UlyssesSequence(Group(dist.group.WORLD, rank, RANKS), heads)
    rng = torch.Generator().manual_seed(0)
    length = sum(frames * size for frames, size in LAYOUT)
    rows = [torch.randn(BATCH, length, heads, HEAD_DIM, generator=rng) for _ in range(4)]

    def ours(whole: Tensor) -> Tensor:
        """This rank's tokens of all parts, with all heads."""
        return join_parts([share.split(part) for part in split_parts(whole.flatten(2), LAYOUT)]).unflatten(2, (heads, HEAD_DIM))

    first = sum(heads // RANKS + (before < heads % RANKS) for before in range(rank))
    some = slice(first, first + share.local_heads(heads))
    exchange = share.exchange(LAYOUT)
    given = [ours(whole).requires_grad_() for whole in rows[:3]]
    found = exchange.to_heads(QKV(*given))
    back = exchange.to_tokens(found.queries)
    (back * ours(rows[3])).sum().backward()
    frames = split_parts(rows[0].flatten(2), LAYOUT)[0]
    part = share.split(frames).clone().requires_grad_()
    gathered = share.gather(part, LAYOUT[0][1])
    (gathered * frames).sum().backward()
    memory = split_parts(rows[0].flatten(2), LAYOUT)[1]
    laws = {
        "all tokens in the order of one rank, with this rank's heads": all(
            torch.equal(one, whole[:, :, some]) for one, whole in zip(found, rows, strict=False)
        ),
        "the way back gives every rank its own tokens": torch.equal(back, given[0]),
        "gradients come back to the tokens that they are of": torch.allclose(given[0].grad, ours(rows[3])),
        "the tokens of all ranks are the whole frame": torch.equal(gathered, frames),
        "fewer tokens than ranks are whole again as well": torch.equal(share.gather(share.split(memory), LAYOUT[1][1]), memory),
        "every rank's loss reaches the tokens of each": torch.allclose(part.grad, RANKS * share.split(frames)),
    }
    return [law for law, holds in laws.items() if not holds]


def broken_for_all(counts: list[int]) -> list[str]:
    return [f"{heads} heads: {law}" for heads in counts for law in broken(heads)]


def test_ranks_that_share_tokens_and_heads_unevenly_together_equal_one_rank():
    assert on_ranks(RANKS, broken_for_all, [2, 4, 6], timeout_s=60) == [[]] * RANKS


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("whole", [0, 1, 7, 8, 16, 25])
def test_shares_add_up_and_the_first_is_larger_by_one_at_most(size, whole):
    for rank in range(size):
        shares = Group(None, rank, size).shares(whole)
        assert (len(shares), sum(shares)) == (size, whole)
        assert shares == sorted(shares, reverse=True) and shares[0] - shares[-1] <= 1
