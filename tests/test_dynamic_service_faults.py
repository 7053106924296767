"""What the scheduler service must survive, each with real sockets on loopback."""

import contextlib
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

import msgpack
import numpy as np
import pytest
import zmq
from test_dynamic_service import PATIENCE, SHORT, ask, client, dealer, gives_up, refusal, running, wait_until
from test_dynamic_service_wire import KEY, Bomb, mirrored, problem

from lplb.dynamic import wire
from lplb.dynamic.keys import Keys

# ---- a scheduler that dies


PROGRAM = """
import resource, sys, time
sys.path[:0] = {path!r}
from test_dynamic_service import FLAGS, mirrored
from lplb.dynamic.scheduler import Scheduler
def plan(problem):
    time.sleep({seconds})
    return mirrored(problem)
if {files}:
    resource.setrlimit(resource.RLIMIT_NOFILE, ({files}, {files}))
scheduler = Scheduler(FLAGS, port={port}, auth_key={key!r}, plan=plan, most_memory={memory})
scheduler.serve(lambda address: print(address, flush=True))
"""


@contextlib.contextmanager
def process(seconds=0.0, port=0, key=None, files=0, memory=None):
    """A scheduler that may be killed, with so many files at most, and its address."""
    program = PROGRAM.format(
        path=[os.path.dirname(__file__)], seconds=seconds, port=port, key=key, files=files, memory=memory
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as started:
        try:
            yield started, started.stdout.readline().strip()
        finally:
            started.kill()


def test_killed_while_it_plans_and_started_anew():
    asked = problem(np.random.default_rng(1))
    with ThreadPoolExecutor(2) as pool:
        with process(seconds=3600) as (first, address):
            asking = [pool.submit(ask, address, asked, rank, timeout=2 * PATIENCE) for rank in (0, 1)]
            gives_up(address, asked, "is planning", 2)
            first.kill()
            first.wait()
            gives_up(address, asked, "nothing answers", 2)
        port = int(address.rpartition(":")[2])
        with running(port=port):
            assert [future.result(2 * PATIENCE) for future in asking] == [mirrored(asked)] * 2


def test_stopped_and_let_go_on():
    """It neither answers nor closes: the client gives up in time, and the next one is served."""
    asked = problem(np.random.default_rng(2))
    with process() as (stopped, address):
        assert ask(address, asked) == mirrored(asked)
        stopped.send_signal(signal.SIGSTOP)
        assert "no plan within" in refusal(address, problem(np.random.default_rng(3)), timeout=SHORT)
        stopped.send_signal(signal.SIGCONT)
        assert ask(address, asked, 1) == mirrored(asked)


def test_nobody_there():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert "nothing answers" in refusal(f"tcp://127.0.0.1:{port}", problem(np.random.default_rng(4)), timeout=SHORT)


# ---- a scheduler that is none


class Fake:
    """A socket that answers every request with what `answer` makes of it, in place of a scheduler."""

    def __init__(self, answer, key=None):
        self._answer = answer
        self._stop = threading.Event()
        self.context = zmq.Context()
        self.router = self.context.socket(zmq.ROUTER)
        self.router.linger = 0
        if key is not None:
            self.gate = Keys.of(key.encode()).secure_server(self.router)
        self.address = f"tcp://127.0.0.1:{self.router.bind_to_random_port('tcp://127.0.0.1')}"
        self.asked = []
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self):
        while not self._stop.is_set():
            if self.router.poll(20):
                name, *frames = self.router.recv_multipart()
                envelope = wire.decode_envelope(frames)
                self.asked.append(envelope)
                for answer in self._answer(envelope, frames):
                    self.router.send_multipart([name, *answer])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()
        self.router.close()
        self.context.term()


def plan_message(envelope, asked, **other):
    return [envelope._replace(**other).pack("plan"), *wire.encode_plans(mirrored(asked))]


