"""Faults of the exchange: calls that cross, threads that race, ranks that are idle, that die or that do not come."""

import os
import re
import signal
import threading
import time
import traceback
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from cases import ranks_per_node
from pretend_cuda import pretend
from reference import assign_reference
from test_distributed import PROCESSES, batch, call, on_ranks, ring_phy2log, ring_planner

from lplb import Placement, Planner
from lplb.exchange import Distributed, Known, Local, number_planner

WIDE = 150  # logical experts of a planner whose rows are wider than those of the others

CROSSED = "another placement or other settings than rank 0, or called another method, or another planner of the group"


def wide_planner():
    """Two ranks: half of the experts on each, and expert 0 on both."""
    half = WIDE // 2
    phy2log = [*range(half), WIDE - 1, *range(half, WIDE), 0]
    return Planner.from_placement(Placement(phy2log, 2), group=dist.group.WORLD)


# Calls of two planners that come in another order on another rank


def crossings(group, idx):
    """Pairs of collective calls, by name; and two planners to see that all is well afterwards."""
    first, second, wide = ring_planner(2, group), ring_planner(2, group), wide_planner()
    counts, bad = torch.ones(first.n_logical_routed_experts, dtype=torch.int32), torch.tensor([-2])
    run = first.run, idx, None
    pairs = {
        "planners alike": (run, (second.run, idx, None)),
        "a wider planner": (run, (wide.run, idx, None)),
        "idle in another planner": (run, (wide.run_idle,)),
        "another method of another planner": (run, (second.solve_probs, counts, None)),
        "mapping anew": (run, (first.update_redundancy_mapping,)),
        "mapping another planner anew": (run, (second.update_redundancy_mapping,)),
        "making a planner": (run, (ring_planner, 2, group)),
        "making a wider planner": (run, (wide_planner,)),
        "bad input": (run, (wide.run, bad, None)),
        "bad settings": (run, (first.update_redundancy_mapping, torch.ones(1))),
    }
    return pairs, first, wide


def cross(rank):
    idx = batch([1, rank], (50,), 8)
    pairs, first, wide = crossings(dist.group.WORLD, idx)
    raised = {}
    for name, pair in pairs.items():
        raised[name] = [call(*one) for one in (pair if rank == 0 else pair[::-1])]
    return raised, idx, first.run(idx, None), first.last_plan.quota, wide.run(idx, None), wide.last_plan.quota


@pytest.fixture(scope="module")
def crossed(tmp_path_factory):
    return on_ranks(2, tmp_path_factory.mktemp("crossed"), cross)


@pytest.mark.parametrize("name", ["planners alike", "a wider planner", "idle in another planner",
                                  "another method of another planner", "mapping anew", "mapping another planner anew",
                                  "making a planner", "making a wider planner"])  # fmt: skip
def test_calls_that_cross_are_refused_on_every_rank(name, crossed):
    for raised, *_ in crossed:
        for kind, message in raised[name]:
            assert kind == "ValueError"
            assert message.startswith(f"rank 1 has {CROSSED}; allowed is the same on every rank")


@pytest.mark.parametrize(
    ("name", "refusal"), [("bad input", "idx has -2 at flat position 0"), ("bad settings", "workload has shape [1]")]
)
def test_bad_input_in_calls_that_cross(name, refusal, crossed):
    """Rank 1 refuses first, and rank 0 hears of it in its run; then the other way about."""
    for rank, (raised, *_) in enumerate(crossed):
        for i, (kind, message) in enumerate(raised[name]):
            assert kind == "ValueError"
            refuses = (rank == 1) == (i == 0)
            assert message.startswith(refusal if refuses else f"rank {1 - rank} refused its input, so no rank goes on")
            assert refusal in message


def test_after_calls_that_crossed(crossed):
    batches = [result[1] for result in crossed]
    half = WIDE // 2
    for at, phy2log in ((2, ring_phy2log(2)), (4, [*range(half), WIDE - 1, *range(half, WIDE), 0])):
        expected = assign_reference(batches, phy2log, crossed[0][at + 1], ranks_per_node(2))
        for result, want in zip(crossed, expected, strict=True):
            assert np.array_equal(result[at], want)


def cross_on_the_device(rank):
    """The CUDA backend with its kernels played on the CPU: words are compared on the device, and reported later."""
    pretend()
    planners = [ring_planner(2, dist.group.WORLD) for _ in range(2)]
    idx = batch([2, rank], (50,), 8)
    crossed = [planner.run(idx, None) for planner in (planners if rank == 0 else planners[::-1])]
    told = [call(planner.run, idx, None) for planner in planners]
    return crossed, told, idx, [(planner.run(idx, None), planner.last_plan.quota) for planner in planners]


def test_calls_that_cross_on_the_device(tmp_path):
    results = on_ranks(2, tmp_path, cross_on_the_device)
    for rank, (crossed, told, _, after) in enumerate(results):
        assert all((physical == -1).all() for physical in crossed)
        for kind, message in told:
            assert kind == "EarlierFault"
            assert message.startswith(f"rank {1 - rank} refused its input, has another placement or other settings")
            assert "another planner of the group" in message
        for physical, quota in after:
            expected = assign_reference([result[2] for result in results], ring_phy2log(2), quota, ranks_per_node(2))
            assert np.array_equal(physical, expected[rank])


