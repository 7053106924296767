"""The collector of loads: every row is what NumPy counts, whoever reads it and when."""

import contextlib
import copy
import pickle
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
from test_distributed import on_ranks

from lplb.dynamic import collector as module
from lplb.dynamic.collector import LoadCollector
from lplb.dynamic.window import CudaWindow, DeviceWindow
from lplb.exchange import EarlierFault

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
        made = LoadCollector(n_logical, *arguments, **({"device": device} | settings))
        made.refuses = request.param == "host"
        return made

    collector.device = device
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


def filled(collector, n, seed=0):
    """Collect ``n`` batches of one phase; return what they count."""
    batches = [batch((seed, i), 9) for i in range(n)]
    for x in batches:
        collector.collect(torch.from_numpy(x).to(collector.device))
    return np.array([counted(x) for x in batches]).reshape(n, N_LOGICAL)


@pytest.fixture
def beside(monkeypatch):
    """Let something happen while the next copies are made: after each, one item of a list is called."""

    def arrange(collector, *happenings):
        window, pending = collector._window, list(happenings)
        copy = window.copy

        def copy_and(*arguments):
            found = copy(*arguments)
            if pending:
                pending.pop(0)()
            return found

        monkeypatch.setattr(window, "copy", copy_and)

    return arrange


def test_rows_that_are_overwritten_meanwhile_are_not_returned(make, beside):
    collector = make(window=20)
    expected = [filled(collector, 30)]

    def collect(n):
        return lambda: expected.append(filled(collector, n, n))

    beside(collector, collect(19), collect(20), collect(40), collect(3))
    assert (collector.rows_until(25, 15)[:, 0].numpy() == expected[0][10:25]).all()  # 29 rows are behind by then: 49
    with pytest.raises(ValueError, match=r"rows from 29 on are no longer there, allowed are those from 30 on"):
        collector.rows_until(49, 20)
    clock, rows = collector.rows()
    assert (clock, collector.clock) == (109, 112)
    assert (rows[:, 0].numpy() == np.concatenate(expected)[89:109]).all()


def test_a_reader_that_is_always_too_slow_says_so(make, monkeypatch):
    monkeypatch.setattr(module, "_TRIES", 3)
    collector = make(window=1)
    filled(collector, 5)
    copy = collector._window.copy
    monkeypatch.setattr(collector._window, "copy", lambda *a: (copy(*a), filled(collector, 20))[0])
    with pytest.raises(RuntimeError, match="overwritten 3 times while they were copied; window is 1"):
        collector.rows(1)


def test_a_reader_beside_a_reset_has_what_was_before(make, beside):
    collector = make(window=4)
    expected = filled(collector, 9)
    beside(collector, lambda: (collector.reset(), filled(collector, 6)))
    clock, rows = collector.rows()
    assert clock == 9
    assert (rows[:, 0].numpy() == expected[5:]).all()
    assert collector.clock == 6


# Reset, states, devices


def test_reset_forgets_the_open_row_too(make):
    collector = make(interval=2)
    filled(collector, 5)
    collector.reset()
    assert collector.clock == 0
    assert collector.rows()[1].shape == (0, 1, N_LOGICAL)
    expected = filled(collector, 2, 1)
    assert (collector.rows(1)[1][0, 0].numpy() == expected.sum(0)).all()


