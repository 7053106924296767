"""The integrations, on stand-ins with the interfaces of the systems that they are for."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from reference import ReferenceLP, integer_optimum
from test_distributed import call, on_ranks

from lplb import Placement, Planner
from lplb.compat.engines import map_topk_ids
from lplb.compat.megatron import physical_routing

N_RANKS, N_LOGICAL, TOP_K, HIDDEN = 4, 8, 2, 6
PHY2LOG = [0, 1, 4, 2, 3, 0, 4, 5, 0, 6, 7, 4]  # experts 0 and 4 on three ranks each
N_PHYSICAL = len(PHY2LOG)


def planner_of(group=None):
    return Planner.from_placement(Placement(PHY2LOG, N_RANKS), group=group)


def routed(seed, n):
    """Distinct experts for every token, mostly 0 and 4; int64 [n, TOP_K]."""
    rng = np.random.default_rng(seed)
    weight = np.where(np.isin(np.arange(N_LOGICAL), (0, 4)), 8.0, 1.0)
    rows = [rng.choice(N_LOGICAL, TOP_K, replace=False, p=weight / weight.sum()) for _ in range(n)]
    return torch.from_numpy(np.array(rows, dtype=np.int64).reshape(n, TOP_K))


def assert_balanced(logical, physical):
    """Each choice in a slot of its expert, and the busiest rank as the LP has it; both int [choices]."""
    assert np.array_equal(np.array(PHY2LOG)[physical], logical)
    optimum = ReferenceLP(np.array(PHY2LOG), N_RANKS).solve(np.bincount(logical, minlength=N_LOGICAL))[0]
    load = np.bincount(physical // (N_PHYSICAL // N_RANKS), minlength=N_RANKS)
    assert load.max() == integer_optimum(optimum, N_RANKS)


# Inference engines


class VllmRouter:
    """`BaseRouter` as vLLM has it: ids of a dtype that its kernels ask for, mapped after the top-k, loads recorded."""

    def __init__(self, planner, indices_type, n_unpadded):
        self.planner, self.indices_type, self.n_unpadded = planner, indices_type, n_unpadded
        self.eplb_state = SimpleNamespace(expert_load_view=torch.zeros(N_PHYSICAL, dtype=torch.int32))

    def select_experts(self, hidden_states, router_logits):
        weights, ids = torch.topk(router_logits.softmax(-1), TOP_K)
        ids = ids.to(self.indices_type)
        return weights, map_topk_ids(self.planner, ids, n_tokens=self.n_unpadded, load=self.eplb_state.expert_load_view)


@pytest.mark.parametrize("indices_type", [torch.int32, torch.int64, torch.uint32])
@pytest.mark.parametrize("n_unpadded", [None, -1, 0, 70, 100, torch.tensor(70), torch.tensor([-1])])
@pytest.mark.usefixtures("highs")
def test_vllm_ids(indices_type, n_unpadded):
    ids = routed(1, 100)
    logits = torch.full((100, N_LOGICAL), -9.0).scatter(1, ids, torch.tensor([1.0, 0.5]).expand(100, 2))
    router = VllmRouter(planner_of(), indices_type, n_unpadded)
    weights, mapped = router.select_experts(torch.zeros(100, HIDDEN), logits)
    assert mapped.dtype == indices_type
    assert weights.shape == mapped.shape
    n = int(-1 if n_unpadded is None else n_unpadded)
    n = 100 if n < 0 else n
    physical = mapped.view(torch.int32).numpy() if indices_type == torch.uint32 else mapped.numpy()
    assert (physical[n:] == -1).all()
    assert_balanced(ids[:n].flatten().numpy(), physical[:n].ravel())
    load = router.eplb_state.expert_load_view
    assert load.tolist() == np.bincount(physical[:n].ravel(), minlength=N_PHYSICAL).tolist()
    assert router.planner.last_plan.quota.tolist() == load.tolist()
    router.select_experts(torch.zeros(100, HIDDEN), logits)
    assert router.eplb_state.expert_load_view.sum() == 2 * n * TOP_K


def sglang_topk(planner, topk_ids, num_token_non_padded):
    """`topk_ids_logical_to_physical`, then padding to -1: the order in which SGLang's `select_experts` calls them."""
    topk_ids = map_topk_ids(planner, topk_ids, n_tokens=num_token_non_padded)
    topk_ids[torch.arange(len(topk_ids)) >= num_token_non_padded, :] = -1
    return topk_ids


