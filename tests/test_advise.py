"""Advice: its times against loops over single batches, its crossovers against a scan, and that it can say no."""

import itertools
import json
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_cost import slow_seconds

from lplb import Placement, Planner, cli, scenes
from lplb.advise import profiles
from lplb.advise.choices import MOST_DIRECT, SIZES, generated, loads_by_name, nodes_of, recorded, study
from lplb.advise.worth import FACTORS, WORTH, Study, pays_at
from lplb.commands.advise import late_progress
from lplb.cost import HARDWARE
from lplb.models import MODELS, ModelShape
from lplb.policies import place

SMALL = ModelShape("small", 32, 4, 4096, 2048, 10, 1.0, "fp8", 1.0)
SOME = (1, 8, 64, 512, 4096, 16384)
DEEPSEEK = MODELS["deepseek-v3"]


@pytest.fixture(scope="module")
def skewed():
    """Experts of very different popularity on 8 ranks in two nodes."""
    loads = generated(SMALL, sigma=1.0, seed=5)
    return loads, study(SMALL, "h200", 8, loads=loads, n_nodes=2, redundancy=(0, 1, 2), tokens=(8, 4096), seed=3)


def slow_time(loads, level, policy, split, size, hardware=HARDWARE["h200"]):
    """The mean time of an option on 8 ranks, one batch after the other; the planner's left out."""
    n_physical = 32 + 8 * level
    times = []
    counts = loads.counts(size * 8 * SMALL.top_k, 3)
    for case, batches in zip(loads.cases, counts, strict=True):
        if policy == "none":
            placement = Placement(list(range(32)), 8)
        else:
            placement = place(case.history, n_ranks=8, n_physical=n_physical, policy=policy, fallback=split)
        experts = placement.phy2log.tolist()
        for batch in batches:
            if split == "lp":
                planner = Planner.from_placement(placement)
                tokens = planner.solve(torch.from_numpy(batch)).quota.tolist()
            else:
                tokens = [0] * n_physical
                for e, n in enumerate(batch.tolist()):
                    slots = [p for p, held in enumerate(experts) if held == e]
                    for p in slots:
                        tokens[p] = n // len(slots)
                    for k in range(n % len(slots)):  # what is left over begins with copy e
                        tokens[slots[(e + k) % len(slots)]] += 1
            small = size <= MOST_DIRECT
            exchange, tile = ("direct", 64) if small else ("by_node", 128)
            times.append(slow_seconds(tokens, 8, SMALL, hardware, 4, exchange, 0.0, tile))
    return float(np.mean(times))


@pytest.mark.parametrize("size", [1, 256, 384])
def test_times_are_those_of_single_batches(skewed, size):
    loads, found = skewed
    assert {(o.redundant, o.policy, o.split) for o in found.options} == (
        {(0, "none", "even")}
        | {(level, policy, "even") for level in range(3) for policy in ("eplb", "eplb-distinct", "lp")}
        | {(level, policy, "lp") for level in (1, 2) for policy in ("eplb", "lp")}
    )
    for option in found.options:
        expected = slow_time(loads, option.redundant, option.policy, option.split, size)
        planner = 100e-6 if option.split == "lp" else 0.0
        assert found.at(option, size) == pytest.approx(expected + planner, rel=1e-9)


def scan(found: Study, level, hardware, planner):
    """The smallest size from which on the LP saves 1 %, by trying every size of the study against all larger ones."""
    i = {size: k for k, size in enumerate(found.sizes)}
    for size in found.sizes:
        every = True
        for larger in found.sizes[i[size] :]:
            lp = min(
                (o.seconds[hardware][i[larger]] for o in found.options if o.split == "lp" and o.redundant == level),
                default=np.inf,
            )
            even = min(
                o.seconds[hardware][i[larger]] for o in found.options if o.split == "even" and o.redundant <= level
            )
            every = every and lp + planner <= 0.99 * even
        if every:
            return size
    return None


