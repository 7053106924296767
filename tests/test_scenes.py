"""Load generators: whole tokens, the moments that they promise, the same counts from the same seed."""

import numpy as np
import pytest

from lplb import scenes
from lplb.trace import load_trace

MANY = 2**30  # tokens: shares are then nearly exact


def correlation(a, b):
    return np.corrcoef(a.ravel(), b.ravel())[0, 1]


@pytest.mark.parametrize("name", scenes.SCENES)
def test_counts_are_whole_tokens_that_add_up(name):
    scene = scenes.make(name, 7, 3, 20, tokens=1000, seed=5)
    assert scene.name == name
    assert scene.counts.shape == (7, 3, 20)
    assert scene.counts.dtype == np.int64
    assert len(scene.phase) == 7
    assert scene.counts.min() >= 0
    assert (scene.counts.sum(-1) == 1000).all()


@pytest.mark.parametrize("name", scenes.SCENES)
def test_seeds_decide(name):
    def draw(seed, **options):
        return scenes.make(name, 5, 2, 16, seed=seed, **options).counts

    assert (draw(1) == draw(1)).all()
    assert (draw(1) != draw(2)).any()
    assert (draw(1, sources=4, locality=0.5) == draw(1, sources=4, locality=0.5)).all()


@pytest.mark.parametrize("name", scenes.SCENES)
def test_sources_have_as_many_tokens_each(name):
    counts = scenes.make(name, 4, 2, 16, tokens=4096, sources=8).counts
    assert counts.shape == (4, 2, 8, 16)
    assert (counts.sum(-1) == 512).all()


def test_locality_makes_sources_differ():
    def spread(locality):
        counts = scenes.zipf(3, 1, 64, tokens=MANY, exponent=0, noise=0, sources=4, locality=locality)
        return np.log(counts[0, 0] / counts[0, 0].mean(0)).std()

    assert spread(0.0) < 1e-3
    assert spread(0.5) == pytest.approx(0.5 * np.sqrt(3 / 4), rel=0.15)  # less the mean over 4 sources


def test_lognormal_has_its_sigma_and_memory():
    counts = scenes.lognormal(400, 4, 64, tokens=MANY, sigma=0.7, noise=0, memory=20, seed=3)
    log = np.log(np.maximum(counts, 1))
    log -= log.mean(-1, keepdims=True)
    assert log.std() == pytest.approx(0.7, rel=0.05)
    assert log[-100:].std() == pytest.approx(0.7, rel=0.1)  # popularities never grow apart
    for lag in (5, 20, 60):
        assert correlation(log[lag:], log[:-lag]) == pytest.approx(np.exp(-lag / 20), abs=0.08)


def test_lognormal_noise_is_of_each_batch():
    counts = scenes.lognormal(200, 2, 64, tokens=MANY, sigma=0.5, noise=0.3, memory=np.inf, seed=4)
    log = np.log(counts)
    log -= log.mean(-1, keepdims=True)
    assert (log - log.mean(0)).std() == pytest.approx(0.3, rel=0.05)
    assert log.mean(0).std() == pytest.approx(0.5, rel=0.2)


def test_zipf_has_its_exponent_in_an_order_of_each_layer():
    counts = scenes.zipf(2, 3, 50, tokens=MANY, exponent=1.2, noise=0)
    for layer in counts[0]:
        share = np.sort(layer)[::-1] / layer.max()
        assert np.allclose(share, np.arange(1, 51) ** -1.2, rtol=1e-2)
    assert (counts[0, 0].argsort() != counts[0, 1].argsort()).any()
    assert correlation(counts[0], counts[1]) > 0.999


def test_domains_take_turns():
    counts = scenes.domain_shift(60, 2, 64, tokens=MANY, domains=3, period=10, noise=0)
    assert correlation(counts[0], counts[9]) > 0.999
    assert correlation(counts[0], counts[30]) > 0.999  # the first again
    for other in (10, 20, 40, 50):
        assert correlation(counts[0], counts[other]) < 0.5


