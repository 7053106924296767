"""What the planner asks of a backend. `lplb.cpu` and `lplb.cuda` have one each; they have the same results."""

from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import torch

from lplb.exchange import Exchange
from lplb.overlap import Overlap
from lplb.plan import Plan


class Counted(NamedTuple):
    """A batch between count and assign."""

    source: torch.Tensor
    """Contiguous indices; may be ``physical``, which is then mapped in place."""
    physical: torch.Tensor
    """Where the result goes."""
    blocks: int
    """Parts that were counted apart, by a thread or thread block each."""
    length: int
    """Tokens in a part, but for the last ones."""


class Backend(Protocol):
    """A placement compiled for a device, and all memory that its stages need.

    Arguments are checked before; calls come one at a time, with ``guard`` entered.
    """

    name: str
    """For reports: device and variant."""
    overlap: Overlap
    """For an exchange and its plan that go on beside what the caller does next."""
    loads: torch.Tensor
    """What the last plan is for: tokens per logical expert over all ranks, int64 ``[n_logical]``."""
    plan: Plan
    """The last plan; overwritten by the next."""

    @property
    def guard(self) -> AbstractContextManager[object]:
        """Makes the device current where it is not."""

    @property
    def workspace_bytes(self) -> int:
        """Bytes kept on the device."""

    @property
    def indices_outside(self) -> int:
        """Indices outside ``[-1, n_logical)`` that were mapped to -1, as far as is known."""

    def last_plan(self) -> Plan | None:
        """A copy of the last plan, if there is one."""

    def plan_in_use(self) -> Plan:
        """A copy of the last plan; before the first, of one without tokens, by which all take the fixed split."""

    def use(self, ranks: Exchange) -> None:
        """Exchange counts through another transport between the same ranks from now on."""

    def check_earlier(self) -> None:
        """Raise, once, what is known only now of earlier calls: `exchange.EarlierFault`."""

    def wait(self) -> None:
        """Wait for the device, and raise what it has reported."""

    # ---- the stages, one after the other

    def run(self, idx: torch.Tensor, counter: torch.Tensor | None, n_sms: int | None) -> torch.Tensor:
        """All stages of a planner without a group."""

    def count_own(self, idx: torch.Tensor, n_sms: int | None, method: int) -> Counted:
        """Count this rank's batch into the row that `gather` with the same method sends."""

    def put_own(self, counts: torch.Tensor) -> None:
        """Take given counts for this rank's row, int64 ``[n_logical]``."""

    def gather(self, method: int, error: Exception | None, *, blamed: bool = True) -> None:
        """Exchange this rank's row, or its error, for the table of all ranks; then raise the error. Collective.

        An error that is not ``blamed`` is of an earlier call: this rank gives no tokens, and the others go on.
        """

    def solve_gathered(self, counter: torch.Tensor | None, log: torch.Tensor | None) -> None:
        """Plan the sum of the gathered table into ``plan``, and raise the counter by the groups solved."""

    def assign_gathered(self, counted: Counted) -> torch.Tensor:
        """Map the counted batch by the last plan: of the gathered loads, or of an earlier batch's."""

    # ---- each by itself

    def count(self, idx: torch.Tensor, n_chunks: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Counts int32 ``[n_logical]``, and ``[n_chunks, n_logical]`` of the chunks up to and with each."""

    def solve(self, loads: torch.Tensor, plan: Plan, log: torch.Tensor | None) -> None:
        """Plan one load or a batch of them, contiguous int64 ``[..., n_logical]``, into an empty plan."""

    def assign(self, idx: torch.Tensor, plan: Plan) -> torch.Tensor:
        """Map a batch by a plan. Where it has no counts its quotas are taken for this rank's alone."""

    def new_log(self) -> torch.Tensor:
        """Memory for the iterations of one load's solve: float64 ``[n_group, max_iterations + 1, log fields]``."""
