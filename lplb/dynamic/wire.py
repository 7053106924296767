"""Messages between a scheduler and its clients: what they hold, how large they may be, and what is refused.

A message is a list of frames. The first is the envelope: who asks, for the plan of which model, epoch and problem; an
answer repeats it. The second is a body of numbers and words; the rest are raw arrays, little-endian, one behind the
other in an order that the kind of message fixes, with dtype and shape in the body, cut into frames of 1 MiB: a socket
need not hold more for anybody who has not shown the key. How many frames there are is checked too, but only once the
last one has come, for ZeroMQ shows none before: what bounds a message without end is the memory of the process, which
scheduler and client look at (`lplb.dynamic.door`, `lplb.dynamic.client`). Envelope and body are msgpack. Nothing that
is received is run, and nothing is used before its type, size and value have been checked: what fails is `Rubbish`.

    kind       body                                        arrays
    ask        -                                           -
    problem    n_ranks, n_logical, settings, arrays        placements, history, sources (or none)
    wait       state                                       -
    plan       reasons, arrays                             placements, worth, imbalances, moves
    refused    reason                                      -
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

from lplb.dynamic.planning import LayerPlan, Problem, Settings
from lplb.placement import Placement

__all__ = [
    "MOST_EXPERTS",
    "MOST_FRAME_BYTES",
    "MOST_LAYERS",
    "MOST_RANKS",
    "MOST_ROWS",
    "PROTOCOL",
    "Envelope",
    "Frames",
    "OtherProtocol",
    "Rubbish",
    "decode_envelope",
    "decode_plans",
    "decode_problem",
    "decode_reason",
    "decode_state",
    "encode_plans",
    "encode_problem",
    "encode_reason",
    "encode_state",
    "frames_of_plans",
    "frames_of_problem",
    "one_line",
    "version_frame",
]

PROTOCOL = 1
KINDS = ("ask", "problem", "wait", "plan", "refused")
STATES = ("missing", "planning", "busy")
"""Of a problem at the scheduler: rank 0 has not sent it; it is planned or in the queue; the queue is full."""

MOST_LAYERS, MOST_ROWS, MOST_RANKS, MOST_EXPERTS = 1024, 512, 2**14, 2**14
MOST_FRAME_BYTES = 2**20 + 2**10
"""For `zmq.MAXMSGSIZE`: a full frame, and what CURVE adds to it."""

_ENVELOPE_BYTES, _BODY_BYTES, _PIECE_BYTES = 2**11, 2**20, 2**20
_MODEL_LENGTH, _DIGEST_LENGTH, _REASON_LENGTH = 200, 128, 1000  # characters
_REQUEST_BYTES = 16

Frames = list[bytes]


class Rubbish(ValueError):
    """What was received is no message of this protocol."""


class OtherProtocol(Rubbish):
    """What was received is of another version; `envelope` is what both versions have."""

    def __init__(self, version: int, request: bytes) -> None:
        """See the class."""
        super().__init__(f"protocol version {version}, allowed is {PROTOCOL}")
        self.version = version
        self.request = request


def _rubbish(why: str) -> NoReturn:
    raise Rubbish(why)


class Envelope(NamedTuple):
    """Who asks for what; answers repeat it."""

    kind: str
    """One of `KINDS`."""
    request: bytes
    """16 random bytes, new for each plan that a client asks for, and the same when it asks again."""
    model: str
    """What the plan is for, 1 to 200 characters."""
    epoch: int
    """Number of the cycle, 0 to 2**63 - 1."""
    digest: str
    """Of the problem, in hex, at most 128 characters."""
    rank: int
    """Who asks."""
    size: int
    """Of how many ranks."""

    @property
    def key(self) -> tuple[str, int, str]:
        """What an answer is for."""
        return self.model, self.epoch, self.digest

    def pack(self, kind: str) -> bytes:
        """The frame, as a message of another kind.

        Raises:
            ValueError: a field is not allowed.
        """
        import msgpack  # type: ignore[import-untyped, import-not-found, unused-ignore]

        _check_envelope(self._replace(kind=kind))
        frame: bytes = msgpack.packb({"lplb": PROTOCOL, **self._asdict(), "kind": kind})
        return frame


def version_frame(request: bytes) -> bytes:
    """What a client of another protocol is told: the two fields that every version has."""
    import msgpack

    frame: bytes = msgpack.packb({"lplb": PROTOCOL, "request": request})
    return frame


def _check_envelope(seen: Envelope) -> None:
    if seen.kind not in KINDS:
        _rubbish(f"kind is {seen.kind!r:.40}, allowed are {', '.join(KINDS)}")
    if len(seen.request) != _REQUEST_BYTES:
        _rubbish(f"request has {len(seen.request)} bytes, allowed are {_REQUEST_BYTES}")
    if not 1 <= len(seen.model) <= _MODEL_LENGTH:
        _rubbish(f"model has {len(seen.model)} characters, allowed are 1 to {_MODEL_LENGTH}")
    if not 0 <= seen.epoch < 2**63:
        _rubbish(f"epoch is {seen.epoch}, allowed is 0 to 2**63 - 1")
    if not (1 <= len(seen.digest) <= _DIGEST_LENGTH and set(seen.digest) <= set("0123456789abcdef")):
        _rubbish(f"digest has {len(seen.digest)} characters, allowed are 1 to {_DIGEST_LENGTH} hex digits")
    if not 0 <= seen.rank < seen.size <= MOST_RANKS:
        _rubbish(f"rank {seen.rank} of {seen.size}, allowed are ranks of at most {MOST_RANKS}")


def decode_envelope(frames: Sequence[bytes]) -> Envelope:
    """Return the envelope of a message.

    Raises:
        OtherProtocol: the message is of another version.
        Rubbish: the first frame is no envelope.
    """
    if not frames:
        _rubbish("a message without frames")
    content = _unpacked("envelope", frames[0], _ENVELOPE_BYTES)
    version, request = content.pop("lplb", None), content.get("request")
    if type(version) is not int or type(request) is not bytes:
        _rubbish("an envelope without version or request")
    if version != PROTOCOL:
        raise OtherProtocol(version, request)
    kinds = {"kind": str, "request": bytes, "model": str, "epoch": int, "digest": str, "rank": int, "size": int}
    _check_fields("envelope", content, kinds)
    envelope = Envelope(**content)
    _check_envelope(envelope)
    return envelope


def frames_of_problem(n_layers: int, n_ranks: int, n_logical: int, n_physical: int) -> int:
    """Most frames that the problem of such a model needs."""
    return _frames_for(n_layers * (4 * n_physical + 8 * n_logical * (MOST_ROWS + n_ranks)))


def frames_of_plans(n_layers: int, n_physical: int) -> int:
    """Frames that the plans of such a model need."""
    return _frames_for(n_layers * (4 * n_physical + 1 + 16 + 8))


def _frames_for(n_bytes: int) -> int:
    return 2 - n_bytes // -_PIECE_BYTES


# ---- problems


def encode_problem(problem: Problem) -> Frames:
    """The body and arrays of a problem.

    Raises:
        ValueError: it is larger than a message may be.
    """
    first, history = problem.placements[0], problem.history
    for name, value, most in (
        ("layers", len(problem.placements), MOST_LAYERS),
        ("rows", history.shape[1], MOST_ROWS),
        ("ranks", first.n_ranks, MOST_RANKS),
        ("experts", first.n_logical, MOST_EXPERTS),
    ):
        if value > most:
            raise ValueError(f"the problem has {value} {name}, allowed by the scheduler's protocol are {most}")
    arrays = [_table(problem.placements), _narrow(history)]
    if problem.sources is not None:
        arrays.append(_narrow(problem.sources))
    settings = {field.name: getattr(problem.settings, field.name) for field in dataclasses.fields(problem.settings)}
    return _encoded({"n_ranks": first.n_ranks, "n_logical": first.n_logical, "settings": settings}, arrays)


def decode_problem(frames: Sequence[bytes]) -> Problem:
    """Return the problem of a message.

    Args:
        frames: the whole message, whose envelope has been read.

    Raises:
        Rubbish: it does not hold a problem.
        TypeError, ValueError: it holds one that `Placement`, `Settings` or `Problem` refuses.
    """
    body = _body(frames, {"n_ranks": int, "n_logical": int, "settings": dict, "arrays": list})
    n_ranks, n_logical = body["n_ranks"], body["n_logical"]
    if not (1 <= n_ranks <= MOST_RANKS and 1 <= n_logical <= MOST_EXPERTS):
        _rubbish(f"{n_ranks} ranks and {n_logical} experts, allowed are {MOST_RANKS} and {MOST_EXPERTS}")
    settings = _checked_settings(body["settings"])
    if len(body["arrays"]) not in (2, 3):
        _rubbish(f"{len(body['arrays'])} arrays, allowed are placements, history and sources")
    allowed = [("<i4", 2), ("<i4 <i8", 3), ("<i4 <i8", 3)][: len(body["arrays"])]
    table, history, *more = _arrays(body["arrays"], frames[2:], allowed)
    layers = len(table)
    if not 1 <= layers <= MOST_LAYERS:
        _rubbish(f"{layers} layers, allowed are 1 to {MOST_LAYERS}")
    if history.shape[0] != layers or history.shape[1] > MOST_ROWS or history.shape[2] != n_logical:
        _rubbish(f"history has shape {list(history.shape)}, allowed is [{layers}, {MOST_ROWS} or less, {n_logical}]")
    if more and more[0].shape != (layers, n_ranks, n_logical):
        _rubbish(f"sources has shape {list(more[0].shape)}, allowed is [{layers}, {n_ranks}, {n_logical}]")
    if any(array.size and array.min() < 0 for array in (history, *more)):
        _rubbish("loads below 0")
    return Problem(
        placements=tuple(Placement(row, n_ranks, n_logical) for row in table),
        history=history.astype(np.int64),
        sources=more[0].astype(np.int64) if more else None,
        settings=Settings(**settings),
    )


def _checked_settings(settings: dict[Any, Any]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(Settings)}
    if set(settings) != names:
        _rubbish(f"settings has {len(settings)} names, allowed are {', '.join(sorted(names))}")
    for name, value in settings.items():
        if value is not None and type(value) not in (bool, int, float, str):
            _rubbish(f"settings has a {type(value).__name__} as {name}, allowed are numbers, words and none")
        if isinstance(value, float) and math.isnan(value):
            _rubbish(f"settings has NaN as {name}")
    return settings


# ---- plans


def encode_plans(plans: Sequence[LayerPlan]) -> Frames:
    """The body and arrays of an answer.

    Raises:
        ValueError: it is larger than a message may be.
    """
    arrays = [
        _table([p.placement for p in plans]),
        np.array([p.worth for p in plans], dtype="u1"),
        np.array([(p.imbalance_before, p.imbalance_after) for p in plans], dtype="<f8"),
        np.array([p.n_moves for p in plans], dtype="<i8"),
    ]
    return _encoded({"reasons": [p.reason for p in plans]}, arrays)


def decode_plans(frames: Sequence[bytes], problem: Problem) -> tuple[LayerPlan, ...]:
    """Return the plans of an answer, valid for the problem, with each reason on one line.

    Args:
        frames: the whole message, whose envelope has been read.
        problem: what was asked.

    Raises:
        Rubbish: it does not hold plans, or plans that are not of this problem: other sizes, an expert without a slot,
            twice on a rank or in two groups, moves that are not what they are said to be, or more than the budget, an
            imbalance that is below 0 or not finite.
    """
    body = _body(frames, {"reasons": list, "arrays": list})
    reasons, layers = body["reasons"], len(problem.placements)
    if len(reasons) != layers or not all(type(r) is str and len(r) <= _REASON_LENGTH for r in reasons):
        _rubbish(f"{len(reasons)} reasons, allowed are {layers} texts of at most {_REASON_LENGTH} characters")
    slots = problem.placements[0].n_physical
    allowed = [("<i4", 2), ("|u1", 1), ("<f8", 2), ("<i8", 1)]
    table, worth, imbalances, moves = _arrays(body["arrays"], frames[2:], allowed)
    for name, array, shape in (
        ("placements", table, (layers, slots)),
        ("worth", worth, (layers,)),
        ("imbalances", imbalances, (layers, 2)),
        ("moves", moves, (layers,)),
    ):
        if array.shape != shape:
            _rubbish(f"{name} has shape {list(array.shape)}, allowed is {list(shape)}")
    if worth.max() > 1 or not (np.isfinite(imbalances) & (imbalances >= 0)).all():
        _rubbish("worth is neither 0 nor 1, or an imbalance is below 0 or not finite")
    plans = tuple(
        LayerPlan(
            _checked_placement(row, before, problem.settings), bool(w), one_line(reason), float(b), float(a), int(n)
        )
        for row, before, w, reason, (b, a), n in zip(
            table, problem.placements, worth, reasons, imbalances, moves, strict=True
        )
    )
    _check_moves(plans, problem)
    return plans


def _checked_placement(row: npt.NDArray[Any], before: Placement, settings: Settings) -> Placement:
    try:
        placement = Placement(row, before.n_ranks, before.n_logical)
        if settings.group_size is not None:
            placement.check_groups(settings.group_size)
    except (TypeError, ValueError) as error:
        raise Rubbish(f"a placement is not valid: {error}") from error
    return placement


def _check_moves(plans: Sequence[LayerPlan], problem: Problem) -> None:
    """What the ranks reckon with for memory must be what the placements say."""
    total = 0
    for layer, (plan, before) in enumerate(zip(plans, problem.placements, strict=True)):
        n = int((plan.placement.phy2log != before.phy2log).sum())
        if n != plan.n_moves or (n and not plan.worth):
            _rubbish(f"layer {layer} writes {n} slots, said are {plan.n_moves}, worth is {plan.worth}")
        total += n
    budget = problem.settings.budget()
    if budget is not None and total > budget:
        _rubbish(f"{total} moves in all layers, allowed by the budget are {budget}")


# ---- words


def encode_state(state: str) -> Frames:
    """The body that says what a problem waits for, one of `STATES`."""
    return _encoded({"state": state})


def decode_state(frames: Sequence[bytes]) -> str:
    """Return what the problem waits for.

    Raises:
        Rubbish: it is none of `STATES`.
    """
    state: str = _body(frames, {"state": str})["state"]
    if state not in STATES:
        _rubbish(f"state is {state!r:.40}, allowed are {', '.join(STATES)}")
    return state


def encode_reason(reason: str) -> Frames:
    """The body of a refusal; a long reason is cut off."""
    return _encoded({"reason": reason[:_REASON_LENGTH]})


def decode_reason(frames: Sequence[bytes]) -> str:
    """Return why a request was refused, on one line.

    Raises:
        Rubbish: it is no text, or too long.
    """
    reason: str = _body(frames, {"reason": str})["reason"]
    if len(reason) > _REASON_LENGTH:
        _rubbish(f"a reason of {len(reason)} characters, allowed are {_REASON_LENGTH}")
    return one_line(reason)


def one_line(text: str) -> str:
    """What others wrote, fit for a log: a space for all that is not printed, such as ESC or the end of a line."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