def garbage(asked):
    """By name: what may come instead of a plan; a function of the envelope that was sent."""
    rng = np.random.default_rng(5)
    good = wire.encode_plans(mirrored(asked))
    return {
        "an empty frame": lambda e: [b""],
        "random bytes": lambda e: [rng.bytes(300), rng.bytes(300)],
        "a pickle": lambda e: [pickle.dumps(Bomb())],
        "a pickle for a body": lambda e: [e.pack("plan"), pickle.dumps(Bomb())],
        "an envelope alone": lambda e: [e.pack("plan")],
        "a body cut off": lambda e: [e.pack("plan"), good[0][:-3], good[1]],
        "arrays cut off": lambda e: [e.pack("plan"), good[0], good[1][:-3]],
        "too many frames": lambda e: [e.pack("plan"), *good, *[b"x"] * 500],
        "a question": lambda e: [e.pack("ask")],
        "a problem": lambda e: [e.pack("problem"), *wire.encode_problem(asked)],
        "a state that is none": lambda e: [e.pack("wait"), msgpack.packb({"state": "asleep"})],
        "an old epoch": lambda e: plan_message(e, asked, epoch=e.epoch - 1),
        "an epoch to come": lambda e: plan_message(e, asked, epoch=e.epoch + 1),
        "another model": lambda e: plan_message(e, asked, model="another"),
        "another problem": lambda e: plan_message(e, asked, digest="00" * 32),
        "a plan of another size": lambda e: plan_message(e, problem(rng, layers=2)),
        "a plan of other ranks": lambda e: plan_message(e, problem(rng, ranks=2, spare=4)),
    }


NAMES = sorted(garbage(problem(np.random.default_rng(6))))


@pytest.mark.parametrize("name", NAMES)
def test_rubbish_is_dropped_said_once_and_the_plan_is_taken_after_it(name, caplog):
    asked = problem(np.random.default_rng(7))
    rubbish = garbage(asked)[name]

    def answer(envelope, frames):
        yield from [rubbish(envelope)] * 50
        if len(fake.asked) > 1:
            yield plan_message(envelope, asked)

    with Fake(answer) as fake:
        assert ask(fake.address, asked, epoch=5) == mirrored(asked)
    assert len({envelope.request for envelope in fake.asked}) == 1  # asked again under the same number
    said = [record.getMessage() for record in caplog.records if record.name == "lplb.dynamic.client"]
    assert len(said) == 1
    assert "what came was dropped" in said[0]


def test_nothing_but_rubbish_is_no_plan_and_the_reason_says_what_came():
    asked = problem(np.random.default_rng(8))
    old = garbage(asked)["an old epoch"]
    with Fake(lambda envelope, frames: [old(envelope)]) as fake:
        reason = gives_up(fake.address, asked, "epoch 4", epoch=5)
    assert "asked was 'model', epoch 5" in reason


def test_answers_to_another_request_are_dropped_without_a_word(caplog):
    """Late ones, and doubles of what has been answered."""
    asked, other = problem(np.random.default_rng(9)), problem(np.random.default_rng(10))
    late = []

    def answer(envelope, frames):
        late.append(plan_message(envelope, other, request=os.urandom(16)))
        yield from late
        yield plan_message(envelope, asked)
        yield plan_message(envelope, other)  # nobody reads this one any more

    with Fake(answer) as fake, client(fake.address) as asks:
        for epoch in (1, 2, 3):
            assert asks.plan(asked, epoch, PATIENCE) == mirrored(asked)
    assert not [record for record in caplog.records if record.name == "lplb.dynamic.client"]


def test_a_flood_does_not_keep_a_client_beyond_its_time():
    asked = problem(np.random.default_rng(11))
    with Fake(lambda envelope, frames: [[b"rubbish"]] * 20_000) as fake:
        assert "no plan within" in refusal(fake.address, asked, timeout=SHORT)


def test_a_scheduler_that_asks_for_the_problem_for_ever_gets_it_seldom():
    asked = problem(np.random.default_rng(12))
    missing = wire.encode_state("missing")
    with Fake(lambda envelope, frames: [[envelope.pack("wait"), *missing]] * 20) as fake:
        refusal(fake.address, asked, timeout=1.0)
        assert 1 <= len(fake.asked) <= 4  # after 0, 0.1, 0.3 and 0.7 seconds
        assert {envelope.kind for envelope in fake.asked} == {"problem"}
        fake.asked.clear()
        gives_up(fake.address, asked, "has not got the problem", 1)
        assert {envelope.kind for envelope in fake.asked} == {"ask"}


def test_another_protocol_is_named_on_both_sides(caplog):
    asked = problem(np.random.default_rng(13))

    def answer(envelope, frames):
        yield [msgpack.packb({"lplb": 2, "request": os.urandom(16)})]
        yield [msgpack.packb({"lplb": 2, "request": envelope.request, "something": "new"})]

    with Fake(answer) as fake:
        assert "another protocol: protocol version 2, allowed is 1" in refusal(fake.address, asked)
    with running() as server, dealer(server.address) as sends:
        sends.send(msgpack.packb({"lplb": 7, "request": b"r" * 16, "something": "new"}))
        assert sends.poll(1000 * PATIENCE)
        assert msgpack.unpackb(sends.recv()) == {"lplb": 1, "request": b"r" * 16}
    assert any("protocol version 7, allowed is 1" in record.getMessage() for record in caplog.records)


