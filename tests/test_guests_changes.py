"""What the EP layer with transfers makes of routes, weights and layers that are others than it counted on."""

import contextlib
import copy
import gc
import time

import pytest
import torch
import torch.distributed as dist
from test_distributed import call, on_ranks
from test_guests import (
    REFUSED,
    SICK,
    SLOTS,
    SOME,
    assert_as,
    hot_tokens,
    lending_layer,
    plain_copy,
    slots_of,
)
from test_nn import FFN, HIDDEN, N_EXPERTS, TOP_K, leaves_of

from lplb.nn import ExpertParallelMoE
from lplb.transfers import TransferPlanner
from lplb.weights import returning


@pytest.fixture(autouse=True)
def one_thread():
    """The tensors are so small that waking other threads takes longer than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Batches whose route, weights or order are not those of one call


def all_grads(layer, x):
    return [t.grad.clone() for t in (x, *leaves_of(layer))]


def clear_grads(layer, x):
    for tensor in (x, layer.router, *leaves_of(layer)):
        tensor.grad = None


def run_modes(rank):
    """Routes made without gradients and carried out with them, also on guests that were there before."""
    record = []
    lend = [lending_layer(4, dist.group.WORLD, slots_of(resend=resend)) for resend in (True, False)]
    for layer in (plain_copy(lend[0], 4, dist.group.WORLD), *lend):
        x, grad = hot_tokens(rank, SOME[rank], 30.0)
        found = []
        for _ in range(2):
            clear_grads(layer, x)
            with torch.no_grad():
                layer(x)  # the second time nothing needs to be sent
                route = layer.route(x)
            layer.compute(x, route).backward(grad)
            found += all_grads(layer, x)
        record.append(found)
    layer = lend[0]
    layer.experts.requires_grad_(False)
    route = layer.route(x)
    layer.experts.requires_grad_(True)
    return record, call(layer.compute, x, route)


def test_route_and_compute_in_other_grad_modes(four):
    for result in four:
        (plain, *lent), said = result["modes"]
        for got in lent:
            for value, want in zip(got, plain, strict=True):
                assert_as(value, want)
        assert said == (
            "ValueError",
            "experts require gradients in compute, and no rank's did in route: allowed is the same in both",
        )


def change(layers, by):
    for layer in layers:
        with torch.no_grad():
            for leaf in leaves_of(layer):
                leaf.mul_(by)


def run_stale(rank):
    layer = lending_layer(4, dist.group.WORLD)
    plain = plain_copy(layer, 4, dist.group.WORLD)
    x, grad = hot_tokens(rank, SOME[rank], 30.0)
    record = {}
    with torch.no_grad():
        layer(x)
        route = layer.route(x)
        change([layer, plain], 1.5)
        record["counted on"] = call(layer.compute, x, route)
        record["after"] = layer(x), plain(x)
        layer._lender.guests.forget()
        route = layer.route(x)
        # Away and back, as a swap of memory does it: the same marks, other weights on the way.
        held = [leaf.data for leaf in leaves_of(layer)]
        for leaf in leaves_of(layer):
            leaf.data = leaf.data * 2
        layer.compute(x, route)
        for leaf, data in zip(leaves_of(layer), held, strict=True):
            leaf.data = data
        record["back"] = layer(x), plain(x)
    for one in (layer, plain):  # a batch of the same plan, but of other weights, before a backward pass
        clear_grads(one, x)
        out = one(x)
        for by in (2, 0.5):
            for leaf in leaves_of(one):
                leaf.data.mul_(by)
            if one is layer:
                layer._lender.guests.forget()
            if by == 2:
                with torch.no_grad():
                    one(x)
        out.backward(grad)
        record["grads", one is layer] = all_grads(one, x)
    return record


def test_guests_are_never_stale(four):
    for result in four:
        stale = result["stale"]
        assert stale["counted on"][0] == "ValueError"
        assert "weights have changed since route" in stale["counted on"][1]
        for name in ("after", "back"):
            torch.testing.assert_close(*stale[name], rtol=0, atol=1e-10)
        for value, want in zip(stale["grads", True], stale["grads", False], strict=True):
            assert_as(value, want)


def run_misfits(rank):
    group = dist.group.WORLD
    guests = slots_of()
    layer, other = (lending_layer(4, group, guests, seed=seed) for seed in range(2))
    plain = plain_copy(layer, 4, group)
    x, _ = hot_tokens(rank, 20, 30.0)
    record = {"tokens": call(layer.compute, x[:19], layer.route(x))}
    record["other layer"] = call(other.compute, x, layer.route(x))
    record["no loan"] = call(layer.compute, x, plain.route(x))
    record["loan"] = call(plain.compute, x, layer.route(x))
    with torch.autocast("cpu", dtype=torch.bfloat16) if rank == SICK else contextlib.nullcontext():
        record["autocast"] = call(layer, x)
    mine = other.experts
    if rank == SICK:
        other.experts = layer.experts
    record["tied"] = call(other, x)
    other.experts = mine
    second = copy.deepcopy(layer)
    change([second], 1.5)
    with torch.no_grad():
        layer(x)
        want = plain_copy(second, 4, group)(x)
        record["copy"] = second(x), want, layer(x), plain(x)
    a, b = slots_of(), slots_of()
    for used in (a, b):
        lending_layer(4, group, used)
    record["guests swapped"] = call(lending_layer, 4, group, a if rank == SICK else b)
    record["after"] = layer(x).detach(), plain(x).detach()
    return record


def test_what_does_not_fit_is_refused(four):
    for rank, result in enumerate(four):
        found = result["misfits"]
        assert found["tokens"] == ("ValueError", "x has 19 tokens, allowed are as many as route was given, 20")
        for name in ("other layer", "no loan"):
            assert "route is of another layer" in found[name][1]
        assert "route is of a layer with transfers" in found["loan"][1]
        for name, message in (("autocast", "autocast is on, allowed with tr"), ("tied", "experts has been replaced, ")):
            assert message in found[name][1]
            assert found[name][1].startswith(REFUSED) == (rank != SICK)
        got, want, first, plain = found["copy"]
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
        torch.testing.assert_close(first, plain, rtol=0, atol=1e-12)
        assert f"rank {SICK} has guests with {SLOTS} slots, resend True and other la" in found["guests swapped"][1]
        torch.testing.assert_close(*found["after"], rtol=0, atol=1e-12)


def run_unseen_faults(rank):
    """Gradients of guests that do not come home, where own experts take no part in the backward pass."""
    layer = lending_layer(4, dist.group.WORLD)
    x, grad = hot_tokens(rank, SOME[rank], 30.0)
    sick = layer.route(x).loan.new[0].target_rank

    def fails(*_):
        raise ValueError("no memory for this")

    def only_x():
        torch.autograd.grad(layer(x), x, grad)

    record = {}
    for name, body in (("frozen here", lambda: layer(x).backward(grad)), ("only x", only_x)):
        layer.experts.requires_grad_(name != "frozen here" or rank != 3)
        with pytest.MonkeyPatch.context() as patch:
            if rank == sick:
                patch.setattr(returning, "pack", fails)
            record[name] = call(body), layer._lender.guests._in_use is None
        record[name, "again"] = call(body)
    return record


def test_no_backward_pass_ends_before_gradients_are_home(four):
    for result in four:
        for name in ("frozen here", "only x"):
            said, quiet = result["unseen"][name]
            assert "no memory for this" in said[1]
            assert quiet
            assert result["unseen"][name, "again"] is None


# Layers and their guests: what is refused, copied and given back


def planned_layer(guests, lag=0, group=None, **planned):
    planner = TransferPlanner(N_EXPERTS, 4, group=group, **planned)
    return ExpertParallelMoE(
        HIDDEN,
        FFN,
        N_EXPERTS,
        TOP_K,
        group=dist.group.WORLD,
        transfers=planner,
        guests=guests,
        dtype=torch.float64,
        lag=lag,
    )


class Model(torch.nn.Module):
    """One that has its guest slots before its layer, which a copy comes to first."""

    def __init__(self):
        super().__init__()
        self.guests = slots_of()
        self.layer = lending_layer(4, dist.group.WORLD, self.guests)


def times_checked(rank):
    """How often weights are looked at closely in three batches, and one after a change of memory."""
    layer, checked = lending_layer(4, dist.group.WORLD), []
    x, _ = hot_tokens(rank, SOME[rank])
    check = layer._lender.mover.check_unchanged
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer._lender.mover, "check_unchanged", lambda: checked.append(1) or check())
        for _ in range(3):
            layer(x)
        leaf = leaves_of(layer)[0]
        leaf.data = leaf.data.clone()
        layer(x)
    return len(checked)


def groups_in_turn(rank):
    """The second groups of layers each of which is gone before the next comes."""
    x, _ = hot_tokens(rank, SOME[rank])
    gc.collect()
    names = []
    for _ in range(3):
        layer = lending_layer(4, dist.group.WORLD)
        layer(x).sum().backward()
        apart = layer._lender.guests._apart
        names.append(apart.group.group_name)
        del layer
        gc.collect()
        end = time.monotonic() + 20
        while apart._number not in apart._free and time.monotonic() < end:  # the thread may be the last to hold them
            time.sleep(0.001)
    return names


def run_layers(rank):
    world = dist.group.WORLD
    record = {
        "lag": call(lambda: planned_layer(slots_of(), lag=1, slots=SLOTS)),
        "group": call(lambda: planned_layer(slots_of(), group=world, slots=SLOTS)),
        "any slots": call(lambda: planned_layer(slots_of())),
        "any slots, llep": call(lambda: planned_layer(slots_of(), strategy="llep")),
    }
    record["checked"] = times_checked(rank)
    model = Model()
    other = copy.deepcopy(model)
    record["shared"] = other.guests is model.guests is other.layer._lender.guests
    x, _ = hot_tokens(rank, SOME[rank])
    record["copies"] = other.layer(x).detach(), model.layer(x).detach()
    unused = slots_of()
    fresh = copy.deepcopy(unused)
    record["unused"] = fresh is not unused and fresh.settings == unused.settings and fresh.fields[0] is not None
    record["names"] = groups_in_turn(rank)
    return record


def test_layers_that_are_refused_copied_and_gone(four):
    for result in four:
        found = result["layers"]
        assert found["lag"] == ("ValueError", "lag is 1, allowed with transfers is 0")
        assert found["group"][1] == "transfers has a group, allowed is a planner without one: the layer gathers counts"
        for name in ("any slots", "any slots, llep"):
            assert (
                f"guests has {SLOTS} slots, allowed are as many as transfers plans for, {N_EXPERTS}" in found[name][1]
            )
        assert found["checked"] == 2  # at first, and after the change
        assert found["shared"]
        assert torch.equal(*found["copies"])
        assert found["unused"]
        # The same second group again, as its last user gave it back; the first may go to waste after the layers before.
        assert found["names"][1] == found["names"][2]


def run_on_four(rank):
    return {
        "modes": run_modes(rank),
        "stale": run_stale(rank),
        "misfits": run_misfits(rank),
        "unseen": run_unseen_faults(rank),
        "layers": run_layers(rank),
    }


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return on_ranks(4, tmp_path_factory.mktemp("four"), run_on_four)
