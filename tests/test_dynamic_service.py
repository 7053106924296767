"""The scheduler service with real sockets on loopback: same plans as in place, flags, and the command line."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import zmq
from test_dynamic_service_wire import KEY, mirrored, problem

from lplb import eplb_scheduler
from lplb.dynamic import planning, scheduler, wire
from lplb.dynamic.client import Client, PlanUnavailable
from lplb.dynamic.planning import Settings
from lplb.dynamic.scheduler import Flags, Scheduler

PATIENCE = 30.0  # seconds that nothing here takes
SHORT = 0.5  # seconds after which a client that will get nothing gives up
FLAGS = Flags(world_size=4, expert_num=8, block_num=3, redundant=1)


class Running:
    """A scheduler on a thread, that plans `mirrored` and counts; the plans of `held` problems wait for `let_go`."""

    def __init__(self, flags=FLAGS, port=0, plan=mirrored, **arguments):
        self.planned = Counter()
        self.held = set()
        self.let_go = threading.Event()
        self._plan = plan
        self.scheduler = Scheduler(flags, port=port, plan=self.plan, **arguments)
        self._ready = threading.Event()
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()
        assert self._ready.wait(PATIENCE)

    def _serve(self):
        self.ended = self.scheduler.serve(self._listens)

    def _listens(self, address):
        self.address = address
        self._ready.set()

    @property
    def port(self):
        return int(self.address.rpartition(":")[2])

    def plan(self, asked):
        digest = asked.digest()
        self.planned[digest] += 1
        if digest in self.held:
            assert self.let_go.wait(PATIENCE)
        return self._plan(asked)

    def stop(self):
        self.let_go.set()
        self.scheduler.stop()
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()
        assert self.ended


@contextlib.contextmanager
def running(*arguments, **settings):
    server = Running(*arguments, **settings)
    try:
        yield server
    finally:
        server.stop()


@contextlib.contextmanager
def client(address, rank=0, size=4, model="model", **arguments):
    asks = Client(address, rank=rank, size=size, model=model, **arguments)
    try:
        yield asks
    finally:
        asks.close()


def ask(address, asked, rank=0, epoch=1, timeout=PATIENCE, **arguments):
    with client(address, rank, **arguments) as asks:
        return asks.plan(asked, epoch, timeout)


def refusal(address, asked, rank=0, epoch=1, timeout=PATIENCE, **arguments):
    with pytest.raises(PlanUnavailable) as caught:
        ask(address, asked, rank, epoch, timeout, **arguments)
    assert caught.value.reason == str(caught.value)
    return caught.value.reason


def gives_up(address, asked, why, *arguments, **settings):
    """The refusal for a reason; on a busy machine it may take a while until the reason is known."""
    for timeout in (SHORT, 4 * SHORT, 16 * SHORT):
        reason = refusal(address, asked, *arguments, timeout=timeout, **settings)
        if why in reason:
            return reason
    raise AssertionError(reason)


def all_ranks(address, asked, size=4, **arguments):
    with ThreadPoolExecutor(size) as pool:
        asking = [pool.submit(ask, address, asked, rank, size=size, **arguments) for rank in range(size)]
        return [future.result(PATIENCE) for future in asking]


@pytest.mark.parametrize("key", [None, KEY], ids=["no key", "key"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"mode": "AG", "policy": "lp"}, {"mode": "EX", "max_moves": 3}, {"policy": "eplb-distinct", "n_nodes": 2}],
    ids=["A2A", "AG", "EX", "eplb-distinct"],
)
def test_all_ranks_get_what_is_planned_in_place(key, settings):
    asked = problem(np.random.default_rng(1), rows=32, steady=True, **settings)
    flags = replace(FLAGS, mode=settings.get("mode", "A2A"), max_move=3)
    with running(flags, plan=planning.plan, auth_key=key) as server:
        plans = all_ranks(server.address, asked, auth_key=key)
        digest = planning.plans_digest(planning.plan(asked))
        assert [planning.plans_digest(plan) for plan in plans] == [digest] * 4
        assert list(server.planned.values()) == [1]


def test_ipv6():
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("needs IPv6 on loopback, which this machine has not")
    asked = problem(np.random.default_rng(23))
    with running(host="::1", auth_key=KEY) as server:
        assert server.address.startswith("tcp://[::1]:")
        assert ask(server.address, asked, auth_key=KEY) == mirrored(asked)


def test_ranks_that_ask_before_rank_0_wait_for_it():
    asked = problem(np.random.default_rng(2))
    with running() as server, ThreadPoolExecutor(3) as pool:
        early = [pool.submit(ask, server.address, asked, rank) for rank in (1, 2, 3)]
        gives_up(server.address, asked, "has not got the problem from rank 0", 1)
        assert ask(server.address, asked) == mirrored(asked)
        assert [future.result(PATIENCE) for future in early] == [mirrored(asked)] * 3
        assert list(server.planned.values()) == [1]


def test_a_rank_that_comes_late_gets_the_same_and_nothing_is_planned_twice():
    asked = problem(np.random.default_rng(3))
    with running() as server:
        for rank in (0, 3, 0, 1, 2):
            assert ask(server.address, asked, rank) == mirrored(asked)
        assert list(server.planned.values()) == [1]
        assert ask(server.address, asked, 0, epoch=2) == mirrored(asked)
        assert ask(server.address, asked, 0, model="another") == mirrored(asked)
        assert list(server.planned.values()) == [3]


def test_while_one_is_planned_others_are_answered():
    rng = np.random.default_rng(4)
    slow, known, waiting = problem(rng), problem(rng), problem(rng)
    with running() as server, ThreadPoolExecutor(3) as pool:
        server.held.add(slow.digest())
        assert ask(server.address, known) == mirrored(known)
        first = pool.submit(ask, server.address, slow, model="slow")
        second = pool.submit(ask, server.address, waiting, model="waiting")
        gives_up(server.address, slow, "is planning", 1, model="slow")
        assert ask(server.address, known, 2) == mirrored(known)
        server.let_go.set()
        assert first.result(PATIENCE) == mirrored(slow)
        assert second.result(PATIENCE) == mirrored(waiting)


def test_too_many_problems_are_put_off_not_kept():
    rng = np.random.default_rng(5)
    asked = [problem(rng) for _ in range(8)]
    with running() as server, ThreadPoolExecutor(8) as pool:
        server.held.add(asked[0].digest())
        with client(server.address) as asks, pytest.raises(PlanUnavailable):
            asks.plan(asked[0], 1, SHORT)
        asking = [pool.submit(ask, server.address, p, model=f"model {i}") for i, p in enumerate(asked)]
        gives_up(server.address, problem(rng), "too many problems", model="one more")
        server.let_go.set()
        assert [future.result(PATIENCE) for future in asking] == [mirrored(p) for p in asked]


def test_problems_that_wait_are_bounded_in_bytes(monkeypatch):
    rng = np.random.default_rng(24)
    asked = [problem(rng) for _ in range(4)]
    monkeypatch.setattr(scheduler, "_MOST_QUEUED_BYTES", FLAGS.most_frames * wire.MOST_FRAME_BYTES)
    with running() as server, ThreadPoolExecutor(4) as pool:
        server.held.add(asked[0].digest())
        asking = [pool.submit(ask, server.address, asked[0], model="planned")]
        wait_until(lambda: server.planned[asked[0].digest()] == 1)
        asking += [pool.submit(ask, server.address, asked[1], model="waits")]
        gives_up(server.address, asked[1], "is planning", 1, model="waits")
        gives_up(server.address, asked[2], "too many problems", model="put off")
        server.let_go.set()
        assert [future.result(PATIENCE) for future in asking] == [mirrored(p) for p in asked[:2]]
        assert ask(server.address, asked[2], model="put off") == mirrored(asked[2])


@pytest.mark.parametrize(("worth", "level"), [(True, "INFO"), (False, "DEBUG")])
def test_a_cycle_without_a_change_is_no_news(worth, level, caplog):
    caplog.set_level("DEBUG", "lplb.dynamic.scheduler")
    asked = problem(np.random.default_rng(25))

    def plan(given):
        stays = tuple(planning.LayerPlan(p, False, "stays", 1.0, 1.0, 0) for p in given.placements)
        return mirrored(given) if worth else stays

    with running(plan=plan) as server:
        ask(server.address, asked)
    said = [record.levelname for record in caplog.records if "layers are to change" in record.getMessage()]
    assert said == [level]


def test_answers_that_take_too_much_room_are_planned_again():
    rng = np.random.default_rng(6)
    asked = [problem(rng) for _ in range(3)]
    two = 2 * sum(map(len, wire.encode_plans(mirrored(asked[0]))))
    with running(most_bytes=two + 20) as server:
        for _ in range(2):
            for p in asked:
                assert ask(server.address, p) == mirrored(p)
        assert [server.planned[p.digest()] for p in asked] == [2, 2, 2]
        assert ask(server.address, asked[2], 1) == mirrored(asked[2])
        assert server.planned[asked[2].digest()] == 2


@contextlib.contextmanager
def dealer(address):
    """A socket that may send anything."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as sends:
        sends.linger = 0
        sends.connect(address)
        yield sends


