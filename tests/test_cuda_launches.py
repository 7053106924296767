"""Launch configurations and shared memory of the CUDA backend, for every size, computed on the host: no GPU needed."""

import numpy as np
import pytest
from cases import eplb_like_placement

from lplb import _C

pytestmark = pytest.mark.skipif(not _C.cuda, reason="lplb._C is built without CUDA")

SMS = 132
H100, A100, RTX = 232448, 166912, 101376  # bytes of shared memory that a block may have: sm_90, sm_80, sm_120
COUNT, SOLVE, ASSIGN = "count", "solve", "assign"


def planner(
    n_ranks: int, n_logical: int, slots: int, *, groups: int = 1, shared: int = H100, linalg: str = "builtin"
) -> "_C.CudaPlanner":
    """A planner for ``groups`` groups of ``n_ranks`` ranks with an EPLB-like placement each."""
    rng = np.random.default_rng(n_ranks)
    history = rng.lognormal(0.0, 1.0, n_logical)
    one = eplb_like_placement(rng, history, n_ranks, slots)
    phy2log = np.concatenate([one + g * n_logical for g in range(groups)])
    ranks = n_ranks * groups
    return _C.CudaPlanner(phy2log.tolist(), n_logical * groups, ranks, n_ranks, [1.0] * ranks, linalg, shared, SMS)


def launches(p: "_C.CudaPlanner", n: int = 32768, batch: int = 1) -> dict[str, tuple[int, int, int]]:
    """Blocks, threads and dynamic shared bytes by kernel."""
    return {name: (blocks, threads, shared) for name, blocks, threads, shared in p.launches(n, 8, SMS, batch)}


