"""MindIE-SD's names: its documented snippet in a small model, whose outputs have to be those of the experts it asks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_distributed import on_ranks
from torch import nn

from lplb import Placement
from lplb.compat.mindie import dispatcher as module
from lplb.compat.mindie.collector import ExpertLoadCollector
from lplb.compat.mindie.dispatcher import DynamicDispatcher, first_placement
from lplb.compat.mindie.task_manager import construct_expert_info_transfer_pool
from lplb.dynamic.dispatcher import Dispatcher

ROOT = Path(__file__).resolve().parents[1]
EXPERTS, WIDTH, HIDDEN, TOP_K, TOKENS = 8, 4, 6, 2, 24
KEY = "a key of this test alone"


def whole(seed, *shape):
    """Small whole numbers in float64: sums of products are exact in any order."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).double()


def complete_weights(layer):
    return whole(100 + layer, EXPERTS, WIDTH, HIDDEN), whole(200 + layer, EXPERTS, HIDDEN, WIDTH)


def expected(layer, tokens, indices):
    """What the chosen experts make of the tokens, from the complete weights."""
    weight1, weight2 = complete_weights(layer)
    return sum(
        torch.einsum("th,thw->tw", torch.einsum("tw,twh->th", tokens, weight1[e]).relu(), weight2[e])
        for e in indices.unbind(1)
    )


