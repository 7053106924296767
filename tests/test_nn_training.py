"""The EP layer in training and serving: steps with replicas, and weights that follow new placements."""

import pytest
import torch
import torch.distributed as dist
from test_distributed import call, on_ranks
from test_nn import (
    FFN,
    HIDDEN,
    N_EXPERTS,
    TOP_K,
    assert_near,
    dense,
    eplb,
    layer_of,
    leaves_of,
    of_all,
    on_topology,
    step,
    tokens,
)

from lplb import Placement, Planner, topology
from lplb.nn import ExpertParallelMoE
from lplb.weights import ReplicaSync

SIZE = 4


# Training: replicas come home after every backward pass, and follow their originals after every step


def train(rank, names):
    """Adam on every balancer; weights of homes, outputs and what copies hold after some steps."""
    record = {}
    for name in names:
        layer = layer_of(name, SIZE, dist.group.WORLD)
        sync = ReplicaSync(layer.placement, layer.expert_fields, dist.group.WORLD, home=layer.home)
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.05, eps=1e-3)  # which bounds what Adam makes of rounding
        for seed in range(4):
            x, target = tokens(10 * seed + rank, (30, 0, 17, 1)[rank])
            optimizer.zero_grad()
            loss = (layer(x) - target).square().sum()
            loss.backward()
            dist.all_reduce(layer.router.grad)
            sync.reduce_gradients()
            optimizer.step()
            sync.broadcast()
        sync.check()
        record[name] = dict(layer.state_dict()), loss.item()
    return record


# Placements that change

PLACEMENTS = {
    "eplb": lambda group: Planner.from_placement(eplb(SIZE, 2), group=group),
    "another eplb": lambda group: Planner.from_placement(eplb(SIZE, 2, seed=5), group=group),
    "fewer slots": lambda group: Planner.from_placement(eplb(SIZE, 1, seed=6), group=group),
    "torus": lambda group: on_topology(topology.torus(2, 2), SIZE, group),
    "none": lambda group: None,
    "all everywhere": lambda group: Planner.from_placement(Placement(list(range(N_EXPERTS)) * SIZE, SIZE), group=group),
}
TOUR = ["eplb", "another eplb", "torus", "none", "all everywhere", "fewer slots", "none"]


def spoil_copies(layer):
    first = layer._ranks.rank * len(layer.expert_fields[0])
    with torch.no_grad():
        for leaves in layer.expert_fields:
            for slot, leaf in enumerate(leaves, first):
                if slot not in layer.home.tolist():
                    leaf.fill_(torch.nan)


def tour(rank):
    """One layer through all placements; what it computes in each, and what became of its parameters."""
    group = dist.group.WORLD
    layer = layer_of("none", SIZE, group)
    record = []
    for name in TOUR:
        before, home = dict(layer.experts.named_parameters()), layer.placement.rank_of[layer.home]
        spoil_copies(layer)  # homes come from homes
        moved = layer.follow(PLACEMENTS[name](group))
        after = dict(layer.experts.named_parameters())
        sync = ReplicaSync(layer.placement, layer.expert_fields, group, home=layer.home)
        sync.broadcast()
        sync.check()
        record.append(
            {
                "step": step(layer, *tokens(rank, 20)),
                "moved": moved,
                "kept": {key for key in before.keys() & after.keys() if before[key] is after[key]},
                "names": set(after),
                "homes": (home, layer.placement.rank_of[layer.home]),
                "placement": layer.placement,
            }
        )
    return record


def remap(rank):
    """LPLB's own way: the planner learns of loads, and the weights follow it."""
    planner = on_topology(topology.ring(SIZE), SIZE, dist.group.WORLD)
    torch.manual_seed(0)
    layer = ExpertParallelMoE(HIDDEN, FFN, N_EXPERTS, TOP_K, balancer=planner, dtype=torch.float64)
    x, grad = tokens(rank, 20)
    first = step(layer, x, grad)
    planner.update_redundancy_mapping(torch.arange(N_EXPERTS).roll(7))
    refused = call(layer, x)
    layer.follow(planner)
    return first, refused, step(layer, x, grad)


def bad_follow(rank):
    group = dist.group.WORLD
    layer = layer_of("eplb", SIZE, group)
    x, grad = tokens(rank, 20)
    record = [step(layer, x, grad)]
    good = PLACEMENTS["another eplb"](group)
    torus = PLACEMENTS["torus"](group)
    for bad in (7, torus, Planner.from_placement(eplb(SIZE, 2)), None):
        record.append((call(layer.follow, bad if rank == 1 else good), step(layer, x, grad)))
    layer.follow(good)
    return [*record, step(layer, x, grad)]


def on_four(rank):
    return {
        "train": train(rank, ["none", "torus", "eplb"]),
        "tour": tour(rank),
        "remap": remap(rank),
        "bad": bad_follow(rank),
    }


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return on_ranks(SIZE, tmp_path_factory.mktemp("four"), on_four)