@pytest.mark.parametrize("linalg", ["builtin", "cusolverdx"])
@pytest.mark.parametrize("n_ranks", range(1, 129))
def test_every_group_size_has_a_launch(n_ranks: int, linalg: str) -> None:
    if linalg not in _C.linalgs:
        pytest.skip("lplb._C is built without MathDx")
    n_logical, slots = 7 * n_ranks, 8 * n_ranks  # up to 1024 physical experts
    p = planner(n_ranks, n_logical, slots if n_ranks > 1 else n_logical, groups=2, linalg=linalg)
    blocks, threads, shared = launches(p, batch=3)[SOLVE]
    assert p.linalg == linalg
    assert blocks == 3 * 2  # a block per load and group
    assert threads == (32 if n_ranks <= 16 else 128 if n_ranks <= 64 else 256)
    width = -(-n_ranks // 8) * 8 if linalg == "builtin" else next(w for w in (8, 16, 32, 64, 128) if w >= n_ranks)
    assert 8 * width**2 < shared < 8 * width**2 + 100_000
    assert shared < 220 * 1024


def test_shared_memory_at_the_sizes_of_the_bars() -> None:
    most = {
        (8, 64, 80): 6_000,
        (16, 128, 160): 12_000,
        (32, 256, 288): 22_000,
        (64, 256, 512): 80_000,
        (128, 512, 1024): 220 * 1024,
    }
    for (n_ranks, n_logical, slots), bytes_allowed in most.items():
        assert launches(planner(n_ranks, n_logical, slots))[SOLVE][2] <= bytes_allowed


def test_a_group_that_does_not_fit_is_refused_with_need_and_limit() -> None:
    needed = launches(planner(128, 512, 1024))[SOLVE][2]
    with pytest.raises(
        ValueError, match=rf"128 ranks and 1024 physical experts.* needs {needed + 64} .*are {A100} per"
    ):
        planner(128, 512, 1024, shared=A100)
    with pytest.raises(ValueError, match=rf"needs {needed + 64} .*are {needed} per"):
        planner(128, 512, 1024, shared=needed)
    assert launches(planner(128, 512, 1024, shared=needed + 64))[SOLVE][2] == needed


def test_an_unknown_algebra_is_refused() -> None:
    with pytest.raises(ValueError, match="'lapack', allowed is builtin"):
        planner(8, 64, 80, linalg="lapack")


@pytest.mark.parametrize("shared", [H100, A100, RTX])
@pytest.mark.parametrize("n_logical", [8, 64, 256, 1024, 4096])
def test_tokens_of_up_to_4096_experts_fit(n_logical: int, shared: int) -> None:
    groups = 8 if n_logical > 64 else 1
    p = planner(8, n_logical // groups, n_logical // groups + 8, groups=groups, shared=shared)
    for n in (0, 1, 8, 32768, 65536 * 8, 2**20 * 8, 2**31 - 1):
        by_kernel = launches(p, n)
        for name in (COUNT, ASSIGN):
            blocks, threads, bytes_used = by_kernel[name]
            assert 1 <= blocks <= SMS
            assert threads in (32, 64, 128, 256, 512)
            assert bytes_used <= shared
            assert bytes_used >= 4 * n_logical * (threads // 32)  # a counter per warp and expert
        assert by_kernel[COUNT][:2] == by_kernel[ASSIGN][:2]


@pytest.mark.parametrize("n_sms", [1, 2, 7, SMS, 1000])
def test_blocks_cover_all_tokens_and_no_more(n_sms: int) -> None:
    p = planner(8, 64, 80)
    for n in (0, 1, 31, 512, 513, 2048, 2049, 32768, 100_003, 2**20 * 8, 2**31 - 1):
        blocks, length = p.blocks(n, n_sms)
        assert 1 <= blocks <= min(n_sms, SMS)
        assert blocks * length >= n
        assert n == 0 or (blocks - 1) * length < n  # the last block has some


def test_tables_and_scratch_have_the_size_of_the_problem() -> None:
    small, large = planner(8, 64, 80), planner(64, 256, 512)
    assert len(small.tables) % 16 == 0
    assert 80 * 4 < len(small.tables) < len(large.tables) < 100_000
    # per block a row of the prefix, and one of every warp
    assert small.scratch_bytes >= SMS * 64 * 4 * (1 + 16)
    assert large.scratch_bytes >= SMS * 256 * 4 * (1 + 16)


def transfers(n_ranks: int, n_logical: int, slots: int, *, shared: int = H100) -> "_C.CudaTransfers":
    """Experts in blocks, one copy each."""
    ranks = (np.arange(n_logical) * n_ranks // n_logical).tolist()
    return _C.CudaTransfers(ranks, list(range(n_logical)), n_logical, n_ranks, slots, n_ranks, shared, SMS)


@pytest.mark.parametrize("shared", [H100, A100, RTX])
@pytest.mark.parametrize(("n_ranks", "n_logical"), [(1, 1), (8, 128), (8, 384), (64, 256), (128, 512), (128, 4096)])
def test_plans_with_transfers_are_one_block_that_fits(n_ranks: int, n_logical: int, shared: int) -> None:
    for slots in (1, 2, n_logical):
        p = transfers(n_ranks, n_logical, slots, shared=shared)
        plain, held, *tokens = p.launches(32768, SMS)
        for _, blocks, threads, bytes_used in (plain, held):
            assert (blocks, threads) == (1, 256)
            assert 8 * n_logical < bytes_used <= shared - 64
        assert [name for name, *_ in tokens] == ["count", "ranges", "route"]
        assert all(blocks >= 1 and bytes_used <= shared for _, blocks, _, bytes_used in tokens)
        assert len(p.tables) % 16 == 0
        assert p.width == -(-n_logical // n_ranks) + slots
        assert p.rows == min(n_ranks * slots, n_logical + 2 * n_ranks)
        # ranges of every expert on every rank, and prefixes of blocks and of warps
        assert p.scratch_bytes >= 4 * n_logical * (2 * n_ranks + SMS * 2)


def test_what_shared_memory_has_no_room_for_is_in_device_memory() -> None:
    few, many = (transfers(64, 256, slots) for slots in (2, 256))
    assert few.launches(1, 1)[1][3] > few.launches(1, 1)[0][3]  # copies that guest slots hold
    assert many.launches(1, 1)[1][3] < few.launches(1, 1)[1][3]
    assert many.scratch_bytes > few.scratch_bytes + 500_000


def test_experts_that_do_not_fit_are_refused_with_need_and_limit() -> None:
    with pytest.raises(ValueError, match=r"planning transfers of 4096 .* on 128 ranks needs \d+ bytes .*are 65536 per"):
        transfers(128, 4096, 2, shared=65536)