def answers_of(sends, *kinds):
    """What comes, up to a message of one of the kinds."""
    seen = []
    while not seen or seen[-1][0].kind not in kinds:
        assert sends.poll(1000 * PATIENCE), seen
        frames = sends.recv_multipart()
        seen.append((wire.decode_envelope(frames), frames))
    return seen


def test_a_problem_with_another_digest_than_it_says_is_refused_to_its_sender_alone():
    rng = np.random.default_rng(7)
    asked, other = problem(rng), problem(rng)
    envelope = wire.Envelope("problem", b"r" * 16, "model", 1, asked.digest(), 0, 4)
    with running() as server, dealer(server.address) as sends, ThreadPoolExecutor(1) as pool:
        waits = pool.submit(ask, server.address, asked, 1)
        sends.send_multipart([envelope.pack("problem"), *wire.encode_problem(other)])
        *_, (last, frames) = answers_of(sends, "refused")
        assert last.key == envelope.key
        assert "another digest than it says" in wire.decode_reason(frames)
        assert ask(server.address, asked) == mirrored(asked)
        assert waits.result(PATIENCE) == mirrored(asked)
        assert server.planned == {asked.digest(): 1}


@pytest.mark.parametrize(
    ("flags", "settings", "why"),
    [
        ({"block_num": 30}, {}, "--block_num 30, the model has 3 MoE layers"),
        ({"expert_num": 12}, {}, "--expert_num 12, the model has 8 experts"),
        ({"redundant": 0}, {}, "--redundant 0, the model has 1 spare slots"),
        ({"world_size": 2}, {}, "--world_size 2, the model has 4 ranks"),
        ({"mode": "EX"}, {}, "--mode EX, the model has A2A as mode"),
        ({}, {"mode": "AG"}, "--mode A2A, the model has AG as mode"),
    ],
)
def test_a_model_that_the_flags_do_not_fit_is_refused(flags, settings, why):
    asked = problem(np.random.default_rng(8), **settings)
    with running(replace(FLAGS, **flags)) as server:
        reason = refusal(server.address, asked)
        assert why in reason
        assert refusal(server.address, asked, 1) == reason
        assert not server.planned


