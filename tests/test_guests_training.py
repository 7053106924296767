"""The EP layer with transfers in training: steps, memory, what goes on beside what, and what runs around the layer."""

import contextlib
import copy
import pickle
import threading
import weakref

import pytest
import torch
import torch.distributed as dist
from test_distributed import call, on_ranks
from test_guests import SOME, hot_tokens, lending_layer, plain_copy, slots_of
from test_nn import N_EXPERTS, assert_near, eplb, leaves_of, of_all, step
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from lplb import borrowing, nn
from lplb.nn import keep_routes
from lplb.weights import ReplicaSync

SIZE = 4


@pytest.fixture(autouse=True)
def one_thread():
    """The tensors are so small that waking other threads takes longer than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Training: the same weights after some steps of Adam, with guests and with resident copies as well


def layers_to_train(group):
    yield "plain", plain_copy(lending_layer(SIZE, group), SIZE, group)
    yield "guests", lending_layer(SIZE, group)
    yield "guests kept", lending_layer(SIZE, group, slots_of(resend=False))
    yield "copies and guests", lending_layer(SIZE, group, slots_of(slots=1), placement=eplb(SIZE, 2))


def run_training(rank):
    record = {}
    for name, layer in layers_to_train(dist.group.WORLD):
        sync = ReplicaSync(layer.placement, layer.expert_fields, dist.group.WORLD, home=layer.home)
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.05, eps=1e-3)  # which bounds what Adam makes of rounding
        travelled, losses = 0, []
        for seed in range(4):
            x, target = hot_tokens(10 * seed + rank, SOME[rank])
            optimizer.zero_grad()
            loss = (layer(x) - target).square().sum()
            loss.backward()
            dist.all_reduce(layer.router.grad)
            sync.reduce_gradients()
            optimizer.step()
            sync.broadcast()
            losses.append(loss.item())
            if layer.transfers is not None:
                travelled += layer.route(x).loan.plan.n_transfers
        record[name] = dict(layer.state_dict()), losses, travelled
    return record


def test_training_is_the_same(four):
    trained = {name: {} for name in four[0]["training"]}
    for result in four:
        for name, (held, losses, travelled) in result["training"].items():
            trained[name] |= held
            assert losses == pytest.approx(result["training"]["plain"][1], rel=1e-10)
            assert (travelled > 0) == (name != "plain")
    for held in trained.values():
        assert held.keys() == trained["plain"].keys()
        for key, value in held.items():
            torch.testing.assert_close(value, trained["plain"][key], rtol=0, atol=1e-10)


# Memory, counted in the storages of tensors that are alive


class Alive(TorchDispatchMode):
    """The most bytes of storages at a time that operators within have made."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known = set()
        self._lock = threading.RLock()  # the thread that moves weights may be the last to hold a tensor

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage(), given)
        return out

    def _see(self, storage, given):
        key = storage._cdata
        if key in given or key in self._known or not storage.nbytes():
            return
        with self._lock:
            self._known.add(key)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, storage.nbytes())

    def _gone(self, key, nbytes):
        with self._lock:
            self._known.discard(key)
            self.now -= nbytes


# name: dtype, features of a token, layers, whether guests come again, whether layers are checkpointed
MEMORY = {
    "float64": (torch.float64, 16, 1, True, False),
    "bfloat16": (torch.bfloat16, 64, 1, True, False),
    "two layers": (torch.float64, 16, 2, True, False),
    "two layers, guests kept": (torch.float64, 16, 2, False, False),
    "two checkpointed layers": (torch.float64, 16, 2, True, True),
}
FEW, MANY, OWN = 200, 1000, 4