# ---- bodies and arrays


def _encoded(body: dict[str, Any], arrays: Sequence[npt.NDArray[Any]] = ()) -> Frames:
    import msgpack

    if arrays:
        body = {**body, "arrays": [[array.dtype.str, list(array.shape)] for array in arrays]}
    packed: bytes = msgpack.packb(body)
    if len(packed) > _BODY_BYTES:
        raise ValueError(f"the body of a message has {len(packed)} bytes, allowed are {_BODY_BYTES}")
    raw = b"".join(array.tobytes() for array in arrays)
    return [packed, *(raw[i : i + _PIECE_BYTES] for i in range(0, len(raw), _PIECE_BYTES))]


def _unpacked(name: str, frame: bytes, most: int) -> dict[str, Any]:
    import msgpack

    if len(frame) > most:
        _rubbish(f"{name} has {len(frame)} bytes, allowed are {most}")
    try:
        content = msgpack.unpackb(
            frame,
            raw=False,
            strict_map_key=True,
            max_str_len=4 * _REASON_LENGTH,
            max_bin_len=_REQUEST_BYTES,
            max_array_len=MOST_LAYERS,
            max_map_len=64,
            max_ext_len=0,
        )
    except Exception as error:  # of odd bytes parsers raise anything
        raise Rubbish(f"{name} is not msgpack: {type(error).__name__}") from error
    if not isinstance(content, dict) or not all(type(key) is str for key in content):
        _rubbish(f"{name} is a {type(content).__name__}, allowed is a map of names")
    return content