def test_crossovers_are_those_of_a_scan(skewed):
    _, found = skewed
    seen = set()
    for level in (0, 1, 2):
        for hardware in HARDWARE:
            for factor in FACTORS:
                expected = scan(found, level, hardware, 100e-6 * factor)
                assert found.lp_pays_from(level, hardware, factor) == expected
                seen.add(expected)
    assert len(seen) > 4  # not always the same answer


def test_crossovers_of_times_counted_once_more(skewed):
    """The scan again, on times that the slow model counts batch by batch."""
    loads, found = skewed
    pays = []
    for size in (16, 64, 2048, 4096):
        lp = min(slow_time(loads, 2, policy, "lp", size) for policy in ("eplb", "lp")) + 100e-6
        even = min(
            slow_time(loads, level, policy, "even", size)
            for level in (0, 1, 2)
            for policy in ("none", "eplb", "eplb-distinct", "lp")
            if policy != "none" or level == 0
        )
        pays.append(lp <= 0.99 * even)
    runs = found.lp_pays_at(2)
    assert pays == [any(first <= size <= last for first, last in runs) for size in (16, 64, 2048, 4096)]


def test_runs_of_sizes_that_pay():
    rng = np.random.default_rng(0)
    for _ in range(200):
        n = int(rng.integers(1, 9))
        sizes = np.cumsum(rng.integers(1, 5, n)).tolist()
        without = rng.uniform(1, 2, n)
        using = without * rng.choice([0.5, 0.9899, 0.9901, 1.0, 1.5], n)
        runs = pays_at(sizes, using, without)
        inside = [size for size in sizes if any(a <= size <= b for a, b in runs)]
        assert inside == [s for s, u, w in zip(sizes, using, without, strict=True) if u <= (1 - WORTH) * w]
        for (_, end), (begin, _) in itertools.pairwise(runs):
            assert sizes.index(begin) > sizes.index(end) + 1  # otherwise they were one run


def test_a_slower_planner_never_pays_earlier(skewed):
    _, found = skewed
    for level in (1, 2):
        for hardware in HARDWARE:
            sizes = [found.lp_pays_from(level, hardware, factor) or 10**9 for factor in (0.0, *FACTORS, 10.0)]
            assert sizes == sorted(sizes)


# ---- that it says no, and yes


@pytest.mark.parametrize("model", sorted(MODELS))
def test_balanced_experts_need_nothing(model):
    loads = generated(MODELS[model], sigma=0, noise=0)
    found = study(model, "h200", 16, loads=loads, sizes=SOME, tokens=(64, 4096))
    for size in (64, 4096):
        advice = found.advice(size)
        assert (advice.option.redundant, advice.option.policy, advice.option.split) == (0, "none", "even")
        assert advice.saving == 0
        assert any(
            f"At {size:,} tokens per rank neither redundant slots nor an LP pay here" in s for s in found.sentences()
        )
    for level in found.levels():
        for hardware in HARDWARE:
            assert found.lp_pays_from(level, hardware, 0.5) is None
    assert any("no size up to 16,384 tokens per rank from which on the LP pays" in s for s in found.sentences())


@pytest.mark.parametrize("model", sorted(MODELS))
def test_a_token_per_rank_is_no_case_for_an_lp(model):
    found = study(model, "h200", 16, sizes=(), tokens=(1,))
    assert found.advice(1).option.split == "even"
    for level in found.levels():
        assert all(found.lp_pays_from(level, hardware) is None for hardware in HARDWARE)


def test_every_copy_in_use_reads_weights_again():
    """Balanced experts, some 16 tokens each: all are in use, and so are all their copies."""
    loads = generated(DEEPSEEK, sigma=0, noise=0)
    found = study(DEEPSEEK, "h200", 32, loads=loads, sizes=(), tokens=(64,))
    floors = []
    for level in (0, 1, 2, 4):
        option = found.best(level, "even", 64)
        floors.append(option.floor[0] * found.at(option, 64))
    reading = DEEPSEEK.expert_bytes / (4.8e12 * 0.75)
    assert floors == pytest.approx([8 * reading, 9 * reading, 10 * reading, 12 * reading], rel=0.02)
    times = [found.at(found.best(level, "even", 64), 64) for level in (0, 1, 2, 4)]
    assert times == sorted(times)
    assert "slower: copies cost it again" in found.sentences()[-2]


