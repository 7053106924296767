"""What benchmarks print and write: rows with a bar each, under the machine's name."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import lplb
from lplb import _C

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Row:
    """One line of the table; `peer` and `value` are in `unit` unless the name says otherwise."""

    name: str
    value: float
    unit: str
    bar: float | None = None
    bar_is: str = ""  # "<=" or ">="
    peer: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the bar is met; None without one."""
        if self.bar is None:
            return None
        return bool(self.value >= self.bar if self.bar_is == ">=" else self.value <= self.bar)


def machine() -> dict[str, str]:
    """The machine and the software, without names that belong to somebody."""
    import highspy  # here: bench_cuda.py does without

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {
        "cpu": model,
        "cores": str(os.cpu_count()),
        "threads used": "1",
        "instruction set": _C.instruction_set,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "highs": highspy.Highs().version(),
        "lplb": lplb.__version__,
        "load average at the start": ", ".join(f"{x:.1f}" for x in os.getloadavg()),
    }


def commit() -> str:
    """The checkout's commit, "+" if it has changes; LPLB_COMMIT where there is no git; or "unknown"."""
    try:
        git = ["git", "-C", str(ROOT)]
        name = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("LPLB_COMMIT", "unknown")
    return name + ("+" if changed.stdout.strip() else "")


def shown(value: float, unit: str) -> str:
    """A figure for the table."""
    if unit in ("", "bytes"):
        text = f"{value:.1e}" if value != int(value) else f"{int(value):,}"
    else:
        text = f"{value:.2f}" if value < 100 else f"{value:.0f}"
    return f"{text} {unit}".strip()


def print_table(rows: list[Row], where: dict[str, str], title: str, note: str = "") -> None:
    """One table, under the machine's name."""
    console = Console(width=None if sys.stdout.isatty() else 130)
    console.print(", ".join(f"{key} {value}" for key, value in where.items()))
    if note:
        console.print(note)
    table = Table(title=title)
    for heading, justify in (("what", "left"), ("value", "right"), ("bar", "right"), ("met", "left"), ("peer", "left")):
        table.add_column(heading, justify=justify)
    for row in rows:
        bar = "" if row.bar is None else f"{'≥' if row.bar_is == '>=' else '≤'} {row.bar:g}"
        met = {None: "", True: "[green]yes[/]", False: "[red]no[/]"}[row.met]
        table.add_row(row.name, shown(row.value, row.unit), bar, met, row.peer)
    console.print(table)


def write(rows: list[Row], where: dict[str, str], kind: str) -> Path:
    """Write the rows to benchmarks/results."""
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    path = ROOT / "benchmarks" / "results" / f"{kind}-{date}.json"
    path.parent.mkdir(exist_ok=True)
    content = {
        "date": date,
        "commit": commit(),
        "machine": where,
        "rows": [{**asdict(row), "met": row.met} for row in rows],
    }
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path
