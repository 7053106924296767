"""What a plan with transfers does for a layer: expert GEMMs rank by rank, and the memory of the busiest rank.

The ranks' work runs one after another, on one GPU where there is one, and else at a smaller size on one thread.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import tempfile
import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from plain_lla import plain_lla
from rows import Row
from torch import nn
from torch.multiprocessing import start_processes
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from lplb.nn import ExpertParallelMoE, GuestSlots
from lplb.scenes import LLEP_SCENES, LlepScene, llep_scene
from lplb.transfers import TransferPlanner

SMALLER = 8  # on a CPU: hidden and FFN sizes; tokens by its square
MEMORY_SLOTS = 2
GEMM_SCENES = ("80 % in 4", "95 % in 1")


def at_home(counts: np.ndarray) -> np.ndarray:
    """Quotas of plain expert parallelism, int64 [n_logical, ranks]: every rank has its block of experts."""
    n_ranks, n_experts = counts.shape
    quota = np.zeros((n_experts, n_ranks), dtype=np.int64)
    quota[np.arange(n_experts), np.arange(n_experts) // (n_experts // n_ranks)] = counts.sum(0)
    return quota


def by_lla(counts: np.ndarray, alpha: float = 1.0) -> np.ndarray:
    """Quotas of LLEP's least-loaded assignment, int64 [n_logical, ranks]."""
    quota = at_home(counts)
    for expert, home, rank, tokens in plain_lla(torch.from_numpy(counts), len(counts), alpha).transfers:
        quota[expert, home] -= tokens
        quota[expert, rank] += tokens
    return quota


# Expert GEMMs


class Experts:
    """The experts of a layer, drawn at random, all on one device."""

    def __init__(self, n_experts: int, hidden: int, ffn: int, device: torch.device) -> None:
        """Draws the weights: ``gate_up [hidden, 2 * ffn]`` and ``down [ffn, hidden]`` of each."""
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        generator = torch.Generator(device).manual_seed(1)
        draw = {"generator": generator, "device": device, "dtype": dtype}
        self.gate_up = torch.randn(n_experts, hidden, 2 * ffn, **draw) * hidden**-0.5
        self.down = torch.randn(n_experts, ffn, hidden, **draw) * ffn**-0.5

    def serve(self, rows: torch.Tensor, tokens: list[int]) -> None:
        """Run rows that lie expert by expert."""
        at = 0
        for expert, n in enumerate(tokens):
            if n:
                gate, up = (rows[at : at + n] @ self.gate_up[expert]).chunk(2, -1)
                torch.mm(functional.silu(gate) * up, self.down[expert])
                at += n

    def seconds(self, quota: np.ndarray, repeats: int = 3) -> list[float]:
        """Least seconds of each rank's experts, the ranks one after another."""
        device = self.down.device
        rows = torch.randn(int(quota.sum(0).max()), self.down.shape[2], device=device, dtype=self.down.dtype)
        best = [float("inf")] * quota.shape[1]
        for _ in range(repeats):
            for rank, tokens in enumerate(quota.T.tolist()):
                begin = now(device)
                self.serve(rows, tokens)
                best[rank] = min(best[rank], now(device) - begin)
        return best


def now(device: torch.device) -> float:
    """Seconds, after all work on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def smaller(scene: LlepScene, by: int) -> np.ndarray:
    """The scene's batch with fewer tokens."""
    tokens, model = scene.tokens_per_rank // (by * by), scene.model
    return llep_scene(model.n_logical, scene.n_ranks, model.top_k, tokens, hot=scene.hot, share=scene.share)


