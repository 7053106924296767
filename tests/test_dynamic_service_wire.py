"""Messages of the scheduler service: what goes in comes out, and nothing else gets in; keys and what they let in."""

import dataclasses
import logging
import pickle

import msgpack
import numpy as np
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from lplb import Placement
from lplb.dynamic import keys, wire
from lplb.dynamic.dropped import Dropped
from lplb.dynamic.planning import LayerPlan, Problem, Settings

REQUEST = bytes(range(16))
ENVELOPE = wire.Envelope("ask", REQUEST, "model", 3, "00ff", 1, 4)


def problem(rng, layers=3, rows=4, ranks=4, experts=8, spare=1, most=1000, sources=True, **settings):
    """Experts dealt out at random, spare slots filled with what the rank has not got."""
    placements = []
    for _ in range(layers):
        own = rng.permutation(experts).reshape(ranks, -1)
        more = [rng.choice(np.setdiff1d(np.arange(experts), mine), spare, replace=False) for mine in own]
        placements.append(Placement(np.hstack([own, np.array(more).reshape(ranks, spare)]).ravel(), ranks, experts))
    history = rng.integers(0, most, (layers, rows, experts))
    by_source = rng.integers(0, most, (layers, ranks, experts)) if sources else None
    return Problem(tuple(placements), history, by_source, Settings(**settings))


def mirrored(asked):
    """A plan that anybody can check: the ranks in reverse order."""
    plans = []
    for before in asked.placements:
        after = before.phy2log.numpy().reshape(before.n_ranks, -1)[::-1].reshape(-1)
        moves = int((after != before.phy2log.numpy()).sum())
        plans.append(
            LayerPlan(Placement(after, before.n_ranks, before.n_logical), moves > 0, "mirrored", 1.5, 1.25, moves)
        )
    return tuple(plans)


def message(kind, body):
    return [ENVELOPE.pack(kind), *body]


def check_same(got, sent):
    assert got.placements == sent.placements
    assert got.history.dtype == np.int64
    np.testing.assert_array_equal(got.history, sent.history)
    assert (got.sources is None) == (sent.sources is None)
    if sent.sources is not None:
        assert got.sources.dtype == np.int64
        np.testing.assert_array_equal(got.sources, sent.sources)
    assert got.settings == sent.settings
    assert got.digest() == sent.digest()


@pytest.mark.parametrize("most", [2, 2**31 + 5], ids=["small", "beyond int32"])
@pytest.mark.parametrize("sources", [False, True])
def test_a_problem_comes_out_as_it_went_in(most, sources):
    settings = {"mode": "EX", "max_moves": 7, "gain": 0.9, "expert_bytes": 2**40, "group_size": 4, "steady": True}
    sent = problem(np.random.default_rng(1), most=most, sources=sources, **settings)
    check_same(wire.decode_problem(message("problem", wire.encode_problem(sent))), sent)