@pytest.mark.usefixtures("highs")
def test_sglang_ids():
    ids = routed(2, 64).int()
    ids[3, 1] = -1  # no expert
    given = ids.clone()
    mapped = sglang_topk(planner_of(), given, torch.tensor(50, dtype=torch.int32))
    assert mapped is given
    assert (mapped[50:] == -1).all()
    assert mapped[3, 1] == -1
    real = ids[:50].flatten()
    assert_balanced(real[real >= 0].numpy(), mapped[:50].flatten()[real >= 0].numpy())


@pytest.mark.usefixtures("highs")
def test_padding_skews_nothing():
    """Padding that asks for one expert, anywhere in the batch, changes neither plan nor ids of the others."""
    ids = routed(3, 90)
    is_padding = torch.from_numpy(np.random.default_rng(4).random(90) < 0.4)
    one, other = ids.clone(), ids.masked_fill(is_padding[:, None], 0)
    planner = planner_of()
    map_topk_ids(planner, one, is_padding=is_padding)
    quota = planner.last_plan.quota
    map_topk_ids(planner, other, is_padding=is_padding)
    assert torch.equal(one, other)
    assert torch.equal(planner.last_plan.quota, quota)
    assert (one[is_padding] == -1).all()
    assert_balanced(ids[~is_padding].flatten().numpy(), one[~is_padding].flatten().numpy())
    strided = torch.stack([ids, ids], 2)[:, :, 0].clone().T.contiguous().T
    assert torch.equal(map_topk_ids(planner, strided, is_padding=is_padding), one)
    assert map_topk_ids(planner, ids[:0]).shape == (0, TOP_K)


def test_ids_in_one_graph():
    planner = planner_of()
    compiled = torch.compile(lambda ids, n: map_topk_ids(planner, ids, n_tokens=n) + 1, backend="eager", fullgraph=True)
    ids = routed(5, 40)
    want = map_topk_ids(planner, ids.clone(), n_tokens=torch.tensor(30))
    assert torch.equal(compiled(ids, torch.tensor(30)), want + 1)
    assert torch.equal(ids, want)


# Megatron


class Dispatcher:
    """A dispatcher with Megatron Core's methods, for all experts in one process: `num_moe_experts` of them."""

    def __init__(self, num_moe_experts):
        self.num_moe_experts = num_moe_experts

    def dispatch_preprocess(self, hidden_states, routing_map, probs):
        assert routing_map.dtype == torch.bool
        assert routing_map.shape == probs.shape == (len(hidden_states), self.num_moe_experts)
        self.tokens_per_expert = routing_map.sum(0)
        self.token = torch.arange(len(hidden_states)).expand(self.num_moe_experts, -1)[routing_map.T]
        self.shape = hidden_states.shape
        return hidden_states[self.token], probs.T[routing_map.T]

    def dispatch_postprocess(self, hidden_states, probs):
        return hidden_states, self.tokens_per_expert, probs

    def combine_postprocess(self, hidden_states):
        return torch.zeros(self.shape, dtype=hidden_states.dtype).index_add(0, self.token, hidden_states)


def moe_layer(dispatcher, weights, hidden_states, routing_map, probs):
    """Between router and output, as `MoELayer.forward`; probabilities are applied by the experts."""
    hidden_states, probs = dispatcher.dispatch_preprocess(hidden_states, routing_map, probs)
    hidden_states, tokens_per_expert, probs = dispatcher.dispatch_postprocess(hidden_states, probs)
    parts = hidden_states.split(tokens_per_expert.tolist())
    done = torch.cat([torch.tanh(part @ weight) for part, weight in zip(parts, weights, strict=True)])
    return dispatcher.combine_postprocess(done * probs[:, None]), tokens_per_expert