@pytest.mark.parametrize("n", [0, 1, 5, 8, 40])
@pytest.mark.parametrize("window", [2, 4, 9])
def test_a_loaded_state_goes_on(make, tmp_path, n, window):
    x = filled(make(interval=3), n + 7)
    collector = make(interval=3, window=4)
    filled(collector, n)
    torch.save(collector.state_dict(), tmp_path / "state.pt")
    filled(collector, 2, 5)  # the state is its own
    other = make(interval=3, window=window)
    filled(other, 2, 6)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert other.clock == n // 3
    for i in range(n, n + 7):
        other.collect(torch.from_numpy(batch((0, i), 9)).to(make.device))
    clock, rows = other.rows()
    assert clock == (n + 7) // 3
    assert (rows[:, 0].numpy() == x[: clock * 3].reshape(clock, 3, N_LOGICAL).sum(1)[clock - len(rows) :]).all()
    first = clock - len(rows)
    assert first == max(0, n // 3 - min(4, window), clock - window)
    if first > 0 and len(rows) < window:
        with pytest.raises(ValueError, match=f"rows from {first - 1} on .* allowed are those from {first} on"):
            other.rows_until(clock, len(rows) + 1)


def good_state():
    collector = LoadCollector(2, 3, phases=("a", "b"), device="cpu")
    for _ in range(7):
        collector.collect(torch.tensor([0, 1, 1]), "b")
    return collector.state_dict()


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"rows": None}, ValueError, "has or lacks rows"),
        ({"more": 1}, ValueError, "has or lacks more"),
        ({"version": 2}, ValueError, "version of state is 2, allowed is 1"),
        ({"n_logical": 3}, ValueError, "n_logical of state is 3, allowed is 2"),
        ({"interval": 1}, ValueError, "interval of state is 1, allowed is 3"),
        ({"phases": ["a"]}, ValueError, r"phases of state is \['a'\], allowed is \['a', 'b'\]"),
        ({"clock": -1}, ValueError, "clock of state is -1"),
        ({"clock": True}, TypeError, "clock of state is True"),
        ({"clock": 1}, ValueError, "rows of state are 2, allowed with clock 1 are 1"),
        ({"collected": 3}, ValueError, "collected of state is 3, allowed is 0 to 2"),
        ({"indices_outside": -1}, ValueError, "indices_outside of state is -1"),
        ({"rows": torch.zeros(2, 2, 2)}, TypeError, r"rows of state is a torch.float32 tensor \[2, 2, 2\]"),
        ({"rows": [[0, 0]]}, TypeError, "rows of state is a list"),
        ({"rows": torch.zeros(2, 1, 2, dtype=torch.int64)}, ValueError, r"\[2, 1, 2\], allowed is \['rows', 2, 2\]"),
        ({"open": torch.zeros(2, dtype=torch.int64)}, ValueError, r"open of state has shape \[2\]"),
        ({"open": torch.full((2, 2), -7)}, ValueError, "open of state has -7, allowed is 0 or more"),
    ],
)
def test_states_of_others_change_nothing(changes, error, words):
    state = {name: value for name, value in (good_state() | changes).items() if value is not None}
    collector = LoadCollector(2, 3, phases=("a", "b"))
    collector.collect(torch.tensor([0]), "a")
    before = collector.state_dict()
    with pytest.raises(error, match=words):
        collector.load_state_dict(state)
    assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(before[k])) for k, v in collector.state_dict().items()
               if k != "phases")  # fmt: skip
    collector.load_state_dict(good_state())
    assert collector.clock == 2
    with pytest.raises(TypeError, match="state is a list"):
        collector.load_state_dict([])


def test_the_device_is_that_of_the_first_indices(monkeypatch):
    x = batch(3, 9)

    class There(DeviceWindow):
        """On another device, if "meta" had memory."""

        def __init__(self, *sizes):
            super().__init__(*sizes, torch.device("cpu"))

        def add(self, phase, indices, mask):
            assert indices.device.type == "meta"
            return super().add(phase, torch.from_numpy(x), mask)

    saved = LoadCollector(N_LOGICAL, device="cpu")
    expected = filled(saved, 3)
    collector = LoadCollector(N_LOGICAL)
    assert (collector.device, collector.clock, len(collector.rows()[1])) == (None, 0, 0)
    collector.load_state_dict(saved.state_dict())
    monkeypatch.setattr(module, "window_for", lambda device, *sizes: There(*sizes))
    for _ in range(2):
        collector.collect(torch.empty(9, dtype=torch.int64, device="meta"))
    assert collector.device == torch.device("meta")
    clock, rows = collector.rows()
    assert clock == 5
    assert (rows[:, 0].numpy() == [*expected, counted(x), counted(x)]).all()


def test_in_inference_mode_and_out_of_it(make):
    with torch.inference_mode():
        collector = make(interval=2)
        collector.collect(torch.tensor([1, 2], device=make.device))
    collector.collect(torch.tensor([2, 3], device=make.device))
    with torch.inference_mode():
        collector.reset()
        collector.collect(torch.tensor([4], device=make.device))
    collector.collect(torch.tensor([5], device=make.device))
    assert (collector.rows(1)[1][0, 0].numpy() == counted([4, 5])).all()