# ---- a network that loses, doubles and reorders


class Relay:
    """Stands between clients and a scheduler; messages are lost, doubled and swapped by chance, from a seed."""

    def __init__(self, address, seed):
        self._chance = random.Random(seed)
        self._address = address
        self._stop = threading.Event()
        self.context = zmq.Context()
        self.front = self.context.socket(zmq.ROUTER)
        self.front.linger = 0
        self.address = f"tcp://127.0.0.1:{self.front.bind_to_random_port('tcp://127.0.0.1')}"
        self._backs = {}
        self._kept = defaultdict(list)
        self.fates = defaultdict(int)
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self):
        poller = zmq.Poller()
        poller.register(self.front, zmq.POLLIN)
        while not self._stop.is_set():
            for sock in dict(poller.poll(20)):
                if sock is self.front:
                    name, *frames = sock.recv_multipart()
                    self._pass_on(("up", name), frames, lambda m, n=name: self._back(n, poller).send_multipart(m))
                else:
                    name = next(n for n, back in self._backs.items() if back is sock)
                    frames = sock.recv_multipart()
                    self._pass_on(("down", name), frames, lambda m, n=name: self.front.send_multipart([n, *m]))

    def _back(self, name, poller):
        if name not in self._backs:
            back = self._backs[name] = self.context.socket(zmq.DEALER)
            back.linger = 0
            back.connect(self._address)
            poller.register(back, zmq.POLLIN)
        return self._backs[name]

    def _pass_on(self, way, frames, send):
        fate = self._chance.choice(("lost", "doubled", "kept back", "passed", "passed"))
        self.fates[fate] += 1
        if fate == "kept back":
            self._kept[way].append(frames)
            return
        for _ in range({"lost": 0, "doubled": 2, "passed": 1}[fate]):
            send(frames)
        while fate != "lost" and self._kept[way]:
            send(self._kept[way].pop())  # after what came later

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()
        self.context.destroy(linger=0)


@pytest.mark.parametrize("seed", range(2))
def test_messages_lost_doubled_and_out_of_order(seed):
    rng = np.random.default_rng(seed)
    with running() as server, Relay(server.address, seed) as relay, ThreadPoolExecutor(4) as pool:
        with contextlib.ExitStack() as stack:
            ranks = [stack.enter_context(client(relay.address, rank)) for rank in range(4)]
            for epoch in range(2):
                asked = problem(rng)
                asking = [pool.submit(rank.plan, asked, epoch, PATIENCE) for rank in ranks]
                assert [future.result(2 * PATIENCE) for future in asking] == [mirrored(asked)] * 4
                assert server.planned[asked.digest()] == 1
        assert set(relay.fates) == {"lost", "doubled", "kept back", "passed"}


# ---- what a scheduler is sent


def bad_messages():
    asked = problem(np.random.default_rng(14))
    rng = np.random.default_rng(15)
    envelope = wire.Envelope("ask", b"r" * 16, "model", 1, asked.digest(), 0, 4)
    body = wire.encode_problem(asked)
    return [
        [b""], [rng.bytes(1000)], [pickle.dumps(Bomb())], [rng.bytes(10)] * 200, [envelope.pack("plan")],
        [envelope.pack("ask"), b"more"], [envelope.pack("wait"), *wire.encode_state("busy")],
        [envelope.pack("ask")[:-1]], [msgpack.packb({"lplb": 1})], [msgpack.packb([0] * 1000)],
        [envelope.pack("problem")], [envelope.pack("problem"), pickle.dumps(Bomb())],
        [envelope.pack("problem"), body[0]], [envelope.pack("problem"), *body, b"x"],
        [envelope.pack("problem"), rng.bytes(2**20)],
    ]  # fmt: skip


