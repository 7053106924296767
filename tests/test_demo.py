"""The demo: what it reports, that its checks catch wrong plans, and the command line around it."""

import sys
from dataclasses import replace

import numpy as np
import pytest

import lplb
from lplb import Placement, Planner, cli

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from lplb import replay
from lplb.placement import split_evenly
from lplb.trace import load_trace

N_BATCHES = replay.REFRESH + 2  # one refresh


@pytest.fixture(scope="module")
def trace():
    return load_trace()


@pytest.fixture(scope="module", params=[8, 32])
def result(request, trace):
    return replay.replay_trace(trace, request.param, N_BATCHES)


def test_loads_without_balancing_are_the_traces(result, trace):
    per_rank = trace.n_experts // result.n_ranks
    for b, i in np.ndindex(N_BATCHES, trace.indices.shape[1]):
        expected = np.bincount(trace.indices[b, i].ravel() // per_rank, minlength=result.n_ranks)
        assert result.loads[replay.NONE][b, i].tolist() == expected.tolist()


def test_every_method_serves_every_token(result, trace):
    choices = trace.indices[0, 0].size
    for loads in result.loads.values():
        assert (loads.sum(-1) == choices).all()


def test_bound_then_lp_then_even_split(result):
    most = {name: loads.max(-1) for name, loads in result.loads.items()}
    assert (result.bound <= most[replay.LP]).all()
    assert (most[replay.LP] <= np.ceil(result.bound - 1e-6)).all()  # whole tokens cost less than one
    assert (most[replay.ON_EPLB] <= most[replay.EVEN]).all()
    assert result.imbalance(replay.LP).mean() <= result.imbalance(replay.ON_EPLB).mean()
    assert result.imbalance(replay.LPLB).mean() < result.imbalance(replay.NONE).mean()


def test_moved_and_times(result):
    choices = result.loads[replay.NONE].sum(-1)
    assert (result.moved[replay.NONE] == 0).all()
    for method in replay.METHODS[1:]:
        assert (result.moved[method] > 0).all()
        assert (result.moved[method] < choices).all()
    for micros in result.micros.values():
        assert micros.size == choices.size * result.n_ranks
        assert (micros > 0).all()


def test_placements_never_look_ahead(trace):
    changed = replace(trace, indices=trace.indices.copy())
    changed.indices[replay.REFRESH :] = trace.n_experts - 1 - changed.indices[replay.REFRESH :]
    one, other = (replay.replay_trace(t, 8, replay.REFRESH + 1).loads[replay.EVEN] for t in (trace, changed))
    assert (one[: replay.REFRESH] == other[: replay.REFRESH]).all()
    assert (one[replay.REFRESH :] != other[replay.REFRESH :]).any()


def test_split_evenly_differs_by_one_token_at_most():
    placement = Placement([0, 1, 0, 2, 0, 1, 2, 3], 4)
    counts = np.array([10, 7, 0, 5])
    quota = split_evenly(placement, counts)
    for expert, count in enumerate(counts):
        share = quota[placement.phy2log.numpy() == expert]
        assert share.sum() == count
        assert share.max() - share.min() <= 1


@pytest.mark.parametrize("n_ranks", [0, 7, 64])
def test_refuses_other_rank_counts(trace, n_ranks):
    with pytest.raises(ValueError, match=f"n_ranks is {n_ranks}, allowed"):
        replay.replay_trace(trace, n_ranks, 1)


@pytest.mark.parametrize("n_batches", [0, -1, 241])
def test_refuses_other_batch_counts(trace, n_batches):
    with pytest.raises(ValueError, match=f"n_batches is {n_batches}, allowed"):
        replay.replay_trace(trace, 8, n_batches)


# ---- the checks


def swap_experts(physical):
    """Leave all loads as they are, but serve two choices of a token by each other's experts."""
    first, second = physical[0, 0].item(), physical[0, 1].item()
    physical[0, 0], physical[0, 1] = second, first


def other_copy(planner, physical):
    """Serve one choice by another copy of its expert."""
    placement = planner.placement
    for place in np.ndindex(*physical.shape):
        slots = placement.log2phy[placement.phy2log[physical[place]].long()].tolist()
        others = [slot for slot in slots if slot not in (-1, physical[place].item())]
        if others:
            physical[place] = others[0]
            return


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (lambda planner, physical: swap_experts(physical), "asked for expert"),
        (other_copy, "tokens, rank 0 planned"),
        (lambda planner, physical: physical[0].fill_(-1), "go from -1"),
        (lambda planner, physical: physical[0].fill_(80), "to 80, expected 0 to 79"),
    ],
    ids=["other expert", "other copy", "masked", "no slot"],
)
def test_a_corrupted_index_is_caught(trace, monkeypatch, corrupt, message):
    run = Planner.run

    def corrupted(self, idx, counter, n_sms=None):
        physical = run(self, idx, counter, n_sms)
        if self._exchange.rank == 3:
            corrupt(self, physical)
        return physical

    monkeypatch.setattr(Planner, "run", corrupted)
    with pytest.raises(replay.CheckFailed, match=message):
        replay.replay_trace(trace, 8, 1)


