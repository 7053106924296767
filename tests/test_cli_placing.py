"""``lplb place``, ``diff`` and ``show``: files in, files and reports out, errors in one line."""

import itertools
import json
import sys

import numpy as np
import pytest
import torch
from reference import exact_bottleneck, exact_optimum
from test_formats import BROKEN

from lplb import Placement, cli
from lplb.assess import change, worth
from lplb.formats import read_placements, with_equal_loads, write_loads, write_placements

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

N_LAYERS, N_LOGICAL, N_RANKS, N_BATCHES = 3, 12, 4, 5


def drawn_loads(seed=0):
    rng = np.random.default_rng(seed)
    base = rng.lognormal(5, 1, (N_LAYERS, 1, N_LOGICAL))
    return rng.poisson(base * rng.lognormal(0, 0.3, (N_LAYERS, N_BATCHES, N_LOGICAL)))


LOADS = drawn_loads()
BEFORE = [Placement([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 0, 1, 2, 3], 4)] * 2
AFTER = [Placement([0, 1, 2, 4, 3, 5, 6, 7, 8, 9, 10, 11, 0, 1, 4, 3], 4), BEFORE[0]]


@pytest.fixture
def run(capsys):
    """Run the command line; say its status, output and error."""

    def call(*arguments):
        status = cli.main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return status, said.out, said.err

    return call


@pytest.fixture
def load(tmp_path):
    write_loads(tmp_path / "load.npz", LOADS)
    return tmp_path / "load.npz"


@pytest.fixture
def files(tmp_path):
    write_placements(tmp_path / "a.json", BEFORE)
    write_placements(tmp_path / "b.json", AFTER)
    return tmp_path / "a.json", tmp_path / "b.json"


def even_loads(phy2log, n_ranks, load):
    """Tokens of each rank where those of an expert are dealt to its copies in turn, expert e's to copy e first."""
    rank_load = np.zeros(n_ranks)
    per_rank = len(phy2log) // n_ranks
    for expert, tokens in enumerate(load):
        slots = [slot for slot, held in enumerate(phy2log) if held == expert]
        for t in range(tokens):
            rank_load[slots[(expert + t) % len(slots)] // per_rank] += 1
    return rank_load


# What a placement is worth


@pytest.mark.parametrize("group_size", [None, 4])
def test_worth_is_that_of_the_references(group_size):
    phy2log = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 3, 2, 1, 0]
    placement = Placement(phy2log, N_RANKS)
    found = worth(placement, LOADS[0], group_size)
    even = np.array([even_loads(phy2log, N_RANKS, load) for load in LOADS[0]])
    np.testing.assert_allclose(found.even_loads, even.mean(0))
    np.testing.assert_allclose(found.even, even.max(1) / even.mean(1))
    for batch, load in enumerate(LOADS[0]):
        mean = load.sum() / N_RANKS
        assert found.lp[batch] * mean == pytest.approx(
            float(exact_bottleneck(phy2log, N_RANKS, None, load)[0].load), rel=1e-12
        )
        optimum = exact_optimum(phy2log, N_RANKS, None, load)[0]
        assert found.bound[batch] * mean == pytest.approx(float(optimum), rel=1e-9)
    assert found.lp_loads.sum() == pytest.approx(LOADS[0].sum(1).mean())


def test_worth_of_groups_is_that_of_the_busiest():
    phy2log = [0, 1, 2, 0, 3, 4, 5, 3]
    loads = np.array([[10, 20, 30, 40, 50, 60], [0, 0, 0, 0, 0, 8]])
    found = worth(Placement(phy2log, 4), loads, 2)
    optima = [max(float(t) for t in exact_optimum(phy2log, 4, 2, load)) / (load.sum() / 4) for load in loads]
    np.testing.assert_allclose(found.bound, optima)


def test_worth_of_averages_and_of_more_than_planners_take():
    placement = Placement([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 3, 2, 1, 0], N_RANKS)
    whole = worth(placement, LOADS[0])
    for factor in (1 / 700, 2.0**34):
        scaled = worth(placement, LOADS[0] * factor)
        np.testing.assert_allclose(scaled.even, whole.even, atol=4 / LOADS[0].sum(1).min())  # but whole tokens
        np.testing.assert_allclose(scaled.bound, whole.bound, rtol=1e-5)
        np.testing.assert_allclose(scaled.lp, whole.bound, rtol=1e-5)
        np.testing.assert_allclose(scaled.lp_loads.sum(), whole.lp_loads.sum() * factor)