def test_a_large_problem_is_cut_into_frames_and_put_together_again():
    sent = problem(np.random.default_rng(2), layers=60, rows=64, ranks=32, experts=256, most=2**33)
    frames = message("problem", wire.encode_problem(sent))
    n_bytes = 60 * (288 * 4 + 64 * 256 * 8 + 32 * 256 * 8)
    assert [len(frame) for frame in frames[2:-1]] == [2**20] * (n_bytes // 2**20)
    assert len(frames) <= wire.frames_of_problem(60, 32, 256, 288)
    assert max(map(len, frames)) < wire.MOST_FRAME_BYTES
    check_same(wire.decode_problem(frames), sent)


@pytest.mark.parametrize("layers", [1, 5])
def test_plans_come_out_as_they_went_in(layers):
    asked = problem(np.random.default_rng(3), layers=layers)
    frames = message("plan", wire.encode_plans(mirrored(asked)))
    assert len(frames) <= wire.frames_of_plans(layers, asked.placements[0].n_physical)
    got = wire.decode_plans(frames, asked)
    for mine, theirs in zip(got, mirrored(asked), strict=True):
        assert mine == theirs
        assert [type(v) for v in dataclasses.astuple(mine)[1:]] == [bool, str, float, float, int]


def test_what_is_too_large_for_the_protocol_is_refused_before_it_is_sent():
    with pytest.raises(ValueError, match=r"513 rows, allowed .* 512"):
        wire.encode_problem(problem(np.random.default_rng(4), rows=513))
    few = problem(np.random.default_rng(4), layers=1)
    with pytest.raises(ValueError, match=r"body of a message has .* allowed are 1048576"):
        wire.encode_plans([dataclasses.replace(mirrored(few)[0], reason="x" * 2**20)])


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"kind": "shout"}, "kind"), ({"request": b"short"}, "request"), ({"model": ""}, "model"),
        ({"model": "m" * 201}, "model"), ({"epoch": -1}, "epoch"), ({"epoch": 2**63}, "epoch"),
        ({"epoch": True}, "epoch is a bool"), ({"epoch": "3"}, "epoch is a str"), ({"digest": "xyz"}, "digest"),
        ({"digest": ""}, "digest"), ({"rank": 4}, "rank"), ({"rank": -1}, "rank"), ({"size": 2**20}, "rank"),
        ({"more": 1}, "envelope has"), ({"model": None}, "model is a NoneType"), ({"lplb": "1"}, "version"),
    ],
)  # fmt: skip
def test_an_envelope_is_checked(change, why):
    content = {"lplb": 1, **ENVELOPE._asdict()}
    assert wire.decode_envelope([msgpack.packb(content)]) == ENVELOPE
    with pytest.raises(wire.Rubbish, match=why):
        wire.decode_envelope([msgpack.packb(content | change)])


def test_another_version_is_told_from_rubbish_whatever_else_it_has():
    with pytest.raises(wire.OtherProtocol, match="version 2, allowed is 1") as caught:
        wire.decode_envelope([msgpack.packb({"lplb": 2, "request": REQUEST, "news": [1.5]})])
    assert caught.value.request == REQUEST
    with pytest.raises(wire.OtherProtocol):  # and so a client of version 2 is told
        wire.decode_envelope([wire.version_frame(REQUEST).replace(b"lplb\x01", b"lplb\x02")])


