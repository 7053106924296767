"""The planner on CUDA: the CPU's results bit for bit; streams and graphs; errors that arrive later.

What needs no GPU runs twice: on the device, marked `gpu`, and everywhere with pretend_cuda.py in the kernels' place.
"""

import copy
import os
import pickle
from contextlib import contextmanager
from unittest import mock

import cases
import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pretend_cuda import Stream, pretend
from reference import assign_reference, exact_bottleneck
from test_distributed import on_ranks

import lplb
from lplb import _C, Placement, Planner, cpu, devices, topology
from lplb.exchange import Known

SOLVERS = ["ipm", "flow"]
GROUP_SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 72, 96, 127, 128]
N_LOGICAL, N_PHYSICAL, N_RANKS = 64, 80, 8
CPU_BACKEND = cpu.Backend
gpu = pytest.mark.gpu


def need_gpu(n_devices=1):
    lacking = next(devices.missing(), None) or devices.no_code_for(torch.cuda.get_device_capability())
    if lacking:
        pytest.skip(lacking.partition(":")[0])
    if torch.cuda.device_count() < n_devices:
        pytest.skip(f"needs {n_devices} CUDA devices, has {torch.cuda.device_count()}")


@pytest.fixture(params=["pretended", pytest.param("cuda", marks=gpu)])
def device(request, monkeypatch):
    if request.param == "cuda":
        need_gpu()
        return "cuda"
    pretend(monkeypatch.setattr)
    return "cpu"


@pytest.fixture
def pretended(monkeypatch):
    return pretend(monkeypatch.setattr)


@pytest.fixture
def cuda():
    need_gpu()
    return "cuda"


@contextmanager
def on_cpu():
    """Planners made inside are the CPU's, whatever is pretended."""
    with mock.patch.object(cpu, "Backend", CPU_BACKEND):
        yield


def synchronise(device):
    if device == "cuda":
        torch.cuda.synchronize()


def cube_planner(device="cpu", **settings):
    return Planner(topology.cube(), N_PHYSICAL, N_LOGICAL, N_RANKS, device=device, **settings)


def batch(seed, shape, n_logical=N_LOGICAL, dtype=torch.int64):
    """Indices with a few heavy experts, and -1 here and there; on the CPU."""
    rng = np.random.default_rng(seed)
    weight = rng.lognormal(0, 1.5, n_logical)
    idx = rng.choice(n_logical, size=shape, p=weight / weight.sum())
    return torch.from_numpy(np.where(rng.random(shape) < 0.1, -1, idx)).to(dtype)


def same(got, want):
    """Same values, dtype and shape, wherever they are."""
    return got.dtype == want.dtype and torch.equal(got.cpu(), want.cpu())


def same_plan(got, want):
    return got.solver == want.solver and all(map(same, got.tensors(), want.tensors()))


def builtin_only():
    if (os.environ.get("LPLB_LINALG") or "builtin") != "builtin":
        pytest.skip(f"LPLB_LINALG is {os.environ['LPLB_LINALG']}: the same bits are promised for builtin")


# The same bits as on the CPU


@pytest.mark.parametrize("part", range(8))
def test_design_instances(device, part):
    builtin_only()
    step = 8 if device == "cuda" else 320
    for i, instance in enumerate(cases.design_instances()):
        if i % step != part:
            continue
        placement = Placement(instance.phy2log, instance.n_ranks, instance.loads.size)
        shape = {"group_size": instance.group_size, "rank_speed": instance.rank_speed}
        loads = torch.from_numpy(instance.loads)
        planner = Planner.from_placement(placement, device=device, **shape)
        with on_cpu():
            expected = Planner.from_placement(placement, **shape)
        for solver in SOLVERS:
            got = planner.solve(loads.to(device), solver=solver)
            assert same_plan(got, expected.solve(loads, solver=solver)), (instance.name, solver)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.data())
