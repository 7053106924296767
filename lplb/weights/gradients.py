"""Gradients of the experts on a rank: where they are, how they travel, and their sum in the order of ranks."""

from collections.abc import Sequence

import torch

from lplb.weights.packing import Field, FlatLayout, holders

__all__ = ["ExpertGradients", "RankOrderSum"]

Gradients = list[torch.Tensor | None]
"""One per trained field; ``None`` where a copy got no token."""


class ExpertGradients:
    """Gradients of the fields that are trained, by slot: ``main_grad`` where there is one, ``grad`` otherwise.

    Args:
        fields: the expert tensors of a rank; those that neither require gradients nor have ``main_grad`` are left out.

    Raises:
        TypeError: a gradient is not a strided floating tensor.
        ValueError: the slots of a field differ in what their gradients are, or a tensor has none of its own.
    """

    layout: FlatLayout
    """The gradients of one expert as a message."""
    trained: tuple[int, ...]
    """Which fields have gradients."""

    def __init__(self, fields: Sequence[Field]) -> None:
        """See the class."""
        kinds = {i: kind for i, field in enumerate(fields) if (kind := _kind_of(f"params[{i}]", field)) is not None}
        self.trained = tuple(kinds)
        self._fields = [fields[i] for i in kinds]
        self.layout = FlatLayout(tuple(kinds.values()))

    def of(self, slot: int) -> Gradients:
        """The gradients of a slot, as they are."""
        return [
            None if whole is None else whole[slot] if isinstance(field, torch.Tensor) else whole
            for field, whole in zip(self._fields, self._wholes(slot), strict=True)
        ]

    def marks(self, slot: int) -> list[tuple[torch.Tensor | None, int]]:
        """What is another when a gradient of the slot, or of a stacked tensor with the slot, has been changed."""
        return [(whole, -1 if whole is None else whole._version) for whole in self._wholes(slot)]

    def _wholes(self, slot: int) -> Gradients:
        return [_gradient_of(_holder(field, slot)) for field in self._fields]

    def pack(self, slot: int, flat: torch.Tensor) -> None:
        """Write the message of a slot into ``flat``, uint8 ``[layout.nbytes]``; what is ``None`` is left out."""
        for view, gradient in zip(self.layout.views(flat), self.of(slot), strict=True):
            if gradient is not None:
                view.copy_(gradient)

    def unpacked(self, flat: torch.Tensor, present: Sequence[int]) -> Gradients:
        """The gradients in a message as views of it; ``None`` where ``present`` is 0."""
        return [view if there else None for view, there in zip(self.layout.views(flat), present, strict=True)]

    def write(self, slot: int, gradients: Gradients) -> None:
        """Set the gradients of a slot, each rounded once to the dtype that it has; leave those that are ``None``."""
        for field, gradient, (_, dtype) in zip(self._fields, gradients, self.layout.kinds, strict=True):
            if gradient is None:
                continue
            holder = _holder(field, slot)
            whole = _gradient_of(holder)
            if whole is None:
                whole = holder.grad = torch.zeros_like(holder, dtype=dtype, requires_grad=False)
            (whole[slot] if isinstance(field, torch.Tensor) else whole).copy_(gradient)

    def clear(self, slot: int) -> None:
        """Leave no gradient in a slot: ``grad`` is ``None``; ``main_grad`` and rows of stacked tensors are zero."""
        for field in self._fields:
            holder = _holder(field, slot)
            for whole in (getattr(holder, "main_grad", None), holder.grad):
                if whole is not None:
                    (whole[slot] if isinstance(field, torch.Tensor) else whole).zero_()
            if not isinstance(field, torch.Tensor):
                holder.grad = None


class RankOrderSum:
    """The sum of an expert's gradients over its copies, in the order of their ranks, in float32 or wider.

    Args:
        rank: where the original is.
        own: the original's gradients, which are not changed.
        device: where the sum is made.
    """

    def __init__(self, rank: int, own: Gradients, device: torch.device) -> None:
        """See the class."""
        self._rank = rank
        self._own: Gradients | None = own
        self._device = device
        self._total: Gradients = [None] * len(own)

    def add(self, rank: int, gradients: Gradients) -> None:
        """Add the gradients of a replica; ranks come in ascending order."""
        if rank > self._rank:
            self._add_own()
        self._add(gradients)

    def total(self) -> Gradients:
        """The sum; ``None`` where no copy has a gradient."""
        self._add_own()
        return self._total

    def _add_own(self) -> None:
        if self._own is not None:
            self._add(self._own)
            self._own = None

    def _add(self, gradients: Gradients) -> None:
        for i, gradient in enumerate(gradients):
            if gradient is None:
                continue
            wide = torch.promote_types(gradient.dtype, torch.float32)
            so_far = self._total[i]
            if so_far is None:
                self._total[i] = gradient.to(self._device, wide, copy=True)
            else:
                so_far.add_(gradient.to(self._device, wide))


def _holder(field: Field, slot: int) -> torch.Tensor:
    return field if isinstance(field, torch.Tensor) else field[slot]


def _gradient_of(holder: torch.Tensor) -> torch.Tensor | None:
    main: torch.Tensor | None = getattr(holder, "main_grad", None)
    return holder.grad if main is None else main


def _kind_of(name: str, field: Field) -> tuple[tuple[int, ...], torch.dtype] | None:
    """Shape and dtype of one slot's gradient, ``None`` if the field is not trained."""
    found = [_dtype_of(name, holder) for holder in holders(field)]
    odd = next((slot for slot, dtype in enumerate(found) if dtype != found[0]), None)
    if odd is not None:
        raise ValueError(
            f"{name}[{odd}] has gradients of {found[odd]}, allowed are those of {name}[0], {found[0]}, or none in both"
        )
    return None if found[0] is None else (tuple(field[0].shape), found[0])


def _dtype_of(name: str, holder: torch.Tensor) -> torch.dtype | None:
    if getattr(holder, "main_grad", None) is None:
        if not holder.requires_grad:
            return None
        if not holder.is_leaf:
            raise ValueError(f"{name} holds a result of {holder.grad_fn}, allowed are leaves, which have gradients")
    gradient = _gradient_of(holder)
    # grad_dtype, of torch 2.10 and later, says what a gradient will be that is not there yet
    dtype = (getattr(holder, "grad_dtype", None) or holder.dtype) if gradient is None else gradient.dtype
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise TypeError(f"the gradient of {name} has dtype {dtype}, allowed are floating ones of two bytes or more")
    if gradient is None:
        return dtype
    if gradient.layout != torch.strided:
        raise TypeError(f"the gradient of {name} has layout {gradient.layout}, allowed is torch.strided")
    if gradient.shape != holder.shape or gradient.device != holder.device:
        raise ValueError(
            f"the gradient of {name} has shape {list(gradient.shape)} on {str(gradient.device)!r}, allowed is "
            f"{list(holder.shape)} on {str(holder.device)!r}"
        )
    return dtype