# Threads


def race(rank, bad_calls):
    """Two threads with a planner each, on one group; each gives the same batch again and again, or a bad one."""
    group = dist.group.WORLD
    planners = ring_planner(2, group), wide_planner()
    batches = [batch([i, rank], (200,), planner.n_logical_routed_experts) for i, planner in enumerate(planners)]
    alone = [(planner.run(idx, None), planner.last_plan.quota) for planner, idx in zip(planners, batches, strict=True)]
    records = [[], []]

    def repeat(i):
        for turn in range(25):
            idx = torch.tensor([-2]) if (rank, i) == (1, 0) and turn in bad_calls else batches[i]
            try:
                records[i].append(planners[i].run(idx, None))
            except Exception as error:
                records[i].append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=repeat, args=(i,)) for i in ((0, 1) if rank else (1, 0))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return batches, alone, records, [planner.run(idx, None) for planner, idx in zip(planners, batches, strict=True)]


@pytest.mark.parametrize("bad_calls", [(), range(1, 25, 2)])
def test_threads_with_two_planners_of_one_group(bad_calls, tmp_path):
    results = on_ranks(2, tmp_path, race, bad_calls)
    half = WIDE // 2
    for i, phy2log in enumerate((ring_phy2log(2), [*range(half), WIDE - 1, *range(half, WIDE), 0])):
        quota = results[0][1][i][1]
        expected = assign_reference([batches[i] for batches, *_ in results], phy2log, quota, ranks_per_node(2))
        for (_, alone, records, after), want in zip(results, expected, strict=True):
            assert np.array_equal(alone[i][0], want)
            assert np.array_equal(after[i], want)
            assert len(records[i]) == 25
            for got in records[i]:
                if isinstance(got, str):
                    crossed = got.startswith("ValueError: rank 1 has " + CROSSED)
                    assert crossed or (bad_calls and "idx has -2 at flat position 0, allowed is -1" in got)
                else:
                    assert np.array_equal(got, want)
    refused = [sum(isinstance(got, str) for got in records[0] + records[1]) for _, _, records, _ in results]
    assert refused[0] == refused[1], "a call was refused on one rank only"