def test_run_of_any_rank_of_any_placement(device, data):
    builtin_only()
    drawn = data.draw(cases.placements(max_ranks=32))
    solver = data.draw(st.sampled_from(SOLVERS))
    speed = data.draw(cases.speeds(drawn.n_ranks))
    seed = data.draw(cases.SEEDS)
    rank = data.draw(st.integers(0, drawn.n_ranks - 1))
    size = data.draw(st.integers(0, 3000))
    dtype = data.draw(st.sampled_from([torch.int32, torch.int64]))
    idx = batch(seed, size, drawn.n_logical, dtype)
    known = np.random.default_rng(seed).integers(0, 500, (drawn.n_ranks, drawn.n_logical))
    known[rank] = np.bincount(idx[idx >= 0], minlength=drawn.n_logical)
    group = Known(rank, drawn.n_ranks)
    group.counts = torch.from_numpy(known).int()
    placement = Placement(drawn.phy2log, drawn.n_ranks)
    shape = {"group_size": drawn.group_size, "rank_speed": speed, "solver": solver, "group": group}
    shape["ranks_per_node"] = data.draw(st.integers(1, drawn.n_ranks))
    shape["split"] = data.draw(st.sampled_from(["local_first", "plain"]))
    shape["min_tokens"] = data.draw(st.sampled_from([0, 0, 2000, 10**9]))
    planner = Planner.from_placement(placement, device=device, **shape)
    with on_cpu():
        expected = Planner.from_placement(placement, **shape)
    counter = torch.zeros(1, dtype=torch.int64, device=device)
    physical, wanted = planner.run(idx.to(device), counter), expected.run(idx, None)
    assert same(physical, wanted)
    assert same_plan(planner.last_plan, expected.last_plan)
    assert counter.item() == int((expected.last_plan.status == 0).sum())
    # another batch by the same plan; then by the plan of the batch before, whose exchange overlaps
    other = batch(seed + 1, size, drawn.n_logical, dtype)
    plan, kept = planner.last_plan, expected.last_plan
    assert same(plan.counts, kept.counts)
    wanted = expected.assign(other, kept)
    assert same(planner.assign(other.to(device), plan), wanted)
    group.counts[rank] = torch.bincount(other[other >= 0], minlength=drawn.n_logical)
    assert same(planner.run(other.to(device), None, lag=1), wanted)
    assert expected.run(other, None) is not None
    assert same_plan(planner.last_plan, expected.last_plan)
    assert plan.traffic() == kept.traffic()


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_every_group_size(device, group_size, solver):
    builtin_only()
    rng = np.random.default_rng(group_size)
    n_groups = 2 if group_size <= 32 else 1
    slots, n_own = 5, 4
    n_experts = group_size * n_own if group_size > 1 else slots
    phy2log = cases.random_placement(rng, n_groups * group_size, group_size, n_experts, slots)
    placement = Placement(phy2log, n_groups * group_size)
    loads = torch.from_numpy(np.stack([draw(rng, placement.n_logical) for draw in cases.LOADS.values()]))
    with on_cpu():
        expected = Planner.from_placement(placement, group_size=group_size)
    planner = Planner.from_placement(placement, group_size=group_size, device=device)
    assert same_plan(planner.solve(loads.to(device), solver=solver), expected.solve(loads, solver=solver))
    one = planner.solve(loads[5].to(device), solver=solver)
    assert same_plan(one, expected.solve(loads[5], solver=solver))


@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 8), (4, 0, 2), (37,), (255,), (4096, 8), (5, 4, 3)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_shapes(device, shape, dtype):
    builtin_only()
    planner = cube_planner(device)
    with on_cpu():
        expected = cube_planner()
    idx = batch(3, shape, dtype=dtype)
    for n_sms in (None, 1, 2, 1000):
        physical = planner.run(idx.to(device), None, n_sms)
        assert physical.is_contiguous()
        assert same(physical, expected.run(idx, None))
        assert same_plan(planner.last_plan, expected.last_plan)


