"""Statistics of loads: equal to brute force over all batches, whatever was merged, saved or dropped between."""

import io
import math
import operator
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lplb import files
from lplb.history import LoadHistory

N_LAYERS, N_LOGICAL = 3, 5


def batches(n, seed=0):
    return np.random.default_rng(seed).integers(0, 1000, (n, N_LAYERS, N_LOGICAL))


def filled(n, *, window=8, decay=None, seed=0):
    history = LoadHistory(N_LAYERS, N_LOGICAL, window=window, decay=decay)
    for batch in batches(n, seed):
        history.add(batch)
    return history


def weighted(x, weights):
    """Mean and unbiased variance of whole-number batches by the definition, in fractions."""
    w = [Fraction(weight) for weight in weights]
    v1 = sum(w)
    mean, variance = np.empty(x.shape[1:]), np.empty(x.shape[1:])
    for at in np.ndindex(*x.shape[1:]):
        values = x[(slice(None), *at)].tolist()
        centre = sum(map(operator.mul, w, values)) / v1
        mean[at] = centre
        if len(values) > 1:
            squares = sum(a * (value - centre) ** 2 for a, value in zip(w, values, strict=True))
            variance[at] = squares / (v1 - sum(a * a for a in w) / v1)
    return mean, variance


@pytest.mark.parametrize("window", [1, 4, 8])
@pytest.mark.parametrize("n", [1, 3, 4, 9, 20])
def test_the_window_has_the_last_batches_in_order(window, n):
    history = filled(n, window=window)
    last = batches(n)[-window:]
    assert len(history) == len(last)
    assert history.seen == n
    assert (history.loads() == last.swapaxes(0, 1)).all()
    mean, variance = weighted(last, [1.0] * len(last))
    np.testing.assert_allclose(history.mean(), mean, rtol=1e-12)
    if len(last) > 1:
        np.testing.assert_allclose(history.variance(), variance, rtol=1e-12)


@given(st.integers(2, 40), st.floats(0.01, 0.99) | st.sampled_from([1e-30, 1 - 1e-9]), st.integers(0, 2**32))
def test_exponential_averages_are_those_of_all_batches(n, decay, seed):
    history = filled(n, window=2, decay=decay, seed=seed)
    mean, variance = weighted(batches(n, seed), [decay**age for age in reversed(range(n))])
    np.testing.assert_allclose(history.mean(), mean, rtol=1e-10, atol=1e-9)
    np.testing.assert_allclose(history.variance(), variance, rtol=1e-8, atol=1e-9)
    assert len(history) == 2


def test_the_weighted_variance_is_unbiased():
    x = np.random.default_rng(5).normal(1000, 10, (4000, 12, 1, 1))
    found = []
    for repeat in x:
        history = LoadHistory(1, 1, window=1, decay=0.8)
        for batch in repeat:
            history.add(batch)
        found.append(history.variance()[0, 0])
    assert abs(np.mean(found) - 100) < 4 * np.std(found) / math.sqrt(len(found))


def test_far_from_zero_the_variance_keeps_its_digits():
    history = LoadHistory(1, 1, window=2, decay=0.5)
    values = np.array([2**50 + i for i in (0, 3, 1, 4, 1, 5)], dtype=np.int64)
    for value in values:
        history.add(np.array([[value]]))
    weights = [0.5**age for age in reversed(range(6))]
    small = (values - 2**50).astype(float)
    centre = np.average(small, weights=weights)
    exact = np.dot(weights, (small - centre) ** 2) / (sum(weights) - np.dot(weights, weights) / sum(weights))
    assert history.variance()[0, 0] == pytest.approx(exact, rel=0.05)  # a float64 of 2**50 has steps of 1/4


@given(st.integers(0, 15), st.integers(0, 15), st.sampled_from([None, 0.3, 0.97]), st.integers(1, 9))
def test_merging_is_adding_in_order(n, m, decay, window):
    x = batches(n + m, 3)
    whole, first, later = (LoadHistory(N_LAYERS, N_LOGICAL, window=window, decay=decay) for _ in range(3))
    for i, batch in enumerate(x):
        whole.add(batch)
        (first if i < n else later).add(batch)
    before = later.loads()
    first.merge(later)
    assert (first.seen, len(first)) == (whole.seen, len(whole))
    assert (first.loads() == whole.loads()).all()
    assert (later.loads() == before).all()
    if n + m:
        np.testing.assert_allclose(first.mean(), whole.mean(), rtol=1e-10)
    if len(whole) > 1:
        np.testing.assert_allclose(first.variance(), whole.variance(), rtol=1e-8, atol=1e-9)


