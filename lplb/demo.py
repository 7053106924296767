"""The demo: the recorded router trace on simulated ranks, with and without balancing.

Every simulated rank has planners of its own and gives them its own tokens; an `lplb.exchange.Known` stands in for the
all-gather. What all ranks return is checked against the plan, batch by batch. `run_demo` is what ``lplb demo`` calls.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from lplb import topology
from lplb.eplb import rebalance_experts, spread_copies
from lplb.exchange import Known
from lplb.placement import Placement, whole_number
from lplb.plan import Plan
from lplb.planner import Planner
from lplb.trace import RouterTrace, load_trace

__all__ = ["CheckFailed", "Replay", "SimulatedRanks", "picture", "place", "replay", "run_demo", "split_evenly", "table"]

NONE, EVEN, LPLB, LP = "no balancing", "EPLB, even splits", "LPLB topology", "LP on EPLB placement"
METHODS = (NONE, EVEN, LPLB, LP)

TOPOLOGIES: dict[int, tuple[str, Callable[[], torch.Tensor]]] = {
    8: ("cube", topology.cube),
    16: ("hypercube", topology.hypercube),
    32: ("4×8 torus", lambda: topology.torus(4, 8)),
}
"""For each number of ranks the graph of LPLB; all have two redundant slots per rank, and so has EPLB here."""

SPARE_SLOTS = 2
"""Redundant slots per rank."""
REFRESH = 16
"""Batches from one placement to the next."""
WINDOW = 16
"""Batches before it that a placement is made from."""

_Counts = npt.NDArray[np.int64]


class CheckFailed(RuntimeError):
    """What a planner returned is not what it promises."""


@dataclass(frozen=True)
class Replay:
    """What came out of a replay."""

    n_ranks: int
    """How many ranks were simulated."""
    n_slots: int
    """Expert slots on all ranks with replicas; without balancing there is one per logical expert."""
    domain: list[str]
    """What each batch is made of, as in the trace."""
    loads: dict[str, _Counts]
    """By method: token choices on each rank, ``[batches, layers, ranks]``."""
    moved: dict[str, _Counts]
    """By method: token choices that went to a copy which is not the expert's first, ``[batches, layers]``."""
    bound: npt.NDArray[np.float64]
    """The certified lower bound of the largest load on the EPLB placement, ``[batches, layers]``."""
    micros: dict[str, npt.NDArray[np.float64]]
    """By method that has a planner: microseconds of each `Planner.run`, one after the other."""

    @property
    def first_counted(self) -> int:
        """The first batch that figures count, for all methods alike: the one with the first history, if there is."""
        return REFRESH if len(self.domain) > REFRESH else 0

    def imbalance(self, method: str) -> npt.NDArray[np.float64]:
        """Largest over mean rank load of each batch and layer, ``[batches, layers]``."""
        loads = self.loads[method]
        ratio: npt.NDArray[np.float64] = loads.max(-1) / loads.mean(-1)
        return ratio

    @property
    def bound_imbalance(self) -> npt.NDArray[np.float64]:
        """The lower bound over the mean rank load, ``[batches, layers]``."""
        ratio: npt.NDArray[np.float64] = self.bound / self.loads[LP].mean(-1)
        return ratio


# ---- the methods


def place(history: torch.Tensor, n_slots: int, n_ranks: int) -> Placement:
    """Return EPLB's placement (global policy) without an expert twice on a rank.

    EPLB may want more copies of an expert than there are ranks. Its load is then lowered until it gets one on each;
    as every rank has it, the packing of the others is the same for any load of it.

    Args:
        history: tokens of each logical expert, ``[n_logical]``.
        n_slots: physical experts on all ranks.
        n_ranks: number of ranks.
    """
    weight = history.double()[None]
    while True:
        phy2log, _, count = rebalance_experts(weight, n_slots, 1, 1, n_ranks)
        if int(count.max()) <= n_ranks:
            break
        lowered = torch.where(count > n_ranks, weight * (n_ranks / (count + 1)), weight)
        weight = lowered.clamp_min(1)  # an idle expert must be able to take the slot
    return Placement(spread_copies(phy2log, n_ranks, weight)[0], n_ranks, history.numel())