def test_views(device):
    builtin_only()
    planner = cube_planner(device)
    with on_cpu():
        expected = cube_planner()
    idx = batch(4, (8, 9, 10))
    for view in (idx.transpose(0, 2), idx[::2, :, 1::3], idx[:1].expand(4, -1, -1), idx[3:, 1:], idx[..., 0]):
        moved = torch.empty_strided(idx.shape, idx.stride(), dtype=idx.dtype, device=device).copy_(idx)
        there = moved.as_strided(view.shape, view.stride(), view.storage_offset())
        assert same(planner.run(there, None), expected.run(view, None))
        assert same(moved, idx)
    assert planner.run(torch.full((9,), -1, device=device), None).tolist() == [-1] * 9


@pytest.mark.parametrize("n_sms", [1, 2, 3, 7, 100, 1000])
@pytest.mark.parametrize("n", [0, 1, 257, 3000, 70_000])
def test_count_workload(device, n, n_sms):
    planner = cube_planner(device)
    with on_cpu():
        expected = cube_planner()
    for dtype in (torch.int32, torch.int64):
        idx = batch(n, n, dtype=dtype)
        got, wanted = planner.count_workload(idx.to(device), n_sms), expected.count_workload(idx, n_sms)
        assert all(map(same, got, wanted))


def results(planner, idx):
    """One result of every method."""
    counter = torch.zeros(1, dtype=torch.int32, device=idx.device)
    count, prefix = planner.count_workload(idx, 5)
    share, load = planner.solve_probs(count, counter)
    plan = planner.solve(torch.stack([count, count + 1]))
    chosen = planner.weighted_select_target(idx, share, prefix, 5)
    physical = planner.run(idx, counter)
    mapping = planner.update_redundancy_mapping(count)
    moved = planner.run(idx, counter)
    last = planner.last_plan
    given = [planner.r2o, planner.o2r, planner.phy2log]
    return [
        count,
        prefix,
        share,
        load,
        *plan.tensors(),
        chosen,
        physical,
        *mapping,
        moved,
        *last.tensors(),
        *given,
        counter,
    ]


def test_every_method(device):
    builtin_only()
    idx = batch(5, (700, 6))
    with on_cpu():
        expected = results(cube_planner(), idx)
    for got in (
        results(cube_planner(device), idx.to(device)),
        results(cube_planner(device, ranks_per_node=8), idx.to(device)),
    ):
        assert all(value.device.type == device for value in got)
        assert all(map(same, got, expected)), list(map(same, got, expected))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda planner: pickle.loads(pickle.dumps(planner))])
def test_a_copy_plans_alike_and_apart(device, copied):
    planner = cube_planner(device)
    idx = batch(6, (100, 6)).to(device)
    planner.update_redundancy_mapping(torch.arange(N_LOGICAL, device=device))
    before = planner.run(idx, None)
    other = copied(planner)
    assert other.last_plan is None
    assert same(other.run(idx, None), before)
    other.update_redundancy_mapping()
    assert not same(other.phy2log, planner.phy2log)
    assert same(planner.run(idx, None), before)


def test_what_callers_have_set(device):
    idx = batch(7, (100, 6)).to(device)
    expected = cube_planner(device).run(idx, None)
    with torch.device("meta"):
        assert same(cube_planner(device).run(idx, None), expected)
    with torch.inference_mode():
        planner = cube_planner(device)
    assert same(planner.run(idx, None), expected)


def test_the_same_plan_on_every_repeat(device):
    phy2log = cases.eplb_like_placement(np.random.default_rng(1), np.arange(1, 129), 32, 160)
    planner = Planner.from_placement(Placement(phy2log, 32), device=device)
    idx = batch(8, (2000, 8), 128).to(device)
    first, plan = planner.run(idx, None), planner.last_plan
    for _ in range(50):
        assert same(planner.run(idx, None), first)
        assert same_plan(planner.last_plan, plan)


