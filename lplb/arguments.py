"""Checks of what callers give to a planner: the value seen and the value allowed, before any work."""

import operator
from collections.abc import Sequence
from typing import SupportsIndex

import numpy as np
import torch

from lplb import _C

INDEX_DTYPES = (torch.int32, torch.int64)
MAX_GROUP_SIZE = _C.max_group_size
"""Most ranks that may balance among themselves; an NVLink domain of 72 fits in one group."""
MOST_TRAFFIC_WEIGHT = 1000
MOST_TOKENS = 2**31 - 1
"""Per expert, and per call: counts and quotas are int32."""


def whole_number(name: str, value: SupportsIndex, lowest: int, highest: int | None = None) -> int:
    """Return ``value`` as an int, or say what it was and what is allowed.

    Args:
        name: what the caller calls the value.
        value: any integer, NumPy's included; ``bool`` and floats are refused.
        lowest: smallest value allowed.
        highest: largest value allowed, ``None`` for no bound.

    Returns:
        The value as a Python int.

    Raises:
        TypeError: ``value`` is not an integer.
        ValueError: ``value`` is out of bounds.
    """
    if isinstance(value, (bool, np.bool_)) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} is {value!r}, allowed is an int")
    number = operator.index(value)
    if number < lowest or (highest is not None and number > highest):
        allowed = f"{lowest} or more" if highest is None else f"{lowest} to {highest}"
        raise ValueError(f"{name} is {number}, allowed is {allowed}")
    return number


def real_number(name: str, value: object) -> float:
    """Return ``value`` as a float, or refuse what is no number; its bounds, and NaN, are for the caller.

    Args:
        name: what the caller calls the value.
        value: an int or float, NumPy's included; ``bool`` is refused.

    Raises:
        TypeError: ``value`` is none of these.
    """
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} is {value!r}, allowed is a number")
    return float(value)


def checked_device(device: torch.device | str | int) -> torch.device:
    """Return a device with its number.

    Raises:
        ValueError: torch has no such device here, or its tensors have no values.
    """
    try:
        found = torch.empty(0, device=device).device
    except (AssertionError, RuntimeError, TypeError) as error:
        raise ValueError(f"device is {device!r}, allowed is one that torch has: {error}") from error
    if found.type == "meta":
        raise ValueError("device is 'meta', allowed is one whose tensors have values")
    return found


