"""Guests: experts whose weights come to a rank for one batch, and where they stay."""

import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lplb import exchange
from lplb.arguments import seen, whole_number
from lplb.exchange import Exchange
from lplb.overlap import Inline, OnStream, OnThread, Overlap
from lplb.placement import Placement
from lplb.transfers import TransferPlanner
from lplb.weights.mover import WeightMover

__all__ = ["GuestSlots", "check_guests", "placement_of"]


class GuestSlots:
    """Room for guests on a rank, shared by any number of layers of the same sizes.

    Layers use it one after another, each for one batch. Under a group, the ranks make one for all layers alike, and a
    thread (on CUDA a stream) brings weights in over a second group of the same ranks, which the first layer makes. When
    the slots are gone on all ranks, it serves the next ones that are made.

    Args:
        slots: guests that a rank can have at once.
        hidden_size: features of a token.
        ffn_size: features within an expert.
        device: where the layers' weights are; by default torch's default device.
        dtype: of the layers' weights; by default torch's default dtype.
        resend: whether guests' weights come again for the backward pass, into the same slots. With False every batch
            of a training pass has memory of its own for its guests, until its backward pass is over; under activation
            checkpointing that is short.

    Raises:
        TypeError, ValueError: an argument is not allowed.
    """

    fields: tuple[Tensor, Tensor]
    """Gate and up ``[slots, hidden_size, 2 * ffn_size]``, and down ``[slots, ffn_size, hidden_size]``: weights of
    guests, and in backward passes their gradients."""
    forgotten: int
    """Calls of `forget`."""

    def __init__(
        self,
        slots: int,
        *,
        hidden_size: int,
        ffn_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        resend: bool = True,
    ) -> None:
        """See the class."""
        self.slots = whole_number("slots", slots, 1)
        self.hidden_size = whole_number("hidden_size", hidden_size, 1)
        self.ffn_size = whole_number("ffn_size", ffn_size, 1)
        if not isinstance(resend, bool):
            raise TypeError(f"resend is {seen(resend)}, allowed is a bool")
        self.resend = resend
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"dtype is {dtype!r}, allowed is a floating torch.dtype")
        with torch.inference_mode(False):  # written in any mode
            self.fields = self.room(self.slots, device, dtype)
        self.device, self.dtype = self.fields[0].device, dtype
        self.expert_bytes = sum(field[0].nbytes for field in self.fields)
        self._group: dist.ProcessGroup | None = None
        self._apart: exchange.Apart | None = None
        self._overlap: Overlap | None = None
        self._messages: list[Tensor] = []
        self.forgotten = 0
        self._at_end: weakref.finalize[..., GuestSlots] | None = None
        self._batches = itertools.count()
        self._holds: int | None = None
        self._in_use: object = None

    def room(self, slots: int, device: torch.device | str | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Memory for experts, by field; not initialised."""
        hidden, ffn = self.hidden_size, self.ffn_size
        return (
            torch.empty(slots, hidden, 2 * ffn, device=device, dtype=dtype),
            torch.empty(slots, ffn, hidden, device=device, dtype=dtype),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the slots, and of one expert on its way in each direction."""
        return (self.slots + 2) * self.expert_bytes

    def forget(self) -> None:
        """Have the next batch that is routed send all its guests, whatever the slots hold; one rank's word is enough.

        For changes of weights that torch does not count, such as those of ``parameter.data``. A batch that is routed
        already, and counts on guests of an earlier one, is refused by `ExpertParallelMoE.compute` on the rank that
        called this.
        """
        self.forgotten += 1

    def __deepcopy__(self, memo: dict[int, Any]) -> "GuestSlots":
        """Once layers use them, copies of these layers do; before, others of the same kind."""
        if self._overlap is not None:
            return self
        sizes = {"hidden_size": self.hidden_size, "ffn_size": self.ffn_size}
        return GuestSlots(self.slots, **sizes, device=self.device, dtype=self.dtype, resend=self.resend)

    # ---- for layers

    def connect(self, ranks: Exchange) -> Exchange:
        """Return the same ranks over a second group, which the first layer makes. Collective that time."""
        if self._overlap is not None:
            self.wait()
            return ranks if self._apart is None else exchange.Distributed(self._apart.group)
        self._group = ranks.group if isinstance(ranks, exchange.Distributed) else None
        if isinstance(ranks, exchange.Distributed):
            self._apart = exchange.Apart(ranks)
            self._overlap = OnStream(self.device) if self.device.type == "cuda" else OnThread()
            # Work holds this object, so none is under way when it goes. Others have the group when all ranks' are gone.
            self._at_end = weakref.finalize(self, _give_back, self._apart, self._overlap)
            self._at_end.atexit = False
            return exchange.Distributed(self._apart.group)
        self._overlap = Inline()
        return ranks

    @property
    def settings(self) -> str:
        """In what ranks must not differ, in words."""
        users = "no layer"
        if self._overlap is not None:
            users = "other layers"
            if self._apart is not None:  # whose group has the same name on all ranks
                users += f" over group {exchange.group_name(exchange.Distributed(self._apart.group))!r}"
        return f"guests with {self.slots} slots, resend {self.resend} and {users}"

    def check_group(self, ranks: Exchange) -> None:
        """Refuse layers of different groups."""
        group = ranks.group if isinstance(ranks, exchange.Distributed) else None
        if self._overlap is not None and group is not self._group:
            raise ValueError("guests serve layers of another group, allowed are layers of one group")

    def messages(self, mover: WeightMover) -> list[Tensor]:
        """Flat memory for one expert in each direction, for all layers."""
        if not self._messages:
            self._messages = [mover.link.buffer(mover.fields.layout) for _ in range(2)]
        return self._messages

    def next_batch(self) -> int:
        """A number for a batch, of whatever layer. Ranks call this alike, so they count alike."""
        return next(self._batches)

    def holds(self, batch: int) -> bool:
        """Whether the slots have the guests of this batch, or will when work under way is done."""
        return self._holds == batch

    def start(self, work: Callable[[], object], holds: int | None, in_use: object = None) -> None:
        """Let work begin beside what comes next, after the work before.

        Args:
            work: writes or reads the slots.
            holds: the batch whose guests the slots have after it; ``None`` for nothing that can be used again.
            in_use: what must not be freed before `wait`.
        """
        self.wait()
        assert self._overlap is not None
        self._holds, self._in_use = holds, in_use

        def run() -> None:
            work()

        try:
            self._overlap.start(run)
        except BaseException:
            self._holds = None
            self._keep_group()
            raise

    def wait(self) -> None:
        """Let what comes now come after the work; raise what went wrong in it."""
        if self._overlap is None:
            return
        self._overlap.wait()
        self._in_use = None
        error = self._overlap.take_error()
        if error is not None:
            self._holds = None
            self._keep_group()
            raise error

    def _keep_group(self) -> None:
        """Give the second group to nobody: after an error work on other ranks may not have come to its end."""
        if self._at_end is not None:
            self._at_end.detach()

    def mark(self, holds: int | None) -> None:
        """Say of which batch the slots have the guests now."""
        self._holds = holds


def _give_back(apart: exchange.Apart, overlap: Overlap) -> None:
    """Let others use the group, unless the last work failed and nobody waited for it."""
    overlap.wait()
    if overlap.take_error() is None:
        apart.give_back()


def check_guests(
    planner: object, guests: object, n_experts: int, ranks: Exchange, sizes: tuple[int, int], like: Tensor
) -> None:
    """Refuse what a layer cannot lend with.

    Args:
        planner: what is given as ``transfers``.
        guests: what is given as ``guests``.
        n_experts: of the layer.
        ranks: of the layer.
        sizes: hidden and ffn size of the layer.
        like: a tensor of the layer's device and dtype.

    Raises:
        TypeError, ValueError: with the value seen and the value allowed.
    """
    if not isinstance(planner, TransferPlanner):
        raise TypeError(f"transfers is {seen(planner)}, allowed is an lplb.TransferPlanner or None")
    if guests is None:
        raise ValueError("guests is None, allowed with transfers is an lplb.nn.GuestSlots")
    if not isinstance(guests, GuestSlots):
        raise TypeError(f"guests is {seen(guests)}, allowed is an lplb.nn.GuestSlots")
    for name, found, allowed in (
        ("experts", planner.n_logical, n_experts),
        ("ranks", planner.n_ranks, ranks.size),
    ):
        if found != allowed:
            raise ValueError(f"transfers plans for {found} {name}, allowed is the layer's {allowed}")
    if planner.device != like.device:
        raise ValueError(
            f"transfers works on {str(planner.device)!r}, allowed is the layer's device, {str(like.device)!r}"
        )
    mine = (*sizes, like.dtype, str(like.device))
    theirs = (guests.hidden_size, guests.ffn_size, guests.dtype, str(guests.device))
    if theirs != mine:
        raise ValueError(f"guests has (hidden_size, ffn_size, dtype, device) {theirs}, allowed is the layer's, {mine}")
    if planner.is_collective:
        raise ValueError("transfers has a group, allowed is a planner without one: the layer gathers counts")
    if guests.slots != planner.slots:
        raise ValueError(
            f"guests has {guests.slots} slots, allowed are as many as transfers plans for, {planner.slots} (of all "
            "experts if it was made without slots=)"
        )
    guests.check_group(ranks)


def placement_of(planner: TransferPlanner) -> Placement:
    """Return where a planner's residents are, of which every rank has as many.

    Raises:
        ValueError: ranks have different numbers of them.
    """
    by_rank = planner.residents.by_rank
    odd = next((rank for rank, experts in enumerate(by_rank) if len(experts) != len(by_rank[0])), None)
    if odd is not None:
        raise ValueError(
            f"transfers has {len(by_rank[odd])} residents on rank {odd}, allowed are as many as on rank 0, "
            f"{len(by_rank[0])}"
        )
    return Placement([expert for experts in by_rank for expert in experts], planner.n_ranks)
