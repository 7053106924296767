"""Formats: what is written, and what engines write, is read; broken files end in an error that names them."""

import io
import json
import os
import pickle
import struct
import zipfile
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from lplb import Placement, files
from lplb.formats import read_loads, read_placements, read_slots, write_loads, write_placements
from lplb.history import LoadHistory
from lplb.trace import load_trace

LOADS = np.random.default_rng(0).integers(0, 9000, (2, 3, 6))  # [layers, batches, n_logical]
SLOTS = [[0, 1, 2, 3, 4, 5, 0, 1], [5, 4, 3, 2, 1, 0, 5, 3]]  # 4 ranks of two slots


@pytest.fixture
def at(tmp_path):
    """Write a file: at(name, bytes, text, an array, or what torch saves)."""

    def write(name, content):
        path = tmp_path / name
        if isinstance(content, str):
            content = content.encode()
        if isinstance(content, np.ndarray):
            np.save(path, content)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        elif name.endswith(".pt"):
            torch.save(content, path)
        elif name.endswith(".npz"):
            np.savez(path, **content)
        else:
            path.write_text(json.dumps(content))
        return path

    return write


def same(got, expected):
    assert got.shape == np.shape(expected)
    assert (got == expected).all()


# Round trips

counts = arrays.arrays(
    np.int64, arrays.array_shapes(min_dims=3, max_dims=3, max_side=4), elements=st.integers(0, 2**53)
)
averages = arrays.arrays(
    np.float64, arrays.array_shapes(min_dims=3, max_dims=3, max_side=4), elements=st.floats(0, 2.0**53)
)


@pytest.mark.parametrize("suffix", [".npz", ".npy", ".csv", ".pt", ".json"])
@given(loads=counts | averages)
def test_loads_come_back(tmp_path_factory, suffix, loads):
    if suffix in (".pt", ".json"):
        loads[0, :, 0] += loads[0, :, 0] == 0  # SGLang's batches without tokens are left out
    path = tmp_path_factory.mktemp("loads") / f"x{suffix}"
    write_loads(path, loads)
    got = read_loads(path)
    same(got, loads)
    if suffix != ".csv":
        assert got.dtype == loads.dtype
    same(read_loads(path, layer=len(loads) - 1), loads[-1:])


def test_tensors_are_written_like_arrays(tmp_path):
    for i, suffix in enumerate([".npz", ".npy", ".csv", ".pt", ".json"]):
        write_loads(tmp_path / f"{i}{suffix}", torch.from_numpy(LOADS).int())
        same(read_loads(tmp_path / f"{i}{suffix}"), LOADS)


@st.composite
def placements(draw):
    n_ranks, per_rank, n_layers = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    n_logical = draw(st.integers(per_rank, n_ranks * per_rank))
    seed = draw(st.integers(0, 2**32))
    rng = np.random.default_rng(seed)
    return [random_placement(rng, n_ranks, per_rank, n_logical) for _ in range(n_layers)]


def random_placement(rng, n_ranks, per_rank, n_logical):
    """Every expert once, in any order, then any others that the rank lacks."""
    free = [(rank, slot) for slot in range(per_rank) for rank in range(n_ranks)]
    held = [set() for _ in range(n_ranks)]
    phy2log = np.zeros((n_ranks, per_rank), dtype=np.int64)
    for expert, (rank, slot) in zip(rng.permutation(n_logical), free, strict=False):
        phy2log[rank, slot] = expert
        held[rank].add(int(expert))
    for rank, slot in free[n_logical:]:
        phy2log[rank, slot] = rng.choice([e for e in range(n_logical) if e not in held[rank]])
        held[rank].add(int(phy2log[rank, slot]))
    return Placement(phy2log.ravel(), n_ranks, n_logical)


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("x.json", None),
        ("x.json", "lplb"),
        ("x.json", "sglang"),
        ("x.pt", None),
        ("x.pt", "sglang"),
        ("x.json", "vllm"),
        ("x.json", "vllm-ascend"),
    ],
)
@given(layers=placements())
def test_placements_come_back(tmp_path_factory, name, format, layers):
    path = tmp_path_factory.mktemp("placements") / name
    write_placements(path, layers, format)
    says_ranks = format in (None, "lplb", "vllm-ascend") and name != "x.pt"
    assert read_placements(path, None if says_ranks else layers[0].n_ranks) == layers
    assert read_placements(path, layers[0].n_ranks, n_logical=layers[0].n_logical) == layers
    assert [row.tolist() for row in read_slots(path).phy2log] == [one.phy2log.tolist() for one in layers]


def test_one_placement_is_that_of_to_json(tmp_path):
    placement = Placement(SLOTS[0], 4)
    write_placements(tmp_path / "x.json", placement)
    assert Placement.from_json((tmp_path / "x.json").read_text()) == placement
    assert read_placements(tmp_path / "x.json") == [placement]


def test_layers_may_have_other_numbers_of_slots(tmp_path):
    layers = [Placement(SLOTS[0], 4), Placement([*SLOTS[1], *SLOTS[0][2:6]], 4)]
    write_placements(tmp_path / "x.json", layers)
    assert read_placements(tmp_path / "x.json") == layers
    with pytest.raises(ValueError, match=r"placements\[1\] has n_physical 12, allowed is that of the first, 8"):
        write_placements(tmp_path / "y.json", layers, "sglang")
    assert not (tmp_path / "y.json").exists()


# What serving engines write: keys as their sources have them


def test_sglangs_statistics(at):
    buffer = torch.zeros(5, 2, 6, dtype=torch.int32)  # its ring buffer, of which three steps are filled
    buffer[1:4] = torch.from_numpy(LOADS.swapaxes(0, 1))
    dump = {"rank": 0, "logical_count": buffer, "average_utilization_rate_over_window": 0.7}
    same(read_loads(at("expert_distribution_recorder_1.5.pt", dump)), LOADS)
    same(read_loads(at("one.json", {"logical_count": LOADS[:, 0].tolist()})), LOADS[:, :1])
    same(read_loads(at("x.npz", {"logical_count": buffer.numpy()}))[:, 1:4], LOADS)


