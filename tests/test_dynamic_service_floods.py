"""What comes to a port that is open: scans, frames of a gigabyte, messages without end, connections without number."""

import contextlib
import errno
import logging
import socket
import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import zmq
from test_dynamic_service import PATIENCE, SHORT, ask, refusal, running, wait_until
from test_dynamic_service_faults import process
from test_dynamic_service_wire import KEY, mirrored, problem

from lplb.dynamic import wire
from lplb.dynamic.door import Door
from lplb.dynamic.dropped import Dropped
from lplb.dynamic.keys import Keys

# ---- a port scan, and a frame of a gigabyte


GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00"  # ZMTP 3.0, RFC 23
GIGABYTE = struct.pack(">Q", 2**30)


def greeting(mechanism, as_server=False):
    return GREETING + mechanism.ljust(20, b"\0") + bytes([as_server]) + bytes(31)


def ready(kind):
    command = b"\x05READY" + b"\x0bSocket-Type" + struct.pack(">I", len(kind)) + kind
    return b"\x04" + bytes([len(command)]) + command


def host_and_port(address):
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    return host, int(port)


SCANS = {
    "nothing": [],
    "HTTP": [b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"],
    "TLS": [bytes.fromhex("16030100f8010000f40303") + bytes(range(200))],
    "random": [np.random.default_rng(22).bytes(4096)],
    "half a greeting": [GREETING[:5]],
    "another mechanism": [greeting(b"PLAIN")],
    "an older version": [b"\xff" + bytes(8) + b"\x7f\x01\x05"],
    "no handshake": [greeting(b"NULL")],
    "rubbish for a handshake": [greeting(b"CURVE"), np.random.default_rng(23).bytes(300)],
}


@pytest.mark.parametrize("key", [None, KEY], ids=["no key", "key"])
def test_a_port_scan(key, caplog):
    asked = problem(np.random.default_rng(24))
    with running(auth_key=key) as server, contextlib.ExitStack() as stack:
        for _ in range(5):
            for pieces in SCANS.values():
                scan = stack.enter_context(socket.create_connection(host_and_port(server.address), PATIENCE))
                with contextlib.suppress(OSError):
                    for piece in pieces:
                        scan.sendall(piece)
        for _ in range(20):
            socket.create_connection(host_and_port(server.address), PATIENCE).close()
        assert ask(server.address, asked, auth_key=key) == mirrored(asked)  # with the others still connected
    assert sum("refused a connection" in record.getMessage() for record in caplog.records) <= 1
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def swallowed(sock, most, piece=bytes(2**16)):
    """How many bytes the other side takes before it hangs up."""
    sock.settimeout(PATIENCE)
    sent = 0
    with contextlib.suppress(OSError):
        while sent < most:
            sock.sendall(piece)
            sent += len(piece)
    return sent


def memory(pid, of):
    with open(f"/proc/{pid}/status") as status:
        return int(next(line for line in status if line.startswith(f"{of}:")).split()[1]) * 1024


def peak(pid):
    return memory(pid, "VmPeak")


def greet(sock, pieces):
    """Send a greeting, wait for the other side's, and go on."""
    sock.settimeout(PATIENCE)
    sock.sendall(pieces[0])
    seen = b""
    while len(seen) < 64:
        seen += sock.recv(4096)
    for piece in pieces[1:]:
        sock.sendall(piece)


GIANTS = {
    "a message": (None, [greeting(b"NULL"), ready(b"DEALER"), b"\x02" + GIGABYTE]),
    "a message of many frames": (None, [greeting(b"NULL"), ready(b"DEALER"), b"\x01\x01x", b"\x03" + GIGABYTE]),
    "a command": (None, [greeting(b"NULL"), b"\x06" + GIGABYTE]),
    "a command before the key is shown": (KEY, [greeting(b"CURVE"), b"\x06" + GIGABYTE]),
    "a message before the key is shown": (KEY, [greeting(b"CURVE"), b"\x02" + GIGABYTE]),
}


def test_a_frame_of_a_gigabyte_is_neither_made_room_for_nor_taken():
    asked = problem(np.random.default_rng(25))
    for key in (None, KEY):
        with process(key=key) as (scheduler, address):
            assert ask(address, asked, auth_key=key) == mirrored(asked)
            before = peak(scheduler.pid)
            for name, (its_key, pieces) in GIANTS.items():
                if its_key == key:
                    with socket.create_connection(host_and_port(address), PATIENCE) as sock:
                        greet(sock, pieces)
                        assert swallowed(sock, 2**30) < 2**26, name  # what the system's own buffers take
            assert ask(address, asked, 1, auth_key=key) == mirrored(asked)
            assert peak(scheduler.pid) - before < 2**28


@pytest.mark.parametrize(("part", "enough"), [(1, 2**27), (2**20, 2**31)])
def test_a_message_without_end_is_cut_off_and_its_memory_given_back(part, enough):
    """Each frame is allowed; ZeroMQ keeps them all until the last, which never comes."""
    asked, most = problem(np.random.default_rng(30)), 2**26
    head = b"\x01\x01" if part == 1 else b"\x03" + struct.pack(">Q", part)
    parts = (head + bytes(part)) * max(1, 2**16 // part)
    with process(memory=most) as (scheduler, address):
        assert ask(address, asked) == mirrored(asked)
        before = memory(scheduler.pid, "VmRSS")
        for _ in range(2):
            with socket.create_connection(host_and_port(address), PATIENCE) as sock:
                greet(sock, [greeting(b"NULL"), ready(b"DEALER")])
                assert swallowed(sock, enough, parts) < enough
                wait_until(lambda: memory(scheduler.pid, "VmRSS") - before < most)
                assert ask(address, asked, 1) == mirrored(asked)
        assert scheduler.poll() is None


@pytest.mark.parametrize("key", [None, KEY], ids=["no key", "key"])
def test_more_connections_than_files(key):
    """They do nothing, and stay as long as they are let."""
    asked = problem(np.random.default_rng(31))
    with process(key=key, files=64) as (scheduler, address), contextlib.ExitStack() as stack:
        assert ask(address, asked, auth_key=key) == mirrored(asked)
        for pieces in [[]] * 150 + [[greeting(b"PLAIN")]] * 10:
            with contextlib.suppress(OSError):  # closed for a moment, when there are too many
                scan = stack.enter_context(socket.create_connection(host_and_port(address), PATIENCE))
                for piece in pieces:
                    scan.sendall(piece)
        assert ask(address, asked, 1, auth_key=key) == mirrored(asked)
        assert scheduler.poll() is None


def test_an_error_of_the_system_is_said_once_and_does_not_end_the_scheduler(caplog):
    asked = problem(np.random.default_rng(32))
    with running() as server:
        receive, failed = server.scheduler._receive, []

        def fails(*arguments):
            if len(failed) < 3:
                failed.append(arguments)
                raise (OSError if len(failed) % 2 else zmq.ZMQError)(errno.EMFILE, "Too many open files")
            receive(*arguments)

        server.scheduler._receive = fails
        assert ask(server.address, asked) == mirrored(asked)
        assert len(failed) == 3
    assert sum("went on after an error: " in record.getMessage() for record in caplog.records) == 1


class Port:
    """In place of a socket: what a `Door` does to it; binding fails as often as told."""

    def __init__(self):
        self.done, self.taken = [], 0

    def bind(self, address):
        self.taken -= 1
        if self.taken >= 0:
            raise zmq.ZMQError(errno.EADDRINUSE)
        self.done.append("open")

    def unbind(self, address):
        self.done.append("shut")

    def getsockopt_string(self, option):
        return "tcp://127.0.0.1:5"


def test_a_port_is_shut_for_want_of_memory_and_opened_whatever_is_left_in_use(caplog, monkeypatch):
    now, held, port = [0.0], [1000], Port()
    door = Door(port, "tcp://127.0.0.1:0", 100, Dropped(logging.getLogger("test"), lambda: now[0]), lambda: now[0])
    monkeypatch.setattr(door._memory, "bytes", lambda: held[0])

    def later(bytes_held):
        now[0] += 1.0
        held[0] = bytes_held
        door.look()
        return port.done[-1]

    door.open()
    assert door.address == "tcp://127.0.0.1:5"
    assert later(1100) == "open"
    assert later(1101) == "shut"
    port.taken = 2
    assert [later(5000) for _ in range(3)] == ["shut", "shut", "open"]
    assert later(5100) == "open"  # shutting has not freed it
    assert later(5101) == "shut"
    assert later(5101) == "open"
    assert later(900) == "open"
    assert later(1101) == "shut"  # freed by now, so the limit is the old one
    door.not_accepted(errno.EMFILE)  # from before it was shut
    assert later(1000) == "open"
    door.not_accepted(errno.ECONNABORTED)
    assert port.done.count("shut") == 3
    door.not_accepted(errno.EMFILE)
    assert port.done.count("shut") == 4
    door.close()
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "closed all connections", "cannot listen on tcp", "closed all connections",
    ]  # fmt: skip


def test_a_gigabyte_from_what_should_be_a_scheduler():
    asked = problem(np.random.default_rng(26))
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:
        port = server.getsockname()[1]
        asking = pool.submit(refusal, f"tcp://127.0.0.1:{port}", asked, timeout=4 * SHORT)
        server.settimeout(PATIENCE)
        sock, _ = server.accept()
        with sock:
            greet(sock, [greeting(b"NULL"), ready(b"ROUTER"), b"\x02" + GIGABYTE])
            assert swallowed(sock, 2**30) < 2**26
        assert "no plan within" in asking.result(PATIENCE)


def test_a_message_without_end_from_what_should_be_a_scheduler(monkeypatch):
    monkeypatch.setattr("lplb.dynamic.client._MOST_GROWTH", 2**26)
    asked = problem(np.random.default_rng(33))
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:
        asking = pool.submit(refusal, f"tcp://127.0.0.1:{server.getsockname()[1]}", asked)
        server.settimeout(PATIENCE)
        sock, _ = server.accept()
        with sock:
            greet(sock, [greeting(b"NULL"), ready(b"ROUTER")])
            assert swallowed(sock, 2**31, b"\x03" + struct.pack(">Q", 2**20) + bytes(2**20)) < 2**31
        assert "has grown by more than 64 MiB" in asking.result(PATIENCE)


def test_a_message_of_a_gigabyte_through_the_sockets_own_door():
    """An honest socket with the key, and a frame that is larger than allowed: the connection ends, nothing else."""
    asked = problem(np.random.default_rng(27))
    envelope = wire.Envelope("problem", b"r" * 16, "model", 1, asked.digest(), 0, 4)
    with running(auth_key=KEY) as server, zmq.Context() as context, context.socket(zmq.DEALER) as sends:
        sends.linger = 0
        Keys.of(KEY.encode()).secure_client(sends)
        monitor = sends.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        sends.connect(server.address)
        sends.send_multipart([envelope.pack("problem"), bytes(2**22)])
        assert monitor.poll(1000 * PATIENCE)
        sends.disable_monitor()
        assert ask(server.address, asked, auth_key=KEY) == mirrored(asked)