def test_large_batches_of_skewed_experts_are_a_case_for_an_lp():
    found = study(DEEPSEEK, "h200", 32, sizes=SOME, tokens=(8192,))
    advice = found.advice(8192)
    assert advice.option.split == "lp"
    assert advice.option.redundant > 0
    assert advice.saving > 0.1
    text = found.sentences()[0]
    level = advice.option.redundant
    assert f"{level} redundant slot" in text
    assert f"{level * 3 * 7168 * 2048 * 58 / 2**30:.1f} GiB" in text
    assert "an LP in every batch" in text


def test_what_is_advised_is_the_least_within_a_percent(skewed):
    _, found = skewed
    for size in found.sizes:
        advice = found.advice(size)
        fastest = min(found.at(o, size) for o in found.options)
        assert advice.seconds * 0.99 <= fastest
        for option in found.options:
            if (option.redundant, option.split == "lp") < (advice.option.redundant, advice.option.split == "lp"):
                assert found.at(option, size) * 0.99 > fastest


def test_every_output_says_that_the_planner_is_assumed(skewed):
    for found in (skewed[1], study(SMALL, "b200", 4, sizes=(), redundancy=(), tokens=(1,), planner_seconds=3e-5)):
        assert "is assumed (nothing of lplb has been measured on a GPU)" in found.sentences()[-1]
        assert found.as_dict()["assumed"]["planner_is_measured"] is False
    assert "30 µs" in found.sentences()[-1]
    assert "an LP has nothing to decide" in found.sentences()[-3]


# ---- loads


def test_counts_follow_the_shares():
    loads = generated(SMALL, seed=1)
    assert [case.history.shape for case in loads.cases] == [(32, 32)] * 4
    counts = loads.counts(4_000_000, 0)
    assert counts.shape == (4, 8, 32)
    assert (counts.sum(-1) == 4_000_000).all()
    shares = np.stack([case.share for case in loads.cases])
    assert shares.sum(-1) == pytest.approx(np.ones((4, 8)))
    assert np.abs(counts / 4e6 - shares).max() < 5 * np.sqrt(shares.max() / 4e6)
    assert np.array_equal(counts, loads.counts(4_000_000, 0))
    assert not np.array_equal(counts, loads.counts(4_000_000, 1))


def test_generated_loads_have_their_spread():
    wide, narrow = (generated(DEEPSEEK, sigma=sigma, noise=0.0) for sigma in (1.2, 0.4))
    for loads, sigma in ((wide, 1.2), (narrow, 0.4)):
        spread = np.log(np.concatenate([case.share for case in loads.cases])).std(-1)
        assert spread.mean() == pytest.approx(sigma, rel=0.1)
        assert f"sigma {sigma}" in loads.name


def test_layers_of_the_trace_stand_side_by_side():
    counts = scenes.trace().counts
    loads = recorded(DEEPSEEK)  # 256 experts: all four layers
    assert len(loads.cases) == 4
    assert "4 of them stand side by side" in loads.notes[0]
    for case, middle in zip(loads.cases, (32, 99, 165, 232), strict=True):
        batches = counts[middle : middle + 8].reshape(8, 256)
        assert np.allclose(case.share, batches / batches.sum(-1, keepdims=True))
        assert np.array_equal(case.history, counts[middle - 32 : middle].reshape(32, 256))
    half = recorded(MODELS["gpt-oss-120b"])  # 128: two layers each
    assert np.array_equal(half.cases[0].history, counts[:32, :2].reshape(32, 128))
    assert np.array_equal(half.cases[3].history, counts[200:232, 2:].reshape(32, 128))
    with pytest.raises(ValueError, match=r"64, 128, 192, 256 experts; kimi-k2 has 384"):
        recorded(MODELS["kimi-k2"])