# What is not allowed


def test_indices_outside(make):
    collector = make(phases=("a", "b"))
    filled_before = batch(7, 5)
    collector.collect(torch.from_numpy(filled_before).to(make.device), "a")
    lowest = -(2**63)
    for i, x in enumerate(([3, 12], [-2, 3], [3, 2**63 - 1, -1, lowest], [3, -1, -1])):
        given = torch.tensor(x, device=make.device)
        if collector.refuses and i < 3:
            odd = next(v for v in x if not -1 <= v < N_LOGICAL)
            with pytest.raises(ValueError, match=rf"indices has {odd} at flat position {x.index(odd)}, allowed is -1"):
                collector.collect(given.reshape(1, -1), "b")
            assert collector.clock == 1
        else:
            collector.collect(given.reshape(1, -1), "b")
    clock, rows = collector.rows()
    assert (rows[0].numpy() == [counted(filled_before), np.zeros(N_LOGICAL)]).all()
    assert (rows[1:].numpy() == [np.zeros(N_LOGICAL), counted([3])]).all()
    assert (clock, collector.indices_outside) == ((2, 0) if collector.refuses else (5, 4))
    collector.load_state_dict(collector.state_dict())
    assert collector.indices_outside == (0 if collector.refuses else 4)
    collector.reset()
    assert collector.indices_outside == 0


@pytest.mark.parametrize("dims", [1, 2])
def test_the_place_of_an_index_is_told_whatever_is_masked(dims):
    collector = LoadCollector(4)
    x = np.random.default_rng(1).integers(0, 4, (6, 5))
    mask = np.random.default_rng(2).random(x.shape[:dims]) < 0.5
    x[~mask] = 9
    at = [i for i, keep in enumerate((x != 9).ravel()) if keep][7]
    x.ravel()[at] = 77
    with pytest.raises(ValueError, match=f"indices has 77 at flat position {at}, "):
        collector.collect(torch.from_numpy(x).T.contiguous().T, mask=torch.from_numpy(mask))


@pytest.mark.skipif(not hasattr(torch, "uint64"), reason="this torch has no uint64")
def test_no_unsigned_number_is_taken_for_minus_one(make):
    collector = make()
    for bits in ("uint64", "uint32", "uint16", "uint8"):
        largest = np.array([1, np.iinfo(bits).max], dtype=bits)
        given = torch.from_numpy(largest).to(make.device)
        if collector.refuses:
            with pytest.raises(ValueError, match=f"indices has {largest[1]} at flat position 1"):
                collector.collect(given)
        else:
            collector.collect(given)
            assert (collector.rows(1)[1][0, 0].numpy() == counted([1])).all()
    assert collector.indices_outside == (0 if collector.refuses else 4)


def test_counts_outside(make):
    collector = make(3)
    for odd in (-1, 2**31):
        given = torch.tensor([5, odd, 2**31 - 1], device=make.device)
        if collector.refuses:
            with pytest.raises(ValueError, match=f"counts has {odd}, allowed are 0 to 2147483647 tokens"):
                collector.collect(counts=given)
        else:
            collector.collect(counts=given)
            assert collector.rows(1)[1][0, 0].tolist() == [5, max(0, min(odd, 2**31 - 1)), 2**31 - 1]
    assert collector.clock == collector.indices_outside == (0 if collector.refuses else 2)


def test_lplb_check_makes_them_errors_once(make, monkeypatch):
    monkeypatch.setenv("LPLB_CHECK", "1")
    collector = make()
    if collector.refuses:
        pytest.skip("they are refused at once")
    collector.collect(torch.tensor([3, 50, -4], device=make.device))
    filled(collector, 2)
    assert collector.rows(1)[0] == 3
    with pytest.raises(EarlierFault, match=r"had 2 entries in earlier calls that are not allowed; .* = 11"):
        collector.collect(torch.tensor([3], device=make.device))
    assert collector.clock == 3
    filled(collector, 2)
    collector.collect(torch.tensor([-9], device=make.device))
    collector.average(1)
    with pytest.raises(EarlierFault, match="had 1 entries"):
        collector.collect(torch.tensor([3], device=make.device))
    monkeypatch.setenv("LPLB_CHECK", "yes")
    with pytest.raises(ValueError, match="LPLB_CHECK is 'yes'"):
        make()


