"""Bad input to a transfer planner: what was seen and what is allowed, and under a group on every rank."""

import pytest
import torch
import torch.distributed as dist
from test_distributed import on_ranks

from lplb import Placement
from lplb.cost import HARDWARE
from lplb.models import MODELS
from lplb.transfers import TransferPlanner

MODEL = MODELS["gpt-oss-120b"]

REFUSED = [
    ({"n_logical": 0}, ValueError, "n_logical is 0, allowed is 1 to 65536"),
    ({"n_logical": 10**7, "ep_size": 128}, ValueError, "n_logical is 10000000, allowed is 1 to 65536"),
    ({"n_logical": 8.0}, TypeError, "n_logical is 8.0, allowed is an int"),
    ({"ep_size": 0}, ValueError, "ep_size is 0, allowed is 1 to 128"),
    ({"ep_size": 129}, ValueError, "ep_size is 129, allowed is 1 to 128"),
    ({"strategy": "eplb"}, ValueError, "strategy is 'eplb', allowed are 'llep', 'joint', 'auto'"),
    ({"strategy": None}, ValueError, "strategy is None, allowed are"),
    ({"alpha": 0.99}, ValueError, "alpha is 0.99, allowed is 1 to 1000"),
    ({"alpha": float("nan")}, ValueError, "alpha is nan, allowed is 1 to 1000"),
    ({"alpha": float("inf")}, ValueError, "alpha is inf, allowed is 1 to 1000"),
    ({"alpha": "1.1"}, TypeError, "alpha is '1.1', allowed is a number"),
    ({"m": -1}, ValueError, "m is -1, allowed is 0 to"),
    ({"m": 1.5}, TypeError, "m is 1.5, allowed is an int"),
    ({"lam": 0.9}, ValueError, "lam is 0.9, allowed is 1 or more"),
    ({"lam": float("nan")}, ValueError, "lam is nan, allowed is 1 or more"),
    ({"slots": 0}, ValueError, "slots is 0, allowed is 1 to 8"),
    ({"slots": 9}, ValueError, "slots is 9, allowed is 1 to 8"),
    ({"tolerance": -0.01}, ValueError, "tolerance is -0.01, allowed is 0 to 1000"),
    ({"tolerance": float("nan")}, ValueError, "tolerance is nan, allowed is 0 to 1000"),
    ({"tolerance": True}, TypeError, "tolerance is True, allowed is a number"),
    ({"domain": 3}, ValueError, "ep_size is 4, allowed is a multiple of domain = 3"),
    ({"domain": 5}, ValueError, "domain is 5, allowed is 1 to 4"),
    ({"compat": 1}, TypeError, "compat is 1, allowed is True or False"),
    ({"max_tokens": -1}, ValueError, "max_tokens is -1, allowed is 0 to"),
    ({"max_tokens": 3.5}, TypeError, "max_tokens is 3.5, allowed is an int"),
    (
        {"max_bytes": 10, "expert_bytes": 1000},
        ValueError,
        "max_bytes is 10, allowed is 0 or at least expert_bytes = 1000",
    ),
    ({"max_bytes": 10}, ValueError, "max_bytes is 10, allowed without expert_bytes or a model is None"),
    ({"max_bytes": -1, "expert_bytes": 1}, ValueError, "max_bytes is -1, allowed is 0 or more"),
    ({"max_bytes": 9, "expert_bytes": 1, "strategy": "llep"}, ValueError, "allowed with strategy 'llep' is None"),
    ({"expert_bytes": 0}, ValueError, "expert_bytes is 0, allowed is 1 or more"),
    ({"strategy": "auto"}, ValueError, "model is None, allowed with strategy 'auto' is an lplb.models.ModelShape"),
    ({"model": "deepseek-v3"}, TypeError, "model is a str, allowed is an lplb.models.ModelShape or None"),
    ({"model": MODEL, "hardware": "h100"}, TypeError, "hardware is a str, allowed is an lplb.cost.Hardware or None"),
    ({"model": MODEL, "ranks_per_node": 3}, ValueError, "ep_size is 4, allowed is a multiple of ranks_per_node = 3"),
    ({"ranks_per_node": 0}, ValueError, "ranks_per_node is 0, allowed is 1 to 4"),
    ({"placement": 5}, TypeError, "placement is a int, allowed is an lplb.Placement, for each rank"),
    ({"placement": "ab"}, TypeError, "placement is a str, allowed is"),
    ({"placement": [[0, 1], [2, 3]]}, ValueError, "placement is of 2 ranks, allowed is ep_size = 4"),
    ({"placement": [[0, 1], [2, 3], [4, 5], 6]}, TypeError, "placement[3] is a int, allowed is a sequence of experts"),
    ({"placement": [[0, 1], [2, 3], [4, 5], [6, 8]]}, ValueError, "placement[3][1] is 8, allowed is 0 to 7"),
    ({"placement": [[0, 1], [2, -3], [4, 5], [6, 7]]}, ValueError, "placement[1][1] is -3, allowed is 0 to 7"),
    ({"placement": [[0, 1.0], [2, 3], [4, 5], [6, 7]]}, TypeError, "placement[0][1] is 1.0, allowed is an int"),
    (
        {"placement": [[0, 1, 0], [2, 3], [4, 5], [6, 7]]},
        ValueError,
        "placement[0] has expert 0 in slots 0 and 2, allowed is once on a rank",
    ),
    (
        {"placement": [[0, 1], [2, 3], [], [6]]},
        ValueError,
        "placement has 3 of 8 experts on no rank: 4, 5, 7; allowed is at least one copy each",
    ),
    ({"placement": Placement(range(8), 2)}, ValueError, "placement has n_ranks 2, allowed is ep_size = 4"),
    ({"placement": Placement(range(4), 4)}, ValueError, "placement has n_logical 4, allowed is n_logical = 8"),
    ({"device": "meta"}, RuntimeError, "has no META backend"),
    ({"group": 7}, TypeError, "group is a int, allowed is a torch.distributed.ProcessGroup"),
]