def routing(seed, n, dropped=0):
    """A routing map and its probabilities, some choices dropped."""
    rng = np.random.default_rng(seed)
    routing_map = torch.zeros(n, N_LOGICAL, dtype=torch.bool).scatter(1, routed(seed, n), True)
    for at in rng.integers(0, n, dropped):
        routing_map[at, rng.integers(0, N_LOGICAL)] = False
    probs = torch.from_numpy(rng.random((n, N_LOGICAL))) * routing_map
    return routing_map, probs.requires_grad_()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.usefixtures("highs")
def test_megatron_dispatch(padded):
    n = 80
    routing_map, probs = routing(6, n, dropped=20)
    is_padding = (torch.arange(n) % 5 == 0) if padded else None
    rng = np.random.default_rng(7)
    weights = torch.from_numpy(rng.standard_normal((N_LOGICAL, HIDDEN, HIDDEN)))
    x = torch.from_numpy(rng.standard_normal((n, HIDDEN))).requires_grad_()
    grad = torch.from_numpy(rng.standard_normal((n, HIDDEN)))

    wanted = routing_map if is_padding is None else routing_map & ~is_padding[:, None]
    logical, tokens = moe_layer(Dispatcher(N_LOGICAL), weights, x, wanted, probs)
    expected = torch.autograd.grad(logical, (x, probs), grad)

    mapped, shares = physical_routing(planner_of(), routing_map, probs, is_padding=is_padding)
    physical, slots = moe_layer(Dispatcher(N_PHYSICAL), weights[PHY2LOG], x, mapped, shares)
    torch.testing.assert_close(physical, logical, rtol=1e-12, atol=1e-12)
    for got, want in zip(torch.autograd.grad(physical, (x, probs), grad), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)

    assert slots.sum() == tokens.sum() == wanted.sum()
    assert (shares[~mapped] == 0).all()
    choices = mapped.nonzero()[:, 1].numpy()
    assert_balanced(np.array(PHY2LOG)[choices], choices)
    assert np.bincount(np.array(PHY2LOG)[choices], minlength=N_LOGICAL).tolist() == tokens.tolist()


# Under a group

IDS = torch.zeros(3, TOP_K, dtype=torch.int32)
MAP = torch.zeros(3, N_LOGICAL, dtype=torch.bool)
PROBS = torch.zeros(3, N_LOGICAL)
BAD_IDS = {
    "dtype": ({"topk_ids": IDS.float()}, "TypeError", "topk_ids is a torch.float32 tensor [3, 2], allowed"),
    "shape": ({"topk_ids": IDS[0]}, "ValueError", "topk_ids has shape [2], allowed is [tokens, top_k]"),
    "value": ({"topk_ids": IDS + 8}, "ValueError", "idx has 8 at flat position 0"),
    "mask": ({"is_padding": torch.zeros(2, dtype=torch.bool)}, "ValueError", "is_padding has shape [2], allowed"),
    "mask dtype": ({"is_padding": torch.zeros(3)}, "TypeError", "is_padding is a torch.float32 tensor [3], allowed"),
    "number": ({"n_tokens": torch.zeros(2).long()}, "ValueError", "n_tokens is a torch.int64 tensor [2], allowed"),
    "no number": ({"n_tokens": "3"}, "TypeError", "n_tokens is a str, allowed"),
    "load": ({"load": torch.zeros(3).int()}, "ValueError", "load has shape [3], allowed is [n_physical] = [12]"),
    "load dtype": ({"load": torch.zeros(12)}, "TypeError", "load is a torch.float32 tensor [12], allowed"),
}
BAD_MAPS = {
    "map": ({"routing_map": MAP.int()}, "TypeError", "routing_map is a torch.int32 tensor [3, 8], allowed is a bool"),
    "map shape": ({"routing_map": MAP[:, 1:]}, "ValueError", "routing_map has shape [3, 7], allowed is [tokens, 8]"),
    "probs": ({"probs": PROBS.int()}, "TypeError", "probs is a torch.int32 tensor [3, 8], allowed is a floating"),
    "probs shape": ({"probs": PROBS[1:]}, "ValueError", "probs has shape [2, 8], allowed is that of routing_map"),
    "padding": ({"is_padding": 3}, "TypeError", "is_padding is a int, allowed is a bool tensor or None"),
    "padding shape": ({"is_padding": MAP[0]}, "ValueError", "is_padding has 8 elements, allowed is one per token, 3"),
}