def run_memory(rank):
    """Peaks of a forward and backward pass on every rank, what it received, and what the layer says of that."""
    record = {}
    for name, (dtype, hidden, layers, resend, again) in MEMORY.items():
        guests = slots_of(hidden, dtype, resend=resend)
        chain = [lending_layer(SIZE, dist.group.WORLD, guests, dtype, hidden, 1, seed) for seed in range(layers)]
        with torch.no_grad():
            for layer in chain:  # all tokens want expert 9, which lives on rank 1
                layer.router.zero_()
                layer.router[9] = 1
        counted = 1 if again else layers
        said = [chain[0].tokens_within(10**9 * times, layers=counted) for times in (1, 2)]
        for n in (FEW, MANY):  # tokens of the other ranks: those of rank 0 are few
            x = torch.randn(OWN if rank == 0 else n, hidden, generator=torch.Generator().manual_seed(rank)) + 3
            x = x.to(dtype).requires_grad_()
            for leaf in (leaf for layer in chain for leaf in (layer.router, *leaves_of(layer))):
                leaf.grad = None
            received = []
            with Alive() as alive:
                out = x
                for layer in chain:
                    out = checkpoint(layer, out, use_reentrant=False, context_fn=keep_routes) if again else layer(out)
                    received.append(int(layer.received.sum()))
                out.sum().backward()
            record[name, n] = alive.peak, received, said, guests.nbytes, guests.expert_bytes
            del out
    return record


@pytest.mark.parametrize("name", list(MEMORY))
def test_memory_is_as_the_layer_says(name, four):
    dtype, hidden, layers, *_ = MEMORY[name]
    few, many = (four[0]["memory"][name, n] for n in (FEW, MANY))
    per_row = 10**9 / (few[2][1] - few[2][0])
    assert len(set(few[1])) == len(set(many[1])) == 1  # every layer is balanced
    grown = (many[0] - few[0]) / (many[1][0] - few[1][0])
    late = hidden * dtype.itemsize  # gloo's threads may hold what an exchange brought for a moment longer
    assert 0.9 * (per_row - late) < grown < per_row
    # What does not grow: gradients of own experts are as large as they are, guests' slots were there before.
    fixed = 10**9 - few[2][0] * per_row
    gradients = layers * N_EXPERTS // SIZE * few[4]
    of_own_tokens = layers * OWN * 20 * hidden * 8
    assert many[0] < fixed - few[3] + gradients + many[1][0] * per_row + of_own_tokens


def run_one_hot_expert(rank, size):
    """Of the tokens 95 % want expert 0: peaks of both layers, guest slots included, and what they received."""
    hidden = 64
    guests = slots_of(hidden, torch.float32, slots=2)
    lend = lending_layer(size, dist.group.WORLD, guests, torch.float32, hidden, 1)
    draw = torch.Generator().manual_seed(rank)
    wanted = torch.randint(0, N_EXPERTS, (512,), generator=draw) * (torch.rand(512, generator=draw) >= 0.95)
    x = torch.randn(512, hidden, generator=draw)
    x[:, :N_EXPERTS] = 50.0 * torch.nn.functional.one_hot(wanted, N_EXPERTS)
    with torch.no_grad():
        lend.router.copy_(torch.eye(N_EXPERTS, hidden))
    record = []
    for layer in (plain_copy(lend, size, dist.group.WORLD, hidden, 1, torch.float32), lend):
        x.grad = None
        with Alive() as alive:
            layer(x.requires_grad_()).sum().backward()
        record.append((alive.peak + guests.nbytes * (layer is lend), int(layer.received.sum())))
    return record


def test_one_hot_expert_takes_a_quarter_of_the_memory(tmp_path):
    size = 8
    plain, lent = zip(*on_ranks(size, tmp_path, run_one_hot_expert, size), strict=True)
    assert max(rows for _, rows in plain) > 0.93 * size * 512
    assert [rows for _, rows in lent] == [512] * size
    assert max(peak for peak, _ in plain) >= 4 * max(peak for peak, _ in lent)


def test_memory_that_does_not_suffice():
    layer = lending_layer(1, None)
    least = next(int(word) for word in call(layer.tokens_within, 0)[1].split() if word.isdigit() and int(word) > 0)
    assert layer.tokens_within(least) == 1
    with pytest.raises(ValueError, match=f"memory_bytes is {least - 1}, allowed is {least} or more"):
        layer.tokens_within(least - 1)
    with pytest.raises(ValueError, match="layers is 0, allowed is 1 or more"):
        layer.tokens_within(least, layers=0)
    with pytest.raises(ValueError, match="the layer has no transfers, allowed is a layer with them"):
        plain_copy(layer, 1, None).tokens_within(least)


# What goes on beside what