def moe_init_routing(tokens, indices):
    """As ``torch_npu.npu_moe_init_routing``: rows and experts in the order of experts, and where a choice's row is."""
    expanded_indices, order = indices.flatten().sort(stable=True)
    return tokens[order // indices.shape[1]], order.argsort(), expanded_indices


def all_to_all(rows, receive, send):
    got = rows.new_empty(sum(receive), *rows.shape[1:])
    dist.all_to_all_single(got, rows.contiguous(), receive, send)
    return got


class Block(nn.Module):
    """A layer as MindIE-SD's documents wire it; the ranks ask each other's experts."""

    def __init__(self, layer, rank, ep_size, redundant):
        super().__init__()
        weight1, weight2 = complete_weights(layer)
        self.expert_load_collector = ExpertLoadCollector(EXPERTS, 1)
        self.dispatcher = DynamicDispatcher(EXPERTS, weight1, weight2, rank, ep_size, redundant=redundant)
        own = slice(rank * EXPERTS // ep_size, (rank + 1) * EXPERTS // ep_size)
        self.weight1, self.weight2, self.local_expert_num = weight1[own], weight2[own], EXPERTS // ep_size
        self.updates = 0

    def forward(self, tokens, indices):
        expanded_tokens, expanded_row_idx, expanded_indices = moe_init_routing(tokens, indices)

        self.expert_load_collector.collect_expert_load(expanded_indices)
        self.dispatcher.check_consistency()
        if self.dispatcher.update_flag:
            weight1, weight2, local_expert_num, device_indices_map, local_expert_indices_map, local_expert_list = (
                self.dispatcher.update_module_weight_and_map()
            )
            self.weight1 = weight1
            self.weight2 = weight2
            self.local_expert_num = local_expert_num
            self.updates += 1
            assert local_expert_indices_map[local_expert_list].tolist() == list(range(local_expert_num))
            assert device_indices_map.shape == (EXPERTS,)

        return self.grouped_matmul_finalize_routing(expanded_tokens, expanded_indices, expanded_row_idx)

    def grouped_matmul_finalize_routing(self, rows, experts, row_of_choice):
        rank = self.dispatcher.get_device_indices(experts)
        order = rank.argsort(stable=True)
        send = torch.bincount(rank, minlength=dist.get_world_size())
        receive = torch.empty_like(send)
        dist.all_to_all_single(receive, send)
        splits = receive.tolist(), send.tolist()
        slot = self.dispatcher.get_local_expert_indices(all_to_all(experts[order], *splits))
        come = all_to_all(rows[order], *splits)
        assert ((slot >= 0) & (slot < self.local_expert_num)).all()
        made = torch.zeros_like(come)
        for i in range(self.local_expert_num):
            made[slot == i] = (come[slot == i] @ self.weight1[i]).relu() @ self.weight2[i]
        back = torch.empty_like(rows)
        back[order] = all_to_all(made, *splits[::-1])
        return back[row_of_choice].view(-1, TOP_K, WIDTH).sum(1)


class Model(nn.Module):
    def __init__(self, layers, rank, ep_size, redundant):
        super().__init__()
        self.blocks = nn.ModuleList(Block(layer, rank, ep_size, redundant) for layer in range(layers))

    def forward(self, tokens, indices):
        """Every layer's output for tokens and choices ``[layers, tokens, top_k]``."""
        return torch.stack([block(tokens, index) for block, index in zip(self.blocks, indices, strict=True)])


def batch(step, rank, layers, popularity=None):
    seed = 1000 * step + rank
    popularity = torch.ones(EXPERTS) if popularity is None else popularity
    random = torch.Generator().manual_seed(seed)
    picks = [torch.multinomial(popularity.expand(TOKENS, -1), TOP_K, generator=random) for _ in range(layers)]
    return whole(seed, TOKENS, WIDTH), torch.stack(picks)


def pool(model, rank, **more):
    given = {"ip": None, "interval": 8, "poll": 0.002, "ranks_per_node": 2, **more}
    return construct_expert_info_transfer_pool(module=model, rank_in_group=rank, device="cpu", **given)


# ---- the snippet


def move_back_and_forth(rank, size, redundant, rounds):
    layers = 2
    model = Model(layers, rank, size, redundant)
    worker, queue = pool(model, rank, interval=10**6)
    rebalancer, seen, right, step = worker.rebalancer, [], True, 0
    for number in range(rounds):
        shifted = [
            Placement((model.blocks[i].dispatcher.placement.phy2log + 1 + i + number) % EXPERTS, size)
            for i in range(layers)
        ]
        rebalancer.move_to(shifted)
        for _ in range(5000):
            tokens, indices = batch(step, rank, layers)
            out = model(tokens, indices)
            right &= all(torch.equal(out[i], expected(i, tokens, indices[i])) for i in range(layers))
            step += 1
            if [block.dispatcher.placement for block in model.blocks] == shifted:
                break
        seen.append([block.dispatcher.placement == shifted[i] for i, block in enumerate(model.blocks)])
        for i, block in enumerate(model.blocks):
            held = block.dispatcher.local_expert_list
            right &= all(
                torch.equal(w, c[held])
                for w, c in zip((block.weight1, block.weight2), complete_weights(i), strict=True)
            )
    alive = worker.is_alive()
    dist.barrier()  # the first to exit ends it for all
    queue.put("exit")
    worker.join(1)
    return {
        "right": right,
        "seen": seen,
        "alive": (alive, worker.is_alive()),
        "updates": [block.updates for block in model.blocks],
        "complete": [block.dispatcher.complete for block in model.blocks],
    }


@pytest.mark.parametrize(("size", "redundant"), [(2, 0), (4, 1)])
def test_outputs_stay_while_experts_move(tmp_path, size, redundant):
    rounds = 3
    for result in on_ranks(size, tmp_path / "ranks", move_back_and_forth, size, redundant, rounds):
        assert result["right"]
        assert result["seen"] == [[True, True]] * rounds
        assert result["alive"] == (True, False)
        assert result["updates"] == [1 + rounds] * 2  # the first shows the weights
        assert result["complete"] == [None, None]


def follow_a_scheduler(rank, size, port):
    model = Model(1, rank, size, 1)
    worker, queue = pool(model, rank, ip="127.0.0.1", port=port, auth_key=KEY)
    popularity = torch.tensor([20.0, 10, 10, 1, 1, 1, 1, 1])  # all on the first ranks
    dispatcher, right = model.blocks[0].dispatcher, True
    for step in range(20000):
        tokens, indices = batch(step, rank, 1, popularity)
        right &= torch.equal(model(tokens, indices)[0], expected(0, tokens, indices[0]))
        if dispatcher.epoch:
            break
    stats = worker.rebalancer.stats()
    queue.put_nowait(None)
    return right, dispatcher.epoch, dispatcher.placement.phy2log.tolist(), stats.last_reason


def test_a_scheduler_plans(tmp_path):
    pytest.importorskip("zmq", reason="needs pyzmq, which is not installed")
    pytest.importorskip("msgpack", reason="needs msgpack, which is not installed")
    size = 2
    flags = f"--world_size {size} --port 0 --expert_num {EXPERTS} --block_num 1 --redundant 1 --mode A2A".split()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "EPLB_AUTH_KEY": KEY}
    scheduler = subprocess.Popen(
        [sys.executable, "-m", "lplb.eplb_scheduler", *flags], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        port = int(scheduler.stdout.readline().rsplit(":", 1)[1])
        results = on_ranks(size, tmp_path / "ranks", follow_a_scheduler, size, port)
    finally:
        scheduler.terminate()
        scheduler.wait(30)
        scheduler.stdout.close()
    for right, epoch, phy2log, reason in results:
        assert right
        assert epoch > 0, reason
        assert phy2log == results[0][2] != first_placement(EXPERTS, size, 1).phy2log.tolist()


def gather_all(rank, size):
    """Mode AG: every rank has all tokens, and takes its slots' part of the scores."""
    model = Model(1, rank, size, 1)
    worker, queue = pool(model, rank, mode="AG", interval=10**6)
    block, right = model.blocks[0], True
    dispatcher = block.dispatcher
    target = Placement((dispatcher.placement.phy2log + 3) % EXPERTS, size)
    worker.rebalancer.move_to([target])
    for step in range(5000):
        tokens, indices = batch(step, 0, 1)  # the same on every rank
        scores = torch.zeros(TOKENS, EXPERTS, dtype=torch.float64).scatter(1, indices[0], 1.0)
        block.expert_load_collector.collect_expert_load(indices[0])
        if dispatcher.check_consistency():
            block.weight1, block.weight2, n_slots, *_ = dispatcher.update_module_weight_and_map()
        trans_scores = torch.matmul(scores, dispatcher.get_expert_trans_tensor(scores))
        share = trans_scores / dispatcher.logcnt[dispatcher.phy2log.long()]  # two copies at most: halves are exact
        mine = share.view(TOKENS, size, n_slots)[:, rank]
        made = torch.einsum("tsh,shw->tsw", torch.einsum("tw,swh->tsh", tokens, block.weight1).relu(), block.weight2)
        out = torch.einsum("tsw,ts->tw", made, mine)
        dist.all_reduce(out)
        right &= torch.equal(out, expected(0, tokens, indices[0]))
        if dispatcher.placement == target:
            break
    queue.put("exit")
    return right, dispatcher.placement == target


def test_all_gather_with_the_permutation(tmp_path):
    assert on_ranks(2, tmp_path / "ranks", gather_all, 2) == [(True, True)] * 2


# ---- faults that no rank may raise alone


def construct_badly(rank, size, case):
    model = Model(1, rank, size, 0)
    bad = {"rank": {"rank_in_group": 0}, "ip": {"ip": 7, "port": 1}, "port": {"ip": "localhost", "port": 70000}}[case]
    given = {"module": model, "rank_in_group": rank, "ip": None, **(bad if rank == 1 else {})}
    try:
        construct_expert_info_transfer_pool(**given)
    except (TypeError, ValueError) as error:
        return type(error).__name__, str(error), model.blocks[0].dispatcher.complete is not None
    return None


@pytest.mark.parametrize(
    ("case", "kind", "says"),
    [
        ("rank", "ValueError", "rank_in_group is 0, allowed is this process's in the group, 1"),
        ("ip", "TypeError", "ip is 7, allowed is the name or number of a host, or None"),
        ("port", "ValueError", "port is 70000, allowed is 1 to 65535"),
    ],
)
def test_an_error_on_one_rank_is_raised_on_all(tmp_path, case, kind, says):
    for result in on_ranks(2, tmp_path / "ranks", construct_badly, 2, case):
        name, message, still_there = result
        assert name == kind
        assert says in message
        assert still_there


def construct_with_odd_settings(rank, size):
    model = Model(1, rank, size, 0)
    try:
        pool(model, rank, mode="EX")  # without a budget
    except ValueError as error:
        return str(error), model.blocks[0].dispatcher.complete is not None
    return None


def test_settings_are_those_of_the_rebalancer(tmp_path):
    for message, still_there in on_ranks(2, tmp_path / "ranks", construct_with_odd_settings, 2):
        assert "max_moves" in message
        assert still_there


def test_what_is_no_model_of_these_is_refused():
    block = nn.Module()
    block.expert_load_collector = ExpertLoadCollector(EXPERTS)
    block.dispatcher = Dispatcher(first_placement(EXPERTS, 1), complete_weights(0), 0)
    with pytest.raises(ValueError, match="a Dispatcher without complete weights, allowed is a DynamicDispatcher"):
        construct_expert_info_transfer_pool(module=block, rank_in_group=0, ip=None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is an accelerator")
def test_a_device_number_wants_an_accelerator():
    with pytest.raises(ValueError, match="device is 0, allowed on a machine without an accelerator are 'cpu' and None"):
        construct_expert_info_transfer_pool(module=nn.Module(), rank_in_group=0, ip=None, device=0)


def test_a_device_that_torch_has_not_is_refused():
    for device in ("foo", "cpu:x"):
        with pytest.raises(ValueError, match=f"device is '{device}', allowed is one that torch has"):
            construct_expert_info_transfer_pool(nn.Module(), 0, device, None)
        with pytest.raises(ValueError, match=f"device is '{device}', allowed is one that torch has"):
            DynamicDispatcher(EXPERTS, *complete_weights(0), 0, 1, device=device)


# ---- one process


def one_rank(redundant=0):
    model = nn.Module()
    model.expert_load_collector = ExpertLoadCollector(EXPERTS)
    model.dispatcher = DynamicDispatcher(EXPERTS, *complete_weights(0), 0, 1, redundant=redundant)
    return model


def test_exit_ends_and_other_instructions_are_refused():
    worker, queue = construct_expert_info_transfer_pool(one_rank(), 0, "cpu", None, None, None)  # by position too
    assert worker.is_alive()
    worker.join(0.01)  # nobody has said exit
    with pytest.raises(ValueError, match="item is 'profile', allowed are 'exit' and None"):
        queue.put("profile")
    assert worker.is_alive()
    queue.put("exit")
    worker.join()
    assert not worker.is_alive()


def test_both_spellings_are_the_same_and_one_is_needed():
    weights = complete_weights(0)
    documented = DynamicDispatcher(
        expert_num=EXPERTS, weight1=weights[0], weight2=weights[1], rank_in_group=1, ep_size=2
    )
    in_code = DynamicDispatcher(routed_expert_num=EXPERTS, weight1=weights[0], weight2=weights[1], ep_rank=1, ep_size=2)
    for dispatcher in (documented, in_code):
        assert (dispatcher.routed_expert_num, dispatcher.ep_rank, dispatcher.ep_size) == (EXPERTS, 1, 2)
        assert dispatcher.local_expert_list == [4, 5, 6, 7]
        assert dispatcher.device_indices_map.tolist() == [0] * 4 + [1] * 4
        assert dispatcher.local_expert_indices_map.tolist() == [-1] * 4 + [0, 1, 2, 3]
    assert ExpertLoadCollector(routed_expert_num=5).routed_expert_num == 5
    with pytest.raises(TypeError, match="both are given of expert_num and routed_expert_num"):
        ExpertLoadCollector(5, routed_expert_num=5)
    with pytest.raises(TypeError, match="neither is given of rank_in_group and ep_rank"):
        DynamicDispatcher(EXPERTS, *weights, ep_size=2)


def test_the_first_pass_shows_the_weights_and_no_other_does():
    dispatcher = DynamicDispatcher(EXPERTS, *complete_weights(0), 1, 2, redundant=2)
    assert not dispatcher.update_flag
    assert dispatcher.check_consistency()
    assert dispatcher.check_consistency()  # it has not been looked at
    update = dispatcher.update_module_weight_and_map()
    assert len(update) == 6
    weight1, weight2, local_expert_num, device_indices_map, local_expert_indices_map, local_expert_list = update
    assert local_expert_list == [4, 5, 6, 7, 0, 1]
    assert local_expert_num == 6
    assert torch.equal(weight1, complete_weights(0)[0][local_expert_list])
    assert torch.equal(weight2, complete_weights(0)[1][local_expert_list])
    assert device_indices_map.tolist() == [1, 1, 0, 0, 1, 1, 1, 1]  # rank 1 has 0 and 1 itself
    assert local_expert_indices_map.tolist() == [4, 5, -1, -1, 0, 1, 2, 3]
    assert not dispatcher.update_flag
    assert not dispatcher.check_consistency()
    with pytest.raises(RuntimeError, match="while no swap is due"):
        dispatcher.update_module_weight_and_map()


def test_spare_slots_may_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("EPLB_REDUNDANT", "2")
    assert DynamicDispatcher(EXPERTS, *complete_weights(0), 0, 2).local_expert_num == 6
    assert DynamicDispatcher(EXPERTS, *complete_weights(0), 0, 2, redundant=0).local_expert_num == 4
    monkeypatch.setenv("EPLB_REDUNDANT", "some")
    with pytest.raises(ValueError, match="EPLB_REDUNDANT in the environment is 'some', allowed is 0 or more"):
        DynamicDispatcher(EXPERTS, *complete_weights(0), 0, 2)


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"expert_num": 9}, ValueError, "expert_num is 9, allowed is a multiple of ep_size = 2"),
        ({"rank_in_group": 2}, ValueError, "rank_in_group is 2, allowed is 0 to 1"),
        ({"redundant": 5}, ValueError, "redundant is 5, allowed is 0 to 4"),
        ({"weight1": None}, TypeError, r"weight1 is a NoneType, allowed is a tensor \[expert_num, \.\.\.\]"),
        ({"weight2": torch.zeros(4, 3)}, ValueError, r"weight2 has shape \[4, 3\], allowed is \[expert_num, \.\.\.\]"),
        ({"ep_size": None}, TypeError, "ep_size is None, allowed is an int"),
    ],
)
def test_odd_arguments_are_refused(given, error, says):
    weight1, weight2 = complete_weights(0)
    usual = {"expert_num": EXPERTS, "weight1": weight1, "weight2": weight2, "rank_in_group": 0, "ep_size": 2}
    with pytest.raises(error, match=says):
        DynamicDispatcher(**{**usual, **given})


