"""What a plan with transfers does for a layer: expert GEMMs rank by rank, and the memory of the busiest rank.

The ranks' work runs one after another, on one GPU where there is one, and else at a smaller size on one thread.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from plain_lla import plain_lla
from rows import Row
from torch.nn import functional

from lplb import TransferPlanner
from lplb.scenes import LLEP_SCENES, LlepScene, llep_scene

SMALLER = 8  # on a CPU: hidden and FFN sizes; tokens by its square
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


def bench_memory() -> list[Row]:
    """Filled in below."""
    return []