@torch.no_grad()
def bench_gemm() -> list[Row]:
    """The slowest rank's expert GEMMs, plain expert parallelism against lplb."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    by, rows = 1 if device.type == "cuda" else SMALLER, []
    for name in GEMM_SCENES:
        scene = LLEP_SCENES[f"gpt-oss-120b, 32 Ki, {name}"]
        counts, model = smaller(scene, by), scene.model
        experts = Experts(model.n_logical, model.hidden // by, model.intermediate // by, device)
        plan = TransferPlanner(model.n_logical, scene.n_ranks).plan(torch.from_numpy(counts))
        plain, ours, lla = (experts.seconds(q) for q in (at_home(counts), plan.quota.numpy(), by_lla(counts)))
        load = at_home(counts).sum(0)
        rows.append(
            Row(
                f"expert GEMMs of the slowest rank, gpt-oss-120b {name}, hidden {model.hidden // by}, "
                f"{int(counts.sum()) // 8} rows per rank, {device.type}: plain EP over lplb",
                max(plain) / max(ours),
                "×",
                None,
                "",
                f"tokens {load.max() / int(plan.max_load):.2f}×; {1e3 * max(plain):.0f} ms to {1e3 * max(ours):.0f} ms "
                f"(mean of ranks {1e3 * float(np.mean(ours)):.0f}), LLA at α = 1 {1e3 * max(lla):.0f} ms",
            )
        )
    return rows


# Memory


class Counted(TorchDispatchMode):
    """The most bytes of tensors that are alive together: those from before, and every operator's results.

    Memory counts once, however many tensors look at it, and for as long as anything holds it, autograd included.
    """

    def __init__(self) -> None:
        """Counts what is there."""
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0
        gc.collect()
        for found in gc.get_objects():
            if issubclass(type(found), torch.Tensor):
                self._note(found)
        self._look()
        self.before = self.peak

    def _note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()

    def _look(self) -> None:
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(n for _, n in self.alive.values()))

    def __torch_dispatch__(self, function: Any, types: Any, given: Any = (), named: Any = None) -> Any:
        """Run an operator, and look."""
        out = function(*given, **(named or {}))
        tree_map_only(torch.Tensor, self._note, out)
        self._look()
        return out


def run_memory(rank: int, folder: str, counts: torch.Tensor, ffn: int) -> None:
    """One rank: a batch through a layer without and with transfers; the most bytes to a file."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    n_ranks, n_experts = counts.shape
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=n_ranks)
    found: dict[str, tuple[int, int, int]] = {}
    planner = TransferPlanner(n_experts, n_ranks, slots=MEMORY_SLOTS)
    planned = {"plain": int(at_home(counts.numpy()).sum(0)[rank]), "lplb": int(planner.plan(counts).rank_load[rank])}
    chosen = torch.arange(n_experts).repeat_interleave(counts[rank])
    chosen = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(rank))]
    for name in ("plain", "lplb"):
        given: dict[str, Any] = {}
        if name == "lplb":
            given["transfers"] = planner
            given["guests"] = GuestSlots(MEMORY_SLOTS, hidden_size=n_experts, ffn_size=ffn)
        # As many features as experts, and a router that reads the choice off the token.
        layer = ExpertParallelMoE(n_experts, ffn, n_experts, 1, group=dist.group.WORLD, **given)
        layer.router = nn.Parameter(torch.eye(n_experts))
        for kind in ("forward", "training"):
            for _ in range(2):  # the first has memory made that stays
                layer.zero_grad(set_to_none=True)
                x = functional.one_hot(chosen, n_experts).float() * 20
                with Counted() as memory, torch.set_grad_enabled(kind == "training"):
                    out = layer(x.requires_grad_(kind == "training"))
                    if kind == "training":
                        out.sum().backward()
                del out, x
            assert layer.received is not None
            found[f"{name} {kind}"] = memory.peak, int(layer.received.sum()), planned[name]
        del layer, given
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def bench_memory() -> list[Row]:
    """Most bytes on any rank, plain expert parallelism over lplb, 95 % of all choices in one expert."""
    scene = LLEP_SCENES["gpt-oss-120b, 32 Ki, 95 % in 1"]
    n_experts, n_ranks = scene.model.n_logical, scene.n_ranks
    # Sizes and tokens by one factor, so that activations and weights keep their proportion.
    rows_per_rank = scene.tokens_per_rank * scene.model.top_k * n_experts // scene.model.hidden
    ffn = scene.model.intermediate * n_experts // scene.model.hidden
    counts = torch.from_numpy(llep_scene(n_experts, n_ranks, 1, rows_per_rank, hot=1, share=scene.share))
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.set_forkserver_preload(["torch", "torch.distributed", "lplb"])
        start_processes(run_memory, (folder, counts, ffn), n_ranks, start_method="forkserver")
        found = [torch.load(f"{folder}/{rank}.pt") for rank in range(n_ranks)]
    off = max(abs(got - planned) for rank in found for _, got, planned in rank.values())
    what = f"{n_ranks} gloo processes, 95 % in 1"
    rows = [Row(f"a rank's tokens against the plan, {what}", off, "tokens", 1, "<=")]
    for kind in ("forward", "training"):
        plain, ours = (max(rank[f"{name} {kind}"][0] for rank in found) for name in ("plain", "lplb"))
        tokens = [max(rank[f"{name} {kind}"][1] for rank in found) for name in ("plain", "lplb")]
        rows.append(
            Row(
                f"peak memory of a rank, {what}, {rows_per_rank} rows per rank, hidden {n_experts}, {kind}: "
                "plain EP over lplb",
                plain / ours,
                "×",
                4,
                ">=",
                f"{plain / 2**20:.1f} MiB to {ours / 2**20:.1f}, weights and guest slots included; "
                f"busiest rank {tokens[0]} to {tokens[1]} rows",
            )
        )
    return rows