def test_a_problem_too_large_for_the_flags_is_refused_with_the_reason():
    asked = problem(np.random.default_rng(9), layers=40, rows=400, experts=64, most=2**33)
    with running(Flags(world_size=4, expert_num=8, block_num=3)) as server:
        assert "takes 9 MiB" not in refusal(server.address, problem(np.random.default_rng(9)))
        assert re.search(
            r"takes \d+ MiB, allowed for --block_num 3 and --expert_num 8 are", refusal(server.address, asked)
        )


@pytest.mark.parametrize(("own", "limit", "wanted"), [(9, 5, 5), (3, 5, 3), (None, 5, 5), (0, 5, 0), (4, 0, 0)])
def test_max_move_is_an_upper_limit_in_mode_ex(own, limit, wanted):
    seen = []

    def plan(asked):
        seen.append(asked.settings)
        return tuple(planning.LayerPlan(p, False, "stays", 1.0, 1.0, 0) for p in asked.placements)

    settings = {"mode": "EX", "max_moves": own, "max_bytes": None if own is not None else 100, "expert_bytes": 10}
    asked = problem(np.random.default_rng(10), **settings)
    with running(replace(FLAGS, mode="EX", max_move=limit), plan=plan) as server:
        assert [p.placement for p in ask(server.address, asked)] == list(asked.placements)
    assert seen == [replace(Settings(**settings), max_moves=wanted)]