def test_few_tokens_are_whole_in_both_splits():
    placement = Placement([0, 1, 0, 1], 2)
    found = worth(placement, np.array([[3, 1], [1, 1], [1, 0]]))
    assert found.even.tolist() == [1.0, 1.0, 2.0]  # expert 0's odd token goes to its copy 0, expert 1's to its copy 1
    assert (found.lp <= found.even).all()
    assert found.bound.tolist() == [1.0, 1.0, 1.0]


def test_batches_without_tokens_are_left_out():
    placement = Placement([0, 1, 1, 2], 2)
    loads = np.array([[0, 0, 0], [4, 4, 4], [0, 0, 0]])
    assert worth(placement, loads).even.tolist() == [1.0]
    nothing = worth(placement, loads[:1])
    assert (nothing.even.size, nothing.even_loads.tolist()) == (0, [0.0, 0.0])
    assert with_equal_loads(np.stack([loads, loads * 0]))[1].tolist() == [[1, 1, 1]] * 3


def test_change_counts_moves_between_ranks_and_within():
    found = change(BEFORE[0], AFTER[0])
    assert (found.moves, found.within_rank) == (3, 0)
    assert found.experts == [3, 4]
    assert found.copies == {2: (2, 1), 4: (1, 2)}
    assert found.received == [1, 1, 0, 1]
    assert sum(found.sent) == 3
    swapped = change(Placement([0, 1, 2, 3], 2), Placement([1, 0, 2, 3], 2))
    assert (swapped.moves, swapped.within_rank, swapped.experts) == (0, 2, [])


# place


@pytest.mark.parametrize("policy", ["lp", "eplb", "eplb-distinct"])
def test_place_writes_and_reports(run, load, tmp_path, policy):
    out = tmp_path / "p.json"
    common = ("place", "--load", load, "--ranks", 4, "--redundant", 4, "--policy", policy)
    status, text, error = run(*common, "-o", out)
    assert (status, error) == (0, "")
    placements = read_placements(out)
    assert len(placements) == N_LAYERS
    assert {(one.n_ranks, one.n_logical, one.n_physical) for one in placements} == {(4, 12, 16)}
    status, text_json, _ = run(*common, "--json")
    report = json.loads(text_json)
    assert status == 0
    assert [layer["phy2log"] for layer in report["layers"]] == [one.phy2log.tolist() for one in placements]
    for layer, loads in zip(report["layers"], LOADS, strict=True):
        even = [even_loads(layer["phy2log"], 4, load) for load in loads]
        assert layer["even"] == pytest.approx(np.mean([max(one) / np.mean(one) for one in even]))
        assert layer["bound"] <= layer["lp"] <= layer["even"] + 4 / loads.sum(1).min()
        assert f"{layer['lp']:.3f}" in text
    assert report["mean"]["lp"] == pytest.approx(np.mean([layer["lp"] for layer in report["layers"]]))


def test_place_one_layer_for_an_engine(run, load, tmp_path):
    common = ("place", "--load", load, "--ranks", 4, "--slots", 16, "--policy", "eplb-distinct")
    for name, form in (("s.json", "sglang"), ("v.json", "vllm"), ("a.json", "vllm-ascend"), ("s.pt", None)):
        given = () if form is None else ("--format", form)
        assert run(*common, "--layer", 1, "-o", tmp_path / name, *given)[0] == 0
    found = [read_placements(tmp_path / name, 4) for name in ("s.json", "v.json", "a.json", "s.pt")]
    assert len(found[0]) == 1
    assert all(one == found[0] for one in found)
    assert list(json.loads((tmp_path / "s.json").read_text())) == ["physical_to_logical_map"]
    report = json.loads(run(*common, "--layer", 1, "--json")[1])
    assert [layer["layer"] for layer in report["layers"]] == [1]


