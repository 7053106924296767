"""Off the critical path: exchanges that overlap, plans that are kept and map again, on both backends."""

import os
import threading

import numpy as np
import pytest
import torch
import torch.distributed as dist
from cases import ranks_per_node
from pretend_cuda import pretend
from reference import split_reference
from test_assign import fixed_shares, go_on
from test_bad_input import refused
from test_distributed import batch, counts_of, on_ranks, ring_phy2log, ring_planner

from lplb import Placement, Plan, Planner, topology

N_LOGICAL = 64


@pytest.fixture(params=["cpu", "pretended"])
def backend(request, monkeypatch):
    if request.param == "pretended":
        pretend(monkeypatch.setattr)
    return request.param


def cube(**settings):
    return Planner(topology.cube(), 80, N_LOGICAL, 8, **settings)


def mapped(idx, phy2log, shares_of):
    """Token by token; `shares_of(expert)` is the number of its first token and its copies' weights."""
    phy2log, flat = np.asarray(phy2log), idx.numpy().ravel()
    seen, out = {}, np.full(flat.size, -1)
    for i, expert in enumerate(flat.tolist()):
        if expert < 0:
            continue
        first, weights = shares_of(expert)
        out[i] = np.flatnonzero(phy2log == expert)[go_on(seen.setdefault(expert, first), weights)]
        seen[expert] += 1
    return out.reshape(idx.shape)


def by_plan(idx, plan):
    """As a planner without a group maps a batch by the plan of an earlier one."""
    phy2log, quota = np.array(plan.rules.phy2log), plan.quota.numpy()

    def shares_of(expert):
        weights = quota[phy2log == expert].tolist()
        return 0, weights if any(weights) else [1] * len(weights)

    return mapped(idx, phy2log, shares_of)


def test_a_batch_follows_the_plan_of_the_batch_before(backend):
    planner, other = cube(), cube()
    batches = [batch(seed, (50 * seed, 3), N_LOGICAL) for seed in range(5)]
    counter = torch.zeros(1, dtype=torch.int64)
    plan = other.solve(torch.zeros(N_LOGICAL, dtype=torch.int64))
    for number, idx in enumerate(batches):
        physical, used = planner.run(idx, counter, lag=1, return_plan=True)
        assert np.array_equal(physical, by_plan(idx, plan))
        assert torch.equal(used.quota, plan.quota)
        plan = other.solve(torch.from_numpy(counts_of(idx, N_LOGICAL)))
        assert torch.equal(planner.last_plan.quota, plan.quota)
        assert counter.item() == number + 1
    # without lag it is the batch's own plan again, and the next lagged batch follows that
    assert np.array_equal(planner.run(batches[2], None), other.run(batches[2], None))
    assert np.array_equal(planner.run(batches[3], None, lag=1), by_plan(batches[3], other.last_plan))


def test_a_kept_plan_maps_again(backend):
    planner = cube()
    batches = [batch(seed, (200, 2), N_LOGICAL) for seed in range(3)]
    kept = [planner.run(idx, None, return_plan=True) for idx in batches]
    for idx, (physical, plan) in zip(batches, kept, strict=True):
        assert torch.equal(planner.assign(idx, plan), physical)
        assert torch.equal(planner.assign(idx.int(), plan), physical.int())
    planner.update_redundancy_mapping(torch.arange(N_LOGICAL))
    with refused(ValueError, "plan was made for another placement", "allowed is a plan of this planner"):
        planner.assign(batches[0], kept[0][1])
    physical, plan = planner.run(batches[0], None, return_plan=True)
    assert torch.equal(planner.assign(batches[0], plan), physical)
    solved = planner.solve(torch.from_numpy(counts_of(batches[0], N_LOGICAL)))
    assert torch.equal(planner.assign(batches[0], solved), physical)