def split_evenly(placement: Placement, counts: _Counts) -> _Counts:
    """Return the tokens of each slot if every expert's tokens are dealt out evenly over its copies.

    What is left of a division goes to one copy each, beginning with copy ``e`` (modulo the number of copies), so that
    no rank gets it always.

    Args:
        placement: where the experts are.
        counts: tokens of each expert, ``[n_logical]``.
    """
    expert = placement.phy2log.numpy()
    copies = placement.logcnt.numpy()[expert].astype(np.int64)
    number = np.empty_like(copies)  # which of its expert's copies a slot is
    for slots in placement.log2phy.numpy():
        held = slots[slots >= 0]
        number[held] = np.arange(len(held))
    each, left = np.divmod(counts[expert], copies)
    quota: _Counts = each + ((number - expert) % copies < left)
    return quota


class SimulatedRanks:
    """The planners of all ranks for one layer, run one after the other as if they were apart.

    Args:
        make: makes the planner of a rank from its exchange.
        n_ranks: number of ranks.
    """

    def __init__(self, make: Callable[[Known], Planner], n_ranks: int) -> None:
        """See the class."""
        self.exchanges = [Known(rank, n_ranks) for rank in range(n_ranks)]
        self.planners = [make(exchange) for exchange in self.exchanges]
        self.counters = torch.zeros(n_ranks, 1, dtype=torch.int64)
        self.micros: list[float] = []

    def run(self, chosen: torch.Tensor, counts: torch.Tensor) -> Plan:
        """Let every rank plan and map its own tokens, and check what they return.

        Args:
            chosen: logical experts, int64 ``[ranks, tokens, top_k]``.
            counts: of each rank's tokens, int32 ``[ranks, n_logical]``.

        Returns:
            The plan, the same on all ranks.

        Raises:
            CheckFailed: an index is of another expert, a slot did not get its quota, or ranks or counters disagree.
        """
        mapped, plans = [], []
        before = self.counters.clone()
        for rank, (planner, exchange) in enumerate(zip(self.planners, self.exchanges, strict=True)):
            exchange.counts = counts
            start = time.perf_counter()
            mapped.append(planner.run(chosen[rank], self.counters[rank]))
            self.micros.append((time.perf_counter() - start) * 1e6)
            plan = planner.last_plan
            if plan is None:
                raise CheckFailed(f"rank {rank} has no plan after run")
            plans.append(plan)
        check(self.planners[0], chosen, torch.stack(mapped), plans)
        n_group = self.planners[0].n_group
        raised = (self.counters - before).flatten().tolist()
        if any(by != n_group for by in raised):
            raise CheckFailed(f"the ranks' counters were raised by {raised}, expected {n_group} solved groups each")
        return plans[0]


def check(planner: Planner, chosen: torch.Tensor, physical: torch.Tensor, plans: Sequence[Plan]) -> None:
    """Check the physical indices of all ranks against what was asked for and what was planned.

    Args:
        planner: any rank's.
        chosen: logical experts, ``[ranks, tokens, top_k]``.
        physical: what the planners made of them.
        plans: every rank's.

    Raises:
        CheckFailed: an index is outside the slots or of another expert, a slot or rank did not get its quota, the
            ranks' plans differ, or the plan is below its lower bound.
    """
    n_slots = planner.n_routed_experts
    if int(physical.min()) < 0 or int(physical.max()) >= n_slots:
        raise CheckFailed(
            f"physical indices go from {int(physical.min())} to {int(physical.max())}, expected 0 to {n_slots - 1}"
        )
    wrong = (planner.phy2log[physical] != chosen).nonzero()
    if len(wrong):
        rank, token, choice = wrong[0].tolist()
        slot, expert = int(physical[rank, token, choice]), int(chosen[rank, token, choice])
        raise CheckFailed(
            f"rank {rank}, token {token}, choice {choice} asked for expert {expert} and got physical expert {slot}, "
            f"which is expert {int(planner.phy2log[slot])}"
        )
    got = physical.flatten().bincount(minlength=n_slots)
    quota = torch.stack([plan.quota for plan in plans])
    wrong = (quota != got).nonzero()
    if len(wrong):
        rank, slot = wrong[0].tolist()
        raise CheckFailed(f"physical expert {slot} got {got[slot]} tokens, rank {rank} planned {quota[rank, slot]}")
    load = torch.stack([plan.rank_load for plan in plans])
    if bool((load != got.view(planner.ep_size, -1).sum(1)).any()):
        raise CheckFailed(f"the ranks planned rank loads {load.tolist()}, which the quotas do not give")
    bound, reached = (torch.stack([getattr(plan, name) for plan in plans]) for name in ("lower_bound", "max_load"))
    if bool((bound > reached).any()):
        raise CheckFailed(f"max_load {reached.tolist()} is below lower_bound {bound.tolist()}")