class Bomb:
    """Pickled, it would raise where it is unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


def deep(n):
    return b"\x91" * n + b"\x90"


@pytest.mark.parametrize(
    "frame",
    [
        b"", b"\x00", b"\xc1", pickle.dumps(Bomb()), b"\x81", deep(3000), b"\xdf\xff\xff\xff\xff",
        b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", msgpack.packb([1, 2]), msgpack.packb({1: 2}),
        msgpack.packb({b"lplb": 1}), msgpack.packb({"lplb": msgpack.ExtType(5, b"x")}), b"\x81\xa4lplb\xa1\xff",
        b"x" * 5000,
    ],
    ids=lambda frame: frame[:6].hex(),
)  # fmt: skip
def test_rubbish_is_no_envelope_and_no_body(frame):
    with pytest.raises(wire.Rubbish):
        wire.decode_envelope([frame])
    asked = problem(np.random.default_rng(5), layers=1)
    for decode in (wire.decode_problem, wire.decode_state, wire.decode_reason, lambda m: wire.decode_plans(m, asked)):
        with pytest.raises(wire.Rubbish):
            decode(message("problem", [frame]))
        with pytest.raises(wire.Rubbish):
            decode(message("problem", []))


def changed(body, **changes):
    """The first frame of a body with other values."""
    return [msgpack.packb(msgpack.unpackb(body[0]) | changes), *body[1:]]


def described(body, number, entry):
    arrays = msgpack.unpackb(body[0])["arrays"]
    arrays[number] = entry
    return changed(body, arrays=arrays)


BAD_PROBLEMS = {
    "a dtype that is none": lambda b: described(b, 1, ["|O", [3, 4, 8]]),
    "a dtype of other bytes": lambda b: described(b, 1, [">i4", [3, 4, 8]]),
    "floats for loads": lambda b: described(b, 1, ["<f4", [3, 4, 8]]),
    "a dtype that is a number": lambda b: described(b, 1, [4, [3, 4, 8]]),
    "a shape with more than there is": lambda b: described(b, 1, ["<i4", [3, 4, 9]]),
    "a shape of petabytes": lambda b: described(b, 1, ["<i4", [2**31 - 1, 2**31 - 1, 2**20]]),
    "a shape below 0": lambda b: described(b, 1, ["<i4", [-3, -4, 8]]),
    "a shape of floats": lambda b: described(b, 1, ["<i4", [3.0, 4, 8]]),
    "a shape of bools": lambda b: described(b, 1, ["<i4", [True, 4, 24]]),
    "two dimensions": lambda b: described(b, 1, ["<i4", [12, 8]]),
    "no shape": lambda b: described(b, 1, ["<i4"]),
    "other layers": lambda b: described(b, 1, ["<i4", [4, 3, 8]]),
    "other sources": lambda b: described(b, 2, ["<i4", [4, 3, 8]]),
    "no layers": lambda b: [changed(b, arrays=[["<i4", [0, 12]], ["<i4", [0, 4, 8]]])[0]],
    "one array": lambda b: changed(b, arrays=[["<i4", [3, 12]]]),
    "four arrays": lambda b: changed(b, arrays=[["<i4", [3, 12]]] * 4),
    "arrays that are a number": lambda b: changed(b, arrays=3),
    "a frame too few": lambda b: b[:-1],
    "a frame too many": lambda b: [*b, b"more"],
    "loads below 0": lambda b: [b[0], b[1][:144] + b"\xff" * 4 + b[1][148:]],
    "no ranks": lambda b: changed(b, n_ranks=0),
    "ranks without end": lambda b: changed(b, n_ranks=2**40),
    "another name": lambda b: changed(b, more=1),
    "settings with another name": lambda b: changed(b, settings={"mode": "A2A"}),
    "settings with a list": lambda b: changed(b, settings=msgpack.unpackb(b[0])["settings"] | {"gain": [1]}),
    "settings with NaN": lambda b: changed(b, settings=msgpack.unpackb(b[0])["settings"] | {"gain": float("nan")}),
}


@pytest.mark.parametrize("spoil", BAD_PROBLEMS.values(), ids=BAD_PROBLEMS)
def test_a_problem_that_is_none_is_rubbish(spoil):
    body = wire.encode_problem(problem(np.random.default_rng(6)))
    with pytest.raises(wire.Rubbish):
        wire.decode_problem(message("problem", spoil(body)))


def test_a_problem_that_planning_refuses_is_an_error_not_rubbish():
    body = wire.encode_problem(problem(np.random.default_rng(7)))
    settings = msgpack.unpackb(body[0])["settings"]
    for spoiled in (changed(body, settings=settings | {"mode": "XX"}), [body[0], b"\0" * 144 + body[1][144:]]):
        with pytest.raises((TypeError, ValueError)) as caught:
            wire.decode_problem(message("problem", spoiled))
        assert not isinstance(caught.value, wire.Rubbish)


def with_plan(asked, layer=0, **changes):
    plans = list(mirrored(asked))
    plans[layer] = dataclasses.replace(plans[layer], **changes)
    return wire.encode_plans(plans)


def other_sizes(asked):
    return wire.encode_plans(mirrored(problem(np.random.default_rng(9), layers=3, ranks=2)))


def with_slots(asked, slots):
    """Layer 1's slots replaced, unchecked."""
    body = wire.encode_plans(mirrored(asked))
    table = np.frombuffer(body[1][: 3 * 12 * 4], "<i4").reshape(3, 12).copy()
    table[1] = slots(table[1])
    return [body[0], table.tobytes() + body[1][3 * 12 * 4 :]]


