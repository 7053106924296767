"""Batches that no placement balances: what Least-Loaded Expert Parallelism and UltraEP are measured on.

Each function returns one batch as choices per source and expert, int64 ``[n_ranks, n_logical]``: every source rank has
``tokens_per_rank * top_k`` of them, exactly. They are counts, not choices of tokens: an expert may have more than one
choice of every token, as in LLEP's own test program. The same arguments give the same counts.

LLEP: Nguyen et al., arXiv 2601.17111, and github.com/SalesforceAIResearch/LeastLoadedEP.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lplb.arguments import check_divides, real_number, whole_number
from lplb.models import ModelShape, model_by_name

__all__ = ["LLEP_SCENES", "LlepScene", "llep_scene", "skewed_scene", "zipf_scene"]

_Ints = npt.NDArray[np.int64]
_Floats = npt.NDArray[np.float64]

MOST_EXPERTS = 1 << 16
MOST_CHOICES = 1 << 45  # of a batch: parts in float64 are right to a hundredth of a choice

WHERE = ("first", "random", "published")
FAMILIES = ("lognormal", "zipf")


def llep_scene(
    n_logical: int,
    n_ranks: int,
    top_k: int,
    tokens_per_rank: int,
    *,
    hot: int,
    share: float,
    where: str = "first",
    seed: int = 0,
) -> _Ints:
    """Concentrate a share of all choices in a few experts, in equal parts; the others have the rest in equal parts.

    Parts are whole and differ by one at most; the seed draws who has one more. A share of 0 is LLEP's balanced batch:
    nothing is hot, all experts have equal parts.

    Args:
        n_logical: experts.
        n_ranks: ranks, each the source of as many tokens.
        top_k: experts of a token.
        tokens_per_rank: tokens of a source.
        hot: how many experts are hot, at least 1; fewer than ``n_logical``.
        share: of all choices, what goes to the hot experts, 0 to 1.
        where: ``"first"``: experts 0 to ``hot - 1``, which blocks of experts in order put together on the first ranks;
            ``"random"``: drawn from the seed. ``"published"`` is what LLEP's program makes: the j-th choice of a hot
            token is expert ``j % hot``, so with fewer choices than hot experts only the first ``top_k`` have tokens.
        seed: of NumPy's ``default_rng``.

    Returns:
        Choices, int64 ``[n_ranks, n_logical]``.

    Raises:
        TypeError, ValueError: an argument is not allowed; the message has the value seen and the value allowed.
    """
    total, rng = _sizes(n_logical, n_ranks, top_k, tokens_per_rank, seed)
    hot = whole_number("hot", hot, 1, n_logical - 1)
    share = _number("share", share, 0, 1)
    if where not in WHERE:
        raise ValueError(f"where is {where!r}, allowed are {', '.join(map(repr, WHERE))}")
    load = np.zeros(n_logical, dtype=np.int64)
    if share == 0:
        load += _parts(rng, total, np.ones(n_logical))
        return _dealt(load, n_ranks)
    chosen = rng.permutation(n_logical)[:hot] if where == "random" else np.arange(hot)
    cold = np.setdiff1d(np.arange(n_logical), chosen)
    weight = np.bincount(np.arange(top_k) % hot, minlength=hot) if where == "published" else np.ones(hot)
    n_hot = round(share * total)
    load[chosen] = _parts(rng, n_hot, weight)
    load[cold] = _parts(rng, total - n_hot, np.ones(len(cold)))
    return _dealt(load, n_ranks)


def zipf_scene(
    n_logical: int, n_ranks: int, top_k: int, tokens_per_rank: int, *, exponent: float = 0.8, seed: int = 0
) -> _Ints:
    """Draw choices by Zipf's law: the i-th most popular expert has a share of i^-exponent, in an order from the seed.

    Args:
        n_logical: experts.
        n_ranks: ranks, each the source of as many tokens, drawn independently (multinomial).
        top_k: experts of a token.
        tokens_per_rank: tokens of a source.
        exponent: 0 is uniform.
        seed: of NumPy's ``default_rng``.

    Returns:
        Choices, int64 ``[n_ranks, n_logical]``.

    Raises:
        TypeError, ValueError: an argument is not allowed.
    """
    total, rng = _sizes(n_logical, n_ranks, top_k, tokens_per_rank, seed)
    popularity = rng.permutation(np.arange(1, n_logical + 1) ** -_number("exponent", exponent, 0, 10))
    drawn: _Ints = rng.multinomial(total // n_ranks, popularity / popularity.sum(), size=n_ranks).astype(np.int64)
    return drawn


def skewed_scene(
    n_logical: int,
    n_ranks: int,
    top_k: int,
    tokens_per_rank: int,
    *,
    imbalance: float,
    family: str = "lognormal",
    seed: int = 0,
) -> _Ints:
    """Load experts so that plain expert parallelism has a given imbalance: busiest rank over mean.

    UltraEP reports copies by the imbalance that a batch begins with, but not its loads. These are two guesses: the
    logarithm of an expert's share is normal, or shares follow Zipf's law; how wide, or how steep, is found by
    bisection. Whole choices change the imbalance in the last digits.

    Args:
        n_logical: experts, a multiple of ``n_ranks``; rank ``r`` has the ``r``-th part of them, in order.
        n_ranks: ranks, each the source of as many tokens.
        top_k: experts of a token.
        tokens_per_rank: tokens of a source.
        imbalance: above 1 and below what one expert with everything would make, ``n_ranks``.
        family: ``"lognormal"`` or ``"zipf"``.
        seed: of NumPy's ``default_rng``: whose share is how large.

    Returns:
        Choices, int64 ``[n_ranks, n_logical]``.

    Raises:
        TypeError, ValueError: an argument is not allowed, or the seed's order of experts has no such imbalance.
    """
    total, rng = _sizes(n_logical, n_ranks, top_k, tokens_per_rank, seed)
    check_divides("n_logical", n_logical, "n_ranks", n_ranks)
    imbalance = _number("imbalance", imbalance, 1, n_ranks)
    if family not in FAMILIES:
        raise ValueError(f"family is {family!r}, allowed are {', '.join(map(repr, FAMILIES))}")
    log: _Floats = (
        rng.standard_normal(n_logical)
        if family == "lognormal"
        else -np.log(rng.permutation(np.arange(1, n_logical + 1)))
    )
    popularity = _as_uneven_as(log, n_ranks, imbalance)
    return _dealt(_parts(rng, total, popularity), n_ranks)


@dataclass(frozen=True)
class LlepScene:
    """A batch of LLEP's paper, for one layer of a model on eight ranks."""

    model: ModelShape
    """Experts and their sizes."""
    tokens_per_rank: int
    """Tokens of every rank."""
    hot: int
    """Hot experts; 0 in a balanced batch."""
    share: float
    """What part of all choices they have."""
    n_ranks: int = 8
    """Ranks."""

    def counts(self, where: str = "first", seed: int = 0) -> _Ints:
        """Return choices, int64 ``[n_ranks, n_logical]``; arguments and errors are those of `llep_scene`."""
        return llep_scene(
            self.model.n_logical,
            self.n_ranks,
            self.model.top_k,
            self.tokens_per_rank,
            hot=max(1, self.hot),
            share=self.share,
            where=where,
            seed=seed,
        )