ZEROS = torch.zeros(3, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (([0, 1],), TypeError, "indices is a list, allowed is a torch.Tensor"),
        ((), TypeError, "indices is a NoneType"),
        ((torch.zeros(3),), TypeError, "indices has dtype torch.float32"),
        ((torch.zeros(3, dtype=torch.bool),), TypeError, "indices has dtype torch.bool"),
        ((torch.zeros(3, dtype=torch.complex64),), TypeError, "indices has dtype torch.complex64"),
        ((torch.tensor(3),), ValueError, r"indices has shape \[\], allowed are one dimension or more"),
        ((torch.zeros(3, dtype=torch.int64, device="meta"),), ValueError, "indices is on 'meta', allowed is the coll"),
        ((ZEROS.to_sparse(),), TypeError, "indices has layout torch.sparse_coo, allowed is torch.strided"),
        ((ZEROS[:1, :1].expand(2**16, 2**15),), ValueError, "indices has 2147483648 elements, allowed are 2147483647"),
        ((ZEROS, "decode"), ValueError, "phase is 'decode', allowed is a name of 'all'"),
        ((ZEROS, 0), ValueError, "phase is 0, allowed is a name of 'all'"),
        ((ZEROS, ["all"]), TypeError, r"phase is \['all'\], allowed is a name of 'all'"),
        ((ZEROS, None, torch.ones(3)), TypeError, "mask has dtype torch.float32, allowed is torch.bool"),
        ((ZEROS, None, [True]), TypeError, "mask is a list"),
        ((ZEROS, None, torch.ones(2, dtype=torch.bool)), ValueError, r"mask has shape \[2\], allowed .* \[3, 2\], or"),
        ((ZEROS, None, torch.ones(3, 2, 1, dtype=torch.bool)), ValueError, r"mask has shape \[3, 2, 1\]"),
        ((ZEROS, None, torch.tensor(True)), ValueError, r"mask has shape \[\]"),
        ((ZEROS, None, torch.ones(3, dtype=torch.bool, device="meta")), ValueError, "mask is on 'meta'"),
        ((ZEROS, None, torch.ones(3, dtype=torch.bool).to_sparse()), TypeError, "mask has layout torch.sparse_coo"),
        (({"counts": torch.zeros(11, dtype=torch.int64)},), ValueError, r"counts has shape \[11\], allowed .*\[12\]"),
        (({"counts": torch.zeros(12)},), TypeError, "counts has dtype torch.float32"),
        (({"counts": [0] * 12},), TypeError, "counts is a list"),
        ((ZEROS, {"counts": ZEROS}), TypeError, "counts is given with indices or a mask"),
        (({"mask": ZEROS.bool(), "counts": ZEROS},), TypeError, "counts is given with indices or a mask"),
    ],
)
@pytest.mark.parametrize("make", ["host", "any device"], indirect=True)
def test_what_cannot_be_collected_changes_nothing(make, arguments, error, words):
    collector = make(interval=2)
    filled(collector, 1)
    before = collector.state_dict()
    named = arguments[-1] if arguments and isinstance(arguments[-1], dict) else {}
    with pytest.raises(error, match=words):
        collector.collect(*(a for a in arguments if a is not named), **named)
    after = collector.state_dict()
    assert after["collected"] == before["collected"] == 1
    assert torch.equal(after["open"], before["open"])