def test_place_layers_without_tokens(run, tmp_path):
    loads = LOADS.copy()
    loads[0] = 0
    path = tmp_path / "dump.pt"
    dump = {"rank": 0, "logical_count": torch.from_numpy(loads.swapaxes(0, 1).copy())}
    torch.save(dump, path)
    common = ("place", "--load", path, "--ranks", 4, "--redundant", 0, "--policy", "eplb-distinct")
    status, text, _ = run(*common, "--json")
    report = json.loads(text)
    assert status == 0
    assert [report["layers"][0][name] for name in ("even", "lp", "bound")] == [None] * 3
    assert sorted(report["layers"][0]["phy2log"]) == list(range(12))
    assert report["mean"]["even"] == pytest.approx(np.mean([layer["even"] for layer in report["layers"][1:]]))
    assert "-" in run(*common)[1]
    np.save(tmp_path / "idle.npy", np.zeros((3, 12)))
    status, text, error = run("place", "--load", tmp_path / "idle.npy", *common[3:])
    assert (status, text) == (1, "")
    assert error == "lplb place: loads are 0 everywhere, allowed is at least one above 0\n"


def test_place_checks_its_output_before_the_work(run, load, tmp_path, monkeypatch):
    from lplb.commands import placing

    monkeypatch.setattr(placing, "placed", None)  # which would fail as it is called
    status, _, error = run("place", "--load", load, "--ranks", 4, "--slots", 16, "-o", tmp_path / "absent" / "x.json")
    assert (status, error.count("\n")) == (1, 1)
    assert error.endswith(f"allowed is a folder that exists: '{tmp_path / 'absent'}'\n")


def test_place_from_several_files_and_plain_arrays(run, load, tmp_path):
    np.save(tmp_path / "x.npy", LOADS[:, 0])
    common = ("--ranks", 4, "--slots", 16, "--json")
    report = json.loads(run("place", "--load", load, "--load", load, *common)[1])
    assert report["batches"] == 2 * N_BATCHES
    report = json.loads(run("place", "--load", tmp_path / "x.npy", "--first-axis", "layers", *common)[1])
    assert (report["batches"], len(report["layers"])) == (1, N_LAYERS)


def moves_of(before, after):
    """Slots that come from another rank: of each rank the experts that it had not."""
    pairs = zip(before.phy2log.view(4, -1).tolist(), after.phy2log.view(4, -1).tolist(), strict=True)
    return sum(len(set(new) - set(old)) for old, new in pairs)


def current_file(tmp_path):
    placements = [Placement(np.roll(one.phy2log.numpy(), 4), 4) for one in [*BEFORE, AFTER[0]]]
    write_placements(tmp_path / "current.json", placements)
    return tmp_path / "current.json", placements


def test_place_keeps_experts_where_they_are(run, tmp_path):
    loads = LOADS.copy()
    loads[0] = 0
    write_loads(tmp_path / "load.npz", loads)
    path, current = current_file(tmp_path)
    common = ("place", "--load", tmp_path / "load.npz", "--ranks", 4, "--slots", 16)
    anew = json.loads(run(*common, "--json")[1])
    status, text, error = run(*common, "--current", path, "-o", tmp_path / "new.json")
    assert (status, error) == (0, "")
    new = read_placements(tmp_path / "new.json")
    assert new[0] == current[0]  # without loads there is no reason to move
    moves = [moves_of(*pair) for pair in zip(current, new, strict=True)]
    assert f"{sum(moves)} of 48 slots" in text
    report = json.loads(run(*common, "--current", path, "--json")[1])
    assert [layer["moves"] for layer in report["layers"]] == moves
    assert report["moves"] == sum(moves)
    for layer in (1, 2):  # the best of all orders of ranks
        rows = [set(anew["layers"][layer]["phy2log"][4 * r : 4 * r + 4]) for r in range(4)]
        old = [set(rank) for rank in current[layer].phy2log.view(4, 4).tolist()]
        orders = itertools.permutations(range(4))
        assert moves[layer] == min(sum(len(rows[o] - old[r]) for r, o in enumerate(order)) for order in orders)
        assert report["layers"][layer]["lp"] == pytest.approx(anew["layers"][layer]["lp"])
    assert anew["moves"] is None
    assert anew["layers"][0]["moves"] is None
    write_placements(tmp_path / "one.json", current[0])
    assert run(*common, "--current", tmp_path / "one.json", "--layer", 1, "--json")[0] == 0
    assert run(*common, "--current", tmp_path / "one.json", "--json")[0] == 0