def test_max_move_does_not_limit_other_modes():
    asked = problem(np.random.default_rng(11))
    with running(replace(FLAGS, max_move=0)) as server:
        assert ask(server.address, asked) == mirrored(asked)


@pytest.mark.parametrize("error", [ValueError("loads that nobody can plan"), RuntimeError("odd"), MemoryError()])
def test_what_planning_raises_is_told_to_all_and_the_scheduler_goes_on(error, caplog):
    asked, fine = problem(np.random.default_rng(12)), problem(np.random.default_rng(13))

    def plan(given):
        if given.digest() == asked.digest():
            raise error
        return mirrored(given)

    with running(plan=plan) as server:
        for rank in (0, 1):
            reason = refusal(server.address, asked, rank)
            assert str(error) in reason
            assert isinstance(error, ValueError) or f"planning failed: {type(error).__name__}" in reason
        assert ask(server.address, fine) == mirrored(fine)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"world_size": 0}, "world_size is 0, allowed is 1"), ({"world_size": 5}, "expert_num is 32.* multiple"),
        ({"expert_num": 0}, "expert_num is 0"), ({"block_num": -1}, "block_num is -1"),
        ({"block_num": 1025}, "block_num is 1025"), ({"max_move": -1}, "max_move is -1"),
        ({"redundant": 29}, "redundant is 29, allowed is 0 to 28"), ({"redundant": 1.5}, "redundant is 1.5"),
        ({"mode": "a2a"}, "mode is 'a2a', allowed are A2A, AG, EX"),
        ({"block_num": 1024, "expert_num": 16384}, "block_num is 1024"),
    ],
)  # fmt: skip
def test_flags_are_checked(given, why):
    with pytest.raises((TypeError, ValueError), match=why):
        Flags(**given)


def test_flags_have_mindies_defaults():
    assert Flags() == Flags(world_size=8, expert_num=32, block_num=30, max_move=5, redundant=0, mode="A2A")


# what a client's caller gets wrong, and how it ends


@pytest.mark.parametrize(
    ("given", "kind", "why"),
    [
        ({"address": "localhost:50001"}, ValueError, "tcp://host:port"), ({"address": 7}, ValueError, "address is 7"),
        ({"address": "tcp://localhost:0"}, ValueError, "1 to 65535"),
        ({"address": "tcp://localhost:65536"}, ValueError, "1 to 65535"),
        ({"address": "ipc:///tmp/x"}, ValueError, "tcp://host:port"),
        ({"address": "tcp://192.0.2.1:50001"}, ValueError, "allowed without an auth key are the loopback"),
        ({"rank": 4}, ValueError, "rank is 4"), ({"size": 0}, ValueError, "size is 0"),
        ({"model": ""}, ValueError, "model is ''"), ({"model": None}, ValueError, "model is None"),
        ({"auth_key": "short"}, ValueError, "auth_key has 5 bytes"), ({"auth_key": 5}, TypeError, "auth_key is a int"),
    ],
)  # fmt: skip
def test_arguments_of_a_client_are_checked(given, kind, why, monkeypatch):
    monkeypatch.delenv("EPLB_AUTH_KEY", raising=False)
    with pytest.raises(kind, match=re.escape(why)):
        Client(**({"address": "tcp://localhost:50001", "rank": 0, "size": 4, "model": "m"} | given))


def test_without_a_key_a_name_is_looked_up_once(monkeypatch):
    """Whoever answers for the name later on must not get a say in where the client connects to."""
    monkeypatch.delenv("EPLB_AUTH_KEY", raising=False)
    looked_up = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *a, **k: looked_up("127.0.0.1" if host == "here" else host, *a, **k)
    )
    asked = problem(np.random.default_rng(26))
    with running() as server, client(f"tcp://here:{server.port}") as asks:
        assert f"tcp://127.0.0.1:{server.port}" in repr(asks)
        monkeypatch.undo()
        assert asks.plan(asked, 1, PATIENCE) == mirrored(asked)


