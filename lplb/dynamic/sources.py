"""Where the weights of arriving experts come from: other ranks, host memory that a node shares, or the user."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
import torch.distributed as dist

from lplb import exchange
from lplb.arguments import seen, whole_number
from lplb.dynamic.dispatcher import Dispatcher
from lplb.dynamic.node_memory import NodeMemory
from lplb.dynamic.staging import Staging
from lplb.placement import Placement
from lplb.weights import Move, Moved, WeightMover
from lplb.weights.links import checked_ranks
from lplb.weights.mover import Job
from lplb.weights.packing import Field, Fields, FlatLayout, checked_fields, quiet

__all__ = ["Callback", "HostWeights", "Peers", "Source", "arriving"]


class Source(Protocol):
    """What brings experts to stagings, called by the background thread."""

    collective: bool
    """Whether all ranks bring the same moves in the same order, and an error on one is raised on all."""

    def bring(self, layer: int, moves: Sequence[Move], staging: Staging) -> Iterator[Moved]:
        """Fill the staging, one step at a time, so that the caller sets the pace, pauses or gives up between steps.

        Args:
            layer: number of the layer, counted from 0.
            moves: as in `lplb.dynamic.staging.Arrivals`: of all ranks, with places in their stagings as targets.
            staging: of this rank; not held.

        Returns:
            An iterator over what each step has brought: at most one expert, which is there when it is yielded. All are
            there when it is exhausted.

        Raises:
            TypeError, ValueError: an argument is not allowed.
            RuntimeError: the staging is held; or what went wrong while bringing, in any step.
        """


def arriving(moves: Sequence[Move], rank: int, staging: Staging) -> list[Move]:
    """Return the moves that come to one rank.

    Raises:
        ValueError: one goes to a place that its staging does not have.
    """
    mine = [move for move in moves if move.target_rank == rank]
    for move in mine:
        whole_number("target_slot of a move", move.target_slot, 0, staging.capacity - 1)
    return mine


class Peers:
    """Experts come from ranks that have them, by a `WeightMover` for every layer.

    Its live slots are read, so they must not change before all that is brought has come; a swap of the layer is the
    only thing of `lplb` that changes them. Collective, the constructor and every step of `bring` alike: a step is one
    round of transfers.

    Args:
        dispatchers: of the layers, in the same order on every rank.
        group: the ranks, a process group that nothing else uses meanwhile; ``None`` is one rank.

    Raises:
        TypeError, ValueError: weights are others on another rank, or a dispatcher has another rank; on every rank.
    """

    collective = True

    def __init__(self, dispatchers: Sequence[Dispatcher], group: dist.ProcessGroup | None = None) -> None:
        """See the class."""
        ranks = checked_ranks("group", group)
        self._dispatchers = _checked_dispatchers(dispatchers, ranks, "lplb.dynamic Peers")
        self._movers = [WeightMover(dispatcher.fields.fields, group) for dispatcher in self._dispatchers]

    @property
    def buffer_bytes(self) -> int:
        """Bytes that a layer's transfer allocates beside the staging, for as long as it lasts: the most of any."""
        return max(mover.buffer_bytes for mover in self._movers)

    def bring(self, layer: int, moves: Sequence[Move], staging: Staging) -> Iterator[Moved]:
        """See `Source`. Collective. A round in which this rank has nothing to do brings 0 bytes."""
        try:
            mover = self._movers[whole_number("layer", layer, 0, len(self._movers) - 1)]
            staging.begin()
            staging.wait_for(self._dispatchers[layer].swapped)
        except Exception as problem:
            fault = problem

            def refuse() -> Job:
                raise fault

            return self._movers[0].agreed_rounds(refuse)  # raises on all ranks: none waits for this one
        with staging.filling():
            rounds = mover.rounds(moves, staging.fields)
        return _steps(rounds, staging)


