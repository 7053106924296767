"""Files from anywhere: sizes and shapes are checked before bytes are read, and nothing that a file holds is run.

What is wrong with a file is a ``ValueError`` that names it and the key, byte or line; what the system says of it stays
an ``OSError``.
"""

from __future__ import annotations

import csv
import enum
import errno
import io
import itertools
import json
import math
import os
import re
import stat
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch

__all__ = [
    "MOST_BYTES",
    "MOST_COUNT",
    "MOST_TEXT_BYTES",
    "MOST_VALUES",
    "Kind",
    "Numbers",
    "Path",
    "check_folder",
    "checked_counts",
    "kind_of",
    "npz_names",
    "numbers",
    "on_host",
    "read_json",
    "read_npy",
    "read_npz",
    "read_table",
    "read_torch",
    "refuse",
    "write_bytes",
]

Path = str | os.PathLike[str]
Numbers = npt.NDArray[Any]
"""int64 or float64, in this file's results and for its arguments."""

MOST_BYTES = 2**31
"""Of a file, and of what it unpacks to."""
MOST_TEXT_BYTES = 2**28
"""Of a text file: its numbers take several times as much in memory."""
MOST_VALUES = 2**27
"""Of one array: 1 GiB of int64 or float64."""
MOST_COUNT = 2**53
"""Of one entry: float64 holds every whole number up to it."""

_NPY, _ZIP, _PICKLE = b"\x93NUMPY", b"PK\x03\x04", b"\x80"
_LONGEST_REASON = 200  # characters of a parser's own words


class Kind(enum.Enum):
    """What the bytes of a file are, whatever its name."""

    NPY = "a NumPy array"
    NPZ = "a NumPy archive"
    TORCH = "a torch file"
    JSON = "JSON"
    TABLE = "a table of numbers"


class _Refused(ValueError):
    """Said by this file, so that no parser's words are put around it."""


def refuse(where: object, why: str) -> NoReturn:
    """Raise the ``ValueError`` of a file.

    Args:
        where: the file, or the file and a key in it.
        why: the value seen and the value allowed.
    """
    raise _Refused(f"{where}: {why}")


@contextmanager
def _parsing(where: object, what: str) -> Iterator[None]:
    try:
        with warnings.catch_warnings():  # those are for who wrote the file
            warnings.simplefilter("ignore")
            yield
    except _Refused:
        raise
    except Exception as error:  # of odd bytes parsers raise anything: struct, zlib, Unicode, recursion, memory, …
        raise _Refused(f"{where}: not {what}, or a damaged one: {_words_of(error)}") from error


def _words_of(error: Exception) -> str:
    # torch explains at length, in bold, how its checks are turned off
    said = str(error).rpartition("WeightsUnpickler error:")[2].partition("Please use `torch.serialization")[0]
    lines = re.sub(r"\x1b\[[0-9;]*m", "", said).split("\n")
    words = " ".join(" ".join(line for line in lines if "weights_only" not in line).split())
    return f"{type(error).__name__}: {words}"[:_LONGEST_REASON] if words else type(error).__name__


def _checked_size(path: Path, most: int) -> int:
    """Return the bytes of a regular file that is neither empty nor too large."""
    found = os.stat(path)
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if not stat.S_ISREG(found.st_mode):
        refuse(path, "is a device or a pipe, allowed is a regular file")
    if not found.st_size:
        refuse(path, "is empty")
    if found.st_size > most:
        refuse(path, f"has {found.st_size} bytes, allowed are {most}")
    return found.st_size