def test_a_client_may_be_told_another_machine_with_a_key():
    with client("tcp://192.0.2.1:50001", auth_key=KEY) as asks:
        assert KEY not in repr(asks)
        assert "192.0.2.1" in repr(asks)
    with client("tcp://[::1]:50001") as asks:
        assert "[::1]" in repr(asks)


@pytest.mark.parametrize(
    ("asked", "epoch", "timeout"),
    [(None, 1, 1.0), ("problem", -1, 1.0), ("problem", 1.5, 1.0), ("problem", 2**70, 1.0), ("problem", 1, "soon")],
)
def test_plan_raises_nothing_but_plan_unavailable(asked, epoch, timeout):
    asked = problem(np.random.default_rng(14)) if asked else None
    with client("tcp://localhost:9") as asks, pytest.raises(PlanUnavailable, match="failed"):
        asks.plan(asked, epoch, timeout)


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan")])
def test_no_time_is_no_plan(timeout):
    with running() as server:
        assert "no plan within" in refusal(server.address, problem(np.random.default_rng(15)), timeout=timeout)


def wait_until(so):
    """Wait for a condition, as long as patience lasts."""
    end = time.monotonic() + PATIENCE
    while not so():
        assert time.monotonic() < end
        time.sleep(0.01)


def open_files():
    return len(os.listdir("/proc/self/fd"))


def nothing_more_than(before):
    """Whether no more files are open, and no more threads run, than before."""
    return open_files() <= before[0] and threading.active_count() <= before[1]


def test_close_ends_a_plan_under_way_and_nothing_is_left():
    asked = problem(np.random.default_rng(16))
    with running() as server:
        ask(server.address, asked)
        before = open_files(), threading.active_count()
        for _ in range(5):
            asks = Client(server.address, rank=1, size=4, model="never")
            with ThreadPoolExecutor(1) as pool:
                asking = pool.submit(asks.plan, asked, 1, 10 * PATIENCE)
                wait_until(asks._turn.locked)
                with pytest.raises(PlanUnavailable, match="another thread is asking"):
                    asks.plan(asked, 1, 0.0)
                asks.close()
                assert isinstance(asking.exception(PATIENCE), PlanUnavailable)
            asks.close()
            with pytest.raises(PlanUnavailable, match="closed"):
                asks.plan(asked, 1, 1.0)
        wait_until(lambda: nothing_more_than(before))  # the other end closes a little later


def test_a_scheduler_leaves_nothing():
    with running(auth_key=KEY):
        pass
    before = open_files(), threading.active_count()
    for key in (KEY, None):
        with running(auth_key=key) as server:
            ask(server.address, problem(np.random.default_rng(17)), auth_key=key)
    wait_until(lambda: nothing_more_than(before))


def test_a_scheduler_does_not_wait_for_ever_for_a_plan_under_way(monkeypatch):
    monkeypatch.setattr(scheduler, "_JOIN", 0.05)
    asked = problem(np.random.default_rng(21))
    server = Running()
    server.held.add(asked.digest())
    gives_up(server.address, asked, "is planning")
    server.scheduler.stop()
    server.thread.join(PATIENCE)
    assert not server.thread.is_alive()
    assert server.ended is False
    server.let_go.set()


def test_what_nobody_waits_for_any_more_is_not_planned(monkeypatch):
    rng = np.random.default_rng(22)
    first, given_up = problem(rng), problem(rng)
    with running() as server:
        server.held.add(first.digest())
        gives_up(server.address, first, "is planning")
        wait_until(lambda: server.planned[first.digest()] == 1)
        gives_up(server.address, given_up, "is planning")
        monkeypatch.setattr(scheduler, "_STALE", 0.0)
        server.let_go.set()
        assert ask(server.address, first, 1) == mirrored(first)
        wait_until(lambda: not any(entry.planning for entry in list(server.scheduler._board._entries.values())))
        assert server.planned[given_up.digest()] == 0
        monkeypatch.undo()
        assert ask(server.address, given_up) == mirrored(given_up)


