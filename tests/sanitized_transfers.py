"""Plans with transfers and tokens by range for test_sanitizer_gpu.py: every kernel, without torch, against the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np

JOINT = [(0.0, -1, -1, 1), (0.05, -1, 4, 8)]
LLEP = [(1.0, 16, 1.0, False, -1), (1.0, 16, 1.0, True, -1)]
SHAPES = [
    (1, 5, 2, 1),
    (8, 24, 24, 8),
    (8, 24, 2, 4),
    (64, 96, 2, 64),
    (128, 160, 3, 32),
]  # ranks, experts, slots, domain


class TransferProblem:
    """Experts in blocks, every fourth with another copy, on both backends; ``device`` is test_sanitizer_gpu's."""

    def __init__(self, native: Any, device: Any, shape: tuple[int, int, int, int]) -> None:
        self.device, self.shape = device, shape
        n_ranks, n_logical, slots, domain = shape
        holds = np.zeros((n_ranks, n_logical), dtype=bool)
        experts = np.arange(n_logical)
        holds[experts * n_ranks // n_logical, experts] = True
        holds[experts[::4] % n_ranks, experts[::4]] = True
        placed = [part.tolist() for part in np.nonzero(holds)]
        self.on_cpu = native.CpuTransfers(*placed, n_logical, n_ranks, slots, domain)
        self.ranges = native.CpuRanges(*placed, n_logical, n_ranks, slots)
        self.sms, shared = device.attribute(device.SMS), device.attribute(device.SHARED_BYTES)
        self.core = native.CudaTransfers(*placed, n_logical, n_ranks, slots, domain, shared, self.sms)
        self.faults = device.pinned(4)
        scratch = device.zeros(self.core.scratch_bytes)
        self.core.bind(device.copy_of(np.frombuffer(self.core.tables, np.uint8)), scratch, self.faults.ctypes.data)
        self.fields = [
            (np.int64, (n_logical, n_ranks)), (np.int64, (n_ranks,)), (np.int32, (self.on_cpu.rows, 3)),
            (np.int32, (n_ranks, slots)), (np.int64, (8,)), (np.float64, (1,)),
        ]  # fmt: skip

    def check(self, got: list[int], plan: Any) -> list[np.ndarray]:
        """What the device wrote is what ``plan(out)`` writes on the CPU."""
        wanted = [np.full(shape, -7, kind) for kind, shape in self.fields]
        assert plan([array.ctypes.data for array in wanted]) == 0
        for address, array in zip(got, wanted, strict=True):
            assert np.array_equal(self.device.read(address, array.dtype, *array.shape), array), self.shape
        return wanted

    def run(self, rng: np.random.Generator, count_dtype: Any, index_dtype: Any) -> None:
        """All plans of one batch, without and with guests from before, and the tokens of one source by the last."""
        n_ranks, n_logical, *_ = self.shape
        share = rng.dirichlet(np.full(n_logical, 0.2))
        counts = rng.multinomial(700, share, n_ranks).astype(count_dtype)
        out = [self.device.empty(np.dtype(kind).itemsize * int(np.prod(shape))) for kind, shape in self.fields]
        here = counts.ctypes.data, counts.itemsize, n_ranks, n_logical
        there = self.device.copy_of(counts), *here[1:]
        for rules in LLEP:
            self.core.llep(there, *rules, out, 0)
            wanted = self.check(out, lambda to, rules=rules: self.on_cpu.llep(here, *rules, to))
        for rules in JOINT:
            for held in (None, wanted[3]):
                on_device = 0 if held is None else self.device.copy_of(held)
                self.core.joint(there, *rules, on_device, out, 0)
                before = 0 if held is None else held.ctypes.data
                wanted = self.check(
                    out, lambda to, rules=rules, before=before: self.on_cpu.joint(here, *rules, before, to)
                )
        source = n_ranks - 1
        indices = rng.permutation(np.concatenate([np.repeat(np.arange(n_logical), counts[source]), [-1] * 9]))
        indices = indices.astype(index_dtype)
        expected, sent = np.empty_like(indices), np.empty(n_ranks * self.core.width, np.int64)
        plan = wanted[0].ctypes.data, wanted[3].ctypes.data
        rest = 2, source, (indices.ctypes.data, indices.itemsize, indices.size)
        assert self.ranges.route(plan, here, *rest, expected.ctypes.data, sent.ctypes.data, 1) == (-1, -1)
        slots_at, send_at = self.device.empty(indices.nbytes), self.device.empty(sent.nbytes)
        given = self.device.copy_of(indices), indices.itemsize, indices.size
        self.core.route((out[0], out[3]), there, 2, source, given, self.sms, slots_at, send_at, 0)
        assert np.array_equal(self.device.read(slots_at, index_dtype, indices.size), expected)
        assert np.array_equal(self.device.read(send_at, np.int64, sent.size), sent)
        assert not self.faults.any()


def run_transfers(native: Any, device: Any) -> None:
    """Every kernel for transfers, of every width of sets and type of counts and indices."""
    for shape in SHAPES:
        problem, rng = TransferProblem(native, device, shape), np.random.default_rng(shape)
        problem.run(rng, np.int64, np.int32)
        problem.run(rng, np.int32, np.int64)
        print(f"transfers on {shape[0]} ranks: as on the CPU", flush=True)
