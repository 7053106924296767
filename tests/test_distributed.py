"""Groups of gloo processes: the same plan on every rank, and no rank that raises alone or waits for ever."""

import multiprocessing
import os
import sys
import time
import traceback
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from cases import ranks_per_node
from reference import ReferenceLP, assign_reference, integer_optimum

from lplb import Placement, Planner, topology

DEADLINE = 60  # seconds; a group that hangs is ended
# The server imports torch once; ranks are forks of it and start at once. It never opened a thread pool.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch", "torch.distributed", "lplb"])

N_OWN = 4  # logical experts per rank, for the planners on a ring


def process(rank, size, folder, body, arguments):
    try:
        if sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=timedelta(seconds=30)
        )
        result = body(rank, *arguments)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        result = traceback.format_exc()
    torch.save(result, f"{folder}/{rank}.pt")


def on_ranks(size, folder, body, *arguments):
    """Run `body(rank, *arguments)` in `size` processes of one gloo group; return what each returned."""
    folder.mkdir(exist_ok=True)
    ranks = [PROCESSES.Process(target=process, args=(r, size, str(folder), body, arguments)) for r in range(size)]
    for rank in ranks:
        rank.start()
    end = time.monotonic() + DEADLINE
    for rank in ranks:
        rank.join(max(0.0, end - time.monotonic()))
    late = [i for i, rank in enumerate(ranks) if rank.is_alive()]
    for rank in ranks:
        if rank.is_alive():
            rank.kill()
            rank.join()
    assert not late, f"ranks {late} did not end within {DEADLINE} s"
    results = [torch.load(folder / f"{i}.pt", weights_only=False) for i in range(size)]
    for i, result in enumerate(results):
        assert not isinstance(result, str), f"rank {i}: {result}"
    return results


def batch(seed, shape, n_logical):
    rng = np.random.default_rng(seed)
    weight = rng.lognormal(0, 1.5, n_logical)
    idx = rng.choice(n_logical, size=shape, p=weight / weight.sum())
    return torch.from_numpy(np.where(rng.random(shape) < 0.1, -1, idx))


def counts_of(idx, n_logical):
    flat = idx.numpy().ravel()
    return np.bincount(flat[flat >= 0], minlength=n_logical)


def ring_planner(n_ranks, group=None, **settings):
    return Planner(topology.ring(n_ranks), n_ranks * (N_OWN + 1), n_ranks * N_OWN, group=group, **settings)


def ring_phy2log(n_ranks):
    own = [[rank * N_OWN + i for i in range(N_OWN)] for rank in range(n_ranks)]
    return np.array([[*experts, own[(rank + 1) % n_ranks][0]] for rank, experts in enumerate(own)]).ravel()


def copies_phy2log(n_ranks):
    """Expert 0 on every rank, expert r + 1 on ranks r and r + 1, and one expert each of its own."""
    return [e for r in range(n_ranks) for e in (0, 1 + r, 1 + (r - 1) % n_ranks, 1 + n_ranks + r)]


# One batch after another


def run_batches(rank, size, shapes):
    """Both kinds of planner, both solvers; every rank its own shape and dtype."""
    group = dist.group.WORLD
    planners = {
        "ring": ring_planner(size, group),
        "ring_flow": ring_planner(size, group, solver="flow"),
        "copies": Planner.from_placement(Placement(copies_phy2log(size), size), group=group),
    }
    record = []
    for name, planner in planners.items():
        for seed in range(3):
            idx = batch([seed, rank], shapes[rank], planner.n_logical_routed_experts)
            if rank % 2:
                idx = idx.int()
            counter = torch.zeros(1, dtype=torch.int64 if rank % 2 else torch.int32)
            physical = planner.run(idx, counter, None if rank else 1)
            row = {"name": name, "idx": idx, "physical": physical, "plan": planner.last_plan, "counter": counter.item()}
            if name != "copies":
                counts = planner.count_workload(idx, 1)[0]
                row["share"], row["scaled"] = planner.solve_probs(counts, counter)
            record.append(row)
    return record