def test_a_client_of_another_process_is_of_no_use():
    asked = problem(np.random.default_rng(18))
    with running() as server, client(server.address) as asks:
        assert asks.plan(asked, 1, PATIENCE) == mirrored(asked)
        child = os.fork()
        if not child:
            try:
                asks.plan(asked, 1, PATIENCE)
            except PlanUnavailable as error:
                os._exit(0 if "another process" in error.reason else 1)
            os._exit(2)
        assert os.waitpid(child, 0)[1] == 0
        assert asks.plan(asked, 2, PATIENCE) == mirrored(asked)


# the command line


def environment(**more):
    kept = {name: value for name, value in os.environ.items() if name != "EPLB_AUTH_KEY"}
    return kept | more


@contextlib.contextmanager
def command(*words, env=None, pass_fds=()):
    """The program, once it listens; killed in the end if it has not ended."""
    process = subprocess.Popen(
        [sys.executable, "-m", "lplb.eplb_scheduler", "--port", "0", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(**(env or {})), pass_fds=pass_fds,
    )  # fmt: skip
    try:
        line = process.stdout.readline()
        found = re.fullmatch(r"lplb scheduler listens on (tcp://\S+:\d+)\n", line)
        assert found, (line, process.communicate(timeout=PATIENCE))
        yield process, found[1]
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def fails(*words, status=2, env=None):
    done = subprocess.run(
        [sys.executable, "-m", "lplb.eplb_scheduler", *words],
        capture_output=True, text=True, timeout=PATIENCE, env=environment(**(env or {})), check=False,
    )  # fmt: skip
    assert done.returncode == status, done
    assert not done.stdout
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_program_plans_until_a_signal_ends_it(number):
    asked = problem(np.random.default_rng(19), rows=32, steady=True)
    with command("--world_size", "4", "--expert_num", "8", "--block_num", "3", "--redundant", "1") as (
        process,
        address,
    ):
        assert address.startswith("tcp://127.0.0.1:")
        assert ask(address, asked) == planning.plan(asked)
        process.send_signal(number)
        _, said = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0
        assert said.count("no EPLB_AUTH_KEY: only this machine can ask") == 1
        assert "Traceback" not in said


def test_the_program_allows_itself_all_the_files_that_it_may():
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = min(256, hard - 1)
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, hard))
    try:
        with command("--max_memory", "512") as (process, _):
            assert resource.prlimit(process.pid, resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def visible(process):
    """What others may see of a process."""
    with open(f"/proc/{process.pid}/cmdline", "rb") as words, open(f"/proc/{process.pid}/environ", "rb") as names:
        return words.read() + names.read()


def key_by_file():
    reads, writes = os.pipe()
    os.write(writes, KEY.encode() + b"\n")
    os.close(writes)
    return reads


@pytest.mark.parametrize("how", ["--auth_key", "environment", "file"])
def test_a_key_lets_in_and_is_nowhere_to_be_seen(how):
    asked = problem(np.random.default_rng(20), rows=32, steady=True)
    flags = ["--world_size", "4", "--expert_num", "8", "--block_num", "3", "--redundant", "1", "--host", "0.0.0.0"]
    env, fd = {}, None
    if how == "environment":
        env = {"EPLB_AUTH_KEY": KEY}
    elif how == "file":
        fd = key_by_file()
        flags += ["--auth_key_fd", str(fd)]
    else:
        flags = [how, KEY, *flags]
    with command(*flags, env=env, pass_fds=[fd] if fd else []) as (process, address):
        if fd:
            os.close(fd)
        here = address.replace("0.0.0.0", "127.0.0.1")
        seen = visible(process)
        assert b"lplb.eplb_scheduler" in seen
        assert KEY.encode() not in seen
        assert ask(here, asked, auth_key=KEY) == planning.plan(asked)
        gives_up(here, asked, "another auth key", auth_key="some other key")
        process.terminate()
        out, said = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0
        assert KEY not in out + said
        assert "refused a connection" in said


SECRET = "s3cret-s3cret"


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--world_size", "0"], "world_size is 0, allowed is 1"),
        (["--world_size", "many"], "argument --world_size: invalid int value: 'many'"),
        (["--mode", "B2B"], "mode is 'B2B', allowed are A2A, AG, EX"),
        (["--port", "70000"], "port is 70000, allowed is 0 to 65535"),
        (["--expert_num", "30"], "expert_num is 30, allowed is a multiple of world_size = 8"),
        (["--host", "0.0.0.0"], "host is '0.0.0.0', allowed without an auth key are the loopback addresses"),
        (["--host", "no.such.host.invalid"], "host is 'no.such.host.invalid'"),
        (["--auth_key", "s3cret"], "auth_key has 6 bytes, allowed are 8 to 1024"),
        (["--auth_key"], "auth_key has 0 bytes"),
        (["--max_memory", "0"], "max_memory is 0, allowed is 1 to"),
        (["--auth_key_fd", "999"], "auth_key_fd is 999, allowed is a file open for reading"),
        (["--auth_key_fd", "-1"], "auth_key_fd is -1, allowed is a file open for reading"),
        (["--auth_key_fd", "99999999999999"], "auth_key_fd is 99999999999999, allowed is a file open for reading"),
        (["--authkey", SECRET, "--mode", "B2B"], "mode is 'B2B'"),
        (["--key", SECRET], "unknown: --key"), ([f"--key={SECRET}"], "unknown: --key"),
        ([SECRET], "unknown: 1 words"),
    ],
)  # fmt: skip
def test_wrong_usage_ends_with_2_and_shows_no_key(words, why, capsys, monkeypatch):
    monkeypatch.delenv("EPLB_AUTH_KEY", raising=False)
    with pytest.raises(SystemExit) as caught:
        eplb_scheduler.main(words)
    assert caught.value.code == 2
    said = "".join(capsys.readouterr())
    assert why in said
    assert "s3cret" not in said