def test_verbose(device, capsys):
    loads = torch.arange(N_LOGICAL)
    with on_cpu():
        cube_planner(verbose=True).solve(loads)
        on_the_cpu = capsys.readouterr().out.splitlines()
    planner = cube_planner(device, verbose=True)
    planner.solve(loads.to(device))
    out = capsys.readouterr().out.splitlines()
    assert "CUDA (" in out[1]
    builtin_only()
    assert out[2:] == on_the_cpu[2:]
    expected = cube_planner(device).run(batch(0, 90).to(device), None)
    assert same(planner.run(batch(0, 90).to(device), None), expected)
    assert "busiest rank" in capsys.readouterr().out


# Errors that the device reports


def test_indices_outside_are_masked_and_counted(device):
    planner = cube_planner(device)
    idx = batch(9, (400, 6))
    masked = idx.clone()
    for value, at in [(64, 0), (-2, 17), (2**31 - 1, 1000), (-(2**31), 2399)]:
        idx.view(-1)[at] = value
        masked.view(-1)[at] = -1
    assert planner.indices_outside == 0
    for dtype in (torch.int32, torch.int64):
        got = planner.run(idx.to(device, dtype), None)
        assert same(got, planner.run(masked.to(device, dtype), None))
    synchronise(device)
    assert planner.indices_outside == 8
    wide = torch.tensor([2**63 - 1, -(2**63), 2**32 + 1, 5], device=device)
    assert (planner.run(wide, None) >= 0).tolist() == [False] * 3 + [True]
    counts, _ = planner.count_workload(wide, 2)
    assert counts.sum() == 1
    assert planner.indices_outside == 14
    assert planner.last_plan.solved


def test_indices_outside_are_errors_if_wanted(device, monkeypatch):
    monkeypatch.setenv("LPLB_CHECK", "1")
    planner = cube_planner(device)
    good = batch(10, 50).to(device)
    expected = planner.run(good, None)
    calls = [
        lambda: planner.run(good, None),
        lambda: planner.count_workload(good, 1),
        lambda: planner.solve(torch.ones(N_LOGICAL, device=device)),
        lambda: planner.solve_probs(torch.ones(N_LOGICAL, device=device), None),
        lambda: planner.last_plan,
        planner.update_redundancy_mapping,
    ]
    for call in calls:
        planner.run(torch.tensor([3, 64, -7], device=device), None)
        synchronise(device)
        with pytest.raises(
            ValueError, match=r"idx had 2 indices .* allowed is -1 \(masked\) or 0 to n_logical - 1 = 63"
        ):
            call()
        assert same(planner.run(good, None), expected)  # said once
    assert planner.indices_outside == 2 * len(calls)


@pytest.mark.parametrize("value", ["yes", "2"])
def test_values_of_lplb_check(device, value, monkeypatch):
    monkeypatch.setenv("LPLB_CHECK", value)
    with pytest.raises(ValueError, match=f"LPLB_CHECK is '{value}', allowed is 0 or 1"):
        cube_planner(device)


def test_arguments_are_refused_at_once(device):
    planner = cube_planner(device)
    good = batch(11, 50).to(device)
    expected, quota = planner.run(good, None), planner.last_plan.quota
    counter = torch.zeros(1, dtype=torch.int64, device=device)
    for arguments, kind, message in [
        ((good.float(), counter), TypeError, "idx has dtype torch.float32"),
        ((good.to("meta"), counter), ValueError, "idx is on 'meta', allowed is the planner's device"),
        ((good, counter.float()), TypeError, "avail_counter is a torch.float32"),
        ((good, counter.to("meta")), ValueError, "avail_counter is on 'meta'"),
        ((good, counter, 0), ValueError, "n_sms is 0"),
    ]:
        with pytest.raises(kind, match=message):
            planner.run(*arguments)
    with pytest.raises(ValueError, match=r"workload has -1, allowed"):
        planner.solve(torch.full((N_LOGICAL,), -1, device=device))
    assert counter.item() == 0
    assert same(planner.last_plan.quota, quota)
    assert same(planner.run(good, counter), expected)
    assert counter.item() == 1