def test_loads_of_a_user_are_cut_into_cases():
    rng = np.random.default_rng(0)
    loads = rng.integers(1, 100, (6, 100, 32))
    cut = profiles.profile(loads, SMALL, "mine")
    assert [case.history.shape for case in cut.cases] == [(32, 32)] * 4
    for case, layer, start in zip(cut.cases, (0, 1, 3, 4), (0, 20, 40, 60), strict=True):
        assert np.array_equal(case.history, loads[layer, start : start + 32])
        served = loads[layer, start + 32 : start + 40]
        assert np.allclose(case.share, served / served.sum(-1, keepdims=True))
    assert cut.notes == ["Of 6 layers 4 are looked at, spread evenly."]
    few = profiles.profile(loads[:1, :5], SMALL, "mine")
    assert few.cases[0].history.shape == (2, 32)
    assert few.cases[0].share.shape == (3, 32)
    one = profiles.profile(loads[:2, :1], SMALL, "mine")
    assert len(one.cases) == 2
    assert np.array_equal(one.cases[1].history, loads[1, :1])
    assert "as if nothing drifted" in one.notes[0]
    loads[0, 50, 7] = 100_000
    loads[0, :, 7] = 100_000
    assert "more than the 25.0% that a router with top-4" in profiles.profile(loads[:1], SMALL, "mine").notes[-1]


@pytest.mark.parametrize(
    ("loads", "error", "message"),
    [
        ([[1.0]], TypeError, "loads is a list"),
        (np.ones((2, 32)), ValueError, r"shape \[2, 32\]"),
        (np.ones((0, 2, 32)), ValueError, r"shape \[0, 2, 32\]"),
        (np.ones((1, 2, 31)), ValueError, "mine has 31 experts, allowed are those of small, 32"),
        (-np.ones((1, 2, 32)), ValueError, r"mine has -1.0 at \[0, 0, 0\]"),
        (np.full((1, 2, 32), np.nan), ValueError, "mine has nan"),
        (np.full((1, 2, 32), np.inf), ValueError, "mine has inf"),
        (np.zeros((1, 2, 32)), ValueError, "mine is 0 everywhere"),
        (
            np.ones((2, 2, 32)) * np.eye(2)[:, :, None],
            ValueError,
            "mine has in each of 2 batches a layer without tokens",
        ),
    ],
)
def test_bad_loads_by_value(loads, error, message):
    with pytest.raises(error, match=message):
        profiles.profile(loads, SMALL, "mine")


# ---- deployments


def test_groups_and_room():
    found = study(DEEPSEEK, "h200", 320, sizes=(), tokens=(4,), redundancy=(0,))
    assert (found.group_size, found.n_nodes) == (80, 40)
    assert any("do not divide by 320 ranks" in note and "leaves 64 for copies" in note for note in found.notes)
    tight = study(DEEPSEEK, "h100", 8, sizes=(), tokens=(4,), redundancy=(0, 1))
    assert tight.levels() == [0]  # 256 experts of 8 ranks in 58 layers: 82 GB of 80
    assert any("take 82 GB of each rank's 80" in note for note in tight.notes)
    assert any("no room for them: 1 redundant slots" in note for note in tight.notes)
    distinct = study(SMALL, "h200", 2, sizes=(), tokens=(4,), redundancy=(16, 17))
    assert distinct.levels() == [0, 16]  # with 17 a rank would hold an expert twice


def test_a_source_of_exchange_is_taken_as_asked():
    times = {}
    for exchange in ("auto", "direct", "by_node"):
        found = study(SMALL, "h200", 8, sizes=(), tokens=(256, 384), redundancy=(), n_nodes=4, exchange=exchange)
        times[exchange] = found.options[0].seconds["h200"].tolist()
    assert times["auto"] == [times["direct"][0], times["by_node"][1]]
    assert times["direct"][1] > times["by_node"][1]


