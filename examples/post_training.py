"""Post-trains a small MoE language model on one kind of text, plain expert parallelism beside transfers.

    python examples/post_training.py                           starts four processes over gloo
    torchrun --nproc-per-node 4 examples/post_training.py      or lets torchrun start them

A model learns mixed text for a while. Then two copies of it learn tables only, whose tokens want a few experts of one
rank. In one, that rank serves nearly all of them. In the other every batch and layer is planned, and experts travel to
ranks that have room, for that batch; in the backward pass their gradients come home. Losses are the same, rank loads
are not.
"""

import argparse
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from small_moe import DOMAINS, Model, ModelConfig, imbalance, start, texts, windows
from torch import Tensor, nn
from train_ep import Trainer

from lplb.nn import GuestSlots
from lplb.transfers import TransferPlan, TransferPlanner

DOMAIN = "tables"
HOT = 4  # experts that the domain wants, in every layer; all of rank 0
SLOTS = 6  # guests that a rank has room for, shared by all layers


class NotedPlanner(TransferPlanner):
    """A planner that remembers the plan of its layer's last batch."""

    last: TransferPlan

    def plan(self, counts: Tensor, *, held: Tensor | None = None) -> TransferPlan:
        """Plan a batch."""
        self.last = super().plan(counts, held=held)
        return self.last


def prefer(model: Model, text: Tensor, strength: float) -> None:
    """Have every router prefer a few experts for the tokens of a text, by so much more in their score. Collective.

    It stands in for what long training on one domain does to a router that nothing balances, and puts these experts
    together, where plain expert parallelism suffers most.
    """

    def turn(layer: nn.Module, given: tuple[Any, ...]) -> None:
        mean = given[0].mean(0)
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
        layer.router[:HOT] += strength * mean / mean.square().sum()

    hooks = [layer.register_forward_pre_hook(turn) for layer in model.layers]
    with torch.no_grad():
        model(windows(text, 4, model.position.shape[0])[:, :-1])
    for hook in hooks:
        hook.remove()


def table(losses: Tensor, loads: Tensor, transfers: Tensor) -> Table:
    """Losses ``[steps, 2]``, rank loads ``[steps, 2, layers, ranks]``, transfers ``[steps, layers]``."""
    shown = Table(title="Tokens on four ranks in layer 0, and busiest rank / mean over layers")
    for name in (
        "step",
        "loss",
        "transfers:\nother by",
        "tokens:\nplain EP",
        "tokens:\ntransfers",
        "imbalance:\nplain EP",
        "imbalance:\ntransfers",
        "experts\nsent",
    ):
        shown.add_column(name, justify="right", no_wrap=True)
    for step, ((plain, other), sent) in enumerate(zip(losses.tolist(), transfers.tolist(), strict=True)):
        shown.add_row(
            str(step),
            f"{plain:.4f}",
            f"{other - plain:.0e}",
            *(" ".join(f"{load:4d}" for load in loads[step, i, 0].tolist()) for i in range(2)),
            *(f"{float(imbalance(loads[step, i]).mean()):.3f}" for i in range(2)),
            " + ".join(map(str, sent)),
        )
    return shown


def post_train(rank: int, arguments: argparse.Namespace) -> None:
    """What every process does."""
    torch.set_default_dtype(torch.float64)  # so that rounding does not hide what is the same
    config = ModelConfig(layers=arguments.layers, width=64, heads=2, n_experts=32, top_k=2, expert_width=64)
    text, n_ranks = texts(config.vocabulary), dist.get_world_size()
    before = Trainer(config, None, arguments.seed, torch.float64)
    torch.manual_seed(arguments.seed + 1 + rank)  # every rank reads other texts
    for _ in range(arguments.pretrain):
        read = torch.cat([windows(text[domain], arguments.rows, config.context) for domain in DOMAINS])
        before.step(read, n_ranks * len(read) * config.context)
    prefer(before.model, text[DOMAIN], arguments.skew)

    planners = [NotedPlanner(config.n_experts, n_ranks, slots=SLOTS) for _ in range(config.layers)]
    guests = GuestSlots(SLOTS, hidden_size=config.width, ffn_size=config.expert_width)
    trainers = [
        Trainer(config, None, arguments.seed, torch.float64),
        Trainer(config, None, arguments.seed, torch.float64, transfers=planners, guests=guests),
    ]
    for trainer in trainers:
        trainer.model.load_state_dict(before.model.state_dict())
    torch.manual_seed(arguments.seed + 100 + rank)
    losses, loads, transfers = [], [], []
    for _ in range(arguments.steps):
        read = windows(text[DOMAIN], arguments.rows, config.context)
        losses.append([trainer.step(read, n_ranks * len(read) * config.context) for trainer in trainers])
        loads.append(torch.stack([trainer.model.rank_loads() for trainer in trainers]))
        planned = torch.stack([planner.last.rank_load for planner in planners])
        assert torch.equal(loads[-1][1], planned), "the ranks did not get what was planned"
        transfers.append([planner.last.n_transfers for planner in planners])
    if rank == 0:
        report(torch.tensor(losses), torch.stack(loads), torch.tensor(transfers))


def report(losses: Tensor, loads: Tensor, transfers: Tensor) -> None:
    """Print the table."""
    console = Console(width=120)
    console.print(table(losses, loads, transfers))
    apart = float((losses[:, 0] - losses[:, 1]).abs().max())
    slowest = loads.amax(-1).sum((0, 2)).tolist()  # ranks wait for each other in every layer
    console.print(
        f"Losses differ by {apart:.1e} at most. Tokens of the busiest ranks, over all steps and layers: {slowest[0]:,} "
        f"and {slowest[1]:,}, with {float(transfers.double().mean()):.1f} experts sent per layer and step."
    )
    assert apart < 1e-9, "transfers changed what is learnt"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrain", type=int, default=16, help="steps on mixed text (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=12, help="steps on tables (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=2, help="texts per rank and step (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument(
        "--skew", type=float, default=4.0, help="how much more routers prefer four experts (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=1)
    start(post_train, parser.parse_args())
