"""The collector of loads: every row is what NumPy counts, whoever reads it and when."""

import contextlib
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pretend_cuda import Stream

from lplb.dynamic import collector as module
from lplb.dynamic.collector import LoadCollector
from lplb.dynamic.window import CudaWindow, DeviceWindow

N_LOGICAL = 12
INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
gpu = pytest.mark.gpu


class PretendedEvent:
    def record(self, stream):
        pass


def pretend(monkeypatch):
    """Let collectors on the CPU use `CudaWindow`, with streams that do nothing."""
    state = SimpleNamespace(stream=Stream(7), capturing=False, device=torch.device("cpu"))
    zeros, empty = torch.zeros, torch.empty
    monkeypatch.setattr(module, "window_for", lambda device, *sizes: CudaWindow(*sizes, device))
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: empty(*a, **k))
    monkeypatch.setattr(torch, "zeros", lambda *a, pin_memory=False, **k: zeros(*a, **k))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: state.stream)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Side(99))
    monkeypatch.setattr(torch.cuda, "Event", PretendedEvent)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    return state


class Side(Stream):
    def wait_event(self, event):
        self.waited_for.append(event)


@pytest.fixture(params=["host", "any device", "cuda pretended", pytest.param("cuda", marks=gpu)])
def make(request, monkeypatch):
    """What makes collectors; its `device` is where they count."""
    device = "cpu"
    if request.param == "any device":
        monkeypatch.setattr(module, "window_for", lambda device, *sizes: DeviceWindow(*sizes, device))
    if request.param == "cuda pretended":
        pretend(monkeypatch)
    if request.param == "cuda":
        need_gpu()
        device = "cuda"

    def collector(n_logical=N_LOGICAL, *arguments, **settings):
        return LoadCollector(n_logical, *arguments, **({"device": device} | settings))

    collector.device, collector.refuses = device, request.param == "host"
    return collector


def need_gpu():
    if not torch.cuda.is_available():  # torch's kernels count there: lplb need not be built with CUDA
        pytest.skip("needs a CUDA device")


def counted(indices, n_logical=N_LOGICAL):
    flat = np.asarray(indices).ravel()
    return np.bincount(flat[flat >= 0].astype(np.int64), minlength=n_logical)


def batch(seed, shape, n_logical=N_LOGICAL):
    return np.random.default_rng(seed).integers(-1, n_logical, shape)


# What is counted


@pytest.mark.parametrize("dtype", INTEGERS)
def test_any_integers_in_any_order_of_memory(make, dtype):
    if not hasattr(torch, dtype):
        pytest.skip(f"this torch has no {dtype}")
    collector = make()
    lowest = 0 if dtype.startswith("u") else -1
    x = np.random.default_rng(1).integers(lowest, N_LOGICAL, (6, 4, 5)).astype(dtype)
    given = torch.from_numpy(x).to(make.device)
    for part in (given, given.transpose(0, 2), given[::2, 1:], given[:, :, 3], given[0, 0, :1], given[:0]):
        collector.collect(part)
    clock, rows = collector.rows()
    assert (clock, rows.dtype, rows.device.type, rows.shape) == (6, torch.int64, "cpu", (6, 1, N_LOGICAL))
    expected = [counted(part) for part in (x, x, x[::2, 1:], x[:, :, 3], x[0, 0, :1], x[:0])]
    assert (rows[:, 0].numpy() == expected).all()


