"""The layers of a model whose experts are to move: how they are found, and what has to fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from lplb.arguments import seen
from lplb.dynamic.collector import LoadCollector
from lplb.dynamic.dispatcher import Dispatcher
from lplb.placement import Placement

__all__ = ["Layer", "check_layers", "find_layers"]


class Layer(NamedTuple):
    """A layer whose experts are to move."""

    name: str
    """Of the module that has both."""
    dispatcher: Dispatcher
    collector: LoadCollector


def find_layers(module: nn.Module) -> tuple[Layer, ...]:
    """Return the layers of a model that carry a dispatcher and a collector, in the order of ``named_modules``.

    Raises:
        TypeError: ``module`` is no module, or an attribute of these names is something else.
        ValueError: there is none, or two layers share one dispatcher or collector.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module is {seen(module)}, allowed is a torch.nn.Module")
    found = []
    for name, child in module.named_modules():
        dispatcher = getattr(child, "dispatcher", None)
        collector = getattr(child, "collector", getattr(child, "expert_load_collector", None))
        if dispatcher is None or (collector is None and not isinstance(dispatcher, Dispatcher)):
            continue
        name = name or "the module"
        if not isinstance(dispatcher, Dispatcher):
            raise TypeError(f"{name}.dispatcher is {seen(dispatcher)}, allowed is an lplb.dynamic.Dispatcher")
        if not isinstance(collector, LoadCollector):
            raise TypeError(
                f"the attribute collector of {name} is {seen(collector)}, allowed is an lplb.dynamic.LoadCollector"
            )
        found.append(Layer(name, dispatcher, collector))
    if not found:
        raise ValueError("module has no layer with the attributes dispatcher and collector, allowed is one or more")
    for part in ("dispatcher", "collector"):
        owners: dict[int, str] = {}
        for layer in found:
            first = owners.setdefault(id(getattr(layer, part)), layer.name)
            if first != layer.name:
                raise ValueError(f"{layer.name} and {first} have one {part}, allowed is one for each layer")
    return tuple(found)


def check_layers(layers: Sequence[Layer], rank: int, size: int, phases: Sequence[str] | None) -> None:
    """Refuse layers that do not fit each other, the group, or the phases that are wanted.

    Args:
        layers: of `find_layers`.
        rank: this rank.
        size: how many there are.
        phases: whose loads are wanted; ``None`` for all.

    Raises:
        TypeError, ValueError: names the layer, and what is allowed.
    """
    first = layers[0].dispatcher.placement
    if phases is not None and (isinstance(phases, str) or not isinstance(phases, Sequence) or not phases):
        raise TypeError(f"phases is {phases!r}, allowed is a sequence of one or more names, or None")
    for name, dispatcher, collector in layers:
        placement = dispatcher.placement
        if placement.n_ranks != size:
            raise ValueError(
                f"{name} has a placement on {placement.n_ranks} ranks, allowed is the group's size, {size}"
            )
        if dispatcher.owner is not None:
            raise ValueError(f"the dispatcher of {name} has a Rebalancer, allowed is one at a time: close that first")
        if dispatcher.rank != rank:
            raise ValueError(f"{name} has a dispatcher of rank {dispatcher.rank}, allowed is this rank, {rank}")
        if _sizes(placement) != _sizes(first):
            raise ValueError(f"{name} has {placement!r}, allowed are the sizes of {layers[0].name}, {first!r}")
        if dispatcher.fields.layout.nbytes != layers[0].dispatcher.fields.layout.nbytes:
            raise ValueError(
                f"{name} has experts of {dispatcher.fields.layout.nbytes} bytes, allowed are those of "
                f"{layers[0].name}, {layers[0].dispatcher.fields.layout.nbytes}"
            )
        if collector.n_logical != placement.n_logical:
            raise ValueError(
                f"{name} collects loads of {collector.n_logical} experts, allowed is its placement's number, "
                f"{placement.n_logical}"
            )
        unknown = [phase for phase in phases or () if phase not in collector.phases]
        if unknown:
            raise ValueError(f"phases has {unknown[0]!r}, allowed for {name} are {', '.join(collector.phases)}")


def _sizes(placement: Placement) -> tuple[int, int, int]:
    return placement.n_ranks, placement.n_physical, placement.n_logical