@pytest.mark.parametrize(
    ("size", "shapes"),
    [(2, [(40, 3), (0, 3)]), (2, [(0,), (0,)]), (4, [(30, 2), (0, 2), (), (5, 4, 3)])],
)
@pytest.mark.usefixtures("highs")
def test_run_over_processes(size, shapes, tmp_path):
    results = on_ranks(size, tmp_path, run_batches, size, shapes)
    assert len(results[0]) == 9
    for rows in zip(*results, strict=True):
        plan = rows[0]["plan"]
        for row in rows:
            assert all(torch.equal(a, b) for a, b in zip(row["plan"].tensors(), plan.tensors(), strict=True))
            assert row["counter"] == 1
            assert row["physical"].dtype == row["idx"].dtype
        phy2log = np.array(copies_phy2log(size)) if rows[0]["name"] == "copies" else ring_phy2log(size)
        n_logical = phy2log.max() + 1
        expected = assign_reference([row["idx"] for row in rows], phy2log, plan.quota, ranks_per_node(size))
        for row, want in zip(rows, expected, strict=True):
            assert np.array_equal(row["physical"], want)
        used = np.concatenate([row["physical"].numpy().ravel() for row in rows])
        assert np.bincount(used[used >= 0], minlength=len(phy2log)).tolist() == plan.quota.tolist()
        loads = sum(counts_of(row["idx"], n_logical) for row in rows)
        optimum = ReferenceLP(phy2log, size).solve(loads)[0]
        assert plan.max_load.tolist() == [integer_optimum(optimum, size)]
        if "share" not in rows[0]:
            continue
        first = loads[::N_OWN]  # the expert of each rank that has a copy
        kept = plan.quota.numpy()[:: N_OWN + 1]
        share = np.where(first > 0, kept / np.maximum(first, 1), 1.0).reshape(1, size, 1)
        scaled = (loads / max(1, loads.max())).reshape(1, size, N_OWN)
        for row in rows:
            np.testing.assert_allclose(row["share"], share, rtol=1e-6)
            np.testing.assert_allclose(row["scaled"], scaled, rtol=1e-6)


# LPLB's README example, word for word


def readme_example(rank):
    n_logical_experts, n_redundants_per_rank, ep_size = 64, 2, 8
    ep_group = dist.group.WORLD

    avail_counter = torch.zeros(1, dtype=torch.int64, device="cpu")
    r2o = torch.tensor([[3, 0, 1, 2, 7, 4, 5, 6], [6, 7, 4, 5, 0, 1, 2, 3]]).T.int()
    planner = Planner(r2o, n_logical_experts + n_redundants_per_rank * ep_size, n_logical_experts, group=ep_group)
    N_SMS = 100
    indices = batch(rank, (100, 6), n_logical_experts)
    redirected_indices = planner.run(indices, avail_counter, N_SMS)

    return indices, redirected_indices, avail_counter.item(), planner.phy2log, planner.last_plan.quota


@pytest.mark.usefixtures("highs")
def test_readme_example_of_lplb(tmp_path):
    indices, redirected, counters, phy2log, quota = zip(*on_ranks(8, tmp_path, readme_example), strict=True)
    assert counters == (1,) * 8
    expected = assign_reference(indices, phy2log[0], quota[0], ranks_per_node(8))
    for got, want in zip(redirected, expected, strict=True):
        assert np.array_equal(got, want)
    loads = sum(counts_of(idx, 64) for idx in indices)
    used = torch.cat(redirected).flatten()
    assert np.bincount(used[used >= 0] // 10, minlength=8).max() == integer_optimum(
        ReferenceLP(phy2log[0], 8).solve(loads)[0], 8
    )


# Parts of the world


def run_in_pairs(rank):
    """Ranks 1 and 3 are one group, 0 and 2 another; each plans for itself, and at its own pace."""
    groups = [dist.new_group([0, 2]), dist.new_group([3, 1])]
    mine = groups[rank % 2]
    planner = ring_planner(2, mine)
    record = []
    for seed in range(2 + rank % 2):
        idx = batch([rank, seed], (20,), 2 * N_OWN)
        record.append((idx, planner.run(idx, None), planner.last_plan.quota))
    message = None
    if rank % 2:
        try:
            planner.run(torch.tensor([99 if rank == 3 else 0]), None)
        except ValueError as error:
            message = str(error)
    try:
        ring_planner(2, groups[1 - rank % 2])
    except (TypeError, ValueError) as error:
        return dist.get_rank(mine), record, message, f"{type(error).__name__}: {error}"
    return dist.get_rank(mine), record, message, None


