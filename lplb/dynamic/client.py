"""A rank's side of the scheduler service: it asks for a plan, checks what comes, and never waits longer than it may."""

from __future__ import annotations

import logging
import os
import re
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

from lplb.arguments import whole_number
from lplb.dynamic import wire
from lplb.dynamic.dropped import Dropped
from lplb.dynamic.keys import KEY_VARIABLE, Keys, address_of, is_loopback, key_from, numeric, require_packages
from lplb.dynamic.planning import LayerPlan, Problem
from lplb.dynamic.resident import Resident
from lplb.dynamic.wire import Envelope, Frames

if TYPE_CHECKING:
    import zmq

__all__ = ["Client", "PlanUnavailable"]

_log = logging.getLogger(__name__)

_FIRST_RETRY, _LAST_RETRY = 0.1, 1.0  # seconds until a request is sent again; doubled each time
_CONNECT_MS, _HEARTBEAT_MS, _LOST_MS = 2000, 1000, 5000
_MESSAGES_AT_ONCE = 64
_LOOK = 0.1  # seconds between two looks at the memory
_MOST_GROWTH = 2**31  # bytes during one call; plans take a few MiB, and a message without end all there is


class PlanUnavailable(RuntimeError):
    """There is no plan to be had from the scheduler now; the placements stay as they are."""

    def __init__(self, reason: str) -> None:
        """See the class."""
        super().__init__(reason)
        self.reason = reason