def test_a_domain_grows_from_nothing_to_all():
    counts = scenes.domain_shift(40, 1, 32, tokens=MANY, period=20, ramp=9, noise=0)
    share = counts[:, 0] / MANY
    for step in range(10):
        mixed = share[0] + (step + 1) / 10 * (share[-1] - share[0])
        assert np.allclose(share[20 + step], mixed, atol=1e-4)
    phase = scenes.phases_of_shift(40, period=20, ramp=9)
    assert phase[19:21] == ["domain 0", "domain 0 → 1"]
    assert phase[28:30] == ["domain 0 → 1", "domain 1"]


def test_a_hot_expert_has_its_share_and_then_another():
    counts = scenes.hot_expert(30, 2, 16, tokens=MANY, share=0.4, period=10, noise=0)
    share = counts / MANY
    assert np.allclose(share.max(-1), 0.4, atol=1e-3)
    hot = share.argmax(-1)
    for layer in hot.T:
        assert [len(set(layer[i : i + 10])) for i in (0, 10, 20)] == [1, 1, 1]
        assert len(set(layer)) == 3


@pytest.mark.parametrize("sources", [None, 1, 8, 1024])
def test_the_trace_is_counted(sources):
    recorded = load_trace()
    scene = scenes.trace(sources)
    assert scene.phase == recorded.domain
    for b, layer in ((0, 0), (101, 3), (239, 2)):
        rows = recorded.indices[b, layer].reshape(sources or 1, -1)
        expected = np.stack([np.bincount(row, minlength=64) for row in rows])
        assert (scene.counts[b, layer] == (expected[0] if sources is None else expected)).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scenes.lognormal(0, 1, 8), "n_batches is 0, allowed is 1 or more"),
        (lambda: scenes.lognormal(1, 1, 8, sigma=-1), "sigma is -1, allowed are 0 to 10"),
        (lambda: scenes.lognormal(1, 1, 8, noise=float("nan")), "noise is nan, allowed"),
        (lambda: scenes.lognormal(1, 1, 8, memory=-1.0), "memory is -1.0, allowed are 0 to inf"),
        (lambda: scenes.lognormal(1, 1, 8, tokens=10, sources=3), "tokens is 10, allowed is a multiple of sources = 3"),
        (lambda: scenes.lognormal(1, 1, 8, seed=-1), "seed is -1"),
        (lambda: scenes.lognormal(1, 1, 8, locality=11, sources=1), "locality is 11"),
        (lambda: scenes.zipf(1, 1, 8, exponent=11), "exponent is 11, allowed are 0 to 10"),
        (lambda: scenes.zipf(1, 1, 1 << 17), "n_logical is 131072, allowed is 1 to 65536"),
        (lambda: scenes.domain_shift(1, 1, 8, domains=1), "domains is 1, allowed is 2"),
        (lambda: scenes.domain_shift(1, 1, 8, period=5, ramp=6), "ramp is 6, allowed is 0 to 5"),
        (lambda: scenes.hot_expert(1, 1, 1), "n_logical is 1, allowed is 2 or more"),
        (lambda: scenes.hot_expert(1, 1, 8, share=1.5), "share is 1.5, allowed are 0 to 1"),
        (lambda: scenes.trace(7), "sources is 7, allowed is a divisor of 1024"),
        (lambda: scenes.make("storm", 1, 1, 8), "name is 'storm', allowed are 'lognormal'"),
    ],
)
def test_refuses_by_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scenes.lognormal(1.0, 1, 8), "n_batches is 1.0, allowed is an int"),
        (lambda: scenes.lognormal(1, 1, 8, sigma="1"), "sigma is '1', allowed is a number"),
        (lambda: scenes.zipf(1, 1, 8, noise=True), "noise is True, allowed is a number"),
    ],
)
def test_refuses_by_type(call, message):
    with pytest.raises(TypeError, match=message):
        call()
