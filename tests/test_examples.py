"""The examples run, print their table and write their picture, with small arguments."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TORCHRUN = [
    "-m",
    "torch.distributed.run",
    "--nproc-per-node",
    "4",
    "--rdzv-backend",
    "c10d",
    "--rdzv-endpoint",
    "localhost:0",
]


def run(command, picture):
    """Run an example with this checkout's lplb; return what it printed."""
    pytest.importorskip("rich", reason="needs rich, which is not installed")
    pytest.importorskip("matplotlib", reason="needs matplotlib, which is not installed")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    done = subprocess.run(
        [sys.executable, *command, "--layers", "1", "--rows", "1", "--picture", picture],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert str(picture) in done.stdout
    return done.stdout


def rows(printed, first):
    """Cells of the table's rows from the one that begins with `first` on."""
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if "│" in line]
    return cells[next(i for i, row in enumerate(cells) if row[0] == first) :]


def test_train_ep_under_torchrun(tmp_path):
    printed = run([*TORCHRUN, ROOT / "examples/train_ep.py", "--steps", "3"], tmp_path / "train.png")
    table = rows(printed, "0")
    assert [row[1] for row in table] == ["code", "prose", "tables"]
    for row in table:
        before, after = ([int(load) for load in cell.split()] for cell in row[4:6])
        assert sum(before) == sum(after) == 4 * 128 * 6  # texts, context, top-k
        assert max(after) < max(before)
        assert 1 <= float(row[7]) < float(row[6])
    assert "Losses differ by" in printed


def test_serve_ep(tmp_path):
    arguments = ["--batches", "4", "--refresh", "2", "--train", "1"]
    printed = run([ROOT / "examples/serve_ep.py", *arguments], tmp_path / "serve.png")
    first, second = rows(printed, "0 to 1")
    assert first[2] == "not placed"
    assert first[3] == first[4] == first[5]
    assert second[0] == "2 to 3"
    assert second[2].endswith(" MiB")
    assert float(second[5]) <= float(second[4])
    assert "Logits differ" in printed
