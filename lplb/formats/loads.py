"""Loads of experts, batch after batch: what serving engines record, NumPy, CSV and JSON.

The keys are those of SGLang 0.5.23 (``srt/eplb/expert_distribution.py``: modes ``stat``, ``stat_approx``, ``per_pass``,
``per_token``), of its releases of early 2025 (CSV), and of vLLM's pull request 41141 (``expert_load_stats_path``).
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from lplb import files
from lplb.arguments import whole_number
from lplb.files import Kind, Numbers, Path, refuse

__all__ = ["read_loads", "with_equal_loads", "write_loads"]

FirstAxis = Literal["layers", "batches"]

_FORMAT, _VERSION = "lplb.loads", 1
_STATS = "eplb_load_stats"  # vLLM's record_type
_OLD_SGLANG = ["layer_id", "expert_id", "count"]
_COLUMNS = {
    "layer": "layer",
    "layer_id": "layer",
    "batch": "batch",
    "step": "step",
    "forward_pass_id": "step",
    "expert": "expert",
    "expert_id": "expert",
    "count": "count",
    "tokens": "count",
    "load": "count",
}
"""Names of columns that are not experts, and what they are. Batches count from 0; steps may begin and leap anywhere."""
_MOST_EXPERTS = 2**20  # by number: a table of single counts says nothing else of its size


@dataclass(frozen=True)
class _Recorded:
    loads: Numbers
    """``[layers, batches, n_logical]``."""
    batches: list[int] | None = None
    """If the file has the counts of one rank only: the number of each batch. Files of other ranks have the rest."""


def read_loads(
    path: Path | Sequence[Path],
    *,
    layer: int | None = None,
    first_axis: FirstAxis | None = None,
    n_logical: int | None = None,
) -> Numbers:
    """Read the loads of experts, whatever wrote them.

    - SGLang's expert distribution: ``logical_count`` of modes ``stat`` and ``stat_approx``, as ``.pt`` or as JSON
      (batches without a token are left out: its ring buffer begins with them, and is not in the order of time);
      ``records`` of modes ``per_pass`` and ``per_token``; the CSV (``layer_id,expert_id,count``) of older releases.
    - vLLM's expert load statistics, JSON by line.
    - A router trace (`lplb.trace`), a saved `lplb.history.LoadHistory`, and what `write_loads` writes.
    - An array ``[n_logical]``, ``[batches, n_logical]`` or ``[layers, batches, n_logical]`` in ``.npy``, in ``.npz``
      (named ``loads``, or the only one), as lists in JSON, or as a table: CSV, or what `numpy.savetxt` writes. A header
      names the experts by number, ``0,1,…`` or ``e0,e1,…``; before them may be ``layer`` and ``batch`` or ``step``.
    - A table with a line for each expert: columns ``expert`` and ``count``, ``tokens`` or ``load``, and if there are
      several ``layer`` and ``batch`` or ``step``. Experts that have no line have no tokens.

    Args:
        path: the file; or several, which follow each other in time, but for those that have one rank's counts each
            (SGLang's ``per_pass``, ``per_token`` and CSV): those are added up, batch by batch.
        layer: only this one.
        first_axis: what the first axis of a plain array is; by default "batches" of two and "layers" of three.
        n_logical: number of logical experts. Some formats leave out experts without tokens, at the end too.

    Returns:
        int64, or float64 where averages were written, ``[layers, batches, n_logical]``; the caller's own. Layers that
        are not recorded, as those without experts in SGLang's files, are zeros; see `with_equal_loads`.

    Raises:
        TypeError: an argument has the wrong type.
        OSError: a file cannot be read.
        ValueError: a file is none of these, is damaged or too large, or has counts that are none; or an argument does
            not fit.
    """
    if first_axis not in (None, "layers", "batches"):
        raise ValueError(f"first_axis is {first_axis!r}, allowed are 'layers', 'batches' and None")
    if n_logical is not None:
        n_logical = whole_number("n_logical", n_logical, 1, _MOST_EXPERTS)
    paths = [path] if isinstance(path, (str, os.PathLike)) else list(path)
    if not paths:
        raise ValueError("path is an empty sequence, allowed is at least one file")
    parts = []
    for one in paths:
        part = _read(one, first_axis, n_logical)
        found = part.loads.shape[-1]
        if n_logical is not None and found != n_logical:
            refuse(one, f"has {found} experts, allowed are n_logical = {n_logical}")
        parts.append(part)
    loads = _together(paths, parts)
    if layer is None:
        return loads
    layer = whole_number("layer", layer, 0, len(loads) - 1)
    return np.array(loads[layer : layer + 1])


def _read(path: Path, first_axis: FirstAxis | None, n_logical: int | None) -> _Recorded:
    kind = files.kind_of(path)
    if kind is Kind.NPY:
        return _Recorded(_plain(files.numbers(files.read_npy(path), path), path, first_axis))
    if kind is Kind.NPZ:
        return _Recorded(_of_archive(path, first_axis))
    if kind is Kind.TORCH:
        return _of_sglang(files.read_torch(path), path, n_logical)
    if kind is Kind.TABLE:
        return _of_table(path, first_axis, n_logical)
    documents = files.read_json(path)
    if isinstance(documents[0], dict) and "record_type" in documents[0]:
        return _Recorded(_of_vllm(documents, path, n_logical))
    if len(documents) > 1:
        refuse(path, f"has {len(documents)} lines of JSON without record_type, allowed is one document")
    if isinstance(documents[0], dict):
        return _of_sglang(documents[0], path, n_logical)
    return _Recorded(_plain(files.numbers(documents[0], path), path, first_axis))


def _together(paths: Sequence[Path], parts: Sequence[_Recorded]) -> Numbers:
    """Join several files: batches of ranks are added up, others follow each other."""
    first = parts[0]
    for path, part in zip(paths, parts, strict=True):
        if (part.batches is None) != (first.batches is None):
            refuse(path, f"has counts of all ranks and {paths[0]} of one, or the other way; allowed are files alike")
        shape, allowed = part.loads.shape, first.loads.shape
        if (shape[0], shape[2]) != (allowed[0], allowed[2]):
            as_there = f"{allowed[0]} of {allowed[2]} as in {paths[0]}"
            refuse(path, f"has {shape[0]} layers of {shape[2]} experts, allowed are {as_there}")
    if first.batches is None:
        return np.concatenate([part.loads for part in parts], axis=1)
    numbers = sorted({number for part in parts for number in part.batches or ()})
    at = {number: i for i, number in enumerate(numbers)}
    layers, _, experts = first.loads.shape
    loads = np.zeros((layers, len(numbers), experts), dtype=np.result_type(*[part.loads for part in parts]))
    for part in parts:
        for i, number in enumerate(part.batches or ()):
            loads[:, at[number]] += part.loads[:, i]
    return loads


def _plain(array: Numbers, where: object, first_axis: FirstAxis | None) -> Numbers:
    """Return an array without names as ``[layers, batches, n_logical]``."""
    if array.ndim not in (1, 2, 3):
        refuse(where, f"has shape {list(array.shape)}, allowed are [layers, batches, experts] or its last axes")
    files.checked_counts(array, where)
    if array.ndim == 1:
        return array[None, None]
    if array.ndim == 2:
        return array[:, None] if first_axis == "layers" else array[None]
    return np.ascontiguousarray(array.swapaxes(0, 1)) if first_axis == "batches" else array


# NumPy's archives


def _of_archive(path: Path, first_axis: FirstAxis | None) -> Numbers:
    names = files.npz_names(path)
    if "indices" in names and "meta" in names:
        return _of_trace(path)
    if "format" in names:
        (said,) = files.read_npz(path, ["format"])
        if said.shape == () and str(said) == "lplb.history":
            return _layers_first(files.read_npz(path, ["recent"])[0], f"{path}: recent")
        if said.shape != () or str(said) != _FORMAT:
            refuse(f"{path}: format", f"is {str(said)[:40]!r}, allowed is {_FORMAT!r} or 'lplb.history'")
        (version,) = files.read_npz(path, ["version"])
        if version.shape != () or version != _VERSION:
            refuse(f"{path}: version", f"is {version.tolist()!r}, allowed is {_VERSION}")
    elif "logical_count" in names:
        return _layers_first(files.read_npz(path, ["logical_count"])[0], f"{path}: logical_count")
    name = "loads" if "loads" in names else names[0]
    if name not in ("loads",) and len(names) > 1:
        refuse(path, f"has {', '.join(names[:8])}, allowed are loads, logical_count, or a single array")
    where = f"{path}: {name}"
    return _plain(files.numbers(files.read_npz(path, [name])[0], where), where, first_axis)


def _of_trace(path: Path) -> Numbers:
    indices, meta = files.read_npz(path, ["indices", "meta"])
    where = f"{path}: indices"
    if indices.dtype.kind not in "iu" or indices.ndim != 4 or not indices.size:
        refuse(
            where, f"is {indices.dtype} {list(indices.shape)}, allowed are integers [batches, layers, tokens, top_k]"
        )
    try:
        n = json.loads(str(meta))["model"]["n_experts"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: meta: is no JSON text with model.n_experts: {error!r:.80}") from error
    if type(n) is not int or not 1 <= n <= _MOST_EXPERTS:
        refuse(f"{path}: meta", f"has model.n_experts {n!r:.40}, allowed are 1 to {_MOST_EXPERTS}")
    least, most = int(indices.min()), int(indices.max())
    if least < 0 or most >= n:
        refuse(where, f"has {least if least < 0 else most}, allowed are 0 to {n - 1}")
    batches, layers = indices.shape[:2]
    _check_size(batches, layers, n, where)
    loads = np.empty((layers, batches, n), dtype=np.int64)
    for batch, layer in np.ndindex(batches, layers):
        loads[layer, batch] = np.bincount(indices[batch, layer].ravel(), minlength=n)
    return loads


def _check_size(batches: int, layers: int, n_logical: int, where: object) -> None:
    if batches * layers * n_logical > files.MOST_VALUES:
        seen = f"has {batches} batches of {layers} layers of {n_logical} experts"
        refuse(where, f"{seen}, allowed are {files.MOST_VALUES} loads in all")


# SGLang


def _of_sglang(content: object, path: Path, n_logical: int | None) -> _Recorded:
    if not isinstance(content, dict):
        return _Recorded(_layers_first(content, path))
    if "logical_count" in content:
        where = f"{path}: logical_count"
        loads = _layers_first(content["logical_count"], where)
        some = loads.any(axis=(0, 2))
        if not some.any():
            refuse(where, "has no token in any batch")
        return _Recorded(np.ascontiguousarray(loads[:, some]))
    if "records" in content:
        return _of_passes(content, path, n_logical)
    shown = ", ".join(str(key)[:40] for key in list(content)[:8]) or "nothing"
    refuse(path, f"has {shown}, allowed are logical_count, or records and last_physical_to_logical_map")


def _layers_first(value: object, where: object) -> Numbers:
    """Return ``[batches, layers, n_logical]`` or ``[layers, n_logical]``, as SGLang has it, as loads."""
    counts = files.numbers(value, where)
    if counts.ndim not in (2, 3):
        refuse(where, f"has shape {list(counts.shape)}, allowed is [batches, layers, experts] or [layers, experts]")
    return _plain(files.checked_counts(counts, where), where, "layers" if counts.ndim == 2 else "batches")


def _of_passes(content: Mapping[str, Any], path: Path, n_logical: int | None) -> _Recorded:
    """Count one rank's forward passes by logical expert."""
    records = content["records"]
    if not isinstance(records, list) or not records:
        refuse(f"{path}: records", f"is a {type(records).__name__}, allowed is a list of forward passes")
    if "last_physical_to_logical_map" not in content:
        refuse(path, "has records and lacks last_physical_to_logical_map")
    where = f"{path}: last_physical_to_logical_map"
    experts = _experts(files.numbers(content["last_physical_to_logical_map"], where), where, n_logical)
    _check_size(len(records), len(experts[0]), experts[1], where)
    passes, counts = [], []
    for i, record in enumerate(records):
        at = f"{path}: records[{i}]"
        keys = record if isinstance(record, dict) else {}
        missing = [key for key in ("forward_pass_id", "global_physical_count") if key not in keys]
        if missing:
            refuse(at, f"lacks {', '.join(missing)}")
        if type(record["forward_pass_id"]) is not int:
            refuse(f"{at}: forward_pass_id", f"is a {type(record['forward_pass_id']).__name__}, allowed is an int")
        passes.append(record["forward_pass_id"])
        key = f"{at}: global_physical_count"
        counts.append(_by_logical(files.numbers(record["global_physical_count"], key), *experts, key))
    if len(set(passes)) < len(passes):
        twice = next(number for number in passes if passes.count(number) > 1)
        refuse(f"{path}: records", f"have forward_pass_id {twice} twice, allowed is once in the file of a rank")
    return _Recorded(np.stack(counts, axis=1), passes)


def _experts(table: Numbers, where: object, n_logical: int | None) -> tuple[npt.NDArray[np.int64], int]:
    """Check a map ``[layers, n_physical]`` from slots to experts; return it and the number of experts."""
    if table.ndim != 2 or table.dtype != np.int64 or not table.size:
        refuse(where, f"is {table.dtype} {list(table.shape)}, allowed are integers [layers, slots]")
    most = (n_logical or _MOST_EXPERTS) - 1
    odd = (table < 0) | (table > most)
    if odd.any():
        refuse(where, f"has {table[odd][0]}, allowed are experts 0 to {most}")
    return table, n_logical or int(table.max()) + 1


def _by_logical(counts: Numbers, experts: npt.NDArray[np.int64], n_logical: int, where: object) -> Numbers:
    """Add up the counts of slots ``[layers, n_physical]`` by expert."""
    if counts.shape != experts.shape:
        refuse(where, f"has shape {list(counts.shape)}, allowed is [layers, slots] = {list(experts.shape)}")
    files.checked_counts(counts, where)
    loads = np.zeros((len(counts), n_logical), dtype=counts.dtype)
    np.add.at(loads, (np.arange(len(counts))[:, None], experts), counts)
    return loads


# vLLM


def _of_vllm(documents: Sequence[object], path: Path, n_logical: int | None) -> Numbers:
    """Count the steps of vLLM's statistics by logical expert; records of other types are left out."""
    steps = []
    for i, record in enumerate(documents):
        if not isinstance(record, dict) or record.get("record_type") != _STATS:
            continue
        at = f"{path}: record {i + 1}"
        missing = [key for key in ("expert_load", "p2l_map") if key not in record]
        if missing:
            refuse(at, f"lacks {', '.join(missing)}")
        experts = _experts(files.numbers(record["p2l_map"], f"{at}: p2l_map"), f"{at}: p2l_map", n_logical)
        _check_size(len(documents), len(experts[0]), experts[1], at)
        key = f"{at}: expert_load"
        steps.append(_by_logical(files.numbers(record["expert_load"], key), *experts, key))
    if not steps:
        refuse(path, f"has no record with record_type {_STATS!r}")
    shapes = sorted({step.shape for step in steps})
    if len(shapes) > 1:
        refuse(path, f"has steps of shapes {shapes[:4]}, allowed is one [layers, experts]")
    return np.stack(steps, axis=1)


# Tables


def _of_table(path: Path, first_axis: FirstAxis | None, n_logical: int | None) -> _Recorded:
    header, table = files.read_table(path, numbered=True)
    if header is None:
        return _Recorded(_plain(_whole(table), path, first_axis))
    names = [name.lower() for name in header]
    if names == _OLD_SGLANG:
        return _of_old_sglang(table, path, n_logical)
    columns: dict[str, npt.NDArray[np.float64]] = {}
    for i, name in enumerate(names):
        if _COLUMNS.get(name, name) in columns:
            refuse(path, f"column {i + 1} is {header[i][:40]!r} once more, allowed is once")
        columns[_COLUMNS.get(name, name)] = table[:, i]
    if "expert" in columns:
        return _Recorded(_of_long_table(columns, path, n_logical))
    keys = [name for name in names[:2] if _COLUMNS.get(name) in ("layer", "batch", "step")]
    _check_experts(header, len(keys), path)
    counts = _whole(table[:, len(keys) :])
    if not keys:
        return _Recorded(_plain(counts, path, first_axis))
    files.checked_counts(counts, path)
    return _Recorded(_sorted_rows({_COLUMNS[name]: table[:, i] for i, name in enumerate(keys)}, counts, path))


def _check_experts(header: Sequence[str], first: int, path: Path) -> None:
    """Refuse columns that are not experts 0, 1, … by their numbers, which may have one word before them all."""
    named = header[first] if len(header) > first else ""
    word = named[:-1] if named.endswith("0") else ""
    for i in range(first, max(len(header), first + 1)):
        name = header[i] if i < len(header) else None
        if name != f"{word}{i - first}":
            seen = "is missing" if name is None else f"is {name[:40]!r}" if name else "has no name in the header"
            allowed = "layer, batch, step, and experts by number from 0 (with one word before it, or none)"
            refuse(path, f"column {i + 1} {seen}, allowed is expert {word[:40]}{i - first}: columns are {allowed}")


def _of_long_table(columns: Mapping[str, npt.NDArray[np.float64]], path: Path, n_logical: int | None) -> Numbers:
    """Return loads of a table with a line for each expert that has some."""
    odd = next((name for name in columns if name not in _COLUMNS.values()), None)
    if odd is not None or "count" not in columns or {"batch", "step"} <= columns.keys():
        allowed = "expert, count (or tokens, load), layer, and batch or step"
        refuse(path, f"has columns {', '.join(map(repr, columns))[:120]}, allowed are {allowed}")
    counts = files.checked_counts(_whole(columns["count"]), path)
    keys = {name: column for name, column in columns.items() if name != "count"}
    _check_numbers(keys, path)
    nothing = np.zeros(len(counts))
    layer, expert = (keys.get(name, nothing).astype(np.int64) for name in ("layer", "expert"))
    batch = keys.get("batch", nothing).astype(np.int64)
    if "step" in keys:
        batch = np.unique(keys["step"], return_inverse=True)[1].ravel()
    n_layers, n_batches, n = int(layer.max()) + 1, int(batch.max()) + 1, n_logical or int(expert.max()) + 1
    if expert.max() >= n:
        refuse(path, f"has expert {expert.max()}, allowed are 0 to {n - 1}")
    _check_size(n_batches, n_layers, n, path)
    place = (layer * n_batches + batch) * n + expert
    found, times = np.unique(place, return_counts=True)
    if times.max() > 1:
        at = np.unravel_index(found[times.argmax()], (n_layers, n_batches, n))
        refuse(path, f"has layer {at[0]}, batch {at[1]}, expert {at[2]} in {times.max()} lines, allowed is one")
    loads = np.zeros(n_layers * n_batches * n, dtype=counts.dtype)
    loads[place] = counts
    return loads.reshape(n_layers, n_batches, n)


def _check_numbers(keys: Mapping[str, npt.NDArray[np.float64]], path: Path) -> None:
    for name, column in keys.items():
        odd = ~((column >= 0) & (column < files.MOST_COUNT) & (column == np.floor(column)))
        if odd.any():
            refuse(path, f"{name} has {column[odd][0]}, allowed are whole numbers from 0")


def _sorted_rows(keys: Mapping[str, npt.NDArray[np.float64]], counts: Numbers, path: Path) -> Numbers:
    """Put lines with numbers of layers and batches into their order: every layer has the same batches."""
    _check_numbers(keys, path)
    layer = keys.get("layer", np.zeros(len(counts)))
    found, batches = np.unique(layer, return_counts=True)
    if found[-1] != len(found) - 1 or batches.min() != batches.max():
        seen = f"layers {found[:8].astype(int).tolist()} have {batches[:8].tolist()} lines"
        refuse(path, f"{seen}, allowed are layers from 0 on with as many lines each")
    batch = keys.get("batch", keys.get("step", np.arange(len(counts))))
    order = np.lexsort((batch, layer))
    by_layer = batch[order].reshape(len(found), -1)
    if "batch" in keys and (by_layer != np.arange(by_layer.shape[1])).any():
        refuse(path, "batch is not 0 and on, once each, in every layer, which is allowed")
    if "step" in keys and ((by_layer != by_layer[0]).any() or (np.diff(by_layer[0]) == 0).any()):
        refuse(path, "has a step twice or in some layers only, allowed is once in every layer")
    return counts[order].reshape(*by_layer.shape, -1)


def _of_old_sglang(table: npt.NDArray[np.float64], path: Path, n_logical: int | None) -> _Recorded:
    whole = _whole(table)
    if whole.dtype != np.int64:
        refuse(path, "has fractions, allowed are whole numbers")
    files.checked_counts(whole, path)
    layer, expert, count = whole.T
    n = n_logical or int(expert.max()) + 1
    if expert.max() >= n or (int(layer.max()) + 1) * n > files.MOST_VALUES:
        seen = f"has expert {expert.max()} and layer {layer.max()}"
        refuse(path, f"{seen}, allowed are {n} experts and {files.MOST_VALUES} loads in all")
    loads = np.zeros((int(layer.max()) + 1, 1, n), dtype=np.int64)
    np.add.at(loads, (layer, 0, expert), count)
    return _Recorded(loads, [0])


def _whole(table: npt.NDArray[np.float64]) -> Numbers:
    """Return int64 where all numbers are whole: text does not tell them apart."""
    if np.isfinite(table).all() and (np.abs(table) <= files.MOST_COUNT).all() and (table == np.floor(table)).all():
        return table.astype(np.int64)
    return table


def with_equal_loads(loads: torch.Tensor | npt.NDArray[Any]) -> Numbers:
    """Give all experts of a layer the same load if it has none, so that `lplb.place` has something to place.

    Recordings have such layers: SGLang's begin with a model's dense ones, which have no experts to move.

    Args:
        loads: ``[layers, batches, n_logical]``, as `read_loads` and `lplb.history.LoadHistory.loads` return them; not
            changed.

    Returns:
        A copy, int64 or float64, ones in the layers that are zero everywhere.

    Raises:
        ValueError: the shape, dtype or a value is not allowed.
    """
    array = _checked(loads)
    array[~array.any(axis=(1, 2))] = 1
    return array


# Writing


def write_loads(path: Path, loads: torch.Tensor | npt.NDArray[Any]) -> None:
    """Write loads for `read_loads`, or for SGLang.

    Args:
        path: its suffix decides. ``.npz`` and ``.npy`` keep all; ``.csv`` has a header ``layer,batch,0,1,…``; ``.pt``
            and ``.json`` have SGLang's ``logical_count``, which its ``--init-expert-location`` takes to run EPLB on.
        loads: counts of tokens, or averages, ``[layers, batches, n_logical]``, on any device.

    Raises:
        OSError: the file cannot be written.
        ValueError: the suffix, the shape or a value is not allowed; nothing is written.
    """
    array = _checked(loads)
    suffix = os.path.splitext(os.fspath(path))[1].lower()
    out = io.BytesIO()
    if suffix == ".npz":
        np.savez_compressed(out, format=_FORMAT, version=_VERSION, loads=array)
    elif suffix == ".npy":
        np.save(out, array)
    elif suffix == ".csv":
        out.write(_as_csv(array).encode())
    elif suffix == ".pt":
        counts = torch.from_numpy(np.ascontiguousarray(array.swapaxes(0, 1)))
        torch.save({"rank": 0, "logical_count": counts, "average_utilization_rate_over_window": None}, out)
    elif suffix == ".json":
        out.write(json.dumps({"logical_count": array.swapaxes(0, 1).tolist()}).encode())
    else:
        raise ValueError(f"path ends in {suffix!r}, allowed are .npz, .npy, .csv, .pt and .json")
    files.write_bytes(path, out.getvalue())


def _checked(loads: object) -> Numbers:
    """Return loads ``[layers, batches, n_logical]`` as a new int64 or float64 array."""
    array = files.numbers(files.on_host(loads, "loads"), "loads")
    if array.ndim != 3:
        raise ValueError(f"loads has shape {list(array.shape)}, allowed is [layers, batches, n_logical]")
    return files.checked_counts(array, "loads")


def _as_csv(array: Numbers) -> str:
    lines = [",".join(["layer", "batch", *map(str, range(array.shape[2]))])]
    for layer, batch in np.ndindex(*array.shape[:2]):
        lines.append(",".join([str(layer), str(batch), *map(repr, array[layer, batch].tolist())]))
    return "\n".join(lines) + "\n"
