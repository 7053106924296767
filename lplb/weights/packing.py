"""How the tensors of one expert lie in one flat buffer of bytes, whatever their dtypes and strides."""

import contextlib
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate
from typing import TypeAlias

import torch

from lplb.arguments import seen

__all__ = ["Field", "Fields", "FlatLayout", "checked_fields", "holders", "is_in_place", "pack", "quiet", "unpack"]

Field: TypeAlias = torch.Tensor | Sequence[torch.Tensor]
"""One kind of tensor of every expert on a rank, by slot: stacked ``[n_slots, ...]``, or one tensor per slot."""


@dataclass(frozen=True)
class FlatLayout:
    """Shapes and dtypes of an expert's tensors, and where each lies in a buffer without gaps."""

    kinds: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    """Shape and dtype of each tensor."""

    @cached_property
    def _offsets(self) -> tuple[list[int], int]:
        offsets, end = [0] * len(self.kinds), 0
        # The widest elements first: then each tensor starts at a multiple of its element's size.
        for i in sorted(range(len(self.kinds)), key=lambda i: -self.kinds[i][1].itemsize):
            shape, dtype = self.kinds[i]
            offsets[i] = end
            end += torch.Size(shape).numel() * dtype.itemsize
        return offsets, end

    @property
    def nbytes(self) -> int:
        """Bytes of one expert."""
        return self._offsets[1]

    def views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """The tensors that lie in ``flat``, uint8 ``[nbytes]``, in the order of `kinds`."""
        views = []
        for (shape, dtype), offset in zip(self.kinds, self._offsets[0], strict=True):
            nbytes = torch.Size(shape).numel() * dtype.itemsize
            views.append(flat[offset : offset + nbytes].view(dtype).view(shape))
        return views


@dataclass(frozen=True)
class Fields:
    """Checked fields, and what is the same for all of them."""

    fields: tuple[Field, ...]
    """One for each kind of tensor."""
    n_slots: int
    """Slots of each."""
    layout: FlatLayout
    """The tensors of one slot."""
    device: torch.device
    """Where all of them are."""

    def __str__(self) -> str:
        """What has to fit, as errors show it."""
        kinds = ", ".join(f"{str(dtype).removeprefix('torch.')} {list(shape)}" for shape, dtype in self.layout.kinds)
        return f"{self.n_slots} slots of ({kinds}) on {str(self.device)!r}"


@contextlib.contextmanager
def quiet(inference: bool = False) -> Iterator[None]:
    """Write without autograd; ``inference`` is for tensors made in inference mode, which are written only there."""
    with torch.inference_mode(inference), torch.no_grad():
        yield


def holders(field: Field) -> Iterator[torch.Tensor]:
    """The tensors that a field consists of: one if it is stacked, one per slot otherwise."""
    if isinstance(field, torch.Tensor):
        yield field
    else:
        yield from (field[slot] for slot in range(len(field)))


def pack(fields: Sequence[Field], slot: int, layout: FlatLayout, flat: torch.Tensor) -> None:
    """Copy an expert out of its slot into a flat buffer."""
    for field, view in zip(fields, layout.views(flat), strict=True):
        view.copy_(field[slot])


def unpack(fields: Sequence[Field], slot: int, layout: FlatLayout, flat: torch.Tensor) -> None:
    """Copy an expert out of a flat buffer into a slot."""
    for field, view in zip(fields, layout.views(flat), strict=True):
        field[slot].copy_(view)


def checked_fields(name: str, fields: Sequence[Field]) -> Fields:
    """Refuse what is not the tensors of experts of one shape and dtype per field.

    Args:
        name: what the caller calls the fields.
        fields: for every kind of tensor a stacked tensor ``[n_slots, ...]`` or a sequence of ``n_slots`` tensors.

    Raises:
        TypeError: something is not a plain, strided tensor of a dtype that can be copied.
        ValueError: slots differ in shape or dtype, fields in device or number of slots; slots share memory.
    """
    if isinstance(fields, torch.Tensor) or not _is_sequence(fields):
        raise TypeError(f"{name} is {seen(fields)}, allowed is a sequence of fields: tensors, or sequences of tensors")
    if not len(fields):
        raise ValueError(f"{name} has no fields, allowed is one or more")
    kinds = []
    for i in range(len(fields)):
        kinds.append(_kind_of(f"{name}[{i}]", fields[i]))
        if len(fields[i]) != len(fields[0]):
            raise ValueError(
                f"{name}[{i}] has {len(fields[i])} slots, allowed is as many as {name}[0], {len(fields[0])}"
            )
        device = fields[i][0].device
        if device != fields[0][0].device:
            raise ValueError(
                f"{name}[{i}] is on {str(device)!r}, allowed is where {name}[0] is, {str(fields[0][0].device)!r}"
            )
    listed = tuple(fields[i] for i in range(len(fields)))
    return Fields(listed, len(fields[0]), FlatLayout(tuple(kinds)), fields[0][0].device)


