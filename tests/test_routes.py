"""Tokens to virtual slots by range, against two fingers that walk along tokens and room."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lplb.routes import RangeRouter

INT = NDArray[np.int64]
GEOMETRIES = [(1, 5, 0), (2, 1, 1), (3, 7, 2), (4, 4, 1), (8, 32, 2), (7, 31, 31), (16, 64, 3), (64, 80, 1)]


@dataclass
class Scene:
    """A plan that somebody made for counts; which one does not matter."""

    residents: list[list[int]]  # by rank
    guests: NDArray[np.int32]  # [n_ranks, slots]
    counts: INT  # [n_ranks, n_logical]
    quota: INT  # [n_logical, n_ranks]
    ranks_per_node: int

    @property
    def n_ranks(self) -> int:
        return len(self.residents)

    @property
    def n_logical(self) -> int:
        return len(self.quota)

    def router(self) -> RangeRouter:
        ranks = [r for r, experts in enumerate(self.residents) for _ in experts]
        experts = [e for experts in self.residents for e in experts]
        return RangeRouter(ranks, experts, self.n_logical, self.n_ranks, self.guests.shape[1], self.ranks_per_node)

    def tensors(self, dtype: torch.dtype = torch.int64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return torch.from_numpy(self.quota), torch.from_numpy(self.guests), torch.from_numpy(self.counts).to(dtype)

    def slot(self, expert: int, rank: int) -> int:
        """Where a rank has an expert."""
        most = max(map(len, self.residents))
        width = most + self.guests.shape[1]
        if expert in self.residents[rank]:
            return rank * width + self.residents[rank].index(expert)
        return rank * width + most + self.guests[rank].tolist().index(expert)

    def indices(self, source: int, seed: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        """Choices of a source as it counted them, with some -1 among them."""
        rng = np.random.default_rng(seed)
        chosen = np.concatenate([np.repeat(np.arange(self.n_logical), self.counts[source]), np.full(5, -1)])
        return torch.from_numpy(rng.permutation(chosen)).to(dtype)


def scene(n_ranks: int, n_logical: int, slots: int, seed: int, most: int = 60) -> Scene:
    rng = np.random.default_rng([seed, n_ranks, n_logical])
    residents: list[list[int]] = [[] for _ in range(n_ranks)]
    for e in rng.permutation(n_logical).tolist():
        for r in rng.choice(n_ranks, min(n_ranks, int(rng.choice([1, 1, 1, 2, 4]))), replace=False):
            residents[r].append(e)
    guests = np.full((n_ranks, slots), -1, dtype=np.int32)
    for r in range(n_ranks):
        free = np.setdiff1d(np.arange(n_logical), residents[r])
        coming = rng.choice(free, min(len(free), slots, int(rng.integers(0, slots + 1))), replace=False)
        guests[r, rng.choice(slots, len(coming), replace=False)] = coming  # empty slots may lie between
    counts = np.where(
        rng.random((n_ranks, n_logical)) < 0.3, 0, rng.integers(0, most, (n_ranks, n_logical), dtype=np.int64)
    )
    counts[:, rng.random(n_logical) < 0.2] = 0
    quota = np.zeros((n_logical, n_ranks), dtype=np.int64)
    for e in range(n_logical):
        holders = [r for r in range(n_ranks) if e in residents[r] or e in guests[r]]
        share = rng.random(len(holders)) ** rng.uniform(0, 8)
        quota[e, holders] = rng.multinomial(counts[:, e].sum(), share / share.sum())
    return Scene(residents, guests, counts, quota, int(rng.integers(1, n_ranks + 1)))


def meet(tokens: INT, room: INT, pairs: INT) -> None:
    """Tokens by source and room by rank, in order, until one has come to its end; both are used up so far."""
    s = r = 0
    while s < len(tokens) and r < len(room):
        n = min(tokens[s], room[r])
        pairs[s, r] += n
        tokens[s] -= n
        room[r] -= n
        s, r = s + (tokens[s] == 0), r + (room[r] == 0 and tokens[s] > 0)


def expected_tokens(of: Scene, expert: int) -> INT:
    """From source to serving rank: own rank first, then own node, then all."""
    tokens, room = of.counts[:, expert].copy(), of.quota[expert].copy()
    stay = np.minimum(tokens, room)
    pairs = np.diag(stay)
    tokens -= stay
    room -= stay
    for begin in range(0, of.n_ranks, of.ranks_per_node):
        node = slice(begin, begin + of.ranks_per_node)
        meet(tokens[node], room[node], pairs[node, node])
    meet(tokens, room, pairs)
    assert not tokens.any()
    assert not room.any()
    return pairs


def expected_route(of: Scene, source: int, indices: torch.Tensor) -> list[int]:
    """Of flat indices, one after the other."""
    going = {}
    for e in range(of.n_logical):
        pairs = expected_tokens(of, e)
        going[e] = iter([of.slot(e, r) for r in range(of.n_ranks) for _ in range(pairs[source, r])])
    return [-1 if e < 0 else next(going[e]) for e in indices.flatten().tolist()]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_tokens_go_by_range_own_rank_and_node_first(geometry: tuple[int, int, int], seed: int) -> None:
    of = scene(*geometry, seed)
    router, plan = of.router(), of.tensors()
    for source in {0, of.n_ranks // 2, of.n_ranks - 1}:
        indices = of.indices(source, seed)
        routed = router.route(indices, *plan, source)
        assert routed.slots.tolist() == expected_route(of, source, indices)
        found = routed.slots[routed.slots >= 0].bincount(minlength=of.n_ranks * router.width)
        assert torch.equal(routed.send, found)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_every_source_and_every_quota_is_met_exactly(geometry: tuple[int, int, int]) -> None:
    of = scene(*geometry, 7)
    router, plan = of.router(), of.tensors()
    sent = torch.stack([router.route(of.indices(s, s), *plan, s).send for s in range(of.n_ranks)])
    assert torch.equal(router.tokens_by_source(*plan), sent)
    for e in range(of.n_logical):
        holders = [r for r in range(of.n_ranks) if e in of.residents[r] or e in of.guests[r]]
        pairs = sent[:, [of.slot(e, r) for r in holders]]
        assert pairs.sum(1).tolist() == of.counts[:, e].tolist()
        assert pairs.sum(0).tolist() == of.quota[e, holders].tolist()
        for i, r in enumerate(holders):
            assert pairs[r, i] == min(of.counts[r, e], of.quota[e, r])  # what can stay, stays
    assert int(sent.sum()) == int(of.counts.sum())


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("count_dtype", [torch.int32, torch.int64])
def test_dtypes_shapes_and_views(index_dtype: torch.dtype, count_dtype: torch.dtype) -> None:
    of = scene(8, 32, 2, 11)
    router, (quota, guests, counts) = of.router(), of.tensors(count_dtype)
    wide = torch.zeros(of.n_ranks, of.n_logical + 3, dtype=count_dtype)
    wide[:, : of.n_logical] = counts
    flat = of.indices(3, 1, index_dtype)
    wanted = router.route(flat, quota, guests, counts, 3)
    assert wanted.slots.dtype == index_dtype
    spread = torch.full((flat.numel(), 2), 99, dtype=index_dtype)  # every second element
    spread[:, 0] = flat
    view = spread[:, 0]
    assert not view.is_contiguous()
    got = router.route(view, quota, guests, wide[:, : of.n_logical], 3)
    assert torch.equal(got.slots, wanted.slots)
    assert torch.equal(got.send, wanted.send)
    picks = torch.cat([flat, flat.new_full((-flat.numel() % 4,), -1)]).view(-1, 2, 2)
    shaped = router.route(picks, quota, guests, counts, 3).slots
    assert shaped.shape == picks.shape
    assert torch.equal(shaped.flatten()[: flat.numel()], wanted.slots)


def test_many_tokens_on_several_threads() -> None:
    of = scene(4, 9, 2, 13, most=60_000)
    router, plan = of.router(), of.tensors()
    indices = of.indices(1, 2)
    assert indices.numel() > 1 << 17  # enough for two threads
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = router.route(indices, *plan, 1)
        torch.set_num_threads(3)
        together = router.route(indices, *plan, 1)
    finally:
        torch.set_num_threads(threads)
    assert alone.slots.tolist() == expected_route(of, 1, indices)
    assert torch.equal(alone.slots, together.slots)
    assert torch.equal(alone.send, together.send)


def test_no_tokens() -> None:
    of = scene(8, 32, 2, 17)
    of.counts[:] = 0
    of.quota[:] = 0
    router, plan = of.router(), of.tensors()
    for indices in (torch.empty(0, 8, dtype=torch.int64), torch.full((6, 2), -1, dtype=torch.int32)):
        routed = router.route(indices, *plan, 5)
        assert torch.equal(routed.slots, indices)
        assert not routed.send.any()
    assert not router.tokens_by_source(*plan).any()


def test_tokens_of_no_rank_in_particular_fill_the_quotas_in_the_order_of_ranks() -> None:
    of = scene(8, 32, 2, 19)
    quota, guests, counts = of.tensors()
    indices = torch.cat([of.indices(s, s) for s in range(of.n_ranks)])
    routed = of.router().route(indices, quota, guests, counts.sum(0, keepdim=True), 0)
    going = {e: iter([of.slot(e, r) for r in range(8) for _ in range(of.quota[e, r])]) for e in range(32)}
    assert routed.slots.tolist() == [-1 if e < 0 else next(going[e]) for e in indices.tolist()]


def test_an_expert_twice_on_a_rank_is_served_by_its_first_slot() -> None:
    router = RangeRouter([0, 0, 0, 1], [1, 0, 1, 0], 2, 2, 1, 2)
    quota, guests = torch.tensor([[0, 1], [2, 0]]), torch.tensor([[-1], [1]], dtype=torch.int32)
    routed = router.route(torch.tensor([1, 0, 1]), quota, guests, torch.tensor([[1, 2], [0, 0]]), 0)
    assert router.width == 4
    assert routed.slots.tolist() == [0, 4, 0]


def test_what_only_the_indices_tell_is_refused() -> None:
    of = scene(8, 32, 2, 23)
    router, plan = of.router(), of.tensors()
    indices = of.indices(2, 3)
    for wrong in (-2, 32, 2**40):
        with pytest.raises(ValueError, match=rf"have {wrong} at flat position 4, allowed is -1 .*or 0 to .* = 31"):
            router.route(torch.cat([indices[:4], torch.tensor([wrong]), indices[4:]]), *plan, 2)
    expert = int(indices[indices >= 0][0])
    planned = int(of.counts[2, expert])
    with pytest.raises(ValueError, match=f"expert {expert} {planned + 1} times, allowed is {planned}, .* of rank 2"):
        router.route(torch.cat([indices, torch.tensor([expert])]), *plan, 2)