@pytest.mark.parametrize(("given", "kind", "message"), REFUSED, ids=[m for *_, m in REFUSED])
def test_settings(given, kind, message):
    settings = {"n_logical": 8, "ep_size": 4, **given}
    with pytest.raises(kind) as caught:
        TransferPlanner(settings.pop("n_logical"), settings.pop("ep_size"), **settings)
    assert message in str(caught.value)


def good():
    return torch.arange(32).view(4, 8)


def changed(index, value, dtype=torch.int64):
    counts = good().to(dtype)
    counts[index] = value
    return counts


BATCHES = [
    (None, TypeError, "counts is a NoneType, allowed is a torch.Tensor"),
    ([[1] * 8] * 4, TypeError, "counts is a list, allowed is a torch.Tensor"),
    (good().float(), TypeError, "counts has dtype torch.float32, allowed is torch.int32 or torch.int64"),
    (good().bool(), TypeError, "counts has dtype torch.bool"),
    (good().to_sparse(), TypeError, "counts has layout torch.sparse_coo, allowed is torch.strided"),
    (good()[:3], ValueError, "counts has shape [3, 8], allowed is [ranks, n_logical] = [4, 8], or [n_logical] = [8]"),
    (good().T, ValueError, "counts has shape [8, 4], allowed is"),
    (torch.zeros((), dtype=torch.int64), ValueError, "counts has shape [], allowed is"),
    (changed((2, 3), -1), ValueError, "counts[2, 3] is -1, allowed is 0 or more"),
    (changed((0, 0), -7, torch.int32), ValueError, "counts[0, 0] is -7, allowed is 0 or more"),
    (changed((3, 7), -(2**63)), ValueError, "counts[3, 7] is -9223372036854775808, allowed is 0 or more"),
    (changed((1, 1), 2**52), ValueError, "counts add up to 4503599627370983, allowed are at most 4503599627370495"),
    (changed(slice(None), 2**62), ValueError, "counts add up to 147573952589676412928, allowed are at most"),
    (good().sum(0) - 60, ValueError, "counts[0] is -12, allowed is 0 or more"),
    (good().to("meta"), ValueError, "counts is on 'meta', allowed is the planner's device, 'cpu'"),
]


