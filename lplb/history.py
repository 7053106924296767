"""Statistics of loads over batches: what placements are made from.

A sliding window keeps the last batches whole, for policies that look at scenarios; exponential averages and variances
look back further in constant memory.
"""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lplb import files
from lplb.arguments import real_number, seen, whole_number

__all__ = ["LoadHistory"]

_Floats = npt.NDArray[np.float64]

_FORMAT, _VERSION = "lplb.history", 1


class LoadHistory:
    """The loads of the last batches, and their mean and variance.

    With weights ``w`` (1 for the batches of the window, or ``decay ** age`` for all batches that were ever added, the
    last being of age 0), ``V1 = sum(w)`` and ``V2 = sum(w ** 2)``, the mean is ``sum(w x) / V1`` and the variance
    ``sum(w (x - mean) ** 2) / (V1 - V2 / V1)``. That is unbiased where batches are independent and alike, and the
    sample variance where all weights are 1. Exponential ones are kept by the updates of D. H. D. West (1979, "Updating
    mean and variance estimates: an improved method"), and those of two histories are joined as by T. F. Chan, G. H.
    Golub and R. J. LeVeque (1979, "Updating formulae and a pairwise algorithm for computing sample variances").

    Args:
        n_layers: number of layers.
        n_logical: logical experts of a layer.
        window: how many batches are kept, 1 or more; memory is ``8 * window * n_layers * n_logical`` bytes.
        decay: ``None`` for mean and variance of the window, or what a batch's weight is multiplied by with each batch
            that follows, above 0 and below 1. The weight halves in ``log(0.5) / log(decay)`` batches.

    Raises:
        TypeError: a number has the wrong type.
        ValueError: a number is out of bounds.
    """

    def __init__(self, n_layers: int, n_logical: int, *, window: int = 64, decay: float | None = None) -> None:
        """See the class."""
        self.n_layers = whole_number("n_layers", n_layers, 1)
        self.n_logical = whole_number("n_logical", n_logical, 1)
        self.window = whole_number("window", window, 1)
        self.decay = _checked_decay(decay)
        if self.window * self.n_layers * self.n_logical > files.MOST_VALUES:
            raise ValueError(
                f"window is {window}, allowed for {n_layers} layers of {n_logical} experts are "
                f"{files.MOST_VALUES // (self.n_layers * self.n_logical)} batches"
            )
        self.reset()

    def reset(self) -> None:
        """Forget all batches."""
        self._recent = np.zeros((self.window, self.n_layers, self.n_logical))  # a ring
        self._seen = 0
        self._weight = self._pairs = 0.0  # V1 and V1² - V2, without cancellation
        self._mean = np.zeros((self.n_layers, self.n_logical))
        self._deviation = np.zeros((self.n_layers, self.n_logical))  # sum(w (x - mean)²)

    @property
    def seen(self) -> int:
        """Number of batches added since the beginning, or `reset`."""
        return self._seen

    def __len__(self) -> int:
        """Return the number of batches in the window."""
        return min(self._seen, self.window)

    def add(self, counts: torch.Tensor | npt.NDArray[Any]) -> None:
        """Add a batch.

        Args:
            counts: tokens of each expert, ``[n_layers, n_logical]``, integers or floats, on any device; copied to the
                host, which waits for it.

        Raises:
            TypeError: ``counts`` is no tensor and no array.
            ValueError: wrong dtype or shape, or an entry is NaN, infinite, negative or above 2**53; nothing is added.
        """
        batch = _checked(counts, "counts", (self.n_layers, self.n_logical), "[n_layers, n_logical]")
        self._recent[self._seen % self.window] = batch
        self._seen += 1
        if self.decay is not None:
            self._join(1, 1.0, 0.0, batch, np.zeros_like(batch))

    def extend(self, loads: torch.Tensor | npt.NDArray[Any]) -> None:
        """Add batches in their order, as `lplb.formats.read_loads` and `loads` return them.

        Args:
            loads: ``[n_layers, batches, n_logical]``, otherwise as in `add`.

        Raises:
            TypeError, ValueError: as `add`; nothing is added.
        """
        shape = (self.n_layers, None, self.n_logical)
        for batch in _checked(loads, "loads", shape, "[n_layers, batches, n_logical]").swapaxes(0, 1):
            self.add(batch)

    def merge(self, later: LoadHistory) -> None:
        """Add all that another history has, as if its batches had come after those that are here.

        Args:
            later: of the same shape, window and decay; not changed.

        Raises:
            TypeError: it is no `LoadHistory`.
            ValueError: it differs; nothing is added.
        """
        if not isinstance(later, LoadHistory):
            raise TypeError(f"later is a {type(later).__name__}, allowed is a LoadHistory")
        for name in ("n_layers", "n_logical", "window", "decay"):
            if getattr(self, name) != getattr(later, name):
                raise ValueError(f"{name} of later is {getattr(later, name)}, allowed is {getattr(self, name)}")
        n, batches = later._seen, later._recent[later._ring()]  # a copy, as later may be self
        if self.decay is not None and n:
            self._join(n, later._weight, later._pairs, later._mean, later._deviation)
        self._seen += n
        self._recent[self._ring()[len(self) - len(batches) :]] = batches

    def _join(self, n: int, weight: float, pairs: float, mean: _Floats, deviation: _Floats) -> None:
        """Let the weights here age by ``n`` batches, and join those with theirs."""
        assert self.decay is not None
        aged = self.decay**n
        before, self._weight = self._weight * aged, self._weight * aged + weight
        self._pairs = self._pairs * aged**2 + pairs + 2 * before * weight
        step = mean - self._mean
        self._mean += step * (weight / self._weight)
        self._deviation = self._deviation * aged + deviation + step**2 * (before * weight / self._weight)

    def loads(self) -> _Floats:
        """Return the batches of the window, the oldest first, for `lplb.place`; see `lplb.formats.with_equal_loads`.

        Returns:
            float64 ``[n_layers, batches, n_logical]``, the caller's own.
        """
        return np.ascontiguousarray(self._recent[self._ring()].swapaxes(0, 1))

    def _ring(self) -> npt.NDArray[np.int64]:
        """Return where the batches of the window are, the oldest first."""
        return np.arange(self._seen - len(self), self._seen, dtype=np.int64) % self.window

    def mean(self) -> _Floats:
        """Return the mean load of each expert, weighted as the class says.

        For `lplb.place`, a mean of layers wants an axis of batches: ``lplb.place(history.mean()[:, None], …)``, or
        better ``history.loads()``. It takes two dimensions for batches of one layer.

        Returns:
            float64 ``[n_layers, n_logical]``, the caller's own.

        Raises:
            ValueError: there is no batch.
        """
        self._need(1, "a mean")
        mean: _Floats = self._recent[: len(self)].mean(0) if self.decay is None else self._mean.copy()
        return mean

    def variance(self) -> _Floats:
        """Return the unbiased variance of each expert's load from batch to batch, weighted as the class says.

        Returns:
            float64 ``[n_layers, n_logical]``, the caller's own; 0 or more.

        Raises:
            ValueError: there are fewer than two batches, of those that count.
        """
        self._need(2, "a variance")
        if self.decay is None:
            variance: _Floats = self._recent[: len(self)].var(0, ddof=1)
            return variance
        spread: _Floats = self._deviation * (self._weight / self._pairs)
        return spread

    def _need(self, batches: int, what: str) -> None:
        there = len(self) if self.decay is None else self._seen
        if there < batches:
            raise ValueError(f"{what} of {there} batches was asked for, allowed are {batches} or more")

    def save(self, path: files.Path) -> None:
        """Write all of it to a ``.npz`` file, in one step.

        Raises:
            OSError: the file cannot be written.
        """
        out = io.BytesIO()
        np.savez_compressed(
            out,
            format=_FORMAT,
            version=_VERSION,
            window=self.window,
            decay=math.nan if self.decay is None else self.decay,
            seen=self._seen,
            recent=self.loads().swapaxes(0, 1),
            weights=np.array([self._weight, self._pairs]),
            mean=self._mean,
            deviation=self._deviation,
        )
        files.write_bytes(path, out.getvalue())

    @classmethod
    def load(cls, path: files.Path) -> LoadHistory:
        """Read what `save` wrote; nothing in the file is run.

        Returns:
            A history that goes on as the saved one would have, bit for bit.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is no such file, of another version, damaged, or its values cannot have been saved.
        """
        if files.kind_of(path) is not files.Kind.NPZ:
            files.refuse(path, "is no NumPy archive, allowed is what LoadHistory.save writes")
        kind, version = files.read_npz(path, ["format", "version"])
        if kind.shape != () or str(kind) != _FORMAT:
            files.refuse(f"{path}: format", f"is {str(kind)[:40]!r}, allowed is {_FORMAT!r}")
        if version.shape != () or version != _VERSION:
            files.refuse(f"{path}: version", f"is {version.tolist()!r:.40}, allowed is {_VERSION}")
        saved = dict(zip(_SAVED, files.read_npz(path, list(_SAVED)), strict=True))
        for name, kinds in (("window", "iu"), ("decay", "f"), ("seen", "iu")):
            if saved[name].shape != () or saved[name].dtype.kind not in kinds:
                files.refuse(f"{path}: {name}", f"is {_said(saved[name])}, allowed is one number")
        for name, dims in (("recent", 3), ("weights", 1), ("mean", 2), ("deviation", 2)):
            if saved[name].dtype != np.float64 or saved[name].ndim != dims:
                files.refuse(f"{path}: {name}", f"is {_said(saved[name])}, allowed is float64 of {dims} dimensions")
        _, n_layers, n_logical = saved["recent"].shape
        decay = float(saved["decay"])
        try:
            history = cls(n_layers, n_logical, window=int(saved["window"]), decay=None if math.isnan(decay) else decay)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        history._restore(saved, path)
        return history

    def _restore(self, saved: Mapping[str, npt.NDArray[Any]], path: files.Path) -> None:
        """Take over what `save` wrote, once it is found to be something that can have been saved."""
        self._seen = int(saved["seen"])
        if not 0 <= self._seen <= files.MOST_COUNT:
            files.refuse(f"{path}: seen", f"is {self._seen}, allowed are 0 to {files.MOST_COUNT}")
        plane = (self.n_layers, self.n_logical)
        shapes = {"recent": (len(self), *plane), "weights": (2,), "mean": plane, "deviation": plane}
        for name, shape in shapes.items():
            if saved[name].shape != shape:
                files.refuse(f"{path}: {name}", f"has shape {list(saved[name].shape)}, allowed is {list(shape)}")
            most = sys.float_info.max if name == "deviation" else files.MOST_COUNT
            odd = ~((saved[name] >= 0) & (saved[name] <= most))  # true for NaN as well
            if odd.any():
                files.refuse(f"{path}: {name}", f"has {saved[name][odd][0]}, allowed are 0 to {most}")
        self._weight, self._pairs = saved["weights"].tolist()
        if (
            self.decay is not None
            and self._seen
            and not (
                1 <= self._weight <= self._seen
                and (self._seen > 1) <= (self._pairs > 0)
                and self._pairs <= self._weight**2
            )
        ):
            files.refuse(
                f"{path}: weights", f"are {saved['weights'].tolist()}, allowed are sums of {self._seen} weights"
            )
        self._mean, self._deviation = saved["mean"], saved["deviation"]
        self._recent[self._ring()] = saved["recent"]


_SAVED = ("window", "decay", "seen", "recent", "weights", "mean", "deviation")


def _said(array: npt.NDArray[Any]) -> str:
    return f"{array.dtype} {list(array.shape)}"


def _checked_decay(decay: float | None) -> float | None:
    if decay is None:
        return None
    number = real_number("decay", decay)
    if not 0 < number < 1:
        raise ValueError(f"decay is {decay}, allowed are numbers above 0 and below 1")
    return number


def _checked(given: object, name: str, shape: tuple[int | None, ...], words: str) -> _Floats:
    """Return counts as a new float64 array of that shape; ``None`` stands for any size."""
    if not isinstance(given, (torch.Tensor, np.ndarray)):
        raise TypeError(f"{name} is {seen(given)}, allowed is a tensor or an array")
    counts = files.numbers(files.on_host(given, name), name)
    if counts.ndim != len(shape) or any(want not in (None, got) for want, got in zip(shape, counts.shape, strict=True)):
        allowed = [("batches" if want is None else want) for want in shape]
        raise ValueError(
            f"{name} has shape {list(counts.shape)}, allowed is {words} = [{', '.join(map(str, allowed))}]"
        )
    return files.checked_counts(counts, name).astype(np.float64)
