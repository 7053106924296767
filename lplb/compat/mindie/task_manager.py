"""``mindiesd.eplb.task_manager``."""

from __future__ import annotations

import os
import threading
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lplb import exchange
from lplb.arguments import checked_device, seen, whole_number
from lplb.compat.mindie.dispatcher import DynamicDispatcher
from lplb.dynamic.layers import find_layers
from lplb.dynamic.rebalancer import Rebalancer
from lplb.dynamic.sources import HostWeights
from lplb.weights.links import checked_ranks

__all__ = ["InstructionQueue", "TransferWorker", "construct_expert_info_transfer_pool"]

_CLOSED = ("closed", "failed")


class TransferWorker:
    """What stands for MindIE-SD's worker thread: the rebalancer's thread, with the calls of a thread."""

    rebalancer: Rebalancer
    """What moves the experts."""
    name = "lplb-rebalancer"
    daemon = True

    def __init__(self, rebalancer: Rebalancer, weights: HostWeights | None) -> None:
        """See the class."""
        self.rebalancer = rebalancer
        self._weights = weights
        self._exit = threading.Event()

    def is_alive(self) -> bool:
        """Whether experts may still be moved."""
        return self.rebalancer.stats().stage not in _CLOSED

    def join(self, timeout: float | None = None) -> None:
        """Wait until the queue was told ``"exit"``, on this rank; at most ``timeout`` seconds, if given."""
        self._exit.wait(timeout)

    def exit(self) -> None:
        """Close the rebalancer, as `Rebalancer.close` does, and give the complete weights back."""
        self.rebalancer.close()
        if self._weights is not None and not self.is_alive():
            self._weights.close()
            self._weights = None
        self._exit.set()


class InstructionQueue:
    """What stands for MindIE-SD's queue of instructions, of which one is a user's: to end."""

    def __init__(self, worker: TransferWorker) -> None:
        """See the class."""
        self._worker = worker

    def put(self, item: str | None, block: bool = True, timeout: float | None = None) -> None:
        """Close the rebalancer, on all ranks, and return when that is done.

        Args:
            item: ``"exit"`` or ``None``.
            block: of no effect, as is ``timeout``: there is nothing to wait for in the queue.
            timeout: see ``block``.

        Raises:
            ValueError: the item is another; nothing has changed.
        """
        if item not in (None, "exit"):
            raise ValueError(f"item is {item!r}, allowed are 'exit' and None: all else goes without instructions")
        self._worker.exit()

    def put_nowait(self, item: str | None) -> None:
        """Do as `put`."""
        self.put(item)