def test_a_counter_left_alone_is_caught(trace, monkeypatch):
    run = Planner.run
    monkeypatch.setattr(Planner, "run", lambda self, idx, counter: run(self, idx, None))
    with pytest.raises(replay.CheckFailed, match="counters were raised by"):
        replay.replay_trace(trace, 8, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plan: replace(plan, quota=plan.quota.flip(0)), "rank 5 planned"),
        (lambda plan: replace(plan, rank_load=plan.rank_load + 1), "planned rank loads"),
        (lambda plan: replace(plan, lower_bound=plan.lower_bound * 2), "below lower_bound"),
    ],
    ids=["quota", "rank_load", "lower_bound"],
)
def test_a_plan_of_one_rank_that_differs_is_caught(trace, monkeypatch, change, message):
    last_plan = Planner.last_plan.fget
    monkeypatch.setattr(
        Planner,
        "last_plan",
        property(lambda self: change(last_plan(self)) if self._exchange.rank == 5 else last_plan(self)),
    )
    with pytest.raises(replay.CheckFailed, match=message):
        replay.replay_trace(trace, 8, 1)


# ---- the command line


def test_cli_prints_the_table_and_writes_the_picture(tmp_path, capsys):
    path = tmp_path / "loads.png"
    assert cli.main(["demo", "--ranks", "8", "16", "--batches", "2", "--picture", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    for words in (
        "8 ranks, 80 slots",
        "16 ranks, 96 slots",
        *replay.METHODS,
        "certified lower bound",
        "Checked",
        str(path),
    ):
        assert words in printed


def test_cli_fails_when_a_check_does(monkeypatch, tmp_path, capsys):
    def check(*_):
        raise replay.CheckFailed("rank 1 is wrong")

    monkeypatch.setattr(replay, "check", check)
    assert cli.main(["demo", "--ranks", "8", "--batches", "1", "--picture", str(tmp_path / "a.png")]) == 1
    assert "rank 1 is wrong" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batches", "0"], "n_batches is 0"),
        (["--picture", "no/such/folder/a.png"], "no/such/folder does not exist"),
        (["--picture", "a.txt"], "'a.txt', allowed is one that ends in"),
    ],
    ids=["batches", "folder", "format"],
)
def test_cli_names_what_is_wrong(arguments, message, capsys):
    assert cli.main(["demo", "--ranks", "8", *arguments]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["rich", "matplotlib"])
def test_cli_says_how_to_get_what_is_missing(monkeypatch, capsys, missing):
    for name in [name for name in sys.modules if name.partition(".")[0] == missing] + [missing]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "lplb.demo")
    monkeypatch.delattr(lplb, "demo")
    assert cli.main(["demo"]) == 2
    assert 'pip install "lplb[demo]"' in capsys.readouterr().err


def test_cli_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.strip() == f"lplb {lplb.__version__}"


@pytest.mark.parametrize("arguments", [[], ["demo", "--ranks", "7"], ["nothing"]])
def test_cli_refuses_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage: lplb" in capsys.readouterr().err
