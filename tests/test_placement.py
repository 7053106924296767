"""Placements: tables, checks, groups, JSON."""

import copy
import dataclasses
import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lplb.arguments import MAX_GROUP_SIZE, whole_number
from lplb.placement import Placement, split_evenly

# Two ranks of three slots, four experts.
PHY2LOG = [2, 0, 3, 1, 3, 2]


@st.composite
def placements(draw):
    """Draw phy2log and n_ranks of a valid placement: ranks hold distinct experts, ids without gaps."""
    n_ranks = draw(st.integers(1, 5))
    slots_per_rank = draw(st.integers(1, 4))
    ids = st.lists(st.integers(0, 9), min_size=slots_per_rank, max_size=slots_per_rank, unique=True)
    slots = [e for _ in range(n_ranks) for e in draw(ids)]
    dense = {e: i for i, e in enumerate(sorted(set(slots)))}
    return [dense[e] for e in slots], n_ranks


def test_tables():
    placement = Placement(PHY2LOG, 2)
    tables = {
        "phy2log": PHY2LOG,
        "log2phy": [[1, -1], [3, -1], [0, 5], [2, 4]],
        "logcnt": [1, 1, 2, 2],
        "rank_of": [0, 0, 0, 1, 1, 1],
    }
    for name, expected in tables.items():
        table = getattr(placement, name)
        assert table.dtype == torch.int32
        assert table.device.type == "cpu"
        assert table.tolist() == expected, name
    assert (placement.n_ranks, placement.n_logical) == (2, 4)
    assert (placement.n_physical, placement.slots_per_rank) == (6, 3)
    assert repr(placement) == "Placement(n_ranks=2, n_logical=4, n_physical=6)"


