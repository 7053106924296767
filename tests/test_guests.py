"""The EP layer with transfers over gloo processes: what it computes, who does how much, and what is refused."""

import contextlib
import dataclasses
import os
import time
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist
from test_distributed import PROCESSES, call, on_ranks
from test_nn import (
    BIG,
    FFN,
    HIDDEN,
    N_EXPERTS,
    PAIRS,
    TOP_K,
    WAYS,
    assert_near,
    dense,
    eplb,
    layer_of,
    leaves_of,
    of_all,
    step,
    whole_number_layer,
    whole_number_tokens,
)
from torch.utils.checkpoint import checkpoint

from lplb.guests import GuestSlots
from lplb.models import MODELS
from lplb.nn import ExpertParallelMoE
from lplb.transfers import TransferPlanner
from lplb.weights import Move, WeightMover, mover, returning
from lplb.weights.returning import bring_home, ways_home

SOME = [40, 0, 25, 1, 30, 0, 7, 64]
SLOTS = 3


@pytest.fixture(autouse=True)
def one_thread():
    """The tensors are so small that waking other threads takes longer than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def hot_tokens(seed, n, heat=4.0, dtype=torch.float64):
    """Tokens of one domain: the more heat, the more of them ask for the same `TOP_K` experts."""
    draw = torch.Generator().manual_seed(seed)
    domain = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    x = torch.randn(n, HIDDEN, generator=draw, dtype=torch.float64) + heat * domain
    return x.to(dtype).requires_grad_(), torch.randn(n, HIDDEN, generator=draw, dtype=torch.float64).to(dtype)


def slots_of(hidden=HIDDEN, dtype=torch.float64, slots=SLOTS, resend=True):
    return GuestSlots(slots, hidden_size=hidden, ffn_size=FFN, dtype=dtype, resend=resend)


def lending_layer(size, group, guests=None, dtype=torch.float64, hidden=HIDDEN, top_k=TOP_K, seed=0, **planned):
    guests = slots_of(hidden, dtype) if guests is None else guests
    planner = TransferPlanner(N_EXPERTS, size, **({"slots": guests.slots} | planned))
    torch.manual_seed(seed)
    return ExpertParallelMoE(hidden, FFN, N_EXPERTS, top_k, group=group, transfers=planner, guests=guests, dtype=dtype)


def assert_as(value, want):
    """Within 1e-12 of the largest entry (at least 1)."""
    scale = float(torch.cat([want.abs().flatten(), torch.ones(1)]).max())
    torch.testing.assert_close(value, want, rtol=0, atol=1e-12 * scale)


@contextlib.contextmanager
def watched(layer):
    """Lists of the layer's loans, and of the transfers that set out."""
    loans, sent = [], []
    lend, carry_out = layer._lender.lend, layer._lender.mover.carry_out

    def lending(*given):
        found = lend(*given)
        loans.append(found[1])
        return found

    def carrying(job, buffers, **how):
        sent.append(sum(map(len, job.rounds)))
        return carry_out(job, buffers, **how)

    layer._lender.lend, layer._lender.mover.carry_out = lending, carrying
    yield loans, sent
    layer._lender.lend, layer._lender.mover.carry_out = lend, carry_out


def lent_step(layer, x, grad):
    with watched(layer) as (loans, sent):
        row = step(layer, x, grad)
    plan = loans[0].plan
    moves = [(move.source_rank, move.target_rank) for move in plan.moves()]
    return row | {"load": plan.rank_load.tolist(), "moves": moves, "sent": list(sent)}


# What it computes

# Hidden sizes at which a transfer is worth its time by the cost model, whatever the layer has.
SHAPE = dataclasses.replace(MODELS["deepseek-v3"], n_logical=N_EXPERTS, top_k=TOP_K)
CASES = [
    {"strategy": "joint", "slots": SLOTS},
    {"strategy": "joint", "slots": SLOTS, "resend": False},
    {"strategy": "joint", "slots": 1, "replicas": 1},
    {"strategy": "llep", "slots": N_EXPERTS, "alpha": 1.0, "m": 0},
    {"strategy": "llep", "slots": N_EXPERTS, "alpha": 1.0, "m": 4, "compat": True},
    {"strategy": "auto", "slots": SLOTS, "model": SHAPE},
]