def _scenes() -> dict[str, LlepScene]:
    """Every model, size, share and number of hot experts; the balanced batch once."""
    found = {}
    shares = [(0, 0), *itertools.product((30, 50, 80, 95), (16, 4, 1))]
    for name, kibi, (percent, hot) in itertools.product(("gpt-oss-120b", "deepseek-v3", "kimi-k2"), (16, 32), shares):
        said = f"{percent} % in {hot}" if hot else "balanced"
        found[f"{name}, {kibi} Ki, {said}"] = LlepScene(model_by_name(name), kibi * 1024, hot, percent / 100)
    return found


LLEP_SCENES = _scenes()
"""The paper's batches by name, ``"gpt-oss-120b, 32 Ki, 80 % in 4"``: 0, 30, 50, 80, 95 % of all choices in 16, 4 or 1
hot experts; 128 experts top-4 2880/2880, 256 top-8 7168/2048, 384 top-8 7168/2048 (the experts of three models); 16 Ki
or 32 Ki tokens on each of eight ranks."""


# ---- drawing


def _sizes(n_logical: int, n_ranks: int, top_k: int, tokens_per_rank: int, seed: int) -> tuple[int, Any]:
    """Choices of all sources, and the source of randomness."""
    n_logical = whole_number("n_logical", n_logical, 2, MOST_EXPERTS)
    n_ranks = whole_number("n_ranks", n_ranks, 1, MOST_EXPERTS)
    top_k = whole_number("top_k", top_k, 1, n_logical)
    tokens = whole_number("tokens_per_rank", tokens_per_rank, 0, (MOST_CHOICES - 1) // (n_ranks * top_k))
    return n_ranks * top_k * tokens, np.random.default_rng(whole_number("seed", seed, 0))


def _number(name: str, value: float, least: float, most: float) -> float:
    number = real_number(name, value)
    if not least <= number <= most:  # true for NaN as well
        raise ValueError(f"{name} is {number}, allowed are {least:g} to {most:g}")
    return number


def _parts(rng: np.random.Generator, total: int, weight: npt.NDArray[Any]) -> _Ints:
    """Whole parts of a total by weight: rounded down, then one more where most is missing, ties by lot."""
    exact = total * (weight / weight.sum())
    parts: _Ints = np.floor(exact).astype(np.int64)
    missing = exact - parts
    order = rng.permutation(len(parts))
    order = order[np.argsort(-missing[order], kind="stable")]
    parts[order[: total - int(parts.sum())]] += 1
    return parts


def _dealt(load: _Ints, n_ranks: int) -> _Ints:
    """Loads dealt to sources in turn, expert by expert: as even as whole numbers are, in rows and in columns."""
    end = np.concatenate([[0], np.cumsum(load)])
    before = -((np.arange(n_ranks)[:, None] - end) // n_ranks)  # how many of the first `end` go to each source
    counts: _Ints = np.diff(before, axis=1)
    return counts


def _as_uneven_as(log: _Floats, n_ranks: int, imbalance: float) -> _Floats:
    """Shares exp(scale * log) whose blocks have this imbalance; the scale by bisection."""

    def shares(scale: float) -> _Floats:
        raised: _Floats = np.exp(scale * (log - log.max()))
        raised /= raised.sum()
        return raised

    def uneven(scale: float) -> float:
        return float(shares(scale).reshape(n_ranks, -1).sum(1).max() * n_ranks)

    low, high = 0.0, 1.0
    while uneven(high) < imbalance:
        low, high = high, 2 * high
        if high > 1 << 20:
            raise ValueError(f"imbalance is {imbalance}, allowed is below {uneven(low)} with these shares")
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if uneven(middle) < imbalance else (low, middle)
    return shares(high)
