"""Trains a small Mixture-of-Experts language model on the CPU and records what its router chooses.

Model and text are those of ``trace_model.py``. The model has no balancing loss, so its loads stay uneven; the recorded
stream shifts from domain to domain, so they drift. The output holds expert indices and no text.

    python benchmarks/record_trace.py               trains and records, prints loads and checksum
    python benchmarks/record_trace.py --describe    prints the loads of the trace that is there

The packaged ``lplb/data/router_trace.npz`` is frozen: it is replaced only with ``--force``, together with its
checksum in ``lplb/trace.py``, and never to make a figure look better.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import random
import re
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn
from trace_model import (
    DOMAINS,
    Document,
    LanguageModel,
    ModelConfig,
    Tokenizer,
    reference_documents,
    stdlib_documents,
)

FROZEN = Path(__file__).resolve().parent.parent / "lplb" / "data" / "router_trace.npz"
MAX_BYTES = 4_000_000

STREAMS = 8  # texts side by side in a recorded batch
REQUEST = 2048  # tokens of one document that a stream reads before it takes another

# The recorded stream: (label, batches). "a-b" fades, stream by stream, from a to b.
SCHEDULE = (
    ("code", 45),
    ("prose", 45),
    ("tables", 20),
    ("prose", 20),
    ("prose-code", 40),
    ("mixed", 45),
    ("code", 25),
)

console = Console(width=160)


# Training and recording ---------------------------------------------------------------------------


def progress_bar() -> Progress:
    """A bar with a note (step, loss) and the time since the start."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        console=console,
    )


def train(
    model: LanguageModel, texts: dict[str, Tensor], context: int, rows: int, steps: int | None, minutes: float
) -> list[float]:
    """Trains until ``steps`` are done or, without ``steps``, until ``minutes`` have passed.

    Returns the loss of every step, in nats per token.
    """
    peak_rate = 2e-3
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_rate, betas=(0.9, 0.95), weight_decay=0.01)
    losses: list[float] = []
    start = time.monotonic()
    with progress_bar() as progress:
        task = progress.add_task("training", total=1.0, note="")
        done = 0.0
        while done < 1.0:
            rate = peak_rate * min(1.0, (len(losses) + 1) / 50) * min(1.0, 0.05 + (1.0 - done) / 0.3)
            for group in optimizer.param_groups:
                group["lr"] = rate
            windows = []
            for row in range(rows):
                text = texts[DOMAINS[row % len(DOMAINS)]]
                at = int(torch.randint(len(text) - context - 1, ()))
                windows.append(text[at : at + context + 1])
            loss = model.loss(torch.stack(windows))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
            done = len(losses) / steps if steps else (time.monotonic() - start) / (60 * minutes)
            progress.update(task, completed=done, note=f"step {len(losses):5d}  loss {losses[-1]:.3f}")
    return losses


class Reader:
    """The held-out documents of one domain, cut into requests and shuffled.

    Hands them out one by one, and again from the start when they are used up.
    """

    def __init__(self, documents: list[list[int]], shuffle: random.Random) -> None:
        """Cuts ``documents``, lists of token ids, into pieces of ``REQUEST`` tokens."""
        self.requests = [text[at : at + REQUEST] for text in documents for at in range(0, len(text), REQUEST)]
        shuffle.shuffle(self.requests)
        self.tokens = sum(map(len, self.requests))
        self.taken = 0

    def next(self) -> list[int]:
        """Token ids of the next request."""
        self.taken += 1
        return self.requests[(self.taken - 1) % len(self.requests)]


def scheduled_domains(label: str, batch: int, batches: int, current: list[str], draw: random.Random) -> list[str]:
    """The domain that each stream reads in batch ``batch`` of ``batches`` of one phase of the schedule."""
    if label == "mixed":
        return [draw.choice(DOMAINS) if draw.random() < 1 / 8 else domain for domain in current]
    if "-" in label:
        source, target = label.split("-")
        moved = round(STREAMS * (batch + 1) / (batches + 1))
        return [target if stream < moved else source for stream in range(STREAMS)]
    return [label] * STREAMS


