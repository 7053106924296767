"""The rebalancer in groups of gloo processes: exact while it swaps, and what it makes of faults."""

import logging
import os
import random
import signal
import threading
import time

import numpy as np
import pytest
import test_distributed
import torch
import torch.distributed as dist
from dynamic_model import Model, expected, nearby_placement, random_placement, spread, until, weights_of
from test_distributed import PROCESSES, on_ranks

from lplb import plan_change
from lplb.dynamic import Dispatcher, LoadCollector, Rebalancer
from lplb.dynamic.control import Control, Stage
from lplb.dynamic.planning import Problem, plan
from lplb.dynamic.sources import Peers
from lplb.dynamic.staging import Staging
from lplb.placement import Placement
from lplb.policies import imbalance

E, RANKS = 8, 4
DELAYS = [0.0] * 14 + [0.0005, 0.004]  # seconds, of which one is drawn at every step of every thread


def quick(**settings):
    return {"poll": 0.002, "min_gain": 0.01, **settings}


def model_of(rank, n_layers=1, size=RANKS):
    return Model(n_layers, spread(E, size), rank)


def step(model, rng, n_tokens=12, weight=None):
    """A forward pass of all layers, checked token by token."""
    shape = len(model.blocks), n_tokens
    experts = torch.from_numpy(rng.choice(model.blocks[0].n_logical, shape, p=weight))
    out, copies = model(experts)
    assert torch.equal(copies, torch.ones(shape, dtype=torch.float64))
    for block, values, chosen in zip(model.blocks, out, experts, strict=True):
        assert torch.equal(values, expected(block.layer, chosen))


def together(value):
    """Whether all main threads say so: how a test's ranks stop after the same step."""
    said = torch.tensor([int(value)])
    dist.all_reduce(said, op=dist.ReduceOp.MIN)
    return bool(said)


# ---- exactness


def exact_while_swapping(rank, n_swaps, n_layers):
    rng, delays = np.random.default_rng(rank), random.Random(rank)
    gather = Control.gather

    def late(self, stage, row):
        time.sleep(delays.choice(DELAYS))
        told = gather(self, stage, row)
        time.sleep(delays.choice(DELAYS))
        return told

    Control.gather = late
    model = model_of(rank, n_layers)
    same = np.random.default_rng(99)
    steps = 0
    with Rebalancer(model, dist.group.WORLD, layers_at_once=n_layers, ahead=4, **quick()) as rebalancer:
        asked, targets = 0, [b.dispatcher.placement for b in model.blocks]
        while not together(rebalancer.stats().swaps >= n_swaps):
            if rebalancer.stats().cycles >= asked:
                draw = nearby_placement if asked % 4 else random_placement
                targets = [draw(same, target) for target in targets]
                rebalancer.move_to(targets)
                asked += 1
            step(model, rng, 3)
            steps += 1
            time.sleep(delays.choice(DELAYS))
        stats = rebalancer.stats()
        dist.barrier()  # no rank closes before all have looked
    until(lambda: not any(b.dispatcher.point.pending for b in model.blocks), step=lambda: step(model, rng, 3))
    model.check_slots()
    return stats.swaps, stats.skipped, steps, [b.dispatcher.placement.phy2log.tolist() for b in model.blocks]


def test_outputs_are_exact_before_during_and_after_a_thousand_swaps(tmp_path, monkeypatch):
    monkeypatch.setattr(test_distributed, "DEADLINE", 400)
    results = on_ranks(RANKS, tmp_path / "g", exact_while_swapping, 1000, 8)
    for swaps, skipped, _, placements in results:
        assert swaps >= 1000
        assert set(skipped) <= {"no gain"}
        assert placements == results[0][3]


# ---- loads lead to placements


def follow_the_loads(rank, mode):
    model = model_of(rank, 2)
    weight = np.random.default_rng(5).dirichlet(np.full(E, 0.5))
    rng = np.random.default_rng(7 if mode == "AG" else 7 + rank)
    budget = {"max_moves": 3} if mode == "EX" else {}
    before = [b.dispatcher.placement for b in model.blocks]
    with Rebalancer(model, dist.group.WORLD, mode=mode, interval=16, **budget, **quick()) as rebalancer:
        for _ in range(400):
            step(model, rng, 64, weight)
            if together(rebalancer.stats().swaps >= 2 or rebalancer.stats().cycles > 8):
                break
        stats = rebalancer.stats()
        dist.barrier()  # no rank closes before all have looked
    after = [b.dispatcher.placement for b in model.blocks]
    model.check_slots()
    gained = [float(imbalance(b, weight) - imbalance(a, weight)) for b, a in zip(before, after, strict=True)]
    moved = [int((b.phy2log != a.phy2log).sum()) for b, a in zip(before, after, strict=True)]
    return stats.swaps, gained, moved, [a.phy2log.tolist() for a in after], stats