def run_order(rank):
    """The order in which a rank begins and awaits things, forward and backward, of two layers."""
    guests = slots_of()
    layers = [lending_layer(SIZE, dist.group.WORLD, guests, seed=seed) for seed in range(2)]
    x, grad = hot_tokens(rank, SOME[rank])
    events = []
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())

        def told(owner, name, event):
            method = getattr(owner, name)
            patch.setattr(owner, name, lambda *given, **how: events.append(event) or method(*given, **how))

        told(guests, "start", "set out")
        told(dist, "all_to_all_single", "tokens")
        told(borrowing.Bank, "serve", "serve")
        told(borrowing.Bank, "differentiate", "differentiate")
        out = layers[1](layers[0](x))
        forward = list(events)
        events.clear()
        out.backward(grad)
    return forward, events


def test_weights_are_on_their_way_while_tokens_are(four):
    one = ["tokens", "set out", "tokens", "serve", "serve", "tokens"]  # the first are split sizes
    for result in four:
        forward, backward = result["order"]
        assert forward == 2 * one
        # The second layer's guests are there still. Gradients go home while those of tokens go back.
        last = ["tokens", "differentiate", "differentiate", "set out", "tokens"]
        assert backward == [*last, "set out", *last]


# What runs around the layer


def run_around(rank):
    group = dist.group.WORLD
    record = {}
    layer = lending_layer(SIZE, group)
    x, grad = hot_tokens(rank, SOME[rank])
    record["want"] = step(layer, x, grad)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        for leaf in leaves_of(layer):
            leaf.mul_(2)
    record["copy"] = step(other, x, grad)
    with torch.no_grad():
        for leaf in leaves_of(layer):
            leaf.div_(2)
    record["shared"] = other.transfers is layer.transfers, other._lender.guests is layer._lender.guests
    record["pickle"] = call(pickle.dumps, layer)
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="eager")
    with torch.no_grad():
        record["whole graph"] = call(torch.compile(layer, backend="eager", fullgraph=True), x)
        torch.compiler.reset()
        record["compiled"] = compiled(x), layer(x)
    half = lending_layer(SIZE, group, slots_of(dtype=torch.bfloat16), torch.bfloat16)
    plain = plain_copy(half, SIZE, group).bfloat16()
    plain.load_state_dict(half.state_dict())
    x, grad = hot_tokens(rank, SOME[rank], dtype=torch.bfloat16)
    record["bfloat16"] = step(half, x, grad), step(plain, x, grad)
    return record


def test_copies_compiled_layers_and_bfloat16(four):
    rows = {name: [result["around"][name] for result in four] for name in four[0]["around"]}
    assert_near(of_all(rows["copy"]), of_all(rows["want"]), 0)
    for result in four:
        around = result["around"]
        assert around["shared"] == (True, True)
        assert around["pickle"] is not None
        assert torch.equal(*around["compiled"])
        assert around["whole graph"] is not None
    got, want = (of_all(list(kind)) for kind in zip(*rows["bfloat16"], strict=True))
    assert_near(got, want, 30 * torch.finfo(torch.bfloat16).eps)


def test_one_process_has_no_guests():
    layer = lending_layer(1, None)
    plain = plain_copy(layer, 1, None)
    x, grad = hot_tokens(0, 30)
    got, want = step(layer, x, grad), step(plain, x, grad)
    assert_near(of_all([got]), of_all([want]), 1e-12)
    assert got["received"].sum() == want["received"].sum()


def test_grouped_products_are_the_same(monkeypatch):
    if not hasattr(torch.nn.functional, "grouped_mm"):
        pytest.skip("needs torch.nn.functional.grouped_mm")
    layer = lending_layer(1, None, slots_of(dtype=torch.float32), torch.float32)
    x, grad = hot_tokens(0, 40, dtype=torch.float32)
    want = step(layer, x, grad)
    monkeypatch.setattr(nn, "has_grouped_matmul", lambda *_: True)
    assert_near(of_all([step(layer, x, grad)]), of_all([want]), 1e-5)


def run_on_four(rank):
    return {
        "training": run_training(rank),
        "order": run_order(rank),
        "memory": run_memory(rank),
        "around": run_around(rank),
    }


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return on_ranks(SIZE, tmp_path_factory.mktemp("four"), run_on_four)