def test_a_plan_of_solve_says_that_it_has_no_sources(backend):
    planner = cube()
    plan = planner.solve(torch.ones(N_LOGICAL))
    with refused(ValueError, "the plan has no counts", "allowed is one of a planner with a group"):
        plan.traffic()


def test_bad_arguments(backend):
    planner = cube()
    idx = torch.zeros(3, dtype=torch.int64)
    counter = torch.zeros(1, dtype=torch.int32)
    for lag, error in ((2, ValueError), (-1, ValueError), (True, TypeError), ("1", TypeError), (None, TypeError)):
        with refused(error, f"lag is {lag!r}", "allowed is"):
            planner.run(idx, counter, lag=lag)
    plan = planner.solve(torch.ones(2, N_LOGICAL))
    with refused(ValueError, "plan is for loads of shape [2]", "allowed is the plan of one load"):
        planner.assign(idx, plan)
    with refused(TypeError, "plan is a Tensor", "allowed is an lplb.Plan"):
        planner.assign(idx, plan.quota)
    one = planner.solve(torch.ones(N_LOGICAL))
    with refused(TypeError, "idx has dtype torch.float32", "allowed"):
        planner.assign(idx.float(), one)
    flow = Planner.from_placement(Placement(range(16), 8)).solve(torch.ones(16))
    with refused(ValueError, "plan was made for another placement", "allowed"):
        planner.assign(idx, flow)
    for settings, shown, allowed, error in (
        ({"split": "own"}, "split is 'own'", "allowed is 'local_first', 'plain' or None", ValueError),
        ({"min_tokens": -1}, "min_tokens is -1", "allowed is 0 to", ValueError),
        ({"min_tokens": 2.5}, "min_tokens is 2.5", "allowed is an int", TypeError),
    ):
        with refused(error, shown, allowed):
            cube(**settings)
    assert counter.item() == 0


def test_bad_indices_are_refused_before_a_lagged_exchange():
    planner = cube()
    good = batch(0, (80, 2), N_LOGICAL)
    planner.run(good, None)
    plan = planner.last_plan
    with refused(ValueError, "idx has 64 at flat position 1", "allowed is -1 (masked) or 0 to n_logical - 1 = 63"):
        planner.run(torch.tensor([3, 64]), None, lag=1)
    assert torch.equal(planner.last_plan.quota, plan.quota)
    assert np.array_equal(planner.run(good, None, lag=1), by_plan(good, plan))


class Slow:
    """An exchange of one rank that waits until it is let go."""

    rank, size = 0, 1

    def __init__(self):
        self.go = threading.Event()
        self.error = None

    def gather(self, row, table):
        assert self.go.wait(30)
        if self.error is not None:
            raise self.error
        table[0] = row


def test_a_lagged_batch_does_not_wait_for_its_exchange():
    placement = Placement(range(4), 1)
    ranks = Slow()
    ranks.go.set()
    planner = Planner.from_placement(placement, group=ranks)
    ranks.go.clear()
    idx, counter = torch.tensor([0, 3, 3, -1]), torch.zeros(1, dtype=torch.int64)
    assert planner.run(idx, counter, lag=1).tolist() == [0, 3, 3, -1]  # the exchange is still waiting
    assert counter.item() == 0
    ranks.go.set()
    assert planner.last_plan.quota.tolist() == [1, 0, 0, 2]  # waits for it
    assert counter.item() == 1
    ranks.error = RuntimeError("a rank is lost")
    planner.run(torch.tensor([1]), counter, lag=1)
    assert planner.last_plan.quota.tolist() == [1, 0, 0, 2]
    assert planner.solve(torch.tensor([5, 0, 0, 0])).quota.tolist() == [5, 0, 0, 0]  # local calls do not consume it
    for lag in (0, 1):
        ranks.error = None
        with pytest.raises(RuntimeError, match="a rank is lost"):
            planner.run(idx, counter, lag=lag)
        assert planner.last_plan is not None  # the exchange of that call is over
        ranks.error = RuntimeError("a rank is lost")
        planner.run(torch.tensor([1]), counter, lag=1)
        assert planner.last_plan is not None
    ranks.error = None
    with pytest.raises(RuntimeError, match="a rank is lost"):
        planner.run(idx, counter)
    assert planner.run(idx, counter, lag=1).tolist() == [0, 3, 3, -1]


