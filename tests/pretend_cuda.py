"""The CUDA backend's Python side without a GPU: its kernels' part is played by the CPU backend, in host memory.

What is tested so is `lplb.cuda`: which memory goes where, in which order, and how errors travel. Results are then those
of the CPU. Streams, graphs and pinned memory need a GPU.
"""

import contextlib
import ctypes
from types import SimpleNamespace

import numpy as np
import torch

from lplb import _C, cpu, cuda, devices

SMS = 3  # few, so that count_workload needs several launches


class CudaPlanner:
    """`lplb._C.CudaPlanner` as lplb/_C.pyi describes it, for addresses in host memory."""

    def __init__(self, phy2log, n_logical, n_ranks, group_size, speed, linalg, shared_bytes, sms):
        self.linalg = linalg
        self.tables = bytes(48)
        self.scratch_bytes = 80
        self._cpu = _C.CpuPlanner(phy2log, n_logical, n_ranks, group_size, speed, max_threads=sms)
        self._n_logical, self._n_physical, self._n_ranks, self._sms = n_logical, len(phy2log), n_ranks, sms
        self._n_groups = n_ranks // group_size
        self._nothing_mapped = False

    def launches(self, n, index_bytes, n_sms, batch):
        blocks, _ = self.blocks(n, n_sms)
        return [("count", blocks, 128, 0), ("solve", batch * self._n_groups, 128, 1000), ("assign", blocks, 128, 0)]

    def blocks(self, n, n_sms):
        assert 1 <= n_sms <= self._sms
        blocks = min(n_sms, max(1, -(-n // 64)))
        return blocks, max(1, -(-n // blocks))

    def bind(self, tables, scratch, faults):
        assert tables % 16 == 0
        assert not array(scratch, np.uint8, self.scratch_bytes).any()
        self._faults = array(faults, np.int64, 4)

    def count(self, indices, index_bytes, n, blocks, length, prefix, row, stream):
        assert 1 <= blocks <= self._sms
        assert n <= blocks * length
        allowed, outside = self._allowed(indices, index_bytes, n)
        self._faults[0] += outside
        assert self._cpu.count(allowed.ctypes.data, index_bytes, (n, blocks, length), prefix, 1) == -1
        array(row, np.int32, self._n_logical)[:] = array(prefix, np.int32, blocks, self._n_logical)[-1]
        self._nothing_mapped = False

    def solve(self, loads, batch, solver, out, log, stream):
        self._cpu.solve(loads, batch, (0, 0, 1, 0), 0, solver, out, log, 1)

    def solve_table(self, *arguments):
        table, words, fewest, loads, solver, out, counter, counter_bytes, log, _ = arguments
        if words:
            rows = array(table[0], np.int32, table[2], table[1])
            differing = (rows[:, self._n_logical :] != [0, *words]).any(axis=1)
            if differing.any():
                self._faults[1] = 1 + int(differing.argmax())
                self._refuse(out)
                return
        if _C.total(table, self._n_logical, loads) >= 2**31:
            self._faults[2] = 1
            self._refuse(out)
            return
        solved = self._cpu.solve(loads, 1, table, fewest, solver, out, log, 1)
        if counter:
            _C.add(counter, counter_bytes, solved)

    def _refuse(self, out):
        self._nothing_mapped = True
        array(out[6], np.int32, self._n_groups)[:] = 4

    def assign(self, *arguments):
        indices, index_bytes, n, blocks, length, prefix, table, source, split, plan, physical, _ = arguments
        allowed, _ = self._allowed(indices, index_bytes, n)
        if self._nothing_mapped:
            array(physical, allowed.dtype, n)[:] = -1
            return
        weights, starts = (np.zeros(n, np.int32) for n in (self._n_physical, self._n_logical))
        shares = weights.ctypes.data, starts.ctypes.data
        self._cpu.shares(table, source, split, plan[0], plan[6], *shares)
        self._cpu.assign(allowed.ctypes.data, index_bytes, (n, blocks, length), prefix, *shares, physical, 1)

    def run(self, *arguments):
        indices, index_bytes, n, n_sms, row, fewest, loads, solver, out, counter, counter_bytes, *rest = arguments
        physical, stream = rest
        blocks, length = self.blocks(n, n_sms)
        prefix = np.zeros((blocks, self._n_logical), dtype=np.int32)
        self.count(indices, index_bytes, n, blocks, length, prefix.ctypes.data, row, stream)
        table = row, 0, 1, 0
        self.solve_table(table, [], fewest, loads, solver, out, counter, counter_bytes, 0, stream)
        self.assign(indices, index_bytes, n, blocks, length, prefix.ctypes.data, table, 0, 0, out, physical, stream)

    def _allowed(self, indices, index_bytes, n):
        given = array(indices, np.int64 if index_bytes == 8 else np.int32, n)
        outside = (given < -1) | (given >= self._n_logical)
        return np.where(outside, -1, given).astype(given.dtype), int(outside.sum())


class CudaTransfers:
    """`lplb._C.CudaTransfers` as lplb/_C.pyi describes it, for addresses in host memory."""

    def __init__(self, resident_rank, resident_expert, n_logical, n_ranks, slots, domain, shared_bytes, sms):
        self.tables = bytes(48)
        self.scratch_bytes = 80
        self._cpu = _C.CpuTransfers(resident_rank, resident_expert, n_logical, n_ranks, slots, domain)
        self._ranges = _C.CpuRanges(resident_rank, resident_expert, n_logical, n_ranks, slots)
        self._n_logical, self._sms = n_logical, sms
        self.rows, self.width = self._cpu.rows, self._ranges.width

    def bind(self, tables, scratch, faults):
        assert tables % 16 == 0
        assert not array(scratch, np.uint8, self.scratch_bytes).any()
        self._faults = array(faults, np.int64, 4)

    def joint(self, counts, tolerance, max_tokens, max_transfers, min_tokens, held, out, stream):
        self._plan(counts, lambda c: self._cpu.joint(c, tolerance, max_tokens, max_transfers, min_tokens, held, out))

    def llep(self, counts, alpha, m, lam, compat, max_tokens, out, stream):
        self._plan(counts, lambda c: self._cpu.llep(c, alpha, m, lam, compat, max_tokens, out))

    def _plan(self, counts, plan):
        refused = plan(counts)
        if refused:
            self._faults[2 if refused > 0 else 3] = 1
            nothing = np.zeros(self._n_logical, dtype=np.int64)
            assert plan((nothing.ctypes.data, 8, 1, 0)) == 0

    def route(self, plan, counts, ranks_per_node, source, indices, n_sms, slots, send, stream):
        assert 1 <= n_sms <= self._sms
        address, index_bytes, n = indices
        given = array(address, np.int64 if index_bytes == 8 else np.int32, n)
        outside = (given < -1) | (given >= self._n_logical)
        self._faults[0] += int(outside.sum())
        allowed = np.where(outside, -1, given).astype(given.dtype)
        where = allowed.ctypes.data, index_bytes, n
        bad, expert = self._ranges.route(plan, counts, ranks_per_node, source, where, slots, send, 1)
        assert bad == -1
        if expert >= 0:
            self._faults[1] = 1 + expert


def array(address, dtype, *shape):
    """The memory at an address."""
    n_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if n_bytes == 0:
        return np.zeros(shape, dtype)
    return np.frombuffer((ctypes.c_byte * n_bytes).from_address(address), dtype).reshape(shape)


class Stream:
    """A current stream that remembers what it waited for."""

    def __init__(self, number):
        self.cuda_stream = number
        self.waited_for = []

    def wait_stream(self, other):
        self.waited_for.append(other.cuda_stream)

    def synchronize(self):
        pass


class Pretended:
    """What a test may change: the current stream, and whether it is capturing."""

    def __init__(self):
        self.stream = Stream(7)
        self.capturing = False


def pretend(set_attribute=setattr):
    """Let planners on the CPU use `lplb.cuda` until the process ends, or `set_attribute` is undone."""
    state = Pretended()
    _C.CudaPlanner = getattr(_C, "CudaPlanner", None)  # for monkeypatch to have something to put back
    set_attribute(_C, "CudaPlanner", CudaPlanner)
    _C.CudaTransfers = getattr(_C, "CudaTransfers", None)
    set_attribute(_C, "CudaTransfers", CudaTransfers)
    set_attribute(cpu, "Backend", lambda *settings: cuda.Backend(*settings, before=None))
    set_attribute(cuda.FaultWords, "_free", list(torch.zeros(200, 4, dtype=torch.int64)))
    set_attribute(devices, "shared_bytes", lambda device: 232448)
    properties = SimpleNamespace(multi_processor_count=SMS, name="pretended")
    set_attribute(torch.cuda, "get_device_properties", lambda device: properties)
    set_attribute(torch.cuda, "device", lambda device: contextlib.nullcontext())
    set_attribute(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    set_attribute(torch.cuda, "current_stream", lambda device=None: state.stream)
    set_attribute(torch.cuda, "Stream", lambda device: Stream(99))
    set_attribute(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    set_attribute(torch.Tensor, "record_stream", lambda tensor, stream: None)
    return state
