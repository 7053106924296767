"""`Planner.run` as a torch operator, so that compiled models hold it in one graph; eager calls do not come here.

Where layers are compiled one by one, each with a planner in its module, torch takes the planners' numbers for constants
and compiles every layer anew, up to its recompile limit; ``torch._dynamo.config.allow_unspec_int_on_nn_module = True``
makes one graph serve all.
"""

import itertools
import weakref
from typing import Protocol

import torch

__all__ = ["handle_of", "run"]


class _Runs(Protocol):
    def _run(
        self, idx: torch.Tensor, avail_counter: torch.Tensor | None, n_sms: int | None, lag: int, return_plan: bool
    ) -> tuple[torch.Tensor, object]: ...


_PYTHON = torch._C.DispatchKey.Python
_planners: "weakref.WeakValueDictionary[int, _Runs]" = weakref.WeakValueDictionary()
_numbers = itertools.count()
_library = torch.library.Library("lplb", "DEF")  # type: ignore[no-untyped-call, unused-ignore]
_tags = [getattr(torch.Tag, name) for name in ("pt2_compliant_tag", "flexible_layout") if hasattr(torch.Tag, name)]
# The planner's number is a SymInt so that one graph serves the planners of many layers. Without a counter nothing is
# mutated, and Inductor (of torch 2.13) fails where an operator could mutate and does not: hence the overload.
for _schema in (
    "run(Tensor idx, Tensor(a!)? avail_counter, SymInt planner, int? n_sms, int lag=0) -> Tensor",
    "run.uncounted(Tensor idx, SymInt planner, int? n_sms, int lag=0) -> Tensor",
):
    _library.define(_schema, tags=tuple(_tags))  # type: ignore[no-untyped-call, unused-ignore]


def handle_of(planner: _Runs, fingerprint: tuple[int, int]) -> int:
    """Return the number by which `run` finds a planner; graphs hold numbers, not objects.

    It is made of the placement and of how many planners this process had before: the same on all ranks and in every run
    of a program, so that caches of compiled code serve again. A graph loaded elsewhere finds its planner if planners
    are made there in the same order. A re-mapping keeps the number.
    """
    handle = fingerprint[0] << 24 | next(_numbers) % (1 << 24)
    _planners[handle] = planner
    return handle


def run(
    idx: torch.Tensor, avail_counter: torch.Tensor | None, planner: int, n_sms: int | None = None, lag: int = 0
) -> torch.Tensor:
    """`Planner.run` of the planner with a number, through the dispatcher.

    Args:
        idx: as for `Planner.run`.
        avail_counter: as for `Planner.run`; mutated.
        planner: what `handle_of` returned.
        n_sms: as for `Planner.run`.
        lag: as for `Planner.run`.

    Returns:
        Physical expert indices, shape, dtype and device of ``idx``, contiguous.

    Raises:
        RuntimeError: no planner of this process has this number.
        TypeError, ValueError: as `Planner.run`, when the graph runs.
    """
    physical: torch.Tensor
    if avail_counter is None:
        physical = torch.ops.lplb.run.uncounted(idx, planner, n_sms, lag)
    else:
        physical = torch.ops.lplb.run.default(idx, avail_counter, planner, n_sms, lag)
    return physical


def is_traced(idx: object) -> bool:
    """Whether something listens to operators, or ``idx`` stands for a tensor without memory of its own."""
    if torch._C._len_torch_dispatch_stack():
        return True
    return type(idx) is not torch.Tensor and isinstance(idx, torch.Tensor) and torch._C._dispatch_keys(idx).has(_PYTHON)


def _run(
    idx: torch.Tensor, avail_counter: torch.Tensor | None, planner: int, n_sms: int | None, lag: int = 0
) -> torch.Tensor:
    found = _planners.get(planner)
    if found is None:
        raise RuntimeError(
            f"lplb::run has planner {planner}, allowed is one that is alive in this process: keep the Planner as long "
            "as the compiled model, and make it before an exported model runs"
        )
    return found._run(idx, avail_counter, n_sms, lag, False)[0]


def _run_uncounted(idx: torch.Tensor, planner: int, n_sms: int | None, lag: int = 0) -> torch.Tensor:
    return _run(idx, None, planner, n_sms, lag)


def _fake(
    idx: torch.Tensor, avail_counter: torch.Tensor | None, planner: int, n_sms: int | None, lag: int = 0
) -> torch.Tensor:
    return idx.new_empty(idx.shape)


def _fake_uncounted(idx: torch.Tensor, planner: int, n_sms: int | None, lag: int = 0) -> torch.Tensor:
    return idx.new_empty(idx.shape)


for _device in ("CPU", "CUDA"):
    _library.impl("run", _run, _device)  # type: ignore[no-untyped-call, unused-ignore]
    _library.impl("run.uncounted", _run_uncounted, _device)  # type: ignore[no-untyped-call, unused-ignore]
torch.library.register_fake("lplb::run", _fake, lib=_library)
torch.library.register_fake("lplb::run.uncounted", _fake_uncounted, lib=_library)
