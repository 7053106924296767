"""Placements in files: lplb's JSON and the initial expert locations of serving engines.

The keys are those of SGLang 0.5.23 (``--init-expert-location``, ``srt/eplb/expert_location.py``), of vLLM Ascend's
``expert_map_path`` (``expert_load_balancer.py``), and of vLLM's pull requests 49572 (``initial_expert_map_path``) and
41141 (``initial_mapping_path``), which were open in 2026.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch

from lplb import files
from lplb.arguments import seen, whole_number
from lplb.files import Kind, Path, refuse
from lplb.placement import Placement

__all__ = ["Format", "Slots", "check_output", "read_placements", "read_slots", "write_placements"]

Format = Literal["lplb", "sglang", "vllm", "vllm-ascend"]

_ONE, _MANY, _VERSION = "lplb.placement", "lplb.placements", 1
_MAPPING = "eplb_initial_mapping"  # vLLM's record_type
_NO_SLOTS = ("", "layer", "layer_id", "index")  # a header's names of a column that is no slot
_KEYS = ("physical_to_logical_map", "last_physical_to_logical_map", "phy2log")


@dataclass(frozen=True)
class Slots:
    """What a file says of slots, before anything is asked of it."""

    phy2log: list[npt.NDArray[np.int64]]
    """For each layer the logical expert of each slot, ``[n_physical]``."""
    n_ranks: int | None
    """Number of ranks, ``None`` if the file does not say."""
    n_logical: int | None
    """Number of logical experts, ``None`` if the file does not say."""


def read_slots(path: Path) -> Slots:
    """Read which expert each slot holds, even where an expert is twice on a rank.

    - `lplb.Placement.to_json`, and what `write_placements` writes.
    - SGLang's ``physical_to_logical_map``, JSON or ``.pt`` (also the last one of a recording, mode ``per_pass``).
    - vLLM Ascend's ``expert_map_path``; vLLM's map as a list, one for all layers or one for each, and its
      ``eplb_initial_mapping``.
    - An integer array ``[n_physical]`` or ``[layers, n_physical]``, ``.npy``, ``.npz`` or a table.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is none of these, is damaged or too large; the key, byte or line is named.
    """
    kind = files.kind_of(path)
    if kind is Kind.NPY:
        return _plain(files.read_npy(path), path)
    if kind is Kind.NPZ:
        names = files.npz_names(path)
        name = next((key for key in _KEYS if key in names), names[0])
        if name not in _KEYS and len(names) > 1:
            refuse(path, f"has {', '.join(names[:8])}, allowed are {', '.join(_KEYS)}, or a single array")
        return _plain(files.read_npz(path, [name])[0], f"{path}: {name}")
    if kind is Kind.TABLE:
        header, table = files.read_table(path)
        if header is not None and header[0].lower() in _NO_SLOTS:
            refuse(path, f"column 1 is {header[0]!r}, allowed are slots only, a line for each layer in order")
        if not (np.abs(table) <= files.MOST_COUNT).all() or (table != np.floor(table)).any():
            refuse(path, "has numbers that are not whole, allowed are logical experts")
        return _plain(table.astype(np.int64), path)
    if kind is Kind.TORCH:
        return _of_document(files.read_torch(path), path)
    documents = files.read_json(path)
    if len(documents) > 1:
        documents = [one for one in documents if isinstance(one, dict) and one.get("record_type") == _MAPPING]
        if len(documents) != 1:
            refuse(path, f"has {len(documents)} lines with record_type {_MAPPING!r}, allowed is one")
    return _of_document(documents[0], path)


def read_placements(path: Path, n_ranks: int | None = None, *, n_logical: int | None = None) -> list[Placement]:
    """Read a placement for each layer, of any format that `read_slots` takes.

    Args:
        path: the file.
        n_ranks: number of ranks; needed where the file does not say.
        n_logical: number of logical experts; by default what the file says, or its largest expert plus one.

    Returns:
        Placements, one for each layer.

    Raises:
        TypeError: a number is not an int.
        OSError: the file cannot be read.
        ValueError: as `read_slots`; the file says another number of ranks or experts; or `Placement` refuses a layer,
            for example one with an expert twice on a rank, which `lplb.eplb.spread_copies` repairs.
    """
    slots = read_slots(path)
    if n_ranks is None and slots.n_ranks is None:
        refuse(path, "does not say the number of ranks; n_ranks (on the command line --ranks) has to")
    for name, given, said in (("n_ranks", n_ranks, slots.n_ranks), ("n_logical", n_logical, slots.n_logical)):
        if given is not None and said is not None and whole_number(name, given, 1) != said:
            refuse(path, f"says {name} is {said}, allowed is what was given, {given}")
    ranks = slots.n_ranks if n_ranks is None else n_ranks
    experts = slots.n_logical if n_logical is None else n_logical
    if experts is None:
        experts = max(1, *(int(layer.max()) + 1 for layer in slots.phy2log))
    assert ranks is not None
    placements = []
    for i, layer in enumerate(slots.phy2log):
        try:
            placements.append(Placement(layer, ranks, experts))
        except ValueError as error:
            raise ValueError(f"{path}: layer {i}: {error}") from error
    return placements


def _plain(value: object, where: object) -> Slots:
    table = files.numbers(value, where)
    if table.dtype != np.int64 or table.ndim not in (1, 2) or not table.size:
        refuse(where, f"is {table.dtype} {list(table.shape)}, allowed are logical experts [layers, slots] or [slots]")
    return Slots(list(np.atleast_2d(table)), None, None)


def _of_document(content: object, path: Path) -> Slots:
    if not isinstance(content, dict):
        return _plain(content, path)
    for key in _KEYS[:2]:
        if key in content:
            return _plain(content[key], f"{path}: {key}")
    if "layer_list" in content:
        return _of_ascend(content, path)
    if content.get("record_type") == _MAPPING:
        return _of_mapping(content, path)
    if content.get("format") == _MANY:
        return _of_many(content, path)
    if content.get("format") == _ONE:
        try:
            placement = Placement.from_json(json.dumps(content))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        return Slots([placement.phy2log.numpy().astype(np.int64)], placement.n_ranks, placement.n_logical)
    shown = ", ".join(str(key)[:40] for key in list(content)[:8]) or "nothing"
    refuse(path, f"has {shown}, allowed are physical_to_logical_map, layer_list, and format {_ONE!r} or {_MANY!r}")


def _of_many(content: Mapping[str, Any], path: Path) -> Slots:
    missing = [key for key in ("version", "n_ranks", "n_logical", "phy2log") if key not in content]
    if missing:
        refuse(path, f"lacks {', '.join(missing)}")
    if type(content["version"]) is not int or content["version"] != _VERSION:
        refuse(f"{path}: version", f"is {content['version']!r:.40}, allowed is {_VERSION}")
    for key in ("n_ranks", "n_logical"):
        if type(content[key]) is not int or content[key] < 1:
            refuse(f"{path}: {key}", f"is {content[key]!r:.40}, allowed is 1 or more")
    layers = content["phy2log"]
    if not isinstance(layers, list) or not layers:
        refuse(f"{path}: phy2log", f"is a {type(layers).__name__}, allowed is a list for each layer")
    rows = [_slots(one, f"{path}: phy2log[{i}]") for i, one in enumerate(layers)]
    return Slots(rows, content["n_ranks"], content["n_logical"])


def _slots(value: object, where: object) -> npt.NDArray[np.int64]:
    """Return the slots of one layer, or of one rank of it."""
    slots = files.numbers(value, where)
    if slots.dtype != np.int64 or slots.ndim != 1 or not slots.size:
        refuse(where, f"is {slots.dtype} {list(slots.shape)}, allowed are logical experts [slots]")
    return slots.astype(np.int64, copy=False)


def _of_ascend(content: Mapping[str, Any], path: Path) -> Slots:
    layers = content["layer_list"]
    if not isinstance(layers, list) or not layers:
        refuse(f"{path}: layer_list", f"is a {type(layers).__name__}, allowed is a list for each layer")
    phy2log, ranks = [], set()
    for i, layer in enumerate(layers):
        where = f"{path}: layer_list[{i}]"
        devices = layer.get("device_list") if isinstance(layer, dict) else None
        if not isinstance(devices, list) or not devices:
            refuse(where, "lacks device_list, or it is no list of devices")
        held = []
        for k, device in enumerate(devices):
            if not isinstance(device, dict) or "device_expert" not in device:
                refuse(f"{where}: device_list[{k}]", "lacks device_expert")
            held.append(_slots(device["device_expert"], f"{where}: device_list[{k}]: device_expert"))
        if len({len(one) for one in held}) > 1:
            refuse(where, f"has devices of {sorted({len(one) for one in held})[:4]} experts, allowed is one number")
        ranks.add(len(devices))
        phy2log.append(np.concatenate(held))
    if len(ranks) > 1:
        refuse(f"{path}: layer_list", f"has layers on {sorted(ranks)[:4]} devices, allowed is one number")
    return Slots(phy2log, ranks.pop(), None)


def _of_mapping(content: Mapping[str, Any], path: Path) -> Slots:
    layers = content.get("initial_global_assignments")
    where = f"{path}: initial_global_assignments"
    if not isinstance(layers, dict) or not layers:
        refuse(where, "is missing, or has no layer by number")
    names = [str(i) for i in range(len(layers))]
    missing = [name for name in names if name not in layers]
    if missing:
        refuse(where, f"has {len(layers)} layers and lacks layer {missing[0]}")
    return Slots([_slots(layers[name], f"{where}: {name}") for name in names], None, None)


def write_placements(path: Path, placements: Placement | Sequence[Placement], format: Format | None = None) -> None:
    """Write placements for `read_placements`, or for a serving engine.

    Args:
        path: the file, whose name ends in ``.json`` or ``.pt``.
        placements: one for all layers, or one for each.
        format: by default ``"sglang"`` for ``.pt``, else ``"lplb"``.

            - ``"lplb"``: JSON; one placement as `lplb.Placement.to_json`.
            - ``"sglang"``: only ``physical_to_logical_map``, for ``--init-expert-location``; JSON, or torch's format if
              ``path`` ends in ``.pt``. SGLang wants a row for every layer of the model, also for those without
              experts.
            - ``"vllm"``: a list for each layer, JSON.
            - ``"vllm-ascend"``: JSON for ``expert_map_path``.

    Raises:
        TypeError: ``placements`` are none.
        OSError: the file cannot be written.
        ValueError: ``format`` or the suffix is not allowed, or the format cannot hold these; nothing is written.
    """
    single = isinstance(placements, Placement)
    layers = [placements] if isinstance(placements, Placement) else list(placements)
    odd = next((one for one in layers if not isinstance(one, Placement)), None)
    if odd is not None:
        raise TypeError(f"placements has {seen(odd)}, allowed are lplb.Placement")
    format = check_output(path, format)
    _check_alike(layers, same_slots=format != "lplb")
    if _is_torch(path):
        out = io.BytesIO()
        torch.save({"physical_to_logical_map": torch.stack([one.phy2log for one in layers]).long()}, out)
        files.write_bytes(path, out.getvalue())
        return
    text = layers[0].to_json() if format == "lplb" and single else json.dumps(_document(layers, format))
    files.write_bytes(path, text.encode() + b"\n")


def check_output(path: Path, format: Format | None = None) -> Format:
    """Refuse a file that `write_placements` could not write, before there are placements.

    Returns:
        The format that it would have.

    Raises:
        OSError, ValueError: as `write_placements`.
    """
    if format is None:
        format = "sglang" if _is_torch(path) else "lplb"
    if format not in get_args(Format):
        raise ValueError(f"format is {format!r}, allowed are {', '.join(map(repr, get_args(Format)))}")
    suffix = os.path.splitext(os.fspath(path))[1].lower()
    if suffix not in (".json", ".pt"):
        raise ValueError(f"path ends in {suffix!r}, allowed are .json and, for format 'sglang', .pt")
    if suffix == ".pt" and format != "sglang":
        raise ValueError(f"format is {format!r}, allowed for {os.fspath(path)!r} is 'sglang': others are .json")
    files.check_folder(path)
    return format


def _is_torch(path: Path) -> bool:
    return os.fspath(path).lower().endswith(".pt")


def _check_alike(layers: Sequence[Placement], *, same_slots: bool) -> None:
    if not layers:
        raise ValueError("placements is an empty sequence, allowed is at least one")
    for i, one in enumerate(layers):
        for name in ("n_ranks", "n_logical", "n_physical") if same_slots else ("n_ranks", "n_logical"):
            found, first = getattr(one, name), getattr(layers[0], name)
            if found != first:
                raise ValueError(f"placements[{i}] has {name} {found}, allowed is that of the first, {first}")


def _document(layers: Sequence[Placement], format: Format) -> object:
    rows = [one.phy2log.tolist() for one in layers]
    if format == "sglang":
        return {"physical_to_logical_map": rows}
    if format == "vllm":
        return rows
    n_ranks, per_rank = layers[0].n_ranks, layers[0].slots_per_rank
    if format == "lplb":
        sizes = {"n_ranks": n_ranks, "n_logical": layers[0].n_logical}
        return {"format": _MANY, "version": _VERSION, **sizes, "phy2log": rows}
    listed = []
    for i, row in enumerate(rows):
        held = [row[r * per_rank : (r + 1) * per_rank] for r in range(n_ranks)]
        devices = [{"device_id": r, "device_expert": experts} for r, experts in enumerate(held)]
        listed.append({"layer_id": i, "device_count": n_ranks, "device_list": devices})
    return {"moe_layer_count": len(rows), "layer_list": listed}