def test_place_by_few_moves(run, load, tmp_path):
    path, current = current_file(tmp_path)
    common = ("place", "--load", load, "--ranks", 4, "--slots", 16, "--current", path, "--json")
    report = json.loads(run(*common, "--max-moves", 2)[1])
    for layer, old, loads in zip(report["layers"], current, LOADS, strict=True):
        assert layer["moves"] == moves_of(old, Placement(layer["phy2log"], 4)) <= 2
        assert layer["lp"] <= worth(old, loads).lp.mean() + 1e-9
    assert report["moves"] > 0
    assert json.loads(run(*common, "--max-moves", 0)[1])["moves"] == 0


# diff


def test_diff(run, files):
    status, text, error = run("diff", *files, "--expert-bytes", 1 << 20)
    assert (status, error) == (0, "")
    assert "3 of 32 slots" in text
    assert "3.0 MiB" in text
    status, text, _ = run("diff", *files, "--json")
    report = json.loads(text)
    assert (report["total"]["moves"], report["total"]["bytes"]) == (3, None)
    assert report["total"]["received"] == [1, 1, 0, 1]
    assert [layer["moves"] for layer in report["layers"]] == [3, 0]
    assert report["layers"][0]["copies"] == {"2": [2, 1], "4": [1, 2]}
    sized = json.loads(run("diff", *files, "--json", "--expert-bytes", 1 << 20)[1])
    assert [layer["bytes"] for layer in sized["layers"]] == [3 << 20, 0]
    assert json.loads(run("diff", files[0], files[0], "--json")[1])["total"]["moves"] == 0


def test_diff_relabelled(run, files, tmp_path):
    renamed = [Placement(np.roll(one.phy2log.numpy(), 4), 4) for one in AFTER]
    write_placements(tmp_path / "r.json", renamed)
    assert json.loads(run("diff", files[0], tmp_path / "r.json", "--json")[1])["total"]["moves"] > 3
    status, text, error = run("diff", files[0], tmp_path / "r.json", "--relabel")
    assert (status, error) == (0, "")
    assert "3 of 32 slots are filled from another rank\n" in text
    assert text.endswith("ranks and slots are renamed so that most experts stay\n")
    assert json.loads(run("diff", files[0], tmp_path / "r.json", "--relabel", "--json")[1])["total"]["moves"] == 3


def test_diff_of_files_that_differ_in_more(run, files, tmp_path):
    write_placements(tmp_path / "c.json", BEFORE[0])
    assert run("diff", files[0], tmp_path / "c.json")[::2] == (
        1,
        "lplb diff: the second file has 1 layers, allowed are as many as in the first, 2\n",
    )
    write_placements(tmp_path / "d.json", [Placement(one.phy2log, 2) for one in BEFORE])
    status, _, error = run("diff", files[0], tmp_path / "d.json")
    assert (status, error.count("\n")) == (1, 1)
    assert "layer 0: after has 2 ranks" in error


# show