def test_sglangs_layers_without_experts_stay(at):
    counts = torch.from_numpy(np.concatenate([np.zeros((1, 3, 6), dtype=np.int64), LOADS]).swapaxes(0, 1).copy())
    got = read_loads(at("x.pt", {"logical_count": counts}))
    same(got, np.concatenate([np.zeros((1, 3, 6)), LOADS]))


def passes(rank, ids, rng):
    """One rank's records of forward passes on SLOTS, and their counts by slot."""
    counts = rng.integers(0, 50, (len(ids), 2, 8))
    records = [
        {"forward_pass_id": i, "rank": rank, "gatherer_key": "primary", "global_physical_count": torch.tensor(count)}
        for i, count in zip(ids, counts, strict=True)
    ]
    return {"records": records, "last_physical_to_logical_map": torch.tensor(SLOTS)}, dict(
        zip(ids, counts, strict=True)
    )


def test_sglangs_passes_of_ranks_are_added_up(at):
    rng = np.random.default_rng(1)
    first, a = passes(0, [7, 8, 11], rng)
    second, b = passes(1, [8, 7, 9], rng)
    paths = [at("r_0.pt", first), at("r_1.pt", second)]
    expected = np.zeros((2, 4, 6), dtype=np.int64)
    for batch, i in enumerate([7, 8, 9, 11]):
        for counts in (a.get(i), b.get(i)):
            if counts is not None:
                for layer in range(2):
                    for slot in range(8):
                        expected[layer, batch, SLOTS[layer][slot]] += counts[layer, slot]
    same(read_loads(paths), expected)
    same(read_loads(paths[1], n_logical=7)[:, :, 6], np.zeros((2, 3)))
    assert read_placements(paths[0], 4) == [Placement(row, 4) for row in SLOTS]


def test_sglangs_older_tables(at):
    one = at("a.csv", "layer_id,expert_id,count\n1,0,24990\n1,2,13378\n3,1,4\n3,1,1\n")
    other = at("b.csv", "layer_id,expert_id,count\n1,0,10\n3,2,1\n")
    expected = np.zeros((4, 1, 3))
    expected[1, 0], expected[3, 0] = [25000, 0, 13378], [0, 5, 1]
    same(read_loads([one, other]), expected)
    same(read_loads(other, n_logical=4)[1, 0], [10, 0, 0, 0])


def test_vllms_statistics(at):
    lines = [
        {"record_type": "session_metadata"},
        {
            "record_type": "eplb_load_stats",
            "version": 1,
            "step": 7,
            "num_ranks": 2,
            "expert_load": [[10, 1, 5, 2], [2, 8, 1, 3]],
            "p2l_map": [[0, 1, 2, 0], [2, 1, 0, 2]],
        },
        {"record_type": "eplb_load_stats", "expert_load": [[1, 1, 1, 1]] * 2, "p2l_map": [[0, 1, 2, 2]] * 2},
    ]
    path = at("x.jsonl", "\n".join(json.dumps(line) for line in lines) + "\n\n")
    same(read_loads(path), [[[12, 1, 5], [1, 1, 2]], [[1, 8, 5], [1, 1, 2]]])
    same(read_loads(at("one.jsonl", json.dumps(lines[1]))), [[[12, 1, 5]], [[1, 8, 5]]])


def test_vllms_placements(at):
    expected = [Placement(row, 4) for row in SLOTS]
    mapping = {"record_type": "eplb_initial_mapping", "version": 1, "num_redundant_experts": 2, "num_slots": 8}
    mapping["initial_global_assignments"] = {"1": SLOTS[1], "0": SLOTS[0]}
    assert read_placements(at("a.jsonl", json.dumps(mapping)), 4) == expected
    both = "\n".join([json.dumps({"record_type": "other"}), json.dumps(mapping)])
    assert read_placements(at("b.jsonl", both), 4) == expected
    assert read_placements(at("c.json", SLOTS), 4) == expected
    assert read_placements(at("d.json", SLOTS[0]), 4) == expected[:1]


def test_ascends_placements(at):
    devices = [[{"device_id": r, "device_expert": row[2 * r : 2 * r + 2]} for r in range(4)] for row in SLOTS]
    layers = [{"layer_id": i, "device_count": 4, "device_list": d} for i, d in enumerate(devices)]
    path = at("x.json", {"moe_layer_count": 2, "layer_list": layers})
    assert read_placements(path) == [Placement(row, 4) for row in SLOTS]


def test_what_is_written_for_engines_has_their_keys(tmp_path):
    layers = [Placement(row, 4) for row in SLOTS]
    write_placements(tmp_path / "s.json", layers, "sglang")
    assert json.loads((tmp_path / "s.json").read_text()) == {"physical_to_logical_map": SLOTS}  # another key is refused
    write_placements(tmp_path / "s.pt", layers)
    held = torch.load(tmp_path / "s.pt", weights_only=True)
    assert list(held) == ["physical_to_logical_map"]
    assert held["physical_to_logical_map"].tolist() == SLOTS
    write_placements(tmp_path / "v.json", layers, "vllm")
    assert json.loads((tmp_path / "v.json").read_text()) == SLOTS
    write_placements(tmp_path / "a.json", layers, "vllm-ascend")
    ascend = json.loads((tmp_path / "a.json").read_text())
    assert ascend["moe_layer_count"] == 2
    assert [[d["device_expert"] for d in one["device_list"]] for one in ascend["layer_list"]] == [
        [row[i : i + 2] for i in range(0, 8, 2)] for row in SLOTS
    ]
    write_loads(tmp_path / "l.pt", LOADS)
    held = torch.load(tmp_path / "l.pt", weights_only=True)
    assert held["logical_count"].tolist() == LOADS.swapaxes(0, 1).tolist()
    assert held["rank"] == 0