def _checked_dispatchers(
    dispatchers: Sequence[Dispatcher], ranks: exchange.Local | exchange.Distributed, what: str
) -> list[Dispatcher]:
    """Refuse dispatchers that are not one or more of this rank, as many on every rank. Collective."""

    def check() -> list[Dispatcher]:
        listed = list(dispatchers)
        if not listed:
            raise ValueError("dispatchers is empty, allowed is one or more")
        for i, dispatcher in enumerate(listed):
            if not isinstance(dispatcher, Dispatcher):
                raise TypeError(f"dispatchers[{i}] is {seen(dispatcher)}, allowed is an lplb.dynamic Dispatcher")
            place = f"rank {dispatcher.rank} of {dispatcher.placement.n_ranks}"
            allowed = f"rank {ranks.rank} of {ranks.size}"
            if place != allowed:
                raise ValueError(f"dispatchers[{i}] is of {place}, allowed is this process in the group, {allowed}")
        return listed

    has = "another number of dispatchers than rank 0, allowed is the same on every rank"
    return exchange.together(ranks, check, lambda found: exchange.fingerprint(what, len(found)), has)


def _steps(work: Iterator[Moved], staging: Staging) -> Iterator[Moved]:
    """Do work step by step on the transfer stream; the stream is the caller's own again between steps."""
    while True:
        with staging.filling():
            moved = next(work, None)
        staging.settle()
        if moved is None:
            return
        yield moved