def threads_apart(rank):
    """As in `race`, with a group for each thread: nothing is refused."""
    planners = [ring_planner(2, dist.new_group([0, 1])) for _ in range(2)]
    batches = [batch([i, rank], (200,), 8) for i in range(2)]
    records = [[], []]
    threads = [
        threading.Thread(target=lambda i=i: records[i].extend(planners[i].run(batches[i], None) for _ in range(25)))
        for i in ((0, 1) if rank else (1, 0))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return batches, records, [planner.last_plan.quota for planner in planners]


def test_threads_with_a_group_each(tmp_path):
    results = on_ranks(2, tmp_path, threads_apart)
    for i in range(2):
        expected = assign_reference(
            [batches[i] for batches, *_ in results], ring_phy2log(2), results[0][2][i], ranks_per_node(2)
        )
        for (_, records, _), want in zip(results, expected, strict=True):
            assert len(records[i]) == 25
            assert all(np.array_equal(got, want) for got in records[i])


def numbers(rank):
    group, other = dist.group.WORLD, dist.new_group([0, 1])
    exchanges = Distributed(group), Distributed(group), Distributed(other), Local(), Known(rank, 2)
    return [[number_planner(exchange) for exchange in exchanges] for _ in range(2)]


def test_planners_are_numbered_within_their_group(tmp_path):
    assert on_ranks(2, tmp_path, numbers) == [[[0, 1, 0, 0, 0], [2, 3, 1, 0, 0]]] * 2


# Idle ranks


def idle_in_turns(rank, size):
    """Layers with a planner each; in every other one this rank has nothing to do."""
    planners = [ring_planner(size, dist.group.WORLD) for _ in range(4)]
    record = []
    for layer, planner in enumerate(planners):
        counter = torch.zeros(1, dtype=torch.int64)
        if (rank + layer) % 2:
            idx, physical = torch.zeros(0, 3, dtype=torch.int64), planner.run_idle(counter)
        else:
            idx = batch([layer, rank], (30, 3), planner.n_logical_routed_experts)
            physical = planner.run(idx, counter)
        record.append((idx, physical, planner.last_plan, counter.item()))
    for planner in planners:
        planner.run_idle()  # nobody has a token
        record.append(planner.last_plan.rank_load.tolist())
    return record


def test_ranks_that_are_idle_in_turns(tmp_path):
    results = on_ranks(4, tmp_path, idle_in_turns, 4)
    for layer in range(4):
        batches, mapped, plans, counters = zip(*(result[layer] for result in results), strict=True)
        assert [idx.numel() for idx in batches] == [0 if (rank + layer) % 2 else 90 for rank in range(4)]
        assert counters == (1,) * 4
        for plan in plans:
            assert all(torch.equal(a, b) for a, b in zip(plan.tensors(), plans[0].tensors(), strict=True))
        expected = assign_reference(batches, ring_phy2log(4), plans[0].quota, ranks_per_node(4))
        for rank, (physical, want) in enumerate(zip(mapped, expected, strict=True)):
            assert physical is None if (rank + layer) % 2 else np.array_equal(physical, want)
    assert all(result[4:] == [[0] * 4] * 4 for result in results)


def test_idle_without_a_group():
    planner = ring_planner(4, ep_size=4)
    planner.run(torch.arange(16), None)
    counter = torch.zeros(1, dtype=torch.int32)
    planner.run_idle(counter)
    assert counter.item() == 1
    assert planner.last_plan.quota.tolist() == [0] * 20


def test_idle_in_a_compiled_function(monkeypatch):
    planner = ring_planner(4, ep_size=4)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(RuntimeError, match=r"run_idle is called in a compiled function, allowed is outside of"):
        planner.run_idle()


# Ranks that die, or do not come

TIMEOUT = 4  # seconds, of the group
SIZE, VICTIM = 4, 2


class Dying(Distributed):
    """Dies in a gather: counted, and nothing sent."""

    dies = False

    def gather(self, row, table):
        if self.dies:
            os.kill(os.getpid(), signal.SIGKILL)
        super().gather(row, table)


def go_between(planner, idx):
    os.kill(os.getpid(), signal.SIGKILL)


def go_inside(planner, idx):
    planner._exchange.dies = True
    planner.run(idx, None)


def stay_away(planner, idx):
    time.sleep(1.5 * TIMEOUT)


def again(planner, idx, counter):
    planner.run(idx, counter)


def make_another(planner, idx, counter):
    ring_planner(SIZE, planner.ep_group.group)


def map_anew(planner, idx, counter):
    planner.update_redundancy_mapping(torch.arange(float(planner.n_logical_routed_experts)))


def mortal(rank, folder, leave, stay):
    """A rank that runs once; then the victim leaves, and the others go on."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=SIZE, timeout=timedelta(seconds=60))
    try:
        group = dist.new_group(range(SIZE), timeout=timedelta(seconds=TIMEOUT))
        dist.barrier()  # ranks may start later than the short timeout allows
        planner = ring_planner(SIZE, Dying(group))
        idx, counter = batch([3, rank], (60,), planner.n_logical_routed_experts), torch.zeros(1, dtype=torch.int64)
        planner.run(idx, counter)
        plan, phy2log = planner.last_plan, planner.phy2log.clone()
        if rank == VICTIM:
            leave(planner, idx)
            return
        error = None
        try:
            stay(planner, batch([4, rank], (60,), planner.n_logical_routed_experts), counter)
        except Exception as problem:
            error = problem
        cause = error.__cause__
        kept = (
            all(torch.equal(a, b) for a, b in zip(planner.last_plan.tensors(), plan.tensors(), strict=True)),
            torch.equal(planner.phy2log, phy2log),
            counter.item() == 1,
            planner.solve(torch.full((planner.n_logical_routed_experts,), 5)).quota.sum().item() == 80,
        )
        result = type(error).__name__, str(error), isinstance(cause, RuntimeError) and str(cause), kept
    except BaseException:
        result = traceback.format_exc()
    torch.save(result, f"{folder}/{rank}.pt")
    os._exit(0)  # a group that lost a rank cannot be taken down in order


MAKING = r"an agreement \(constructors, update_redundancy_mapping, init_from_deep_ep, lplb.weights, lplb.dynamic\)"


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL, which this system has not")
@pytest.mark.parametrize(
    ("leave", "stay", "name"),
    [
        (go_between, again, "run"),
        (go_inside, again, "run"),
        (stay_away, again, "run"),
        (go_between, make_another, MAKING),
        (go_between, map_anew, MAKING),
    ],
)
def test_a_rank_that_is_lost(leave, stay, name, tmp_path):
    ranks = [PROCESSES.Process(target=mortal, args=(rank, str(tmp_path), leave, stay)) for rank in range(SIZE)]
    for rank in ranks:
        rank.start()
    end = time.monotonic() + 40  # many times the timeout
    for rank in ranks:
        rank.join(max(0.0, end - time.monotonic()))
    late = [i for i, rank in enumerate(ranks) if rank.is_alive()]
    for rank in ranks:
        rank.kill()
        rank.join()
    assert late == [], f"ranks {late} hang"
    if leave is not stay_away:
        assert ranks[VICTIM].exitcode == -signal.SIGKILL
    for rank in set(range(SIZE)) - {VICTIM}:
        result = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert not isinstance(result, str), f"rank {rank}: {result}"
        kind, message, cause, kept = result
        assert kind == "LostRankError"
        assert re.match(rf"lplb's all-gather in {name} failed on rank {rank} of {SIZE}, ", message)
        assert "check that every rank makes every call" in message
        assert cause
        assert message.endswith(f"torch.distributed says: {cause}")
        assert kept == (True,) * 4, "last plan, mapping, counter, solve"