def check_device(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    """Refuse a tensor that is not where the planner is."""
    if tensor.device != device:
        raise ValueError(f"{name} is on {str(tensor.device)!r}, allowed is the planner's device, {str(device)!r}")


def refuse_without_memory(name: str, tensor: torch.Tensor) -> None:
    """Refuse a tensor that a tracer put in the place of one; `Planner.run` hands those to its operator."""
    if type(tensor) is torch.Tensor:
        return
    from torch._subclasses.fake_tensor import FakeTensor

    if isinstance(tensor, FakeTensor):
        raise TypeError(
            f"{name} is a FakeTensor, which has no values; allowed is a tensor that has, and, traced, only run"
        )


def check_indices(idx: torch.Tensor, device: torch.device) -> None:
    """Refuse indices of another type, dtype, device, or too many; their values are checked as they are counted."""
    if not isinstance(idx, torch.Tensor):
        raise TypeError(f"idx is {seen(idx)}, allowed is a torch.Tensor")
    if idx.dtype not in INDEX_DTYPES:
        raise TypeError(f"idx has dtype {idx.dtype}, allowed is torch.int32 or torch.int64")
    refuse_without_memory("idx", idx)
    check_device("idx", idx, device)
    if idx.layout != torch.strided:
        raise TypeError(f"idx has layout {idx.layout}, allowed is torch.strided")
    if idx.numel() > MOST_TOKENS:
        raise ValueError(f"idx has {idx.numel()} elements, allowed are {MOST_TOKENS} per call")


def check_counter(avail_counter: torch.Tensor | None, device: torch.device) -> None:
    """Refuse what is neither one whole number nor ``None``."""
    if avail_counter is None:
        return
    if not isinstance(avail_counter, torch.Tensor) or avail_counter.dtype not in INDEX_DTYPES:
        raise TypeError(
            f"avail_counter is {seen(avail_counter)}, allowed is a tensor of torch.int32 or torch.int64, or None"
        )
    if avail_counter.numel() != 1:
        raise ValueError(f"avail_counter has {avail_counter.numel()} elements, allowed is 1")
    refuse_without_memory("avail_counter", avail_counter)
    check_device("avail_counter", avail_counter, device)


def checked_loads(workload: torch.Tensor, n_logical: int, device: torch.device) -> torch.Tensor:
    """Return the loads ``[n_logical]`` or ``[n, n_logical]`` as contiguous int64."""
    if not isinstance(workload, torch.Tensor):
        raise TypeError(f"workload is {seen(workload)}, allowed is a torch.Tensor")
    if workload.dtype not in INDEX_DTYPES and not workload.dtype.is_floating_point:
        raise TypeError(f"workload has dtype {workload.dtype}, allowed is int32, int64 or floating")
    if workload.dim() not in (1, 2) or workload.shape[-1] != n_logical:
        raise ValueError(
            f"workload has shape {list(workload.shape)}, allowed is [n_logical] = [{n_logical}] or a batch "
            f"[n, {n_logical}]"
        )
    refuse_without_memory("workload", workload)
    check_device("workload", workload, device)
    if workload.dtype.is_floating_point:
        workload = workload.double()  # MOST_TOKENS is no float32
        odd = workload != workload.floor()  # true for NaN as well; an infinity is too large below
        if bool(odd.any()):
            raise ValueError(f"workload has {float(workload[odd][0])}, allowed are whole numbers of tokens")
    least, most = workload.aminmax() if workload.numel() else (0, 0)
    if least < 0 or most > MOST_TOKENS:
        found = torch.as_tensor(least if least < 0 else most).item()
        raise ValueError(f"workload has {found}, allowed are 0 to {MOST_TOKENS} tokens per expert")
    return workload.to(torch.int64).contiguous()


def check_history(workload: torch.Tensor, n_logical: int, device: torch.device) -> None:
    """Refuse a load history of another type, shape or device; `rebalance_experts` checks its values."""
    if not isinstance(workload, torch.Tensor):
        raise TypeError(f"workload is {seen(workload)}, allowed is a torch.Tensor")
    if workload.shape != (n_logical,):
        raise ValueError(f"workload has shape {list(workload.shape)}, allowed is [n_logical] = [{n_logical}]")
    check_device("workload", workload, device)


def checked_share(o_weight: torch.Tensor, shape: tuple[int, int, int], device: torch.device) -> torch.Tensor:
    """Return shares from 0 to 1 as float64."""
    if not isinstance(o_weight, torch.Tensor) or not o_weight.dtype.is_floating_point:
        raise TypeError(f"o_weight is {seen(o_weight)}, allowed is a floating tensor {list(shape)}")
    if o_weight.shape != shape:
        raise ValueError(f"o_weight has shape {list(o_weight.shape)}, allowed is {list(shape)}")
    check_device("o_weight", o_weight, device)
    outside = ~((o_weight >= 0) & (o_weight <= 1))  # true for NaN as well
    if bool(outside.any()):
        raise ValueError(f"o_weight has {float(o_weight[outside][0])}, allowed are shares from 0 to 1")
    return o_weight.double()


def checked_speeds(rank_speed: Sequence[float] | torch.Tensor | None, n_ranks: int) -> list[float]:
    """Return one positive speed per rank; 1 by default."""
    if rank_speed is None:
        return [1.0] * n_ranks
    try:
        speed = torch.as_tensor(rank_speed, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"rank_speed is {rank_speed!r}, allowed are {n_ranks} numbers") from error
    if speed.shape != (n_ranks,):
        raise ValueError(f"rank_speed has shape {list(speed.shape)}, allowed is [n_ranks] = [{n_ranks}]")
    odd = ~((speed >= 1e-6) & (speed <= 1e6))
    if bool(odd.any()):
        raise ValueError(f"rank_speed has {float(speed[odd][0])}, allowed are 1e-6 to 1e6")
    return [float(v) for v in speed]


def checked_group_size(n_ranks: int, group_size: int | None) -> int:
    """Return the ranks per balance group; all ranks by default."""
    if group_size is not None:
        return whole_number("group_size", group_size, 1, MAX_GROUP_SIZE)
    if n_ranks > MAX_GROUP_SIZE:
        raise ValueError(f"group_size is None, which stands for all {n_ranks} ranks, allowed are 1 to {MAX_GROUP_SIZE}")
    return n_ranks


def checked_traffic_weight(traffic_weight: float, solver: str, alone: bool) -> float:
    """Return what a token costs that crosses nodes; 0 unless the interior point plans for known sources."""
    if isinstance(traffic_weight, bool) or not isinstance(traffic_weight, (int, float)):
        raise TypeError(f"traffic_weight is {traffic_weight!r}, allowed is a number")
    if not 0 <= traffic_weight <= MOST_TRAFFIC_WEIGHT:
        raise ValueError(f"traffic_weight is {traffic_weight}, allowed are 0 to {MOST_TRAFFIC_WEIGHT}")
    if traffic_weight > 0 and alone:
        raise ValueError(
            f"traffic_weight is {traffic_weight}, allowed without a group, where sources are unknown, is 0"
        )
    if traffic_weight > 0 and solver != "ipm":
        raise ValueError(f"traffic_weight is {traffic_weight}, allowed with solver {solver!r} is 0: costs want 'ipm'")
    return float(traffic_weight)


def check_divides(name: str, value: int, by: str, divisor: int) -> None:
    """Refuse a value that is not a multiple."""
    if value % divisor:
        raise ValueError(f"{name} is {value}, allowed is a multiple of {by} = {divisor}")


def seen(value: object) -> str:
    """Say in an error what was given."""
    if isinstance(value, torch.Tensor):
        return f"a {value.dtype} tensor {list(value.shape)}"
    return f"a {type(value).__name__}"