def test_another_device_only_before_the_first_pass(monkeypatch):
    dispatcher = DynamicDispatcher(EXPERTS, *complete_weights(0), 0, 2)
    assert dispatcher.to(None) is dispatcher.to("cpu") is dispatcher
    dispatcher.check_consistency()
    monkeypatch.setattr(module, "checked_device", torch.device)
    with pytest.raises(RuntimeError, match="allowed is another device only before the first forward pass"):
        dispatcher.to("cuda")


def test_the_collector_tells_what_is_new():
    collector = ExpertLoadCollector(4, lb_interval=2, window=3)
    random = torch.Generator().manual_seed(3)
    calls = [torch.randint(-1, 4, (n,), generator=random) for n in (5, 0, 7, 3, 9, 1, 2, 8)]
    counted = [torch.bincount(idx[idx >= 0], minlength=4) for idx in calls]
    told = []
    for number, idx in enumerate(calls):
        collector.collect_expert_load(idx)
        if number in (2, 3, 5):
            told.append(collector.get_expert_load())
    assert torch.equal(told[0], sum(counted[:3]))
    assert torch.equal(told[1], counted[3])
    assert torch.equal(told[2], sum(counted[4:6]))
    assert told[0].dtype == torch.int64
    collector.collect_expert_load(indices_expert=calls[0])
    collector.reset()
    assert not collector.get_expert_load().any()
    assert collector.clock == 4  # a rebalancer's rows stay
    for idx in calls:  # more rows than are kept: the last three, and nothing is open
        collector.collect_expert_load(idx)
    collector.collect_expert_load(calls[0])
    assert torch.equal(collector.get_expert_load(), sum(counted[3:]) + counted[0])