def _body(frames: Sequence[bytes], kinds: dict[str, type]) -> dict[str, Any]:
    if len(frames) < 2:
        _rubbish("a message without a body")
    body = _unpacked("body", frames[1], _BODY_BYTES)
    _check_fields("body", body, kinds)
    if len(frames) > 2 and "arrays" not in kinds:
        _rubbish(f"{len(frames) - 2} frames of arrays, allowed are none")
    return body


def _check_fields(name: str, content: dict[str, Any], kinds: dict[str, type]) -> None:
    if set(content) != set(kinds):
        _rubbish(f"{name} has {sorted(content)!r:.200}, allowed are {', '.join(sorted(kinds))}")
    for field, kind in kinds.items():
        if type(content[field]) is not kind:
            _rubbish(f"{field} is a {type(content[field]).__name__}, allowed is {kind.__name__}")


def _arrays(
    described: list[Any], pieces: Sequence[bytes], allowed: Sequence[tuple[str, int]]
) -> list[npt.NDArray[Any]]:
    """Arrays from their raw bytes, read-only; ``allowed`` has their dtypes, and how many dimensions."""
    if len(described) != len(allowed):
        _rubbish(f"{len(described)} arrays, allowed are {len(allowed)}")
    found = [_checked_shape(entry, *kind) for entry, kind in zip(described, allowed, strict=True)]
    sizes = [math.prod(shape) * np.dtype(dtype).itemsize for dtype, shape in found]
    if sum(sizes) != sum(len(piece) for piece in pieces):
        _rubbish(f"arrays of {sum(len(piece) for piece in pieces)} bytes, described are {sizes}")
    raw = b"".join(pieces)
    ends = np.cumsum(sizes)
    return [
        np.frombuffer(raw[end - size : end], dtype=dtype).reshape(shape)
        for (dtype, shape), size, end in zip(found, sizes, ends, strict=True)
    ]


def _checked_shape(described: object, dtypes: str, dimensions: int) -> tuple[str, list[int]]:
    if not isinstance(described, list) or len(described) != 2 or not isinstance(described[1], list):
        _rubbish("an array without dtype and shape")
    dtype, shape = described
    if type(dtype) is not str or dtype not in dtypes.split():
        _rubbish(f"an array of dtype {dtype!r:.40}, allowed are {dtypes}")
    if len(shape) != dimensions or not all(type(n) is int and 0 <= n < 2**31 for n in shape):
        _rubbish(f"an array of shape {shape!r:.80}, allowed are {dimensions} dimensions")
    return dtype, shape


def _table(placements: Sequence[Placement]) -> npt.NDArray[np.int32]:
    return np.stack([p.phy2log.numpy() for p in placements]).astype("<i4")


def _narrow(counts: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """Half the bytes where the values allow it."""
    small = not counts.size or (counts.max() < 2**31 and counts.min() >= -(2**31))
    return counts.astype("<i4" if small else "<i8")
