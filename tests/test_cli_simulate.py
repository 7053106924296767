"""The command lplb simulate: what it prints and writes, and what it refuses before any work."""

import csv
import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

import lplb.simulate
from lplb import cli, scenes
from lplb.cost import HARDWARE, layer_time
from lplb.models import MODELS
from lplb.simulate import compare, results, simulate

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


def test_json_needs_no_file_and_no_rich(capsys, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "rich"] + ["rich"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert run("--policy", "none", "--json") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["loads"] == "router trace"
    assert captured.err == ""


def test_files_are_there_before_the_table(tmp_path, monkeypatch):
    """Whoever reads the table may stop reading at its first line."""
    code = "import sys; from lplb.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, *SMALL, "--policy", "none", "--csv", str(tmp_path / "a.csv")]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")
    assert (tmp_path / "a.csv").read_text().startswith(",".join(results.BATCH_COLUMNS))


@pytest.mark.parametrize("arguments", [["env"], ["env", "--json"], [*SMALL, "--policy", "none", "--json"]])
def test_a_closed_pipe_ends_quietly(arguments):
    code = "import sys; from lplb.cli import main; sys.exit(main())"
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-c", code, *arguments], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


def test_an_interrupt_is_one_line(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "compare", interrupted)
    assert run("--policy", "none") == 130
    assert capsys.readouterr().err == "lplb: interrupted\n"


def test_least_imbalance_and_least_time_are_green(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert run("--policy", "none", "eplb", "--split", "lp", "--planner-seconds", "0.01") == 0
    printed = capsys.readouterr().out
    counts = scenes.trace().counts[:20, :2]
    none, eplb = (simulate(counts, n_ranks=8, policy=policy) for policy in ("none", "eplb"))
    green = re.findall(r"\x1b\[1;32m *([^\x1b]*?) *\x1b", printed)
    assert green[1] == f"{eplb.summary.imbalance_mean:.3f}" < f"{none.summary.imbalance_mean:.3f}"
    assert len(green) == 2
    assert green[0].endswith("µs")
    plain = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", printed).split())
    assert re.search(rf"per rank\) eplb / lp 10\d\d\d µs, none {green[0]}\. There", plain)
    assert "10000 µs that are assumed for the planner cost more than balance saves" in plain


@pytest.mark.parametrize(
    ("options", "ranks_per_node", "exchange"),
    [
        ([], 8, "direct"),
        (["--nodes", "4"], 4, "direct"),
        (["--nodes", "1"], 16, "direct"),
        (["--exchange", "by_node"], 8, "by_node"),
        (["--scale", "100"], 8, "by_node"),
        (["--scale", "100", "--exchange", "direct"], 8, "direct"),
    ],
)
def test_the_models_nodes_and_exchange(options, ranks_per_node, exchange, capsys):
    arguments = ["--ranks", "16", "--policy", "none", *options]
    assert run(*arguments, "--json") == 0
    got = json.loads(capsys.readouterr().out)["simulations"][0]
    counts = scenes.trace().counts[16:20, :2] * (100 if "--scale" in options else 1)
    shape = replace(MODELS["deepseek-v3"], n_logical=64, n_group=1, topk_group=1)
    expected = layer_time(counts, 16, shape, HARDWARE["h200"], ranks_per_node=ranks_per_node, exchange=exchange)
    assert np.allclose(got["batches"]["layer_seconds"], expected, rtol=1e-12)
    assert (got["batches"]["cross_node_tokens"] is None) == (options[:1] != ["--nodes"] or options[1] == "1")
    assert run(*arguments) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"16 ranks in {16 // ranks_per_node} nodes" in said
    assert ("assumed: at most 8 each" in said) == ("--nodes" not in options)


def test_what_nobody_asked_for_is_left_out(capsys):
    scene = ["--scene", "lognormal", "--experts", "20", "--tokens", "320"]
    assert run(*scene, "--ranks", "5", "8", "--split", "even", "--json") == 0
    captured = capsys.readouterr()
    found = [(s["setting"]["n_ranks"], s["setting"]["policy"]) for s in json.loads(captured.out)["simulations"]]
    rest = ["eplb", "eplb-distinct", "lp"]
    assert found == [(5, "none"), *((5, p) for p in rest), *((8, p) for p in rest)]
    assert "Without none on 8 ranks: 20 experts do not divide evenly there.\n" in captured.err
    assert cli.main([*SMALL, *scene, "--policy", "lp-change", "--split", "even"]) == 1
    assert "allowed is split 'lp'" in capsys.readouterr().err
    assert cli.main([*SMALL, *scene, "--policy", "none"]) == 1
    assert "n_physical is 20, allowed is a multiple of n_ranks = 8" in capsys.readouterr().err


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


def test_several_files_follow_each_other(tmp_path, capsys):
    loads = scenes.lognormal(24, 2, 16, tokens=640, seed=2)  # batches first
    paths = [tmp_path / "a.npy", tmp_path / "b.npy"]
    np.save(paths[0], loads[:10])
    np.save(paths[1], loads[10:])
    several = [part for path in paths for part in ("--load", str(path))]
    options = ["--ranks", "4", "--policy", "none", "--json"]
    assert cli.main(["simulate", *several, "--first-axis", "batches", *options]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["loads"] == "a.npy, b.npy"
    expected = loads[16:].reshape(8, 2, 4, 4).sum(-1)
    assert np.array_equal(data["simulations"][0]["batches"]["rank_load"], expected)


def test_shares_become_tokens_and_averages_are_rounded(tmp_path, capsys):
    counts = scenes.lognormal(20, 1, 16, tokens=64000, seed=2)
    path = tmp_path / "a.npy"
    command = ["simulate", "--load", str(path), "--ranks", "4", "--policy", "none", "--json"]
    for unit, name in ((64000, "a.npy, scaled to 32,768 a batch, as they are no whole tokens"), (0.99, "a.npy")):
        shares = counts.transpose(1, 0, 2) / unit
        np.save(path, shares)
        assert cli.main(command) == 0
        data = json.loads(capsys.readouterr().out)
        assert data["loads"] == name
        whole = np.rint(shares * (32768 if unit == 64000 else 1))
        expected = whole[0, 16:].reshape(4, 1, 4, 4).sum(-1)
        assert np.array_equal(data["simulations"][0]["batches"]["rank_load"], expected)


def test_too_many_tokens_are_named_without_a_scale(tmp_path, capsys):
    np.save(tmp_path / "a.npy", np.full((1, 20, 8), 2**31, dtype=np.int64))
    assert cli.main(["simulate", "--load", str(tmp_path / "a.npy")]) == 1
    said = capsys.readouterr().err
    assert "a.npy has 2147483648 tokens of an expert, allowed are up to 2147483647" in said
    assert "--scale" not in said


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
