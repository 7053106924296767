"""Serves batches of changing text on four processes; experts are placed anew in between.

    python examples/serve_ep.py                                starts four processes over gloo
    torchrun --nproc-per-node 4 examples/serve_ep.py           or lets torchrun start them

A small MoE language model, trained for a moment so that its routers have preferences, reads batches of code, prose and
tables. Every few batches its experts, and copies of the hottest, are placed by the loads seen last, and the weights
move there; in every batch lplb plans who serves what. The table compares with the same batches without balancing, and
with the same copies and even splits.
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from small_moe import (
    AFTER,
    BEFORE,
    BETWEEN,
    DOMAINS,
    FADED,
    INK,
    Model,
    ModelConfig,
    gathered,
    imbalance,
    mark_domains,
    start,
    texts,
    windows,
)
from torch import Tensor
from train_ep import Trainer

from lplb import Planner, place
from lplb.placement import split_evenly

SPARE = 4  # slots per rank for copies, beside 16 for experts
METHODS = {"no balancing": BEFORE, "EPLB, even splits": BETWEEN, "EPLB and lplb": AFTER}


def loads_of(model: Model) -> tuple[Tensor, Tensor]:
    """The last batch: rank loads by method ``[layers, 3, ranks]``, tokens per expert ``[layers, experts]``. Collective.

    Every rank sees what every slot got. What the other methods would have done with it follows.
    """
    by_method, by_expert = [], []
    for layer in model.layers:
        slots = gathered(layer.received.sum(0)).flatten()
        experts = torch.zeros(layer.n_experts, dtype=torch.int64).index_add_(0, layer.placement.phy2log.long(), slots)
        even = torch.from_numpy(split_evenly(layer.placement, experts.numpy()))
        n_ranks = dist.get_world_size()
        by_method.append(torch.stack([tokens.view(n_ranks, -1).sum(1) for tokens in (experts, even, slots)]))
        by_expert.append(experts)
    return torch.stack(by_method), torch.stack(by_expert)


def place_anew(model: Model, history: Tensor) -> int:
    """Place every layer's experts by loads ``[layers, experts]``; return the bytes that came here. Collective."""
    n_ranks, received = dist.get_world_size(), 0
    for layer, loads in zip(model.layers, history, strict=True):
        placement = place(loads, n_ranks=n_ranks, n_physical=layer.n_experts + n_ranks * SPARE)
        received += layer.follow(Planner.from_placement(placement, group=dist.group.WORLD)).bytes_received
    return received


@torch.inference_mode()
def serve_batches(
    model: Model, plain: Model, text: dict[str, Tensor], arguments: argparse.Namespace
) -> tuple[list[str], Tensor, list[int], float]:
    """Serve all batches.

    Returns:
        The domain of every batch; loads ``[batches, layers, methods, ranks]``; bytes that moved before each batch, on
        all ranks; and by how much the logits differ from those of the model without balancing, at most.
    """
    domains = [DOMAINS[batch * len(DOMAINS) // arguments.batches] for batch in range(arguments.batches)]
    loads, history, moved, apart = [], [], [], 0.0
    for batch, domain in enumerate(domains):
        moved.append(0)
        if batch and batch % arguments.refresh == 0:
            moved[-1] = int(gathered(torch.tensor(place_anew(model, sum(history[-arguments.refresh :])))).sum())
        read = windows(text[domain], arguments.rows, model.position.shape[0])[:, :-1]
        logits = model(read)
        by_method, by_expert = loads_of(model)
        loads.append(by_method)
        history.append(by_expert)
        apart = max(apart, float((logits - plain(read)).abs().max()))
    return domains, torch.stack(loads), moved, float(gathered(torch.tensor(apart)).max())


def table(domains: list[str], loads: Tensor, moved: list[int], refresh: int) -> Table:
    """A row for the batches between two placements."""
    shown = Table(title="Imbalance (busiest rank / mean), mean over batches and layers")
    for name in ("batches", "text", "moved before", *METHODS):
        shown.add_column(name, justify="left" if name == "text" else "right", no_wrap=True)
    ratio = imbalance(loads).mean(1)
    for first in range(0, len(domains), refresh):
        part = slice(first, min(first + refresh, len(domains)))
        shown.add_row(
            f"{part.start} to {part.stop - 1}",
            " → ".join(dict.fromkeys(domains[part])),
            f"{moved[first] / 2**20:.1f} MiB" if first else "not placed",
            *(f"{value:.3f}" for value in ratio[part].mean(0).tolist()),
        )
    return shown


def picture(domains: list[str], loads: Tensor, refresh: int, path: Path) -> None:
    """The imbalance of every method, batch by batch."""
    figure = Figure(figsize=(9, 4.2), dpi=140, layout="constrained")
    axes = figure.subplots()
    ratio = imbalance(loads).mean(1)
    for i, (name, color) in enumerate(METHODS.items()):
        label = f"{name}: {float(ratio[refresh:, i].mean()):.3f}"
        axes.plot(ratio[:, i], color=color, linewidth=2 if color == AFTER else 1.3, label=label)
    at = torch.arange(refresh, len(domains), refresh) - 0.5
    axes.plot(at, torch.ones(len(at)), "^", color=FADED, label="experts placed anew", clip_on=False)
    mark_domains(axes, domains, named=True)
    axes.set_xlabel("batch", color=INK)
    axes.set_ylabel("busiest rank / mean", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    figure.savefig(path)


def serve(rank: int, arguments: argparse.Namespace) -> None:
    """What every process does."""
    config = ModelConfig(layers=arguments.layers)
    text = texts(config.vocabulary)
    # float64, so that no rounding turns a router's close decision
    trainer = Trainer(config, None, arguments.seed, torch.float64)
    torch.manual_seed(arguments.seed + 1 + rank)  # every rank reads other texts
    for _ in range(arguments.train):
        read = torch.cat([windows(text[domain], 1, config.context) for domain in DOMAINS])
        trainer.step(read, dist.get_world_size() * len(DOMAINS) * config.context)
    plain, model = trainer.model, Model(config, None).double()
    model.load_state_dict(plain.state_dict())
    domains, loads, moved, apart = serve_batches(model, plain, text, arguments)
    if rank == 0:
        console = Console(width=110)
        console.print(table(domains, loads, moved, arguments.refresh))
        console.print(f"Logits differ from those of the model without balancing by {apart:.1e} at most.")
        picture(domains, loads, arguments.refresh, arguments.picture)
        console.print(f"Picture: {arguments.picture.resolve()}", soft_wrap=True, markup=False)
    assert apart < 1e-9, "balancing changed what is served"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--batches", type=int, default=48, help="a third of them for each domain (default: %(default)s)"
    )
    parser.add_argument("--refresh", type=int, default=8, help="batches between placements (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=2, help="texts per rank and batch (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=2, help="the trace's model has 4 (default: %(default)s)")
    parser.add_argument("--train", type=int, default=24, help="training steps before (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--picture", type=Path, default=Path("serve-ep.png"), help="(default: ./%(default)s)")
    start(serve, parser.parse_args())