class HostWeights:
    """Experts come from host memory, where all of a layer are, once for all ranks of a node.

    Made by `of` or `of_slots`. What changes weights afterwards does not change them here. The memory is shared by
    processes without a name in any file system, and the kernel frees it when the last of them has closed it or is
    dead; see `lplb.dynamic.node_memory`.
    """

    collective = False
    layers: tuple[tuple[torch.Tensor, ...], ...]
    """For each layer its fields ``[n_logical, ...]``; not to be written to."""
    nbytes: int
    """Bytes per node."""
    pinned: bool
    """Whether the memory is pinned for CUDA."""

    def __init__(
        self,
        kinds: Sequence[tuple[int, FlatLayout]],
        ranks: exchange.Local | exchange.Distributed,
        rank: int,
        ranks_per_node: int,
        pin: bool | None,
    ) -> None:
        """Zeros, for `of` and `of_slots` to fill: for each layer experts of a layout. Collective."""
        self._rank = rank
        offsets, self.nbytes = _laid_out(kinds)
        pin = torch.cuda.is_available() if pin is None else pin
        self._memory = NodeMemory(self.nbytes, ranks, ranks_per_node, pin)
        self.pinned = self._memory.pinned
        flat = self._memory.flat
        self.layers = tuple(
            tuple(
                flat[begin : begin + n_experts * torch.Size(shape).numel() * dtype.itemsize]
                .view(dtype)
                .view(n_experts, *shape)
                for begin, (shape, dtype) in zip(begins, layout.kinds, strict=True)
            )
            for begins, (n_experts, layout) in zip(offsets, kinds, strict=True)
        )

    @classmethod
    def of(
        cls,
        layers: Sequence[Sequence[Field]],
        group: dist.ProcessGroup | None = None,
        *,
        rank: int = 0,
        ranks_per_node: int = 1,
        pin: bool | None = None,
    ) -> HostWeights:
        """Take over all experts of all layers, from a checkpoint for example. Collective under a group.

        Args:
            layers: for every layer its fields, stacked ``[n_logical, ...]`` or a tensor for each expert, anywhere; the
                same on every rank. The ranks of a node copy a share of the experts each.
            group: the ranks; without one the memory is this process's alone.
            rank: this rank, where there is no group.
            ranks_per_node: consecutive ranks that share the memory.
            pin: whether to pin it for CUDA; by default where there is CUDA.

        Raises:
            TypeError, ValueError: an argument is not allowed, or has other shapes on another rank; on every rank.
            RuntimeError: there is not so much memory, or a rank of the node does not find the first one's.
        """
        ranks = checked_ranks("group", group)

        def check() -> tuple[list[Fields], int, int]:
            found = [checked_fields(f"layers[{i}]", fields) for i, fields in enumerate(layers)]
            if not found:
                raise ValueError("layers is empty, allowed is one or more")
            return found, whole_number("rank", rank, 0), whole_number("ranks_per_node", ranks_per_node, 1)

        given, rank, ranks_per_node = exchange.together(
            ranks,
            check,
            lambda f: exchange.fingerprint("host weights", [(x.n_slots, x.layout.kinds) for x in f[0]], f[2]),
            _OTHER_LAYERS,
        )
        rank = ranks.rank if group is not None else rank
        made = cls([(fields.n_slots, fields.layout) for fields in given], ranks, rank, ranks_per_node, pin)
        sharers = _sharers(ranks, ranks_per_node)

        def fill() -> None:
            for fields, host in zip(given, made.layers, strict=True):
                for expert in range(sharers.index(ranks.rank), fields.n_slots, len(sharers)):
                    _copy(fields.fields, expert, host, expert)

        exchange.together(ranks, fill, lambda _: exchange.fingerprint("filled"))
        return made

    @classmethod
    def of_slots(
        cls,
        dispatchers: Sequence[Dispatcher],
        group: dist.ProcessGroup | None = None,
        *,
        pin: bool | None = None,
    ) -> HostWeights:
        """Take over what is in the slots of all ranks now. Collective.

        Experts that a node has in no slot come from other nodes by a `WeightMover`, a few at a time.

        Args:
            dispatchers: of the layers, in the same order on every rank; their ``ranks_per_node`` ranks share memory.
            group: the ranks of their placements; ``None`` is one rank.
            pin: as for `of`.

        Raises:
            TypeError, ValueError, RuntimeError: as for `of`.
        """
        ranks = checked_ranks("group", group)
        listed = _checked_dispatchers(dispatchers, ranks, "lplb.dynamic HostWeights")
        per_node = listed[0].ranks_per_node
        kinds = [(dispatcher.n_logical, dispatcher.fields.layout) for dispatcher in listed]
        exchange.together(
            ranks,
            lambda: None,
            lambda _: exchange.fingerprint([(n, layout.kinds) for n, layout in kinds], per_node),
            _OTHER_LAYERS,
        )
        made = cls(kinds, ranks, ranks.rank, per_node, pin)
        for dispatcher, host in zip(listed, made.layers, strict=True):
            made._fill(dispatcher, host, ranks, group)
        return made

    def _fill(
        self,
        dispatcher: Dispatcher,
        host: tuple[torch.Tensor, ...],
        ranks: exchange.Local | exchange.Distributed,
        group: dist.ProcessGroup | None,
    ) -> None:
        placement, per_node = dispatcher.placement, dispatcher.ranks_per_node
        first = ranks.rank - ranks.rank % per_node
        n = placement.slots_per_rank
        on_node = placement.phy2log[first * n : (first + per_node) * n].tolist()

        def fill() -> None:
            for slot, expert in enumerate(dispatcher.local_expert_list):
                if on_node.index(expert) == (ranks.rank - first) * n + slot:  # of copies on the node the first
                    _copy(dispatcher.fields.fields, slot, host, expert)

        exchange.together(ranks, fill, lambda _: exchange.fingerprint("filled", placement.phy2log.tolist()))
        batches = missing_on_nodes(placement, per_node, _AT_ONCE)
        if not batches:
            return
        mover = WeightMover(dispatcher.fields.fields, group)
        room = exchange.together(
            ranks, lambda: Staging(dispatcher.fields, _AT_ONCE), lambda _: exchange.fingerprint("room")
        )
        for moves in batches:
            mover.move(moves, room.fields)
            for move in arriving(moves, ranks.rank, room):
                _copy(room.fields, move.target_slot, host, move.expert)
        exchange.together(ranks, lambda: None, lambda _: exchange.fingerprint("filled from other nodes"))

    def bring(self, layer: int, moves: Sequence[Move], staging: Staging) -> Iterator[Moved]:
        """See `Source`. Each step brings one expert; ``bytes_received`` counts what came from the host."""
        if not self.layers:
            raise RuntimeError("HostWeights was closed, allowed is before close()")
        host = self.layers[whole_number("layer", layer, 0, len(self.layers) - 1)]
        kinds = tuple((tuple(field.shape[1:]), field.dtype) for field in host)
        if staging.layout.kinds != kinds:
            raise ValueError(
                f"staging is for experts of {staging.layout.kinds}, allowed are those of the layer, {kinds}"
            )
        mine = arriving(moves, self._rank, staging)
        for move in mine:
            whole_number("expert of a move", move.expert, 0, len(host[0]) - 1)
        staging.begin()
        return _steps(self._bring(mine, host, staging), staging)

    def _bring(self, mine: list[Move], host: tuple[torch.Tensor, ...], staging: Staging) -> Iterator[Moved]:
        for move in mine:
            _copy(host, move.expert, staging.fields, move.target_slot)
            yield Moved(1, 0, staging.layout.nbytes)

    def close(self) -> None:
        """Give the memory up in this process. Nothing may be under way."""
        self.layers = ()
        self.pinned = False
        self._memory.close()