@torch.no_grad()
def record(
    model: LanguageModel, held_out: dict[str, list[list[int]]], config: ModelConfig, seed: int
) -> tuple[np.ndarray, list[str], dict[str, float]]:
    """Runs the schedule over held-out text.

    Returns:
        The indices ``[batches, layers, tokens, top_k]`` uint8, the label of every batch, and the mean
        loss per label.
    """
    model.eval()
    draw = random.Random(seed)
    readers = {domain: Reader(held_out[domain], draw) for domain in DOMAINS}
    domains = [SCHEDULE[0][0]] * STREAMS
    unread: list[list[int]] = [[] for _ in range(STREAMS)]
    indices, labels, losses = [], [], []
    with progress_bar() as progress:
        task = progress.add_task("recording", total=sum(batches for _, batches in SCHEDULE), note="")
        for label, batches in SCHEDULE:
            for batch in range(batches):
                wanted = scheduled_domains(label, batch, batches, domains, draw)
                for stream in range(STREAMS):
                    if wanted[stream] != domains[stream]:
                        unread[stream] = []
                    while len(unread[stream]) <= config.context:
                        unread[stream] = unread[stream] + readers[wanted[stream]].next()
                domains = wanted
                losses.append(model.loss(torch.tensor([text[: config.context + 1] for text in unread])).item())
                indices.append(torch.stack([block.moe.indices for block in model.blocks]).to(torch.uint8).numpy())
                labels.append(label)
                unread = [text[config.context :] for text in unread]
                progress.update(task, advance=1, note=f"{label:>10}  loss {losses[-1]:.3f}")
    for domain, reader in readers.items():
        console.print(f"{domain}: read {reader.taken} of {len(reader.requests)} requests ({reader.tokens} tokens)")
    by_label = {
        name: float(np.mean([x for x, y in zip(losses, labels, strict=True) if y == name])) for name in set(labels)
    }
    return np.stack(indices), labels, {name: round(by_label[name], 4) for name in sorted(by_label)}


# What the loads look like -------------------------------------------------------------------------


def expert_loads(indices: np.ndarray, n_experts: int) -> np.ndarray:
    """``[batches, layers, tokens, top_k]`` to tokens per expert, ``[batches, layers, n_experts]`` float64."""
    batches, layers = indices.shape[:2]
    rows = np.arange(batches * layers).reshape(batches, layers, 1, 1) * n_experts
    counts = np.bincount((indices + rows).ravel(), minlength=batches * layers * n_experts)
    return counts.reshape(batches, layers, n_experts).astype(np.float64)


def correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pearson correlation over the last axis."""
    a, b = a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True)
    return (a * b).sum(-1) / np.sqrt((a**2).sum(-1) * (b**2).sum(-1))


def describe(path: Path) -> None:
    """Prints the tables of ``lplb/data/README.md`` for the trace at ``path``."""
    raw = path.read_bytes()
    with np.load(path, allow_pickle=False) as arrays:
        indices, labels, meta = arrays["indices"], arrays["domain"], json.loads(str(arrays["meta"]))
    n_experts = meta["model"]["n_experts"]
    loads = expert_loads(indices, n_experts)
    skew = loads.max(-1) / loads.mean(-1)
    names = list(dict.fromkeys(labels.tolist()))

    table = Table(box=box.MARKDOWN)
    for title in (
        "batches",
        "number",
        "max / mean expert load",
        "5th to 95th percentile",
        "max / mean of 8 ranks",
        "of 32 ranks",
        "idle experts",
    ):
        table.add_column(title, justify="left" if title == "batches" else "right")
    for name in [*names, "all"]:
        chosen = np.full(len(labels), True) if name == "all" else labels == name
        low, high = np.percentile(skew[chosen], [5, 95])
        ranks = [loads[chosen].reshape(chosen.sum(), -1, n, n_experts // n).sum(-1) for n in (8, 32)]
        table.add_row(
            name,
            str(chosen.sum()),
            f"{skew[chosen].mean():.2f}",
            f"{low:.2f} to {high:.2f}",
            *(f"{(x.max(-1) / x.mean(-1)).mean():.2f}" for x in ranks),
            f"{(loads[chosen] == 0).sum(-1).mean():.1f}",
        )
    console.print(table)

    table = Table(box=box.MARKDOWN)
    for title in ("layer", "max / mean expert load", "busiest expert's share over the trace", "never used"):
        table.add_column(title, justify="right")
    totals = loads.sum(0)
    for layer in range(loads.shape[1]):
        share = totals[layer].max() / totals[layer].sum() * indices.shape[-1]
        table.add_row(
            str(layer),
            f"{skew[:, layer].mean():.2f}",
            f"{share:.1%} of tokens",
            str((totals[layer] == 0).sum()),
        )
    console.print(table)

    table = Table("correlation of expert loads", "mean", "lowest", box=box.MARKDOWN)
    steady = labels[1:] == labels[:-1]
    following = correlation(loads[1:], loads[:-1])
    table.add_row("successive batches, same label", f"{following[steady].mean():.2f}", f"{following[steady].min():.2f}")
    table.add_row(
        "successive batches, label changes",
        f"{following[~steady].mean():.2f}",
        f"{following[~steady].min():.2f}",
    )
    means = {name: loads[labels == name].mean(0) for name in DOMAINS}
    for a, b in (("code", "prose"), ("code", "tables"), ("prose", "tables")):
        across = correlation(means[a], means[b])
        table.add_row(f"mean load, {a} and {b}", f"{across.mean():.2f}", f"{across.min():.2f}")
    console.print(table)
    console.print(f"indices {list(indices.shape)} {indices.dtype}, {len(raw)} bytes")
    console.print(f"SHA-256 {hashlib.sha256(raw).hexdigest()}")


# Program ------------------------------------------------------------------------------------------


def text_summary(documents: list[Document], encoded: list[list[int]]) -> dict[str, dict[str, object]]:
    """Documents and tokens per domain, and the areas of the standard library that they come from."""
    summary: dict[str, dict[str, object]] = {}
    for domain in DOMAINS:
        pairs = [(d, len(tokens)) for d, tokens in zip(documents, encoded, strict=True) if d.domain == domain]
        areas: Counter[str] = Counter()
        for document, tokens in pairs:
            area = re.split("[/:]", document.name)[0]
            areas["single modules" if area.endswith(".py") else area] += tokens
        summary[domain] = {
            "documents": len(pairs),
            "training_tokens": sum(tokens for d, tokens in pairs if not d.held_out),
            "held_out_tokens": sum(tokens for d, tokens in pairs if d.held_out),
            "tokens_by_area": dict(areas.most_common()),
        }
    return summary


def main() -> None:
    """Trains, records, writes; or only describes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, default=500, help="training steps (default: %(default)s)")
    length.add_argument(
        "--minutes", type=float, help="train for this long instead; then the result depends on the machine"
    )
    parser.add_argument("--rows", type=int, default=36, help="texts per training step (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=20261122)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--date", default=time.strftime("%Y-%m-%d"), help="written into the file (default: today)")
    parser.add_argument("--out", type=Path, default=FROZEN)
    parser.add_argument("--force", action="store_true", help="replace the frozen trace")
    parser.add_argument(
        "--describe", action="store_true", help="print the loads of the trace at --out and do nothing else"
    )
    args = parser.parse_args()
    if args.describe:
        describe(args.out)
        return
    if args.out.resolve() == FROZEN and FROZEN.exists() and not args.force:
        parser.error(f"{FROZEN.name} is frozen; write elsewhere with --out, or replace it with --force")

    torch.manual_seed(args.seed)
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(args.threads)
    config = ModelConfig()

    documents = [d for d in (*stdlib_documents(), *reference_documents()) if d.text.strip()]
    tokenizer = Tokenizer([d.text for d in documents if not d.held_out], config.vocabulary)
    encoded = [tokenizer.encode(d.text + "\n\n") for d in documents]
    texts: dict[str, list[int]] = {domain: [] for domain in DOMAINS}
    held_out: dict[str, list[list[int]]] = {domain: [] for domain in DOMAINS}
    for document, tokens in zip(documents, encoded, strict=True):
        if document.held_out:
            held_out[document.domain].append(tokens)
        else:
            texts[document.domain] += tokens

    model = LanguageModel(config)
    parameters = sum(p.numel() for p in model.parameters())
    console.print(f"{parameters} parameters; training tokens { ({name: len(text) for name, text in texts.items()}) }")
    start = time.monotonic()
    losses = train(
        model,
        {name: torch.tensor(text) for name, text in texts.items()},
        config.context,
        args.rows,
        None if args.minutes else args.steps,
        args.minutes or 0.0,
    )
    seconds = time.monotonic() - start
    final = float(np.mean(losses[-20:]))
    console.print(f"loss {losses[0]:.3f} to {final:.3f} nats per token in {len(losses)} steps, {seconds:.0f} s")
    indices, labels, held_out_loss = record(model, held_out, config, args.seed)

    meta = {
        "made_by": "benchmarks/record_trace.py",
        "date": args.date,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "seed": args.seed,
        "threads": args.threads,
        "model": {**asdict(config), "parameters": parameters, "balancing_loss": None},
        "training": {
            "optimizer": "AdamW",
            "steps": len(losses),
            "tokens_per_step": args.rows * config.context,
            "first_loss": round(losses[0], 4),
            "final_loss": round(final, 4),
            "loss_unit": "nats per token; the final loss is the mean of the last 20 steps",
        },
        "held_out_loss": held_out_loss,
        "domains": list(DOMAINS),
        "schedule": [list(phase) for phase in SCHEDULE],
        "streams": STREAMS,
        "text": text_summary(documents, encoded),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(args.out, indices=indices, domain=np.array(labels), meta=np.array(json.dumps(meta)))
    describe(args.out)
    if args.out.stat().st_size > MAX_BYTES:
        console.print(f"{args.out.name} has {args.out.stat().st_size} bytes, more than the {MAX_BYTES} allowed")


if __name__ == "__main__":
    main()
