"""What plans with transfers are compared with: HiGHS, exact integers, and every choice tried. Nothing of lplb."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray
from reference import GroupLP, RankGroup, _group_bottleneck, _group_optimum

INT = NDArray[np.int64]
Residents = Sequence[Sequence[int]]  # by rank


def ranks_of(residents: Residents, n_logical: int, more: Iterable[tuple[int, int]] = ()) -> list[set[int]]:
    """Ranks of each expert; ``more`` are (expert, rank)."""
    found: list[set[int]] = [set() for _ in range(n_logical)]
    for rank, experts in enumerate(residents):
        for expert in experts:
            found[expert].add(rank)
    for expert, rank in more:
        found[expert].add(rank)
    return found


def everywhere(residents: Residents, n_logical: int, domain: int) -> list[set[int]]:
    """Ranks that each expert can come to: all of every domain that it lives in."""
    return [
        {rank // domain * domain + i for rank in ranks for i in range(domain)}
        for ranks in ranks_of(residents, n_logical)
    ]


def group_of(ranks: Sequence[set[int]], n_ranks: int) -> RankGroup:
    return RankGroup(n_ranks, tuple(range(len(ranks))), tuple(tuple(sorted(r)) for r in ranks), (1.0,) * n_ranks)


def relaxed_bound(residents: Residents, tokens: INT, n_ranks: int, domain: int) -> float:
    """The least fractional largest load with copies on all ranks of an expert's domains, by HiGHS."""
    return GroupLP(group_of(everywhere(residents, len(tokens), domain), n_ranks)).solve(tokens)


def exact_bound(residents: Residents, tokens: INT, n_ranks: int, domain: int) -> Fraction:
    """The same, exact."""
    return _group_optimum(group_of(everywhere(residents, len(tokens), domain), n_ranks), tokens.tolist())


def least_load(ranks: Sequence[set[int]], tokens: INT, n_ranks: int) -> int:
    """The least largest load in whole tokens where an expert's tokens may go to some ranks only."""
    return int(_group_bottleneck(group_of(ranks, n_ranks), tokens.tolist()).load)


def best_of_every_choice(
    residents: Residents,
    tokens: INT,
    n_ranks: int,
    slots: int,
    domain: int,
    most: int,
    held: Iterable[tuple[int, int]] = (),
) -> list[int]:
    """The least largest load for 0, 1, … ``most`` transfers, by trying all of them. For a handful of ranks.

    Held guests stay where they are, and no slot is taken from them: give them slots besides.
    """
    n_logical = len(tokens)
    had = ranks_of(residents, n_logical, held)
    free = [
        (e, rank)
        for e, ranks in enumerate(everywhere(residents, n_logical, domain))
        for rank in ranks - had[e]
        if tokens[e] > 0
    ]
    # A whole-token split under a cap exists if and only if no set of ranks is given more than it can take (Hall).
    sets = list(range(1, 1 << n_ranks))
    size = [bin(s).count("1") for s in sets]
    base = [sum(1 << rank for rank in ranks) for ranks in had]

    def load_of(copies: Sequence[tuple[int, int]]) -> int:
        masks = list(base)
        for e, rank in copies:
            masks[e] |= 1 << rank
        inside = np.zeros(1 << n_ranks, dtype=np.int64)
        np.add.at(inside, masks, tokens)
        for rank in range(n_ranks):  # sums over all subsets
            view = inside.reshape(-1, 2, 1 << rank)
            view[:, 1] += view[:, 0]
        return int(max(-(-int(inside[s]) // k) for s, k in zip(sets, size, strict=True)))

    best = [load_of(())]
    for k in range(1, most + 1):
        found = best[-1]
        for copies in itertools.combinations(free, k):
            arrivals = [rank for _, rank in copies]
            if max(map(arrivals.count, set(arrivals))) <= slots:
                found = min(found, load_of(copies))
        best.append(found)
    return best