class Client:
    """Asks a scheduler for plans.

    A client may be made in one thread and used in another. Sockets live within `plan` only, so nothing is connected,
    and nothing can arrive, between two plans.

    Args:
        address: ``tcp://host:port`` of the scheduler.
        rank: who asks; rank 0 sends the problem, and all ranks get the same plan.
        size: number of ranks.
        model: what is planned for, the same on all ranks and not on those of another model, 1 to 200 characters.
        auth_key: the scheduler's; by default the environment's ``EPLB_AUTH_KEY``. Without one, only a ``host`` that is
            this machine is allowed.

    Raises:
        ImportError: pyzmq or msgpack is missing; the message says how to get them.
        TypeError, ValueError: an argument is not allowed.
    """

    def __init__(self, address: str, *, rank: int, size: int, model: str, auth_key: str | bytes | None = None) -> None:
        """See the class; nothing is connected."""
        self._size = whole_number("size", size, 1, wire.MOST_RANKS)
        self._rank = whole_number("rank", rank, 0, self._size - 1)
        if not isinstance(model, str) or not 1 <= len(model) <= 200:
            raise ValueError(f"model is {model!r:.80}, allowed are texts of 1 to 200 characters")
        self._model = model
        self._address, host = _checked_address(address)
        require_packages()
        key = key_from(auth_key)
        if key is None:  # looked up once: what is checked is what is connected to
            host = numeric(host)
            if not is_loopback(host):
                raise ValueError(
                    f"address is {address!r}, allowed without an auth key are the loopback addresses, such as "
                    f"tcp://localhost:50001: set {KEY_VARIABLE} on the scheduler and on all ranks"
                )
            self._address = address_of(host, int(self._address.rpartition(":")[2]))
        self._keys = None if key is None else Keys.of(key)
        self._context: zmq.Context[Any] | None = None
        self._turn = threading.Lock()
        self._closed = False
        self._process = os.getpid()
        self._woken, self._waker = socket.socketpair()
        self._dropped = Dropped(_log)

    def __repr__(self) -> str:
        """Show who asks whom, and no key."""
        return f"Client({self._address!r}, rank={self._rank}, size={self._size}, model={self._model!r})"

    def plan(self, problem: Problem, epoch: int, timeout: float) -> tuple[LayerPlan, ...]:
        """Ask for the plan of a problem. Not collective, but the others need rank 0 to ask, too.

        Args:
            problem: the same on all ranks.
            epoch: number of the cycle.
            timeout: seconds after which this returns or raises.

        Returns:
            The scheduler's plan: of this model, epoch and problem, with placements that are valid for it.

        Raises:
            PlanUnavailable: there is none; no other exception.
        """
        try:
            patience = timeout if timeout > 0 else 0.0
            deadline = time.monotonic() + patience
            self._check_usable()
            if not self._turn.acquire(timeout=min(patience, threading.TIMEOUT_MAX)):
                raise PlanUnavailable("another thread is asking with this client")
            try:
                self._check_usable()
                return self._ask(problem, epoch, deadline)
            finally:
                self._turn.release()
        except PlanUnavailable:
            raise
        except Exception as error:
            raise PlanUnavailable(f"asking {self._address} failed: {type(error).__name__}: {error}") from error

    def close(self) -> None:
        """Give everything back; a `plan` under way in another thread raises `PlanUnavailable` at once. Idempotent."""
        self._closed = True
        if self._process != os.getpid():
            return
        try:
            self._waker.send(b"\0")
        except OSError:  # closed before
            return
        with self._turn:
            if self._context is not None:
                self._context.destroy(linger=0)
                self._context = None
            self._woken.close()
            self._waker.close()

    def _check_usable(self) -> None:
        if self._closed:
            raise PlanUnavailable("the client is closed")
        if self._process != os.getpid():
            raise PlanUnavailable("the client was made in another process")

    def _ask(self, problem: Problem, epoch: int, deadline: float) -> tuple[LayerPlan, ...]:
        import zmq

        epoch = whole_number("epoch", epoch, 0, 2**63 - 1)
        envelope = Envelope("ask", os.urandom(16), self._model, epoch, problem.digest(), self._rank, self._size)
        body = wire.encode_problem(problem)  # on all ranks, so that all refuse what is too large
        if self._context is None:
            self._context = zmq.Context()
        dealer, monitor, memory = self._context.socket(zmq.DEALER), None, Resident()
        try:
            self._set_up(dealer)
            monitor = dealer.get_monitor_socket(
                zmq.EVENT_HANDSHAKE_SUCCEEDED
                | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
                | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
                | zmq.EVENT_HANDSHAKE_FAILED_AUTH
                | zmq.EVENT_DISCONNECTED
            )
            dealer.connect(self._address)
            asking = _Asking(self, dealer, monitor, memory, problem, envelope, body if self._rank == 0 else None)
            return asking.until(deadline)
        finally:
            dealer.disable_monitor()
            dealer.close(linger=0)
            if monitor is not None:
                monitor.close(linger=0)
            memory.close()

    def _set_up(self, dealer: zmq.Socket[Any]) -> None:
        import zmq

        for option, value in (
            (zmq.LINGER, 0),
            (zmq.IMMEDIATE, 1),  # nothing waits for a scheduler that is not there
            (zmq.MAXMSGSIZE, wire.MOST_FRAME_BYTES),
            (zmq.HANDSHAKE_IVL, _CONNECT_MS),
            (zmq.CONNECT_TIMEOUT, _CONNECT_MS),
            (zmq.RECONNECT_IVL, 50),
            (zmq.RECONNECT_IVL_MAX, 1000),
            (zmq.HEARTBEAT_IVL, _HEARTBEAT_MS),
            (zmq.HEARTBEAT_TIMEOUT, _LOST_MS),
            (zmq.SNDHWM, 4),
            (zmq.RCVHWM, 16),
            (zmq.IPV6, int("[" in self._address)),
        ):
            dealer.setsockopt(option, value)
        if self._keys is not None:
            self._keys.secure_client(dealer)


