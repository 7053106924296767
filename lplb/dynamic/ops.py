"""`LoadCollector.collect` as torch operators, so that compiled models hold it in one graph; eager calls go elsewhere.

An operator without a result is dropped where it changes nothing. These are said to change the collector's token, a
tensor that nothing reads, so they stay, in their order for each collector.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["collect", "handle_of"]


class _Collects(Protocol):
    def _collect(self, number: int, indices: Tensor | None, mask: Tensor | None, counts: Tensor | None) -> None: ...


_collectors: weakref.WeakValueDictionary[int, _Collects] = weakref.WeakValueDictionary()
_handles = itertools.count()
_library = torch.library.Library("lplb", "FRAGMENT")  # type: ignore[no-untyped-call, unused-ignore]
# In Inductor's CUDA graphs it would be captured by torch, which calls no `advance`: so those are cut around it.
_tags = [getattr(torch.Tag, name) for name in ("pt2_compliant_tag", "cudagraph_unsafe") if hasattr(torch.Tag, name)]
for _schema in (
    "collect(Tensor(a!) token, Tensor indices, Tensor? mask, SymInt collector, int number) -> ()",
    "collect.counts(Tensor(a!) token, Tensor counts, SymInt collector, int number) -> ()",
):
    _library.define(_schema, tags=tuple(_tags))  # type: ignore[no-untyped-call, unused-ignore]


def handle_of(collector: _Collects) -> int:
    """Return the number by which operators find a collector, as long as it lives; graphs hold numbers, not objects."""
    handle = next(_handles)
    _collectors[handle] = collector
    return handle


def collect(
    token: Tensor, handle: int, number: int, indices: Tensor | None, mask: Tensor | None, counts: Tensor | None
) -> None:
    """`LoadCollector.collect` of the collector with a number, through the dispatcher.

    Args:
        token: the collector's; said to be mutated.
        handle: what `handle_of` returned.
        number: of the phase.
        indices: as for `LoadCollector.collect`, as are ``mask`` and ``counts``.
        mask: see ``indices``.
        counts: see ``indices``.

    Raises:
        TypeError, ValueError: as `LoadCollector.collect`, when the graph runs.
        RuntimeError: no collector of this process has this number, when the graph runs.
    """
    if counts is None:
        torch.ops.lplb.collect.default(token, indices, mask, handle, number)
    else:
        torch.ops.lplb.collect.counts(token, counts, handle, number)


def _found(handle: int) -> _Collects:
    found = _collectors.get(handle)
    if found is None:
        raise RuntimeError(
            f"lplb::collect has collector {handle}, allowed is one that is alive in this process: keep the "
            "LoadCollector as long as the compiled model"
        )
    return found


def _collect(token: Tensor, indices: Tensor, mask: Tensor | None, handle: int, number: int) -> None:
    _found(handle)._collect(number, indices, mask, None)


def _collect_counts(token: Tensor, counts: Tensor, handle: int, number: int) -> None:
    _found(handle)._collect(number, None, None, counts)


def _nothing(*_: object) -> None:
    pass


for _name, _function in (("collect", _collect), ("collect.counts", _collect_counts)):
    _library.impl(_name, _function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call, unused-ignore]
    torch.library.register_fake(f"lplb::{_name}", _nothing, lib=_library)