def test_more_tokens_than_a_quota_holds(device):
    group = Known(0, N_RANKS)
    planner = cube_planner(device, group=group)
    group.counts = torch.zeros(N_RANKS, N_LOGICAL, dtype=torch.int32)
    group.counts[0, 1], group.counts[1, 1] = 1, 2**31 - 1
    assert planner.run(torch.tensor([1], device=device), None).tolist() == [-1]
    synchronise(device)
    with pytest.raises(ValueError, match=r"more than 2147483647 tokens over all ranks"):
        _ = planner.last_plan
    group.counts[1, 1] = 5
    assert planner.run(torch.tensor([1], device=device), None).item() in (1, 49)
    synchronise(device)
    assert planner.last_plan.rank_load.sum().item() == 6


# Groups of processes


def with_a_bad_argument(rank, size, device):
    """What each call returned or raised; in call 1 rank 1 gives floats, in call 4 a counter of two."""
    if device == "cpu":
        pretend()
    n_own = 4
    planner = Planner(topology.ring(size), size * (n_own + 1), size * n_own, group=dist.group.WORLD, device=device)
    record = []
    for call in range(7):
        idx = batch([call, rank], 40, size * n_own).to(device)
        counter = torch.zeros(1, dtype=torch.int32, device=device)
        given_idx = idx.float() if (call, rank) == (1, 1) else idx
        given_counter = torch.zeros(2, device=device).int() if (call, rank) == (4, 1) else counter
        try:
            result = planner.run(given_idx, given_counter)
        except (TypeError, ValueError) as error:
            result = f"{'TypeError' if isinstance(error, TypeError) else 'ValueError'}: {error}"
        synchronise(device)
        plan = None if isinstance(result, str) or (result == -1).all() else planner.last_plan.cpu()
        record.append((idx.cpu(), result if isinstance(result, str) else result.cpu(), counter.item(), plan))
    return record


@pytest.mark.parametrize("size", [2, 3])
def test_an_error_on_one_rank_reaches_the_others_later(device, size, tmp_path):
    records = on_ranks(size, tmp_path, with_a_bad_argument, size, device)
    own = np.arange(size * 4).reshape(size, 4)
    phy2log = np.concatenate([own, np.roll(own[:, :1], -1, axis=0)], axis=1).ravel()
    for call in range(7):
        rows = [record[call] for record in records]
        if call in (1, 4):
            bad = {1: "TypeError: idx has dtype torch.float32", 4: "ValueError: avail_counter has 2 elements"}[call]
            for rank, (_, result, counted, _) in enumerate(rows):
                assert result.startswith(bad) if rank == 1 else (result == -1).all()
                assert counted == 0
            continue
        batches = [idx for idx, *_ in rows]
        if call in (2, 5):  # the others hear of it, and give no tokens
            for rank in set(range(size)) - {1}:
                assert rows[rank][1].startswith("ValueError: rank 1 refused its input")
                assert rows[rank][2] == 0
            batches = [idx if rank == 1 else idx[:0] for rank, idx in enumerate(batches)]
        quota = rows[1][3].quota
        for rank, want in enumerate(assign_reference(batches, phy2log, quota, cases.ranks_per_node(size))):
            if isinstance(rows[rank][1], torch.Tensor):
                assert np.array_equal(rows[rank][1], want)
                assert rows[rank][2] == 1
                assert same(rows[rank][3].quota, quota)