BAD = [
    ({"model": "gpt-2"}, ValueError, "'gpt-2'.*'kimi-k2'"),
    ({"model": 3}, TypeError, "model is a int"),
    ({"hardware": "tpu"}, ValueError, "'tpu'"),
    ({"hardware": None}, TypeError, "hardware is a NoneType"),
    ({"n_ranks": 0}, ValueError, "n_ranks is 0"),
    ({"n_ranks": 8.0}, TypeError, "n_ranks is 8.0"),
    ({"n_ranks": 12}, ValueError, "n_ranks, 12, is up to 8 or a multiple of 8"),
    ({"n_ranks": 131, "n_nodes": 1}, ValueError, "n_ranks is 131"),
    ({"n_nodes": 3}, ValueError, "n_ranks is 8.*n_nodes = 3"),
    ({"group_size": 3}, ValueError, "n_ranks is 8.*group_size = 3"),
    ({"group_size": 129}, ValueError, "group_size is 129"),
    ({"loads": "trace"}, TypeError, "loads is a str"),
    ({"loads": generated(DEEPSEEK)}, ValueError, "loads has 256 experts, allowed are small's 32"),
    ({"redundancy": (-1,)}, ValueError, "redundancy is -1"),
    ({"tokens": ()}, ValueError, "tokens is empty"),
    ({"tokens": (0,)}, ValueError, "tokens is 0"),
    ({"sizes": (1 << 26,)}, ValueError, f"sizes is {1 << 26}, allowed is 1 to {(2**31 - 1) // 32}"),
    ({"planner_seconds": -1.0}, ValueError, "planner_seconds is -1.0"),
    ({"planner_seconds": float("nan")}, ValueError, "planner_seconds is nan"),
    ({"planner_seconds": "1"}, TypeError, "planner_seconds is '1'"),
    ({"exchange": "post"}, ValueError, "'post'.*'auto'"),
    ({"solver": "simplex"}, ValueError, "'simplex'"),
    ({"seed": -1}, ValueError, "seed is -1"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input_by_value(change, error, message):
    with pytest.raises(error, match=message):
        study(**{"model": SMALL, "hardware": "h200", "n_ranks": 8, "sizes": (), "tokens": (1,), **change})


# ---- outputs

SCHEMA = {
    "format": str,
    "version": int,
    "model": dict,
    "hardware": dict,
    "ranks": int,
    "nodes": int,
    "group_size": int,
    "loads": {"name": str, "notes": list, "seed": int},
    "assumed": {
        "planner_seconds": float,
        "planner_is_measured": bool,
        "efficiency": float,
        "exchange": str,
        "solver": str,
        "worth": float,
    },
    "tokens_per_rank": list,
    "options": [
        {
            "redundant_slots": int,
            "memory_gib": float,
            "policy": str,
            "split": str,
            "seconds": list,
            "imbalance": list,
            "floor_part": list,
        }
    ],
    "advice": [
        {
            "tokens_per_rank": int,
            "redundant_slots": int,
            "policy": str,
            "split": str,
            "seconds": float,
            "seconds_of_nothing": float,
            "saving": float,
        }
    ],
    "lp_pays_from": [
        {"redundant_slots": int, "hardware": str, "planner_seconds": float, "tokens_per_rank": (int, type(None))}
    ],
    "sentences": list,
}


def check_schema(value, schema):
    if isinstance(schema, dict):
        assert list(value) == list(schema)
        for key, part in schema.items():
            check_schema(value[key], part)
    elif isinstance(schema, list):
        assert value
        for item in value:
            check_schema(item, schema[0])
    else:
        assert isinstance(value, schema)


def test_json_has_a_stable_shape(capsys):
    arguments = ["advise", "--model", "gpt-oss-120b", "--ranks", "8", "--tokens", "32", "--redundancy", "0", "1"]
    assert cli.main([*arguments, "--json"]) == 0
    text = capsys.readouterr().out
    content = json.loads(text, parse_constant=pytest.fail)  # no NaN, no Infinity
    check_schema(content, SCHEMA)
    assert content["format"] == "lplb.advice"
    assert content["version"] == 1
    assert content["tokens_per_rank"] == list(SIZES)  # 32 is one of them
    sizes = len(SIZES)
    assert all(len(option["seconds"]) == sizes for option in content["options"])
    assert len(content["lp_pays_from"]) == 2 * 3 * 3
    assert cli.main([*arguments, "--json"]) == 0
    assert capsys.readouterr().out == text  # the same again


def test_the_command_prints_tables_and_sentences(capsys, monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", "140")
    arguments = ["advise", "--model", "qwen3-235b-a22b", "--ranks", "8", "--load", "trace", "--hardware", "h100"]
    assert cli.main([*arguments, "--tokens", "8", "2048", "--planner-seconds", "6e-5"]) == 0
    text = capsys.readouterr().out
    for part in (
        "qwen3-235b-a22b",
        "8 × h100",
        "1 node,",
        "router trace",
        "8 tokens per rank",
        "2,048 tokens per rank",
    ):
        assert part in text
    for part in ("30 µs", "60 µs", "120 µs", "3.3 GiB", "is assumed", "side by side"):
        assert part in text


def test_the_command_says_what_is_wrong(capsys, monkeypatch, tmp_path):
    base = ["advise", "--model", "kimi-k2", "--ranks", "8", "--json"]
    assert cli.main([*base, "--load", "trace"]) == 1
    assert "kimi-k2 has 384" in capsys.readouterr().err
    assert cli.main([*base, "--sigma", "-1"]) == 1
    assert "sigma is -1" in capsys.readouterr().err
    assert cli.main([*base, "--tokens", "0"]) == 1
    assert "tokens is 0" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        cli.main(["advise", "--model", "gpt-2", "--ranks", "8"])
    assert caught.value.code == 2
    monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.setitem(sys.modules, "rich", None)
    assert cli.main(["advise", "--model", "kimi-k2", "--ranks", "8"]) == 2
    assert "lplb[demo]" in capsys.readouterr().err


def test_the_command_names_its_options(capsys, tmp_path):
    base = ["advise", "--model", "gpt-oss-120b", "--json", "--tokens", "64", "--redundancy", "0"]
    assert cli.main([*base, "--ranks", "12"]) == 1
    assert "--ranks is 12, allowed without --nodes is up to 8 or a multiple of 8" in capsys.readouterr().err
    assert cli.main([*base, "--ranks", "8", "--load", ""]) == 1
    assert "--load is '', allowed is lognormal, trace, or a file" in capsys.readouterr().err
    assert cli.main([*base, "--ranks", "8", "--load", "trace", "--load", "a.npy"]) == 1
    assert "loads is 'trace' and others, allowed is 'trace' alone" in capsys.readouterr().err


def test_several_files_follow_each_other(capsys, tmp_path):
    loads = np.random.default_rng(0).integers(1, 100, (50, 2, 128))  # batches first
    paths = [str(tmp_path / name) for name in ("a.npy", "b.npy")]
    np.save(paths[0], loads[:20])
    np.save(paths[1], loads[20:])
    found = loads_by_name(paths, MODELS["gpt-oss-120b"], first_axis="batches")
    assert found.name == ", ".join(paths)
    assert np.array_equal(found.cases[0].history, loads[:32, 0])
    base = ["advise", "--model", "gpt-oss-120b", "--ranks", "8", "--json", "--tokens", "64", "--redundancy", "0"]
    several = [part for path in paths for part in ("--load", path)]
    assert cli.main([*base, *several, "--first-axis", "batches"]) == 0
    assert json.loads(capsys.readouterr().out)["loads"]["name"] == ", ".join(paths)


def test_runs_that_end_with_the_exchange_say_so(skewed):
    _, found = skewed
    i = [found.sizes.index(size) for size in (192, 256)]
    planned = 100e-6
    for saved, exchange, said in ((i, "auto", True), (i, "by_node", False), (i[:1], "auto", False)):
        times = {"none": np.full(len(found.sizes), 1e-3), "lp": np.full(len(found.sizes), 1e-3)}
        times["lp"][[*saved, *range(found.sizes.index(1024), len(found.sizes))]] = 0.5e-3
        options = [
            replace(found.options[0], redundant=0, policy="none", split="even", seconds={"h200": times["none"]}),
            replace(found.options[0], redundant=1, policy="lp", split="even", seconds={"h200": times["none"]}),
            replace(found.options[0], redundant=1, policy="lp", split="lp", seconds={"h200": times["lp"] - planned}),
        ]
        sentence = replace(found, options=options, exchange=exchange, planner_seconds=planned).sentences()[-3]
        assert f"(and at 192{' to 256' if len(saved) == 2 else ''}" in sentence
        assert ("ends where the model's exchange changes, at 256 tokens per rank" in sentence) == said


def test_nodes_hold_at_most_8_ranks():
    for n in range(1, 200):
        even = [nodes for nodes in range(1, n + 1) if n % nodes == 0 and n // nodes <= 8]
        assert nodes_of(n) == min(even)


def test_progress_comes_late_and_goes_to_the_end():
    ticks = []
    study(SMALL, "h200", 8, sizes=(), tokens=(1,), redundancy=(0, 1), on_progress=lambda *at: ticks.append(at))
    assert ticks[0] == (0, 11)
    assert ticks[-1] == (11, 11)
    assert [done for done, _ in ticks] == sorted({done for done, _ in ticks})
    for after in (0.0, 100.0):
        with late_progress(after) as tick:
            for done in range(3):
                tick(done, 2)


def test_own_models_and_hardware():
    gpu = replace(HARDWARE["h200"], name="mine", efficiency=0.5)
    found = study(SMALL, gpu, 8, sizes=(), tokens=(512,))
    assert list(found.options[0].seconds) == ["mine", "h100", "h200", "b200"]
    for option in found.options:
        assert option.seconds["mine"] == pytest.approx(option.seconds["h200"] * 1.5)
    assert "50% of its data sheet" in found.sentences()[-1]


def test_loads_by_name(tmp_path, capsys):
    assert loads_by_name("lognormal", SMALL, sigma=0.5).name == generated(SMALL, sigma=0.5).name
    assert loads_by_name("trace", DEEPSEEK).name == "the recorded router trace"
    loads = np.random.default_rng(0).integers(1, 100, (3, 50, 128))
    loads[0] = 0  # a dense layer
    loads[2, 4] = 0
    path = tmp_path / "loads.npy"
    np.save(path, loads)
    model = MODELS["gpt-oss-120b"]
    found = loads_by_name(str(path), model)
    assert found.notes == [
        "1 of 3 layers have no tokens and are left out.",
        "1 of 50 batches have a layer without tokens and are left out.",
    ]
    kept = np.delete(loads[1:], 4, axis=1)
    assert np.array_equal(found.cases[0].history, kept[0, :32])
    assert np.array_equal(found.cases[3].history, kept[1, 9:41])
    base = ["advise", "--model", "gpt-oss-120b", "--ranks", "4", "--tokens", "64", "--json", "--load"]
    assert cli.main([*base, str(path)]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["loads"]["name"] == str(path)
    assert content["loads"]["notes"][:2] == found.notes
    assert cli.main(["advise", "--model", "kimi-k2", "--ranks", "4", "--json", "--load", str(path)]) == 1
    assert re.search("128 experts, allowed.*384", capsys.readouterr().err)
    assert cli.main([*base, str(tmp_path / "none.npy")]) == 1
    assert "none.npy" in capsys.readouterr().err
    path.write_bytes(path.read_bytes()[:1000])
    assert cli.main([*base, str(path)]) == 1
    assert "loads.npy" in capsys.readouterr().err