BAD_PLANS = {
    "fewer layers": lambda p: wire.encode_plans(mirrored(p)[:-1]),
    "other sizes": other_sizes,
    "a reason too long": lambda p: with_plan(p, reason="x" * 1001),
    "a reason that is none": lambda p: changed(wire.encode_plans(mirrored(p)), reasons=[1, 2, 3]),
    "moves that are not said": lambda p: with_plan(p, n_moves=0),
    "moves that are not worth it": lambda p: with_plan(p, worth=False),
    "imbalance without end": lambda p: with_plan(p, imbalance_before=float("inf")),
    "an imbalance that is no number": lambda p: with_plan(p, imbalance_after=float("nan")),
    "imbalance below 0": lambda p: with_plan(p, imbalance_after=-1.0),
    "an expert without a slot": lambda p: with_slots(p, lambda s: np.where(s == s[0], (s[0] + 1) % 8, s)),
    "an expert that is none": lambda p: with_slots(p, lambda s: np.r_[8, s[1:]]),
    "an expert below 0": lambda p: with_slots(p, lambda s: np.r_[-1, s[1:]]),
    "an expert twice on a rank": lambda p: with_slots(p, lambda s: np.r_[s[:2], s[0], s[3:]]),
}


@pytest.mark.parametrize("spoil", BAD_PLANS.values(), ids=BAD_PLANS)
def test_plans_that_do_not_fit_the_problem_are_rubbish(spoil):
    asked = problem(np.random.default_rng(8))
    with pytest.raises(wire.Rubbish):
        wire.decode_plans(message("plan", spoil(asked)), asked)


def test_reasons_of_plans_are_made_harmless():
    asked = problem(np.random.default_rng(11))
    got, *others = wire.decode_plans(
        message("plan", with_plan(asked, reason="one\nline\x1b[31m \x00\u202e two")), asked
    )
    assert got.reason == "one line [31m two"
    assert [plan.reason for plan in others] == ["mirrored"] * 2


def test_a_plan_across_groups_or_budget_is_rubbish():
    halves = Placement([0, 1, 1, 0, 2, 3, 3, 2], 4)
    across = Placement([2, 3, 3, 2, 0, 1, 1, 0], 4)  # closed as well
    mixed = Placement([0, 2, 1, 0, 2, 3, 3, 1], 4)
    history = np.ones((1, 1, 4), dtype=np.int64)
    asked = Problem((halves,), history, None, Settings(group_size=2))
    for after, moves in ((across, 8), (mixed, 2)):
        body = wire.encode_plans([LayerPlan(after, True, "", 1.0, 1.0, moves)])
        if after is across:
            assert wire.decode_plans(message("plan", body), asked)[0].placement == after
        else:
            with pytest.raises(wire.Rubbish, match="groups"):
                wire.decode_plans(message("plan", body), asked)
    small = Problem((halves,), history, None, Settings(mode="EX", max_moves=7))
    with pytest.raises(wire.Rubbish, match="8 moves in all layers, allowed by the budget are 7"):
        wire.decode_plans(message("plan", wire.encode_plans([LayerPlan(across, True, "", 1.0, 1.0, 8)])), small)


@given(st.data())
def test_spoiled_bytes_are_refused_in_order(data):
    """One byte of a message is another, or it ends early: still a message, or an error of the right kind."""
    asked = problem(np.random.default_rng(10), layers=2)
    plans = data.draw(st.booleans())
    frames = (
        message("plan", wire.encode_plans(mirrored(asked))) if plans else message("problem", wire.encode_problem(asked))
    )
    number = data.draw(st.integers(0, len(frames) - 1))
    at = data.draw(st.integers(0, len(frames[number]) - 1))
    if data.draw(st.booleans()):
        frames[number] = frames[number][:at]
    else:
        frames[number] = frames[number][:at] + bytes([data.draw(st.integers(0, 255))]) + frames[number][at + 1 :]
    try:
        wire.decode_envelope(frames)
        got = wire.decode_plans(frames, asked) if plans else wire.decode_problem(frames)
    except (TypeError, ValueError):
        return
    if plans:
        assert all(sorted(set(p.placement.phy2log.tolist())) == list(range(8)) for p in got)
    else:
        assert got.history.shape == asked.history.shape