# Plain arrays and tables


def test_plain_arrays(at):
    same(read_loads(at("a.npy", LOADS)), LOADS)
    same(read_loads(at("b.npy", LOADS[0])), LOADS[:1])
    same(read_loads(at("c.npy", LOADS[0, 0])), LOADS[:1, :1])
    same(read_loads(at("d.npy", LOADS[:, 0]), first_axis="layers"), LOADS[:, :1])
    same(read_loads(at("e.npy", LOADS.swapaxes(0, 1)), first_axis="batches"), LOADS)
    same(read_loads(at("f.npz", {"any": LOADS})), LOADS)
    same(read_loads(at("g.npz", {"loads": LOADS, "other": LOADS[0]})), LOADS)
    same(read_loads(at("h.json", LOADS.tolist())), LOADS)
    same(read_placements(at("i.npy", np.array(SLOTS, dtype=np.int16)), 4)[1].phy2log.numpy(), SLOTS[1])
    for dtype in (">i4", "<u8", ">f4", "f2", "u1"):
        same(read_loads(at("j.npy", (LOADS % 250).astype(dtype))), LOADS % 250)
    same(read_loads(at("k.npy", np.asfortranarray(LOADS))), LOADS)


def test_several_files_follow_each_other(at):
    paths = [at("a.npy", LOADS), at("b.json", LOADS[:, :1].tolist())]
    same(read_loads(paths), np.concatenate([LOADS, LOADS[:, :1]], axis=1))
    same(read_loads(paths, layer=1), np.concatenate([LOADS, LOADS[:, :1]], axis=1)[1:])


@pytest.mark.parametrize("separator", [",", ";", "\t", " ", ", ", "  "])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_tables(at, separator, end):
    rows = [separator.join(map(str, row)) for row in LOADS[0].tolist()]
    same(read_loads(at("a.csv", end.join(rows))), LOADS[:1])
    same(read_loads(at("b.csv", end.join(["# tokens", "", *rows, ""]))), LOADS[:1])
    header = separator.join(f"e{i}" for i in range(6))
    same(read_loads(at("c.csv", "\ufeff" + end.join([header, *rows]))), LOADS[:1])


def test_tables_of_numpy_and_with_layers(at, tmp_path):
    np.savetxt(tmp_path / "a.txt", LOADS[0])
    same(read_loads(tmp_path / "a.txt"), LOADS[:1])
    half = LOADS / 2
    np.savetxt(tmp_path / "b.csv", half[0], delimiter=",", header="tokens")
    same(read_loads(tmp_path / "b.csv"), half[:1])
    lines = [f"{layer},{batch},{','.join(map(str, LOADS[layer, batch]))}" for batch in (2, 0, 1) for layer in (1, 0)]
    same(read_loads(at("c.csv", "\n".join(["Layer,batch,e0,e1,e2,e3,e4,e5", *lines]))), LOADS)
    quoted = [",".join(f'"{value}"' for value in row) for row in LOADS[0]]
    same(read_loads(at("d.csv", "\n".join(quoted))), LOADS[:1])


@pytest.mark.parametrize(
    "ids", ["0,1,2,3,4,5", "layer,0,1,2,3,4,5", "STEP,0,1,2,3,4,5", "forward_pass_id,e0,e1,e2,e3,e4,e5"]
)
def test_headers_that_pandas_writes(at, ids):
    first = {"layer": ["0,"] * 3, "STEP": ["7,", "9,", "30,"], "forward_pass_id": ["2,", "1,", "0,"]}
    head = first.get(ids.split(",")[0], [""] * 3)
    rows = [one + ",".join(map(str, row)) for one, row in zip(head, LOADS[0], strict=True)]
    expected = LOADS[:1, ::-1] if ids.startswith("forward") else LOADS[:1]
    same(read_loads(at("a.csv", "\n".join([ids, *rows]))), expected)


def test_a_single_line_of_numbers_is_no_header(at):
    same(read_loads(at("a.csv", "0,1,2\n")), [[[0, 1, 2]]])
    same(read_loads(at("b.csv", "0\n1\n")), [[[0], [1]]])
    assert read_slots(at("c.csv", "0,1,2\n2,1,0\n")).phy2log[0].tolist() == [0, 1, 2]  # of slots it is layer 0's


@pytest.mark.parametrize("names", [("layer", "expert", "tokens", "batch"), ("Layer_ID", "Expert_ID", "Load", "step")])
def test_tables_with_a_line_for_each_expert(at, names):
    rng = np.random.default_rng(2)
    lines = [(i, e, LOADS[i, b, e], b if names[3] == "batch" else 10 * b + 4) for i, b, e in np.ndindex(*LOADS.shape)]
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        rows = [",".join(str(lines[k][c]) for c in order) for k in rng.permutation(len(lines))]
        same(read_loads(at("a.csv", "\n".join([",".join(names[c] for c in order), *rows]))), LOADS)
    few = "layer,expert,tokens\n1,0,5\n0,2,7.5\n"
    same(read_loads(at("b.csv", few), n_logical=4), [[[0, 0, 7.5, 0]], [[5, 0, 0, 0]]])
    same(read_loads(at("c.csv", "expert,count\n0,5\n1,6\n")), [[[5, 6]]])