@pytest.mark.parametrize("mode", ["A2A", "AG", "EX"])
def test_a_placement_follows_the_loads(tmp_path, mode):
    results = on_ranks(RANKS, tmp_path / "g", follow_the_loads, mode)
    assert sum(stats.bytes_moved for *_, stats in results) > 0
    for swaps, gained, moved, placements, stats in results:
        assert swaps >= 1
        assert max(gained) > 0.05, gained
        assert placements == results[0][3]
        assert stats.bytes_moved >= stats.bytes_lower_bound
        assert sum(b == b for b in stats.balancedness) == 2
        if mode == "EX":
            assert sum(moved) <= 3 * stats.cycles


def count_noise(rank):
    model = model_of(rank)
    rng = np.random.default_rng(rank)
    own = model.blocks[0]
    with Rebalancer(model, dist.group.WORLD, interval=16, **quick()) as rebalancer:
        while not together(rebalancer.stats().cycles >= 6 and rebalancer.stats().stage == "idle"):
            own.dispatcher.check_consistency()
            own.collector.collect(counts=torch.from_numpy(rng.poisson(500, E)))
        stats = rebalancer.stats()
        dist.barrier()  # no rank closes before all have looked
    return stats.swaps, stats.skipped


def test_noise_moves_nothing(tmp_path):
    for swaps, skipped in on_ranks(RANKS, tmp_path / "g", count_noise):
        assert swaps == 0
        assert skipped["no gain"] >= 6


# ---- what a user does


def asked_for_things(rank):
    model = model_of(rank, 2)
    rng, same = np.random.default_rng(rank), np.random.default_rng(3)
    said = []
    logging.getLogger("lplb.dynamic").addHandler(_Keep(said))
    first, second = ([random_placement(same, b.dispatcher.placement) for b in model.blocks] for _ in range(2))
    rebalancer = Rebalancer(model, dist.group.WORLD, **quick())
    rebalancer.hold()
    rebalancer.move_to(first)
    until(lambda: rebalancer.progress.stage == "transfer")
    for _ in range(30):
        step(model, rng)
    held = rebalancer.stats()
    assert (held.swaps, held.held, held.stage) == (0, True, "transfer")
    rebalancer.move_to(second)  # two plans in flight: one after the other
    rebalancer.resume()

    def reached(target):
        return lambda: together([b.dispatcher.placement for b in model.blocks] == target)

    until(reached(second), step=lambda: step(model, rng))
    state = rebalancer.state_dict()
    rebalancer.close()
    rebalancer.close()
    assert rebalancer.progress.stage == "closed"

    other = model_of(rank, 2)
    with Rebalancer(other, dist.group.WORLD, **quick()) as again:
        again.load_state_dict(state)
        until(lambda: together([b.dispatcher.placement for b in other.blocks] == second), step=lambda: step(other, rng))
        assert torch.equal(again.state_dict()["phy2log"], state["phy2log"])
    other.check_slots()
    assert not [t.name for t in threading.enumerate() if t.name == "lplb-rebalancer"]
    return [record.getMessage() for record in said if record.levelno >= logging.WARNING]


class _Keep(logging.Handler):
    def __init__(self, records):
        super().__init__()
        self.emit = records.append


def test_hold_resume_two_plans_state_and_close(tmp_path):
    assert on_ranks(RANKS, tmp_path / "g", asked_for_things) == [[]] * RANKS


# ---- faults