@pytest.mark.parametrize(
    ("words", "env", "why"),
    [
        (["--auth_key", "s3cret"], {}, "auth_key has 6 bytes, allowed are 8 to 1024"),
        ([], {"EPLB_AUTH_KEY": "s3cret"}, "auth_key has 6 bytes, allowed are 8 to 1024"),
        ([f"--auth-key={SECRET}", "--mode", "B2B"], {}, "mode is 'B2B', allowed are A2A, AG, EX"),
    ],
)
def test_a_program_with_a_key_and_wrong_usage_ends_with_2(words, env, why):
    said = fails(*words, env=env)
    assert why in said
    assert "s3cret" not in said


def test_all_that_may_be_meant_for_a_key_is_taken_for_one():
    words = [
        "--mode",
        "EX",
        "--auth_key",
        "one",
        "--auth-key=two",
        "--auth",
        "--three",
        "--port",
        "1",
        "--auth_key_fd",
        "4",
    ]
    rest = ["--mode", "EX", "--port", "1", "--auth_key_fd", "4"]
    assert eplb_scheduler._apart([*words, "--authkey"]) == (rest, ["one", "two", "--three", ""])


def test_an_address_in_use_ends_with_1():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        said = fails("--port", str(taken.getsockname()[1]), status=1)
    assert "cannot listen on tcp://127.0.0.1" in said


WITHOUT = """
import sys
sys.modules["{missing}"] = None
import lplb, lplb.dynamic.client, lplb.dynamic.scheduler, lplb.dynamic.wire, lplb.dynamic.keys, lplb.eplb_scheduler
for make in (
    lambda: lplb.dynamic.client.Client("tcp://localhost:50001", rank=0, size=1, model="m"),
    lambda: lplb.dynamic.scheduler.Scheduler(lplb.dynamic.scheduler.Flags()),
):
    try:
        make()
    except ImportError as error:
        assert 'pip install "lplb[service]"' in str(error), error
    else:
        raise SystemExit("made without {missing}")
raise SystemExit(lplb.eplb_scheduler.main([]))
"""


@pytest.mark.parametrize("missing", ["zmq", "msgpack"])
def test_without_the_packages_lplb_works_and_the_service_says_what_it_needs(missing):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(missing=missing)],
        capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert 'pip install "lplb[service]"' in done.stderr