def test_a_history_and_the_trace(tmp_path):
    history = LoadHistory(2, 6, window=2, decay=0.5)
    history.extend(LOADS)
    history.save(tmp_path / "h.npz")
    same(read_loads(tmp_path / "h.npz"), LOADS[:, 1:])
    trace = load_trace()
    path = os.path.join(os.path.dirname(files.__file__), "data", "router_trace.npz")
    loads = read_loads(path)
    assert loads.shape == (4, 240, 64)
    for batch, layer in [(0, 0), (100, 3), (239, 1)]:
        values, times = np.unique(trace.indices[batch, layer], return_counts=True)
        expected = np.zeros(64)
        expected[values] = times
        same(loads[layer, batch], expected)


# Broken files


class Payload:
    """What a pickle runs when it is opened: it would leave a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def zipped(members, compression=zipfile.ZIP_STORED):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return out.getvalue()


def npy(header, data=b""):
    text = (header + "\n").encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def huge(shape, descr="<i8"):
    return npy(f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}}}", b"\0" * 64)


PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(64))
BROKEN = {
    "empty": (b"", "is empty"),
    "one byte of a zip": (b"P", "has 1 bytes, too few for"),
    "three bytes of a zip": (b"PK\x03", "has 3 bytes, too few for"),
    "png": (PNG, "begins with b'.x89PNG"),
    "blanks": (b"  \n ", "allowed are .npy"),
    "text": (b"hello world\nhow are you\n", "line 2 has 3 cells"),
    "one line": (b"hello world\n", "has a header and no line of numbers"),
    "comments": (b"# 1\n# 2\n", "no line of numbers"),
    "not utf-8": (b"1,2\n\xff\xfe,3\n", "position 4"),
    "ragged": (b"1,2,3\n4,5,6\n7,8\n", "line 3 has 2 cells, allowed are 3 as in line 1"),
    "words": (b"1,2\n3,four\n", "line 2, column 2 is 'four'"),
    "open quote": (b'1,2\n"3,4\n', "table of numbers"),
    "nan": (b"1,2\nnan,4\n", r"\[0, 1, 0\]: is nan|\[1, 0\]: is nan"),
    "infinity": (b"1,2\n1e999,4\n", "is inf"),
    "negative": (b"1,2\n3,-4\n", r"\[1, 1\]: is -4"),
    "too many tokens": (b"1,99999999999999999999\n", "allowed are 0 to 9007199254740992"),
    "pandas index": (b",a,b\n0,1,2\n", "column 1 has no name"),
    "names": (b"a,b\n1,2\n", "column 1 is 'a', allowed is expert 0"),
    "other index": (b"time,0,1\n7,1,2\n", "column 1 is 'time', allowed is expert 0"),
    "names out of order": (b"layer,e0,e2\n0,1,2\n", "column 3 is 'e2', allowed is expert e1"),
    "no experts": (b"layer,batch\n0,0\n", "column 3 is missing"),
    "batch and step": (b"batch,step,1\n0,0,1\n", "column 3 is '1', allowed is expert 0"),
    "step twice": (b"step,0,1\n4,1,2\n4,1,2\n", "has a step twice"),
    "layer twice": (b"layer,layer_id,0\n0,0,1\n", "column 2 is 'layer_id' once more"),
    "long without counts": (b"layer,expert,rank\n0,0,1\n", "has columns 'layer', 'expert', 'rank'"),
    "long twice": (b"layer,expert,tokens\n0,1,3\n0,1,4\n", "layer 0, batch 0, expert 1 in 2 lines"),
    "long fraction": (b"expert,tokens\n0.5,3\n", "expert has 0.5"),
    "long huge": (b"layer,expert,tokens\n1e12,1e12,3\n", "allowed are 134217728 loads"),
    "json": (b"[1, 2", "JSON.*line 1 column"),
    "json words": (b'["a"]', r"\[0\]: is a str"),
    "json bool": (b"[[1, true]]", r"\[0\]\[1\]: is a bool"),
    "json null": (b"[null]", r"\[0\]: is a NoneType"),
    "json nan": (b"[NaN]", "NaN is not allowed"),
    "json ragged": (b"[[1, 2], [3]]", r"\[1\]: has 1 entries, allowed are 2"),
    "json mixed": (b"[[1, 2], 3]", r"\[1\]: has no list but a int"),
    "json deep": (b"[" * 5000 + b"]" * 5000, "Recursion"),
    "json levels": (b"[[[[1]]]]", "four levels"),
    "json empty": (b"[]", "allowed is at least one"),
    "json long": (b"[" + b"9" * 400 + b"]", "Overflow"),
    "json keys": (b'{"counts": [1]}', "has counts, allowed are logical_count"),
    "json none": (b"{}", "has nothing"),
    "json no token": (b'{"logical_count": [[0, 0]]}', "logical_count: has no token"),
    "json flat": (b'{"logical_count": [1, 2]}', r"logical_count: has shape \[2\]"),
    "json object": (b'{"logical_count": {"0": 1}}', "logical_count: is a dict"),
    "jsonl": (b'{"record_type": "eplb_load_stats"}\n{"record', "line 2: not JSON"),
    "jsonl keys": (b'{"record_type": "eplb_load_stats", "p2l_map": [[0]]}', "record 1: lacks expert_load"),
    "jsonl type": (b'{"record_type": "x"}', "no record with record_type 'eplb_load_stats'"),
    "jsonl slots": (
        b'{"record_type": "eplb_load_stats", "p2l_map": [[0, 1]], "expert_load": [[1, 2, 3]]}',
        r"expert_load: has shape \[1, 3\]",
    ),
    "jsonl experts": (
        b'{"record_type": "eplb_load_stats", "p2l_map": [[0, 99999999]], "expert_load": [[1, 2]]}',
        "p2l_map: has 99999999",
    ),
    "two documents": (b"[1]\n[2]\n", "2 lines of JSON"),
    "old table": (b"layer_id,expert_id,count\n3,1e15,4\n", "has expert 1000000000000000"),
    "old table layers": (b"layer_id,expert_id,count\n1e15,1,4\n", "layer 1000000000000000"),
    "old table fraction": (b"layer_id,expert_id,count\n1.5,1,4\n", "fractions"),
    "layers": (b"layer,batch,0\n0,0,1\n2,0,1\n", r"layers \[0, 2\]"),
    "batches": (b"layer,batch,0\n0,0,1\n0,2,1\n", "batch is not 0 and on"),
    "layer words": (b"layer,batch,0\n0.5,0,1\n", "layer has 0.5"),
    "npy magic": (b"\x93NUMPY", "a NumPy array"),
    "npy version": (b"\x93NUMPY\x09\x00\x10\x00" + b" " * 16, "version"),
    "npy huge": (huge((2**60,)), r"declares shape \[1152921504606846976\]"),
    "npy overflow": (huge((2**40, 2**40)), "declares shape"),
    "npy negative": (huge((-8,)), r"declares shape \[-8\]"),
    "npy more": (huge((9,)), "has 64 bytes of data, its header declares 72"),
    "npy less": (huge((7,)), "has 64 bytes of data, its header declares 56"),
    "npy objects": (huge((1,), "|O"), "holds Python objects"),
    "npy records": (npy("{'descr': [('a', '<i8')], 'fortran_order': False, 'shape': (8,)}", b"\0" * 64), "dtype"),
    "npy complex": (huge((4,), "<c16"), "dtype complex128"),
    "npy bool": (huge((64,), "|b1"), "dtype bool"),
    "npy strings": (huge((4,), "<U4"), "dtype <U4"),
    "npy dates": (huge((8,), "<M8[s]"), "dtype datetime64"),
    "npy code": (npy("__import__('os').mkdir('ran')"), "a NumPy array"),
    "npy deep": (npy("(" * 3000 + ")" * 3000), "a NumPy array"),
    "zip of none": (zipped({}), "begins with"),
    "zip of text": (zipped({"a.txt": b"1"}), "a zip archive of a.txt"),
    "npz text": (zipped({"a.npy": b"hello"}), "a NumPy archive"),
    "npz huge": (zipped({"a.npy": huge((2**60,))}), "a: declares shape"),
    "npz objects": (zipped({"a.npy": huge((1,), "|O")}), "a: holds Python objects"),
    "npz several": (zipped({"a.npy": huge((8,)), "b.npy": huge((8,))}), "has a, b, allowed are loads"),
    "npz format": (
        zipped({"format.npy": npy("{'descr': '<U1', 'fortran_order': False, 'shape': ()}", b"x\0\0\0")}),
        "'x'",
    ),
    "torch pickle": (zipped({"a/data.pkl": b"hello", "a/version": b"3\n"}), "a torch file"),
    "torch packed": (zipped({"a/data.pkl": b"x" * 99, "a/version": b"3\n"}, zipfile.ZIP_DEFLATED), "is compressed"),
}


@pytest.mark.parametrize("case", BROKEN, ids=str)
def test_broken_loads(at, case):
    data, words = BROKEN[case]
    path = at("x", data)
    with pytest.raises(ValueError, match=words) as caught:
        read_loads(path)
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value)) < 600
    assert "\n" not in str(caught.value)


def tensors(**changes):
    whole = {"rank": 0, "logical_count": torch.from_numpy(LOADS.swapaxes(0, 1).copy())} | changes
    return {name: value for name, value in whole.items() if value is not None}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (tensors(logical_count=None), "has rank, allowed are logical_count"),
        (tensors(logical_count="x"), "logical_count: is a str"),
        (tensors(logical_count=torch.ones(2, 2, dtype=torch.bool)), "torch.bool"),
        (tensors(logical_count=torch.ones(2, 2, dtype=torch.complex64)), "torch.complex64"),
        (tensors(logical_count=torch.ones(1).expand(2**30, 2**10)), "allowed are 134217728 values"),
        (tensors(logical_count=torch.eye(2).to_sparse()), "sparse"),
        (tensors(logical_count=torch.ones(2, 2, device="meta")), "meta"),
        (tensors(logical_count=torch.full((2, 2), float("nan"))), "is nan"),
        (tensors(logical_count=torch.full((2, 2), -1)), "is -1"),
        (tensors(logical_count=torch.zeros(0, 2)), "at least one"),
        (tensors(logical_count=torch.nn.Parameter(torch.ones(2, 2))), "Parameter"),
        (3, "is a int"),
        ({"records": []}, "records: is a list"),
        ({"records": [{}]}, "lacks last_physical_to_logical_map"),
        (
            {"records": [{}], "last_physical_to_logical_map": torch.tensor(SLOTS)},
            r"records\[0\]: lacks forward_pass_id",
        ),
        ({"records": [3], "last_physical_to_logical_map": torch.tensor(SLOTS)}, r"records\[0\]: lacks forward_pass_id"),
        ({"records": [{}], "last_physical_to_logical_map": torch.tensor([[-1]])}, "has -1"),
        ({"records": [{}], "last_physical_to_logical_map": torch.tensor([[0.5]])}, "float64"),
    ],
)
def test_broken_torch_files(at, content, words):
    path = at("x.pt", content)
    with pytest.raises(ValueError, match=words) as caught:
        read_loads(path)
    assert str(path) in str(caught.value)


def test_what_torch_refuses_is_said_without_its_advice(at):
    for path in (at("a.pt", {"logical_count": np.float64(3)}), at("b.pt", torch.nn.Linear(1, 1))):
        with pytest.raises(ValueError, match=r"Unsupported global: GLOBAL \S+") as caught:
            read_loads(path)
        assert str(caught.value).isprintable()
        assert "options" not in str(caught.value)
        assert "serialization" not in str(caught.value)


def test_passes_that_do_not_fit(at):
    content, _ = passes(0, [1, 1], np.random.default_rng(0))
    with pytest.raises(ValueError, match="forward_pass_id 1 twice"):
        read_loads(at("x.pt", content))
    content, _ = passes(0, [1, 2], np.random.default_rng(0))
    content["records"][1]["global_physical_count"] = torch.ones(2, 7)
    with pytest.raises(ValueError, match=r"records\[1\]: global_physical_count: has shape \[2, 7\]"):
        read_loads(at("y.pt", content))


def written_files(tmp_path):
    write_placements(tmp_path / "p.json", [Placement(row, 4) for row in SLOTS])
    write_placements(tmp_path / "p.pt", [Placement(row, 4) for row in SLOTS])
    for suffix in (".npz", ".npy", ".csv", ".pt", ".json"):
        write_loads(tmp_path / f"l{suffix}", LOADS)
    history = LoadHistory(2, 6, decay=0.5)
    history.extend(LOADS)
    history.save(tmp_path / "h.npz")
    return sorted(tmp_path.iterdir())


def outcome(path):
    """Read a file as everything that could read it; only these errors are allowed."""
    for reader in (read_loads, lambda path: read_placements(path, 4), LoadHistory.load):
        words = "fine"
        try:
            reader(path)
        except (ValueError, OSError) as error:
            words = str(error)
        assert words
        assert "\n" not in words


def test_truncated_anywhere(tmp_path):
    for path in written_files(tmp_path):
        data = path.read_bytes()
        for cut in sorted({*range(0, len(data), max(1, len(data) // 60)), *range(40), len(data) - 1}):
            path.write_bytes(data[:cut])
            outcome(path)
            if path.suffix in (".npz", ".npy", ".pt"):
                with pytest.raises(ValueError, match=path.name):
                    read_loads(path)


@pytest.mark.parametrize("seed", range(3))
def test_flipped_bytes(tmp_path, seed):
    rng = np.random.default_rng(seed)
    for path in written_files(tmp_path):
        data = path.read_bytes()
        for _ in range(60):
            flipped = bytearray(data)
            for at in rng.integers(0, len(data), rng.integers(1, 4)):
                flipped[at] ^= 1 << rng.integers(0, 8)
            path.write_bytes(flipped)
            outcome(path)


@given(st.binary(max_size=200), st.sampled_from([b"", b"\x93NUMPY\x01\x00", b"PK\x03\x04", b"[", b"{", b"1,2\n"]))
def test_any_bytes(tmp_path_factory, data, head):
    path = tmp_path_factory.mktemp("any") / "x"
    path.write_bytes(head + data)
    outcome(path)


def test_pickles_are_not_run(at, tmp_path):
    ran = tmp_path / "ran"
    payload = Payload(ran)
    whole = {"logical_count": payload}
    out = io.BytesIO()
    np.save(out, np.array([payload], dtype=object), allow_pickle=True)
    torch.save(whole, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    paths = [
        at("a.pkl", pickle.dumps(whole)),
        at("b.pkl", pickle.dumps(whole, protocol=0)),
        at("c.pt", whole),
        at("d.npy", out.getvalue()),
        at("e.npz", zipped({"loads.npy": out.getvalue()})),
        at("f.npz", zipped({"format.npy": out.getvalue(), "version.npy": huge((8,))})),
        at("g.npz", zipped({"indices.npy": out.getvalue(), "meta.npy": out.getvalue()})),
        tmp_path / "old.pt",
    ]
    for path in paths:
        for reader in (read_loads, lambda path: read_placements(path, 4), LoadHistory.load):
            with pytest.raises(ValueError, match=path.name):
                reader(path)
    assert not ran.exists()
    pickle.loads(pickle.dumps(whole))  # the payload is one
    assert ran.exists()
    with pytest.raises(ValueError, match=r"GLOBAL \w+\.mkdir"):
        read_loads(paths[2])


def test_tensors_cannot_reach_past_their_file(at, tmp_path):
    good = at("a.pt", {"logical_count": torch.arange(6)}).read_bytes()
    with zipfile.ZipFile(io.BytesIO(good)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    pkl = next(name for name in members if name.endswith("data.pkl"))
    assert members[pkl].count(b"K\x06") == 2  # the storage's size and the tensor's
    members[pkl] = members[pkl].replace(b"K\x06", b"J" + struct.pack("<i", 2**20))
    with pytest.raises(ValueError, match="a torch file"):
        read_loads(at("b.pt", zipped(members)))


def test_parsers_do_not_warn(at, recwarn):
    with zipfile.ZipFile(at("a.pt", {"logical_count": torch.arange(6)})) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    pkl = next(name for name in members if name.endswith("data.pkl"))
    members[pkl] = b"\x80\x58" + members[pkl][2:]  # a protocol of which torch would say so
    with pytest.raises(ValueError, match="logical_count: has shape"):
        read_loads(at("b.pt", zipped(members)))
    of_python_2 = npy("{'descr': '<i8', 'fortran_order': False, 'shape': (8L,)}", b"\0" * 64)
    same(read_loads(at("c.npy", of_python_2)), np.zeros((1, 1, 8)))
    assert not recwarn.list


def test_bombs(at, monkeypatch):
    bomb = zipped({"loads.npy": huge((2**24,)) + b"\0" * (2**27 - 64)}, zipfile.ZIP_DEFLATED)
    assert len(bomb) < 2**18
    monkeypatch.setattr(files, "MOST_BYTES", 2**26)
    with pytest.raises(ValueError, match=r"unpacks to \d+ bytes, allowed are 67108864"):
        read_loads(at("a.npz", bomb))
    monkeypatch.setattr(files, "MOST_BYTES", 2**31)
    monkeypatch.setattr(files, "MOST_VALUES", 2**23)
    with pytest.raises(ValueError, match=r"loads: declares shape \[16777216\], allowed are 8388608 values"):
        read_loads(at("b.npz", bomb))


def test_limits_of_size(at, monkeypatch):
    monkeypatch.setattr(files, "MOST_BYTES", 100)
    monkeypatch.setattr(files, "MOST_TEXT_BYTES", 10)
    with pytest.raises(ValueError, match="bytes, allowed are 100"):
        read_loads(at("a.npy", LOADS))
    with pytest.raises(ValueError, match="has 12 bytes, allowed are 10"):
        read_loads(at("b.csv", "1,2,3,4,5,6\n"))
    monkeypatch.setattr(files, "MOST_TEXT_BYTES", 100)
    monkeypatch.setattr(files, "MOST_VALUES", 5)
    with pytest.raises(ValueError, match="more than 5 cells"):
        read_loads(at("c.csv", "1,2,3\n1,2,3\n"))


def test_files_that_are_none(tmp_path):
    for reader in (read_loads, read_placements, LoadHistory.load):
        with pytest.raises(FileNotFoundError, match="absent"):
            reader(tmp_path / "absent.npz")
        with pytest.raises(IsADirectoryError, match=tmp_path.name):
            reader(tmp_path)
        loop = tmp_path / f"loop{reader.__name__}"
        loop.symlink_to(loop)
        with pytest.raises(OSError, match="loop"):
            reader(loop)
        pipe = tmp_path / f"pipe{reader.__name__}"
        os.mkfifo(pipe)
        with pytest.raises(ValueError, match="device or a pipe"):
            reader(pipe)


# What callers get wrong


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"layer": 2}, ValueError, "layer is 2, allowed is 0 to 1"),
        ({"layer": "0"}, TypeError, "layer is '0'"),
        ({"first_axis": "experts"}, ValueError, "first_axis is 'experts'"),
        ({"n_logical": 7}, ValueError, "has 6 experts, allowed are n_logical = 7"),
        ({"n_logical": 0}, ValueError, "n_logical is 0"),
    ],
)
def test_arguments_of_read_loads(at, arguments, error, words):
    with pytest.raises(error, match=words):
        read_loads(at("x.npy", LOADS), **arguments)


def test_files_that_do_not_go_together(at):
    one, other = at("a.npy", LOADS), at("b.npy", LOADS[:, :, :5])
    with pytest.raises(ValueError, match="has 2 layers of 5 experts, allowed are 2 of 6 as in"):
        read_loads([one, other])
    table = at("c.csv", "layer_id,expert_id,count\n0,5,1\n1,5,1\n")
    with pytest.raises(ValueError, match="one, or the other way"):
        read_loads([one, table])
    with pytest.raises(ValueError, match="empty sequence"):
        read_loads([])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([[0, 1], [0, 1, 2]], r"\[1\]: has 3 entries"),
        ([0.5, 1.0], "float64"),
        ([[[0]]], r"\[1, 1, 1\]"),
        ({"phy2log": SLOTS}, "has phy2log, allowed are physical_to_logical_map"),
        ({"physical_to_logical_map": "x"}, "physical_to_logical_map: is a str"),
        ({"physical_to_logical_map": [[-1, 0, 0, 0]]}, r"layer 0: phy2log\[0\] is -1"),
        (
            {"physical_to_logical_map": [[0, 1, 1, 1, 2, 0, 3, 0]]},
            "layer 0: expert 1 is on rank 1 2 times.*spread_copies",
        ),
        ({"physical_to_logical_map": [[0, 1, 2, 3, 4]]}, "5 slots"),
        ({"physical_to_logical_map": [SLOTS[0], [0] * 8]}, "layer 1: 5 of 6 experts have no slot"),
        ({"physical_to_logical_map": [[2**40] * 4]}, "n_logical is 1099511627777"),
        ({"layer_list": []}, "layer_list: is a list"),
        ({"layer_list": [3]}, r"layer_list\[0\]: lacks device_list"),
        ({"layer_list": [{"device_list": [{}]}]}, r"device_list\[0\]: lacks device_expert"),
        ({"layer_list": [{"device_list": [{"device_expert": [0]}, {"device_expert": [1, 2]}]}]}, "devices of"),
        ({"record_type": "eplb_initial_mapping"}, "initial_global_assignments: is missing"),
        (
            {"record_type": "eplb_initial_mapping", "initial_global_assignments": {"0": [0], "2": [0]}},
            "2 layers and lacks layer 1",
        ),
        ({"format": "lplb.placements"}, "lacks version, n_ranks, n_logical, phy2log"),
        (
            {"format": "lplb.placements", "version": 1.0, "n_ranks": 4, "n_logical": 6, "phy2log": SLOTS},
            "version: is 1.0",
        ),
        (
            {"format": "lplb.placements", "version": 1, "n_ranks": "4", "n_logical": 6, "phy2log": SLOTS},
            "n_ranks: is '4'",
        ),
        (
            {"format": "lplb.placements", "version": 1, "n_ranks": 4, "n_logical": 6, "phy2log": [3]},
            r"phy2log\[0\]: is a int",
        ),
        (
            {"format": "lplb.placements", "version": 1, "n_ranks": 4, "n_logical": 6, "phy2log": []},
            "phy2log: is a list",
        ),
        ({"format": "lplb.placements", "version": 1, "n_ranks": 4, "n_logical": 7, "phy2log": SLOTS}, "1 of 7 experts"),
        ({"format": "lplb.placement"}, "lacks version"),
        ({"format": "other"}, "has format, allowed"),
    ],
)
def test_broken_placements(at, content, words):
    path = at("x.json", content)
    with pytest.raises(ValueError, match=words) as caught:
        read_placements(path, 4)
    assert str(path) in str(caught.value)


def test_ranks_and_experts_beside_a_file(at, tmp_path):
    with pytest.raises(ValueError, match="does not say the number of ranks"):
        read_placements(at("x.json", SLOTS))
    write_placements(tmp_path / "y.json", Placement(SLOTS[0], 4))
    with pytest.raises(ValueError, match="says n_ranks is 4, allowed is what was given, 2"):
        read_placements(tmp_path / "y.json", 2)
    with pytest.raises(ValueError, match="says n_logical is 6"):
        read_placements(tmp_path / "y.json", n_logical=9)


@pytest.mark.parametrize("name", ["layer", "", "Layer_ID"])
def test_numbers_of_layers_are_no_slots(at, name):
    with pytest.raises(ValueError, match=f"column 1 is '{name}', allowed are slots only"):
        read_slots(at("x.csv", f"{name},s0,s1\n0,0,1\n"))
    assert read_slots(at("y.csv", "s0,s1\n0,1\n")).phy2log[0].tolist() == [0, 1]


def test_slots_are_read_where_an_expert_is_twice_on_a_rank(at):
    assert read_slots(at("x.json", {"physical_to_logical_map": [[0, 0, 1, 2]]})).phy2log[0].tolist() == [0, 0, 1, 2]


@pytest.mark.parametrize(
    ("path", "loads", "words"),
    [
        ("x.txt", LOADS, "'.txt', allowed are .npz"),
        ("x.npz", LOADS[0], r"\[3, 6\], allowed is \[layers, batches, n_logical\]"),
        ("x.npz", -LOADS - 1, r"loads\[0, 0, 0\]: is -"),
        ("x.npz", LOADS * np.nan, "is nan"),
        ("x.npz", LOADS.astype(str), "<U"),
        ("x.npz", LOADS[:, :0], "at least one"),
        ("x.npz", np.array(3), r"shape \[\], allowed is"),
        ("x.npz", torch.eye(2).to_sparse(), "sparse"),
        ("x.npz", torch.ones(1, 1, 1, device="meta"), "meta"),
    ],
)
def test_loads_that_cannot_be_written(tmp_path, path, loads, words):
    with pytest.raises(ValueError, match=words):
        write_loads(tmp_path / path, loads)
    assert not list(tmp_path.iterdir())


def test_placements_that_cannot_be_written(tmp_path):
    placement = Placement(SLOTS[0], 4)
    for arguments, error, words in [
        (([placement], "other"), ValueError, "format is 'other', allowed are 'lplb', 'sglang', 'vllm', 'vllm-ascend'"),
        (([],), ValueError, "empty sequence"),
        (([placement, 3],), TypeError, "placements has a int"),
        (([placement, Placement([0, 1], 2)],), ValueError, r"placements\[1\] has n_ranks 2"),
    ]:
        with pytest.raises(error, match=words):
            write_placements(tmp_path / "x.json", *arguments)
    with pytest.raises(ValueError, match=r"allowed for .* is 'sglang'"):
        write_placements(tmp_path / "x.pt", placement, "lplb")
    with pytest.raises(ValueError, match=r"path ends in '.csv', allowed are .json and, for format 'sglang', .pt"):
        write_placements(tmp_path / "x.csv", placement, "vllm")
    for name in ("absent/x.json", "absent/x.pt"):
        with pytest.raises(FileNotFoundError, match=r"allowed is a folder that exists: '.*/absent'"):
            write_placements(tmp_path / name, placement)
    assert not list(tmp_path.iterdir())


def test_writing_replaces_files_and_follows_links(tmp_path):
    (tmp_path / "real.npy").write_bytes(b"old")
    (tmp_path / "link.npy").symlink_to(tmp_path / "real.npy")
    for name in ("link.npy", "real.npy"):
        write_loads(tmp_path / name, LOADS)
        same(read_loads(tmp_path / "real.npy"), LOADS)
    assert (tmp_path / "link.npy").is_symlink()
    assert len(list(tmp_path.iterdir())) == 2


def test_writing_keeps_permissions(tmp_path):
    before = os.umask(0o022)
    try:
        write_loads(tmp_path / "new.npy", LOADS)
        assert (tmp_path / "new.npy").stat().st_mode & 0o777 == 0o644
        for mode in (0o600, 0o664):
            (tmp_path / "new.npy").chmod(mode)
            write_loads(tmp_path / "new.npy", LOADS)
            assert (tmp_path / "new.npy").stat().st_mode & 0o777 == mode
    finally:
        os.umask(before)


def test_writing_through_links_is_in_one_step(tmp_path):
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "real.npy").write_bytes(b"old")
    (tmp_path / "link.npy").symlink_to("to/real.npy")
    (tmp_path / "new.npy").symlink_to("to/none.npy")
    old = (tmp_path / "to" / "real.npy").stat().st_ino
    for name in ("link.npy", "new.npy"):
        write_loads(tmp_path / name, LOADS)
        assert (tmp_path / name).is_symlink()
        same(read_loads(tmp_path / name), LOADS)
    assert (tmp_path / "to" / "real.npy").stat().st_ino != old  # another file took its place, whole
    assert sorted(one.name for one in (tmp_path / "to").iterdir()) == ["none.npy", "real.npy"]
    (tmp_path / "loop.npy").symlink_to("loop.npy")
    with pytest.raises(OSError, match=r"loop\.npy'$"):
        write_loads(tmp_path / "loop.npy", LOADS)


def test_writing_to_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe.csv")
    with ThreadPoolExecutor(1) as pool:
        got = pool.submit((tmp_path / "pipe.csv").read_bytes)
        write_loads(tmp_path / "pipe.csv", LOADS[:, :, :1])
        assert got.result().startswith(b"layer,batch,0\n0,0,")


def test_text_keeps_every_bit(tmp_path):
    loads = np.array([[[1 / 3, 2.0**-1074, 2.0**53, 0.1]]])
    for name in ("x.csv", "x.json"):
        write_loads(tmp_path / name, loads)
        assert [Fraction(v) for v in read_loads(tmp_path / name).ravel()] == [Fraction(v) for v in loads.ravel()]