def with_a_fault(rank, fault):
    """One rank has a fault in a cycle; what all make of it, and that the next cycle works."""
    model = model_of(rank, 2)
    rng, same = np.random.default_rng(rank), np.random.default_rng(11)
    said = []
    logging.getLogger("lplb.dynamic").addHandler(_Keep(said))
    before = model.blocks[0].dispatcher.placement
    target = [random_placement(same, before) for _ in model.blocks]
    broken = [rank == 2]
    rebalancer = Rebalancer(model, dist.group.WORLD, **quick())

    def once(name, instead, owner):
        real = getattr(owner, name)

        def replacement(*arguments, **options):
            if broken[0]:
                return instead(*arguments, **options)
            return real(*arguments, **options)

        setattr(owner, name, replacement)

    def raise_memory(*_, **__):
        raise MemoryError("no memory for 3 buffers")

    def raise_source(*_, **__):
        raise OSError("disk on fire")

    if fault == "memory":
        once("__init__", raise_memory, Staging)
    if fault == "stage":
        once("stage", raise_source, Dispatcher)
    rebalancer.move_to(target)
    until(lambda: together(sum(rebalancer.stats().skipped.values()) > 0), step=lambda: step(model, rng))
    assert [b.dispatcher.placement for b in model.blocks] == [before, before]
    reason = rebalancer.stats().last_reason
    broken[0] = False
    rebalancer.move_to(target)
    until(lambda: together([b.dispatcher.placement for b in model.blocks] == target), step=lambda: step(model, rng))
    rebalancer.close()
    model.check_slots()
    return reason, [r.getMessage() for r in said if r.levelno >= logging.WARNING], rebalancer.stats().staging_bytes


@pytest.mark.parametrize(("fault", "words"), [("memory", "no memory for 3 buffers"), ("stage", "disk on fire")])
def test_a_fault_on_one_rank_is_everybodys_and_the_old_placement_serves_on(tmp_path, fault, words):
    for reason, logged, staging in on_ranks(RANKS, tmp_path / "g", with_a_fault, fault):
        assert "rank 2" in reason
        assert words in reason
        assert len(logged) == 1
        assert words in logged[0]
        assert staging > 0


def with_a_late_rank(rank):
    """A background thread stops at one place after the other until thirty forward passes have gone by."""
    model = model_of(rank)
    rng, same = np.random.default_rng(rank), np.random.default_rng(13)
    late = {Stage.COLLECT, Stage.PLAN, Stage.TRANSFER}
    gather, point = Control.gather, model.blocks[0].dispatcher.point
    passed = []

    def slow(self, stage, row):
        if rank == 1 and stage in late:
            late.discard(stage)
            begin, end = point.steps, time.monotonic() + 20
            while point.steps < begin + 30 and time.monotonic() < end:
                time.sleep(0.001)
            passed.append(point.steps - begin)
        return gather(self, stage, row)

    Control.gather = slow
    with Rebalancer(model, dist.group.WORLD, **quick()) as rebalancer:
        target = [random_placement(same, model.blocks[0].dispatcher.placement)]
        rebalancer.move_to(target)
        while not together(model.blocks[0].dispatcher.placement == target[0]):
            step(model, rng, 2)
        stats = rebalancer.stats()
        dist.barrier()  # no rank closes before all have looked
    return passed, stats.stalls


def test_a_rank_that_is_late_delays_no_forward_pass(tmp_path):
    results = on_ranks(RANKS, tmp_path / "g", with_a_late_rank)
    assert len(results[1][0]) == 3
    assert min(results[1][0]) >= 30
    assert all(stalls == 0 for _, stalls in results)


class Answers:
    """A service that says what a test wants."""

    def __init__(self, *answers):
        self.answers = list(answers)

    def plan(self, problem, epoch, timeout):
        answer = self.answers.pop(0) if self.answers else plan
        return answer(problem)


def with_odd_plans(rank):
    model = model_of(rank)
    own = model.blocks[0]
    weight = np.random.default_rng(5).dirichlet(np.full(E, 0.5))
    rng = np.random.default_rng(rank)
    before = own.dispatcher.placement

    def other(problem):
        plans = plan(problem)
        moved = plans[0].placement.phy2log.roll(before.slots_per_rank)
        return (plans[0].__class__(**{**plans[0].__dict__, "placement": Placement(moved, RANKS, E), "worth": True}),)

    def none(problem):
        raise RuntimeError("the service does not answer")

    answers = [none if rank == 3 else plan, other if rank == 1 else plan]
    reasons, last = [], 0
    with Rebalancer(model, dist.group.WORLD, interval=16, service=Answers(*answers), **quick()) as rebalancer:
        while not together(rebalancer.stats().swaps >= 1):
            own.dispatcher.check_consistency() and own.dispatcher.update_module_weight_and_map()
            own.collector.collect(torch.from_numpy(rng.choice(E, 64, p=weight)))
            stats = rebalancer.stats()
            if stats.cycles > last and stats.last_reason and stats.stage == "idle":
                last = stats.cycles
                reasons.append(stats.last_reason)
                if rebalancer.stats().swaps == 0 and len(reasons) <= 2:
                    assert own.dispatcher.placement == before
            time.sleep(0.001)
    return reasons


