"""The command lplb simulate: what it prints and writes, and what it refuses before any work."""

import csv
import json
import sys

import numpy as np
import pytest

import lplb.simulate
from lplb import cli, scenes
from lplb.simulate import results, simulate

pytest.importorskip("rich", reason="needs rich: pip install lplb[demo]")

SMALL = ["simulate", "--batches", "20", "--layers", "2", "--ranks", "8"]


def run(*arguments):
    return cli.main([*SMALL, *map(str, arguments)])


def test_prints_one_table_of_what_simulate_says(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert run("--policy", "none", "eplb", "--nodes", 2) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert "8 ranks in 2 nodes" in printed
    assert "…" not in printed
    for policy, split in (("none", "lp"), ("eplb", "even"), ("eplb", "lp")):
        s = simulate(scenes.trace(2).counts[:20, :2], n_ranks=8, policy=policy, split=split, n_nodes=2)
        line = next(
            line
            for line in printed.splitlines()
            if line.split()[: 1 + 2 * (policy != "none")] == s.setting.name.split()
        )
        n = s.summary
        for number in (n.imbalance_mean, n.bound_mean, n.imbalance_p99, n.balancedness):
            assert f"{number:.3f}" in line
        assert f"{n.cross_node_share:.1%}" in line


def test_writes_a_folder(tmp_path, capsys):
    pytest.importorskip("plotly", reason="needs plotly: pip install lplb[report]")
    folder = tmp_path / "out"
    assert run("--policy", "none", "circulant", "-o", folder, "--scale", 3) == 0
    names = ["batches.csv", "rank_loads.csv", "report.html", "simulation.json", "summary.csv"]
    assert sorted(path.name for path in folder.iterdir()) == names
    printed = capsys.readouterr().out
    assert all(str(folder / name) in printed for name in names)
    data = json.loads((folder / "simulation.json").read_text())
    assert [s["setting"]["configuration"] for s in data["simulations"]] == [
        "none",
        "circulant / even",
        "circulant / lp",
    ]
    counts = scenes.trace().counts[16:20, :2]
    assert np.array_equal(np.sum(data["simulations"][0]["batches"]["rank_load"], -1), 3 * counts.sum(-1))
    with (folder / "batches.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 4 * 2
    assert {row["phase"] for row in rows} == {"code"}


def test_json_alone_can_be_piped(capsys):
    assert run("--policy", "none", "--json", "-") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["loads"] == "router trace"


def test_csv_and_json_go_where_they_are_told(tmp_path, capsys):
    assert run("--policy", "none", "--csv", tmp_path / "a.csv", "--json", tmp_path / "a.json") == 0
    assert (tmp_path / "a.csv").read_text().startswith(",".join(results.BATCH_COLUMNS))
    assert json.loads((tmp_path / "a.json").read_text())["version"] == 1


def test_generated_loads(capsys):
    options = ["--scene", "hot", "share=0.3", "period=5", "--experts", "32", "--tokens", "4096", "--seed", "4"]
    assert run(*options, "--policy", "none", "--json", "-") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["loads"] == "hot share=0.3 period=5"
    counts = scenes.hot_expert(20, 2, 32, share=0.3, period=5, tokens=4096, seed=4)
    expected = counts[16:].reshape(4, 2, 8, 4).sum(-1)
    assert np.array_equal(data["simulations"][0]["batches"]["rank_load"], expected)
    assert data["phase"][4:6] == ["hot 0", "hot 1"]


def test_a_users_file(tmp_path, capsys):
    loads = scenes.lognormal(18, 3, 16, tokens=640, seed=2).transpose(1, 0, 2)
    loads[1] = 0  # a layer without experts
    path = tmp_path / "=<b>loads.npy"
    np.save(path, loads)
    assert cli.main(["simulate", "--load", str(path), "--ranks", "4", "--policy", "none", "--json", "-"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["loads"] == "=<b>loads.npy, 2 of 3 layers"
    assert set(data["phase"]) == {"recorded"}
    expected = loads[[0, 2], 16:].transpose(1, 0, 2).reshape(2, 2, 4, 4).sum(-1)
    assert np.array_equal(data["simulations"][0]["batches"]["rank_load"], expected)
    assert cli.main(["simulate", "--load", str(path), "--ranks", "4", "--nodes", "2", "--policy", "none"]) == 0


def test_a_file_without_tokens(tmp_path, capsys):
    np.save(tmp_path / "a.npy", np.zeros((2, 20, 8), dtype=np.int64))
    assert cli.main(["simulate", "--load", str(tmp_path / "a.npy")]) == 1
    assert "a.npy has no tokens, allowed is at least one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batches", "0"], "--batches is 0, allowed is 1 to 240"),
        (["--batches", "241"], "--batches is 241, allowed is 1 to 240"),
        (["--layers", "5"], "--layers is 5, allowed is 1 to 4"),
        (["--batches", "16"], "loads has 16 batches, allowed are 17 or more"),
        (["--experts", "9"], "--experts is 9, allowed with --scene only"),
        (["--tokens", "9"], "--tokens is 9, allowed with --scene only"),
        (["--scale", "0"], "--scale is 0, allowed is 1 or more"),
        (["--scale", str(2**31)], "--scale is 2147483648, allowed"),
        (["--ranks", "0"], "n_ranks is 0, allowed is 1 or more"),
        (["--nodes", "3"], "--nodes is 3, allowed is a divisor of --ranks 8"),
        (["--nodes", "16"], "--nodes is 16, allowed is a divisor of --ranks 8"),
        (["--nodes", "0"], "--nodes is 0, allowed is a divisor of --ranks 8"),
        (["--ranks", "24", "--nodes", "3"], "--nodes is 3: sources is 3, allowed is a divisor of 1024"),
        (["--load", ""], "--load is '', allowed is a file"),
        (["--csv", ""], "--csv is '', allowed is a file"),
        (["--json", ""], "--json is '', allowed is a file"),
        (["--report", ""], "--report is '', allowed is a file"),
        (["-o", ""], "--output is '', allowed is a folder"),
        (["--first-axis", "layers"], "--first-axis is layers, allowed with --load only"),
        (["--scene", "zipf", "--first-axis", "layers"], "--first-axis is layers, allowed with --load only"),
        (["--scene", "zipf", "sources=2"], "--scene has sources, allowed is the option --nodes"),
        (["--policy", "none", "--ranks", "5"], "n_physical is 64, allowed is a multiple of n_ranks = 5"),
        (["--redundant", "-1"], "redundant is -1, allowed is 0 or more"),
        (["--slots", "60"], "n_physical is 60, allowed is 64 or more"),
        (["--planner-seconds", "-1"], "planner_seconds is -1.0, allowed is 0 or more"),
        (["--scene", "storm"], "name is 'storm', allowed are 'lognormal'"),
        (["--scene", "zipf", "exponent"], "--scene has 'exponent', allowed are KEY=NUMBER"),
        (["--scene", "zipf", "exponent=x"], "--scene has 'exponent=x', allowed are KEY=NUMBER"),
        (["--scene", "zipf", "share=1"], "--scene zipf: got an unexpected keyword argument 'share'"),
        (["--scene", "zipf", "seed=1"], "--scene has seed, allowed is the option --seed"),
        (["--scene", "zipf", "exponent=nan"], "exponent is nan, allowed are 0 to 10"),
        (["--csv", "no/such/a.csv"], "--csv is no/such/a.csv, whose folder"),
        (["--json", "."], "--json is ., a folder, allowed is a file"),
        (["-o", __file__], "a file, allowed is a folder"),
        (["--load", "no-such-file.npy"], "no-such-file.npy"),
    ],
)
def test_names_what_is_wrong(arguments, message, capsys):
    assert cli.main([*SMALL, *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("lplb simulate: ")
    assert message in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    "arguments", [["--policy", "best"], ["--split", "odd"], ["--trace", "--scene", "zipf"], ["--ranks"]]
)
def test_refuses_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["simulate", *arguments])
    assert stop.value.code == 2
    assert "usage: lplb simulate" in capsys.readouterr().err


@pytest.mark.parametrize(("missing", "extra"), [("rich", "demo"), ("plotly", "report")])
def test_says_how_to_get_what_is_missing(monkeypatch, capsys, tmp_path, missing, extra):
    for name in [name for name in sys.modules if name.partition(".")[0] == missing] + [missing]:
        monkeypatch.setitem(sys.modules, name, None)
    for module in ("compare", "report"):
        monkeypatch.delitem(sys.modules, f"lplb.simulate.{module}", raising=False)
        monkeypatch.delattr(lplb.simulate, module, raising=False)
    assert run("--policy", "none", "--report", tmp_path / "a.html") == 2
    assert f'needs {missing}: pip install "lplb[{extra}]"' in capsys.readouterr().err
    assert not (tmp_path / "a.html").exists()