def test_groups_within_the_world(tmp_path):
    results = on_ranks(4, tmp_path, run_in_pairs)
    phy2log = ring_phy2log(2)
    for first in (0, 1):
        members = sorted([results[first], results[first + 2]], key=lambda result: result[0])
        assert [number for number, *_ in members] == [0, 1]
        assert len(members[0][1]) == 2 + first
        for a, b in zip(members[0][1], members[1][1], strict=True):
            assert torch.equal(a[2], b[2])
            expected = assign_reference([a[0], b[0]], phy2log, a[2], ranks_per_node(2))
            assert np.array_equal(a[1], expected[0])
            assert np.array_equal(b[1], expected[1])
    # Messages count ranks within the group.
    number_of_3 = results[3][0]
    assert results[3][2].startswith("idx has 99 at flat position 0")
    assert results[1][2].startswith(f"rank {number_of_3} refused its input")
    assert all(result[3] is not None for result in results), "a process planned with a group that it is not in"
    assert [result[2] for result in results[::2]] == [None, None]


# Bad input on some ranks

SIZE = 4
SICK = 2  # the rank with the bad input
RING = topology.ring(SIZE)
N_LOGICAL = SIZE * N_OWN
PAIRS = [0, 1, 2, 3, 2, 3, 0, 1]
OTHER_PAIRS = [0, 1, 2, 3, 2, 3, 1, 0]


def build(r2o=RING, n_physical=SIZE * (N_OWN + 1), n_logical=N_LOGICAL, ep_size=None, **settings):
    return Planner(r2o, n_physical, n_logical, ep_size, dist.group.WORLD, **settings)


def place(phy2log=PAIRS, **settings):
    return Planner.from_placement(Placement(phy2log, SIZE), group=dist.group.WORLD, **settings)


def history(first=0.0):
    return torch.cat([torch.tensor([first]), torch.arange(1.0, N_LOGICAL)])