# ---- the replay


class _Layer:
    """One layer's placements and planners."""

    def __init__(self, n_logical: int, n_ranks: int) -> None:
        self.n_ranks = n_ranks
        self.n_slots = n_logical + SPARE_SLOTS * n_ranks
        r2o = TOPOLOGIES[n_ranks][1]()
        self.lplb = SimulatedRanks(lambda rank: Planner(r2o, self.n_slots, n_logical, group=rank), n_ranks)
        self.lp_micros: list[float] = []
        self._use(self.lplb.planners[0].placement)

    def refresh(self, history: torch.Tensor) -> None:
        """Place the experts anew by what the past batches asked for, ``[n_logical]``."""
        for planner in self.lplb.planners:
            planner.update_redundancy_mapping(history)
        self._use(place(history, self.n_slots, self.n_ranks))

    def _use(self, placement: Placement) -> None:
        self.placement = placement
        self.lp = SimulatedRanks(lambda rank: Planner.from_placement(placement, group=rank), self.n_ranks)
        self.lp.micros = self.lp_micros

    def quotas(self, chosen: torch.Tensor, counts: torch.Tensor) -> tuple[dict[str, _Counts], float]:
        """Return each method's tokens per slot, and the lower bound on the EPLB placement."""
        total: _Counts = counts.sum(0).numpy().astype(np.int64)
        plan = self.lp.run(chosen, counts)
        quotas = {
            NONE: total,
            EVEN: split_evenly(self.placement, total),
            LPLB: self.lplb.run(chosen, counts).quota.numpy().astype(np.int64),
            LP: plan.quota.numpy().astype(np.int64),
        }
        return quotas, float(plan.lower_bound.max())

    def firsts(self) -> dict[str, npt.NDArray[np.bool_]]:
        """Tell for each method which slots are the first copy of their expert (LPLB: its own, not redundant, slot)."""
        first = np.zeros(self.n_slots, dtype=bool)
        first[self.placement.log2phy[:, 0].numpy()] = True
        planner = self.lplb.planners[0]
        own = np.arange(self.n_slots) % planner.n_local_routed_experts < planner.n_local_logical_routed_experts
        return {NONE: np.ones(self.placement.n_logical, dtype=bool), EVEN: first, LPLB: own, LP: first}


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep torch to one thread: the tensors are so small that waking others costs more than they do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def replay(
    trace: RouterTrace, n_ranks: int, n_batches: int | None = None, on_batch: Callable[[], object] | None = None
) -> Replay:
    """Replay a trace on simulated ranks with every method.

    The tokens of a batch are dealt out in blocks, one per rank. EPLB's and LPLB's placements are made every `REFRESH`
    batches from the loads of the `WINDOW` batches before, each layer by itself. Until there is a history, both use the
    topology with the experts in order.

    Args:
        trace: what the router chose; 1,024 tokens and 64 experts can be dealt to 8, 16 and 32 ranks.
        n_ranks: 8, 16 or 32.
        n_batches: how many, from the first on; by default all.
        on_batch: called after each batch.

    Returns:
        Loads, certified bound, tokens moved and plan times of every batch and layer.

    Raises:
        TypeError, ValueError: an argument is not allowed.
        CheckFailed: a planner did not return what it planned.
    """
    all_batches, n_layers, n_tokens, _ = trace.indices.shape
    n_batches = whole_number("n_batches", all_batches if n_batches is None else n_batches, 1, all_batches)
    if n_ranks not in TOPOLOGIES or n_tokens % n_ranks or trace.n_experts % n_ranks:
        raise ValueError(
            f"n_ranks is {n_ranks}, allowed is one of {list(TOPOLOGIES)} that divides {n_tokens} tokens and "
            f"{trace.n_experts} experts"
        )
    layers = [_Layer(trace.n_experts, n_ranks) for _ in range(n_layers)]
    loads = {method: np.zeros((n_batches, n_layers, n_ranks), dtype=np.int64) for method in METHODS}
    moved = {method: np.zeros((n_batches, n_layers), dtype=np.int64) for method in METHODS}
    bound = np.zeros((n_batches, n_layers))
    asked = torch.zeros(n_batches, n_layers, trace.n_experts, dtype=torch.int64)
    for b in range(n_batches):
        for i, layer in enumerate(layers):
            if b and b % REFRESH == 0:
                layer.refresh(asked[max(0, b - WINDOW) : b, i].sum(0))
            chosen = torch.from_numpy(trace.indices[b, i].astype(np.int64)).view(n_ranks, n_tokens // n_ranks, -1)
            counts = _count(chosen, trace.n_experts)
            asked[b, i] = counts.sum(0)
            quotas, bound[b, i] = layer.quotas(chosen, counts)
            first = layer.firsts()
            for method, quota in quotas.items():
                loads[method][b, i] = quota.reshape(n_ranks, -1).sum(1)
                moved[method][b, i] = quota[~first[method]].sum()
        if on_batch is not None:
            on_batch()
    micros = {
        LPLB: np.array([t for layer in layers for t in layer.lplb.micros]),
        LP: np.array([t for layer in layers for t in layer.lp_micros]),
    }
    return Replay(n_ranks, layers[0].n_slots, trace.domain[:n_batches], loads, moved, bound, micros)


def _count(chosen: torch.Tensor, n_logical: int) -> torch.Tensor:
    """Tokens of each expert on each rank, int32 ``[ranks, n_logical]``; not by a planner, so that it checks theirs."""
    n_ranks = len(chosen)
    of_rank = chosen.flatten(1) + torch.arange(n_ranks)[:, None] * n_logical
    return of_rank.flatten().bincount(minlength=n_ranks * n_logical).view(n_ranks, n_logical).int()


# ---- what is shown


def table(replays: Sequence[Replay]) -> Table:
    """Return the results of one or more replays as one table, a section for each."""
    first = replays[0]
    n_batches, n_layers, _ = first.loads[NONE].shape
    span = f"batches {first.first_counted} to {n_batches - 1}"
    shown = Table(title=f"Rank loads of the router trace, {span}, {n_layers} layers")
    shown.add_column("")
    for name in ("imbalance\nmean", "imbalance\nworst", "tokens\nmoved", "plan time\n(median)"):
        shown.add_column(name, justify="right")
    for result in replays:
        counted = slice(result.first_counted, None)
        choices = int(result.loads[NONE][counted].sum())
        graph = TOPOLOGIES[result.n_ranks][0]
        shown.add_row(f"[bold]{result.n_ranks} ranks, {result.n_slots} slots")
        for method in METHODS:
            name = f"{method} ({graph})" if method == LPLB else method
            ratio = result.imbalance(method)[counted]
            moved = f"{result.moved[method][counted].sum() / choices:.1%}"
            micros = f"{np.median(result.micros[method]):.0f} µs" if method in result.micros else "-"
            style = "green" if method == LP else None
            shown.add_row(f"  {name}", f"{ratio.mean():.3f}", f"{ratio.max():.3f}", moved, micros, style=style)
        ratio = result.bound_imbalance[counted]
        shown.add_row("  certified lower bound", f"{ratio.mean():.3f}", f"{ratio.max():.3f}", "-", "-", style="dim")
        shown.add_section()
    return shown


_NOTES = (
    (
        "imbalance",
        f"Busiest rank's tokens / mean over ranks. All are planned and checked, but the first {REFRESH} batches, which "
        "have no history, are not counted for any method.",
    ),
    (
        "tokens moved",
        "Share of token choices served by a copy that is not the expert's first (LPLB: by a redundant slot). "
        "Moving the experts themselves is not counted.",
    ),
    (
        "plan time",
        "One Planner.run of one rank on one core of this machine; a copy of known counts stands in for the all-gather.",
    ),
    ("lower bound", "No split of the tokens over the EPLB placement has a smaller maximum; from the LP's dual."),
    (
        "placements",
        f"No balancing: one slot per expert, in order. The others: {SPARE_SLOTS} spare slots per rank, remade every "
        f"{REFRESH} batches from the loads of the {WINDOW} before; until then all use the topology, experts in order.",
    ),
)


def notes() -> Table:
    """Return what the words in the table mean."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold dim", no_wrap=True)
    grid.add_column(style="dim")
    for word, meaning in _NOTES:
        grid.add_row(word, meaning)
    return grid


_INK, _FADED = "#24292f", "#6e7781"
_COLORS = {NONE: "#b35900", EVEN: "#8250df", LPLB: "#0969da", LP: "#1a7f37"}


def picture(result: Replay, path: str | os.PathLike[str], layer: int | None = None) -> None:
    """Draw the rank loads before and after, and the imbalance of every method, over the batches of one layer.

    Args:
        result: a replay.
        path: where the picture goes; the suffix decides about its format.
        layer: which layer; by default the one with the largest mean imbalance without balancing.
    """
    if layer is None:
        layer = int(result.imbalance(NONE).mean(0).argmax())
    figure = Figure(figsize=(10, 8.2), dpi=160, layout="constrained")
    grid = figure.add_gridspec(3, 2, width_ratios=[1, 0.02], height_ratios=[1, 1, 1.15])
    before, after, lines = (figure.add_subplot(grid[row, 0]) for row in range(3))
    figure.suptitle(
        f"Tokens on each of {result.n_ranks} ranks, batch after batch (layer {layer} of the router trace)",
        fontsize=14,
        color=_INK,
        fontweight="bold",
    )
    _heat(before, result, layer, NONE, "Before: one copy of every expert")
    image = _heat(after, result, layer, LP, f"After: {SPARE_SLOTS} spare slots per rank, EPLB placement, LP split")
    bar = figure.colorbar(image, cax=figure.add_subplot(grid[:2, 1]), extend="max", ticks=[0, 0.5, 1, 1.5, 2, 2.5, 3])
    bar.set_label("rank load / mean", fontsize=11, color=_INK)
    _lines(lines, result, layer)
    _mark_domains(before, result.domain, named=True)
    for axes in (after, lines):
        _mark_domains(axes, result.domain, named=False)
    _mark_refreshes(after, len(result.domain))
    lines.set_xlabel("batch", fontsize=11, color=_INK)
    figure.savefig(path)


def _heat(axes: Axes, result: Replay, layer: int, method: str, title: str) -> AxesImage:
    """Rank by batch: load over mean, on the same scale in every call."""
    loads = result.loads[method][:, layer]
    ratio = (loads / loads.mean(1, keepdims=True)).T
    image = axes.imshow(
        ratio, aspect="auto", cmap="RdBu_r", norm=TwoSlopeNorm(1, 0, 3), interpolation="nearest", origin="lower"
    )
    busiest = result.imbalance(method)[result.first_counted :, layer].mean()
    axes.set_title(title, fontsize=12, color=_INK, loc="left", pad=22 if method == NONE else 6)
    axes.set_title(
        f"busiest rank: {busiest:.2f}× the mean",
        fontsize=12,
        color=_COLORS[method],
        loc="right",
        pad=22 if method == NONE else 6,
        fontweight="bold",
    )
    axes.set_ylabel("rank", fontsize=11, color=_INK)
    axes.tick_params(bottom=False, labelbottom=False, labelsize=10)
    return image


def _lines(axes: Axes, result: Replay, layer: int) -> None:
    """Imbalance of every method and the lower bound, batch after batch."""
    batches = np.arange(len(result.domain))
    for method in METHODS:
        ratio = result.imbalance(method)[:, layer]
        width = 2.0 if method == LP else 1.3
        label = f"{method}: {ratio[result.first_counted :].mean():.2f}"
        axes.plot(batches, ratio, color=_COLORS[method], linewidth=width, label=label)
    bound = result.bound_imbalance[:, layer]
    label = f"certified lower bound: {bound[result.first_counted :].mean():.2f}"
    axes.plot(batches, bound, color=_INK, linewidth=1, linestyle=(0, (2, 2)), label=label)
    axes.set_xlim(-0.5, len(batches) - 0.5)
    axes.set_ylim(bottom=1)
    axes.set_ylabel("busiest rank / mean", fontsize=11, color=_INK)
    axes.tick_params(labelsize=10)
    axes.grid(axis="y", color="#d0d7de", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=10, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)


def _mark_domains(axes: Axes, domain: Sequence[str], *, named: bool) -> None:
    """Mark where the text of the trace changes, and name it above the axes."""
    starts = [b for b in range(len(domain)) if b == 0 or domain[b] != domain[b - 1]]
    for start, end in zip(starts, [*starts[1:], len(domain)], strict=True):
        if start:
            axes.axvline(start - 0.5, color=_INK, linewidth=1.0, linestyle=(0, (4, 3)))
        if named:
            place: dict[str, Any] = {"xy": ((start + end - 1) / 2, 1), "xycoords": axes.get_xaxis_transform()}
            offset: dict[str, Any] = {"xytext": (0, 5), "textcoords": "offset points"}
            name = domain[start].replace("prose-code", "prose → code")
            axes.annotate(name, **place, **offset, ha="center", fontsize=10, color=_FADED)


def _mark_refreshes(axes: Axes, n_batches: int) -> None:
    """Mark under the axes where the experts were placed anew."""
    at = np.arange(REFRESH, n_batches, REFRESH) - 0.5
    marks = axes.plot(at, np.full(len(at), -0.035), "^", color=_FADED, markersize=5, clip_on=False)
    marks[0].set_transform(axes.get_xaxis_transform())
    axes.set_xlabel(
        f"▲ experts placed anew, from the {WINDOW} batches before; until the first there is no history (not counted)",
        fontsize=10,
        color=_FADED,
        loc="right",
        labelpad=11,
    )


def _check_writable(path: str | os.PathLike[str]) -> None:
    """Refuse a picture that could not be written, before the work."""
    folder, name = os.path.split(os.path.abspath(path))
    formats = sorted(FigureCanvasBase.get_supported_filetypes())
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"the picture's folder {folder} does not exist")
    if os.path.splitext(name)[1].lstrip(".").lower() not in formats:
        raise ValueError(f"the picture's name is {name!r}, allowed is one that ends in .{', .'.join(formats)}")


def run_demo(
    ranks: Sequence[int] = (8, 32),
    n_batches: int | None = None,
    path: str | os.PathLike[str] = "lplb-demo.png",
    console: Console | None = None,
) -> list[Replay]:
    """Replay the packaged trace, print the table and write the picture.

    Args:
        ranks: numbers of ranks, each 8, 16 or 32; the picture shows the last.
        n_batches: how many batches; by default all 240.
        path: where the picture goes.
        console: where the table goes; by default the standard output.

    Returns:
        The replays, as in ``ranks``.

    Raises:
        ValueError: an argument is not allowed.
        CheckFailed: a planner did not return what it planned.
        OSError: the picture cannot be written.
    """
    _check_writable(path)
    console = console or Console()
    start = time.perf_counter()
    trace = load_trace()
    n_batches = len(trace.domain) if n_batches is None else n_batches
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    replays = []
    with Progress(*columns, console=console, transient=True) as progress:
        tasks = [progress.add_task(f"{n} ranks", total=n_batches, start=False) for n in ranks]
        for n_ranks, task in zip(ranks, tasks, strict=True):
            progress.start_task(task)
            replays.append(replay(trace, n_ranks, n_batches, partial(progress.advance, task)))
    console.print(table(replays))
    console.print(notes())
    runs = sum(micros.size for result in replays for micros in result.micros.values())
    console.print(f"Checked: {runs:,} planner runs, each index of the expert asked for, loads equal to quotas.")
    picture(replays[-1], path)
    console.print(
        f"Picture: {os.path.abspath(path)}  ({time.perf_counter() - start:.0f} s)", soft_wrap=True, markup=False
    )
    return replays