@pytest.mark.parametrize(
    ("phase", "error", "words"),
    [
        (None, ValueError, r"phase is None, allowed is a name or a step as an int of 'early' \(0 to 9\), 'late' "),
        ("middle", ValueError, "phase is 'middle'"),
        (10, ValueError, r"phase is 10, allowed .* 'late' \(20 to 49\)"),
        (-1, ValueError, "phase is -1"),
        (50, ValueError, "phase is 50"),
        (True, ValueError, "phase is True"),
        (5.0, TypeError, "phase is 5.0"),
        (torch.tensor(5), TypeError, r"phase is a torch.int64 tensor \[\], allowed is a name or a step as an int"),
    ],
)
def test_phases_that_are_none(phase, error, words):
    collector = LoadCollector(N_LOGICAL, phases={"early": range(10), "late": range(20, 50)})
    with pytest.raises(error, match=words):
        collector.collect(ZEROS, phase)
    for step in (0, 9, np.int64(20), 49):
        collector.collect(ZEROS, step)
    assert (collector.rows()[1].sum(-1) > 0).tolist() == [[True, False]] * 2 + [[False, True]] * 2


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"n_logical": 0}, ValueError, "n_logical is 0"),
        ({"n_logical": 2.0}, TypeError, "n_logical is 2.0"),
        ({"interval": 0}, ValueError, "interval is 0"),
        ({"interval": True}, TypeError, "interval is True"),
        ({"window": 0}, ValueError, "window is 0"),
        ({"window": 2**27}, ValueError, "window is 134217728, allowed for 1 phases of 12 experts are 5592405 rows"),
        ({"phases": "decode"}, TypeError, "phases is 'decode', allowed are names, or a mapping of names to ranges"),
        ({"phases": 3}, TypeError, "phases is 3"),
        ({"phases": ()}, ValueError, r"phases is \(\)"),
        ({"phases": ("a", "a")}, ValueError, r"phases is \('a', 'a'\)"),
        ({"phases": ("a", "")}, ValueError, "none empty"),
        ({"phases": ("a", 3)}, ValueError, "allowed are names"),
        ({"phases": {"a": (0, 3)}}, TypeError, r"phases\['a'\] is \(0, 3\), allowed is a range of steps"),
        ({"phases": {"a": range(3, 3)}}, ValueError, r"is range\(3, 3\), allowed is a range of step 1 that is not"),
        ({"phases": {"a": range(0, 9, 2)}}, ValueError, r"range\(0, 9, 2\)"),
        ({"phases": {"b": range(5, 9), "a": range(6)}}, ValueError, "phases 'a' and 'b' have steps .* no overlap"),
        ({"device": "nowhere"}, ValueError, "device is 'nowhere', allowed is one that torch has"),
        ({"device": 3.5}, ValueError, "device is 3.5"),
        ({"device": "meta"}, ValueError, "device is 'meta', allowed is one whose tensors have values"),
    ],
)
def test_settings_out_of_bounds(settings, error, words):
    with pytest.raises(error, match=words):
        LoadCollector(**({"n_logical": N_LOGICAL} | settings))


@pytest.mark.parametrize(
    ("method", "arguments", "error", "words"),
    [
        ("rows", (5,), ValueError, "n is 5, allowed is 0 to 4"),
        ("rows", (-1,), ValueError, "n is -1"),
        ("rows", (1.5,), TypeError, "n is 1.5"),
        ("rows", (1, "all"), TypeError, "phases is 'all', allowed is a sequence of names, of all"),
        ("rows", (1, ["al"]), ValueError, "phase is 'al'"),
        ("rows_until", (8, 1), ValueError, "clock is 8, allowed is 0 to 7"),
        ("rows_until", (-1, 1), ValueError, "clock is -1"),
        ("rows_until", (7, 5), ValueError, "n is 5, allowed is 0 to 4"),
        ("rows_until", (2, 3), ValueError, "n is 3, allowed is 0 to 2"),
        ("average", (0,), ValueError, "decay is 0, allowed are numbers above 0, up to 1"),
        ("average", (1.01,), ValueError, "decay is 1.01"),
        ("average", (float("nan"),), ValueError, "decay is nan"),
        ("average", ("1",), TypeError, "decay is '1'"),
    ],
)
def test_readings_out_of_bounds(method, arguments, error, words):
    collector = LoadCollector(N_LOGICAL, window=4)
    filled_on_cpu(collector, 7)
    with pytest.raises(error, match=words):
        getattr(collector, method)(*arguments)


def filled_on_cpu(collector, n):
    for i in range(n):
        collector.collect(torch.from_numpy(batch(i, 5)))