@pytest.mark.parametrize("strategy", ["joint", "llep", "auto"])
@pytest.mark.parametrize(("counts", "kind", "message"), BATCHES, ids=[m for *_, m in BATCHES])
def test_counts(strategy, counts, kind, message):
    planner = TransferPlanner(8, 4, strategy=strategy, model=MODEL)
    for call in (planner.plan, planner.front):
        with pytest.raises(kind) as caught:
            call(counts)
        assert message in str(caught.value)
    assert planner.plan(good()).max_load > 0


def test_the_largest_batch():
    counts = torch.zeros(4, 8, dtype=torch.int64)
    counts[0, 0] = 2**52 - 1
    for strategy in ("joint", "llep"):
        plan = TransferPlanner(8, 4, strategy=strategy, m=1).plan(counts)
        assert int(plan.rank_load.sum()) == 2**52 - 1
        assert plan.max_load <= 1.1 * 2**50


def held(*guests, slots=2):
    table = torch.full((4, slots), -1, dtype=torch.int32)
    for rank, slot, expert in guests:
        table[rank, slot] = expert
    return table


HELD = [
    ([1], TypeError, "held is a list, allowed is a torch.int32 tensor, an lplb.TransferPlan or None"),
    (
        held().long(),
        TypeError,
        "held is a torch.int64 tensor [4, 2], allowed is a torch.int32 tensor, an lplb.TransferPlan or None",
    ),
    (held(slots=3), ValueError, "held has shape [4, 3], allowed is [ranks, slots] = [4, 2]"),
    (held((1, 1, 8)), ValueError, "held[1, 1] is 8, allowed is -1 to 7"),
    (held((3, 0, -2)), ValueError, "held[3, 0] is -2, allowed is -1 to 7"),
    (held((2, 0, 5)), ValueError, "held has expert 5 on rank 2, where it is resident, allowed are others"),
    (held((1, 0, 0), (1, 1, 0)), ValueError, "held has expert 0 more than once on rank 1, allowed is once"),
    (
        held((2, 0, 0)),
        ValueError,
        "held has expert 0 on rank 2, allowed are experts that live in its domain of 2 ranks",
    ),
]


@pytest.mark.parametrize(("given", "kind", "message"), HELD, ids=[m for *_, m in HELD])
def test_held(given, kind, message):
    planner = TransferPlanner(8, 4, slots=2, domain=2)
    for call in (planner.plan, planner.front):
        with pytest.raises(kind) as caught:
            call(good(), held=given)
        assert message in str(caught.value)
    assert planner.plan(good(), held=held((1, 0, 0), (0, 1, 2))).n_transfers >= 0


def test_plans_are_held():
    planner = TransferPlanner(8, 4, slots=2)
    plan = planner.plan(good())
    assert planner.plan(good(), held=plan).fingerprint() == planner.plan(good(), held=plan.guests).fingerprint()
    for other in (TransferPlanner(8, 4, slots=3), TransferPlanner(8, 2, slots=2)):
        with pytest.raises(ValueError, match=r"held has shape \[4, 2\], allowed is"):
            other.plan(good()[: other.n_ranks], held=plan)
    elsewhere = TransferPlanner(8, 4, slots=2, placement=[[6, 7], [4, 5], [2, 3], [0, 1]])
    assert (plan.guests >= 0).any()
    unseen = planner.plan(good())
    for number in (8, -2, 2**31 - 1, -(2**31)):
        unseen.guests.numpy()[2, 1] = number  # which torch does not see
        for call in (planner.plan, planner.front):
            with pytest.raises(ValueError, match=rf"held\[2, 1\] is {number}, allowed is -1 to 7"):
                call(good(), held=unseen)
    plan.guests.fill_(8)  # not as it was made
    with pytest.raises(ValueError, match=r"held\[0, 0\] is 8, allowed is -1 to 7"):
        planner.plan(good(), held=plan)
    plan.guests.fill_(-1)
    plan.guests[0, 0] = 6
    with pytest.raises(ValueError, match="held has expert 6 on rank 0, where it is resident"):
        elsewhere.plan(good(), held=plan)