def layer_of_case(case, size, group):
    planned = {name: value for name, value in case.items() if name not in ("resend", "replicas")}
    if "replicas" in case:
        planned["placement"] = eplb(size, case["replicas"])
    return lending_layer(size, group, slots_of(slots=case["slots"], resend=case.get("resend", True)), **planned)


def run_cases(rank, size, heats):
    group = dist.group.WORLD
    record = []
    for heat in heats:
        batches = [hot_tokens(10 * seed + rank, SOME[rank], heat) for seed in range(2)]
        rows = [[step(layer_of("none", size, group), *batch) for batch in batches]]
        for case in CASES:
            layer = layer_of_case(case, size, group)
            rows.append([lent_step(layer, *batch) for batch in batches])
        record.append(rows)
    return record


HEATS = {2: [0.0, 4.0, 30.0], 4: [2.0, 4.0, 30.0], 8: [4.0, 30.0]}


@pytest.mark.parametrize("size", [2, 4, 8])
def test_outputs_gradients_and_loads(size, tmp_path):
    results = on_ranks(size, tmp_path, run_cases, size, HEATS[size])
    travelled = 0
    for which in range(len(HEATS[size])):
        plain, *lent = zip(*(result[which] for result in results), strict=True)
        for seed in range(2):
            want, loads = dense([row[seed] for row in plain])
            unbalanced = of_all([row[seed] for row in plain])
            for case, ranks in zip(CASES, lent, strict=True):
                rows = [row[seed] for row in ranks]
                assert_near(of_all(rows), want, 1e-12)
                assert_near(of_all(rows), unbalanced, 1e-12)
                received = [int(row["received"].sum()) for row in rows]
                assert all(received == row["load"] for row in rows)
                assert sum(received) == loads.sum()
                before = max(int(row[seed]["received"].sum()) for row in plain)
                assert max(received) <= before
                if case["strategy"] == "joint" and case["slots"] == SLOTS:
                    assert max(received) == -(-sum(received) // size)
                travelled += len(rows[0]["moves"])
                for row in rows:  # once: for the backward pass guests are still there
                    assert row["sent"] == ([len(row["moves"])] if row["moves"] else [])
    assert travelled > 10


def hottest(rank, size):
    """All tokens want one expert: it goes to every other rank, and most get it from a rank that got it."""
    layer = lending_layer(size, dist.group.WORLD, top_k=1, slots=SLOTS)
    with torch.no_grad():
        layer.router[5] += 100 * torch.sign(hot_tokens(0, 1, 30.0)[0][0])
    x, grad = hot_tokens(rank, 16, 30.0)
    with watched(layer) as (loans, _):
        row = step(layer, x, grad)
    return row, [[hop.move.source_rank for hop in hops] for hops in loans[0].rounds_of_all]


def test_one_expert_goes_to_all_by_relays(tmp_path):
    size = 8
    results = on_ranks(size, tmp_path, hottest, size)
    rows = [row for row, _ in results]
    assert_near(of_all(rows), dense(rows)[0], 1e-12)
    assert [int(row["received"].sum()) for row in rows] == [16] * size
    rounds = results[0][1]
    sources = [source for hops in rounds for source in hops]
    assert len(sources) == size - 1
    assert sources.count(1) < size - 1  # rank 1 is the home of expert 5
    assert len(rounds) < size - 1
    assert all(result[1] == rounds for result in results)


# Whole numbers: nothing is rounded, so nothing may differ


def run_whole_numbers(rank, size):
    group = dist.group.WORLD
    plain = whole_number_layer("none", size, group)
    rows = [step(plain, *whole_number_tokens(rank))]
    for resend in (True, False):
        guests = slots_of(PAIRS + 3, torch.float32, resend=resend)
        layer = lending_layer(size, group, guests, torch.float32, PAIRS + 3, top_k=2)
        layer.load_state_dict(plain.state_dict())
        rows.append(lent_step(layer, *whole_number_tokens(rank)))
    return rows


def test_whole_numbers_are_equal(four):
    plain, *lent = zip(*(result["whole numbers"] for result in four), strict=True)
    want, _ = dense(list(plain))
    assert want["gate_up.0"].abs().max() >= BIG
    for rows in lent:
        assert rows[0]["moves"]
        got = of_all(list(rows))
        assert got.keys() == want.keys()
        for name, value in got.items():
            assert torch.equal(value.double(), want[name]), name


# Activation checkpointing, and layers that share guest slots


def run_checkpoints(rank):
    record = {}
    for resend in (True, False):
        layer = lending_layer(4, dist.group.WORLD, slots_of(resend=resend))
        x, grad = hot_tokens(rank, SOME[rank])
        for name, way in WAYS.items():
            x.grad = layer.router.grad = None
            for leaf in leaves_of(layer):
                leaf.grad = None
            with watched(layer) as (loans, sent):
                out = way(layer, x)
                out.backward(grad, retain_graph=True)
                out.backward(grad)
            grads = [leaf.grad for leaf in (x, layer.router, *leaves_of(layer))]
            record[resend, name] = out.detach(), grads, len(loans), [n // len(loans[0].new) for n in sent]
    return record


@pytest.mark.parametrize("resend", [True, False])
@pytest.mark.parametrize("name", list(WAYS))
def test_checkpointed_layers(name, resend, four):
    for result in four:
        out, grads, plans, sent = result["checkpoints"][resend, name]
        plain_out, plain_grads, *_ = result["checkpoints"][True, "plain"]
        assert torch.equal(out, plain_out)
        assert all(map(torch.equal, grads, plain_grads))
        assert plans == (3 if name == "nothing kept" else 1)
        # Two backward passes. Guests are still there after computing, but not after a backward pass.
        again = {"plain": 1 if resend else 0}.get(name, 2)
        assert sent == [1] * (1 + again)


def stack(layers, x, ways):
    for layer, way in zip(layers, ways, strict=True):
        x = x + WAYS[way](layer, x) / 8
    return x


def run_stacks(rank):
    """Three layers with the same slots, each its own way, and all three as one checkpointed region."""
    group = dist.group.WORLD
    x, grad = hot_tokens(rank, SOME[rank])
    record = []
    for resend in (None, True, False):
        guests = slots_of(resend=bool(resend))
        if resend is None:
            layers = [plain_copy(lending_layer(4, group, guests, seed=seed), 4, group) for seed in range(3)]
        else:
            layers = [lending_layer(4, group, guests, seed=seed) for seed in range(3)]
        for ways in (["plain"] * 3, ["keep_routes", "plain", "nothing kept"], None):
            x.grad = None
            sent = []
            with contextlib.ExitStack() as watch:
                for layer in layers:
                    for leaf in (layer.router, *leaves_of(layer)):
                        leaf.grad = None
                    sent.append([] if resend is None else watch.enter_context(watched(layer))[1])
                if ways is None:
                    out = checkpoint(stack, layers, x, ["plain"] * 3, use_reentrant=False)
                else:
                    out = stack(layers, x, ways)
                out.backward(grad)
            grads = [leaf.grad.clone() for layer in layers for leaf in (layer.router, *leaves_of(layer))]
            record.append(([out.detach(), x.grad.clone(), *grads], list(map(len, sent))))
    return record


def plain_copy(layer, size, group, hidden=HIDDEN, top_k=TOP_K, dtype=torch.float64):
    """The same weights without transfers."""
    other = ExpertParallelMoE(hidden, FFN, N_EXPERTS, top_k, group=group, dtype=dtype)
    other.load_state_dict(layer.state_dict())
    return other


def test_layers_share_slots(four):
    for result in four:
        plain, _, _, *others = result["stacks"]
        # Forward, and backward where others have used the slots since.
        times = [[2, 2, 1], [2, 2, 2], [3, 3, 2], [1, 1, 1], [2, 1, 2], [2, 2, 2]]
        for (got, sent), expected in zip(others, times, strict=True):
            assert sent == expected
            for value, want in zip(got, plain[0], strict=True):
                assert_as(value, want)


def run_mixed(rank):
    """One layer for two batches before their backward passes and after a layer that plans in the background."""
    group = dist.group.WORLD
    guests = slots_of()
    lend = lending_layer(4, group, guests, seed=3)
    around = layer_of("eplb", 4, group, lag=1)
    x, grad = hot_tokens(rank, SOME[rank])
    record = []
    for layer in (plain_copy(lend, 4, group), lend):
        for leaf in (layer.router, *leaves_of(layer), around.router, *leaves_of(around), x):
            leaf.grad = None
        for _ in range(2):  # the second time with gradients to add to
            first = layer(around(x) / 4)
            second = layer(x - 2 * first)
            (first * grad).sum().add((second * grad).sum()).backward()
        record.append([first.detach(), second.detach(), *(t.grad for t in (x, layer.router, *leaves_of(layer)))])
    return record


def test_two_batches_of_a_layer_and_a_layer_with_lag(four):
    for result in four:
        plain, lent = result["mixed"]
        for value, want in zip(lent, plain, strict=True):
            assert_as(value, want)


def run_pairs(rank):
    """Two groups of two ranks side by side, then one of all."""
    record = []
    for members in ([[0, 1], [2, 3]], [[0, 1, 2, 3]]):
        groups = [dist.new_group(ranks) for ranks in members]
        group = next(group for group, ranks in zip(groups, members, strict=True) if rank in ranks)
        layer = lending_layer(len(members[0]), group)
        x, grad = hot_tokens(rank, 30)
        record.append([lent_step(layer, x, grad), step(plain_copy(layer, len(members[0]), group), x, grad)])
    return record


def test_layers_of_other_groups(four):
    pairs, fours = zip(*(result["pairs"] for result in four), strict=True)
    for ranks in (pairs[:2], pairs[2:], fours):
        got, plain = ([row[i] for row in ranks] for i in range(2))
        assert_near(of_all(got), dense(got)[0], 1e-12)
        assert_near(of_all(got), of_all(plain), 1e-12)
        assert [int(row["received"].sum()) for row in got] == got[0]["load"]
        assert got[0]["moves"]


# Inference: guests stay for the next batch


def run_inference(rank):
    group = dist.group.WORLD
    guests = slots_of()
    layer = lending_layer(4, group, guests)
    other = lending_layer(4, group, guests, seed=1)
    plain = plain_copy(layer, 4, group)
    x, grad = hot_tokens(rank, SOME[rank])
    record = []

    def batch(name):
        mode = torch.inference_mode if len(record) % 2 else torch.no_grad
        with watched(layer) as (loans, sent), mode():
            out = layer(x)
            want = plain(x)
        record.append((name, out, want, loans[0].plan.n_transfers, sum(sent), loans[0].plan.rank_load.tolist()))

    batch("first")
    batch("again")
    with torch.no_grad():
        other(x)
    batch("after another layer")
    batch("again")
    if rank == 2:
        with torch.no_grad():
            for one, two in zip(leaves_of(layer), leaves_of(plain), strict=True):
                one.mul_(1.5)
                two.mul_(1.5)
    batch("after a change of one rank's weights")
    batch("again")
    if rank == 1:
        guests.forget()
    batch("after forgetting")
    layer(x).backward(grad)
    batch("after training")
    with torch.no_grad():  # what was planned for slots that hold guests meets slots that do not
        route = layer.route(x)
        other(x)
        with watched(layer) as (_, sent):
            record.append(("late", layer.compute(x, route), plain(x), route.loan.plan.n_transfers, sum(sent), None))
    return record


def test_guests_stay_until_something_changes(four):
    for result in four:
        batches = result["inference"]
        first = batches[0]
        assert first[3] > 0
        for name, out, want, planned, sent, load in batches:
            torch.testing.assert_close(out, want, rtol=0, atol=1e-12)
            assert planned == (0 if name in ("again", "late") else first[3])
            assert sent == (0 if name == "again" else first[3])
            if name not in ("again", "late"):
                assert load == first[5]


# Who needs gradients

NEEDS = {
    "x and experts": (True, True, True),
    "experts": (False, True, True),
    "x": (True, False, False),
    "x and some ranks' experts": (True, True, False),
    "nothing": (False, False, False),
}


def run_needs(rank):
    """x, experts of even ranks, experts of odd ranks."""
    record = {}
    for name, (of_x, even, odd) in NEEDS.items():
        found = []
        for resend in (None, True, False):
            layer = lending_layer(4, dist.group.WORLD, slots_of(resend=bool(resend)))
            layer = plain_copy(layer, 4, dist.group.WORLD) if resend is None else layer
            layer.experts.requires_grad_((even, odd)[rank % 2])
            x, grad = hot_tokens(rank, SOME[rank])
            x.requires_grad_(of_x)
            out = layer(x)
            out.backward(grad)
            found.append([out.detach(), *(leaf.grad for leaf in (x, layer.router, *leaves_of(layer)))])
        record[name] = found
    return record


@pytest.mark.parametrize("name", list(NEEDS))
def test_gradients_that_are_needed(name, four):
    for result in four:
        plain, *lent = result["needs"][name]
        for got in lent:
            for value, want in zip(got, plain, strict=True):
                assert (value is None) == (want is None)
                if want is not None:
                    assert_as(value, want)


# Gradients come home in the order of ranks

ORDERED = [2.0**30, 1.0, -(2.0**30), 1.0]


def run_sums(rank):
    """Guests of every rank go to experts of ranks 1 and 2; what has come home, and what every rank had."""
    moves = [Move(0, r, 0, 1, 0) for r in (0, 2, 3)] + [Move(1, r, 1, 2, 1) for r in (0, 1, 3)]
    draw = torch.Generator().manual_seed(rank)
    shapes = ((3, 4), (5,))
    guests = [torch.randn(2, *shape, generator=draw).bfloat16() for shape in shapes]
    own = [torch.randn(2, *shape, generator=draw).bfloat16() for shape in shapes]
    for fields in (guests, own):  # in float32 only one order of ranks has this sum: 1 + 2^30 is 2^30
        for field in fields:
            field[:, 0] = ORDERED[rank]
    before = [field.clone() for field in own]
    carrier = WeightMover([torch.zeros(2, *shape, dtype=torch.bfloat16) for shape in shapes], dist.group.WORLD)
    buffers = [carrier.link.buffer(carrier.fields.layout) for _ in range(2)]
    bring_home(carrier, ways_home(moves, rank), guests, [own[0], None if rank == 1 else own[1]], buffers, agree=True)
    return guests, before, own


def test_sums_are_in_the_order_of_ranks_and_rounded_once(four):
    sums = [result["sums"] for result in four]
    for slot, home in ((0, 1), (1, 2)):
        for field in range(2):
            parts = [(before if rank == home else guests)[field][slot] for rank, (guests, before, _) in enumerate(sums)]
            total = torch.zeros_like(parts[0], dtype=torch.float32)
            for part in parts:
                total += part.float()
            got = sums[home][2][field][slot]
            frozen = home == 1 and field == 1
            assert float(total.flatten()[0]) == 1.0
            assert torch.equal(got, sums[home][1][field][slot] if frozen else total.bfloat16())
    for rank, (_, before, own) in enumerate(sums):  # nothing else was touched
        for slot in range(2):
            if (slot, rank) not in ((0, 1), (1, 2)):
                assert all(torch.equal(a[slot], b[slot]) for a, b in zip(before, own, strict=True))


# Everything on four ranks, in one group of processes


def run_on_four(rank):
    return {
        "whole numbers": run_whole_numbers(rank, 4),
        "checkpoints": run_checkpoints(rank),
        "stacks": run_stacks(rank),
        "mixed": run_mixed(rank),
        "pairs": run_pairs(rank),
        "inference": run_inference(rank),
        "needs": run_needs(rank),
        "sums": run_sums(rank),
        "refused": run_refusals(rank),
        "faults": run_faults(rank),
        "layers": run_bad_layers(rank),
    }


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return on_ranks(4, tmp_path_factory.mktemp("four"), run_on_four)


# Refusals: on all ranks, before anything travels, and everything goes on as before

SICK = 2
REFUSED = f"rank {SICK} refused its input, so no rank goes on: "
TOKENS = TOP_K * sum(SOME[:4])
LEAST = -(-TOKENS // 4)
BAD_WEIGHTS = {
    "missing": "params_per_expert[1][1] is a NoneType, allowed is a torch.Tensor",
    "shape": "params_per_expert[1][1] is a torch.float64 tensor [11, 8] on 'cpu', allowed is what slot 0 has",
    "dtype": "params_per_expert[1][1] is a torch.float32 tensor [12, 8] on 'cpu', allowed is what slot 0 has",
}


@contextlib.contextmanager
def spoilt(layer, how):
    """The weights of a rank unfit to travel."""
    leaves = layer.experts.leaves("down")
    good = leaves[1]
    leaves[1] = {"missing": None, "shape": good[:-1], "dtype": good.float()}[how]
    yield
    leaves[1] = good


def run_refusals(rank):
    """Batches that are refused: what all ranks say, and whether a weight has moved."""
    layer = lending_layer(4, dist.group.WORLD)
    x, grad = hot_tokens(rank, SOME[rank])
    sick = rank == SICK
    record = {"before": step(layer, x, grad)}
    with watched(layer) as (_, sent):
        for how in BAD_WEIGHTS:
            with spoilt(layer, how) if sick else contextlib.nullcontext():
                record[how] = call(layer, x)
        with torch.no_grad():
            nan = x.index_fill(0, torch.tensor([3] if sick else [], dtype=torch.long), torch.nan)
        record["NaN"] = call(layer, nan.requires_grad_() if sick else x)
        record["float32"] = call(layer, x.detach().float().requires_grad_() if sick else x)
        record["gradients on some"] = call(layer, x.detach() if sick else x)
        for name, most in (("memory", LEAST - 1), ("memory of one rank", LEAST - 1 if sick else LEAST)):
            layer.transfers.max_tokens = most
            record[name] = call(layer, x)
        layer.transfers.max_tokens = LEAST
        record["sent"] = list(sent)
    record["after"] = step(layer, x, grad)
    lax = lending_layer(4, dist.group.WORLD, tolerance=0.5 if sick else 0.0)
    record["other plans"] = call(lax, x)
    return record


def test_a_batch_that_is_refused_is_everyones(four):
    said = BAD_WEIGHTS | {
        "NaN": "the router's shares of token 3 are nan, allowed are finite scores",
        "float32": "x has dtype torch.float32, allowed is the layer's, torch.float64",
    }
    for rank, result in enumerate(four):
        refused = result["refused"]
        for name, message in said.items():
            assert message in refused[name][1]
            assert refused[name][1].startswith(REFUSED) == (rank != SICK)
        assert "rank 2 has tokens of torch.float64 that need gradients and transfers" in refused["gradients on some"][1]
        assert "need gradients (in x) and transfers" in refused["gradients on some"][1]
        assert refused["memory"][0] == "ValueError"
        assert refused["memory"] == four[0]["refused"]["memory"]
        assert f"would receive {LEAST} tokens by the plan, allowed is max_tokens = {LEAST - 1}; no plan for this batch "
        assert f"has fewer than {LEAST} on its busiest rank" in refused["memory"][1]
        assert f"allowed is max_tokens = {LEAST - 1}" in refused["memory of one rank"][1]
        assert refused["sent"] == []
        for kind in ("results", "sums"):
            for name, value in refused["before"][kind].items():
                assert torch.equal(value, refused["after"][kind][name])
        assert refused["other plans"][0] == "ValueError"
        assert "by the plan" in refused["other plans"][1]
        assert "allowed is the same on every rank" in refused["other plans"][1]


def run_faults(rank):
    """A copy that fails on one rank while weights, then gradients, are on their way."""
    layer = lending_layer(4, dist.group.WORLD)
    x, grad = hot_tokens(rank, SOME[rank])
    record = {"before": step(layer, x, grad)}

    def fails(*_):
        raise ValueError("no memory for this")

    move = layer.route(x).loan.new[0]
    for module, sick in ((mover, move.source_rank), (returning, move.target_rank)):
        with pytest.MonkeyPatch.context() as patch:
            if rank == sick:
                patch.setattr(module, "pack", fails)
            record[module.__name__] = call(step, layer, x, grad)
    record["after"] = step(layer, x, grad)
    return record


def test_a_copy_that_fails_is_everyones(four):
    for result in four:
        for module in (mover, returning):
            assert result["faults"][module.__name__][0] == "ValueError"
            assert "no memory for this" in result["faults"][module.__name__][1]
        for kind in ("results", "sums"):
            for name, value in result["faults"]["before"][kind].items():
                assert torch.equal(value, result["faults"]["after"][kind][name])


# name: (what the sick rank has otherwise, what all ranks say)
BAD_LAYERS = {
    "no guests": ({"guests": None}, "guests is None, allowed with transfers is an lplb.nn.GuestSlots"),
    "kind of guests": ({"guests": 3}, "guests is a int, allowed is an lplb.nn.GuestSlots"),
    "kind of planner": ({"transfers": 3}, "transfers is a int, allowed is an lplb.TransferPlanner or None"),
    "guests alone": ({"transfers": None}, "transfers is a NoneType, allowed is an lplb.TransferPlanner or None"),
    "hidden size": (
        {"guests": partial(slots_of, HIDDEN + 1)},
        "guests has (hidden_size, ffn_size, dtype, device) (9, ",
    ),
    "dtype": ({"guests": partial(slots_of, dtype=torch.float32)}, "(8, 12, torch.float32, 'cpu'), allowed is the"),
    "slots": (
        {"guests": partial(slots_of, slots=1)},
        f"guests has 1 slots, allowed are as many as transfers plans for, {SLOTS}",
    ),
    "ranks": ({"ranks": 2}, "transfers plans for 2 ranks, allowed is the layer's 4"),
    "experts": ({"experts": 16}, "transfers plans for 16 experts, allowed is the layer's 32"),
    "uneven": (
        {"experts": 32, "uneven": True},
        "transfers has 7 residents on rank 1, allowed are as many as on rank 0, 9",
    ),
    "both": ({"balancer": "eplb"}, "balancer and transfers are both given, allowed is one of them"),
}
OTHER_LAYERS = {
    "neither": ({"transfers": None, "guests": None}, "rank 0 has hidden_size 8, ffn_size 12, n_experts 32"),
    "resend": (
        {"guests": partial(slots_of, resend=False)},
        f"rank 2 has guests with {SLOTS} slots, resend False and no la",
    ),
    "guests of others": (
        {"used": True},
        f"rank 2 has guests with {SLOTS} slots, resend True and other layers over group ",
    ),
}


def run_bad_layers(rank):
    group = dist.group.WORLD
    used = slots_of()
    layer = lending_layer(4, group, used)
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    x, grad = hot_tokens(rank, SOME[rank])
    record = {"before": step(layer, x, grad)}
    for name, (change, _) in (BAD_LAYERS | OTHER_LAYERS).items():
        record[name] = call(build, group, used, change if rank == SICK else {}, 4)
    record["group"] = call(lending_layer, 2, pairs[rank // 2], used)
    record["follow"] = call(layer.follow, None)
    record["after"] = step(layer, x, grad)
    return record


def build(group, used, change, size):
    guests = change.get("guests", slots_of)
    if change.get("used"):
        guests = used
    placement = None
    if change.get("uneven"):
        placement = [range(9), range(9, 16), range(16, 24), range(24, 32)]
    planner = TransferPlanner(
        change.get("experts", N_EXPERTS), change.get("ranks", size), slots=SLOTS, placement=placement
    )
    return ExpertParallelMoE(
        HIDDEN,
        FFN,
        N_EXPERTS,
        TOP_K,
        group=group,
        dtype=torch.float64,
        transfers=change.get("transfers", planner),
        guests=guests() if callable(guests) else guests,
        balancer=layer_of("eplb", 4, None).balancer if "balancer" in change else None,
    )


@pytest.mark.parametrize("name", [*BAD_LAYERS, *OTHER_LAYERS])
def test_a_layer_that_is_refused_is_everyones(name, four):
    for rank, result in enumerate(four):
        _, message = result["layers"][name]
        assert (BAD_LAYERS | OTHER_LAYERS)[name][1] in message
        if name in BAD_LAYERS and name != "both":
            assert message.startswith(REFUSED) == (rank != SICK)
        for kind in ("results", "sums"):
            for key, value in result["layers"]["before"][kind].items():
                assert torch.equal(value, result["layers"]["after"][kind][key])


def test_groups_and_balancers_that_do_not_fit(four):
    for result in four:
        assert "guests serve layers of another group, allowed are layers of one group" in result["layers"]["group"][1]
        assert "the layer has transfers, allowed is a layer without them" in result["layers"]["follow"][1]


# A process that dies


def dies(rank, folder, moment):
    """Rank 1 ends without a word in the second step; the others write what became of theirs."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=4, timeout=timedelta(seconds=20)
    )
    layer = lending_layer(4, dist.group.WORLD)
    x, grad = hot_tokens(rank, 30)
    step(layer, x, grad)

    def second():
        if rank == 1 and moment == "before":
            os._exit(1)
        route = layer.route(x)
        if rank == 1 and moment == "routed":
            os._exit(1)
        out = layer.compute(x, route)
        if rank == 1 and moment == "computed":
            os._exit(1)
        out.backward(grad)

    torch.save(call(second), f"{folder}/{rank}.pt")
    os._exit(0)


@pytest.mark.parametrize("moment", ["before", "routed", "computed"])
def test_the_others_raise_when_a_process_dies(moment, tmp_path):
    ranks = [PROCESSES.Process(target=dies, args=(rank, str(tmp_path), moment)) for rank in range(4)]
    for rank in ranks:
        rank.start()
    end = time.monotonic() + 60
    for rank in ranks:
        rank.join(max(0.0, end - time.monotonic()))
    late = [rank for rank in ranks if rank.is_alive()]
    for rank in late:
        rank.kill()
        rank.join()
    assert not late
    for rank in (0, 2, 3):
        assert torch.load(tmp_path / f"{rank}.pt", weights_only=False) is not None