def _read(path: Path, most: int) -> bytes:
    _checked_size(path, most)
    with open(path, "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        refuse(path, f"has more than {most} bytes, which are allowed")
    return data


def kind_of(path: Path) -> Kind:
    """Tell what a file is by its first bytes, and a zip archive by its names.

    Raises:
        OSError: the file is missing, a directory, unreadable.
        ValueError: it is empty, too large, or nothing that is read here; a pickle is named, not opened.
    """
    _checked_size(path, MOST_BYTES)
    with open(path, "rb") as file:
        head = file.read(4096)
    if head.startswith(_NPY):
        return Kind.NPY
    if head.startswith(_ZIP):
        return _kind_of_zip(path)
    if len(head) < len(_ZIP) and (_ZIP.startswith(head) or _NPY.startswith(head)):
        refuse(path, f"has {len(head)} bytes, too few for the NumPy or torch file that it begins like")
    if head.startswith(_PICKLE):
        refuse(path, "is a pickle or a torch file older than torch 1.6, which could run code; torch.save writes others")
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if b"\0" in head or not start:
        refuse(path, f"begins with {head[:8]!r}, allowed are .npy, .npz, torch's .pt, JSON and CSV")
    return Kind.JSON if start[:1] in b"[{" else Kind.TABLE


def _kind_of_zip(path: Path) -> Kind:
    with _parsing(path, "a zip archive"), _opened(path) as archive:
        names = [info.filename for info in _checked_members(path, archive)]
    if any(name.rpartition("/")[2] == "data.pkl" for name in names):
        return Kind.TORCH
    if names and all(name.endswith(".npy") for name in names):
        return Kind.NPZ
    shown = ", ".join(names[:4]) or "nothing"
    refuse(path, f"is a zip archive of {shown}, allowed are NumPy's and torch's")


def _checked_members(path: Path, archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    members = archive.infolist()
    unpacked = sum(info.file_size for info in members)
    if unpacked > MOST_BYTES:
        refuse(path, f"unpacks to {unpacked} bytes, allowed are {MOST_BYTES}")
    return members


# Arrays


def read_npy(path: Path) -> npt.NDArray[Any]:
    """Return the array of a ``.npy`` file: numbers or strings, never objects.

    Raises:
        OSError, ValueError: as for the module.
    """
    data = _read(path, MOST_BYTES)
    with _parsing(path, Kind.NPY.value):
        return _npy(io.BytesIO(data), len(data), path)


def npz_names(path: Path) -> list[str]:
    """Return the names of the arrays of a ``.npz`` file.

    Raises:
        OSError, ValueError: as for the module.
    """
    with _parsing(path, Kind.NPZ.value), _opened(path) as archive:
        return [info.filename.removesuffix(".npy") for info in _checked_members(path, archive)]


def read_npz(path: Path, names: Sequence[str]) -> list[npt.NDArray[Any]]:
    """Return arrays of a ``.npz`` file by name; the others are not unpacked.

    Raises:
        OSError, ValueError: as for the module; a name that is missing is named.
    """
    with _parsing(path, Kind.NPZ.value), _opened(path) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in _checked_members(path, archive)}
        missing = [name for name in names if name not in members]
        if missing:
            refuse(path, f"lacks {', '.join(missing)}; it has {', '.join(list(members)[:8])}")
        arrays = []
        for name in names:
            with archive.open(members[name]) as stream:
                arrays.append(_npy(stream, members[name].file_size, f"{path}: {name}"))
                if stream.read(1):  # at the end zipfile compares the checksum
                    refuse(f"{path}: {name}", "has bytes after its data")
        return arrays


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    _checked_size(path, MOST_BYTES)
    with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
        yield archive


def _npy(stream: Any, size: int, where: object) -> npt.NDArray[Any]:
    """Read an array of ``size`` bytes, header included, once its header is found to be right."""
    version = np.lib.format.read_magic(stream)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        refuse(where, f"has version {version} of NumPy's format, allowed are (1, 0) and (2, 0)")
    shape, by_column, dtype = readers[version](stream)
    if dtype.hasobject:
        refuse(where, "holds Python objects, which could run code; allowed are numbers")
    if dtype.kind not in "iufU":
        refuse(where, f"has dtype {str(dtype)[:80]}, allowed are integers and floats")
    n_values = math.prod(shape)
    if min(shape, default=0) < 0 or n_values > MOST_VALUES:
        refuse(where, f"declares shape {list(shape)}, allowed are {MOST_VALUES} values")
    declared, there = n_values * dtype.itemsize, size - stream.tell()
    if declared != there:
        refuse(where, f"has {there} bytes of data, its header declares {declared}")
    values = np.frombuffer(stream.read(declared), dtype).reshape(shape, order="F" if by_column else "C")
    return values.astype(dtype.newbyteorder("="), order="C")


def read_torch(path: Path) -> Any:
    """Return what ``torch.save`` wrote, of the types that ``weights_only`` allows; tensors are on the CPU.

    Its archive is checked first: sizes, checksums, nothing compressed. Other containers than the zip archive of torch
    1.6 and newer are refused: before torch 2.6 `torch.load` runs what a tar file holds, ``weights_only`` or not
    (CVE-2025-32434). With ``mmap`` a tensor cannot reach past the end of the file, whatever size it claims.

    Raises:
        OSError, ValueError: as for the module.
    """
    if kind_of(path) is not Kind.TORCH:
        refuse(path, f"is not {Kind.TORCH.value}")
    with _parsing(path, Kind.TORCH.value):
        with _opened(path) as archive:
            packed = [info.filename for info in archive.infolist() if info.compress_type != zipfile.ZIP_STORED]
            if packed:
                refuse(path, f"{packed[0]} is compressed, which torch never does")
            damaged = archive.testzip()
            if damaged is not None:
                refuse(path, f"{damaged} has another checksum than the archive says")
        return torch.load(os.fspath(path), map_location="cpu", weights_only=True, mmap=True)


# Text


def _text(path: Path) -> str:
    data = _read(path, MOST_TEXT_BYTES)
    with _parsing(path, "text in UTF-8"):
        return data.decode("utf-8-sig")


def read_json(path: Path) -> list[Any]:
    """Return the documents of a JSON file: one, or one for each line that is not blank.

    Raises:
        OSError, ValueError: as for the module; NaN and infinities are no JSON.
    """
    text = _text(path)
    with _parsing(path, Kind.JSON.value):
        try:
            return [_json(text)]
        except json.JSONDecodeError as error:
            if not error.msg.startswith("Extra data"):
                raise
    documents = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            with _parsing(f"{path}: line {number}", Kind.JSON.value):
                documents.append(_json(line))
    return documents


def _json(text: str) -> Any:
    def no_number(name: str) -> NoReturn:
        raise ValueError(f"{name} is not allowed")

    return json.loads(text, parse_constant=no_number)


def read_table(path: Path, *, numbered: bool = False) -> tuple[list[str] | None, npt.NDArray[np.float64]]:
    """Return a table of numbers, with its header if its first line is not all numbers.

    Cells are separated by commas, semicolons, tabs or blanks, whichever the first line has, in this order. Blank lines
    and those that begin with ``#`` are left out.

    Args:
        path: the file.
        numbered: whether columns may be named by their numbers: a first line ``0,1,…`` is a header if it has two cells
            or more, and other lines follow.

    Returns:
        The names, or ``None``, and float64 ``[lines, cells]``.

    Raises:
        OSError, ValueError: as for the module; line and column are named.
    """
    text = _text(path)
    with _parsing(path, Kind.TABLE.value):
        lines = _lines(text)
        first = next(lines, None)
        if first is None:
            refuse(path, "has no line of numbers")
        width = len(first[1])
        second = next(lines, None)
        named = numbered and second is not None and width > 1 and first[1] == [str(i) for i in range(width)]
        header = first[1] if named or not all(_is_number(cell) for cell in first[1]) else None
        rows: list[npt.NDArray[np.float64]] = []
        begin = [line for line in (None if header else first, second) if line is not None]
        for number, cells in itertools.chain(begin, lines):
            if len(cells) != width:
                refuse(path, f"line {number} has {len(cells)} cells, allowed are {width} as in line {first[0]}")
            if (len(rows) + 1) * width > MOST_VALUES:
                refuse(path, f"has more than {MOST_VALUES} cells, which are allowed")
            try:
                rows.append(np.array([float(cell) for cell in cells]))
            except ValueError:
                column = next(i for i, cell in enumerate(cells) if not _is_number(cell))
                refuse(path, f"line {number}, column {column + 1} is {cells[column][:40]!r}, allowed is a number")
        if not rows:
            refuse(path, "has a header and no line of numbers")
        return header, np.array(rows)


def _lines(text: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the number and the cells of every line that counts."""
    lines = ((i, line) for i, line in enumerate(io.StringIO(text), 1) if line.strip() and line[0] != "#")
    first = next(lines, None)
    if first is None:
        return
    separator = next((mark for mark in ",;\t" if mark in first[1]), None)
    for number, line in itertools.chain([first], lines):
        if separator is None:
            yield number, line.split()
        else:
            yield number, [cell.strip() for cell in next(csv.reader([line], delimiter=separator, strict=True))]


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


# Numbers


def numbers(value: object, where: object) -> Numbers:
    """Return a tensor, an array or nested lists as a new int64 or float64 array.

    Args:
        value: what a file held.
        where: the file and the key.

    Raises:
        ValueError: it is something else, holds something else than numbers, is ragged or too large.
    """
    if isinstance(value, torch.Tensor):
        return _of_tensor(value, where)
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "iuf":
            refuse(where, f"has dtype {value.dtype}, allowed are integers and floats")
        if value.dtype == np.uint64 and value.size and value.max() > np.iinfo(np.int64).max:
            refuse(where, f"has {value.max()}, allowed are {MOST_COUNT}")
        return value.astype(np.float64 if value.dtype.kind == "f" else np.int64)
    if isinstance(value, list):
        return _of_lists(value, where)
    refuse(where, f"is a {type(value).__name__}, allowed are a tensor, an array or lists of numbers")


def on_host(value: object, where: object) -> object:
    """Return a caller's tensor on the CPU, and anything else as it is.

    Raises:
        ValueError: the tensor has no values in memory: sparse, or on ``meta``.
    """
    if not isinstance(value, torch.Tensor):
        return value
    if value.layout != torch.strided or value.device.type == "meta":
        refuse(where, f"has layout {value.layout} on {value.device}, allowed is torch.strided, and not on meta")
    return value.detach().cpu()


def _of_tensor(tensor: torch.Tensor, where: object) -> Numbers:
    if type(tensor) is not torch.Tensor or tensor.layout != torch.strided or tensor.device.type != "cpu":
        refuse(
            where,
            f"is a {type(tensor).__name__} with layout {tensor.layout} on {tensor.device}, allowed is a plain one",
        )
    if tensor.dtype.is_complex or tensor.dtype == torch.bool or tensor.is_quantized:
        refuse(where, f"has dtype {tensor.dtype}, allowed are integers and floats")
    if tensor.numel() > MOST_VALUES:  # strides of 0 make any size of a few bytes
        refuse(where, f"has shape {list(tensor.shape)}, allowed are {MOST_VALUES} values")
    with _parsing(where, "a tensor of numbers"):
        wide = tensor.detach().to(torch.float64 if tensor.dtype.is_floating_point else torch.int64)
        return np.array(wide.numpy())


def _of_lists(value: list[Any], where: object) -> Numbers:
    shape, level = [len(value)], value
    while level and isinstance(level[0], list):
        if len(shape) == 3:
            refuse(where, "has lists in four levels, allowed are three")
        width = len(level[0])
        for i, row in enumerate(level):
            if not isinstance(row, list) or len(row) != width:
                seen = f"{len(row)} entries" if isinstance(row, list) else f"no list but a {type(row).__name__}"
                refuse(f"{where}{_place(i, shape)}", f"has {seen}, allowed are {width} as in the first")
        shape.append(width)
        level = list(itertools.chain.from_iterable(level))
    odd = next((i for i, number in enumerate(level) if type(number) not in (int, float)), None)
    if odd is not None:
        refuse(f"{where}{_place(odd, shape)}", f"is a {type(level[odd]).__name__}, allowed is a number")
    with _parsing(where, "a list of numbers"):
        kind = np.float64 if any(type(number) is float for number in level) else np.int64
        return np.array(level, dtype=kind).reshape(shape)


def _place(flat: int, shape: Sequence[int]) -> str:
    return "".join(f"[{i}]" for i in np.unravel_index(flat, tuple(shape)))


def checked_counts(values: Numbers, where: object) -> Numbers:
    """Return numbers that can be counts of tokens, or averages of some, as they are.

    Raises:
        ValueError: there is none, or one is NaN, infinite, negative or above `MOST_COUNT`; its place is named.
    """
    if not values.size:
        refuse(where, f"has shape {list(values.shape)}, allowed is at least one count")
    odd = ~((values >= 0) & (values <= MOST_COUNT))  # true for NaN as well
    if odd.any():
        place = tuple(int(i) for i in np.argwhere(odd)[0])
        refuse(f"{where}{list(place)}", f"is {values[place]}, allowed are 0 to {MOST_COUNT} tokens")
    return values


def check_folder(path: Path) -> None:
    """Refuse a file that could not be written because of where it is, before the work.

    Raises:
        OSError: its folder is missing or none, or it is a folder itself.
    """
    target = os.path.realpath(path)
    folder = os.path.dirname(target)
    if os.path.isdir(target):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if not os.path.isdir(folder):
        code = errno.ENOTDIR if os.path.exists(folder) else errno.ENOENT
        raise OSError(code, f"{os.strerror(code)}, allowed is a folder that exists", folder)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file in one step: whoever reads it meanwhile, or after a crash, has the old one or the new one.

    Links are followed, and the file keeps its permissions. Pipes and devices are written to as they are.

    Raises:
        OSError: it cannot be written.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        mode = None
    if mode is not None and not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        with open(path, "wb") as file:
            file.write(data)
        return
    check_folder(path)
    target = os.path.realpath(path)
    part = f"{target}.{os.getpid()}.part"
    try:
        with open(part, "xb", opener=_private if mode is not None else None) as file:
            if mode is not None:
                os.fchmod(file.fileno(), stat.S_IMODE(mode))
            file.write(data)
        os.replace(part, target)
    except OSError as error:
        if os.path.exists(part):
            os.unlink(part)
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
