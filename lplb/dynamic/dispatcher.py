"""The live placement of one layer on one rank: weights in slots, maps for routing, the swap to another placement."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

import torch

from lplb.arguments import checked_device, seen, whole_number
from lplb.dynamic.commit import SwapPoint
from lplb.dynamic.maps import Maps, tables
from lplb.dynamic.staging import Staging, arrivals
from lplb.lplb_stages import Compiled
from lplb.placement import Placement
from lplb.planner import Planner
from lplb.weights.packing import Field, Fields, checked_fields, holders, quiet

__all__ = ["Dispatcher", "Update"]


class Update(NamedTuple):
    """What is live after a swap. The tensors are the dispatcher's own, which every swap writes in place."""

    weight1: Field
    """The first field of the weights."""
    weight2: Field | None
    """The second, if there is one."""
    local_expert_num: int
    """Slots of this rank."""
    device_indices_map: torch.Tensor
    """For each expert the rank that this rank sends its tokens to, int32 ``[n_logical]``; see `Dispatcher`."""
    local_expert_indices_map: torch.Tensor
    """For each expert its slot on this rank, or -1, int32 ``[n_logical]``."""
    local_expert_list: list[int]
    """The expert in each slot of this rank."""
    placement: Placement
    """Where all experts are: what one rank per expert cannot say."""
    weights: tuple[Field, ...]
    """All fields."""
    epoch: int
    """Of the cycle that the placement is from; 0 is the first placement."""


@dataclass(frozen=True)
class _Staged:
    """What becomes live with the next swap."""

    placement: Placement
    epoch: int
    staging: Staging
    slots: tuple[int, ...]
    experts: list[int]
    compiled: Compiled | None