def test_an_average_of_nothing():
    with pytest.raises(ValueError, match="an average of 0 rows"):
        LoadCollector(N_LOGICAL).average(0.5)


# Ranks


def sources(rank, clocks):
    collector = LoadCollector(N_LOGICAL, 2, window=8, phases=("a", "b"))
    for i in range(clocks[rank] * 2):
        collector.collect(torch.from_numpy(batch((rank, i), 9)), "ab"[i % 2])
    world = torch.distributed.group.WORLD
    return (
        collector.by_source(world),
        collector.by_source(world, 2, ["b"]),
        collector.by_source(world, clock=min(clocks)),
        collector.by_source(world, 1, clock=3),
        collector.by_source(None, 1),
        collector.by_source(None, clock=clocks[rank]),
    )


def test_every_rank_gets_what_every_rank_counted(tmp_path):
    clocks = [9, 14, 3]
    got = on_ranks(3, tmp_path / "ranks", sources, clocks)
    x = [np.array([counted(batch((r, i), 9)) for i in range(2 * c)]).reshape(c, 2, -1) for r, c in enumerate(clocks)]
    for rank, results in enumerate(got):
        expected = (
            [rows[-8:].sum((0, 1)) for rows in x],
            [rows[-2:, 1].sum(0) for rows in x],
            [rows[:3].sum((0, 1)) for rows in x],
            [rows[2].sum(0) for rows in x],
            [x[rank][-1].sum(0)],
            [x[rank][-8:].sum((0, 1))],
        )
        for result, want in zip(results, expected, strict=True):
            assert result.dtype == torch.int64
            assert (result.numpy() == want).all()


def refused(rank):
    collector = LoadCollector(N_LOGICAL, window=8)
    filled_on_cpu(collector, 5)
    world, found = torch.distributed.group.WORLD, []
    for arguments, settings in (
        ((3 if rank else 6,), {}),
        ((2 + rank,), {}),
        ((2,), {"clock": 5 if rank == 0 else 9}),
        ((2, ["all"] if rank else ["some"]), {}),
    ):
        try:
            collector.by_source(world, *arguments, **settings)
        except (ValueError, TypeError) as error:
            found.append(f"{type(error).__name__}: {error}")
    try:
        LoadCollector(N_LOGICAL + rank).by_source(world)
    except ValueError as error:
        found.append(str(error))
    return found, collector.by_source(world, 5)


def test_what_one_rank_refuses_all_refuse(tmp_path):
    got = on_ranks(2, tmp_path / "ranks", refused)
    expected = [
        ["n is 6, allowed is 0 to 5", "by_source of 12 experts with n=3", "clock is 9", "phase is 'some'", "13 experts"]
    ] * 2
    for (found, counts), words in zip(got, expected, strict=True):
        assert len(found) == len(words)
        for text, part in zip(found, words, strict=True):
            assert part in text
        assert (counts.numpy() == sum(counted(batch(i, 5)) for i in range(5))).all()


# Compiled


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_in_one_graph(make, backend):
    torch.compiler.reset()
    collector = make(phases={"early": range(3), "late": range(3, 9)})

    def model(x, indices, mask):
        y = x * 2
        collector.collect(indices * 1, "late")
        collector.collect(indices, 0, mask)
        collector.collect(counts=torch.ones(N_LOGICAL, dtype=torch.int32, device=indices.device), phase=5)
        return y + 1

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for n in (6, 6, 9, 4):
        x, mask = batch(n, (n, 3)), np.arange(n) % 3 > 0
        at = collector.clock
        result = compiled(*(torch.from_numpy(v).to(make.device) for v in (np.ones(2), x, mask)))
        assert result.tolist() == [3, 3]
        rows = collector.rows_until(at + 3, 3).numpy()
        assert (rows[:, 1] == [counted(x), np.zeros(N_LOGICAL), np.ones(N_LOGICAL)]).all()
        assert (rows[:, 0] == [np.zeros(N_LOGICAL), counted(x[mask]), np.zeros(N_LOGICAL)]).all()