def test_ranks_with_other_plans_or_none_keep_the_placement(tmp_path):
    results = on_ranks(RANKS, tmp_path / "g", with_odd_plans)
    for reasons in results:
        assert any("rank 3: the service does not answer" in reason for reason in reasons)
        assert any("another outcome" in reason for reason in reasons)


# ---- a rank dies


def killed_at(rank, folder, stage, victim):
    """Forward passes without a collective of their own, until they raise; then what is left."""
    model = model_of(rank)
    same = np.random.default_rng(17)
    gather, bring = Control.gather, Peers.bring
    armed = [False]

    def die(self, where, row):
        if armed[0] and where.name == stage:
            os.kill(os.getpid(), signal.SIGKILL)
        return gather(self, where, row)

    def die_in_between(self, layer, moves, staging):
        for number, moved in enumerate(bring(self, layer, moves, staging)):
            if armed[0] and number == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            yield moved

    if rank == victim:
        if stage == "ROUND":
            Peers.bring = die_in_between
        else:
            Control.gather = die
    dispatcher = model.blocks[0].dispatcher
    rebalancer = Rebalancer(model, dist.group.WORLD, **quick())
    first = random_placement(same, dispatcher.placement)
    rebalancer.move_to([first])

    def forward():
        time.sleep(0.0005)
        if dispatcher.check_consistency():
            dispatcher.update_module_weight_and_map()

    until(lambda: together(dispatcher.placement == first), step=forward)  # one cycle that works
    armed[0] = True
    rebalancer.move_to([random_placement(same, first)])
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match="rebalancing has stopped") as error:
        until(lambda: False, seconds=25.0, step=forward)
    model.check_slots()
    rebalancer.close()
    forward()  # a user who goes on does so with the placement as it is
    torch.save((time.monotonic() - begin, str(error.value)), f"{folder}/{rank}.out")
    os._exit(0)  # the group is of no use for the end of a process either


def start_and_die(rank, size, folder, stage, victim):
    test_distributed.process(rank, size, folder, killed_at, (folder, stage, victim))