def probs_of_bad_counts(rank, device):
    if device == "cpu":
        pretend()
    planner = Planner(topology.ring(2), 6, 4, group=dist.group.WORLD, device=device)
    record = []
    for value in (1, -1 if rank else 1, 1):
        try:
            share, _ = planner.solve_probs(torch.full((4,), value, device=device), None)
            record.append(share.tolist())
        except ValueError as error:
            record.append([str(error)])
    return record


def test_an_error_in_solve_probs_reaches_the_others_at_once(device, tmp_path):
    records = on_ranks(2, tmp_path, probs_of_bad_counts, device)
    assert records[0][0] == records[1][0] == records[0][2] == records[1][2]
    assert records[1][1][0].startswith("workload has -1, allowed")
    assert records[0][1][0].startswith("rank 1 refused its input")


def all_methods_of_a_group(rank, size, device):
    if device == "cpu":
        pretend()
    planner = Planner(topology.ring(size), size * 5, size * 4, group=dist.group.WORLD, device=device)
    idx = batch([5, rank], (30 * (rank + 1), 2), size * 4).to(device)
    count, prefix = planner.count_workload(idx, 2)
    counter = torch.zeros(1, dtype=torch.int64, device=device)
    share, load = planner.solve_probs(count, counter)
    out = [count, prefix, share, load, planner.weighted_select_target(idx, share, prefix, 2)]
    out += [planner.run(idx, counter), *planner.last_plan.tensors()]
    out += planner.update_redundancy_mapping(torch.arange(size * 4, device=device))
    out += [planner.run(idx, counter), *planner.last_plan.tensors(), counter]
    return [value.cpu() for value in out]


def all_methods_on_the_cpu(rank, size):
    return all_methods_of_a_group(rank, size, torch.device("cpu"))  # no str: nothing is pretended


def test_every_method_of_a_group(device, tmp_path):
    builtin_only()
    got = on_ranks(2, tmp_path / "device", all_methods_of_a_group, 2, device)
    expected = on_ranks(2, tmp_path / "cpu", all_methods_on_the_cpu, 2)
    for values, wanted in zip(got, expected, strict=True):
        assert all(map(same, values, wanted))


def test_different_settings_are_refused_together(device, tmp_path):
    for (message,) in on_ranks(2, tmp_path, different_solvers, device):
        assert "rank 1 has another placement or other settings than rank 0" in message


def different_solvers(rank, device):
    if device == "cpu":
        pretend()
    try:
        Planner(topology.ring(2), 6, 4, group=dist.group.WORLD, device=device, solver=SOLVERS[rank])
    except ValueError as error:
        return [str(error)]


# Streams: pretended ones show who waits for whom


def test_another_stream_waits_for_the_last_one(pretended):
    planner = cube_planner()
    idx = batch(0, 20)
    first, second = pretended.stream, Stream(8)
    planner.run(idx, None)
    assert first.waited_for == []
    pretended.stream = second
    planner.run(idx, None)
    planner.count_workload(idx, 1)
    assert second.waited_for == [7]
    pretended.stream = first
    assert planner.last_plan.solved
    assert first.waited_for == [8]


def test_nothing_waits_during_capture(pretended):
    planner, loud = cube_planner(), cube_planner(verbose=True)
    idx = batch(0, 20)
    expected = planner.run(idx, None)
    pretended.stream, pretended.capturing = Stream(8), True
    assert same(planner.run(idx, None), expected)
    assert pretended.stream.waited_for == []
    for call in (lambda: loud.run(idx, None), lambda: loud.solve(torch.ones(N_LOGICAL))):
        with pytest.raises(RuntimeError, match=r"verbose is True.*allowed in CUDA graph capture is verbose=False"):
            call()
    with pytest.raises(RuntimeError, match="outside of CUDA graph capture"):
        planner.update_redundancy_mapping()
    pretended.capturing = False
    planner.run(idx, None)
    assert pretended.stream.waited_for == [7]