_AT_ONCE = 4  # experts that a rank fetches from other nodes before it writes them to the host
_ALIGNMENT = 64  # bytes
_OTHER_LAYERS = "other layers (how many, experts, shapes, dtypes, ranks per node) than rank 0; allowed are the same"


def _laid_out(kinds: Sequence[tuple[int, FlatLayout]]) -> tuple[list[list[int]], int]:
    """Where each field of each layer begins, and the bytes of all."""
    offsets, end = [], 0
    for n_experts, layout in kinds:
        begins = []
        for shape, dtype in layout.kinds:
            begins.append(end)
            nbytes = n_experts * torch.Size(shape).numel() * dtype.itemsize
            end += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        offsets.append(begins)
    return offsets, max(end, 1)


def _copy(source: Sequence[Field], source_slot: int, target: Sequence[torch.Tensor], target_slot: int) -> None:
    """Copy an expert; from pinned memory the host does not wait."""
    with quiet():
        for read, written in zip(source, target, strict=True):
            written[target_slot].copy_(read[source_slot], non_blocking=written.device.type == "cuda")


def _sharers(ranks: exchange.Local | exchange.Distributed, ranks_per_node: int) -> range:
    first = ranks.rank - ranks.rank % ranks_per_node
    return range(first, min(first + ranks_per_node, ranks.size))


def missing_on_nodes(placement: Placement, ranks_per_node: int, at_once: int) -> list[list[Move]]:
    """Return the moves that bring every node the experts that it has in no slot, once each.

    Receivers are the ranks of a node in turn, sources those that have sent the least so far.

    Args:
        placement: where the experts are.
        ranks_per_node: consecutive ranks that are a node.
        at_once: experts that a rank receives in one list, in places 0, 1, ...

    Returns:
        Lists of moves, to be carried out one after the other.
    """
    n, size = placement.slots_per_rank, placement.n_ranks
    slots = [[slot for slot in row if slot >= 0] for row in placement.log2phy.tolist()]
    sends: Counter[int] = Counter()
    batches: dict[int, list[Move]] = {}
    for first in range(0, size, ranks_per_node):
        node = range(first, min(first + ranks_per_node, size))
        missing = [expert for expert, held in enumerate(slots) if not any(slot // n in node for slot in held)]
        for number, expert in enumerate(missing):
            source = min(slots[expert], key=lambda slot: (sends[slot // n], slot))
            sends[source // n] += 1
            batch, place = divmod(number // len(node), at_once)
            rank, slot = divmod(source, n)
            batches.setdefault(batch, []).append(Move(expert, rank, slot, node[number % len(node)], place))
    return [batches[batch] for batch in sorted(batches)]


class Callback:
    """The user's function brings experts: from a file, a store, or another framework.

    Args:
        function: called with the layer, the logical expert, and the tensors to write, one of each field. On CUDA the
            transfer stream is current; what it does on other streams has to be done when it returns. It runs in the
            background thread, without autograd. Ranks meet between experts, so that one expert may take as long as the
            process group waits for a rank, and no longer.
        rank: this rank.
    """

    collective = False

    def __init__(self, function: Callable[[int, int, list[torch.Tensor]], object], rank: int) -> None:
        """See the class."""
        if not callable(function):
            raise TypeError(f"function is {seen(function)}, allowed is a function (layer, expert, into)")
        self._function = function
        self._rank = whole_number("rank", rank, 0)

    def bring(self, layer: int, moves: Sequence[Move], staging: Staging) -> Iterator[Moved]:
        """See `Source`. What the function raises, this rank raises in that step."""
        mine = arriving(moves, self._rank, staging)
        staging.begin()
        return _steps(self._bring(layer, mine, staging), staging)

    def _bring(self, layer: int, mine: list[Move], staging: Staging) -> Iterator[Moved]:
        for move in mine:
            with quiet():
                self._function(layer, move.expert, [field[move.target_slot] for field in staging.fields])
            yield Moved(1, 0, staging.layout.nbytes)