def test_merging_a_history_with_itself():
    history, twice = filled(5, decay=0.9), filled(5, decay=0.9)
    history.merge(history)
    for batch in batches(5):
        twice.add(batch)
    assert (history.loads() == twice.loads()).all()
    np.testing.assert_allclose(history.variance(), twice.variance(), rtol=1e-10)


def test_extend_reset_and_tensors():
    history = filled(3)
    other = LoadHistory(N_LAYERS, N_LOGICAL, window=8)
    other.extend(torch.from_numpy(history.loads()))
    assert (other.loads() == history.loads()).all()
    for dtype in (torch.int32, torch.uint8, torch.float32, torch.bfloat16, torch.float64):
        other.reset()
        assert (len(other), other.seen) == (0, 0)
        other.add(torch.arange(15).view(3, 5).to(dtype))
        assert other.mean().tolist() == np.arange(15.0).reshape(3, 5).tolist()


def test_results_are_the_callers_own():
    history = filled(3, decay=0.5)
    for result in (history.loads, history.mean, history.variance):
        result()[:] = -1
        assert (result() >= 0).all()


# Save and load


@pytest.mark.parametrize("n", [0, 1, 5, 8, 21])
@pytest.mark.parametrize("decay", [None, 0.9])
def test_a_loaded_history_goes_on_bit_for_bit(tmp_path, n, decay):
    history = filled(n, decay=decay)
    history.save(tmp_path / "h.npz")
    loaded = LoadHistory.load(tmp_path / "h.npz")
    for batch in batches(4, 9):
        history.add(batch)
        loaded.add(batch)
    for name in ("n_layers", "n_logical", "window", "decay", "seen"):
        assert getattr(loaded, name) == getattr(history, name)
    for name in ("loads", "mean", "variance"):
        assert (getattr(loaded, name)() == getattr(history, name)()).all()
    assert [p.name for p in tmp_path.iterdir()] == ["h.npz"]  # no half-written file beside it


def saved(**changes):
    out = io.BytesIO()
    history = filled(3, window=4, decay=0.5)
    whole = {
        "format": "lplb.history",
        "version": 1,
        "window": 4,
        "decay": 0.5,
        "seen": 3,
        "recent": history.loads().swapaxes(0, 1),
        "weights": np.array([1.75, 1.75]),
        "mean": history.mean(),
        "deviation": history.variance(),
    }
    np.savez(out, **{name: value for name, value in (whole | changes).items() if value is not None})
    return out.getvalue()


def test_the_unchanged_file_loads(tmp_path):
    (tmp_path / "h.npz").write_bytes(saved())
    assert LoadHistory.load(tmp_path / "h.npz").seen == 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": None}, "lacks format"),
        ({"format": "other"}, "format: is 'other', allowed is 'lplb.history'"),
        ({"version": 2}, "version: is 2, allowed is 1"),
        ({"recent": None}, "lacks recent"),
        ({"window": 0}, "window is 0, allowed is 1 or more"),
        ({"window": 2**40}, "allowed for 3 layers"),
        ({"window": 4.5}, "window: is float64"),
        ({"decay": 1.5}, "decay is 1.5"),
        ({"seen": -1}, "seen: is -1"),
        ({"seen": 2}, r"recent: has shape \[3, 3, 5\], allowed is \[2, 3, 5\]"),
        ({"recent": np.full((3, 3, 5), math.nan)}, "recent: has nan"),
        ({"recent": np.full((3, 3, 5), -1.0)}, "recent: has -1.0"),
        ({"recent": np.zeros((3, 3, 5), dtype=np.int64)}, "recent: is int64"),
        ({"recent": np.array([{}], dtype=object)}, "recent: holds Python objects"),
        ({"mean": np.zeros((2, 5))}, r"mean: has shape \[2, 5\]"),
        ({"deviation": np.full((3, 5), math.inf)}, "deviation: has inf"),
        ({"weights": np.array([9.0, 1.0])}, "weights: are"),
        ({"weights": np.array([1.0, 1.5])}, "weights: are"),
        ({"weights": np.array([1.5, 0.0])}, "weights: are"),
    ],
)
def test_files_that_nothing_saved_are_refused(tmp_path, changes, words):
    (tmp_path / "h.npz").write_bytes(saved(**changes))
    with pytest.raises(ValueError, match=words) as caught:
        LoadHistory.load(tmp_path / "h.npz")
    assert "h.npz" in str(caught.value)