def test_show(run, files, load, tmp_path):
    status, text, error = run("show", files[0])
    assert (status, error) == (0, "")
    lines = text.splitlines()
    assert "layer 0 of 2, 12 experts on 4 ranks" in lines[0]
    for rank, slots in enumerate([[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [0, 1, 2, 3]]):
        row = next(line for line in lines if line.split("│")[1:2] == [f" {rank:>4} "])
        assert row.split("│")[2].split() == [str(expert) for expert in slots]
    write_loads(tmp_path / "one.npz", LOADS[:1])
    status, text, _ = run("show", files[0], "--load", tmp_path / "one.npz")
    assert (status, text.count("even split")) == (0, 2)
    report = json.loads(run("show", files[0], "--load", tmp_path / "one.npz", "--json")[1])
    assert [entry["layer"] for entry in report["layers"]] == [0, 1]
    phy2log = BEFORE[0].phy2log.tolist()
    expected = np.mean([even_loads(phy2log, 4, one) for one in LOADS[0]], axis=0)
    np.testing.assert_allclose(report["layers"][0]["even_loads"], expected)
    assert report["layers"][0]["ranks"] == BEFORE[0].phy2log.view(4, 4).tolist()
    only = json.loads(run("show", files[0], "--layer", 1, "--json")[1])
    assert [entry["layer"] for entry in only["layers"]] == [1]
    status, _, error = run("show", files[0], "--load", load)
    assert (status, error) == (1, "lplb show: the loads are of 3 layers, allowed are those of the placement, 2\n")


@pytest.mark.parametrize(("name", "head"), [("x.png", b"\x89PNG"), ("x.svg", b"<?xml"), ("x.pdf", b"%PDF")])
@pytest.mark.parametrize("with_loads", [False, True])
def test_show_draws(run, files, tmp_path, name, head, with_loads):
    write_loads(tmp_path / "one.npz", LOADS[:1])
    given = ("--load", tmp_path / "one.npz") if with_loads else ()
    status, text, error = run("show", files[1], "-o", tmp_path / name, *given)
    assert (status, text, error) == (0, "", "")
    assert (tmp_path / name).read_bytes().startswith(head)
    status, text, _ = run("show", files[1], "-o", tmp_path / name, "--json", *given)
    assert len(json.loads(text)["layers"]) == 1


def test_a_picture_shows_every_slot(files, tmp_path):
    from lplb.commands import picture as placement_picture
    from lplb.commands import placing

    report = placing.shown(AFTER, [0])
    placement_picture.picture(report, report["layers"][0], tmp_path / "x.svg")
    assert (tmp_path / "x.svg").stat().st_size > 10_000
    many = [Placement(np.concatenate([np.arange(256), np.arange(256)]), 64)]
    report = placing.shown(many, [0], np.ones((1, 2, 256)))
    placement_picture.picture(report, report["layers"][0], tmp_path / "y.png")
    assert report["layers"][0]["even_loads"] == [4.0] * 64


def test_doubles_are_refused_or_spread(run, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"physical_to_logical_map": [[0, 0, 1, 2]]}))
    status, _, error = run("show", path, "--ranks", 2)
    assert (status, error.count("\n")) == (1, 1)
    assert "expert 0 is on rank 0 2 times" in error
    status, text, _ = run("show", path, "--ranks", 2, "--spread", "--json")
    ranks = json.loads(text)["layers"][0]["ranks"]
    assert all(len(set(rank)) == 2 for rank in ranks)
    assert sorted(ranks[0] + ranks[1]) == [0, 0, 1, 2]
    path.write_text(json.dumps({"physical_to_logical_map": [[0, 0, 0, 1]]}))
    status, _, error = run("show", path, "--ranks", 2, "--spread")
    assert (status, error.count("\n")) == (1, 1)
    assert "layer 0: " in error
    for given in ((), ("--spread",)):
        status, _, error = run("show", path, *given)
        assert (status, error) == (
            1,
            f"lplb show: {path}: does not say the number of ranks; n_ranks (on the command line --ranks) has to\n",
        )


# What goes wrong


