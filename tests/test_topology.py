"""LPLB's replica graphs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lplb import topology

CUBE = [[3, 0, 1, 2, 7, 4, 5, 6], [6, 7, 4, 5, 0, 1, 2, 3]]
HYPERCUBE = [
    [3, 0, 1, 2, 7, 4, 5, 6, 11, 8, 9, 10, 15, 12, 13, 14],
    [12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11],
]
TORUS_2_3 = [[3, 4, 5, 0, 1, 2], [1, 2, 0, 4, 5, 3]]


@pytest.mark.parametrize(
    ("r2o", "columns"),
    [
        (topology.cube(), CUBE),
        (topology.hypercube(), HYPERCUBE),
        (topology.hypercube(16), HYPERCUBE),
        (topology.torus(2, 3), TORUS_2_3),
        (topology.ring(2), [[1, 0]]),
        (topology.ring(5), [[1, 2, 3, 4, 0]]),
        (topology.circulant(5, 1), [[1, 2, 3, 4, 0]]),
        (topology.circulant(4, 2, 3), [[2, 3, 0, 1], [3, 0, 1, 2]]),
    ],
    ids=[
        *("cube", "hypercube", "hypercube(16)", "torus(2, 3)", "ring(2)", "ring(5)"),
        *("circulant(5, 1)", "circulant(4, 2, 3)"),
    ],
)
def test_columns(r2o, columns):
    assert r2o.dtype == torch.int32
    assert r2o.is_contiguous()
    assert r2o.T.tolist() == columns
    topology.check(r2o)


@given(m=st.integers(2, 6), n=st.integers(2, 6))
def test_torus_is_a_topology_of_neighbours(m, n):
    r2o = topology.torus(m, n)
    topology.check(r2o)
    for rank, (below, right) in enumerate(r2o.tolist()):
        i, j = divmod(rank, n)
        assert divmod(below, n) == ((i + 1) % m, j)
        assert divmod(right, n) == (i, (j + 1) % n)


@pytest.mark.parametrize("n", [0, 8, 15, 17, 32])
def test_hypercube_refuses_other_sizes(n):
    with pytest.raises(ValueError, match=f"n is {n}, allowed is 16"):
        topology.hypercube(n)


@pytest.mark.parametrize(("m", "n", "seen"), [(1, 4, "m is 1"), (4, 1, "n is 1"), (0, 4, "m is 0"), (4, -2, "n is -2")])
def test_torus_refuses_fixed_points(m, n, seen):
    with pytest.raises(ValueError, match=f"{seen}, allowed is 2 or more"):
        topology.torus(m, n)


@pytest.mark.parametrize("n", [1, 0, -3])
def test_ring_refuses_short_rings(n):
    with pytest.raises(ValueError, match=f"n is {n}, allowed is 2 or more"):
        topology.ring(n)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 1), "n is 1, allowed is 2 or more"),
        ((4,), r"shifts is \(\), allowed is one shift or more"),
        ((4, 1, 4), "shift 1 is 4, allowed is 1 to n - 1 = 3"),
        ((4, 0), "shift 0 is 0, allowed is 1 to n - 1 = 3"),
    ],
)
def test_circulant_refuses_fixed_points(arguments, message):
    with pytest.raises(ValueError, match=message):
        topology.circulant(*arguments)


def test_a_circulant_can_keep_copies_out_of_the_originals_node():
    origin = topology.circulant(32, 11, 18)
    assert (origin // 8 != torch.arange(32)[:, None] // 8).all()
    assert not (topology.torus(4, 8) // 8 != torch.arange(32)[:, None] // 8).all()


@pytest.mark.parametrize("n", [2.0, True, "4", None])
def test_dimensions_are_ints(n):
    with pytest.raises(TypeError, match=r"n is .*, allowed is an int"):
        topology.ring(n)
    with pytest.raises(TypeError, match=r"m is .*, allowed is an int"):
        topology.torus(n, 2)
    with pytest.raises(TypeError, match=r"shift 1 is .*, allowed is an int"):
        topology.circulant(4, 1, n)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_check_accepts_integer_dtypes(dtype):
    topology.check(topology.cube().to(dtype))


def test_check_accepts_no_column_and_equal_columns():
    topology.check(torch.empty(4, 0, dtype=torch.int32))
    topology.check(topology.ring(4).expand(4, 2))


@given(st.data())
def test_check_accepts_exactly_the_derangements(data):
    n = data.draw(st.integers(1, 6))
    column = data.draw(st.one_of(st.permutations(range(n)), st.lists(st.integers(-1, n), min_size=n, max_size=n)))
    r2o = torch.tensor([column], dtype=torch.int32).T
    if sorted(column) == list(range(n)) and all(r != origin for r, origin in enumerate(column)):
        topology.check(r2o)
    else:
        with pytest.raises(ValueError, match="r2o: column 0, rank "):
            topology.check(r2o)


@pytest.mark.parametrize(
    ("r2o", "message"),
    [
        ([[1, 0]], "list, allowed is a torch.Tensor"),
        (None, "NoneType, allowed is a torch.Tensor"),
        (torch.zeros(2, 1), "torch.float32, allowed is an integer dtype"),
        (torch.zeros(2, 1, dtype=torch.bool), "torch.bool, allowed is an integer dtype"),
        (torch.zeros(2, 1, dtype=torch.complex64), "torch.complex64, allowed is an integer dtype"),
    ],
)
def test_check_refuses_types(r2o, message):
    with pytest.raises(TypeError, match=message):
        topology.check(r2o)


@pytest.mark.parametrize(
    ("r2o", "message"),
    [
        (torch.tensor([1, 0]), r"shape \[2\], allowed is \[ranks, classes\]"),
        (torch.tensor([[[1, 0]]]), r"shape \[1, 1, 2\]"),
        (torch.empty(0, 1, dtype=torch.int32), r"shape \[0, 1\].*at least one rank"),
        (torch.tensor([[1, 1], [0, 2], [2, 0]]), "column 0, rank 2 copies from 2, itself"),
        (torch.tensor([[1, 1], [2, 2], [0, 1]]), "column 1, rank 2 copies from 1, as rank 0 does"),
        (torch.tensor([[1], [2], [3]]), "column 0, rank 2 copies from 3, allowed is 0 to 2"),
        (torch.tensor([[1], [-1], [0]]), "column 0, rank 1 copies from -1, allowed is 0 to 2"),
    ],
)
def test_check_refuses_values(r2o, message):
    with pytest.raises(ValueError, match=message):
        topology.check(r2o)