def test_a_compiled_call_may_lag():
    planner, eager = cube(), cube()
    compiled = torch.compile(lambda idx: planner.run(idx + 0, None, lag=1) * 1, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        idx = batch(seed, (100, 2), N_LOGICAL)
        assert torch.equal(compiled(idx), eager.run(idx, None, lag=1))
    counter = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(Exception, match="avail_counter is given with lag=1"):
        torch.compile(lambda idx: planner.run(idx, counter, lag=1), fullgraph=True, backend="eager")(idx)
    with pytest.raises(Exception, match="return_plan is True, allowed in compiled code is False"):
        torch.compile(lambda idx: planner.run(idx, None, return_plan=True)[0], fullgraph=True, backend="eager")(idx)


# Groups of processes


def lagged_calls(rank, size, device, node):
    if device == "pretended":
        pretend()
    planner = ring_planner(size, dist.group.WORLD, ranks_per_node=node)
    rows = []
    for call in range(5):
        tokens = 0 if (call + rank) % 3 == 0 else 40 * (1 + rank)  # some ranks idle now and then
        idx = batch([call, rank], (tokens, 2), 4 * size)
        counter = torch.zeros(1, dtype=torch.int64)
        physical, plan = planner.run(idx, counter, lag=1, return_plan=True)
        again = planner.assign(idx, plan)
        rows.append((idx, physical, plan, again))
    return rows, planner.last_plan


@pytest.mark.parametrize(("size", "node"), [(2, 1), (4, 2)])
@pytest.mark.parametrize("device", ["cpu", "pretended"])
def test_ranks_follow_the_exchange_before(size, node, device, tmp_path):
    results = on_ranks(size, tmp_path, lagged_calls, size, device, node)
    phy2log, n_logical = np.array(ring_phy2log(size)).ravel(), 4 * size
    before = np.zeros((size, n_logical), dtype=np.int64)
    for call in range(5):
        rows = [rows[call] for rows, _ in results]
        quota = rows[0][2].quota.numpy()
        shares = split_reference(before, phy2log, quota, node)
        for rank, (idx, physical, plan, again) in enumerate(rows):
            assert np.array_equal(plan.counts, before)
            assert np.array_equal(plan.quota, quota)

            def shares_of(expert, rank=rank, before=before, quota=quota, shares=shares):
                copies = np.flatnonzero(phy2log == expert)
                if before[:, expert].sum() == 0:
                    return rank, fixed_shares(phy2log, size, node, rank, expert)
                if before[rank, expert] == 0:
                    return int(before[:rank, expert].sum()), quota[copies].tolist()
                return 0, shares[rank, copies].tolist()

            assert np.array_equal(physical, mapped(idx, phy2log, shares_of))
            assert torch.equal(again, physical)
        before = np.stack([counts_of(idx, n_logical) for idx, *_ in rows])
    for _, plan in results:
        assert np.array_equal(plan.counts, before)


def faults_of_lagged_calls(rank):
    """What each call returned or raised; in call 2 rank 1 gives floats, in call 5 it does not lag."""
    planner = ring_planner(3, dist.group.WORLD)
    record = []
    for call in range(8):
        idx = batch([call, rank], 60, 12)
        given = idx.float() if (call, rank) == (2, 1) else idx
        try:
            record.append(planner.run(given, None, lag=0 if (call, rank) == (5, 1) else 1))
        except (TypeError, ValueError) as error:
            record.append(f"{type(error).__name__}: {error}")
    return record


def test_what_goes_wrong_in_a_lagged_exchange_is_raised_by_all_in_the_next_call(tmp_path):
    records = on_ranks(3, tmp_path, faults_of_lagged_calls)
    for call in range(8):
        got = [record[call] for record in records]
        wrong = [isinstance(result, str) for result in got]
        if call == 2:
            assert wrong == [False, True, False]
            assert got[1].startswith("TypeError: idx has dtype torch.float32")
        elif call == 3:  # rank 1 has raised it already; the others give no tokens
            assert wrong == [True, False, True]
            for text in (got[0], got[2]):
                assert text.startswith(
                    "TypeError: rank 1 refused its input, so no rank goes on: idx has dtype torch.flo"
                )
        elif call == 5:
            assert wrong == [False, True, False]
            assert got[1].startswith(
                "ValueError: rank 1 has another placement or other settings than rank 0, or called"
            )
        elif call == 6:
            assert wrong == [True, False, True]
        else:
            assert wrong == [False] * 3, (call, got)


def first_call_with_and_without_lag(rank):
    planner = ring_planner(2, dist.group.WORLD)
    try:
        planner.run(batch(rank, 60, 8), None, lag=rank)
    except ValueError as error:
        return [str(error), planner.run(batch(rank, 60, 8), None, lag=1)]
    return ["nothing raised"]


def test_ranks_that_disagree_about_lag_are_refused(tmp_path):
    for message, after in on_ranks(2, tmp_path, first_call_with_and_without_lag):
        assert "rank 1 has another placement or other settings than rank 0, or called another method" in message
        assert after.shape == (60,)


def two_layers_and_a_refusal(rank):
    """Two planners of one group lag in turn and share thread and group; what is refused leaves the last plan whole."""
    planners = [ring_planner(2, dist.group.WORLD) for _ in range(2)]
    for call in range(3):
        for number, planner in enumerate(planners):
            planner.run(batch([call, number, rank], (30, 2), 8), None, lag=1)
    late = ring_planner(2, dist.group.WORLD)  # made while exchanges are under way
    late.run(batch([9, rank], (30, 2), 8), None)
    plans = [planner.last_plan for planner in planners]
    for planner in (*planners, late):
        kept = planner.last_plan
        with pytest.raises(ValueError, match="idx has 99" if rank else "rank 1 refused its input"):
            planner.run(torch.tensor([99 if rank else 1]), None)
        assert torch.equal(planner.last_plan.counts, kept.counts)
        assert planner.last_plan.traffic() == kept.traffic()
    planners[0].update_redundancy_mapping(torch.arange(8))  # its new backend goes on in the same background
    for call in range(2):
        for number, planner in enumerate(planners):
            planner.run(batch([call, number, rank], (30, 2), 8), None, lag=1)
    threads = [thread.name for thread in threading.enumerate()].count("lplb")
    pid = os.fork()
    if pid == 0:  # what the parent has in the background is not the child's
        planner = cube()
        planner.run(torch.tensor([3]), None, lag=1)
        os._exit(0 if planner.last_plan.quota.sum() == 1 else 1)
    return plans, threads, os.waitpid(pid, 0)[1]


def test_planners_of_a_group_share_their_background(tmp_path):
    results = on_ranks(2, tmp_path, two_layers_and_a_refusal)
    for plans, threads, ended in results:
        assert threads == 1
        assert ended == 0
        for number, plan in enumerate(plans):
            counts = [counts_of(batch([2, number, rank], (30, 2), 8), 8) for rank in range(2)]
            assert np.array_equal(plan.counts, np.stack(counts))
            assert np.array_equal(plan.tokens_by_source().sum(0), plan.quota)


def test_the_default_node():
    planner = Planner(topology.ring(4), 20, 16, 4)
    assert planner.ranks_per_node == ranks_per_node(4)
    assert planner.split == "plain"
    assert isinstance(planner.solve(torch.ones(16)), Plan)
