"""Replicas of a training run: weights, gradients in the order of ranks, hooks, and what goes wrong."""

import contextlib
import gc
import itertools
import os
import signal
import weakref
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from test_distributed import call, on_ranks
from test_weights import leave

from lplb import Placement
from lplb.weights import ReplicaSync

SIZE, SLOTS, N_LOGICAL = 4, 3, 6
PHY2LOG = [0, 1, 2, 0, 1, 3, 4, 0, 1, 2, 5, 0]
HOME = [7, 1, 9, 5, 6, 10]  # expert 0 on rank 2, expert 1 on rank 0, expert 2 on rank 3
COPIES = {expert: [p for p, e in enumerate(PHY2LOG) if e == expert] for expert in range(N_LOGICAL)}


def sync_for(params, **settings):
    return ReplicaSync(Placement(PHY2LOG, SIZE), params, dist.group.WORLD, home=HOME, **settings)


# Training: the same experts as one process without replicas has

SHAPES = [(5, 8), (8,), (8, 5)]
VARIANTS = {  # steps, dtype, stacked, overlap, whether the first of two backward passes is under no_sync
    "plain": (200, torch.float64, False, False, False),
    "stacked": (60, torch.float64, True, True, True),
    "overlap": (60, torch.float64, False, True, True),
    "sent too early": (60, torch.float32, False, True, False),
}


def first_weights(expert, field):
    return torch.from_numpy(np.random.default_rng([1, expert, field]).normal(0, 0.5, SHAPES[field]))


def tokens(step):
    """Inputs, wanted outputs, expert, and physical slot of each; in some steps most experts have none."""
    rng = np.random.default_rng([2, step])
    weight = np.array([8.0, 4, 2, 1, 1, 1]) ** rng.choice([1, 3])
    experts = rng.choice(N_LOGICAL, 16, p=weight / weight.sum())
    slots = [int(rng.choice(COPIES[e])) for e in experts]
    x, y = (torch.from_numpy(rng.normal(0, 1, (16, 5))) for _ in range(2))
    return x, y, experts.tolist(), slots


def loss_of(x, y, w1, b, w2):
    return ((torch.tanh(x @ w1 + b) @ w2 - y) ** 2).sum()


def loss_on(rank, params, step, part):
    """Of the tokens of one backward pass on the slots of one rank."""
    x, y, _, where = tokens(step)
    dtype = params[0][0].dtype
    stacked = [field for field in params if isinstance(field, torch.Tensor)]
    loss = sum((0.0 * field.sum() for field in stacked), torch.zeros(()))
    for slot in range(SLOTS):
        mine = [i for i in range(part, len(where), 2) if where[i] == rank * SLOTS + slot]
        if mine:
            loss = loss + loss_of(x[mine].to(dtype), y[mine].to(dtype), *[field[slot] for field in params])
    return loss


def train(rank, names):
    return {name: train_one(rank, *VARIANTS[name]) for name in names}


def train_one(rank, n_steps, dtype, stacked, overlap, no_sync):
    mine = PHY2LOG[rank * SLOTS : (rank + 1) * SLOTS]
    # replicas hold zeros at first
    slots = [
        [first_weights(e, f).to(dtype) * (rank * SLOTS + s == HOME[e]) for s, e in enumerate(mine)] for f in range(3)
    ]
    if stacked:
        params = [torch.nn.Parameter(torch.stack(field)) for field in slots]
    else:
        params = [[torch.nn.Parameter(t) for t in field] for field in slots]
    sync = sync_for(params, overlap=overlap)
    sync.broadcast()
    optimizer = torch.optim.Adam(sync.parameters(), lr=0.01)
    for step in range(n_steps):
        for part in range(2):
            with sync.no_sync() if no_sync and part == 0 else contextlib.nullcontext():
                loss = loss_on(rank, params, step, part)
                if loss.requires_grad:
                    loss.backward()
        sync.reduce_gradients()
        optimizer.step()
        optimizer.zero_grad()
        moved = sync.broadcast()
    sync.check()
    sync.close()
    owned = sum(len(state) > 0 for state in optimizer.state.values())
    return [[field[s].detach().clone() for field in params] for s in range(SLOTS)], owned, moved, sync.home_slots