class _Asking:
    """One call of `Client.plan`: the request is repeated until the answer to it comes."""

    def __init__(
        self,
        client: Client,
        dealer: zmq.Socket[Any],
        monitor: zmq.Socket[Any],
        memory: Resident,
        problem: Problem,
        envelope: Envelope,
        body: Frames | None,
    ) -> None:
        self._client, self._dealer, self._monitor = client, dealer, monitor
        self._problem, self._envelope, self._body = problem, envelope, body
        self._send_problem = body is not None
        self._most_frames = wire.frames_of_plans(len(problem.placements), problem.placements[0].n_physical)
        self._memory, self._most_memory = memory, memory.bytes() + _MOST_GROWTH
        self._pause = _FIRST_RETRY
        self._connected = False
        self._news = f"nothing answers at {client._address}"

    def until(self, deadline: float) -> tuple[LayerPlan, ...]:
        """Ask until there is a plan, a refusal, or no time."""
        import zmq

        began = time.monotonic()
        woken = self._client._woken
        poller = zmq.Poller()
        poller.register(self._monitor, zmq.POLLIN)
        poller.register(woken, zmq.POLLIN)
        next_send = began
        while True:
            now = time.monotonic()
            due = now >= next_send
            if due and self._send():
                next_send, due = now + self._pause, False
                self._pause = min(2 * self._pause, _LAST_RETRY)
            # Unsent: go on as soon as there is a connection.
            poller.register(self._dealer, zmq.POLLIN | (zmq.POLLOUT if due else 0))
            rest = max(0.0, (deadline if due else min(next_send, deadline)) - time.monotonic())
            events = dict(poller.poll(int(1000 * min(rest, _LOOK)) + 1))
            if woken.fileno() in events:
                raise PlanUnavailable("the client was closed")
            if self._memory.bytes() > self._most_memory:
                raise PlanUnavailable(
                    f"this process has grown by more than {_MOST_GROWTH >> 20} MiB since it asked: "
                    f"a message without end from {self._client._address}, or something else here"
                )
            if self._monitor in events:
                self._look()
            if events.get(self._dealer, 0) & zmq.POLLIN:
                plans = self._receive()
                if plans is not None:
                    return plans
            if time.monotonic() >= deadline:
                raise PlanUnavailable(f"no plan within {deadline - began:.3g} s: {self._news}")

    def _send(self) -> bool:
        import zmq

        kind, body = ("problem", self._body) if self._send_problem and self._body is not None else ("ask", [])
        try:
            self._dealer.send_multipart([self._envelope.pack(kind), *body], zmq.NOBLOCK)
        except zmq.Again:
            return False
        self._send_problem = False
        return True

    def _look(self) -> None:
        """Find out why nothing comes."""
        import zmq
        from zmq.utils.monitor import recv_monitor_message

        address = self._client._address
        while self._monitor.poll(0, zmq.POLLIN):
            event = recv_monitor_message(self._monitor)["event"]
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._connected, self._news = True, f"{address} does not answer"
            elif self._connected:
                self._connected, self._news = False, f"{address} has gone away"
            else:
                self._news = f"what listens at {address} has another auth key, or is no scheduler of lplb"

    def _receive(self) -> tuple[LayerPlan, ...] | None:
        import zmq

        for _ in range(_MESSAGES_AT_ONCE):
            try:
                frames = self._dealer.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return None
            try:
                plans = self._take(frames)
            except wire.OtherProtocol as error:
                if error.request == self._envelope.request:
                    raise PlanUnavailable(f"the scheduler speaks another protocol: {error}") from error
            except wire.Rubbish as error:
                self._news = f"what came was dropped: {error!s:.300}"
                self._client._dropped.say("rubbish", f"{self._client._address}: {self._news}")
            else:
                if plans is not None:
                    return plans
        return None

    def _take(self, frames: Frames) -> tuple[LayerPlan, ...] | None:
        """Return the plans if they are in the message."""
        envelope, asked = wire.decode_envelope(frames), self._envelope
        if envelope.request != asked.request:  # late, or twice
            return None
        if len(frames) > self._most_frames:
            raise wire.Rubbish(f"{len(frames)} frames, allowed are {self._most_frames}")
        if envelope.key != asked.key:
            raise wire.Rubbish(
                f"an answer of model {envelope.model!r}, epoch {envelope.epoch}, problem {envelope.digest:.8}, "
                f"asked was {asked.model!r}, epoch {asked.epoch}, problem {asked.digest:.8}"
            )
        if envelope.kind == "plan":
            return wire.decode_plans(frames, self._problem)
        if envelope.kind == "refused":
            raise PlanUnavailable(f"the scheduler refuses: {wire.decode_reason(frames)}")
        if envelope.kind != "wait":
            raise wire.Rubbish(f"an answer of kind {envelope.kind!r}")
        state = wire.decode_state(frames)
        self._send_problem = state == "missing" and self._body is not None
        self._news = {
            "missing": "the scheduler has not got the problem from rank 0",
            "planning": "the scheduler is planning",
            "busy": "the scheduler has too many problems to plan",
        }[state]
        return None


_ADDRESS = re.compile(r"tcp://(\[[0-9a-fA-F:.%\w]+\]|[\w.-]+):([0-9]{1,5})", re.ASCII)


def _checked_address(address: object) -> tuple[str, str]:
    """Return the address and the host in it."""
    match = _ADDRESS.fullmatch(address) if isinstance(address, str) else None
    if match is None or not 1 <= int(match[2]) <= 65535:
        raise ValueError(f"address is {address!r:.200}, allowed is tcp://host:port with a port of 1 to 65535")
    return match[0], match[1].strip("[]")