@pytest.mark.parametrize("key", [None, KEY], ids=["no key", "key"])
def test_rubbish_to_the_scheduler_is_said_once_and_others_are_served(key, caplog):
    asked = problem(np.random.default_rng(16))
    with running(auth_key=key) as server, zmq.Context() as context, context.socket(zmq.DEALER) as sends:
        sends.linger = 0
        if key is not None:
            Keys.of(key.encode()).secure_client(sends)
        sends.connect(server.address)
        for message in bad_messages() * 10:
            sends.send_multipart(message)
        envelope = wire.Envelope("ask", b"r" * 16, "last", 1, asked.digest(), 0, 4)
        sends.send(envelope.pack("ask"))
        last = ""
        while last != "last":
            while not sends.poll(500):  # what a client does not take in time is dropped, so it asks again
                sends.send(envelope.pack("ask"))
            last = wire.decode_envelope(sends.recv_multipart()).model
        assert ask(server.address, asked, auth_key=key) == mirrored(asked)
    said = [record.getMessage() for record in caplog.records if "dropped" in record.getMessage()]
    assert len(said) == len(set(said)) == 2, said  # rubbish, and damaged problems


def test_a_client_that_asks_for_ever_and_never_reads_harms_nobody():
    asked, known = problem(np.random.default_rng(17)), problem(np.random.default_rng(18))
    with running() as server, dealer(server.address) as sends:
        assert ask(server.address, known) == mirrored(known)
        for i in range(5000):
            envelope = wire.Envelope("ask", i.to_bytes(16, "big"), f"model {i}", i, known.digest(), 0, 4)
            sends.send(envelope.pack("ask"))
        assert ask(server.address, asked) == mirrored(asked)
        wait_until(lambda: len(server.scheduler._board._entries) == 64)


# ---- keys


@pytest.mark.parametrize(
    ("server", "asks"), [(KEY, KEY + "!"), (KEY, None), (None, KEY)], ids=["another", "none given", "none there"]
)
def test_a_wrong_key_is_no_plan_and_is_said_once(server, asks, caplog, monkeypatch):
    monkeypatch.delenv("EPLB_AUTH_KEY", raising=False)
    asked = problem(np.random.default_rng(19))
    with running(auth_key=server) as scheduler:
        for _ in range(3):
            gives_up(scheduler.address, asked, "has another auth key", auth_key=asks)
        assert not scheduler.planned
        assert ask(scheduler.address, asked, auth_key=server) == mirrored(asked)
    said = [record.getMessage() for record in caplog.records if "refused a connection" in record.getMessage()]
    assert len(said) == 1
    assert KEY not in caplog.text


def test_the_servers_public_key_alone_lets_nobody_in():
    """Whoever learns it still needs the clients' secret key."""
    asked = problem(np.random.default_rng(20))
    envelope = wire.Envelope("ask", b"r" * 16, "model", 1, asked.digest(), 0, 4)
    good = Keys.of(KEY.encode())
    with running(auth_key=KEY) as server, zmq.Context() as context, context.socket(zmq.DEALER) as sends:
        sends.linger = 0
        sends.curve_publickey, sends.curve_secretkey = zmq.curve_keypair()
        sends.curve_serverkey = good.server_public
        monitor = sends.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_SUCCEEDED)
        sends.connect(server.address)
        sends.send(envelope.pack("ask"))
        assert monitor.poll(1000 * PATIENCE)
        assert zmq.utils.monitor.recv_monitor_message(monitor)["event"] == zmq.EVENT_HANDSHAKE_FAILED_AUTH
        assert not sends.poll(100)
        sends.disable_monitor()
        assert ask(server.address, asked, auth_key=KEY) == mirrored(asked)


def test_without_the_gate_nobody_gets_in():
    """Should the thread that checks clients die, the scheduler is closed, not open."""
    with Fake(lambda envelope, frames: [], key=KEY) as fake:
        fake.gate.stop()
        asked = problem(np.random.default_rng(21))
        assert "no plan within" in refusal(fake.address, asked, auth_key=KEY, timeout=SHORT)
        assert not fake.asked


def test_a_plan_that_is_never_taken_is_no_error_of_the_next():
    """A rank that gave up; its plan comes when nobody waits, and the next epoch is planned all the same."""
    slow, following = problem(np.random.default_rng(28)), problem(np.random.default_rng(29))
    with running() as server, client(server.address) as asks:
        server.held.add(slow.digest())
        gives_up(server.address, slow, "is planning")
        server.let_go.set()
        assert asks.plan(following, 2, PATIENCE) == mirrored(following)
        assert asks.plan(slow, 1, PATIENCE) == mirrored(slow)
        assert server.planned == {slow.digest(): 1, following.digest(): 1}