def trained_alone(n_steps, zeros):
    """The same steps without replicas; `zeros`: experts without tokens have gradients of zero, not none."""
    experts = [[torch.nn.Parameter(first_weights(e, f)) for f in range(3)] for e in range(N_LOGICAL)]
    optimizer = torch.optim.Adam(itertools.chain(*experts), lr=0.01)
    for step in range(n_steps):
        x, y, chosen, _ = tokens(step)
        loss = sum(0.0 * p.sum() for p in itertools.chain(*experts)) if zeros else torch.zeros(())
        for expert in set(chosen):
            mine = [i for i in range(len(chosen)) if chosen[i] == expert]
            loss = loss + loss_of(x[mine], y[mine], *experts[expert])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return experts


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two groups of processes: the first use of an optimizer imports for seconds, and `on_ranks` has a deadline."""
    names = list(VARIANTS)
    results = [{} for _ in range(SIZE)]
    for part in (names[:1], names[1:]):
        for result, found in zip(results, on_ranks(SIZE, tmp_path_factory.mktemp("train"), train, part), strict=True):
            result.update(found)
    return results


@pytest.mark.parametrize("name", list(VARIANTS))
def test_replicas_after_steps_of_adam(name, trained):
    n_steps, dtype, *_ = VARIANTS[name]
    results = [result[name] for result in trained]
    slots = [weights for result in results for weights in result[0]]
    for expert, copies in COPIES.items():
        for slot in copies:
            assert all(torch.equal(a, b) for a, b in zip(slots[slot], slots[HOME[expert]], strict=True))
    alone = trained_alone(n_steps, zeros=name == "stacked")
    tolerance = 0.01 if dtype == torch.float32 else 1e-9
    for expert in range(N_LOGICAL):
        for weights, expected, field in zip(slots[HOME[expert]], alone[expert], range(3), strict=True):
            np.testing.assert_allclose(weights.numpy(), expected.detach().numpy(), tolerance, tolerance)
            assert not np.allclose(expected.detach().numpy(), first_weights(expert, field).numpy(), 0.01, 0.01)
    expert_bytes = (40 + 8 + 40) * slots[0][0].element_size()
    for rank, (_, owned, moved, home_slots) in enumerate(results):
        assert home_slots == [s for s in range(SLOTS) if rank * SLOTS + s in HOME]
        assert owned == 3 * (1 if name == "stacked" else len(home_slots))  # tensors with optimizer state
        assert moved.bytes_received == expert_bytes * (SLOTS - len(home_slots))
    assert sum(result[2].bytes_sent for result in results) == expert_bytes * (SIZE * SLOTS - N_LOGICAL)


# Sums of gradients, to the bit

FLOATS = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
HOWS = ["parameters", "stacked", "main_grad"]
GRADIENT_SHAPES = [(4, 3), ()]


def rounded(values, dtype):
    """Round float64 or float32 values to a dtype, kept as float32 where NumPy has no such dtype."""
    if dtype == "bfloat16":
        bits = values.astype(np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
    return values.astype(dtype)


def gradient(slot, field, dtype):
    """Of a physical slot; numbers of very different size, so that the order of a sum shows."""
    rng = np.random.default_rng([3, slot, field])
    shape = GRADIENT_SHAPES[field]
    return rounded(np.array(rng.normal(0, 1, shape) * 10.0 ** rng.integers(-2, 2, shape)), dtype)


def is_present(slot, field):
    return not (slot in (0, 6, 9, 2) or (slot == 4 and field == 1))  # expert 2 has none, expert 4 neither


def expected_sum(expert, field, dtype, ranks=1, absent=False):
    total = None
    for slot in COPIES[expert][::ranks]:
        if absent or is_present(slot, field):
            wide = gradient(slot, field, dtype).astype(np.float64 if dtype == "float64" else np.float32)
            total = wide if total is None else total + wide
    return None if total is None else rounded(total, dtype)


def reduce_all(rank):
    """Every dtype, in every place; gradients of home slots afterwards, and whether replicas have any."""
    record = {}
    for dtype, how in itertools.product(FLOATS, HOWS):
        params = []
        for f, shape in enumerate(GRADIENT_SHAPES):
            grads = [torch.from_numpy(np.array(gradient(rank * SLOTS + s, f, dtype))) for s in range(SLOTS)]
            if how == "stacked":
                params.append(torch.nn.Parameter(torch.zeros(SLOTS, *shape, dtype=FLOATS[dtype])))
                params[f].grad = torch.stack(grads).to(FLOATS[dtype]).contiguous()
                continue
            kind = torch.int8 if how == "main_grad" else FLOATS[dtype]
            params.append([torch.zeros(shape, dtype=kind, requires_grad=how != "main_grad") for _ in range(SLOTS)])
            for s in range(SLOTS):
                there = is_present(rank * SLOTS + s, f)
                if how == "main_grad":
                    params[f][s].main_grad = grads[s].to(FLOATS[dtype]) * there
                elif there:
                    params[f][s].grad = grads[s].to(FLOATS[dtype])
        params.append([torch.zeros(2, dtype=torch.int8) for _ in range(SLOTS)])  # a field without gradients
        sync = sync_for(params)
        sync.reduce_gradients()

        def found(slot, params=params, how=how):
            if how == "stacked":
                return [field.grad[slot] for field in params[:2]]
            return [field[slot].main_grad if how == "main_grad" else field[slot].grad for field in params[:2]]

        left = [g for s in sync.replica_slots for g in found(s) if g is not None]
        assert not any(g.any() for g in left)
        assert len(left) == 0 or how != "parameters"
        record[dtype, how] = {rank * SLOTS + s: found(s) for s in sync.home_slots}
    return record


@pytest.fixture(scope="module")
def reduced(tmp_path_factory):
    return on_ranks(SIZE, tmp_path_factory.mktemp("reduced"), reduce_all)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("dtype", list(FLOATS))
def test_gradients_are_summed_in_the_order_of_ranks(dtype, how, reduced):
    order_shows = False
    for expert, home in enumerate(HOME):
        found = reduced[home // SLOTS][dtype, how][home]
        for field, (got, shape) in enumerate(zip(found, GRADIENT_SHAPES, strict=True)):
            expected = expected_sum(expert, field, dtype, absent=how == "stacked")
            if expected is None and how == "main_grad":
                expected = np.zeros(shape)
            if expected is None:
                assert got is None
                continue
            assert got.dtype == FLOATS[dtype]
            assert np.array_equal(got.double().numpy(), expected.astype(np.float64))
            backwards = expected_sum(expert, field, dtype, -1, how == "stacked")
            order_shows |= backwards is not None and not np.array_equal(backwards, expected)
    assert order_shows or dtype in ("bfloat16", "float16")  # there the last rounding may hide it


# Hooks: steps of all kinds, against sums in NumPy

N_STEPS = 40


def plan_of(step, layer):
    """For a step: its backward passes (under no_sync or not; which slots have tokens), then what is done with it."""
    rng = np.random.default_rng([4, step, layer])
    shared = np.random.default_rng([5, step])  # the same for all layers
    passes = []
    for _ in range(shared.integers(1, 4)):
        passes.append((bool(shared.random() < 0.4), rng.random(SIZE * SLOTS) < rng.choice([0.0, 0.3, 0.9])))
    return passes, ["reduce", "reduce", "reduce", "scale", "skip"][shared.integers(5)]


def part_of(step, layer, number, slot):
    return np.random.default_rng([6, step, layer, number, slot]).normal(0, 1, 7).astype(np.float32)


def into_main_grad(param, *_):
    """What Megatron hooks; as with its fused kernels, torch does not count the write."""
    param.main_grad.data.add_(param.grad)
    param.grad = None


class Layer:
    """One tensor per slot, in one of three ways, whose gradients are what `part_of` says."""

    def __init__(self, rank, number, how):
        self.rank, self.number, self.how = rank, number, how
        self.params = [torch.nn.Parameter(torch.zeros(7)) for _ in range(SLOTS)]
        self.field = torch.nn.Parameter(torch.zeros(SLOTS, 7)) if how == "stacked" else self.params
        self.nodes = []
        for param in self.params if how == "main_grad" else []:
            param.main_grad = torch.zeros(7)
            node = param.expand_as(param).grad_fn.next_functions[0][0]
            node.register_hook(partial(into_main_grad, param))
            self.nodes.append(node)

    def loss(self, step, number, tokens_in):
        terms = [
            (self.field[s] * torch.from_numpy(part_of(step, self.number, number, self.rank * SLOTS + s))).sum()
            for s in range(SLOTS)
            if tokens_in[self.rank * SLOTS + s]
        ]
        return sum(terms) if terms else torch.zeros(())

    def whole(self):
        grads = [getattr(p, "main_grad", p.grad) for p in self.params]
        return [self.field.grad] if self.how == "stacked" else grads

    def gradients(self):
        """A copy for each slot."""
        whole = self.whole()
        if self.how == "stacked":
            whole = [None] * SLOTS if whole[0] is None else whole[0]
        return [None if g is None else g.clone() for g in whole]

    def clear(self):
        for param in [self.field] if self.how == "stacked" else self.params:
            param.grad = None
            if self.how == "main_grad":
                param.main_grad.zero_()


def steps_with_hooks(rank):
    """Three layers of one group; layers hook in one order and are summed in another."""
    layers = [Layer(rank, number, how) for number, how in enumerate(HOWS)]
    syncs = [sync_for([layer.field], overlap=True) for layer in layers]
    original, started = dist.batch_isend_irecv, Counter()
    during = "reduce"

    def counted(operations):
        started[during, step] += len(operations)
        return original(operations)

    dist.batch_isend_irecv = counted
    record = []
    for step in range(N_STEPS):
        plans = [plan_of(step, layer.number) for layer in layers]
        during = "backward"
        for number, (quiet, _) in enumerate(plans[0][0]):
            loss = sum(layer.loss(step, number, plan[0][number][1]) for layer, plan in zip(layers, plans, strict=True))
            if not loss.requires_grad:
                continue
            if quiet:
                with syncs[0].no_sync(), syncs[1].no_sync(), syncs[2].no_sync():
                    loss.backward()
            else:
                loss.backward()
        during = "reduce"
        action = plans[0][1]
        if action == "scale":
            for grad in [g for layer in layers for g in layer.whole() if g is not None]:
                grad.mul_(0.5)
        if action != "skip":
            for sync in [syncs[1], syncs[2], syncs[0]]:
                sync.reduce_gradients()
        record.append([layer.gradients() for layer in layers])
        for layer in layers:
            layer.clear()
    for sync in syncs:
        if sync._early.under_way:
            sync.reduce_gradients()
        sync.close()
    return record, started


def accumulated(step, layer, how, slot, passes):
    """What the backward passes of a step leave in a slot, in float32."""
    total = None
    rank = slot // SLOTS * SLOTS
    for number, (_, tokens_in) in enumerate(passes):
        if tokens_in[slot]:
            part = part_of(step, layer, number, slot)
        elif how == "main_grad" or (how == "stacked" and tokens_in[rank : rank + SLOTS].any()):
            part = np.zeros(7, np.float32)
        else:
            continue
        total = part if total is None else total + part
    return total


def test_steps_with_hooks(tmp_path):
    results = on_ranks(SIZE, tmp_path, steps_with_hooks)
    n_checked = 0
    for step, (layer, how) in itertools.product(range(N_STEPS), enumerate(HOWS)):
        passes, action = plan_of(step, layer)
        factor = np.float32(0.5 if action == "scale" else 1)
        for slot, expert in enumerate(PHY2LOG):
            got = results[slot // SLOTS][0][step][layer][slot % SLOTS]
            if action == "skip":
                expected = accumulated(step, layer, how, slot, passes)
            elif slot == HOME[expert]:
                expected = None
                for copy in COPIES[expert]:
                    part = accumulated(step, layer, how, copy, passes)
                    if part is not None:
                        expected = part * factor if expected is None else expected + part * factor
            else:
                expected = None
            if expected is None and got is not None and how != "parameters":
                expected = np.zeros(7)
            n_checked += expected is not None and expected.any()
            assert (got is None) == (expected is None), (step, how, slot)
            assert got is None or np.array_equal(got.numpy(), expected), (step, how, slot)
    assert n_checked > 300
    # hooks have sent something, and every message of one rank has one on another
    assert sum(n for _, started in results for (during, _), n in started.items() if during == "backward") > 100
    assert sum(n for _, started in results for n in started.values()) % 2 == 0


def send_during_backward(rank):
    """All slots have tokens: hooks send all in the last backward pass, nothing before it and nothing later."""
    layer = Layer(rank, 0, "parameters")
    sync = sync_for([layer.field], overlap=True)
    original, started = dist.batch_isend_irecv, []
    dist.batch_isend_irecv = lambda operations: started.extend(operations) or original(operations)
    with sync.no_sync():
        layer.loss(0, 0, [True] * SIZE * SLOTS).backward()
    counts = [len(started)]
    layer.loss(0, 0, [True] * SIZE * SLOTS).backward()
    counts.append(len(started))
    closed = call(sync.close)
    sync.reduce_gradients()
    counts.append(len(started))
    kept = weakref.ref(sync)
    sync.close()
    del sync
    gc.collect()
    layer.loss(0, 0, [True] * SIZE * SLOTS).backward()
    return [*counts, len(started)], closed, kept() is None


def test_hooks_send_all_that_is_ready(tmp_path):
    for rank, (counts, closed, is_gone) in enumerate(on_ranks(SIZE, tmp_path, send_during_backward)):
        here = range(rank * SLOTS, (rank + 1) * SLOTS)
        out = sum(slot not in HOME for slot in here)
        come = sum(len(COPIES[PHY2LOG[slot]]) - 1 for slot in here if slot in HOME)
        assert counts == [0, out + come, out + come, out + come]
        assert closed == (
            "ValueError", "gradients are on their way, allowed is close() after reduce_gradients()"
        )  # fmt: skip
        assert is_gone


# Hooks with a backend without tags


def without_tags(rank):
    groups = [dist.new_group(), dist.new_group()]
    dist.get_backend_config = lambda group: "cpu:other"
    layer = Layer(rank, 0, "parameters")

    def refused(overlap):
        return call(lambda: sync_for([layer.field], overlap=overlap))

    record = [refused(True), refused(dist.group.WORLD)]
    first = sync_for([layer.field], overlap=groups[0])
    record.append(refused(groups[0]))
    second = sync_for([layer.field], overlap=groups[1])
    first.close()
    third = sync_for([layer.field], overlap=groups[0])
    layer.loss(0, 0, [True] * SIZE * SLOTS).backward()
    second.reduce_gradients()
    return record, [g is not None for g in layer.whole()], third.home_slots


def test_hooks_have_a_group_of_their_own_where_there_are_no_tags(tmp_path):
    for record, has_gradient, home_slots in on_ranks(SIZE, tmp_path, without_tags):
        for kind, message in record:
            assert kind == "ValueError"
            assert "overlap shares a group of backend 'other' with other calls" in message
        assert [s for s in range(SLOTS) if has_gradient[s]] == home_slots


# Copies that differ


def corrupt(rank):
    field = torch.stack([torch.full((3,), float(PHY2LOG[rank * SLOTS + s])) for s in range(SLOTS)])
    scale = [torch.tensor(1.0) for _ in range(SLOTS)]
    sync = sync_for([field, scale])
    good = call(sync.check)
    if rank == 2:
        field[0, 1] = -1  # expert 4 has no replica
        scale[2].fill_(-0.0)  # expert 1
    only = call(sync.check)
    if rank == 0:
        field[0, 0] = 9.0
    if rank == 3:
        field[2, 0] = 9.0  # expert 0, on two ranks the same
    two = call(sync.check)
    sync.broadcast()
    return good, only, two, call(sync.check), field[:, 0].tolist(), [float(t) for t in scale]


def test_check_names_what_differs(tmp_path):
    results = on_ranks(SIZE, tmp_path, corrupt)
    for rank, (good, only, two, again, first, scale) in enumerate(results):
        assert good is again is None
        assert only[0] == two[0] == "ValueError"
        assert "1 replicas differ from their originals: expert 1 in slot 2 of rank 2; allowed" in only[1]
        assert "3 replicas differ" in two[1]
        assert "expert 0 in slot 0 of rank 0, expert 1 in slot 2 of rank 2, expert 0 in slot 2 of rank 3;" in two[1]
        assert first == PHY2LOG[rank * SLOTS : (rank + 1) * SLOTS]
        assert scale == [1.0] * SLOTS


# One rank


def test_one_rank_without_a_group():
    params = [[torch.nn.Parameter(torch.ones(2)) for _ in range(3)]]
    sync = ReplicaSync(Placement([2, 0, 1], 1), params, overlap=True)
    (params[0][0] * 3).sum().backward()
    sync.reduce_gradients()
    assert params[0][0].grad.tolist() == [3, 3]
    assert params[0][1].grad is None
    assert sync.broadcast() == (0, 0, 0)
    sync.check()
    assert (sync.home.tolist(), sync.home_slots, sync.replica_slots) == ([1, 2, 0], [0, 1, 2], [])
    assert [p is q for p, q in zip(sync.parameters(), params[0], strict=True)] == [True] * 3
    sync.close()


# Bad input on one rank

SICK = 2
REFUSED = f"rank {SICK} refused its input, so no rank goes on: "
DIFFERS = f"rank {SICK} has another placement, home"


def leaves(n=SLOTS, requires_grad=True, shape=(2,), dtype=torch.float32):
    return [torch.zeros(shape, dtype=dtype).requires_grad_(requires_grad) for _ in range(n)]


def construct(placement=PHY2LOG, n_ranks=SIZE, params=None, home=HOME, **settings):
    placement = Placement(placement, n_ranks) if isinstance(placement, list) else placement
    params = [leaves()] if params is None else params
    return ReplicaSync(placement, params, dist.group.WORLD, home=home, **settings)


def reduce_with(make):
    """Reduce gradients that are one on every rank, after `make` has changed the tensors; if refused, none changes."""
    params = leaves()
    sync = construct(params=[params])
    for param in params:
        param.grad = torch.ones(2)
    make(params)
    before = [(p.grad, p.grad._version) for p in params]
    try:
        sync.reduce_gradients()
    except (TypeError, ValueError):
        assert all(p.grad is g and g._version == v for p, (g, v) in zip(params, before, strict=True))
        raise


def with_sparse(params):
    params[1].grad = torch.ones(2).to_sparse()


def with_main_grad_of_one(params):
    params[1].main_grad = torch.zeros(2, dtype=torch.float64)


def with_main_grads(params):
    for param in params:
        param.main_grad = torch.ones(2, dtype=torch.float64)


def with_main_grad_shape(params):
    params[0].main_grad = torch.ones(3)


def frozen(params):
    for param in params:
        param.requires_grad_(False)


def good_reduce(params):
    pass


# name: (call, the bad argument, the good one, exception, what the bad rank says)
ON_ONE_RANK = {
    "no placement": (lambda p: construct(p), None, PHY2LOG, "TypeError", "placement is a NoneType"),
    "ranks": (
        lambda n: construct([*range(N_LOGICAL)] if n == 2 else PHY2LOG, n, home=None), 2, SIZE,
        "ValueError", "placement has 2 ranks, allowed is the size",
    ),
    "slots": (
        lambda n: construct(params=[leaves(n)]), 2, SLOTS,
        "ValueError", "params has 2 slots, allowed are the placement's 3 per rank",
    ),
    "another placement": (
        lambda p: construct(p, home=None), [0, 1, 2, 0, 1, 3, 4, 0, 1, 2, 0, 5], PHY2LOG, "ValueError", DIFFERS,
    ),
    "another home": (lambda h: construct(home=h), [3, *HOME[1:]], HOME, "ValueError", DIFFERS),
    "home of another expert": (
        lambda h: construct(home=h), [1, *HOME[1:]], HOME,
        "ValueError", "home[0] is 1, allowed are the slots of expert 0, [0, 3, 7, 11]",
    ),
    "home shape": (lambda h: construct(home=h), HOME[1:], HOME, "ValueError", "home has shape [5]"),
    "home dtype": (lambda h: construct(home=h), [0.5] * 6, HOME, "TypeError", "home is a torch.float32 tensor [6]"),
    "home no numbers": (lambda h: construct(home=h), ["a"], HOME, "TypeError", "home is ['a'], allowed are 6 ints"),
    "other params": (
        lambda s: construct(params=[leaves(shape=s)]), (3,), (2,), "ValueError", f"rank {SICK} has other fields",
    ),
    "overlap no bool": (lambda o: construct(overlap=o), "yes", True, "TypeError", "overlap is a str"),
    "overlap on some": (lambda o: construct(overlap=o), True, False, "ValueError", DIFFERS),
    "hooks on results": (
        lambda p: construct(params=[p()], overlap=True), lambda: [p * 1 for p in leaves()], leaves,
        "ValueError", "params[0] holds a result of",
    ),
    "frozen on one": (
        lambda r: construct(params=[leaves(requires_grad=r)], overlap=True), False, True, "ValueError", DIFFERS,
    ),
    "sparse gradient": (reduce_with, with_sparse, good_reduce, "TypeError", "has layout torch.sparse_coo"),
    "main_grad on some": (
        reduce_with, with_main_grad_of_one, good_reduce,
        "ValueError", "params[0][1] has gradients of torch.float64, allowed are those of params[0][0], torch.float32",
    ),
    "main_grad shape": (
        reduce_with, with_main_grad_shape, good_reduce, "ValueError", "the gradient of params[0] has shape [3]",
    ),
    "other gradients": (reduce_with, with_main_grads, good_reduce, "ValueError", DIFFERS),
    "frozen": (reduce_with, frozen, good_reduce, "ValueError", DIFFERS),
}  # fmt: skip


def bad_input(rank):
    record = {}
    for name, (function, bad, good, *_) in ON_ONE_RANK.items():
        record[name] = call(function, bad if rank == SICK else good), call(reduce_with, good_reduce)
    sync = construct()
    record["methods"] = call(sync.check if rank == SICK else sync.broadcast)
    record["more methods"] = call(sync.check if rank == SICK else sync.reduce_gradients)
    record["after"] = call(sync.check)
    part = dist.new_group([0, 1])
    record["part"] = call(lambda: construct(overlap=part)) if rank < 2 else call(lambda: construct(overlap=True))

    # what a hook meets is told by reduce_gradients, on every rank
    layer = Layer(rank, 0, "parameters")
    sync = sync_for([layer.field], overlap=True)
    if rank == SICK:
        with_main_grad_shape(layer.params)
    layer.loss(0, 0, [True] * SIZE * SLOTS).backward()
    record["hooks"] = call(sync.reduce_gradients)
    for param in layer.params:
        param.main_grad = None
    record["hooks after"] = (
        call(sync.reduce_gradients),
        [p.grad is not None for p in layer.params] == [s in sync.home_slots for s in range(SLOTS)],
    )
    return record


@pytest.fixture(scope="module")
def sick_group(tmp_path_factory):
    return on_ranks(SIZE, tmp_path_factory.mktemp("sick_replicas"), bad_input)


@pytest.mark.parametrize("name", list(ON_ONE_RANK))
def test_bad_input_on_one_rank(name, sick_group):
    *_, kind, message = ON_ONE_RANK[name]
    for rank, record in enumerate(sick_group):
        raised, again = record[name]
        assert raised is not None, f"rank {rank} did not raise"
        assert raised[0] == kind, raised
        assert "allowed" in raised[1]
        if message.startswith(f"rank {SICK}"):
            assert raised[1].startswith(message)
        else:
            assert message in raised[1]
            assert raised[1].startswith(REFUSED) == (rank != SICK)
        assert again is None


def test_different_methods_and_groups(sick_group):
    for rank, record in enumerate(sick_group):
        for name in ("methods", "more methods"):
            assert record[name][0] == "ValueError"
            assert "called another method" in record[name][1]
        assert record["after"] is None
        assert record["part"][0] == "ValueError"
        assert "overlap is a group of the ranks [0, 1], allowed are those of group, [0, 1, 2, 3]" in record["part"][1]
        assert record["hooks"][0] in ("ValueError", "RuntimeError")
        assert rank == SICK or record["hooks"][1].startswith(REFUSED)
        assert record["hooks after"] == (None, True)


# Lost ranks


def die_while_training(rank, folder, overlap):
    layer = Layer(rank, 0, "parameters")
    sync = sync_for([layer.field], overlap=overlap)
    if rank == 1:
        torch.save(None, f"{folder}/{rank}.pt")
        if overlap:
            with sync.no_sync():
                layer.loss(0, 0, [True] * SIZE * SLOTS).backward()
        os.kill(os.getpid(), signal.SIGKILL)
    layer.loss(0, 0, [True] * SIZE * SLOTS).backward()
    leave(folder, rank, call(sync.reduce_gradients))


@pytest.mark.parametrize("overlap", [False, True])
def test_a_killed_rank_is_an_error_on_all_others(overlap, tmp_path):
    for rank, raised in enumerate(on_ranks(SIZE, tmp_path, die_while_training, str(tmp_path), overlap)):
        assert rank == 1 or raised[0] in ("RuntimeError", "LostRankError")
