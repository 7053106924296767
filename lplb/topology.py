"""LPLB's replica graphs: who copies whose experts.

A topology is an int32 tensor ``r2o [ranks, classes]``: entry ``[r, k]`` is the rank whose ``k``-th expert
class rank ``r`` copies. Cube, hypercube and torus are the graphs that DeepSeek's LPLB ships; the ring is the
smallest one; circulants have as many classes as one likes, and can keep copies out of the original's node.
"""

import torch

__all__ = ["check", "circulant", "cube", "hypercube", "ring", "torus"]


def cube() -> torch.Tensor:
    """The 8-rank cube with two expert classes per rank.

    Returns:
        int32 ``[8, 2]``.
    """
    return _from_columns([3, 0, 1, 2, 7, 4, 5, 6], [6, 7, 4, 5, 0, 1, 2, 3])


def hypercube(n: int = 16) -> torch.Tensor:
    """The 16-rank hypercube with two expert classes per rank.

    Column 0 is a ring inside each block of four ranks, column 1 the block before.

    Args:
        n: number of ranks; only 16 is defined.

    Returns:
        int32 ``[16, 2]``.

    Raises:
        ValueError: ``n`` is not 16.
    """
    if n != 16:
        raise ValueError(f"hypercube: n is {n!r}, allowed is 16")
    in_block = [r - 1 if r % 4 else r + 3 for r in range(16)]
    return _from_columns(in_block, [(r - 4) % 16 for r in range(16)])


def torus(m: int, n: int) -> torch.Tensor:
    """An ``m`` by ``n`` torus, rank ``(i, j)`` being ``i * n + j``, with two expert classes per rank.

    Rank ``(i, j)`` copies from ``(i + 1 mod m, j)`` in column 0 and from ``(i, j + 1 mod n)`` in column 1.

    Args:
        m: rows, at least 2; one row would make every rank copy from itself.
        n: columns, at least 2, for the same reason.

    Returns:
        int32 ``[m * n, 2]``.

    Raises:
        TypeError: a dimension is not an int.
        ValueError: a dimension is below 2.
    """
    _at_least_two("torus", "m", m)
    _at_least_two("torus", "n", n)
    cells = [(i, j) for i in range(m) for j in range(n)]
    return _from_columns(
        [(i + 1) % m * n + j for i, j in cells],
        [i * n + (j + 1) % n for i, j in cells],
    )


def ring(n: int) -> torch.Tensor:
    """A ring with one expert class per rank: rank ``r`` copies from ``r + 1 mod n``.

    Args:
        n: number of ranks, at least 2.

    Returns:
        int32 ``[n, 1]``.

    Raises:
        TypeError: ``n`` is not an int.
        ValueError: ``n`` is below 2.
    """
    _at_least_two("ring", "n", n)
    return _from_columns([(r + 1) % n for r in range(n)])


def circulant(n: int, *shifts: int) -> torch.Tensor:
    """Rings over one another: rank ``r`` copies class ``k`` from rank ``r + shifts[k] mod n``.

    With nodes of ``g`` consecutive ranks and shifts from ``g`` to ``n - g`` every copy is in another node than its
    original, so that tokens of two nodes find their experts at home. ``circulant(32, 11, 18)`` does so for nodes of 8.

    Args:
        n: number of ranks, at least 2.
        shifts: one per expert class, 1 to ``n - 1``.

    Returns:
        int32 ``[n, len(shifts)]``.

    Raises:
        TypeError: ``n`` or a shift is not an int.
        ValueError: ``n`` is below 2, there is no shift, or one is out of bounds.
    """
    _at_least_two("circulant", "n", n)
    if not shifts:
        raise ValueError("circulant: shifts is (), allowed is one shift or more")
    for k, shift in enumerate(shifts):
        if isinstance(shift, bool) or not isinstance(shift, int):
            raise TypeError(f"circulant: shift {k} is {shift!r}, allowed is an int")
        if not 1 <= shift < n:
            raise ValueError(f"circulant: shift {k} is {shift}, allowed is 1 to n - 1 = {n - 1}")
    return _from_columns(*([(r + shift) % n for r in range(n)] for shift in shifts))


def check(r2o: torch.Tensor) -> None:
    """Refuse a tensor that is not a topology.

    Every column must be a permutation of the ranks in which no rank stands for itself. Two columns may let a
    rank copy from the same rank twice. No column at all is a topology without replicas.

    Args:
        r2o: ``[ranks, classes]``, any integer dtype, on any device.

    Raises:
        TypeError: ``r2o`` is not a tensor, or not of an integer dtype.
        ValueError: it is not 2-D, has no rank, or a column breaks the rule; the message names column, rank
            and value.
    """
    if not isinstance(r2o, torch.Tensor):
        raise TypeError(f"r2o is a {type(r2o).__name__}, allowed is a torch.Tensor")
    if r2o.dtype.is_floating_point or r2o.dtype.is_complex or r2o.dtype == torch.bool:
        raise TypeError(f"r2o has dtype {r2o.dtype}, allowed is an integer dtype")
    if r2o.dim() != 2 or r2o.shape[0] < 1:
        raise ValueError(f"r2o has shape {list(r2o.shape)}, allowed is [ranks, classes] with at least one rank")
    ranks, classes = r2o.shape
    rows: list[list[int]] = r2o.tolist()
    for k in range(classes):
        _check_column(k, [rows[r][k] for r in range(ranks)])


def lay_out(r2o: torch.Tensor, order: torch.Tensor, n_groups: int, combined: int) -> torch.Tensor:
    """Return the placement that LPLB makes of a topology.

    Args:
        r2o: checked topology, ``[group_size, classes]``.
        order: logical experts rank by rank, ``[n_logical]``: rank ``r`` owns ``order.view(n_ranks, -1)[r]``.
        n_groups: how many groups of ``group_size`` consecutive ranks there are.
        combined: redundant slots per rank and class.

    Returns:
        phy2log, int64 ``[n_physical]``: per rank its own experts, then redundant slots; redundant slot
        ``c * classes + k`` of rank ``r`` copies own slot ``c * classes + k`` of rank ``r2o[r, k]``.
    """
    group_size, classes = r2o.shape
    own = order.view(n_groups, group_size, -1).long()
    owner = r2o.long().repeat(1, combined).expand(n_groups, -1, -1)  # of every redundant slot
    copies = own[:, :, : classes * combined].gather(1, owner)
    return torch.cat([own, copies], dim=2).flatten()


def _check_column(k: int, origins: list[int]) -> None:
    ranks = len(origins)
    copier: dict[int, int] = {}
    for r, origin in enumerate(origins):
        where = f"r2o: column {k}, rank {r} copies from {origin}"
        if not 0 <= origin < ranks:
            raise ValueError(f"{where}, allowed is 0 to {ranks - 1}")
        if origin == r:
            raise ValueError(f"{where}, itself; allowed is any other rank")
        if origin in copier:
            raise ValueError(f"{where}, as rank {copier[origin]} does; a column must be a permutation of the ranks")
        copier[origin] = r


def _at_least_two(topology: str, name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{topology}: {name} is {value!r}, allowed is an int")
    if value < 2:
        raise ValueError(f"{topology}: {name} is {value}, allowed is 2 or more: no rank may copy from itself")


def _from_columns(*columns: list[int]) -> torch.Tensor:
    return torch.tensor(columns, dtype=torch.int32, device="cpu").T.contiguous()