def _is_sequence(value: object) -> bool:
    """Whether it has a length and is indexed by position; torch.nn.ParameterList is not a collections.abc.Sequence."""
    return hasattr(value, "__len__") and hasattr(value, "__getitem__") and not isinstance(value, (str, bytes, dict))


def _kind_of(name: str, field: Field) -> tuple[tuple[int, ...], torch.dtype]:
    if isinstance(field, torch.Tensor):
        _check_plain(name, field)
        if field.dim() == 0 or not len(field):
            raise ValueError(f"{name} has shape {list(field.shape)}, allowed is [n_slots, ...] with at least one slot")
        _check_elements_apart(name, field)
        return tuple(field.shape[1:]), field.dtype
    if not _is_sequence(field):
        raise TypeError(f"{name} is {seen(field)}, allowed is a tensor [n_slots, ...] or a sequence of tensors")
    if not len(field):
        raise ValueError(f"{name} has no slots, allowed is one or more")
    first = field[0]
    places: dict[int, int] = {}
    for slot in range(len(field)):
        tensor = field[slot]
        _check_plain(f"{name}[{slot}]", tensor)
        if (tensor.shape, tensor.dtype, tensor.device) != (first.shape, first.dtype, first.device):
            raise ValueError(
                f"{name}[{slot}] is {seen(tensor)} on {str(tensor.device)!r}, allowed is what slot 0 has, "
                f"{seen(first)} on {str(first.device)!r}"
            )
        _check_elements_apart(f"{name}[{slot}]", tensor)
        other = places.setdefault(tensor.data_ptr(), slot)
        if other != slot and tensor.numel():
            raise ValueError(f"{name}[{slot}] is the memory of slot {other}, allowed is memory of its own")
    return tuple(first.shape), first.dtype


def _check_plain(name: str, tensor: object) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} is {seen(tensor)}, allowed is a torch.Tensor")
    # Subclasses that compute in Python (DTensor, FakeTensor, quantised wrappers) have no bytes of their own.
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise TypeError(f"{name} is a {type(tensor).__name__}, allowed is a plain tensor, such as its local part")
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type == "meta":
        raise TypeError(
            f"{name} is {seen(tensor)} of layout {tensor.layout} on {str(tensor.device)!r}, allowed is a strided "
            "tensor with memory, not quantised"
        )
    if not _can_be_copied(tensor.dtype):
        raise TypeError(f"{name} has dtype {tensor.dtype}, allowed is one that torch can copy")


@cache
def _can_be_copied(dtype: torch.dtype) -> bool:
    """False for integers of less than a byte, for example."""
    try:
        torch.empty(1, dtype=dtype, device="cpu").copy_(torch.empty(1, dtype=dtype, device="cpu"))
    except RuntimeError:
        return False
    return True


def _check_elements_apart(name: str, tensor: torch.Tensor) -> None:
    if any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        raise ValueError(f"{name} has strides {list(tensor.stride())}, allowed are elements that share no memory")


def is_in_place(own: Fields, into: Fields) -> bool:
    """Tell whether ``into`` is the memory of ``own``, slot for slot.

    Raises:
        ValueError: it is some of it, in another order: then a slot could be lost before it is read.
    """
    places = [_bytes_of(field[slot]) for field in own.fields for slot in range(own.n_slots)]
    targets = [_bytes_of(field[slot]) for field in into.fields for slot in range(into.n_slots)]
    if places == targets:
        return True
    places = sorted(place for place in places if place[0] < place[1])
    reached = list(accumulate((end for _, end in places), max))  # strided slots may lie in one another
    for start, end in targets:
        before = bisect_left(places, (end, end)) - 1  # the last place that starts before the end
        if start < end and before >= 0 and reached[before] > start:
            raise ValueError(
                "into shares memory with the source in another order, allowed is the same slots or memory of its own"
            )
    return False


def _bytes_of(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte, and the one behind the last."""
    if not tensor.numel():
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()
