"""The recorded router trace: the project's real input.

A small Mixture-of-Experts language model, trained without a balancing loss, read code, prose and tables while
its router was recorded. ``benchmarks/record_trace.py`` made the file once; ``lplb/data/README.md`` says how,
and what its loads look like.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["TRACE_SHA256", "RouterTrace", "load_trace"]

TRACE_SHA256 = "74c8e7ac1e3193e130ae2248953755132fbde865d55bc49fa0a63a8c40d537c3"


@dataclass(frozen=True)
class RouterTrace:
    """What a router chose, batch after batch.

    Attributes:
        indices: ``[batches, layers, tokens, top_k]`` uint8, the logical experts of each token, best first,
            none twice. A batch is ``meta["streams"]`` texts, one after the other, each ``tokens / streams``
            tokens long; the same place in the next batch continues the text.
        domain: ``[batches]``, what the batch is made of: one of ``meta["domains"]``, ``"prose-code"`` while
            prose fades into code, or ``"mixed"``.
        n_experts: logical experts per layer; every index is below it.
        meta: how the trace was made: versions, model, training, losses, texts, schedule.
    """

    indices: npt.NDArray[np.uint8]
    domain: list[str]
    n_experts: int
    meta: dict[str, Any]


def load_trace(path: str | os.PathLike[str] | None = None) -> RouterTrace:
    """Loads the router trace that comes with the package, or another one of the same format.

    Args:
        path: a file written by ``benchmarks/record_trace.py``, or ``None`` for the packaged one, whose
            SHA-256 is checked against ``TRACE_SHA256``.

    Returns:
        The trace. Each call reads the file anew, so the arrays are the caller's to change.

    Raises:
        ValueError: the packaged file is not the one that was frozen.
    """
    if path is None:
        raw = (resources.files("lplb") / "data" / "router_trace.npz").read_bytes()
        seen = hashlib.sha256(raw).hexdigest()
        if seen != TRACE_SHA256:
            raise ValueError(f"lplb/data/router_trace.npz has SHA-256 {seen}, expected {TRACE_SHA256}")
    else:
        raw = Path(path).read_bytes()
    with np.load(io.BytesIO(raw), allow_pickle=False) as arrays:
        meta: dict[str, Any] = json.loads(str(arrays["meta"]))
        return RouterTrace(
            indices=arrays["indices"],
            domain=[str(name) for name in arrays["domain"]],
            n_experts=int(meta["model"]["n_experts"]),
            meta=meta,
        )
