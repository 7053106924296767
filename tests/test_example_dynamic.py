"""examples/dynamic_dit.py: the images are the same, table and picture are there, and no process is left."""

import importlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples/dynamic_dit.py"


def run(*arguments):
    """Run the example in a session of its own; return what it did, and its process group."""
    pytest.importorskip("rich", reason="needs rich, which is not installed")
    pytest.importorskip("matplotlib", reason="needs matplotlib, which is not installed")
    process = subprocess.Popen(
        [sys.executable, EXAMPLE, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"},
        start_new_session=True,
    )
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err, process.pid


def ended(group):
    """Whether no process of the group is left, or only for the moment in which Python's own ones see that it is so."""
    for _ in range(200):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def rows(printed):
    """Cells of the tables' rows by their first cell, in order."""
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if "│" in line]
    return {row[0]: row[1:] for row in cells}


def test_it_shows_the_same_image_four_times(tmp_path):
    picture = tmp_path / "dit.png"
    status, out, err, group = run("--steps", 24, "--layers", 1, "--experts", 8, "--picture", picture)
    assert status == 0, err
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert str(picture) in out
    found = rows(out)
    assert [found[name][0] for name in ("layout", "shapes", "details", "all")] == [
        "0 to 7",
        "8 to 15",
        "16 to 23",
        "0 to 23",
    ]
    for name in ("layout", "shapes", "details", "all"):
        static, static_lp, *_ = (float(cell) for cell in found[name][1:])
        assert 1 <= static_lp <= static  # on one placement no split is better than the LP's
    for name in ("static", "static + LP", "dynamic", "dynamic + LP"):
        assert found[name][-1] == "the same"
    for name in ("dynamic", "dynamic + LP"):
        moved, at_least = (int(cell.removesuffix(" KiB").replace(",", "")) for cell in found[name][2:4])
        assert moved >= at_least  # a transfer may have been given up
    assert ended(group)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--experts", 30), "--experts is 30, allowed is a multiple of 4, 8 or more"),
        (("--experts", 4), "--experts is 4, allowed is a multiple of 4, 8 or more"),
        (("--steps", 2), "--steps is 2, allowed is 3 or more"),
        (("--layers", 0), "--layers is 0, allowed is 1 or more"),
        (("--seed", -1), "--seed is -1, allowed is 0 or more"),
        (("--picture", "image.doc"), "--picture is image.doc, allowed is a name that ends in ."),
        (("--picture", "no/such/folder/image.png"), "whose folder does not exist"),
    ],
)
def test_bad_options_are_refused_before_any_process_is_started(arguments, says, monkeypatch, capsys):
    pytest.importorskip("rich", reason="needs rich, which is not installed")
    pytest.importorskip("matplotlib", reason="needs matplotlib, which is not installed")
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    example = importlib.import_module("dynamic_dit")
    monkeypatch.setattr(example.mp, "spawn", None)
    monkeypatch.setattr(sys, "argv", ["dynamic_dit.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        example.main()
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert says in printed.err
    assert not printed.out