@pytest.mark.parametrize("case", BROKEN, ids=str)
def test_broken_files_are_one_line(run, tmp_path, case):
    path = tmp_path / "x"
    path.write_bytes(BROKEN[case][0])
    for arguments in (
        ("place", "--load", path, "--ranks", 1, "--redundant", 0, "--policy", "eplb"),
        ("place", "--load", path, "--ranks", 1, "--redundant", 0, "--policy", "eplb", "--json"),
        ("show", path, "--ranks", 1, "--json"),
        ("diff", path, path, "--ranks", 1, "--json"),
    ):
        status, text, error = run(*arguments)
        if arguments[0] != "place" and status == 0:
            continue  # broken as loads only
        assert (status, text, error.count("\n")) == (1, "", 1)
        assert error.startswith(f"lplb {arguments[0]}: {path}")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"--load": "absent.npz"}, "No such file or directory: 'absent.npz'"),
        ({"--load": "."}, "Is a directory: '.'"),
        ({"--ranks": 0}, "0, allowed"),
        ({"--ranks": 5}, "5"),
        ({"--redundant": -1}, "11"),
        ({"--redundant": 100}, "112"),
        ({"--group-size": 3}, "3"),
        ({"--layer": 3}, "layer is 3, allowed is 0 to 2"),
        ({"--experts": 5}, "has 12 experts, allowed are n_logical = 5"),
        ({"-o": "absent/x.json"}, "No such file or directory, allowed is a folder that exists: "),
        ({"-o": "."}, "path ends in ''"),
        ({"-o": "x.csv"}, "path ends in '.csv', allowed are .json and, for format 'sglang', .pt"),
        ({"-o": "x.npy", "--format": "vllm"}, "path ends in '.npy'"),
        ({"--max-moves": 2}, "--max-moves is 2, allowed only beside --current"),
        ({"--current": "{current}", "--max-moves": 2}, "policy is 'eplb-distinct', allowed with a limit of moves is"),
        ({"--current": "{current}", "--layer": 3}, "3, allowed is 0 to 2"),
        ({"--current": "{current}", "--redundant": 0}, "layer 0 has 16 slots, allowed are 12"),
        ({"--current": "{two}"}, "are of 2 layers, allowed are those of loads, 3"),
        ({"--current": "{current}", "--ranks": 2}, "says n_ranks is 4"),
        ({"-o": "x.pt", "--format": "vllm"}, "format is 'vllm'"),
    ],
)
def test_place_refuses_in_one_line(run, load, monkeypatch, tmp_path, change, words):
    monkeypatch.chdir(tmp_path)
    current = current_file(tmp_path)[0]
    write_placements(tmp_path / "two.json", BEFORE)
    given = {"--load": load, "--ranks": 4, "--redundant": 4, "--policy": "eplb-distinct"} | change
    named = [str(part).format(current=current, two="two.json") for pair in given.items() for part in pair]
    status, text, error = run("place", *named)
    assert (status, text, error.count("\n")) == (1, "", 1)
    assert words in error
    assert not list(tmp_path.glob("x*"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("show", "{a}", "--layer", 2), "--layer is 2, allowed is 0 to 1"),
        (("show", "{a}", "-o", "x.txt"), "the picture's name is 'x.txt'"),
        (("show", "{a}", "-o", "absent/x.png"), "does not exist"),
        (("show", "{a}", "--ranks", 2), "says n_ranks is 4, allowed is what was given, 2"),
        (("show", "{a}", "--ranks", 2, "--spread"), "says n_ranks is 4, allowed is what was given, 2"),
        (("diff", "{a}", "{b}", "--expert-bytes", 0), "--expert-bytes is 0, allowed is 1 or more"),
    ],
)
def test_others_refuse_in_one_line(run, files, arguments, words):
    named = [str(one).format(a=files[0], b=files[1]) for one in arguments]
    status, text, error = run(*named)
    assert (status, text, error.count("\n")) == (1, "", 1)
    assert words in error


@pytest.mark.parametrize(
    "arguments", [("place",), ("place", "--load", "x", "--ranks", "4"), ("diff", "x"), ("show", "x", "--format", "y")]
)
def test_wrong_usage_is_two(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(arguments))
    assert stopped.value.code == 2
    assert "usage: lplb" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("missing", "drawn", "arguments"),
    [
        ("rich", "lplb.commands.show", ("show", "{a}")),
        ("rich", "lplb.commands.show", ("diff", "{a}", "{b}")),
        ("rich", "lplb.commands.show", ("place", "--load", "{a}", "--ranks", "4", "--slots", "16")),
        ("matplotlib", "lplb.commands.picture", ("show", "{a}", "-o", "x.png")),
    ],
)
def test_what_is_missing_is_named(monkeypatch, run, files, missing, drawn, arguments):
    for name in [name for name in sys.modules if name.partition(".")[0] == missing] + [missing]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, drawn, raising=False)
    named = [one.format(a=files[0], b=files[1]) for one in arguments]
    status, text, error = run(*named)
    assert (status, text) == (2, "")
    assert error == f'lplb {arguments[0]} needs {missing}: pip install "lplb[demo]"\n'
    if arguments[0] in ("show", "diff") and "-o" not in arguments:
        assert run(*named, "--json")[0] == 0  # which needs neither