def test_compiled_code_outlives_no_collector():
    torch.compiler.reset()
    collector = LoadCollector(N_LOGICAL)
    handle, token = collector._handle, torch.zeros(1)
    del collector
    with pytest.raises(RuntimeError, match=f"lplb::collect has collector {handle}, allowed is one that is alive"):
        torch.ops.lplb.collect(token, ZEROS, None, handle, 0)


# CUDA: what goes to which stream, and graphs


@pytest.fixture
def pretended(monkeypatch):
    return pretend(monkeypatch)


def test_while_a_graph_is_captured_the_clock_stands_still(pretended):
    collector = LoadCollector(N_LOGICAL, interval=2, device="cpu")
    state = collector.state_dict()
    pretended.capturing = True
    collector.collect(torch.tensor([1, 2]))  # pretended captures run what they record
    collector.collect(torch.tensor([2]))
    for method in ("advance", "reset", "state_dict"):
        with pytest.raises(RuntimeError, match=f"{method} is called while a CUDA graph is captured"):
            getattr(collector, method)()
    with pytest.raises(RuntimeError, match="load_state_dict is called while"):
        collector.load_state_dict(state)
    pretended.capturing = False
    assert collector.clock == 0
    collector.advance()
    collector.advance()
    assert collector.clock == 1
    assert (collector.rows(1)[1][0, 0].numpy() == counted([1, 2, 2])).all()


def test_no_collector_is_made_while_a_graph_is_captured(pretended):
    pretended.capturing = True
    with pytest.raises(RuntimeError, match="inside CUDA graph capture, allowed is outside"):
        LoadCollector(N_LOGICAL, device="cpu")


def test_streams_are_put_in_order(pretended):
    collector = LoadCollector(N_LOGICAL, device="cpu")
    collector.collect(torch.tensor([1]))
    other = pretended.stream = Stream(8)
    collector.collect(torch.tensor([2]))
    collector.collect(torch.tensor([2]))
    assert other.waited_for == [7]
    collector.rows()
    side = collector._window._side
    assert side.waited_for == [collector._window._end]
    assert other.waited_for == [7]  # the reader's stream waits, none for it


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_collector_is_neither_copied_nor_pickled(duplicate):
    with pytest.raises(TypeError, match=r"a LoadCollector was copied or pickled, allowed is its state_dict\(\)"):
        duplicate(LoadCollector(N_LOGICAL))


@gpu
def test_a_graph_counts_what_its_replays_are_given():
    need_gpu()
    collector = LoadCollector(N_LOGICAL, 2, phases=("a", "b"), device="cuda")
    given = torch.zeros(40, dtype=torch.int64, device="cuda")
    mask = torch.ones(40, dtype=torch.bool, device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        collector.collect(given, "b", mask)  # kernels are loaded before a capture
    collector.reset()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        collector.collect(given, "b", mask)
    expected = np.zeros((15, 2, N_LOGICAL), dtype=np.int64)
    for i in range(30):
        x, keep = batch(i, 40), np.random.default_rng(i).random(40) < 0.7
        if i % 3:
            given.copy_(torch.from_numpy(x))
            mask.copy_(torch.from_numpy(keep))
            graph.replay()
            collector.advance()
            expected[i // 2, 1] += counted(x[keep])
        else:
            collector.collect(torch.from_numpy(x).cuda(), "a")
            expected[i // 2, 0] += counted(x)
    clock, rows = collector.rows()
    assert clock == 15
    assert (rows.numpy() == expected).all()


@gpu
def test_nothing_waits_for_the_device():
    need_gpu()
    collector = LoadCollector(N_LOGICAL, 2, device="cuda")
    x = torch.from_numpy(batch(1, (40, 3))).cuda()
    mask, counts = torch.ones(40, dtype=torch.bool, device="cuda"), torch.ones(N_LOGICAL, device="cuda").int()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            collector.collect(x)
            collector.collect(x.int().t(), mask=mask.expand(3, 40))
            collector.collect(x.short(), mask=mask)
            collector.collect(counts=counts)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    ones = np.ones(N_LOGICAL, dtype=np.int64)
    assert collector.clock == 8
    assert (collector.rows()[1][:, 0].numpy() == [2 * counted(x.cpu()), counted(x.cpu()) + ones] * 4).all()