@given(placements())
def test_tables_by_brute_force(drawn):
    phy2log, n_ranks = drawn
    placement = Placement(phy2log, n_ranks)
    slots_of = [[p for p, e in enumerate(phy2log) if e == wanted] for wanted in range(max(phy2log) + 1)]
    widest = max(map(len, slots_of))
    assert placement.log2phy.tolist() == [slots + [-1] * (widest - len(slots)) for slots in slots_of]
    assert placement.logcnt.tolist() == [len(slots) for slots in slots_of]
    assert placement.rank_of.tolist() == [p // (len(phy2log) // n_ranks) for p in range(len(phy2log))]


@pytest.mark.parametrize(
    "phy2log",
    [
        tuple(PHY2LOG),
        np.array(PHY2LOG),
        np.array(PHY2LOG, dtype=np.uint64),
        list(np.array(PHY2LOG, dtype=np.int16)),
        torch.tensor(PHY2LOG),
        torch.tensor(PHY2LOG, dtype=torch.uint8),
    ],
    ids=["tuple", "int64 array", "uint64 array", "list of int16", "int64 tensor", "uint8 tensor"],
)
def test_forms_of_phy2log(phy2log):
    assert Placement(phy2log, np.int64(2), n_logical=4) == Placement(PHY2LOG, 2)


@pytest.mark.parametrize(
    "phy2log",
    [torch.tensor(PHY2LOG, dtype=torch.int32), np.array(PHY2LOG, dtype=np.int32)],
    ids=["tensor", "array"],
)
def test_shares_no_memory(phy2log):
    placement = Placement(phy2log, 2)
    phy2log[:] = 0
    assert placement.phy2log.tolist() == PHY2LOG


def test_is_frozen():
    placement = Placement(PHY2LOG, 2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        placement.n_ranks = 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        del placement.phy2log


def test_equality_and_hash():
    placement = Placement(PHY2LOG, 2)
    assert placement == Placement(PHY2LOG, 2)
    assert hash(placement) == hash(Placement(PHY2LOG, 2))
    assert placement != Placement([0, 2, 3, 1, 3, 2], 2)
    assert Placement([0, 1, 2, 3], 2) != Placement([0, 1, 2, 3], 4)
    assert placement != PHY2LOG
    assert copy.deepcopy(placement) == placement
    assert pickle.loads(pickle.dumps(placement)) == placement


@pytest.mark.parametrize(
    ("phy2log", "message"),
    [
        ([0.0, 1.0], r"phy2log\[0\] is 0.0, allowed is an int"),
        ([0, True], r"phy2log\[1\] is True, allowed is an int"),
        ([[0], [1]], r"phy2log\[0\] is \[0\], allowed is an int"),
        ("01", r"phy2log\[0\] is '0', allowed is an int"),
        (None, "phy2log is a NoneType, allowed is a tensor, an array or a sequence"),
        (np.array([0.0, 1.0]), "dtype float64, allowed is an integer dtype"),
        (np.array([False, True]), "dtype bool, allowed is an integer dtype"),
        (torch.tensor([0.0, 1.0]), "dtype torch.float32, allowed is an integer dtype"),
        (torch.tensor([False, True]), "dtype torch.bool, allowed is an integer dtype"),
        (torch.tensor([0, 1], dtype=torch.bfloat16), "dtype torch.bfloat16, allowed is an integer dtype"),
    ],
)
def test_refuses_types(phy2log, message):
    with pytest.raises(TypeError, match=message):
        Placement(phy2log, 2)


@pytest.mark.parametrize(
    ("phy2log", "n_ranks", "n_logical", "message"),
    [
        ([], 1, None, r"shape \[0\], allowed is \[n_physical\] with at least one slot"),
        (torch.tensor([[0, 1]]), 1, None, r"shape \[1, 2\], allowed is \[n_physical\]"),
        (np.array(0), 1, None, r"shape \[\], allowed is \[n_physical\]"),
        (PHY2LOG, 4, None, "has 6 slots, allowed is a multiple of n_ranks = 4"),
        (PHY2LOG, 0, None, "n_ranks is 0, allowed is 1 or more"),
        (PHY2LOG, -2, None, "n_ranks is -2, allowed is 1 or more"),
        (PHY2LOG, 2, 0, "n_logical is 0, allowed is 1 to 2147483648"),
        (PHY2LOG, 2, 3, r"phy2log\[2\] is 3, allowed is 0 to 2"),
        ([0, 1, -1, 2], 2, 3, r"phy2log\[2\] is -1, allowed is 0 to 2"),
        ([-1], 1, None, r"phy2log\[0\] is -1, allowed is 0 to 0"),
        ([0, 2**70], 2, None, rf"phy2log\[1\] is {2**70}, allowed is 0 to 2147483647"),
        (
            np.array([0, 2**63], dtype=np.uint64),
            2,
            None,
            rf"phy2log\[1\] is {2**63}, allowed is 0 to 2147483647",
        ),
        ([0, 2, 0, 3], 2, None, "1 of 4 experts have no slot: 1; allowed is at least one slot each"),
        ([0, 1], 2, 4, "2 of 4 experts have no slot: 2, 3; allowed"),
        (
            [0, 2**31 - 1],
            2,
            None,
            "2147483646 of 2147483648 experts have no slot: 1, 2, 3, 4 and others; allowed",
        ),
        (
            [0, 1, 2, 1, 2, 1],
            2,
            None,
            r"expert 1 is on rank 1 2 times, in slots \[3, 5\].*lplb.eplb.spread_copies",
        ),
    ],
)
def test_refuses_values(phy2log, n_ranks, n_logical, message):
    with pytest.raises(ValueError, match=message):
        Placement(phy2log, n_ranks, n_logical)


@pytest.mark.parametrize("number", [2.0, True, "2", np.float32(2), np.bool_(True)])
def test_counts_are_ints(number):
    with pytest.raises(TypeError, match=r"n_ranks is .*, allowed is an int"):
        Placement(PHY2LOG, number)
    with pytest.raises(TypeError, match=r"n_logical is .*, allowed is an int"):
        Placement(PHY2LOG, 2, number)
    with pytest.raises(TypeError, match=r"group_size is .*, allowed is an int"):
        Placement(PHY2LOG, 2).check_groups(number)


def test_whole_number():
    assert type(whole_number("n", np.int16(3), 0)) is int
    assert whole_number("n", 3, 3, 3) == 3
    with pytest.raises(ValueError, match="n is 4, allowed is 1 to 3"):
        whole_number("n", 4, 1, 3)
    with pytest.raises(ValueError, match="n is 0, allowed is 1 or more"):
        whole_number("n", 0, 1)


def test_groups():
    placement = Placement([0, 1, 1, 0, 2, 3, 3, 4], 4)
    placement.check_groups(2)
    placement.check_groups(4)
    with pytest.raises(ValueError, match=r"expert 0 has slots in groups \[0, 1\] \(of 1 ranks each\), allowed is one"):
        placement.check_groups(1)
    with pytest.raises(ValueError, match=r"expert 1 has slots in groups \[0, 2\] \(of 2 ranks each\)"):
        Placement([0, 1, 2, 3, 4, 1], 6).check_groups(2)


@given(placements(), st.integers(1, 5))
def test_groups_by_brute_force(drawn, group_size):
    phy2log, n_ranks = drawn
    slots_per_group = len(phy2log) // n_ranks * group_size
    homes = [(e, p // slots_per_group) for p, e in enumerate(phy2log)]
    closed = n_ranks % group_size == 0 and len(set(homes)) == len(set(phy2log))
    placement = Placement(phy2log, n_ranks)
    if closed:
        placement.check_groups(group_size)
    else:
        with pytest.raises(ValueError, match="allowed is"):
            placement.check_groups(group_size)


@pytest.mark.parametrize(
    ("group_size", "message"),
    [
        (0, "group_size is 0, allowed is 1 to 128"),
        (-1, "group_size is -1, allowed is 1 to 128"),
        (129, "group_size is 129, allowed is 1 to 128"),
        (100, "group_size is 100, allowed is a divisor of n_ranks = 258"),
    ],
)
def test_group_size(group_size, message):
    assert MAX_GROUP_SIZE == 128
    with pytest.raises(ValueError, match=message):
        Placement(range(258), 258).check_groups(group_size)


@given(placements())
def test_json_round_trip(drawn):
    placement = Placement(*drawn)
    again = Placement.from_json(placement.to_json())
    assert again == placement
    assert hash(again) == hash(placement)


def test_json_text():
    content = {"format": "lplb.placement", "version": 1, "n_ranks": 2, "n_logical": 4, "phy2log": PHY2LOG}
    assert json.loads(Placement(PHY2LOG, 2).to_json()) == content
    assert Placement.from_json(json.dumps({**content, "made_by": "a later writer"})) == Placement(PHY2LOG, 2)


@pytest.mark.parametrize("key", ["format", "version", "n_ranks", "n_logical", "phy2log"])
def test_json_lacks_a_key(key):
    content = json.loads(Placement(PHY2LOG, 2).to_json())
    del content[key]
    with pytest.raises(ValueError, match=f"lacks {key}"):
        Placement.from_json(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "format is 'other', allowed is 'lplb.placement'"),
        ({"format": ["lplb.placement"]}, r"format is \['lplb.placement'\], allowed is"),
        ({"version": 2}, "version is 2, allowed is 1"),
        ({"version": True}, "version is True, allowed is 1"),
        ({"version": 1.0}, "version is 1.0, allowed is 1"),
        ({"n_ranks": "2"}, "n_ranks is '2', allowed is an int"),
        ({"n_ranks": None}, "n_ranks is None, allowed is an int"),
        ({"n_ranks": 4}, "has 6 slots, allowed is a multiple of n_ranks = 4"),
        ({"n_logical": None}, "n_logical is null, allowed is an integer"),
        ({"n_logical": 4.0}, "n_logical is 4.0, allowed is an int"),
        ({"n_logical": 5}, "1 of 5 experts have no slot: 4"),
        ({"phy2log": "201132"}, "phy2log is a str, allowed is a list of integers"),
        ({"phy2log": {"0": 1}}, "phy2log is a dict, allowed is a list of integers"),
        ({"phy2log": [0, 1.5]}, r"phy2log\[1\] is 1.5, allowed is an int"),
        ({"phy2log": [0, False]}, r"phy2log\[1\] is False, allowed is an int"),
        ({"phy2log": []}, "at least one slot"),
    ],
)
def test_json_refuses_content(change, message):
    content = json.loads(Placement(PHY2LOG, 2).to_json())
    with pytest.raises(ValueError, match=message):
        Placement.from_json(json.dumps({**content, **change}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be JSON text"),
        ("{", "must be JSON text"),
        ("[" * 200_000, "must be JSON text"),
        ("[1, 2]", "must be a JSON object, not list"),
        ("null", "must be a JSON object, not NoneType"),
        ("{}", "lacks format, version, n_ranks, n_logical, phy2log"),
    ],
    ids=["empty", "cut", "deep", "list", "null", "no keys"],
)
def test_json_refuses_text(text, message):
    with pytest.raises(ValueError, match=message):
        Placement.from_json(text)


def test_json_is_a_str():
    with pytest.raises(TypeError, match="text is a bytes, allowed is a str"):
        Placement.from_json(b"{}")


def test_split_evenly_deals_any_shape_and_integer():
    placement = Placement([0, 1, 0, 1], 2)
    counts = np.array([[[3, 1], [0, 2]], [[1, 0], [7, 7]]], dtype=np.uint64)
    expected = [[[2, 0, 1, 1], [0, 1, 0, 1]], [[1, 0, 0, 0], [4, 3, 3, 4]]]
    for dtype in (np.uint64, np.int64, np.uint8):
        quota = split_evenly(placement, counts.astype(dtype))
        assert (quota.dtype, quota.tolist()) == (np.int64, expected)


@pytest.mark.parametrize(
    ("counts", "error", "message"),
    [
        (np.ones(2), TypeError, "counts has dtype float64, allowed is an integer dtype"),
        (np.ones(2, dtype=bool), TypeError, "dtype bool"),
        (torch.ones(2), TypeError, "a torch.float32 tensor"),
        ([1, 1], TypeError, "a list"),
        (np.array(3), ValueError, r"shape \[\], allowed is"),
        (np.ones((2, 3), dtype=int), ValueError, r"shape \[2, 3\], allowed is \[..., n_logical = 2\]"),
        (np.array([1, -1]), ValueError, "has -1, allowed are 0 to"),
        (np.array([1, 2**63], dtype=np.uint64), ValueError, "has 9223372036854775808"),
    ],
)
def test_split_evenly_refuses(counts, error, message):
    with pytest.raises(error, match=message):
        split_evenly(Placement([0, 1], 2), counts)
