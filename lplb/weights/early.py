"""Gradients that leave while a backward pass is still running."""

import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from lplb.weights.gradients import ExpertGradients
from lplb.weights.links import Link
from lplb.weights.moves import Move
from lplb.weights.packing import Field, holders

__all__ = ["EarlyMessages", "Part"]


class Part(NamedTuple):
    """What one rank does in a round."""

    out: Move | None
    """Gradients that it sends."""
    come: Move | None
    """Gradients that it receives."""


class EarlyMessages:
    """Sends the gradients of replicas as backward passes finish them.

    A rank begins its rounds in order, each as soon as the slot that it sends has all gradients; `finish` begins the
    rest. So every message of a step is sent once, and two ranks begin what they have with each other in one order,
    whatever the hooks saw: nothing here waits for another rank.

    Args:
        fields: the expert tensors of this rank.
        n_slots: slots of each.
        gradients: where their gradients are.
        parts: what this rank does, round by round.
        link: of messages that are in order with no others.
    """

    received: list[tuple[Move, torch.Tensor]]
    """Messages that have come, in the order of rounds; complete after `finish`."""
    paused: bool
    """Whether backward passes are to leave gradients where they are."""

    def __init__(
        self, fields: Sequence[Field], n_slots: int, gradients: ExpertGradients, parts: Sequence[Part], link: Link
    ) -> None:
        """See the class."""
        self._gradients = gradients
        self._parts = parts
        self._link = link
        self._n_slots = n_slots
        self.paused = False
        self.reset()
        self._nodes: list[Any] = []  # autograd forgets nodes that nobody holds, with their hooks
        self._handles: list[Any] = []
        for i in gradients.trained:
            for slot, holder in enumerate(holders(fields[i])):
                slots = range(n_slots) if isinstance(fields[i], torch.Tensor) else (slot,)
                if holder.requires_grad:
                    self._hook(holder, partial(_tell, weakref.ref(self), i, slots))

    def _hook(self, holder: torch.Tensor, tell: Any) -> None:
        """Have autograd tell when it has accumulated a gradient.

        Hooks of the accumulating node run in the order of their registration: after those that fill ``main_grad``.
        """
        with torch.inference_mode(False), torch.enable_grad():
            node = torch.autograd.graph.get_gradient_edge(holder).node
        self._nodes.append(node)
        self._handles.append(node.register_hook(tell))

    def reset(self) -> None:
        """Begin another step."""
        self._next = 0
        self._works: list[Any] = []
        self._kept: list[torch.Tensor] = []
        self.received = []
        self._lacking = {slot: set(self._gradients.trained) for slot in range(self._n_slots)}
        self._sent: dict[int, list[tuple[torch.Tensor | None, int]]] = {}
        self._is_stale = False
        self._fault: Exception | None = None

    @property
    def under_way(self) -> bool:
        """Whether messages of a step have begun."""
        return self._next > 0

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._nodes.clear()

    def arrived(self, field: int, slots: Sequence[int]) -> None:
        """Take notice of accumulated gradients. Called by autograd; raises nothing, since other ranks would wait."""
        self._is_stale = self._is_stale or any(slot in self._sent for slot in slots)
        if self.paused:
            return
        for slot in slots:
            self._lacking[slot].discard(field)
        try:
            self._begin(everything=False)
        except Exception as problem:  # a lost rank: finish says so
            self._fault = self._fault or problem

    def _begin(self, everything: bool) -> None:
        while self._next < len(self._parts):
            out, come = self._parts[self._next]
            if out is not None and self._lacking[out.source_slot] and not everything:
                return
            send = None if out is None else self._packed(out.source_slot)
            receive = None if come is None else self._link.buffer(self._gradients.layout)
            self._next += 1  # not before there is memory: then the message can still begin later
            self._works += self._link.start(
                None if send is None or out is None else (send, out.target_rank),
                None if receive is None or come is None else (receive, come.source_rank),
            )
            if receive is not None and come is not None:
                self.received.append((come, receive))

    def _packed(self, slot: int) -> torch.Tensor:
        flat = self._link.buffer(self._gradients.layout)
        self._kept.append(flat)
        self._sent[slot] = self._gradients.marks(slot)
        try:
            with torch.no_grad():
                self._gradients.pack(slot, flat)
        except Exception as problem:  # the message is owed all the same
            self._fault = self._fault or problem
        return flat

    def finish(self) -> bool:
        """Begin what has not begun and wait for all; on CUDA the current stream waits.

        Returns:
            Whether gradients have changed since they were sent.
        """
        self._begin(everything=True)
        for work in self._works:
            work.wait()
        for flat in (*self._kept, *(flat for _, flat in self.received)):
            if flat.device.type == "cuda":  # made on the stream of a backward pass
                flat.record_stream(torch.cuda.current_stream(flat.device))
        changed = any(
            mark[0] is not now[0] or mark[1] != now[1]
            for slot, marks in self._sent.items()
            for mark, now in zip(marks, self._gradients.marks(slot), strict=True)
        )
        return self._is_stale or changed

    def check(self, gradients: ExpertGradients) -> None:
        """Raise what went wrong on this rank during backward passes.

        Args:
            gradients: as they are now.
        """
        if self._fault is not None:
            raise self._fault
        if (gradients.trained, gradients.layout) != (self._gradients.trained, self._gradients.layout):
            raise ValueError(
                f"params has gradients of {gradients.layout.kinds}, allowed are those of when the hooks were set, "
                f"{self._gradients.layout.kinds}"
            )


def _tell(early: "weakref.ref[EarlyMessages]", field: int, slots: Sequence[int], *_: object) -> None:
    """The hook. It keeps nothing alive: what autograd's nodes hold is out of reach of Python's garbage collector."""
    messages = early()
    if messages is not None:
        messages.arrived(field, slots)
