"""What the EP examples share: the language model of the router trace with lplb's layers, its text, and processes."""

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from matplotlib.axes import Axes
from torch import Tensor
from torch.nn import functional

from lplb import Planner
from lplb.nn import ExpertParallelMoE, GuestSlots
from lplb.transfers import TransferPlanner

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
from trace_model import DOMAINS, LanguageModel, ModelConfig, Tokenizer, reference_documents, stdlib_documents

N_RANKS = 4
SAMPLE = 30_000  # characters of each domain; to tokenize all of its text takes minutes
INK, FADED, BEFORE, BETWEEN, AFTER = "#24292f", "#6e7781", "#b35900", "#8250df", "#1a7f37"


def start(work: Callable[..., None], *arguments: object) -> None:
    """Run ``work(rank, *arguments)`` on every rank: under torchrun in its processes, else in four of our own."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _process(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), "env://", work, arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_process, (N_RANKS, f"file://{folder}/store", work, arguments), N_RANKS)


def _process(rank: int, size: int, store: str, work: Callable[..., None], arguments: tuple[object, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    work(rank, *arguments)
    dist.barrier()
    dist.destroy_process_group()


def texts(vocabulary: int) -> dict[str, Tensor]:
    """Return a sample of each domain as tokens, the same on every rank."""
    found: list[object] = [None]
    if dist.get_rank() == 0:
        sample = dict.fromkeys(DOMAINS, "")
        for document in (*reference_documents(), *stdlib_documents()):
            if len(sample[document.domain]) < SAMPLE:
                sample[document.domain] += document.text[: SAMPLE // 8] + "\n\n"
            if min(map(len, sample.values())) >= SAMPLE:
                break
        tokenizer = Tokenizer(list(sample.values()), vocabulary, n_words=800)
        found = [{domain: torch.tensor(tokenizer.encode(text)) for domain, text in sample.items()}]
    dist.broadcast_object_list(found)
    return found[0]


class Model(LanguageModel):
    """The trace's language model with `ExpertParallelMoE` in the place of its MoE; one SwiGLU per expert.

    Attention, norms and embeddings are on every rank, each of which reads texts of its own.

    Args:
        config: its sizes.
        planners: one for every layer, or `None` for no balancing.
        transfers: instead of these, planners of transfers, one for every layer.
        guests: with those, where experts stay that come for a batch.
    """

    def __init__(
        self,
        config: ModelConfig,
        planners: list[Planner] | None,
        transfers: list[TransferPlanner] | None = None,
        guests: GuestSlots | None = None,
    ) -> None:
        """Draws the same weights for any planners, given the same seed."""
        left, lent = (iter(given or [None] * config.layers) for given in (planners, transfers))

        def make() -> ExpertParallelMoE:
            return ExpertParallelMoE(
                config.width,
                config.expert_width,
                config.n_experts,
                config.top_k,
                group=dist.group.WORLD,
                balancer=next(left),
                transfers=next(lent),
                guests=guests,
            )

        super().__init__(config, make)
        self.layers = [block.moe for block in self.blocks]
        at_home = {id(p) for layer in self.layers for p in layer.experts.parameters()}
        self.replicated = [p for p in self.parameters() if id(p) not in at_home]

    def loss(self, windows: Tensor, n_tokens: int) -> Tensor:
        """This rank's part of the mean cross-entropy over ``n_tokens`` of all ranks; ``[texts, context + 1]`` int64."""
        logits = self(windows[:, :-1]).flatten(0, 1)
        return functional.cross_entropy(logits, windows[:, 1:].flatten(), reduction="sum") / n_tokens

    def rank_loads(self) -> Tensor:
        """Tokens that every rank's experts got in the last batch, int64 ``[layers, ranks]``. Collective."""
        own = torch.stack([layer.received.sum() for layer in self.layers])
        return gathered(own).T


def gathered(own: Tensor) -> Tensor:
    """Every rank's tensor, ``[ranks, ...]``. Collective."""
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own)
    return torch.stack(parts)


def windows(text: Tensor, n: int, context: int) -> Tensor:
    """Return ``n`` pieces of a text from anywhere, int64 ``[n, context + 1]``."""
    first = torch.randint(len(text) - context, (n,))
    return torch.stack([text[at : at + context + 1] for at in first.tolist()])


def imbalance(loads: Tensor) -> Tensor:
    """Busiest rank over mean, of loads ``[..., ranks]``."""
    return loads.amax(-1) / loads.double().mean(-1)


def mark_domains(axes: Axes, domains: list[str], *, named: bool) -> None:
    """Mark where the domain changes, and name it above the axes."""
    starts = [i for i, domain in enumerate(domains) if i == 0 or domain != domains[i - 1]]
    for first, end in zip(starts, [*starts[1:], len(domains)], strict=True):
        if first:
            axes.axvline(first - 0.5, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        if named:
            axes.annotate(
                domains[first],
                ((first + end - 1) / 2, 1),
                xycoords=axes.get_xaxis_transform(),
                xytext=(0, 4),
                textcoords="offset points",
                ha="center",
                color=FADED,
            )