def test_large_batches_on_several_threads(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    collector = LoadCollector(300)
    for n in (2 * 65536 - 1, 2 * 65536, 3 * 65536 + 7, 5 * 65536):
        x = batch(n, n, 300)
        collector.collect(torch.from_numpy(x))
        assert (collector.rows(1)[1][0, 0].numpy() == counted(x, 300)).all()


def test_what_the_mask_leaves_out_is_not_looked_at(make):
    collector = make()
    x = batch(2, (7, 3, 2))
    x[5] = 1 << 40
    x[6] = -(1 << 40)
    rng = np.random.default_rng(3)
    for dims in (1, 2, 3):
        mask = rng.random(x.shape[:dims]) < 0.5
        mask[5:] = False
        collector.collect(torch.from_numpy(x).to(make.device), mask=torch.from_numpy(mask).to(make.device))
        assert (collector.rows(1)[1][0, 0].numpy() == counted(x[mask])).all()
    for all_of in (True, False):
        mask = torch.full((5, 3), all_of, device=make.device)
        collector.collect(torch.from_numpy(x[:5]).to(make.device), mask=mask)
        assert (collector.rows(1)[1][0, 0].numpy() == counted(x[:5]) * all_of).all()
    collector.collect(
        torch.zeros(0, 8, dtype=torch.int32, device=make.device),
        mask=torch.zeros(0, dtype=torch.bool, device=make.device),
    )
    assert collector.rows(1)[1].sum() == 0
    assert collector.indices_outside == 0


def test_counts_instead_of_indices(make):
    collector = make(interval=2)
    counts = np.random.default_rng(4).integers(0, 100, 2 * N_LOGICAL).astype(np.int32)
    given = torch.from_numpy(counts).to(make.device)
    collector.collect(counts=given[:N_LOGICAL])
    collector.collect(counts=given.long()[::2])
    assert (collector.rows(1)[1][0, 0].numpy() == counts[:N_LOGICAL].astype(np.int64) + counts[::2]).all()
    collector.collect(torch.tensor([3, 3], device=make.device))
    collector.collect(counts=given[:N_LOGICAL].to(torch.uint8))
    assert (collector.rows(1)[1][0, 0].numpy() == counts[:N_LOGICAL] + counted([3, 3])).all()


def test_a_row_holds_more_than_32_bits(make):
    collector = make(2, interval=4)
    for _ in range(4):
        collector.collect(counts=torch.tensor([2**31 - 1, 1], device=make.device))
    assert collector.rows(1)[1][0, 0].tolist() == [4 * (2**31 - 1), 4]


PHASES = (None, ("only",), ("prefill", "decode"), {"early": range(0, 3), "late": range(3, 9), "gap": range(20, 22)})


@st.composite
def histories(draw):
    """Settings, and what is collected: (phase given, number of the phase, indices, mask or None)."""
    phases = draw(st.sampled_from(PHASES))
    n_phases = 1 if phases is None else len(phases)
    calls = []
    for _ in range(draw(st.integers(0, 30))):
        number = draw(st.integers(0, n_phases - 1))
        named = None if n_phases == 1 else list(phases)[number]
        if isinstance(phases, dict) and draw(st.booleans()):
            named = draw(st.sampled_from([*phases[named]]))
        shape = tuple(draw(st.lists(st.integers(0, 4), min_size=1, max_size=3)))
        rng = np.random.default_rng(draw(st.integers(0, 2**32)))
        dims = draw(st.integers(0, len(shape)))
        mask = rng.random(shape[:dims]) < 0.6 if dims else None
        calls.append((named, number, rng.integers(-1, N_LOGICAL, shape), mask))
    return phases, n_phases, draw(st.integers(1, 4)), draw(st.integers(1, 5)), calls


def brute_force(n_phases, interval, calls):
    rows = np.zeros((len(calls) // interval, n_phases, N_LOGICAL), dtype=np.int64)
    for i, (_, number, x, mask) in enumerate(calls[: len(rows) * interval]):
        rows[i // interval, number] += counted(x if mask is None else x[mask])
    return rows


@pytest.mark.parametrize("kind", ["host", "any device"])
@given(histories())
def test_rows_are_what_numpy_counts(kind, history):
    phases, n_phases, interval, window, calls = history
    with pytest.MonkeyPatch.context() as patch:
        if kind == "any device":
            patch.setattr(module, "window_for", lambda device, *sizes: DeviceWindow(*sizes, device))
        collector = LoadCollector(N_LOGICAL, interval, window=window, phases=phases, device="cpu")
        for i, (named, _, x, mask) in enumerate(calls):
            assert collector.clock == i // interval
            collector.collect(torch.from_numpy(x), named, None if mask is None else torch.from_numpy(mask))
        expected = brute_force(n_phases, interval, calls)
        clock, rows = collector.rows()
        assert clock == collector.clock == len(expected)
        assert (rows.numpy() == expected[-window:]).all()
        for n in range(len(rows) + 1):
            assert (collector.rows(n)[1].numpy() == expected[clock - n :]).all()
        for until in range(max(0, clock - window), clock + 1):
            n = min(until, window)
            assert (collector.rows_until(until, n).numpy() == expected[until - n : until]).all()
        chosen = list(reversed(collector.phases))
        assert (collector.rows(None, chosen)[1].numpy() == rows.numpy()[:, ::-1]).all()
        if clock:
            weights = 0.5 ** np.arange(len(rows))[::-1]
            mean = np.average(expected[-window:, :1].sum(1), axis=0, weights=weights)
            np.testing.assert_allclose(collector.average(0.5, collector.phases[:1]), mean, rtol=1e-14)
            np.testing.assert_allclose(collector.average(1), expected[-window:].sum(1).mean(0), rtol=1e-14)


# Reading beside


@pytest.mark.parametrize(("window", "interval"), [(1, 1), (4, 3), (64, 1)])
def test_a_reader_beside_sees_whole_rows(make, window, interval):
    """The batches are known beforehand, so that every row a reader gets can be told."""
    n_rows, phases = 1500, ("a", "b")
    rng = np.random.default_rng(window)
    batches = rng.integers(-1, N_LOGICAL, (n_rows * interval, 40))
    expected = np.zeros((n_rows, 2, N_LOGICAL), dtype=np.int64)
    for i, x in enumerate(batches):
        expected[i // interval, i % 2] += counted(x)
    collector = make(interval=interval, window=window, phases=phases)
    wrong, reads, over = [], [], threading.Event()

    def check(clock, rows):
        if (rows.numpy() != expected[clock - len(rows) : clock]).any():
            wrong.append(clock)

    def read():
        order, last = np.random.default_rng(0), False
        while not last:
            last = over.is_set()
            check(*collector.rows())
            clock = max(0, collector.clock - int(order.integers(0, 2 * window)))
            with contextlib.suppress(ValueError):  # no longer there
                check(clock, collector.rows_until(clock, min(clock, window)))
            reads.append(collector.rows()[0])

    interval_before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    reader = threading.Thread(target=read)
    try:
        reader.start()
        for i, x in enumerate(torch.from_numpy(batches).to(make.device)):
            collector.collect(x, phases[i % 2])
            before = len(reads)
            while i % 200 == 0 and reader.is_alive() and len(reads) == before:
                time.sleep(0)
    finally:
        over.set()
        reader.join()
        sys.setswitchinterval(interval_before)
    assert not wrong
    assert reads[-1] == n_rows
    assert len(set(reads)) > 2  # it read while rows came