def test_other_files_are_refused(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros(3))
    with pytest.raises(ValueError, match="no NumPy archive"):
        LoadHistory.load(tmp_path / "x.npy")
    with pytest.raises(FileNotFoundError):
        LoadHistory.load(tmp_path / "absent.npz")


# What callers get wrong


@pytest.mark.parametrize(
    ("counts", "error", "words"),
    [
        (np.zeros((3, 4)), ValueError, r"\[3, 4\].*allowed is \[n_layers, n_logical\] = \[3, 5\]"),
        (np.zeros(5), ValueError, r"\[5\]"),
        (np.full((3, 5), -1), ValueError, r"counts\[0, 0\]: is -1"),
        (np.full((3, 5), math.nan), ValueError, "nan"),
        (np.full((3, 5), math.inf), ValueError, "inf"),
        (np.full((3, 5), 2.0**54), ValueError, "allowed are 0 to 9007199254740992"),
        (np.zeros((3, 5), dtype=bool), ValueError, "bool"),
        (np.zeros((3, 5), dtype=complex), ValueError, "complex"),
        (torch.zeros(3, 5, dtype=torch.bool), ValueError, "bool"),
        (torch.zeros(3, 5, device="meta"), ValueError, "meta"),
        (torch.zeros(3, 5).to_sparse(), ValueError, "sparse"),
        ([[0] * 5] * 3, TypeError, "a list, allowed is a tensor or an array"),
    ],
)
def test_counts_that_are_none(counts, error, words):
    history = filled(2, decay=0.5)
    mean = history.mean()
    with pytest.raises(error, match=words):
        history.add(counts)
    assert history.seen == 2
    assert (history.mean() == mean).all()


def test_a_bad_batch_among_several_adds_none():
    history = filled(2)
    loads = np.zeros((N_LAYERS, 3, N_LOGICAL))
    loads[1, 2, 3] = -5
    with pytest.raises(ValueError, match=r"loads\[1, 2, 3\]: is -5.0"):
        history.extend(loads)
    assert history.seen == 2


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"n_layers": 0}, ValueError, "n_layers is 0"),
        ({"n_logical": 1.5}, TypeError, "n_logical is 1.5"),
        ({"window": 0}, ValueError, "window is 0"),
        ({"window": files.MOST_VALUES}, ValueError, "allowed for 3 layers of 5 experts are 8947848 batches"),
        ({"decay": 1}, ValueError, "decay is 1"),
        ({"decay": 0.0}, ValueError, "decay is 0.0"),
        ({"decay": math.nan}, ValueError, "decay is nan"),
        ({"decay": True}, TypeError, "decay is True"),
        ({"decay": np.float32(1)}, ValueError, "decay is"),
        ({"decay": "0.5"}, TypeError, "decay is '0.5'"),
    ],
)
def test_arguments_out_of_bounds(arguments, error, words):
    with pytest.raises(error, match=words):
        LoadHistory(**({"n_layers": 3, "n_logical": 5} | arguments))


def test_statistics_of_too_few_batches():
    history = LoadHistory(1, 2, window=1)
    with pytest.raises(ValueError, match="a mean of 0 batches"):
        history.mean()
    history.add(np.ones((1, 2)))
    history.add(np.ones((1, 2)))
    with pytest.raises(ValueError, match="a variance of 1 batches"):
        history.variance()


def test_only_histories_alike_are_merged():
    history = filled(2)
    for other, words in ((filled(1, window=9), "window of later is 9, allowed is 8"), (filled(1, decay=0.5), "decay")):
        with pytest.raises(ValueError, match=words):
            history.merge(other)
    with pytest.raises(TypeError, match="int"):
        history.merge(3)
    assert history.seen == 2


def test_decay_of_numpy():
    assert LoadHistory(1, 1, decay=np.float32(0.5)).decay == 0.5