def test_tensors_that_are_negated_when_read():
    """A bit of a tensor says that its values are those of memory, negated."""
    planner = TransferPlanner(8, 4, slots=2)
    plan = planner.plan(good())
    lazily = torch._neg_view(-good())
    assert lazily.is_neg()
    again = planner.plan(lazily)
    assert again.fingerprint() == plan.fingerprint()
    assert planner.front(lazily) == planner.front(good())
    assert torch.equal(again.tokens_by_source(), plan.tokens_by_source())
    with pytest.raises(ValueError, match=r"counts\[0, 1\] is -1, allowed is 0 or more"):
        planner.plan(torch._neg_view(good()))
    guests = torch._neg_view(-plan.guests)
    assert planner.plan(good(), held=guests).fingerprint() == planner.plan(good(), held=plan.guests).fingerprint()
    indices = torch.repeat_interleave(torch.arange(8), good()[1])
    assert torch.equal(plan.route(torch._neg_view(-indices), 1), plan.route(indices, 1))


def test_many_experts():
    """Most there may be, all at home on one rank too; what only held guests need is not made without them."""
    TransferPlanner(1 << 16, 2, slots=1, placement=[range(1 << 16), []])
    planner = TransferPlanner(1 << 16, 128, slots=1)
    assert "_most_held" not in vars(planner)
    counts = torch.zeros(1 << 16, dtype=torch.int64)
    counts[5] = 1280
    assert planner.plan(counts).max_load == 10


def test_llep_keeps_no_copies():
    with pytest.raises(ValueError, match="allowed with strategy 'llep' is None"):
        TransferPlanner(8, 4, slots=2, strategy="llep").plan(good(), held=held())


def test_routes():
    plan = TransferPlanner(8, 4).plan(good())
    indices = torch.repeat_interleave(torch.arange(8), good()[1])
    assert plan.route(indices, 1).shape == indices.shape
    for given, kind, message in (
        ((indices, 4), ValueError, "rank is 4, allowed is 0 to 3"),
        ((indices, 0.0), TypeError, "rank is 0.0, allowed is an int"),
        ((indices.float(), 1), TypeError, "idx has dtype torch.float32"),
        ((indices, 2), ValueError, "allowed is"),
    ):
        with pytest.raises(kind) as caught:
            plan.route(*given)
        assert message in str(caught.value)
    counts = good()
    plan = TransferPlanner(8, 4).plan(counts)
    counts += 1
    with pytest.raises(ValueError, match="counts was written to since the plan was made"):
        plan.route(indices, 1)
    counts = good()
    plan = TransferPlanner(8, 4).plan(counts)
    counts.numpy()[1, 3] += 2  # which torch does not see
    for call in (lambda: plan.route(indices, 1), plan.tokens_by_source):
        with pytest.raises(ValueError, match=r"counts has 62 tokens of expert 3, allowed is what .* made for, 60: "):
            call()
    alone = TransferPlanner(8, 4).plan(good().sum(0))
    assert len(alone.tokens_by_source()) == 1
    with pytest.raises(ValueError, match="rank is 1, allowed is 0 to 0"):
        alone.route(indices, 1)


def test_inference_tensors():
    with torch.inference_mode():
        counts = good()
    plan = TransferPlanner(8, 4).plan(counts)
    assert plan.route(torch.repeat_interleave(torch.arange(8), good()[1]), 1).numel() == int(good()[1].sum())


# Under a group


def raised(call):
    try:
        call()
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def settings_on(rank, which):
    """Rank 1 is given something else."""
    odd = {
        "other": {"tolerance": 0.1},
        "bad": {"alpha": 0.5},
        "placement": {"placement": [[1, 0], [2, 3], [4, 5]]},
        "size": {},
        "costs": {"model": MODEL, "hardware": HARDWARE["h100"], "ranks_per_node": 1},
    }
    common = {"model": MODEL, "ranks_per_node": 1} if which == "costs" else {}
    return 7 if which == "size" and rank == 1 else 6, {**common, **(odd[which] if rank == 1 else {})}


