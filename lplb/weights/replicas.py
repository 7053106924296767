"""Replicas of a training run: weights go from originals to them, gradients from them to their originals."""

import contextlib
import hashlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist

from lplb import exchange
from lplb.arguments import seen
from lplb.placement import Placement
from lplb.weights.early import EarlyMessages, Part
from lplb.weights.gradients import ExpertGradients, RankOrderSum
from lplb.weights.links import TAG, Link, checked_ranks, says_where
from lplb.weights.mover import Job, Moved, WeightMover
from lplb.weights.moves import Move, rounds_of, sum_rounds
from lplb.weights.packing import Field, pack, quiet

__all__ = ["ReplicaSync"]

_MAX_NAMED = 4  # how many differing copies a message lists
_hooked: "weakref.WeakSet[ReplicaSync]" = weakref.WeakSet()
_last_tag = [TAG]

T = TypeVar("T")


class ReplicaSync:
    """Keeps replicas of experts equal to their originals, and brings the gradients of replicas home.

    The original of an expert is in its *home* slot. The home rank alone steps the optimizer; replicas are buffers for
    weights. A step, with an optimizer over `parameters`, is

        loss.backward();  sync.reduce_gradients();  optimizer.step();  sync.broadcast()

    All methods but `parameters`, `no_sync` and `close` are collective, and raise on every rank or on none. One object
    can serve many layers: put their slots on a rank one behind the other, in the placement (experts of layer ``l`` from
    ``l * n`` on) and in the fields alike.

    With ``overlap``, hooks send a replica's gradients when a backward pass has accumulated them. All ranks exchange
    the same messages in the same order, at the latest in `reduce_gradients`, those of replicas that got no token, too.
    Until that call, each message has a buffer of its own.

    - Run all backward passes of a step but the last under `no_sync`. What was sent too early is found out and sent
      again without overlap: after backward passes outside of `no_sync`, skipped steps, and changes of gradients
      between backward and `reduce_gradients` (but for writes that torch does not count).
    - gloo tells messages apart by tags. Other backends do by their order: give them a group for the hooks alone,
      ``overlap=torch.distributed.new_group(ranks)``.
    - The hooks are for eager backward passes. Make this object after all else that hooks the parameters, such as
      Megatron's DistributedDataParallel, which fills ``main_grad``.

    Args:
        placement: where the experts are, over as many ranks as the group has.
        params: the expert tensors of this rank, ``placement.slots_per_rank`` slots each; as for `WeightMover`.
        group: the ranks; as for `WeightMover`.
        home: integer ``[n_logical]``, the physical slot of each expert's original; by default its lowest.
        overlap: whether hooks send gradients during backward passes; or the group that they do it with, of the same
            ranks in the same order.

    Raises:
        TypeError, ValueError: an argument is not allowed, or another on another rank; on every rank.
    """

    placement: Placement
    """Where the experts are."""
    home: torch.Tensor
    """Physical slot of each expert's original, int64 ``[n_logical]``."""
    home_slots: list[int]
    """Slots of this rank that hold originals."""
    replica_slots: list[int]
    """Slots of this rank that hold replicas."""

    def __init__(
        self,
        placement: Placement,
        params: Sequence[Field],
        group: dist.ProcessGroup | None = None,
        *,
        home: torch.Tensor | Sequence[int] | None = None,
        overlap: bool | dist.ProcessGroup = False,
    ) -> None:
        """See the class."""
        self._mover = WeightMover(params, group)
        self._ranks, self._link, self._fields = self._mover.ranks, self._mover.link, self._mover.fields
        self._early: EarlyMessages | None = None

        def check() -> tuple[int, int]:
            self._set_placement(placement, home)
            self._hook_ranks = self._checked_hook_ranks(overlap)
            kinds = None if self._hook_ranks is None else ExpertGradients(self._fields.fields).layout.kinds
            return exchange.fingerprint("ReplicaSync", placement.phy2log.tolist(), self.home.tolist(), kinds)

        has = "another placement, home, overlap or kind of gradients than rank 0; allowed are the same on every rank"
        with self._link.device_made_current():
            self._print = exchange.together(self._ranks, check, lambda words: words, has)
            if self._hook_ranks is not None:
                link = Link(self._hook_ranks, self._fields.device, _agreed_tag(self._hook_ranks))
                gradients = ExpertGradients(self._fields.fields)
                self._early = EarlyMessages(self._fields.fields, self._fields.n_slots, gradients, self._parts, link)
                _hooked.add(self)

    def _set_placement(self, placement: Placement, home: torch.Tensor | Sequence[int] | None) -> None:
        if not isinstance(placement, Placement):
            raise TypeError(f"placement is {seen(placement)}, allowed is an lplb.Placement")
        rank, size, n = self._ranks.rank, self._ranks.size, placement.slots_per_rank
        if placement.n_ranks != size:
            raise ValueError(f"placement has {placement.n_ranks} ranks, allowed is the size of the group, {size}")
        if n != self._fields.n_slots:
            raise ValueError(f"params has {self._fields.n_slots} slots, allowed are the placement's {n} per rank")
        self.placement = placement
        self.home = _checked_home(placement, home)
        at_home = set(self.home.tolist())
        self.home_slots = [slot for slot in range(n) if rank * n + slot in at_home]
        self.replica_slots = [slot for slot in range(n) if rank * n + slot not in at_home]
        moves = [
            Move(expert, *divmod(int(self.home[expert]), n), *divmod(slot, n))
            for slot, expert in enumerate(placement.phy2log.tolist())
            if slot not in at_home
        ]
        self._rounds = rounds_of(moves, in_place=True)
        back = [Move(m.expert, m.target_rank, m.target_slot, m.source_rank, m.source_slot) for m in moves]
        self._parts = [
            Part(
                next((move for move in together if move.source_rank == rank), None),
                next((move for move in together if move.target_rank == rank), None),
            )
            for together in sum_rounds(back)
        ]

    def _checked_hook_ranks(self, overlap: bool | dist.ProcessGroup) -> exchange.Distributed | None:
        """The ranks as the hooks are to reach them, ``None`` without hooks."""
        if not isinstance(overlap, (bool, dist.ProcessGroup)):
            raise TypeError(f"overlap is {seen(overlap)}, allowed is a bool or a torch.distributed.ProcessGroup")
        if not overlap or isinstance(self._ranks, exchange.Local):
            return None
        own = self._ranks.group
        ranks = checked_ranks("overlap", own if overlap is True else overlap)
        assert isinstance(ranks, exchange.Distributed)
        members, allowed = dist.get_process_group_ranks(ranks.group), dist.get_process_group_ranks(own)
        if members != allowed:
            raise ValueError(f"overlap is a group of the ranks {members}, allowed are those of group, {allowed}")
        backend = Link(ranks, self._fields.device).backend
        others = [own, *(sync._hook_ranks.group for sync in _hooked if sync._hook_ranks is not None)]
        if backend != "gloo" and ranks.group in others:
            raise ValueError(
                f"overlap shares a group of backend {backend!r} with other calls, allowed is a group for these hooks "
                "alone: overlap=torch.distributed.new_group(ranks)"
            )
        return ranks

    def close(self) -> None:
        """Remove the hooks of ``overlap``; to be called before another object serves the same parameters.

        Raises:
            ValueError: gradients are on their way.
        """
        if self._early is not None:
            if self._early.under_way:
                raise ValueError("gradients are on their way, allowed is close() after reduce_gradients()")
            self._early.close()
            self._early = None
        _hooked.discard(self)

    def _together(self, method: str, action: Callable[[], T], kinds_of: Callable[[T], object] = lambda _: None) -> T:
        has = (
            "another placement, home or kind of gradients than rank 0, or called another method; allowed is the same "
            "on every rank"
        )
        with self._link.device_made_current():
            return exchange.together(
                self._ranks, action, lambda found: exchange.fingerprint(method, self._print, kinds_of(found)), has
            )

    def _gathered(self, row: Iterable[int]) -> torch.Tensor:
        """Every rank's row, int32 ``[size, len(row)]``."""
        sent = torch.tensor(list(row), dtype=torch.int32, device="cpu")
        table = torch.zeros(self._ranks.size, len(sent), dtype=torch.int32, device="cpu")
        with self._link.device_made_current():
            exchange.gather(self._ranks, exchange.AGREE, sent, table)
        return table

    # ---- weights

    def broadcast(self) -> Moved:
        """Copy every original to its replicas. Collective; to be called after all that changes originals.

        Returns:
            The rounds, and the bytes that this rank sent and received.

        Raises:
            TypeError, ValueError: parameters are not what they were at first, or ranks called different methods.
            RuntimeError: as for `WeightMover.move`; originals are as before.
        """
        job = Job(self._rounds, self._fields, exchange.fingerprint("broadcast", self._print))
        return Moved.total(self._mover.agreed_rounds(lambda: job))

    def check(self) -> None:
        """Compare hashes of all copies with their originals. Collective; reads all weights of experts with copies.

        Raises:
            TypeError, ValueError: copies differ, parameters are not what they were at first, or ranks called different
                methods.
        """
        n = self.placement.slots_per_rank
        phy2log = self.placement.phy2log.long()
        words = self._gathered(self._together("check", self._hashes)).view(-1, 2)
        odd = (words != words[self.home[phy2log]]).any(dim=1).nonzero().flatten().tolist()
        if odd:
            named = [f"expert {phy2log[slot]} in slot {slot % n} of rank {slot // n}" for slot in odd[:_MAX_NAMED]]
            raise ValueError(
                f"{len(odd)} replicas differ from their originals: {', '.join(named)}"
                f"{' and others' if len(odd) > len(named) else ''}; allowed are equal bytes, as after broadcast()"
            )

    def _hashes(self) -> list[int]:
        """Two words for each slot of an expert with copies, zeros for the others."""
        self._mover.check_unchanged()
        n, layout = self.placement.slots_per_rank, self._fields.layout
        flat = torch.zeros(layout.nbytes, dtype=torch.uint8, device="cpu")
        words = np.zeros((n, 2), dtype=np.int32)
        for slot in range(n):
            expert = self.placement.phy2log[self._ranks.rank * n + slot]
            if self.placement.logcnt[expert] > 1:
                with torch.no_grad():
                    pack(self._fields.fields, slot, layout, flat)
                words[slot] = np.frombuffer(hashlib.blake2b(flat.numpy().data, digest_size=8).digest(), dtype=np.int32)
        hashed: list[int] = words.ravel().tolist()
        return hashed

    def parameters(self) -> Iterator[torch.Tensor]:
        """What an optimizer is to step: tensors of home slots that require gradients.

        A stacked field is one tensor and is given whole, with its replicas: then the optimizer keeps state for them,
        which is of no use, and `broadcast` overwrites what it does to their weights.
        """
        for field in self._fields.fields:
            tensors = [field] if isinstance(field, torch.Tensor) else [field[slot] for slot in self.home_slots]
            yield from (tensor for tensor in tensors if tensor.requires_grad)

    # ---- gradients

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Let the backward passes inside accumulate gradients and send none; only ``overlap`` makes a difference."""
        early = self._early
        if early is None:
            yield
            return
        before, early.paused = early.paused, True
        try:
            yield
        finally:
            early.paused = before

    def reduce_gradients(self) -> None:
        """Bring the gradients of replicas home. Collective; once per optimizer step, after its last backward pass.

        The gradient of a slot is ``main_grad`` of its tensor where that is not ``None``, otherwise ``grad``; for
        stacked tensors, the slot's row of it. An original gets the sum over all copies, added up in the order of ranks
        in float32 (in float64 if gradients are), and rounded once to their dtype. A copy without a gradient counts as
        zero; where none has one, the original is left without. Replicas are left without: ``grad`` becomes ``None``,
        ``main_grad`` and rows of stacked gradients zero.

        Raises:
            TypeError, ValueError: a gradient is not allowed, or of another dtype on another rank, or ranks called
                different methods. No gradient has changed.
            RuntimeError: a rank is lost, or later than the group's time-out: then the group, and the gradients of this
                step, are of no use any more.
        """
        if self._early is None:
            return self._reduce(None)
        with says_where("sending gradients during a backward pass stopped"):
            changed = self._early.finish()
        try:
            self._reduce(None if changed else self._early.received, changed)
        finally:
            self._early.reset()

    def _reduce(self, received: Iterable[tuple[Move, torch.Tensor]] | None, changed: bool = False) -> None:
        """Sum up what hooks have received, or what is received now if there is nothing or ``changed`` on any rank."""

        def check() -> tuple[ExpertGradients, list[torch.Tensor]]:
            self._mover.check_unchanged()
            gradients = ExpertGradients(self._fields.fields)
            if self._early is not None:
                self._early.check(gradients)
            return gradients, [self._link.buffer(gradients.layout) for _ in range(2 if self._parts else 0)]

        gradients, buffers = self._together("reduce_gradients", check, lambda found: found[0].layout.kinds)
        n = self._fields.n_slots
        own = [int(gradient is not None) for slot in range(n) for gradient in gradients.of(slot)]
        table = self._gathered([int(changed), *own])
        present = table[:, 1:].view(self._ranks.size, n, len(gradients.trained))
        if received is None or bool(table[:, 0].any()):
            received = self._messages(gradients, present, buffers)
        with quiet():
            self._sum_up(gradients, present, received)
            for slot in self.replica_slots:
                gradients.clear(slot)

    def _messages(
        self, gradients: ExpertGradients, present: torch.Tensor, buffers: list[torch.Tensor]
    ) -> Iterator[tuple[Move, torch.Tensor]]:
        """Send and receive round by round; what a slot has no gradients for does not travel."""
        for number, (out, come) in enumerate(self._parts):
            send = receive = None
            if out is not None and present[out.source_rank, out.source_slot].any():
                gradients.pack(out.source_slot, buffers[0])
                send = buffers[0], out.target_rank
            if come is not None and present[come.source_rank, come.source_slot].any():
                receive = buffers[1], come.source_rank
            with says_where(f"reducing gradients stopped in round {number + 1} of {len(self._parts)}"):
                self._link.transfer(send, receive)
            if come is not None and receive is not None:
                yield come, receive[0]

    def _sum_up(
        self, gradients: ExpertGradients, present: torch.Tensor, received: Iterable[tuple[Move, torch.Tensor]]
    ) -> None:
        """Write the sums; messages come slot by slot, in the order of ranks."""
        slot, total = -1, None
        for come, flat in received:
            if total is None or come.target_slot != slot:
                if total is not None:
                    gradients.write(slot, total.total())
                slot = come.target_slot
                total = RankOrderSum(self._ranks.rank, gradients.of(slot), self._fields.device)
            there = present[come.source_rank, come.source_slot].tolist()
            total.add(come.source_rank, gradients.unpacked(flat, there))
        if total is not None:
            gradients.write(slot, total.total())


def _checked_home(placement: Placement, home: torch.Tensor | Sequence[int] | None) -> torch.Tensor:
    """Return the slot of each expert's original as int64 ``[n_logical]``."""
    if home is None:
        return placement.log2phy[:, 0].long()
    try:
        given = torch.as_tensor(home, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"home is {home!r}, allowed are {placement.n_logical} ints") from error
    if given.dtype.is_floating_point or given.dtype.is_complex or given.dtype == torch.bool:
        raise TypeError(f"home is {seen(given)}, allowed is an integer dtype")
    if given.shape != (placement.n_logical,):
        raise ValueError(f"home has shape {list(given.shape)}, allowed is [n_logical] = [{placement.n_logical}]")
    checked = given.to(torch.int64, copy=True)
    for expert, slot in enumerate(checked.tolist()):
        slots = [p for p in placement.log2phy[expert].tolist() if p >= 0]
        if slot not in slots:
            raise ValueError(f"home[{expert}] is {slot}, allowed are the slots of expert {expert}, {slots}")
    return checked


def _agreed_tag(ranks: exchange.Distributed) -> int:
    """A tag that no other hooks between these ranks have. Collective."""
    table = torch.zeros(ranks.size, 1, dtype=torch.int32, device="cpu")
    exchange.gather(ranks, exchange.AGREE, torch.tensor([_last_tag[0] + 1], dtype=torch.int32, device="cpu"), table)
    _last_tag[0] = int(table.max())
    return _last_tag[0]
