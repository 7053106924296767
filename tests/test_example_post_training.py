"""examples/post_training.py: with transfers the same is learnt, on ranks that have as many tokens each."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_losses_are_the_same_and_ranks_have_as_many_tokens():
    pytest.importorskip("rich", reason="needs rich, which is not installed")
    pytest.importorskip("matplotlib", reason="needs matplotlib, which is not installed")
    small = ["--pretrain", "2", "--steps", "3", "--rows", "1", "--layers", "1"]
    done = subprocess.run(
        [sys.executable, ROOT / "examples/post_training.py", *small],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines() if "│" in line]
    assert [row[0] for row in rows] == ["0", "1", "2"]
    for _, loss, apart, plain, other, *_, sent in rows:
        assert float(loss) > 1
        assert abs(float(apart)) < 1e-9
        plain, other = ([int(tokens) for tokens in cell.split()] for cell in (plain, other))
        assert sum(plain) == 4 * 128 * 2  # texts, context, top-k
        assert other == [256] * 4
        assert plain[0] > 3 * 256  # the hot experts' rank
        assert int(sent) >= 3  # the three other ranks need one each
    assert "Losses differ by" in done.stdout