def making(rank):
    found = []
    for which in ("other", "bad", "placement", "size", "costs"):
        n_logical, settings = settings_on(rank, which)
        found.append(raised(lambda n=n_logical, s=settings: TransferPlanner(n, 3, group=dist.group.WORLD, **s)))
    found.append(raised(lambda: TransferPlanner(6, 4, group=dist.group.WORLD)))
    found.append(raised(lambda: TransferPlanner(6, 3, group=dist.group.WORLD)))
    return found


def test_planners_are_made_alike_or_nowhere(tmp_path):
    results = on_ranks(3, tmp_path / "making", making)
    for rank, found in enumerate(results):
        for message in (found[0], found[2], found[3], found[4]):
            assert "rank 1 has another placement or other settings" in message
        if rank == 1:
            assert found[1] == "ValueError: alpha is 0.5, allowed is 1 to 1000"
        else:
            assert "rank 1 refused its input" in found[1]
            assert "alpha is 0.5" in found[1]
        assert "ep_size is 4, allowed is the size of the group, 3" in found[5]
        assert found[6] is None


def batch_of(n_ranks, n_logical):
    generator = torch.Generator().manual_seed(3)
    counts = torch.randint(0, 50, (n_ranks, n_logical), generator=generator)
    counts[:, 0] += 500
    return counts


def planning(rank):
    """Rank 1 is given garbage of every kind; between, all ranks plan as if nothing had been."""
    planner = TransferPlanner(6, 3, slots=2, group=dist.group.WORLD)
    counts = batch_of(3, 6)
    first = planner.plan(counts)
    out = counts.clone()
    out[0, 0] = -1
    last = torch.full((3, 2), -1, dtype=torch.int32)
    twice = last.clone()
    twice[2] = 0
    garbage = [None, "x", counts.float(), counts[:2], counts.to_sparse(), out, counts + 1, 2**52 * counts.clamp(0, 1)]
    found = []
    for odd in garbage:
        found.append(raised(lambda odd=odd: planner.plan(odd if rank == 1 else counts)))
        found.append(planner.plan(counts).fingerprint() == first.fingerprint())
    for odd in (5, twice, last.long(), last):
        found.append(raised(lambda odd=odd: planner.plan(counts, held=odd if rank == 1 else None)))
        found.append(planner.plan(counts.int(), held=last).fingerprint() == first.fingerprint())
    planner.max_tokens = 10 if rank == 1 else None
    found.append(raised(lambda: planner.plan(counts)))
    planner.max_tokens = None
    # an int32 table on one rank is the same table
    again = planner.plan(counts.int() if rank == 1 else counts)
    return found, first.fingerprint(), again.fingerprint()


def test_no_rank_plans_alone(tmp_path):
    results = on_ranks(3, tmp_path / "planning", planning)
    alone = TransferPlanner(6, 3, slots=2).plan(batch_of(3, 6)).fingerprint()
    refused = [0, 1, 2, 3, 4, 5, 7, 8, 9, 10]  # by rank 1 itself; the others are odd only beside what the rest has
    for rank, (found, first, again) in enumerate(results):
        assert first == again == alone
        assert all(ok is True for ok in found[1:-1:2])
        errors = [*found[:-1:2], found[-1]]
        assert None not in errors
        for i, message in enumerate(errors):
            if i not in refused:
                assert "rank 1 has other counts, other held guests or another max_tokens than rank 0" in message
            elif rank != 1:
                assert "rank 1 refused its input, so no rank goes on" in message
            else:
                assert "allowed" in message


def strategies(rank):
    prints = []
    for strategy in ("joint", "llep", "auto"):
        planner = TransferPlanner(
            6, 4, strategy=strategy, m=0, lam=1.0, model=MODEL, ranks_per_node=2, group=dist.group.WORLD
        )
        prints.append(planner.plan(batch_of(4, 6)).fingerprint())
    return prints


def test_every_rank_has_the_plan(tmp_path):
    results = on_ranks(4, tmp_path / "strategies", strategies)
    alone = [
        TransferPlanner(6, 4, strategy=s, m=0, lam=1.0, model=MODEL, ranks_per_node=2)
        .plan(batch_of(4, 6))
        .fingerprint()
        for s in ("joint", "llep", "auto")
    ]
    assert results == [alone] * 4