def test_training_is_the_same_with_every_balancer(four):
    start = layer_of("none", 1, None).state_dict()
    weights = {name: {} for name in ("none", "torus", "eplb")}
    for result in four:
        for name, (held, loss) in result["train"].items():
            weights[name] |= held
            assert loss == pytest.approx(result["train"]["none"][1], rel=1e-10)
    for held in weights.values():
        assert held.keys() == start.keys()
        for key, value in held.items():
            torch.testing.assert_close(value, weights["none"][key], rtol=0, atol=1e-10)
    assert sum(not torch.equal(value, start[key]) for key, value in weights["none"].items()) > len(start) / 2


def test_weights_follow_placements(four):
    start = layer_of("none", 1, None).state_dict()
    for i in range(len(TOUR)):
        rows = [result["tour"][i]["step"] for result in four]
        want, loads = dense(rows)
        assert_near(of_all(rows), want, 1e-12)
        for key, value in {key: value for row in rows for key, value in row["parameters"].items()}.items():
            assert torch.equal(value, start[f"experts.{key}"])
        assert sum(int(row["received"].sum()) for row in rows) == sum(loads)


def test_homes_stay_where_they_can(four):
    for rank, result in enumerate(four):
        for stop in result["tour"]:
            before, after = stop["homes"]
            for e in range(N_EXPERTS):
                names = {f"gate_up.{e}", f"down.{e}"}
                holders = stop["placement"].rank_of[stop["placement"].phy2log == e].tolist()
                assert after[e] == before[e] or before[e] not in holders
                assert after[e] in holders
                assert (names <= stop["names"]) == (after[e] == rank)
                assert (names <= stop["kept"]) == (after[e] == before[e] == rank)
    sent = sum(result["tour"][0]["moved"].bytes_sent for result in four)
    assert sent == sum(result["tour"][0]["moved"].bytes_received for result in four) > 0
    assert all(result["tour"][4]["kept"] == result["tour"][3]["names"] for result in four)


def test_weights_follow_a_remapped_planner(four):
    first = [result["remap"][0] for result in four]
    after = [result["remap"][2] for result in four]
    assert not torch.equal(first[0]["phy2log"], after[0]["phy2log"])
    for result in four:
        assert "the balancer has another placement than the weights of this layer" in result["remap"][1][1]
    want, _ = dense(first)
    assert_near(of_all(first), want, 1e-12)
    assert_near(of_all(after), want, 1e-12)


def test_a_bad_balancer_changes_nothing(four):
    for rank, result in enumerate(four):
        first, *refused, last = result["bad"]
        said = [
            ("TypeError", "balancer is a int, allowed is an lplb.Planner or None"),
            ("ValueError", "rank 1 has another placement than rank 0"),
            ("ValueError", "balancer plans for one process without a group, allowed is"),
            ("ValueError", "rank 1 has another placement than rank 0"),
        ]
        for (raised, again), (kind, message) in zip(refused, said, strict=True):
            assert raised[0] == kind
            assert message in raised[1]
            assert raised[1].startswith("rank 1 ") or rank == 1
            assert torch.equal(again["results"]["out"], first["results"]["out"])
            assert torch.equal(again["phy2log"], first["phy2log"])
        assert not torch.equal(last["phy2log"], first["phy2log"])
        torch.testing.assert_close(last["results"]["out"], first["results"]["out"], rtol=0, atol=1e-12)


def test_one_process_follows_too():
    layer = layer_of("none", 1, None)
    x, grad = tokens(0, 30)
    want = of_all([step(layer, x, grad)])
    for name in TOUR:
        optimizer = torch.optim.SGD(layer.parameters(), momentum=0.9)
        kept = {id(p) for p in layer.parameters()}
        spoil_copies(layer)
        moved = layer.follow(PLACEMENTS[name](None))
        assert moved.bytes_sent == moved.bytes_received == 0
        assert {id(p) for p in layer.parameters()} == kept
        assert_near(of_all([step(layer, x, grad)]), want, 1e-12)
        optimizer.zero_grad()


def test_frozen_weights_stay_frozen():
    layer = layer_of("eplb", SIZE, None).requires_grad_(False)
    for leaf in leaves_of(layer):
        leaf.requires_grad_(False)
    layer.follow(PLACEMENTS["another eplb"](None))
    assert not any(leaf.requires_grad for leaf in leaves_of(layer))


def test_what_inference_mode_has_made_can_be_trained():
    plain = layer_of("none", 1, None)
    with torch.inference_mode():
        layer = layer_of("none", 1, None)
        layer.follow(PLACEMENTS["eplb"](None))
        layer(tokens(1, 10)[0])
        layer.follow(PLACEMENTS["another eplb"](None))
    x, grad = tokens(0, 30)
    assert_near(of_all([step(layer, x, grad)]), of_all([step(plain, x, grad)]), 1e-12)