def test_words_are_checked_and_made_harmless():
    assert wire.decode_state(message("wait", wire.encode_state("busy"))) == "busy"
    with pytest.raises(wire.Rubbish, match="state"):
        wire.decode_state(message("wait", wire.encode_state("asleep")))
    got = wire.decode_reason(message("refused", wire.encode_reason("one\nline\x1b[31m " + "x" * 2000)))
    assert got.startswith("one line [31m xxx")
    assert got.isprintable()
    assert len(got) <= 1000


def test_what_is_dropped_is_said_once_a_minute(caplog):
    now = [0.0]
    dropped = Dropped(logging.getLogger("test"), lambda: now[0])
    for second in range(0, 121, 10):
        now[0] = float(second)
        dropped.say("one", "first kind")
    dropped.say("two", "second kind")
    assert [record.getMessage() for record in caplog.records] == [
        "first kind", "first kind (and 5 more like it before)", "first kind (and 5 more like it before)", "second kind",
    ]  # fmt: skip
    for i in range(1000):
        dropped.say(f"kind {i}", "what others send does not fill the memory")
    assert len(dropped._said) <= 64


# keys


KEY = "correct horse battery staple"
SEED = bytes.fromhex(  # openssl kdf -keylen 64 ... n:32768 r:8 p:1 SCRYPT, OpenSSL 3.0.19
    "76A734E51FB9B683C92B6A171B537995E9E3ACFBFEEA07ADFD17210702371BD5"
    "F4E16AF0634A62C24C43EF0FCD520B0D3EAC792682E428C2B5764497F863AB65"
)


def test_keys_are_scrypt_of_the_auth_key():
    derived = keys.Keys.of(KEY.encode())
    assert zmq.utils.z85.decode(derived.server_secret) == SEED[:32]
    assert zmq.utils.z85.decode(derived.client_secret) == SEED[32:]
    assert derived.server_public == zmq.curve_public(zmq.utils.z85.encode(SEED[:32]))
    assert derived.client_public == zmq.curve_public(zmq.utils.z85.encode(SEED[32:]))
    assert keys.Keys.of(b"correct horse battery stapl").server_public != derived.server_public


def test_no_key_is_shown():
    derived = keys.Keys.of(KEY.encode())
    assert repr(derived) == str(derived) == "Keys(...)"
    for odd, kind in (
        ("short", ValueError),
        ("s3cret-" * 200, ValueError),
        (["s3cret-1"], TypeError),
        ("", ValueError),
    ):
        with pytest.raises(kind, match="auth_key") as caught:
            keys.checked_key(odd)
        assert "s3cret" not in str(caught.value)
        assert not odd or "short" not in str(caught.value)


def test_a_key_comes_from_the_caller_or_the_environment(monkeypatch):
    monkeypatch.delenv("EPLB_AUTH_KEY", raising=False)
    assert keys.key_from(None) is None
    monkeypatch.setenv("EPLB_AUTH_KEY", "")
    assert keys.key_from(None) is None
    monkeypatch.setenv("EPLB_AUTH_KEY", "of the environment")
    assert keys.key_from(None) == b"of the environment"
    assert keys.key_from("of the caller") == keys.key_from(b"of the caller") == b"of the caller"


@pytest.mark.parametrize(
    ("host", "own"),
    [("localhost", True), ("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("0.0.0.0", False), ("::", False),
     ("192.0.2.1", False)],
)  # fmt: skip
def test_loopback(host, own):
    assert keys.is_loopback(host) is own


def test_an_unknown_host_is_named():
    for host in ("no.such.host.invalid", "", "*"):
        with pytest.raises(ValueError, match="host is"):
            keys.is_loopback(host)
