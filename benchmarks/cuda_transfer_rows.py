"""What bench_cuda.py times of plans with transfers: batches, the calls for them, and a check against the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lplb import _C
from lplb.cuda_transfers import Backend
from lplb.llep_scenes import llep_scene, skewed_scene
from lplb.routes import RangeRouter

JOINT, LLEP = "joint", "llep"
Call = Callable[[], Any]


@dataclass(frozen=True)
class TransferCase:
    """Experts in blocks on ranks, and counts int64 [n_ranks, n_logical] of several batches."""

    name: str
    strategy: str
    counts: list[torch.Tensor]
    slots: int
    tolerance: float = 0.0
    bar: float | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Ranks and experts."""
        n_ranks, n_logical = self.counts[0].shape
        return n_ranks, n_logical

    def placed(self) -> tuple[list[int], list[int], int, int, int, int]:
        """Arguments of the cores."""
        n_ranks, n_logical = self.shape
        ranks = (np.arange(n_logical) * n_ranks // n_logical).tolist()
        return ranks, list(range(n_logical)), n_logical, n_ranks, self.slots, n_ranks

    def launches(self, sms: int, shared: int) -> list[tuple[str, int, int, int]]:
        """(kernel, blocks, threads, shared bytes) of a plan."""
        found = _C.CudaTransfers(*self.placed(), shared, sms).launches(0, sms)
        return [found[0]]


class Arrays:
    """Where a plan goes."""

    def __init__(self, case: TransferCase, rows: int, device: str) -> None:
        """Fill all with what no plan has."""
        n_ranks, n_logical = case.shape

        def filled(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.full(shape, -7, dtype=dtype, device=device)

        self.quota, self.guests = filled(n_logical, n_ranks), filled(n_ranks, case.slots, dtype=torch.int32)
        self.numbers = filled(8)
        self.tensors = [
            self.quota,
            filled(n_ranks),
            filled(rows, 3, dtype=torch.int32),
            self.guests,
            self.numbers,
            filled(1, dtype=torch.float64),
        ]

    @property
    def addresses(self) -> tuple[int, int, int, int, int, int]:
        """As the cores want them."""
        a, b, c, d, e, f = (tensor.data_ptr() for tensor in self.tensors)
        return a, b, c, d, e, f


class Timed:
    """A case on a device and on the CPU."""

    def __init__(self, case: TransferCase, device: str) -> None:
        """Plan every batch on the CPU."""
        self.case = case
        self._core = _C.CpuTransfers(*case.placed())
        self._backend = Backend(*case.placed(), case.shape[0], torch.device(device))
        self._there = [counts.to(device) for counts in case.counts]
        self._wanted = [Arrays(case, self._core.rows, "cpu") for _ in case.counts]
        self._got = [Arrays(case, self._core.rows, device) for _ in case.counts]
        self.on_cpu = [self._call(self._core, *pair) for pair in zip(case.counts, self._wanted, strict=True)]
        self.calls = [self._call(self._backend, *pair) for pair in zip(self._there, self._got, strict=True)]
        for plan in self.on_cpu:
            plan()

    def _call(self, core: Any, counts: torch.Tensor, out: Arrays) -> Call:
        table = counts.data_ptr(), counts.element_size(), len(counts), counts.stride(0)
        if self.case.strategy == LLEP:
            return lambda: core.llep(table, 1.0, 1024, 1.3, False, -1, out.addresses)
        return lambda: core.joint(table, self.case.tolerance, -1, -1, 1, 0, out.addresses)

    @property
    def transfers(self) -> float:
        """Of a batch, on average."""
        return float(np.mean([out.numbers[0].item() for out in self._wanted]))

    def check(self) -> None:
        """What came out is the CPU's, bit for bit."""
        for got, wanted in zip(self._got, self._wanted, strict=True):
            if not all(torch.equal(a.cpu(), b) for a, b in zip(got.tensors, wanted.tensors, strict=True)):
                raise RuntimeError(f"{self.case.name}: a plan differs from the CPU backend's")

    def poison(self) -> None:
        """What a call leaves unwritten shows."""
        for out in self._got:
            for tensor in out.tensors:
                tensor.fill_(-7)

    def routes(self, tokens: int) -> tuple[list[Call], list[torch.Tensor]]:
        """Calls that map the batches of rank 1, and the virtual slots that the CPU finds."""
        ranks, experts, n_logical, n_ranks, slots, _ = self.case.placed()
        router = RangeRouter(ranks, experts, n_logical, n_ranks, slots, n_ranks)
        calls: list[Call] = []
        wanted = []
        for counts, there, plan, out in zip(self.case.counts, self._there, self._wanted, self._got, strict=True):
            chosen = torch.arange(n_logical).repeat_interleave(counts[1])
            indices = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(1))]
            assert len(indices) == tokens, "every source of a scene has as many"
            wanted.append(router.route(indices, plan.quota, plan.guests, counts, 1).slots)
            given = indices.to(there.device)
            calls.append(
                lambda given=given, out=out, there=there: self._backend.route(given, out.quota, out.guests, there, 1)
            )
        return calls, wanted


def transfer_cases(n_sets: int) -> list[TransferCase]:
    """8 ranks and 128 experts as LLEP has them; 64 ranks and 256 experts as UltraEP has them."""
    hot = [
        torch.from_numpy(llep_scene(128, 8, 4, 8192, hot=4, share=0.8, where="random", seed=s)) for s in range(n_sets)
    ]
    skewed = [torch.from_numpy(skewed_scene(256, 64, 8, 4096, imbalance=2.0, seed=s)) for s in range(n_sets)]
    return [
        TransferCase("8 ranks, 128 experts, 80 % to 4", JOINT, hot, 128, bar=40),
        TransferCase("8 ranks, 128 experts, 80 % to 4", LLEP, hot, 128, bar=40),
        TransferCase("64 ranks, 256 experts, imbalance 2, 2 slots, tolerance 0.01", JOINT, skewed, 2, 0.01, bar=80),
        TransferCase("64 ranks, 256 experts, imbalance 2", LLEP, skewed, 256, bar=80),
    ]