@pytest.mark.parametrize("stage", ["IDLE", "COLLECT", "PLAN", "TRANSFER", "ROUND", "COMMIT", "WAIT"])
def test_when_a_rank_is_killed_the_others_raise_and_keep_a_complete_placement(tmp_path, stage):
    folder = str(tmp_path)
    ranks = [PROCESSES.Process(target=start_and_die, args=(r, RANKS, folder, stage, 1)) for r in range(RANKS)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    alive = [i for i, rank in enumerate(ranks) if rank.is_alive()]
    for rank in ranks:
        rank.kill()
    assert not alive, f"ranks {alive} hang"
    assert ranks[1].exitcode == -signal.SIGKILL
    for i in (0, 2, 3):
        wrong = tmp_path / f"{i}.pt"
        assert not wrong.exists(), torch.load(wrong, weights_only=False)
        seconds, words = torch.load(tmp_path / f"{i}.out", weights_only=False)
        assert seconds < 30
        assert any(said in words for said in ("another rank died", "a rank was lost", "out of step"))


# ---- bad input


def refusals(rank):
    model = model_of(rank)
    said = {}
    cases = {
        "mode": {"mode": "B2B" if rank == 1 else "A2A"},
        "interval": {"interval": 0 if rank == 1 else 32},
        "window": {"window": 65 if rank == 1 else 64},
        "differs": {"gain": 0.5 if rank == 1 else 0.9},
        "source": {"source": "thin air" if rank == 1 else "peers"},
        "phases": {"phases": ["nap"] if rank == 1 else None},
        "ahead": {"ahead": 1 if rank == 1 else 8},
    }
    for name, arguments in cases.items():
        try:
            Rebalancer(model, dist.group.WORLD, **arguments).close()
        except (TypeError, ValueError) as error:
            said[name] = str(error)
    odd = Model(1, spread(E, RANKS), (rank + 1) % RANKS if rank == 1 else rank)
    try:
        Rebalancer(odd, dist.group.WORLD).close()
    except ValueError as error:
        said["rank"] = str(error)
    with Rebalancer(model, dist.group.WORLD, **quick()) as rebalancer:
        for name, placements in {
            "many": [spread(E, RANKS)] * 2,
            "sizes": [spread(E, RANKS, 2)],
            "type": [spread(E, RANKS).phy2log],
        }.items():
            with pytest.raises((TypeError, ValueError)) as error:
                rebalancer.move_to(placements)
            said[name] = str(error.value)
        with pytest.raises(ValueError, match="allowed is what state_dict"):
            rebalancer.load_state_dict({"format": "a cake"})
        rebalancer.trigger()
        until(lambda: together(rebalancer.stats().cycles == 1))
    return said


def test_bad_input_is_refused_on_every_rank(tmp_path):
    results = on_ranks(RANKS, tmp_path / "g", refusals)
    expected_words = {
        "mode": "'B2B'",
        "interval": "interval is 0",
        "window": "window is 65",
        "differs": "rank 1 has other layers",
        "source": "'thin air'",
        "phases": "'nap'",
        "ahead": "ahead is 1",
        "rank": "dispatcher of rank 2",
        "many": "one per layer",
        "sizes": "n_physical 16, allowed is 12",
        "type": "allowed is an lplb.Placement",
    }
    for said in results:
        for name, words in expected_words.items():
            assert words in said.get(name, ""), (name, said.get(name))


def test_one_rank_needs_no_group():
    placement = Placement([0, 1, 2], 1)
    model = Model(1, placement, 0)
    with Rebalancer(model, **quick()) as rebalancer:
        rebalancer.move_to([Placement([2, 0, 1], 1)])

        def forward():
            if model.blocks[0].dispatcher.check_consistency():
                model.blocks[0].dispatcher.update_module_weight_and_map()

        until(lambda: rebalancer.stats().swaps == 1 and rebalancer.stats().stage == "idle", step=forward)
    model.check_slots()
    assert model.blocks[0].dispatcher.local_expert_list == [2, 0, 1]


def test_a_model_without_layers_is_refused():
    with pytest.raises(ValueError, match="no layer with the attributes dispatcher and collector"):
        Rebalancer(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        Rebalancer(3)
    model = Model(1, Placement([0, 1], 1), 0)
    model.blocks.append(torch.nn.Module())
    model.blocks[1].dispatcher = model.blocks[0].dispatcher
    model.blocks[1].collector = LoadCollector(2)
    with pytest.raises(ValueError, match=r"blocks\.1 and blocks\.0 have one dispatcher"):
        Rebalancer(model)


def test_a_cycle_that_takes_long_is_in_the_log_once(caplog):
    model = Model(1, Placement([0, 1, 2], 1), 0)
    free = threading.Event()

    def slow(layer, expert, into):
        assert free.wait(20)
        for tensor, value in zip(into, weights_of(layer, expert), strict=True):
            tensor.copy_(value)

    with (
        Rebalancer(model, source=slow, watchdog=0.05, **quick()) as rebalancer,
        caplog.at_level("WARNING", "lplb.dynamic"),
    ):
        rebalancer.move_to([Placement([2, 0, 1], 1)])
        until(lambda: caplog.records)
        free.set()
        until(lambda: rebalancer.progress.stage == "wait")  # and no forward pass comes
        time.sleep(0.3)
    assert len(caplog.records) == 1
    assert "takes more than 0.05 s" in caplog.text
    assert "transfer" in caplog.text


def test_plans_in_place_are_those_of_plan_change():
    rng = np.random.default_rng(4)
    placement = spread(E, RANKS)
    loads = rng.poisson(1000 * rng.dirichlet(np.full(E, 0.5), size=1).repeat(32, 0)).astype(np.int64)
    from lplb.dynamic.planning import Settings

    made = plan(Problem((placement,), loads[None], None, Settings()))[0]
    assert made.placement == plan_change(placement, loads).placement
