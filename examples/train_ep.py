"""Trains a small MoE language model on four processes, balanced beside unbalanced.

    python examples/train_ep.py                                starts four processes over gloo
    torchrun --nproc-per-node 4 examples/train_ep.py           or lets torchrun start them

Two models with the same weights learn the same text, whose domain changes. One has every expert once. The other has
copies of half of them on LPLB's torus, plans every batch and layer, and keeps the copies like their originals. Their
losses are the same, their rank loads are not.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from small_moe import AFTER, BEFORE, DOMAINS, INK, Model, ModelConfig, imbalance, mark_domains, start, texts, windows
from torch import Tensor

from lplb import Planner, topology
from lplb.weights import ReplicaSync

COPIES = 8  # per rank, of 16 experts of its own


class Trainer:
    """A model, its optimizer, and the copies of its experts."""

    def __init__(
        self, config: ModelConfig, planners: list[Planner] | None, seed: int, dtype: torch.dtype, **transfers: Any
    ) -> None:
        """Draws the model from the seed; ``transfers`` are as for `Model`."""
        torch.manual_seed(seed)
        self.model = Model(config, planners, **transfers).to(dtype)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.01)
        self.copies = [
            ReplicaSync(layer.placement, layer.expert_fields, dist.group.WORLD, home=layer.home)
            for layer in self.model.layers
            if layer.balancer is not None
        ]

    def step(self, texts: Tensor, n_tokens: int) -> float:
        """Learn from this rank's texts; return the mean loss over the ``n_tokens`` of all ranks. Collective."""
        self.optimizer.zero_grad()
        loss = self.model.loss(texts, n_tokens)
        loss.backward()
        # Every rank has attention and router, for its own texts: their gradients are summed over ranks. The experts
        # had the tokens of all ranks.
        replicated = self.model.replicated
        flat = torch.cat([*(p.grad.flatten() for p in replicated), loss.detach().view(1)])
        dist.all_reduce(flat)
        for p, grad in zip(replicated, flat[:-1].split([p.numel() for p in replicated]), strict=True):
            p.grad.copy_(grad.view_as(p))
        for copies in self.copies:
            copies.reduce_gradients()
        self.optimizer.step()
        for copies in self.copies:
            copies.broadcast()
        return float(flat[-1])


def table(domains: list[str], losses: Tensor, loads: Tensor) -> Table:
    """Losses ``[steps, 2]`` and imbalance of loads ``[steps, 2, layers, ranks]``, for a dozen steps."""
    shown = Table(title="Tokens on four ranks in layer 0, and imbalance over layers")
    for name in ("step", "text", "loss", "balanced:\nother by", "unbalanced", "balanced", "imbalance", "balanced"):
        shown.add_column(name, justify="left" if name == "text" else "right", no_wrap=True)
    for step in range(0, len(domains), max(1, len(domains) // 12)):
        (plain, balanced), ratio = losses[step].tolist(), imbalance(loads[step]).mean(-1).tolist()
        shown.add_row(
            str(step),
            domains[step],
            f"{plain:.4f}",
            f"{balanced - plain:.0e}",
            *(" ".join(f"{load:4d}" for load in loads[step, i, 0].tolist()) for i in range(2)),
            *(f"{value:.3f}" for value in ratio),
        )
    return shown


def picture(domains: list[str], losses: Tensor, loads: Tensor, path: Path) -> None:
    """Losses over each other, and the imbalance of both, step by step."""
    figure = Figure(figsize=(9, 6), dpi=140, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    for i, (name, color, width) in enumerate((("unbalanced", BEFORE, 5), ("balanced", AFTER, 1.5))):
        above.plot(losses[:, i], color=color, linewidth=width, alpha=0.5 if i == 0 else 1, label=name)
        ratio = imbalance(loads[:, i])
        below.plot(ratio.mean(1), color=color, label=f"{name}: {float(ratio.mean()):.3f}")
        below.fill_between(range(len(ratio)), ratio.amin(1), ratio.amax(1), color=color, alpha=0.15, linewidth=0)
    above.set_ylabel("loss (nats per token)", color=INK)
    below.set_ylabel("busiest rank / mean, over layers", color=INK)
    below.set_xlabel("step", color=INK)
    for axes in (above, below):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        mark_domains(axes, domains, named=axes is above)
    figure.savefig(path)


def train(rank: int, arguments: argparse.Namespace) -> None:
    """What every process does."""
    config = ModelConfig(layers=arguments.layers)
    group = dist.group.WORLD
    planners = [
        Planner(topology.torus(2, 2), config.n_experts + group.size() * COPIES, config.n_experts, group=group)
        for _ in range(config.layers)
    ]
    # float64, so that rounding does not hide what is the same
    trainers = [Trainer(config, chosen, arguments.seed, torch.float64) for chosen in (None, planners)]
    text = texts(config.vocabulary)
    domains = [DOMAINS[step * len(DOMAINS) // arguments.steps] for step in range(arguments.steps)]
    torch.manual_seed(arguments.seed + 1 + rank)  # every rank reads other texts
    losses, loads = [], []
    for domain in domains:
        read = windows(text[domain], arguments.rows, config.context)
        n_tokens = group.size() * arguments.rows * config.context
        losses.append([trainer.step(read, n_tokens) for trainer in trainers])
        loads.append(torch.stack([trainer.model.rank_loads() for trainer in trainers]))
        planned = torch.stack([planner.last_plan.rank_load for planner in planners])
        assert torch.equal(loads[-1][1], planned), "the ranks did not get what was planned"
    if rank == 0:
        report(domains, torch.tensor(losses, dtype=torch.float64), torch.stack(loads), arguments.picture)


def report(domains: list[str], losses: Tensor, loads: Tensor, path: Path) -> None:
    """Print the table, write the picture."""
    console = Console(width=110)
    console.print(table(domains, losses, loads))
    apart = float((losses[:, 0] - losses[:, 1]).abs().max())
    before, after = (float(imbalance(loads[:, i]).mean()) for i in range(2))
    slowest = loads.amax(-1).sum((0, 2)).tolist()  # ranks wait for each other in every layer
    console.print(f"Losses differ by {apart:.1e} at most. Imbalance: {before:.3f} unbalanced, {after:.3f} balanced.")
    console.print(
        f"Tokens that the busiest ranks served, over all steps and layers: {slowest[0]:,} and {slowest[1]:,}."
    )
    picture(domains, losses, loads, path)
    console.print(f"Picture: {path.resolve()}", soft_wrap=True, markup=False)
    assert apart < 1e-9, "balancing changed what is learnt"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30, help="a third of them for each domain (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=2, help="texts per rank and step (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=2, help="the trace's model has 4 (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--picture", type=Path, default=Path("train-ep.png"), help="(default: ./%(default)s)")
    start(train, parser.parse_args())
