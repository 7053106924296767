"""The scheduler: a process that plans for the ranks of a model, and keeps nothing that it cannot lose.

Rank 0 sends a problem, the others ask for its plan, and all get the same bytes. A scheduler only plans; whether a plan
is carried out, and when, the ranks agree on among themselves. One thread has the socket and answers at once, a second
one plans.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import Empty, Queue, SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple

from lplb.arguments import whole_number
from lplb.dynamic import planning, wire
from lplb.dynamic.door import Door
from lplb.dynamic.dropped import Dropped
from lplb.dynamic.flags import Flags
from lplb.dynamic.keys import KEY_VARIABLE, Keys, address_of, is_loopback, key_from, numeric, require_packages
from lplb.dynamic.planning import LayerPlan, Problem
from lplb.dynamic.wire import Envelope, Frames

if TYPE_CHECKING:
    import zmq

__all__ = ["Flags", "Scheduler"]

_log = logging.getLogger(__name__)

_HANDSHAKE_MS, _HEARTBEAT_MS, _LOST_MS = 2000, 2000, 10_000
_AFTER_ERROR = 0.1  # seconds
_STALE = 10.0  # seconds: clients ask again every second, so nobody waits any more
_JOIN = 5.0  # seconds that an end waits for a plan under way
_MOST_ENTRIES = 64
_MOST_QUEUED, _MOST_QUEUED_BYTES = 4, 2**30  # problems in memory, beside the one that is planned
_MESSAGES_AT_ONCE = 64  # before the loop looks at other things

Key = tuple[str, int, str]
"""Model, epoch and digest: what an answer is for."""


class _Answer(NamedTuple):
    kind: str
    """``"plan"`` or ``"refused"``; an empty one says that there is none, and that the problem is to be sent again."""
    body: Frames


@dataclass
class _Entry:
    """What is known of one problem."""

    asked: float
    """When somebody last wanted its plan."""
    planning: bool = False
    answer: _Answer | None = None
    waiting: OrderedDict[tuple[bytes, bytes], Envelope] = field(default_factory=OrderedDict)
    """By client and request: who is told when there is an answer."""


class _Board:
    """The problems of late, bounded in number and bytes; the least wanted go first."""

    def __init__(self, most_bytes: int) -> None:
        self._entries: OrderedDict[Key, _Entry] = OrderedDict()
        self._bytes = 0
        self._most_bytes = most_bytes

    def entry(self, key: Key, now: float) -> _Entry:
        """The entry of a problem, made if it is new."""
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = _Entry(now)
        entry.asked = now
        self._entries.move_to_end(key)
        while len(self._entries) > _MOST_ENTRIES:
            self._forget(next(k for k, e in self._entries.items() if not e.planning))
        return entry

    def settle(self, key: Key, answer: _Answer) -> list[tuple[bytes, Envelope]]:
        """Keep the answer to a problem; return the clients that wait for it."""
        entry = self._entries[key]
        entry.planning = False
        if not answer.kind:
            return []
        entry.answer = answer
        self._bytes += _size(answer)
        told = [(client, envelope) for (client, _), envelope in entry.waiting.items()]
        entry.waiting.clear()
        for old in [k for k, e in self._entries.items() if e.answer and k != key]:
            if self._bytes <= self._most_bytes:
                break
            self._forget(old)
        return told

    def _forget(self, key: Key) -> None:
        entry = self._entries.pop(key)
        self._bytes -= _size(entry.answer) if entry.answer else 0


def _size(answer: _Answer) -> int:
    return sum(len(frame) for frame in answer.body)


class _Job(NamedTuple):
    client: bytes
    envelope: Envelope
    frames: Frames
    entry: _Entry


class _Outcome(NamedTuple):
    job: _Job
    answer: _Answer
    damaged: str
    """Why the message was not the problem it was said to be, for its sender alone; empty if it was."""


class _Planning:
    """The thread that plans."""

    def __init__(
        self, flags: Flags, plan: Callable[[Problem], tuple[LayerPlan, ...]], done: Callable[[_Outcome], None]
    ) -> None:
        self._flags, self._plan, self._done = flags, plan, done
        self._jobs: Queue[_Job | None] = Queue()
        self._thread = threading.Thread(target=self._run, name="lplb-planning", daemon=True)
        self._thread.start()

    @property
    def full(self) -> bool:
        """Whether one more of the largest that the flags allow would be too much; one is never."""
        with self._jobs.mutex:
            waiting = [sum(map(len, job.frames)) for job in self._jobs.queue if job is not None]
        largest = self._flags.most_frames * wire.MOST_FRAME_BYTES
        return len(waiting) >= _MOST_QUEUED or (bool(waiting) and sum(waiting) + largest > _MOST_QUEUED_BYTES)

    def put(self, job: _Job) -> None:
        self._jobs.put(job)

    def end(self) -> bool:
        """Let the thread end; tell whether it has."""
        with contextlib.suppress(Empty):
            while True:
                self._jobs.get_nowait()
        self._jobs.put(None)
        self._thread.join(_JOIN)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._done(self._outcome(job))
            del job  # its problem must not wait for the next

    def _outcome(self, job: _Job) -> _Outcome:
        if time.monotonic() - job.entry.asked > _STALE:
            return _Outcome(job, _Answer("", []), "")
        try:
            problem = wire.decode_problem(job.frames)
            damaged = "" if problem.digest() == job.envelope.digest else "it has another digest than it says"
        except Exception as error:
            damaged = wire.one_line(str(error)) or type(error).__name__
        if damaged:
            return _Outcome(job, _Answer("", []), damaged)
        return _Outcome(job, self._answer(job.envelope, problem), "")

    def _answer(self, envelope: Envelope, problem: Problem) -> _Answer:
        try:
            self._flags.check(problem)
            began = time.monotonic()
            plans = self._plan(self._flags.limited(problem))
            n_worth = sum(p.worth for p in plans)
            _log.log(
                logging.INFO if n_worth else logging.DEBUG,
                "model %r, epoch %d: %d of %d layers are to change; planned in %.3g s",
                envelope.model, envelope.epoch, n_worth, len(plans), time.monotonic() - began,
            )  # fmt: skip
            return _Answer("plan", wire.encode_plans(plans))
        except (TypeError, ValueError) as error:
            reason = str(error)
        except Exception as error:
            _log.exception("planning failed for model %r, epoch %d", envelope.model, envelope.epoch)
            reason = f"planning failed: {type(error).__name__}: {error}"
        return _Answer("refused", wire.encode_reason(reason))


class Scheduler:
    """Plans for ranks that ask over TCP.

    Args:
        flags: what it plans for.
        host: name or address of the interface to listen on.
        port: 0 for any free one.
        auth_key: what clients must have too; by default the environment's ``EPLB_AUTH_KEY``. Without one, only
            ``host``\\ s that cannot be reached from other machines are allowed.
        plan: what plans.
        most_bytes: of answers kept for those who ask later.
        most_memory: bytes by which the process may grow while it listens before all connections are closed, as
            `lplb.dynamic.door` says; by default 256 MiB, ``most_bytes``, and 16 times the largest problem of ``flags``.

    Raises:
        ImportError: pyzmq or msgpack is missing.
        TypeError, ValueError: an argument is not allowed.
    """

    def __init__(
        self,
        flags: Flags,
        *,
        host: str = "localhost",
        port: int = 50001,
        auth_key: str | bytes | None = None,
        plan: Callable[[Problem], tuple[LayerPlan, ...]] = planning.plan,
        most_bytes: int = 2**26,
        most_memory: int | None = None,
    ) -> None:
        """See the class; no socket yet."""
        require_packages()
        self.flags = flags
        port = whole_number("port", port, 0, 65535)
        key = key_from(auth_key)
        self._keys = None if key is None else Keys.of(key)
        name = numeric(host)  # looked up once: what is checked is what is listened on
        if self._keys is None and not is_loopback(name):
            raise ValueError(
                f"host is {host!r}, allowed without an auth key are the loopback addresses, such as localhost: "
                f"set {KEY_VARIABLE} on the scheduler and on all ranks"
            )
        self._address = address_of(name, port)
        self._plan = plan
        self._board = _Board(most_bytes)
        if most_memory is None:
            most_memory = 2**28 + most_bytes + 16 * flags.most_frames * wire.MOST_FRAME_BYTES
        self._most_memory = whole_number("most_memory", most_memory, 1, 2**63 - 1)
        self._outcomes: SimpleQueue[_Outcome] = SimpleQueue()
        self._stopped = False
        self._woken, self._waker = socket.socketpair()
        self._woken.setblocking(False)
        self._waker.setblocking(False)
        self._dropped = Dropped(_log)

    def __repr__(self) -> str:
        """Show where it listens, and no key."""
        return f"Scheduler({self._address}, {self.flags})"

    @property
    def waker(self) -> socket.socket:
        """What wakes `serve` when a byte is written to it, for `signal.set_wakeup_fd`."""
        return self._waker

    def stop(self) -> None:
        """Let `serve` return; from any thread or signal handler."""
        self._stopped = True
        self._wake()

    def serve(self, ready: Callable[[str], None] | None = None) -> bool:
        """Listen and answer until `stop`; once.

        Args:
            ready: called with the address, ``tcp://host:port``, once clients can connect.

        Returns:
            Whether the planning thread has ended too; otherwise it ends with its plan.

        Raises:
            OSError: the address cannot be listened on.
        """
        import zmq

        context = zmq.Context()
        gate = door = None
        router = context.socket(zmq.ROUTER)
        try:
            self._set_up(router)
            if self._keys is not None:
                gate = self._keys.secure_server(router)
            monitor = router.get_monitor_socket(
                zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
                | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
                | zmq.EVENT_HANDSHAKE_FAILED_AUTH
                | zmq.EVENT_ACCEPT_FAILED
            )
            door = Door(router, self._address, self._most_memory, self._dropped)
            door.open()
            self._address = door.address
            if self._keys is None:
                _log.warning("no %s: only this machine can ask, and every user of it can", KEY_VARIABLE)
            if ready is not None:
                ready(self._address)
            return self._loop(router, monitor, door)
        finally:
            router.disable_monitor()
            router.close(linger=0)
            if gate is not None:
                gate.stop()
            context.destroy(linger=0)
            if door is not None:
                door.close()
            self._woken.close()
            self._waker.close()

    def _set_up(self, router: zmq.Socket[Any]) -> None:
        import zmq

        for option, value in (
            (zmq.LINGER, 0),
            (zmq.MAXMSGSIZE, wire.MOST_FRAME_BYTES),
            (zmq.HANDSHAKE_IVL, _HANDSHAKE_MS),
            (zmq.HEARTBEAT_IVL, _HEARTBEAT_MS),
            (zmq.HEARTBEAT_TIMEOUT, _LOST_MS),
            (zmq.RCVHWM, _MOST_QUEUED),
            (zmq.SNDHWM, 8),
            (zmq.IPV6, int("[" in self._address)),
        ):
            router.setsockopt(option, value)

    # ---- the loop

    def _loop(self, router: zmq.Socket[Any], monitor: zmq.Socket[Any], door: Door) -> bool:
        import zmq

        planner = _Planning(self.flags, self._plan, self._report)
        poller = zmq.Poller()
        for source in (router, monitor, self._woken):
            poller.register(source, zmq.POLLIN)
        try:
            while not self._stopped:
                try:
                    events = dict(poller.poll(door.pause_ms))
                    if self._woken.fileno() in events:
                        self._drain(router)
                    if monitor in events:
                        self._look(monitor, door)
                    if router in events:
                        self._receive(router, planner)
                    door.look()
                except (OSError, zmq.ZMQError) as error:  # want of something that others use up is no end
                    self._dropped.say("system", f"went on after an error: {error}")
                    time.sleep(_AFTER_ERROR)
        finally:
            ended = planner.end()
        return ended

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # full: it wakes anyway; closed: nothing to wake
            self._waker.send(b"\0")

    def _report(self, outcome: _Outcome) -> None:
        self._outcomes.put(outcome)
        self._wake()

    def _drain(self, router: zmq.Socket[Any]) -> None:
        """Hand out what the planning thread has done."""
        with contextlib.suppress(BlockingIOError):
            while self._woken.recv(4096):
                pass
        while not self._outcomes.empty():
            job, answer, damaged = self._outcomes.get()
            told = self._board.settle(job.envelope.key, answer)
            if damaged:
                self._dropped.say("damaged", f"dropped a problem of model {job.envelope.model!r:.80}: {damaged:.200}")
                reason = f"what reached the scheduler is not a problem that it can plan: {damaged}"
                self._send(router, job.client, job.envelope, _Answer("refused", wire.encode_reason(reason)))
            for client, envelope in told:
                self._send(router, client, envelope, answer)

    def _look(self, monitor: zmq.Socket[Any], door: Door) -> None:
        """Say that somebody did not get in."""
        import zmq
        from zmq.utils.monitor import recv_monitor_message

        for _ in range(_MESSAGES_AT_ONCE):
            if not monitor.poll(0, zmq.POLLIN):
                return
            seen = recv_monitor_message(monitor)
            if seen["event"] == zmq.EVENT_ACCEPT_FAILED:
                door.not_accepted(seen["value"])
            else:
                self._dropped.say("handshake", "refused a connection: another auth key than here, or no client of lplb")

    def _receive(self, router: zmq.Socket[Any], planner: _Planning) -> None:
        import zmq

        for _ in range(_MESSAGES_AT_ONCE):
            try:
                client, *frames = router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                self._take(router, planner, client, frames)
            except wire.OtherProtocol as error:
                self._dropped.say("protocol", f"dropped a message: {error}")
                self._put(router, [client, wire.version_frame(error.request)])
            except wire.Rubbish as error:
                self._dropped.say("rubbish", f"dropped a message: {error!s:.200}")

    def _take(self, router: zmq.Socket[Any], planner: _Planning, client: bytes, frames: Frames) -> None:
        """Answer a message at once: with the plan, or with what it waits for."""
        envelope = wire.decode_envelope(frames)
        if envelope.kind not in ("ask", "problem") or (envelope.kind == "ask" and len(frames) != 1):
            raise wire.Rubbish(f"a message of kind {envelope.kind!r} with {len(frames)} frames")
        reason = self._misfit(envelope, len(frames))
        if reason:
            self._send(router, client, envelope, _Answer("refused", wire.encode_reason(reason)))
            return
        entry = self._board.entry(envelope.key, time.monotonic())
        if entry.answer is not None:
            self._send(router, client, envelope, entry.answer)
            return
        entry.waiting[client, envelope.request] = envelope
        while len(entry.waiting) > self.flags.world_size + 64:  # those who gave up and asked anew
            entry.waiting.popitem(last=False)
        if envelope.kind == "problem" and not entry.planning and not planner.full:
            entry.planning = True
            planner.put(_Job(client, envelope, frames, entry))
        state = "planning" if entry.planning else "busy" if planner.full else "missing"
        self._send(router, client, envelope, _Answer("wait", wire.encode_state(state)))

    def _misfit(self, envelope: Envelope, n_frames: int) -> str:
        """Why a message cannot be for this scheduler, before its body is read; empty if it can."""
        flags = self.flags
        if envelope.size != flags.world_size:
            return (
                f"the scheduler was started with --world_size {flags.world_size}, the model has {envelope.size} ranks"
            )
        if n_frames > flags.most_frames:
            return (
                f"the problem takes {n_frames} MiB, allowed for --block_num {flags.block_num} and --expert_num "
                f"{flags.expert_num} are {flags.most_frames}"
            )
        return ""

    def _send(self, router: zmq.Socket[Any], client: bytes, envelope: Envelope, answer: _Answer) -> None:
        self._put(router, [client, envelope.pack(answer.kind), *answer.body])

    def _put(self, router: zmq.Socket[Any], frames: Frames) -> None:
        import zmq

        try:
            router.send_multipart(frames, zmq.NOBLOCK)
        except zmq.ZMQError as error:  # the client asks again, or does not care
            self._dropped.say("send", f"an answer could not be sent: {error}")
