"""Denoises images with a toy DiT-MoE on four processes, while its experts move to where the loads are.

    python examples/dynamic_dit.py                                starts four processes over gloo
    torchrun --nproc-per-node 4 examples/dynamic_dit.py           or lets torchrun start them

A rank has a band of the image's patches. A region of the image grows and moves as it becomes clear, and its patches
prefer experts that change from one phase of the denoising to the next. The same image is made four times: with experts
placed once, by the loads of another image, and with a `Rebalancer` that watches loads and moves experts meanwhile; each
with one rank per expert for a source, and with the LP, which shares out every batch over all copies. Weights and
patches are whole numbers, so the images have to be equal to the last bit.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lplb import Placement, Planner, place
from lplb.dynamic import Dispatcher, LoadCollector, Rebalancer, Stats

N_RANKS = 4
SPARE = 1  # slots per rank for copies
SIDE = 32  # the image has SIDE x SIDE patches, a quarter of its rows on each rank
WIDTH, HIDDEN, TOP_K = 32, 64, 2
PHASES = ("layout", "shapes", "details")  # thirds of the denoising
MODULUS = 17  # patches are whole numbers from -8 to 8, so that sums are exact in any order
# A phase is over in a second here: so look at few steps, often, and swap soon. The defaults are for longer ones.
PACE = {"interval": 2, "window": 6, "steady": True, "ahead": 4, "poll": 0.002, "layers_at_once": 64}
INK, FADED = "#24292f", "#6e7781"


class Variant(NamedTuple):
    """One way of making the image."""

    name: str
    dynamic: bool
    lp: bool
    color: str


VARIANTS = (
    Variant("static", False, False, "#b35900"),
    Variant("static + LP", False, True, "#8250df"),
    Variant("dynamic", True, False, "#0969da"),
    Variant("dynamic + LP", True, True, "#1a7f37"),
)


# ---- the model


class Experts(nn.Module):
    """An MoE layer, wired for re-placement: `forward` is what a model of your own would have.

    Args:
        up: of all experts, ``[experts, WIDTH, HIDDEN]``; a rank keeps those of its slots.
        down: of all experts, ``[experts, HIDDEN, WIDTH]``.
        placement: where they are at first.
        lp: share tokens out over all copies of an expert, by the LP; or give each expert's to one rank.
    """

    def __init__(self, up: Tensor, down: Tensor, placement: Placement, lp: bool) -> None:
        """Take this rank's slots."""
        super().__init__()
        rank = dist.get_rank()
        mine = placement.phy2log.view(placement.n_ranks, -1)[rank].long()
        self.up, self.down = up[mine].clone(), down[mine].clone()
        self.planner = Planner.from_placement(placement, group=dist.group.WORLD) if lp else None
        self.dispatcher = Dispatcher(placement, [self.up, self.down], rank, planner=self.planner)
        self.collector = LoadCollector(placement.n_logical)
        self.received: list[int] = []
        """Rows that this rank's experts got, pass by pass."""
        self.asked: list[Tensor] = []
        """Choices of this rank's tokens for every expert, int64 ``[experts]``, pass by pass."""

    def forward(self, x: Tensor, expert: Tensor) -> Tensor:
        """Sum what its experts make of every token. Collective.

        Args:
            x: tokens of this rank, ``[tokens, WIDTH]``.
            expert: the router's choice, int64 ``[tokens, TOP_K]``.
        """
        self.collector.collect(expert)
        if self.dispatcher.check_consistency():  # compares an integer; true in the same pass on every rank
            self.dispatcher.update_module_weight_and_map()  # the weights in self.up and self.down are others now
        self.asked.append(torch.bincount(expert.flatten(), minlength=self.dispatcher.n_logical))
        if self.planner is not None:
            rank = self.planner.run(expert, None).flatten() // self.dispatcher.placement.slots_per_rank
        else:
            rank = self.dispatcher.device_indices_map[expert.flatten()]
        return self._sent_and_served(x, expert.flatten(), rank).view(*expert.shape, WIDTH).sum(1)

    def _sent_and_served(self, x: Tensor, expert: Tensor, rank: Tensor) -> Tensor:
        """What comes back for every choice, ``[tokens * TOP_K, WIDTH]``."""
        order = rank.argsort(stable=True)
        send = torch.bincount(rank, minlength=dist.get_world_size())
        receive = torch.empty_like(send)
        dist.all_to_all_single(receive, send)
        splits = receive.tolist(), send.tolist()
        asked = exchanged(expert[order], *splits)
        rows = exchanged(x[order // TOP_K], *splits)
        slot = self.dispatcher.local_expert_indices_map[asked]
        served = torch.empty_like(rows)
        for here in range(len(self.up)):
            its = (slot == here).nonzero().flatten()
            served[its] = (rows[its] @ self.up[here]).relu() @ self.down[here]
        self.received.append(len(rows))
        back = torch.empty(len(order), WIDTH, dtype=x.dtype)
        back[order] = exchanged(served, *splits[::-1])
        return back


def exchanged(rows: Tensor, receive: list[int], send: list[int]) -> Tensor:
    """All-to-all of rows that lie rank by rank."""
    got = rows.new_empty(sum(receive), *rows.shape[1:])
    dist.all_to_all_single(got, rows.contiguous(), receive, send)
    return got


class Denoiser(nn.Module):
    """Layers of experts, and a router that looks at where a patch is and how far the image has come.

    Args:
        arguments: sizes and the seed of weights and preferences.
        placements: one for every layer.
        lp: as for `Experts`.
    """

    def __init__(self, arguments: argparse.Namespace, placements: Sequence[Placement], lp: bool) -> None:
        """Draw the same model on every rank."""
        super().__init__()
        self.steps, n = arguments.steps, arguments.experts
        random = torch.Generator().manual_seed(arguments.seed)
        # What every expert is worth to every phase, and to the patches of the region beyond that.
        shape = arguments.layers, len(PHASES), n
        self.taste = 1.5 * torch.randn(shape, generator=random, dtype=torch.float64)
        self.liking = 6 * (torch.rand(shape, generator=random) < 0.15).double()

        def weights(*shape: int) -> Tensor:
            return torch.randint(-1, 2, shape, generator=random).double()

        self.project = [weights(WIDTH, n) for _ in placements]
        self.layers = nn.ModuleList(
            Experts(weights(n, WIDTH, HIDDEN), weights(n, HIDDEN, WIDTH), placement, lp) for placement in placements
        )

    def forward(self, x: Tensor, step: int, at: Tensor) -> Tensor:
        """One step of the denoising. Collective.

        Args:
            x: this rank's patches, ``[tokens, WIDTH]``, whole numbers from -8 to 8.
            step: from 0.
            at: where the patches are, row and column from 0 to 1, ``[tokens, 2]``.
        """
        done = (step + 0.5) / self.steps
        inside = in_region(at, done)
        mix = phase_mix(done)
        for layer, taste, liking, project in zip(self.layers, self.taste, self.liking, self.project, strict=True):
            chance = ((x @ project) * math.sqrt(2) % 1).clamp(1e-9, 1 - 1e-9)
            score = mix @ taste + torch.where(inside.unsqueeze(1), mix @ liking, 0.0) - (-chance.log()).log()
            x = (x + layer(x, score.topk(TOP_K).indices) + MODULUS // 2) % MODULUS - MODULUS // 2
        return x


def in_region(at: Tensor, done: float) -> Tensor:
    """Which patches are in the region when this part of the denoising is done: a disk that moves and grows."""
    centre = torch.tensor([0.15 + 0.6 * done, 0.25 + 0.3 * done], dtype=at.dtype)
    return (at - centre).norm(dim=1) < 0.12 + 0.3 * done


def phase_mix(done: float) -> Tensor:
    """How much each phase counts, ``[1, phases]``: all of one for a while, then less and less, as the next comes."""
    position = min(max(done * len(PHASES) - 0.5, 0.0), len(PHASES) - 1.0)
    return (1.5 - 2 * (torch.arange(len(PHASES), dtype=torch.float64) - position).abs()).clamp(0, 1).unsqueeze(0)


# ---- the runs


@dataclass(frozen=True)
class Run:
    """One image, made by one variant."""

    loads: Tensor
    """Rows that every rank's experts got, int64 ``[steps, layers, ranks]``."""
    images: Tensor
    """This rank's patches after every step, ``[steps, tokens, WIDTH]``."""
    swaps: list[int]
    """Steps in which some layer's placement became another."""
    stats: Stats | None
    """Of this rank's rebalancer at the end."""


def make_image(model: Denoiser, rebalancer: Rebalancer | None, arguments: argparse.Namespace) -> Run:
    """Denoise the image, and end rebalancing. Collective."""
    x, at = first_noise(arguments.seed)
    images, live = [], [[layer.dispatcher.placement for layer in model.layers]]
    with contextlib.ExitStack() as ending:
        if rebalancer is not None:
            ending.callback(rebalancer.close)
            rebalancer.start()
        for step in range(arguments.steps):
            x = model(x, step, at)
            images.append(x)
            live.append([layer.dispatcher.placement for layer in model.layers])
        stats = None if rebalancer is None else rebalancer.stats()
    received = gathered(torch.tensor([layer.received for layer in model.layers]))
    swaps = [step for step, (before, now) in enumerate(itertools.pairwise(live)) if now != before]
    return Run(received.permute(2, 1, 0), torch.stack(images), swaps, stats)


def first_noise(seed: int) -> tuple[Tensor, Tensor]:
    """Noise of this rank's patches ``[tokens, WIDTH]``, and where they are, row and column ``[tokens, 2]``."""
    rank = dist.get_rank()
    line = torch.arange(SIDE, dtype=torch.float64) / (SIDE - 1)
    at = torch.cartesian_prod(line, line).view(N_RANKS, -1, 2)[rank]
    random = torch.Generator().manual_seed(seed * N_RANKS + rank)
    return torch.randint(-8, 9, (len(at), WIDTH), generator=random).double(), at


def placed_once(arguments: argparse.Namespace) -> list[Placement]:
    """What EPLB makes of the mean loads of another image, for each layer. Collective."""
    in_order = Placement(list(range(arguments.experts)), N_RANKS)
    model = Denoiser(arguments, [in_order] * arguments.layers, lp=False)
    x, at = first_noise(arguments.seed + 1)
    for step in range(arguments.steps):
        x = model(x, step, at)
    loads = torch.stack([sum(layer.asked) for layer in model.layers])
    dist.all_reduce(loads)
    return place(loads[:, None], n_ranks=N_RANKS, n_physical=arguments.experts + N_RANKS * SPARE, policy="eplb")


def gathered(own: Tensor) -> Tensor:
    """Every rank's tensor, ``[ranks, ...]``. Collective."""
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own.contiguous())
    return torch.stack(parts)


def work(rank: int, arguments: argparse.Namespace) -> None:
    """What every process does."""
    placements = placed_once(arguments)
    models = [Denoiser(arguments, placements, variant.lp) for variant in VARIANTS]
    rebalancers = [
        Rebalancer(model, dist.group.WORLD, **PACE, start=False) if variant.dynamic else None
        for model, variant in zip(models, VARIANTS, strict=True)
    ]
    runs = [make_image(*made, arguments) for made in zip(models, rebalancers, strict=True)]
    equal = gathered(torch.tensor([torch.equal(run.images, runs[0].images) for run in runs])).all(0).tolist()
    own = [[s.bytes_moved, s.bytes_lower_bound, s.stalls] if s else [0] * 3 for s in (run.stats for run in runs)]
    did = gathered(torch.tensor(own)).sum(0).tolist()
    if rank == 0:
        console = Console(width=110)
        console.print(balance_table(runs))
        console.print(work_table(runs, did, equal))
        picture(runs, arguments.picture)
        console.print(f"Picture: {arguments.picture.resolve()}", soft_wrap=True, markup=False)
    if not all(equal):
        raise SystemExit("re-placement changed the image")


# ---- what is shown


def imbalance(loads: Tensor) -> Tensor:
    """Busiest rank over mean, of loads ``[..., ranks]``."""
    return loads.amax(-1) / loads.double().mean(-1)


def phases_of(steps: int) -> dict[str, slice]:
    """The steps in which each phase counts most."""
    ends = [round(steps * i / len(PHASES)) for i in range(len(PHASES) + 1)]
    return {name: slice(*ends[i : i + 2]) for i, name in enumerate(PHASES)}


def balance_table(runs: list[Run]) -> Table:
    """A row for each phase."""
    shown = Table(title="Imbalance (busiest rank / mean), mean over steps and layers")
    for name in ("phase", "steps", *(variant.name for variant in VARIANTS)):
        shown.add_column(name, justify="left" if name == "phase" else "right", no_wrap=True)
    ratios = [imbalance(run.loads).mean(1) for run in runs]
    for name, part in {**phases_of(len(ratios[0])), "all": slice(0, len(ratios[0]))}.items():
        means = (f"{float(ratio[part].mean()):.3f}" for ratio in ratios)
        shown.add_row(name, f"{part.start} to {part.stop - 1}", *means, end_section=name == PHASES[-1])
    return shown


def work_table(runs: list[Run], did: list[list[int]], equal: list[bool]) -> Table:
    """What the rebalancers did on all ranks, and whether the images are those of the first run."""
    shown = Table(title="What was done meanwhile, on all ranks")
    for name in ("", "cycles", "layers swapped", "moved", "at least", "stalls", "image"):
        shown.add_column(name, justify="right" if name else "left", no_wrap=True)
    for variant, run, (moved, bound, stalls), same in zip(VARIANTS, runs, did, equal, strict=True):
        done = ["-"] * 5
        if run.stats is not None:
            bytes_ = f"{moved / 1024:,.0f} KiB", f"{bound / 1024:,.0f} KiB"
            done = [str(run.stats.cycles), str(run.stats.swaps), *bytes_, str(stalls)]
        shown.add_row(variant.name, *done, "the same" if same else "ANOTHER")
    return shown


def picture(runs: list[Run], path: Path) -> None:
    """The imbalance of every variant, step by step, and when placements were swapped."""
    figure = Figure(figsize=(9, 4.6), dpi=140, layout="constrained")
    axes = figure.subplots()
    for variant, run in zip(VARIANTS, runs, strict=True):
        ratio = imbalance(run.loads).mean(1)
        label = f"{variant.name}: {float(ratio.mean()):.3f}"
        axes.plot(ratio, color=variant.color, linewidth=2 if variant.dynamic and variant.lp else 1.3, label=label)
        if variant.dynamic:
            height = [0.045 if variant.lp else 0.015] * len(run.swaps)
            marks = axes.plot(run.swaps, height, "^", color=variant.color, markersize=5)
            marks[0].set_transform(axes.get_xaxis_transform())
    for name, part in phases_of(len(runs[0].loads)).items():
        if part.start:
            axes.axvline(part.start - 0.5, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        middle = (part.start + part.stop - 1) / 2
        axes.annotate(
            name,
            (middle, 1),
            xycoords=axes.get_xaxis_transform(),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            color=FADED,
        )
    axes.set_xlabel("denoising step     (▲: placements swapped)", color=INK)
    axes.set_ylabel("busiest rank / mean, over layers", color=INK)
    axes.set_ylim(bottom=1 - 0.1 * (axes.get_ylim()[1] - 1))  # room for the marks
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    figure.savefig(path)


# ---- processes


def process(rank: int, store: str, size: int, arguments: argparse.Namespace) -> None:
    """One rank, from the first to the last."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    try:
        work(rank, arguments)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def parsed(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line, or say what is wrong with it before any process is started."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=144, help="of the denoising (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=2, help="MoE layers (default: %(default)s)")
    parser.add_argument("--experts", type=int, default=32, help="in every layer (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of weights, preferences and noise (default: %(default)s)")
    parser.add_argument("--picture", type=Path, default=Path("dynamic-dit.png"), help="(default: ./%(default)s)")
    arguments = parser.parse_args(given)
    if arguments.steps < len(PHASES):
        parser.error(f"--steps is {arguments.steps}, allowed is {len(PHASES)} or more, one for each phase")
    if arguments.layers < 1:
        parser.error(f"--layers is {arguments.layers}, allowed is 1 or more")
    if arguments.experts < 2 * N_RANKS or arguments.experts % N_RANKS:
        parser.error(f"--experts is {arguments.experts}, allowed is a multiple of {N_RANKS}, {2 * N_RANKS} or more")
    if arguments.seed < 0:
        parser.error(f"--seed is {arguments.seed}, allowed is 0 or more")
    formats = sorted(FigureCanvasBase.get_supported_filetypes())
    if arguments.picture.suffix.lstrip(".").lower() not in formats:
        parser.error(f"--picture is {arguments.picture}, allowed is a name that ends in .{', .'.join(formats)}")
    if not arguments.picture.resolve().parent.is_dir():
        parser.error(f"--picture is {arguments.picture}, whose folder does not exist")
    return arguments


def main() -> None:
    """Run under torchrun in its processes, else in four of our own."""
    arguments = parsed()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        size = int(os.environ["WORLD_SIZE"])
        if size != N_RANKS:
            sys.exit(f"torchrun started {size} processes, allowed are {N_RANKS}")
        process(int(os.environ["RANK"]), "env://", size, arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(process, (f"file://{folder}/store", N_RANKS, arguments), N_RANKS)


if __name__ == "__main__":
    main()