def over_ranks(rank):
    planner = planner_of(dist.group.WORLD)
    ids = routed([8, rank], (20, 0, 31, 4)[rank])
    load = torch.zeros(N_PHYSICAL, dtype=torch.int64)
    mapped = map_topk_ids(planner, ids.clone(), n_tokens=max(0, len(ids) - 2), load=load)
    record = {"ids": (ids, mapped, load, planner.last_plan.quota)}
    for name, (change, *_) in BAD_IDS.items():
        given = {"topk_ids": IDS, "load": torch.zeros(N_PHYSICAL).int(), **(change if rank == 2 else {})}
        before = given["topk_ids"].clone()
        raised = call(lambda given=given: map_topk_ids(planner, **given))
        record[name] = raised, torch.equal(given["topk_ids"], before) and not given["load"].any()
    for name, (change, *_) in BAD_MAPS.items():
        given = {"routing_map": MAP, "probs": PROBS, **(change if rank == 2 else {})}
        record[name] = call(lambda given=given: physical_routing(planner, **given)), True
    record["again"] = map_topk_ids(planner, ids.clone(), n_tokens=max(0, len(ids) - 2))
    return record


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return on_ranks(N_RANKS, tmp_path_factory.mktemp("four"), over_ranks)


@pytest.mark.usefixtures("highs")
def test_ids_over_ranks(four):
    ids, mapped, loads, quotas = zip(*(result["ids"] for result in four), strict=True)
    real = torch.cat(mapped) >= 0
    assert real.sum() == sum(max(0, len(part) - 2) for part in ids) * TOP_K
    assert_balanced(torch.cat(ids)[real].numpy(), torch.cat(mapped)[real].numpy())
    assert sum(loads).tolist() == quotas[0].tolist()
    for result, first in zip(four, mapped, strict=True):
        assert torch.equal(result["again"], first)


@pytest.mark.parametrize("name", [*BAD_IDS, *BAD_MAPS])
def test_a_refusal_of_one_rank_is_everyones(name, four):
    _, kind, said = (BAD_IDS | BAD_MAPS)[name]
    for rank, result in enumerate(four):
        (raised, message), kept = result[name]
        assert raised == kind
        assert said in message
        assert message.startswith("rank 2 refused its input, so no rank goes on: ") == (rank != 2)
        assert kept


def test_calls_may_lag():
    """The second batch follows the plan of the first, as `Planner.run` has it."""
    by_ids, by_map, expected = planner_of(), planner_of(), planner_of()
    for seed in range(3):
        ids = routed(seed, 60)
        want = expected.run(ids, None, lag=1)
        assert torch.equal(map_topk_ids(by_ids, ids.clone(), lag=1), want)
        wanted = torch.zeros(60, N_LOGICAL, dtype=torch.bool).scatter(1, ids, True)
        mapped, _ = physical_routing(by_map, wanted, wanted.double(), lag=1)
        assert torch.equal(mapped.sum(1), torch.full((60,), TOP_K))
    assert torch.equal(by_ids.last_plan.quota, expected.last_plan.quota)
    assert torch.equal(by_map.last_plan.quota, expected.last_plan.quota)