def construct_expert_info_transfer_pool(
    module: nn.Module,
    rank_in_group: int,
    device: int | str | torch.device | None = None,
    ip: str | None = None,
    port: int | None = None,
    auth_key: str | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    ranks_per_node: int | None = None,
    **settings: Any,
) -> tuple[TransferWorker, InstructionQueue]:
    """Start a `Rebalancer` for all layers of a model that have a dispatcher and a collector. Collective.

    Weights come from host memory, where all experts are: `lplb.dynamic.sources.HostWeights` takes over the complete
    weights that the dispatchers were given, once for all ranks of a node. What the caller still holds of them is a
    second copy.

    Args:
        module: the model; submodules with ``dispatcher`` and ``expert_load_collector`` are its layers.
        rank_in_group: this rank; refused if it is not that of the group.
        device: where weights and maps are to be, a device or its number; by default where the dispatchers have them.
        ip: host of ``python -m lplb.eplb_scheduler``; ``None`` for no scheduler: every rank plans for itself, alike.
        port: its port.
        auth_key: its key; by default EPLB_AUTH_KEY of the environment. Without any, the host must be this machine.
        group: the ranks that share the experts; by default all of torch.distributed, or this process where that is not
            initialised.
        ranks_per_node: consecutive ranks that share the host's memory; by default what LOCAL_WORLD_SIZE in the
            environment says, as torchrun sets it, or 1: every rank has its own.
        settings: keywords of `lplb.dynamic.Rebalancer`. ``mode`` and, in mode EX, ``max_moves`` are to be the
            scheduler's ``--mode`` and ``--max_move``, which it checks.

    Returns:
        What stands for the worker thread, whose ``rebalancer`` has statistics, and what stands for the queue, where
        ``put("exit")`` closes it. Keep one of them, and close before the process group is destroyed.

    Raises:
        ImportError: a scheduler is asked for, and pyzmq or msgpack is not installed.
        TypeError, ValueError: an argument is not allowed, on any rank, or another on another rank.
        RuntimeError: a forward pass has begun, and ``device`` is another than before; or a rank is lost.
    """
    if group is None and dist.is_available() and dist.is_initialized():
        group = dist.group.WORLD
    ranks = checked_ranks("group", group)

    def check() -> tuple[list[DynamicDispatcher], tuple[str, str | None] | None, int]:
        whole_number("rank_in_group", rank_in_group, 0, ranks.size - 1)
        if rank_in_group != ranks.rank:
            raise ValueError(f"rank_in_group is {rank_in_group}, allowed is this process's in the group, {ranks.rank}")
        where = _checked_device(device)
        service = _service(ip, port, auth_key)
        dispatchers: list[DynamicDispatcher] = []
        for i, (_, dispatcher, _) in enumerate(find_layers(module)):
            if isinstance(dispatcher, DynamicDispatcher) and dispatcher.complete is not None:
                dispatchers.append(dispatcher)
            else:
                raise ValueError(
                    f"the dispatcher of layer {i} is {seen(dispatcher)} without complete weights, allowed is a "
                    "DynamicDispatcher of lplb.compat.mindie that no pool was made for"
                )
        return [dispatcher.to(where) for dispatcher in dispatchers], service, _sharing(ranks_per_node)

    has = "another model or no service while rank 0 has one; allowed is the same on every rank"
    dispatchers, service, sharing = exchange.together(
        ranks, check, lambda found: exchange.fingerprint("mindie", len(found[0]), found[1] is None, found[2]), has
    )
    weights: HostWeights | None = None
    if "source" not in settings:
        complete = [dispatcher.complete or () for dispatcher in dispatchers]
        weights = HostWeights.of(complete, group, rank=rank_in_group, ranks_per_node=sharing)
        settings["source"] = weights
    try:
        worker = TransferWorker(Rebalancer(module, group, service=service, **settings), weights)
    except BaseException:
        if weights is not None:
            weights.close()
        raise
    for dispatcher in dispatchers:
        dispatcher.complete = None
    return worker, InstructionQueue(worker)


def _sharing(ranks_per_node: int | None) -> int:
    """Return how many ranks share the host's memory."""
    if ranks_per_node is not None:
        return whole_number("ranks_per_node", ranks_per_node, 1)
    text = os.environ.get("LOCAL_WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"LOCAL_WORLD_SIZE in the environment is {text!r}, allowed is 1 or more")
    return int(text)


def _service(ip: str | None, port: int | None, auth_key: str | None) -> tuple[str, str | None] | None:
    """Return the scheduler's address and key."""
    if ip is None:
        if port is not None:
            raise ValueError(f"port is {port!r}, allowed without an ip is None")
        return None
    if not isinstance(ip, str) or not ip:
        raise TypeError(f"ip is {ip!r}, allowed is the name or number of a host, or None")
    if port is None:
        raise TypeError("port is None, allowed with an ip is 1 to 65535")
    number = whole_number("port", port, 1, 65535)
    return f"tcp://[{ip}]:{number}" if ":" in ip and not ip.startswith("[") else f"tcp://{ip}:{number}", auth_key


def _checked_device(device: int | str | torch.device | None) -> torch.device | None:
    """Return the device with its number; one given as a number is of the accelerator that there is."""
    if device is None:
        return None
    if isinstance(device, int) and not torch.cuda.is_available() and not hasattr(torch, "npu"):
        raise ValueError(f"device is {device}, allowed on a machine without an accelerator are 'cpu' and None")
    return checked_device(device)
