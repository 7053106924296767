"""Plans with transfers, and tokens by range, on a CUDA device: memory and streams around `lplb._C.CudaTransfers`.

As `lplb.cuda`: work goes to the caller's current stream, and nothing waits for the device. What goes wrong there is
written to pinned host memory, and raised by whatever call finds it.
"""

from collections.abc import Sequence

import torch

from lplb import _C, devices
from lplb.cuda import FaultWords, StreamOrder, strict
from lplb.exchange import EarlierFault
from lplb.routes import MOST_INDICES, Routed

Counts = tuple[int, int, int, int]
"""Counts of all sources: address, bytes of one, rows, and how many counts apart they begin."""
Arrays = tuple[int, int, int, int, int, int]
"""Where a plan goes, as `lplb._C.CpuTransfers` fills it."""


class TransferFaults(FaultWords):
    """What kernels report of wrong counts and indices."""

    def check(self, n_logical: int, strict: bool) -> None:
        """Raise what the device reported since the last time; indices outside only where ``strict``."""
        if self._take(2):
            raise EarlierFault(
                "counts of an earlier plan were negative, and it is one of no tokens; allowed are 0 and more"
            )
        if self._take(3):
            raise EarlierFault(
                f"counts of an earlier plan were {_C.most_transfer_tokens} tokens or more together, and it is one of "
                f"no tokens; allowed are {_C.most_transfer_tokens - 1}"
            )
        if expert := self._take(1):
            raise EarlierFault(
                f"in an earlier route the indices did not name expert {expert - 1} as often as the plan's counts say "
                "of the source; allowed are indices of the batch that the plan is for"
            )
        self._check_outside(n_logical, strict)


class Backend:
    """`lplb._C.CpuTransfers` and `lplb.routes.RangeRouter` for a CUDA device, with the same results.

    Arguments are checked before; calls come one at a time. Outputs have fixed sizes, nothing is allocated for a plan,
    and every call can be captured in a CUDA graph. A plan for counts that are refused is one of no tokens: what is
    wrong with them is raised by a later call.

    Args:
        resident_rank: the rank of every resident, in rank order.
        resident_expert: the expert of each, in slot order within a rank; every expert is there.
        n_logical: experts.
        n_ranks: ranks.
        slots: guest slots of a rank.
        domain: consecutive ranks within which weights travel.
        ranks_per_node: consecutive ranks among which tokens travel cheaply.
        device: a CUDA device that `devices.check_backend` does not refuse.
    """

    def __init__(
        self,
        resident_rank: Sequence[int],
        resident_expert: Sequence[int],
        n_logical: int,
        n_ranks: int,
        slots: int,
        domain: int,
        ranks_per_node: int,
        device: torch.device,
    ) -> None:
        """See the class."""
        self._device = device
        self._n_logical, self._n_ranks, self._ranks_per_node = n_logical, n_ranks, ranks_per_node
        self._strict = strict()
        properties = torch.cuda.get_device_properties(device)
        self._sms = properties.multi_processor_count
        self._core = _C.CudaTransfers(
            resident_rank, resident_expert, n_logical, n_ranks, slots, domain, devices.shared_bytes(device), self._sms
        )
        self.name = f"CUDA ({properties.name})"
        self.rows = self._core.rows
        """Rows of the table of transfers."""
        self.width = self._core.width
        """Virtual slots per rank."""
        with torch.cuda.device(device):
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError("a planner is made outside of CUDA graph capture; this is inside")
            self._tables = torch.frombuffer(bytearray(self._core.tables), dtype=torch.uint8).to(device)
            self._scratch = torch.zeros(self._core.scratch_bytes, dtype=torch.uint8, device=device)
            self._faults = TransferFaults()
            self._order = StreamOrder(device)
            self._core.bind(self._tables.data_ptr(), self._scratch.data_ptr(), self._faults.address)

    @property
    def workspace_bytes(self) -> int:
        """Bytes kept on the device."""
        return self._tables.numel() + self._scratch.numel()

    @property
    def indices_outside(self) -> int:
        """Indices outside ``[-1, n_logical)`` that were mapped to -1, as far as the device has got."""
        return self._faults.indices_outside

    def check_earlier(self) -> None:
        """Raise what the device has reported of earlier calls.

        Raises:
            EarlierFault: once for each report.
        """
        self._faults.check(self._n_logical, self._strict)

    def joint(
        self,
        counts: Counts,
        tolerance: float,
        max_tokens: int,
        max_transfers: int,
        min_tokens: int,
        held: int,
        out: Arrays,
    ) -> int:
        """As `lplb._C.CpuTransfers.joint`, on the current stream; all addresses are of the device. Returns 0."""
        self.check_earlier()
        with torch.cuda.device(self._device):
            self._core.joint(
                counts, tolerance, max_tokens, max_transfers, min_tokens, held, out, self._order.stream(self._buffers)
            )
        return 0

    def llep(self, counts: Counts, alpha: float, m: int, lam: float, compat: bool, max_tokens: int, out: Arrays) -> int:
        """As `lplb._C.CpuTransfers.llep`, on the current stream; all addresses are of the device. Returns 0."""
        self.check_earlier()
        with torch.cuda.device(self._device):
            self._core.llep(counts, alpha, m, lam, compat, max_tokens, out, self._order.stream(self._buffers))
        return 0

    def route(
        self,
        indices: torch.Tensor,
        quota: torch.Tensor,
        guests: torch.Tensor,
        counts: torch.Tensor,
        source: int,
        n_sms: int | None = None,
    ) -> Routed:
        """As `lplb.routes.RangeRouter.route`, on the current stream and for tensors of the device.

        What only the indices tell is raised by a later call: where an expert has other tokens than were planned for,
        those beyond go to the last of its ranges. ``n_sms``: most multiprocessors to use; by default all.

        Raises:
            ValueError: there are too many indices.
            EarlierFault: what the device has reported of earlier calls.
        """
        self.check_earlier()
        if indices.numel() > MOST_INDICES:
            raise ValueError(f"indices are {indices.numel()}, allowed are {MOST_INDICES}")
        rows = len(counts)
        with torch.cuda.device(self._device):
            given = indices.contiguous()
            slots = torch.empty_like(given)
            send = torch.empty(self._n_ranks * self.width, dtype=torch.int64, device=self._device)
            self._core.route(
                (quota.data_ptr(), guests.data_ptr()),
                (counts.data_ptr(), counts.element_size(), rows, counts.stride(0)),
                0 if rows == 1 and self._n_ranks > 1 else self._ranks_per_node,
                source,
                (given.data_ptr(), given.element_size(), given.numel()),
                self._sms if n_sms is None else min(n_sms, self._sms),
                slots.data_ptr(),
                send.data_ptr(),
                self._order.stream(self._buffers),
            )
        return Routed(slots, send)

    def _buffers(self) -> tuple[torch.Tensor, ...]:
        return self._tables, self._scratch