class Dispatcher:
    """Where the experts of a layer are, as one rank sees it, while the model runs.

    A forward pass begins with

        if dispatcher.check_consistency():  # compares an integer
            dispatcher.update_module_weight_and_map()  # all ranks do so in this same pass

    and then routes by `device_indices_map`, by `log2phy` or by the planner. Without a Rebalancer nothing ever changes.

    Weights and maps keep their addresses: a swap copies the experts that have come into their slots, and other maps
    over the maps, on the caller's current stream. So parameters stay what they are, and captured CUDA graphs see the
    new placement; make both calls outside of the capture, and once before every replay. A swap is local, and the host
    does not wait in it for the device, but for work that a planner on the CPU has in the background (``lag=1``).

    Between the transfer of an expert and the swap its weights must not change, as an optimizer would change them; and
    autograd refuses a backward pass through a forward pass from before the swap.

    Args:
        placement: where the experts are at first; the same on every rank.
        weights: the live tensors of this rank's slots, one field for each kind: a stacked tensor ``[slots, ...]``, or a
            sequence of ``slots`` tensors; any number, any dtype; as `lplb.weights.WeightMover` has them.
        rank: this rank.
        ranks_per_node: consecutive ranks that are one node, for `device_indices_map`; by default the planner's, without
            one the number of CUDA devices, without any ``min(8, n_ranks)``.
        planner: a planner of the same placement, made by `lplb.Planner.from_placement`; it follows in every swap.
        device: where the maps are; by default where the weights are.

    Raises:
        TypeError, ValueError: an argument is not allowed; the message has the value seen and the value allowed.
    """

    placement: Placement
    """The live placement."""
    epoch: int
    """Of the cycle that it is from; 0 is the first."""
    update_flag: bool
    """What `check_consistency` returned last, until the swap has been made."""
    point: SwapPoint
    """Where the step of the next swap is agreed on."""
    fields: Fields
    """The live weights, and what is the same for all of them."""
    local_expert_num: int
    """Slots of this rank."""
    local_expert_list: list[int]
    """The expert in each slot of this rank."""
    owner: object
    """The `lplb.dynamic.Rebalancer` that moves its experts, or ``None``."""

    def __init__(
        self,
        placement: Placement,
        weights: Sequence[Field],
        rank: int,
        *,
        ranks_per_node: int | None = None,
        planner: Planner | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """See the class."""
        if not isinstance(placement, Placement):
            raise TypeError(f"placement is {seen(placement)}, allowed is an lplb.Placement")
        self.rank = whole_number("rank", rank, 0, placement.n_ranks - 1)
        self.fields = checked_fields("weights", weights)
        if self.fields.n_slots != placement.slots_per_rank:
            raise ValueError(
                f"weights has {self.fields.n_slots} slots, allowed is as many as the placement has on a rank, "
                f"{placement.slots_per_rank}"
            )
        _check_apart(self.fields)
        _check_planner(planner, placement)
        if ranks_per_node is None:
            by_devices = torch.cuda.device_count() or min(8, placement.n_ranks)
            ranks_per_node = by_devices if planner is None else planner.ranks_per_node
        self.ranks_per_node = whole_number("ranks_per_node", ranks_per_node, 1)
        self.planner = planner
        self.placement, self.epoch, self.update_flag = placement, 0, False
        self.point = SwapPoint()
        self.owner = None
        self.local_expert_num = placement.slots_per_rank
        self.local_expert_list = self._experts_of(placement)
        self._inference = any(tensor.is_inference() for field in self.fields.fields for tensor in holders(field))

        where = self.fields.device if device is None else checked_device(device)
        if where.type == "cuda" and self.fields.device not in (where, torch.device("cpu")):
            raise ValueError(
                f"device is {str(where)!r}, allowed is where the weights are, {str(self.fields.device)!r}, or the CPU"
            )
        self.device = where
        host = tables(placement, self.rank, self.ranks_per_node)
        self._cuda = next((device for device in (self.fields.device, where) if device.type == "cuda"), None)
        self._swapped: torch.cuda.Event | None = None
        with _made_current(self._cuda):
            self._maps, self._next_maps = Maps(host, where), Maps(host, where)
            if self._cuda is not None:
                self._swapped = torch.cuda.Event()  # type: ignore[no-untyped-call, unused-ignore]
                self._swapped.record()
        self.device_indices_map = self._maps.device_indices_map
        self.local_expert_indices_map = self._maps.local_expert_indices_map
        self.phy2log, self.log2phy, self.logcnt = self._maps.phy2log, self._maps.log2phy, self._maps.logcnt
        self._staged: _Staged | None = None
        self._permutations: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuse to be copied and pickled.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            f"a {type(self).__name__} was copied or pickled, allowed is to make another of the copy's weights and this "
            "placement; what to save are the model's state_dict() and Rebalancer.state_dict()"
        )

    @property
    def n_logical(self) -> int:
        """Number of logical experts."""
        return self.placement.n_logical

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert, all fields together."""
        return self.fields.layout.nbytes

    @property
    def steps(self) -> int:
        """Forward passes that have begun."""
        return self.point.steps

    @property
    def swapped(self) -> torch.cuda.Event | None:
        """On CUDA recorded behind the last swap, for streams that read the weights; ``None`` on the CPU."""
        return self._swapped

    # ---- the thread of the forward passes

    def check_consistency(self) -> bool:
        """Begin a forward pass; to be called once in each, whatever it returns.

        Returns:
            `update_flag`: whether `update_module_weight_and_map` is to be called now. All ranks get the same answer in
            the same pass.

        Raises:
            RuntimeError: the swap of the pass before has not been made, or rebalancing has lost a rank.
        """
        self.update_flag = due = self.point.advance()
        return due

    def update_module_weight_and_map(self) -> Update:
        """Make the swap that `check_consistency` has announced. Local; see the class for streams.

        Returns:
            What is live now.

        Raises:
            RuntimeError: no swap is due, or a CUDA graph is being captured; nothing has changed.
        """
        staged = self._staged
        if not self.update_flag or staged is None:
            raise RuntimeError(
                "update_module_weight_and_map was called while no swap is due, allowed is after check_consistency() "
                "has returned True, once"
            )
        if self._cuda is not None and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "update_module_weight_and_map was called while a CUDA graph is captured, which would swap again in "
                "every replay; allowed is outside of the capture, before a replay"
            )
        if self.planner is not None:
            self.planner.replace_placement(staged.placement if staged.compiled is None else staged.compiled)
        self._swap(staged)
        self.placement, self.epoch = staged.placement, staged.epoch
        self.local_expert_list = list(staged.experts)
        self._staged = None
        self.update_flag = False
        self.point.done()
        return self.current()

    def current(self) -> Update:
        """Return what is live, as `update_module_weight_and_map` does, without a swap."""
        fields = self.fields.fields
        return Update(
            fields[0],
            fields[1] if len(fields) > 1 else None,
            self.local_expert_num,
            self.device_indices_map,
            self.local_expert_indices_map,
            self.local_expert_list,
            self.placement,
            fields,
            self.epoch,
        )

    def _swap(self, staged: _Staged) -> None:
        with _made_current(self._cuda), quiet(self._inference):
            with staged.staging.taking():
                for field, come in zip(self.fields.fields, staged.staging.fields, strict=True):
                    for place, slot in enumerate(staged.slots):
                        field[slot].copy_(come[place])
            self._maps.flat.copy_(self._next_maps.flat, non_blocking=True)
            self._renew_permutations()
            if self._swapped is not None:
                self._swapped.record()

    def _renew_permutations(self) -> None:
        self._permutations = {key: kept for key, kept in self._permutations.items() if key[1] == self.device}
        for permutation in self._permutations.values():
            self._write_permutation(permutation, self.phy2log)

    def adopt(self, placement: Placement, epoch: int) -> None:
        """Take another placement for the live one: its experts are in the slots, as after loading a checkpoint.

        Local, between two forward passes; call it on every rank. On CUDA the host waits for the current stream.

        Refused while a `lplb.dynamic.Rebalancer` has the dispatcher, whatever that is at: a transfer may have read the
        slots before they were loaded, and ranks that adopt at other moments of a cycle would go on by two placements.
        Close it before the slots are written, and make another behind it; or let it move experts itself, by
        `Rebalancer.move_to`.

        Args:
            placement: of the sizes of the live one.
            epoch: of the cycle that it is from.

        Raises:
            TypeError, ValueError: an argument is not allowed.
            RuntimeError: a Rebalancer has the dispatcher, or another placement is staged; nothing has changed.
        """
        if self.owner is not None:
            raise RuntimeError(
                "adopt was called while a Rebalancer has the dispatcher, allowed is after its close(); Rebalancer."
                "move_to moves experts while it runs"
            )
        if self._staged is not None:
            raise RuntimeError(f"epoch {self._staged.epoch} is staged, allowed is while nothing is; see unstage()")
        check_sizes("placement", placement, self.placement)
        epoch = whole_number("epoch", epoch, 0)
        host = tables(placement, self.rank, self.ranks_per_node)
        if self.planner is not None:
            self.planner.replace_placement(placement)
        with _made_current(self._cuda), quiet():
            self._maps.write(host)
            self._renew_permutations()
            if self._swapped is not None:
                self._swapped.record()
        self.placement, self.epoch = placement, epoch
        self.local_expert_list = self._experts_of(placement)

    # ---- routing

    def get_expert_trans_tensor(
        self,
        scores: torch.Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> torch.Tensor:
        """Return the permutation P from experts to slots: ``P[e, s]`` is 1 where slot ``s`` has expert ``e``, else 0.

        It is that of the live placement from the first one on, all changes together: ``scores @ P`` has a column for
        every slot, with its expert's score, in copies too. The product adds zeros to it, which is exact for finite
        scores, but turns columns of a row to NaN where it has an infinity (``-inf`` for masked experts), for 0 times
        that is NaN. `slot_scores` has no such products.

        The tensor is kept and returned again. A swap writes it in place if it is on the dispatcher's device; a copy
        elsewhere is made anew.

        Args:
            scores: whose dtype and device are taken.
            dtype: instead of the scores'; without both float32.
            device: instead of the scores'; without both where the maps are.

        Returns:
            ``[n_logical, n_physical]``, not to be written to.
        """
        if scores is not None and not isinstance(scores, torch.Tensor):
            raise TypeError(f"scores is {seen(scores)}, allowed is a torch.Tensor or None")
        if dtype is None:
            dtype = torch.float32 if scores is None else scores.dtype
        if device is None:
            device = self.device if scores is None else scores.device
        where = checked_device(device)
        found = self._permutations.get((dtype, where))
        if found is None:
            with torch.inference_mode(False), torch.no_grad():
                found = torch.empty(self.n_logical, self.placement.n_physical, dtype=dtype, device=where)
                self._write_permutation(found, self.phy2log.to(where))
            self._permutations[dtype, where] = found
        return found

    @staticmethod
    def _write_permutation(permutation: torch.Tensor, phy2log: torch.Tensor) -> None:
        experts = torch.arange(len(permutation), dtype=phy2log.dtype, device=phy2log.device)
        permutation.copy_(experts[:, None] == phy2log)

    def slot_scores(self, scores: torch.Tensor) -> torch.Tensor:
        """Return the score of each slot's expert: exactly ``scores @ P``, infinities and NaN included.

        Args:
            scores: ``[..., n_logical]``, any dtype.

        Returns:
            ``[..., n_physical]``, with gradients to the scores.

        Raises:
            TypeError, ValueError: it is no such tensor.
        """
        if not isinstance(scores, torch.Tensor):
            raise TypeError(f"scores is {seen(scores)}, allowed is a torch.Tensor")
        if not scores.dim() or scores.shape[-1] != self.n_logical:
            raise ValueError(f"scores has shape {list(scores.shape)}, allowed is [..., n_logical = {self.n_logical}]")
        return scores.index_select(-1, self.phy2log.to(scores.device))

    # ---- the background thread

    @property
    def staged(self) -> bool:
        """Whether something is to become live with the next swap."""
        return self._staged is not None

    @property
    def cuda_device(self) -> torch.device | None:
        """Where weights or maps are, if that is a CUDA device."""
        return self._cuda

    def stage(self, placement: Placement, staging: Staging, epoch: int, before: Placement | None = None) -> None:
        """Say what becomes live with the next swap: a placement, whose arrivals are in the staging.

        Place ``i`` of the staging goes to slot ``arrivals(self.placement, placement, self.rank).slots[i]``.

        Args:
            placement: of the sizes of the live one.
            staging: of the fields' layout, filled; it is kept until the swap, or `unstage`.
            epoch: of the cycle.
            before: the placement that was live when the arrivals were brought; by default the live one.

        Raises:
            TypeError, ValueError: an argument is not allowed.
            RuntimeError: something is staged already; the live placement is not ``before`` any more; or the planner has
                not the memory for another placement.
        """
        if self._staged is not None:
            raise RuntimeError(f"epoch {self._staged.epoch} is staged, allowed is one at a time; see unstage()")
        if before is not None and self.placement != before:
            raise RuntimeError(f"the live placement is {self.placement!r}, allowed is the one before, {before!r}")
        check_sizes("placement", placement, self.placement)
        slots = arrivals(self.placement, placement, self.rank).slots
        if not isinstance(staging, Staging):
            raise TypeError(f"staging is {seen(staging)}, allowed is an lplb.dynamic Staging")
        if (staging.layout, staging.device) != (self.fields.layout, self.fields.device):
            raise ValueError(
                f"staging is for experts of {staging.layout.kinds} on {str(staging.device)!r}, allowed is the layout "
                f"of the weights, {self.fields.layout.kinds} on {str(self.fields.device)!r}"
            )
        if len(slots) > staging.capacity:
            raise ValueError(f"staging has room for {staging.capacity} experts, allowed is {len(slots)} or more")
        epoch = whole_number("epoch", epoch, 0)
        host = tables(placement, self.rank, self.ranks_per_node)
        compiled = None if self.planner is None else self.planner.compiled_for(placement)
        with staging.filling():
            if self._swapped is not None and self.device.type == "cuda":  # that swap may still read what is written now
                torch.cuda.current_stream(self.device).wait_event(self._swapped)
            self._next_maps.write(host)
        staging.keep(self)
        self._staged = _Staged(placement, epoch, staging, slots, self._experts_of(placement), compiled)

    def unstage(self) -> None:
        """Forget what is staged, if anything is, and release the staging. Not for what all ranks have agreed on."""
        staged, self._staged = self._staged, None
        if staged is not None:
            staged.staging.let_go(self)

    def _experts_of(self, placement: Placement) -> list[int]:
        n = placement.slots_per_rank
        experts: list[int] = placement.phy2log[self.rank * n : (self.rank + 1) * n].tolist()
        return experts


def check_sizes(name: str, placement: Placement, live: Placement) -> None:
    """Refuse a placement of other sizes than the live one.

    Raises:
        TypeError: it is no placement.
        ValueError: names what differs.
    """
    if not isinstance(placement, Placement):
        raise TypeError(f"{name} is {seen(placement)}, allowed is an lplb.Placement")
    for size in ("n_ranks", "n_physical", "n_logical"):
        if getattr(placement, size) != getattr(live, size):
            raise ValueError(f"{name} has {size} {getattr(placement, size)}, allowed is {getattr(live, size)}, as now")


def _check_apart(fields: Fields) -> None:
    """Refuse one tensor as two fields: it would come twice, and one of the two would never be read."""
    places: dict[int, tuple[int, int]] = {}
    for i, field in enumerate(fields.fields):
        for slot in range(fields.n_slots):
            if not field[slot].numel():
                continue
            other, its_slot = places.setdefault(field[slot].data_ptr(), (i, slot))
            if other != i:
                raise ValueError(
                    f"weights[{i}] has slot {slot} in the memory of slot {its_slot} of weights[{other}], allowed are "
                    "fields of their own memory"
                )


def _check_planner(planner: object, placement: Placement) -> None:
    if planner is None:
        return
    if not isinstance(planner, Planner):
        raise TypeError(f"planner is {seen(planner)}, allowed is an lplb.Planner or None")
    if planner.r2o is not None:
        raise ValueError("planner was made for a topology (r2o), allowed is one made by Planner.from_placement")
    if planner.placement != placement:
        raise ValueError(f"planner has another placement, {planner.placement}, allowed is the one given, {placement}")


def _made_current(device: torch.device | None) -> contextlib.AbstractContextManager[object]:
    return contextlib.nullcontext() if device is None else torch.cuda.device(device)