def test_streams_of_one_capture_wait_for_each_other(pretended):
    planner, idx = cube_planner(), batch(0, 20)
    pretended.capturing = True
    first, second = Stream(8), Stream(9)
    for pretended.stream in (first, second, first):
        planner.run(idx, None)
    assert second.waited_for == [8]
    assert first.waited_for == [9]


# On the device only


@gpu
def test_readme_example_of_lplb(cuda):
    n_logical_experts, n_redundants_per_rank, ep_size = 64, 2, 8
    avail_counter = torch.zeros(1, dtype=torch.int64, device="cuda")
    r2o = torch.tensor([[3, 0, 1, 2, 7, 4, 5, 6], [6, 7, 4, 5, 0, 1, 2, 3]]).T.int().cuda()
    planner = lplb.Planner(r2o, n_logical_experts + n_redundants_per_rank * ep_size, n_logical_experts, ep_size)
    N_SMS = 100
    indices = torch.randint(0, n_logical_experts, (4096, 6), device="cuda")
    redirected_indices = planner.run(indices, avail_counter, N_SMS)

    assert avail_counter.item() == 1
    assert planner.device == indices.device == redirected_indices.device
    assert torch.equal(planner.phy2log.long()[redirected_indices], indices)
    used = torch.bincount(redirected_indices.flatten(), minlength=80)
    assert same(used.int(), planner.last_plan.quota)


@gpu
def test_run_waits_for_nothing_and_allocates_its_result(cuda):
    planner = cube_planner("cuda")
    idx = batch(0, (512, 6)).cuda()
    counter = torch.zeros(1, dtype=torch.int64, device="cuda")
    planner.run(idx, counter)
    torch.cuda.set_sync_debug_mode("error")
    try:
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        physical = planner.run(idx, counter)
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before + 1
        plan = planner.last_plan
        planner.count_workload(idx, 50)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert plan.solved
    assert (physical >= -1).all()


@gpu
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("solver", SOLVERS)
def test_graph_replays_follow_new_indices(cuda, solver, dtype):
    planner, eager = cube_planner("cuda", solver=solver), cube_planner("cuda", solver=solver)
    idx = batch(0, (1000, 8), dtype=dtype).cuda()
    counter = torch.zeros(1, dtype=torch.int64, device="cuda")
    planner.run(idx, None)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        physical = planner.run(idx, counter)
        quota = planner.last_plan.quota
    assert counter.item() == 0
    for seed in range(1, 6):
        idx.copy_(batch(seed, (1000, 8), dtype=dtype))
        graph.replay()
        assert same(physical, eager.run(idx, None))
        assert same_plan(planner.last_plan, eager.last_plan)
        assert same(quota, eager.last_plan.quota)
        assert counter.item() == seed
    idx.view(-1)[:3] = 99
    graph.replay()
    torch.cuda.synchronize()
    assert (physical.view(-1)[:3] == -1).all()
    assert planner.indices_outside == 3


@gpu
def test_a_graph_of_two_calls(cuda):
    planner = cube_planner("cuda")
    batches = [batch(seed, (99, 4)).cuda() for seed in range(2)]
    expected = [planner.run(idx, None) for idx in batches]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = [planner.run(idx, None) for idx in batches]
    graph.replay()
    assert all(map(same, got, expected))


@gpu
def test_side_streams(cuda):
    planner = cube_planner("cuda")
    batches = [batch(seed, (3000, 8)).cuda() for seed in range(6)]
    expected = [planner.run(idx, None) for idx in batches]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(3)]
    got = []
    for i, idx in enumerate(batches):
        with torch.cuda.stream(streams[i % 3]):
            got.append(planner.run(idx, None))
    torch.cuda.synchronize()
    assert all(map(same, got, expected))


