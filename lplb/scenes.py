"""Loads to simulate with: generators from a seed, and the recorded router trace as counts.

Each generator returns whole tokens per logical expert: int64 ``[batches, layers, n_logical]``, or with ``sources``
int32 ``[batches, layers, sources, n_logical]``, every source having as many tokens. Tokens are drawn independently
(multinomial) from shares that the scene moves from batch to batch; a token counts once for each of its experts. Layers
are independent of one another. The same arguments give the same counts.

Single batches that no placement balances are in `lplb.llep_scenes`, and here by the same names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lplb.arguments import whole_number
from lplb.llep_scenes import LLEP_SCENES, LlepScene, llep_scene, skewed_scene, zipf_scene
from lplb.trace import RouterTrace, load_trace

__all__ = [
    "LLEP_SCENES",
    "SCENES",
    "LlepScene",
    "Scene",
    "domain_shift",
    "hot_expert",
    "llep_scene",
    "lognormal",
    "make",
    "phases_of_shift",
    "skewed_scene",
    "trace",
    "zipf",
    "zipf_scene",
]

_Ints = npt.NDArray[np.integer[Any]]
_Floats = npt.NDArray[np.float64]

MOST_EXPERTS = 1 << 16


@dataclass(frozen=True)
class Scene:
    """Loads with a name, and what each batch is made of."""

    name: str
    """What reports call it."""
    counts: _Ints
    """Tokens, ``[batches, layers, n_logical]`` or ``[batches, layers, sources, n_logical]``."""
    phase: list[str]
    """``[batches]``, what each batch is made of; the same everywhere where nothing changes."""


def lognormal(
    n_batches: int,
    n_layers: int,
    n_logical: int,
    *,
    tokens: int = 32768,
    seed: int = 0,
    sigma: float = 0.85,
    noise: float = 0.3,
    memory: float = 200.0,
    sources: int | None = None,
    locality: float = 0.0,
) -> _Ints:
    """Log-normal loads that drift: popularities wander about one another's ranks, and never grow apart.

    The logarithm of an expert's popularity is an Ornstein–Uhlenbeck process (AR(1)): at all times normal with
    ``sigma``, its correlation with itself ``t`` batches ago ``exp(-t / memory)``. Each batch multiplies it by a factor
    of its own.

    Args:
        n_batches: how many batches.
        n_layers: how many layers.
        n_logical: how many experts.
        tokens: of each batch and layer, over all sources; a multiple of ``sources``.
        seed: of NumPy's ``default_rng``.
        sigma: standard deviation of the logarithm of popularity.
        noise: that of each batch's own factors.
        memory: batches until popularity is correlated by 1/e with what it was; ``inf`` for no drift.
        sources: how many ranks or nodes the tokens come from; by default counts do not know.
        locality: standard deviation of the logarithm of the factors by which sources prefer experts, all the time.

    Raises:
        TypeError, ValueError: an argument is not allowed; the message has the value seen and the value allowed.
    """
    rng = _rng(n_batches, n_layers, n_logical, tokens, seed, sources)
    sigma, noise = _number("sigma", sigma, 0, 10), _number("noise", noise, 0, 10)
    memory = _number("memory", memory, 0, np.inf)
    keep = float(np.exp(-1 / memory)) if memory > 0 else 0.0
    fresh = sigma * np.sqrt(1 - keep * keep)
    log = np.empty((n_batches, n_layers, n_logical))
    log[0] = sigma * rng.standard_normal((n_layers, n_logical))
    for b in range(1, n_batches):
        log[b] = keep * log[b - 1] + fresh * rng.standard_normal((n_layers, n_logical))
    return _draw(rng, _noisy(rng, np.exp(log), noise), tokens, sources, locality)


def zipf(
    n_batches: int,
    n_layers: int,
    n_logical: int,
    *,
    tokens: int = 32768,
    seed: int = 0,
    exponent: float = 0.8,
    noise: float = 0.1,
    sources: int | None = None,
    locality: float = 0.0,
) -> _Ints:
    """Loads by Zipf's law that stay: the i-th most popular expert has a share of i^-exponent, in each layer's order.

    Args:
        n_batches: how many batches.
        n_layers: how many layers.
        n_logical: how many experts.
        tokens: as for `lognormal`.
        seed: as for `lognormal`.
        exponent: 0 is uniform.
        noise: as for `lognormal`.
        sources: as for `lognormal`.
        locality: as for `lognormal`.

    Raises:
        TypeError, ValueError: an argument is not allowed.
    """
    rng = _rng(n_batches, n_layers, n_logical, tokens, seed, sources)
    exponent, noise = _number("exponent", exponent, 0, 10), _number("noise", noise, 0, 10)
    share = np.arange(1, n_logical + 1) ** -exponent
    base = rng.permuted(np.broadcast_to(share, (n_layers, n_logical)), axis=1)
    return _draw(rng, _noisy(rng, np.broadcast_to(base, (n_batches, *base.shape)), noise), tokens, sources, locality)


def domain_shift(
    n_batches: int,
    n_layers: int,
    n_logical: int,
    *,
    tokens: int = 32768,
    seed: int = 0,
    domains: int = 2,
    period: int = 100,
    ramp: int = 0,
    sigma: float = 0.85,
    noise: float = 0.1,
    sources: int | None = None,
    locality: float = 0.0,
) -> _Ints:
    """Text that changes its domain: each domain has log-normal popularities of its own, and they take turns.

    Args:
        n_batches: how many batches.
        n_layers: how many layers.
        n_logical: how many experts.
        tokens: as for `lognormal`.
        seed: as for `lognormal`.
        domains: how many, 2 or more, in turn.
        period: batches from the beginning of one domain to that of the next.
        ramp: batches, at the beginning of every domain but the first, in which its share of the tokens grows from
            nothing to all; 0 for a sudden change.
        sigma: as for `lognormal`, of each domain.
        noise: as for `lognormal`.
        sources: as for `lognormal`.
        locality: as for `lognormal`.

    Raises:
        TypeError, ValueError: an argument is not allowed.
    """
    rng = _rng(n_batches, n_layers, n_logical, tokens, seed, sources)
    domains = whole_number("domains", domains, 2, 1024)
    sigma, noise = _number("sigma", sigma, 0, 10), _number("noise", noise, 0, 10)
    turn, grown = _turns(n_batches, period, ramp)
    base = np.exp(sigma * rng.standard_normal((domains, n_layers, n_logical)))
    base /= base.sum(-1, keepdims=True)
    new = grown[:, None, None]
    share = new * base[turn % domains] + (1 - new) * base[(turn - 1) % domains]
    return _draw(rng, _noisy(rng, share, noise), tokens, sources, locality)


def phases_of_shift(n_batches: int, *, domains: int = 2, period: int = 100, ramp: int = 0) -> list[str]:
    """Return what each batch of `domain_shift` is made of: ``"domain 0"``, or ``"domain 0 → 1"`` on the way.

    Args:
        n_batches: how many batches.
        domains: as for `domain_shift`.
        period: as for `domain_shift`.
        ramp: as for `domain_shift`.
    """
    turn, grown = _turns(n_batches, period, ramp)
    return [
        f"domain {t % domains}" if g == 1 else f"domain {(t - 1) % domains} → {t % domains}"
        for t, g in zip(turn.tolist(), grown.tolist(), strict=True)
    ]


def _turns(n_batches: int, period: int, ramp: int) -> tuple[npt.NDArray[np.int64], _Floats]:
    """Which turn each batch is in, and how far its domain has come, 0 to 1."""
    period = whole_number("period", period, 1)
    ramp = whole_number("ramp", ramp, 0, period)
    turn, at = np.divmod(np.arange(whole_number("n_batches", n_batches, 1)), period)
    grown = np.minimum(1.0, (at + 1) / (ramp + 1))
    grown[turn == 0] = 1
    return turn, grown


def hot_expert(
    n_batches: int,
    n_layers: int,
    n_logical: int,
    *,
    tokens: int = 32768,
    seed: int = 0,
    share: float = 0.15,
    period: int = 100,
    sigma: float = 0.3,
    noise: float = 0.1,
    sources: int | None = None,
    locality: float = 0.0,
) -> _Ints:
    """One expert of each layer takes a given share of all tokens, another one every ``period`` batches.

    Args:
        n_batches: how many batches.
        n_layers: how many layers.
        n_logical: how many experts, 2 or more.
        tokens: as for `lognormal`.
        seed: as for `lognormal`.
        share: of the hot expert, from 0 to 1; the expected one, before ``noise``. A router that picks k experts of a
            token gives one expert at most 1/k.
        period: batches until another expert is hot.
        sigma: as for `lognormal`, of the others.
        noise: as for `lognormal`.
        sources: as for `lognormal`.
        locality: as for `lognormal`.

    Raises:
        TypeError, ValueError: an argument is not allowed.
    """
    rng = _rng(n_batches, n_layers, n_logical, tokens, seed, sources)
    share, period = _number("share", share, 0, 1), whole_number("period", period, 1)
    sigma, noise = _number("sigma", sigma, 0, 10), _number("noise", noise, 0, 10)
    whole_number("n_logical", n_logical, 2)
    turns = -(-n_batches // period)
    base = np.exp(sigma * rng.standard_normal((n_layers, n_logical)))
    hot = np.argsort(rng.random((n_layers, n_logical)), axis=1)[:, np.arange(turns) % n_logical].T  # [turns, n_layers]
    by_turn = np.repeat(base[None], turns, axis=0)
    np.put_along_axis(by_turn, hot[..., None], 0.0, -1)
    by_turn *= (1 - share) / by_turn.sum(-1, keepdims=True)
    np.put_along_axis(by_turn, hot[..., None], share, -1)
    return _draw(rng, _noisy(rng, by_turn[np.arange(n_batches) // period], noise), tokens, sources, locality)


def trace(sources: int | None = None, recorded: RouterTrace | None = None) -> Scene:
    """Return the recorded router trace as counts: 240 batches of 4 layers, 64 experts, 6,144 token choices.

    Args:
        sources: how many ranks or nodes the tokens come from, a divisor of the tokens (1,024): consecutive tokens,
            which are of one text each 128, share a source. By default counts do not know.
        recorded: another trace than the packaged one.

    Raises:
        TypeError, ValueError: ``sources`` is not allowed.
    """
    recorded = load_trace() if recorded is None else recorded
    n_batches, n_layers, n_tokens, _ = recorded.indices.shape
    n = 1 if sources is None else whole_number("sources", sources, 1, n_tokens)
    if n_tokens % n:
        raise ValueError(f"sources is {n}, allowed is a divisor of {n_tokens} tokens")
    chosen = recorded.indices.reshape(n_batches * n_layers * n, -1).astype(np.int64)
    chosen += np.arange(len(chosen))[:, None] * recorded.n_experts
    counts = np.bincount(chosen.ravel(), minlength=len(chosen) * recorded.n_experts)
    shape = (
        (n_batches, n_layers, recorded.n_experts) if sources is None else (n_batches, n_layers, n, recorded.n_experts)
    )
    return Scene("router trace", counts.reshape(shape), list(recorded.domain))


# ---- by name


def _still(name: str, draw: Callable[..., _Ints]) -> Callable[..., Scene]:
    return lambda b, layers, e, **options: Scene(name, draw(b, layers, e, **options), [name] * b)


def _shift(name: str, ramp: int) -> Callable[..., Scene]:
    def draw(n_batches: int, n_layers: int, n_logical: int, **options: Any) -> Scene:
        given = {"period": 100, "ramp": ramp, **options}
        told = {key: given[key] for key in ("domains", "period", "ramp") if key in given}
        counts = domain_shift(n_batches, n_layers, n_logical, **given)
        return Scene(name, counts, phases_of_shift(n_batches, **told))

    return draw


def _hot(n_batches: int, n_layers: int, n_logical: int, **options: Any) -> Scene:
    period = options.get("period", 100)
    counts = hot_expert(n_batches, n_layers, n_logical, **options)
    return Scene("hot", counts, [f"hot {b // period}" for b in range(n_batches)])


SCENES: dict[str, Callable[..., Scene]] = {
    "lognormal": _still("lognormal", lognormal),
    "zipf": _still("zipf", zipf),
    "shift": _shift("shift", 0),
    "gradual": _shift("gradual", 50),
    "hot": _hot,
}
"""The generators by name: log-normal with drift, Zipf, a sudden and a gradual change of domain, a hot expert."""


def make(name: str, n_batches: int, n_layers: int, n_logical: int, **options: Any) -> Scene:
    """Return a scene by its name.

    Args:
        name: one of `SCENES`.
        n_batches: how many batches.
        n_layers: how many layers.
        n_logical: how many experts.
        options: of the generator; ``"shift"`` and ``"gradual"`` are `domain_shift` with a ``ramp`` of 0 and 50.

    Raises:
        TypeError, ValueError: an argument is not allowed.
    """
    if name not in SCENES:
        raise ValueError(f"name is {name!r}, allowed are {', '.join(map(repr, SCENES))}")
    return SCENES[name](n_batches, n_layers, n_logical, **options)


# ---- drawing


def _rng(n_batches: int, n_layers: int, n_logical: int, tokens: int, seed: int, sources: int | None) -> Any:
    whole_number("n_batches", n_batches, 1)
    whole_number("n_layers", n_layers, 1)
    whole_number("n_logical", n_logical, 1, MOST_EXPERTS)
    tokens = whole_number("tokens", tokens, 1, 2**31 - 1)
    if sources is not None and tokens % whole_number("sources", sources, 1):
        raise ValueError(f"tokens is {tokens}, allowed is a multiple of sources = {sources}")
    return np.random.default_rng(whole_number("seed", seed, 0))


def _number(name: str, value: float, least: float, most: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        raise TypeError(f"{name} is {value!r}, allowed is a number")
    if not least <= value <= most:
        raise ValueError(f"{name} is {value}, allowed are {least:g} to {most:g}")
    return float(value)


def _noisy(rng: np.random.Generator, popularity: _Floats, noise: float) -> _Floats:
    """Each batch's own popularities."""
    return popularity if noise == 0 else popularity * np.exp(noise * rng.standard_normal(popularity.shape))


def _draw(rng: np.random.Generator, popularity: _Floats, tokens: int, sources: int | None, locality: float) -> _Ints:
    """Whole tokens by popularity ``[batches, layers, n_logical]``; batch by batch, so that memory is the result's."""
    locality = _number("locality", locality, 0, 10)
    if sources is None:
        return rng.multinomial(tokens, popularity / popularity.sum(-1, keepdims=True))
    n_batches, n_layers, n_logical = popularity.shape
    taste = np.exp(locality * rng.standard_normal((n_layers, sources, n_logical)))
    counts = np.empty((n_batches, n_layers, sources, n_logical), dtype=np.int32)
    for b in range(n_batches):
        share = popularity[b, :, None] * taste
        counts[b] = rng.multinomial(tokens // sources, share / share.sum(-1, keepdims=True))
    return counts