# name: (call with the planner, the bad argument, the good one; exception; what the bad rank says; what all others say).
REFUSED = "rank 2 refused its input, so no rank goes on: "
DIFFERS = "rank 2 has another placement or other settings than rank 0"
ON_ONE_RANK = {
    "index too large": (
        lambda p, idx: p.run(idx, None), torch.tensor([0, N_LOGICAL]), torch.tensor([0, 1]),
        "ValueError", "idx has 16 at flat position 1",
    ),
    "index below -1": (
        lambda p, idx: p.run(idx, None), torch.tensor([-2]), torch.zeros(0).int(), "ValueError", "idx has -2",
    ),
    "index dtype": (
        lambda p, idx: p.run(idx, None), torch.zeros(3), torch.zeros(3).int(),
        "TypeError", "idx has dtype torch.float32",
    ),
    "index device": (
        lambda p, idx: p.run(idx, None), torch.zeros(3, device="meta").int(), torch.zeros(3).int(),
        "ValueError", "idx is on 'meta'",
    ),
    "no index": (lambda p, idx: p.run(idx, None), None, torch.zeros(3).int(), "TypeError", "idx is a NoneType"),
    "counter": (
        lambda p, c: p.run(torch.arange(5), c), torch.zeros(2).int(), torch.zeros(1).int(),
        "ValueError", "avail_counter has 2 elements",
    ),
    "counter dtype": (
        lambda p, c: p.run(torch.arange(5), c), torch.zeros(1), None,
        "TypeError", "avail_counter is a torch.float32 tensor [1]",
    ),
    "n_sms": (lambda p, n: p.run(torch.arange(5), None, n), 0, 100, "ValueError", "n_sms is 0"),
    "negative counts": (
        lambda p, w: p.solve_probs(w, None), torch.full((N_LOGICAL,), -1), torch.ones(N_LOGICAL).int(),
        "ValueError", "workload has -1",
    ),
    "counts shape": (
        lambda p, w: p.solve_probs(w, None), torch.ones(3).int(), torch.ones(N_LOGICAL).int(),
        "ValueError", "workload has shape [3]",
    ),
    "probs counter": (
        lambda p, c: p.solve_probs(torch.ones(N_LOGICAL).int(), c), 7, None, "TypeError", "avail_counter is a int",
    ),
    "r2o with a fixed point": (
        lambda p, r2o: build(r2o), torch.tensor([[0], [2], [3], [1]]), RING, "ValueError", "rank 0 copies from 0",
    ),
    "r2o dtype": (lambda p, r2o: build(r2o), RING.float(), RING, "TypeError", "r2o has dtype torch.float32"),
    "r2o no tensor": (lambda p, r2o: build(r2o), None, RING, "TypeError", "r2o is a NoneType"),
    "r2o of other ranks": (
        lambda p, r2o: build(r2o), topology.ring(3), RING,
        "ValueError", "ep_size is 4, allowed is a multiple of group_size = 3",
    ),
    "another topology": (lambda p, r2o: build(r2o), (torch.arange(4)[:, None] - 1) % 4, RING, "ValueError", DIFFERS),
    "ep_size": (
        lambda p, n: build(ep_size=n), 2, 4, "ValueError", "ep_size is 2, allowed is the size of the group, 4",
    ),
    "expert count": (
        lambda p, n: build(n_physical=n), 21, 20,
        "ValueError", "n_routed_experts is 21, allowed is a multiple of ep_size = 4",
    ),
    "another expert count": (lambda p, n: build(n_physical=n), 16, 20, "ValueError", DIFFERS),
    "another solver": (lambda p, solver: build(solver=solver), "flow", "ipm", "ValueError", DIFFERS),
    "unknown solver": (lambda p, solver: build(solver=solver), "lp", "ipm", "ValueError", "solver is 'lp'"),
    "device": (lambda p, device: build(device=device), "meta", "cpu", "RuntimeError", "device is 'meta'"),
    "another placement": (lambda p, phy2log: place(phy2log), OTHER_PAIRS, PAIRS, "ValueError", DIFFERS),
    "no placement": (
        lambda p, placement: Planner.from_placement(placement, group=dist.group.WORLD), PAIRS, Placement(PAIRS, SIZE),
        "TypeError", "placement is a list",
    ),
    "not group-closed": (
        lambda p, n: place(group_size=n), 2, 4, "ValueError", "expert 0 has slots in groups [0, 1]",
    ),
    "placement of other ranks": (
        lambda p, placement: Planner.from_placement(placement, group=dist.group.WORLD),
        Placement(PAIRS, 2), Placement(PAIRS, SIZE),
        "ValueError", "ep_size is 2, allowed is the size of the group, 4",
    ),
    "rank_speed": (lambda p, s: place(rank_speed=s), [1, 1, 0, 1], None, "ValueError", "rank_speed has 0.0"),
    "another rank_speed": (lambda p, s: place(rank_speed=s), [1, 1, 2, 1], None, "ValueError", DIFFERS),
    "history NaN": (
        lambda p, w: p.update_redundancy_mapping(w), history(float("nan")), history(),
        "ValueError", "is nan, allowed is finite and 0 or more",
    ),
    "history shape": (
        lambda p, w: p.update_redundancy_mapping(w), torch.ones(2), history(), "ValueError", "workload has shape [2]",
    ),
    "history missing": (lambda p, w: p.update_redundancy_mapping(w), None, history(), "ValueError", DIFFERS),
    "another history": (
        lambda p, w: p.update_redundancy_mapping(w), history(99.0), history(), "ValueError", DIFFERS,
    ),
}  # fmt: skip