@gpu
def test_two_planners_on_two_streams(cuda):
    planners = [cube_planner("cuda"), cube_planner("cuda", solver="flow")]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    batches = [batch(seed, (5000, 8)).cuda() for seed in range(2)]
    expected = [planner.run(idx, None) for planner, idx in zip(planners, batches, strict=True)]
    torch.cuda.synchronize()
    got = []
    for _ in range(20):
        for planner, idx, stream in zip(planners, batches, streams, strict=True):
            with torch.cuda.stream(stream):
                got.append(planner.run(idx, None))
    torch.cuda.synchronize()
    assert all(same(physical, expected[i % 2]) for i, physical in enumerate(got))


@gpu
def test_two_devices(cuda):
    need_gpu(2)
    idx = batch(0, (3000, 8))
    expected = cube_planner("cuda:0").run(idx.to("cuda:0"), None)
    planner = cube_planner("cuda:1")  # while cuda:0 is current
    assert same(planner.run(idx.to("cuda:1"), None), expected)
    assert planner.last_plan.quota.device == torch.device("cuda:1")
    with pytest.raises(ValueError, match=r"idx is on 'cuda:0', allowed is the planner's device, 'cuda:1'"):
        planner.run(idx.to("cuda:0"), None)
    with torch.cuda.device(1):
        assert cube_planner("cuda").device == torch.device("cuda:1")


@gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_torch_compile(cuda, mode):
    planner = cube_planner("cuda")

    def layer(idx, counter):
        return planner.run(idx * 1, counter) + 1

    compiled = torch.compile(layer, fullgraph=True, mode=mode)
    counter = torch.zeros(1, dtype=torch.int64, device="cuda")
    for seed in range(5):
        idx = batch(seed, (500, 8)).cuda()
        expected = planner.run(idx, None) + 1
        assert same(compiled(idx, None), expected)  # by a CUDA graph in mode reduce-overhead
        assert same(compiled(idx, counter), expected)
        assert counter.item() == seed + 1


@gpu
def test_a_group_of_one_over_nccl(cuda, tmp_path):
    if not dist.is_nccl_available():
        pytest.skip("needs a torch with NCCL")
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        group = dist.group.WORLD
        planner = Planner(torch.zeros(1, 0).int().cuda(), 8, 8, group=group)
        idx = batch(0, (100, 6), 8).cuda()
        assert same(planner.run(idx, None), idx)  # one slot each
        with pytest.raises(TypeError, match=r"idx has dtype torch\.float32"):
            planner.run(idx.float(), None)
        planner.update_redundancy_mapping()
        assert same(planner.run(idx, None), idx)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            physical = planner.run(idx, None)
        idx.copy_(batch(1, (100, 6), 8))
        graph.replay()
        assert same(physical, idx)
        assert Planner(torch.zeros(1, 0).int(), 8, 8, group=group).run(idx.cpu(), None).equal(idx.cpu())
    finally:
        dist.destroy_process_group()


@gpu
@pytest.mark.parametrize("n_ranks", [8, 16, 32, 64, 128])
def test_certificates_with_cusolverdx(cuda, n_ranks, monkeypatch):
    if "cusolverdx" not in _C.linalgs:
        pytest.skip(f"needs a build with MathDx: {devices.GET_MATHDX}")
    monkeypatch.setenv("LPLB_LINALG", "cusolverdx")
    rng = np.random.default_rng(n_ranks)
    phy2log = cases.eplb_like_placement(rng, rng.lognormal(0, 1, 4 * n_ranks), n_ranks, 6 * n_ranks)
    planner = Planner.from_placement(Placement(phy2log, n_ranks), device="cuda")
    for draw in cases.LOADS.values():
        loads = draw(rng, 4 * n_ranks)
        plan = planner.solve(torch.from_numpy(loads).cuda()).cpu()
        (best,) = exact_bottleneck(phy2log, n_ranks, n_ranks, loads)
        assert plan.solved
        assert plan.max_load.tolist() == [best.max_load]
        assert plan.lower_bound.item() <= best.max_load * (1 + 1e-9)
        assert np.bincount(phy2log, plan.quota.numpy(), 4 * n_ranks).tolist() == loads.tolist()