def call(function, *arguments):
    try:
        function(*arguments)
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def bad_input(rank):
    """Every case in turn, on one planner; after each, what the planner does with good input."""
    planner = build()
    idx = batch([9, rank], (25,), N_LOGICAL)
    record = {}
    for name, (function, bad, good, *_) in ON_ONE_RANK.items():
        before = planner.phy2log.clone()
        raised = call(function, planner, bad if rank == SICK else good)
        kept = torch.equal(planner.phy2log, before)
        counter = torch.zeros(1, dtype=torch.int32)
        physical = planner.run(idx, counter)
        record[name] = (raised, kept, idx, physical, planner.last_plan.quota, counter.item())

    # Two ranks at once: each hears of its own, the others of the first.
    given = {1: torch.tensor([77]), 3: torch.zeros(1)}.get(rank, torch.tensor([0]))
    record["two ranks"] = call(planner.run, given, None)
    # Text that does not fit the message, with characters of several bytes, cut anywhere.
    record["long"] = call(build, RING, 20, 16, None) if rank != SICK else call(build, RING, 20, "é" * 3000, None)
    good = build().run(idx, None)
    record["after"] = (idx, good, planner.run(idx, None))
    return record


@pytest.fixture(scope="module")
def sick_group(tmp_path_factory):
    return on_ranks(SIZE, tmp_path_factory.mktemp("sick_group"), bad_input)


@pytest.mark.parametrize("name", list(ON_ONE_RANK))
def test_bad_input_on_one_rank(name, sick_group):
    *_, kind, message = ON_ONE_RANK[name]
    results = [result[name] for result in sick_group]
    for rank, (raised, kept, _, _, quota, counted) in enumerate(results):
        assert raised is not None, f"rank {rank} did not raise"
        assert raised[0] == kind
        if message == DIFFERS:
            assert raised[1].startswith(DIFFERS)
            assert "allowed is the same on every rank" in raised[1]
        elif rank == SICK:
            assert message in raised[1]
        else:
            assert raised[1].startswith(REFUSED)
            assert message in raised[1]
            assert "allowed" in raised[1] or "this build" in raised[1]
        # and everything goes on as before
        assert kept
        assert counted == 1
        assert torch.equal(quota, results[0][4])
    expected = assign_reference(
        [idx for _, _, idx, *_ in results], ring_phy2log(SIZE), results[0][4], ranks_per_node(SIZE)
    )
    for (_, _, _, physical, *_), want in zip(results, expected, strict=True):
        assert np.array_equal(physical, want)


def test_bad_input_on_two_ranks(sick_group):
    raised = [result["two ranks"] for result in sick_group]
    assert [kind for kind, _ in raised] == ["ValueError", "ValueError", "ValueError", "TypeError"]
    assert raised[1][1].startswith("idx has 77")
    assert raised[3][1].startswith("idx has dtype torch.float32")
    for _, message in raised[::2]:
        assert message.startswith("rank 1 refused its input")
        assert "idx has 77 at flat position 0" in message


def test_a_message_too_long_to_send_is_cut(sick_group):
    raised = [result["long"] for result in sick_group]
    assert [kind for kind, _ in raised] == ["TypeError"] * SIZE
    for rank in (0, 1, 3):
        assert raised[rank][1].startswith(REFUSED + "n_logical_routed_experts is 'éé")
        assert len(raised[rank][1]) < len(raised[SICK][1])


def test_group_is_usable_afterwards(sick_group):
    batches, new, old = zip(*(result["after"] for result in sick_group), strict=True)
    quota = sick_group[0]["counter"][4]
    expected = assign_reference(batches, ring_phy2log(SIZE), quota, ranks_per_node(SIZE))
    for got, again, want in zip(new, old, expected, strict=True):
        assert np.array_equal(got, want)
        assert np.array_equal(again, want)


def different_methods(rank):
    planner = ring_planner(2, dist.group.WORLD)
    counts = torch.ones(2 * N_OWN, dtype=torch.int32)
    one = call(planner.solve_probs, counts, None) if rank else call(planner.run, torch.tensor([0]), None)
    return one, call(planner.run, torch.tensor([0]), None)


def test_ranks_that_call_different_methods_find_out(tmp_path):
    for mixed, afterwards in on_ranks(2, tmp_path, different_methods):
        assert mixed == ("ValueError", mixed[1])
        assert "rank 1 has another placement or other settings than rank 0, or called another method" in mixed[1]
        assert afterwards is None
