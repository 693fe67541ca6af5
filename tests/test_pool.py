"""The pool on real processes, and the outbox of a shuffle, which feeds it: limits, deaths, time limits, and
that nothing of a command outlives it.

A pool takes in, and ends, what its process started in other sessions, so each test runs in a process alone.
"""

import errno
import functools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import procs
import pytest
from cluster import HOST, free_port
from procs import eventually
from reference import checksum_of

from s4 import outbox
from s4.config import Conf, Server
from s4.errors import (
    CancelledError,
    MissingError,
    S4Error,
    StoppingError,
    TimeLimitError,
    TransferError,
    WorkerDiedError,
)
from s4.workers import Kind, Pool, Ticket, pool, processes
from s4.workers.tasks import Command, Destination, Push, Ran, Receive, Received, Send, StoredFile

COMPUTE_SLOTS = 2
MB = 1024 * 1024
_HERE = str(Path(__file__).parent)
_START = "import sys; sys.path.insert(0, sys.argv[1]); import test_pool; test_pool.perform(*sys.argv[2:])"
_scenarios: dict[str, Callable[["Bench"], None]] = {}


class Bench:
    """A pool in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made = 0
        for name in ("run", "dirs", "files"):
            (folder / name).mkdir()
        (folder / "empty").touch()
        self.start(COMPUTE_SLOTS)

    def start(self, slots: int) -> None:
        limits = {Kind.COMPUTE: slots, Kind.SEND: 1, Kind.RECEIVE: 1}
        self.pool = Pool(limits, str(self.folder / "run"))

    def command(
        self,
        line: str,
        time_limit: float | None = None,
        on_done: Callable[[Ticket], None] | None = None,
        group: str = "",
        stdin: str = "",
        *,
        last_try: bool = False,
        collect: str | Destination = "eval",
    ) -> Ticket:
        self.made += 1
        stdin = stdin or str(self.folder / "empty")
        name = f"t{self.made}"
        task = Command(
            line, str(self.folder / "dirs" / name), str(self.folder / "files" / name), collect, stdin
        )
        return self.pool.submit(Ticket(Kind.COMPUTE, task, (), time_limit, on_done, group, last_try))

    def run(self, line: str) -> Ran:
        return ran(self.command(line))

    def sleeping(self, seconds: str, time_limit: float | None = None, group: str = "") -> Ticket:
        """A command that sleeps, after it has started to; the number of seconds tells it apart."""
        ticket = self.command(f"sleep {seconds} | cat", time_limit, group=group)
        eventually(lambda: processes_of(seconds), 10, "it runs")
        return ticket

    def workers(self) -> set[int]:
        children = {
            process.pid for process in procs.descendants(os.getpid()) if process.parent == os.getpid()
        }
        everyone = procs.descendants(os.getpid())
        return {process.pid for process in everyone if process.is_python and process.parent in children}


def ran(ticket: Ticket) -> Ran:
    answer = ticket.result(30)
    assert isinstance(answer, Ran)
    return answer


def processes_of(seconds: str) -> list[procs.Process]:
    return procs.running(f"sleep\0{seconds}\0")


def output(answer: Ran) -> bytes:
    return Path(answer.outputs[0].file).read_bytes()


def perform(name: str, folder: str) -> None:
    """Run a scenario, in the process made for it."""
    bench = Bench(Path(folder))
    try:
        _scenarios[name](bench)
    finally:
        bench.pool.stop()
    left = [
        p
        for p in procs.descendants(os.getpid())
        if "forkserver" not in p.command and "tracker" not in p.command
    ]
    assert not left, left


def in_a_process_alone(scenario: Callable[[Bench], None]) -> Callable[[Path], None]:
    _scenarios[scenario.__name__] = scenario

    @functools.wraps(scenario)
    def run(folder: Path) -> None:
        command = [sys.executable, "-c", _START, _HERE, scenario.__name__, str(folder)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)
        try:
            _out, err = process.communicate(timeout=60)
        finally:
            process.kill()
            process.wait()
        assert process.returncode == 0, err.decode()
        eventually(lambda: not procs.touching(folder), 5, "nothing is left")

    del run.__dict__["__wrapped__"]  # pytest would ask for a fixture called bench
    run.__annotations__ = {"folder": Path, "return": None}
    return run


@in_a_process_alone
def test_a_command_gets_its_exit_code_and_its_outputs(bench: Bench) -> None:
    answer = bench.run("printf 'a\\0b'; echo oops >&2; exit 7")
    assert answer.exitcode == 7 and output(answer) == b"a\0b"
    assert answer.stderr is not None and Path(answer.stderr.file).read_bytes() == b"oops\n"
    printed = ran(bench.command("printf 'a\\0b'", collect="stdout"))
    assert output(printed) == b"a\0b" and printed.outputs[0].checksum == checksum_of(b"a\0b")
    assert list((bench.folder / "dirs").iterdir()) == []


@in_a_process_alone
def test_a_command_whose_input_is_gone_or_cannot_be_opened_is_not_run(bench: Bench) -> None:
    for _ in range(COMPUTE_SLOTS):
        assert bench.run("echo before").exitcode == 0
    place = bench.folder / "socket"
    with pytest.raises(MissingError, match="its input is gone"):
        bench.command("echo not this", stdin=str(place)).result(30)
    with socket.socket(socket.AF_UNIX) as cannot_be_opened:
        cannot_be_opened.bind(str(place))
        for _ in range(COMPUTE_SLOTS):
            with pytest.raises(S4Error, match="No such device"):
                bench.command("echo not this", stdin=str(place)).result(30)
    os.mkfifo(bench.folder / "fifo")
    with pytest.raises(S4Error, match="no file is in its place"):
        bench.command("echo not this", stdin=str(bench.folder / "fifo")).result(30)
    for _ in range(COMPUTE_SLOTS):
        assert output(bench.run("cat; echo after")) == b"after\n"


def test_where_the_kernel_has_no_batch_scheduling_commands_run_all_the_same() -> None:
    script = """if True:
        import errno, os
        from s4.workers import shell
        def refuse(*arguments):
            raise OSError(errno.EINVAL, "Invalid argument")
        setattr(os, {name!r}, refuse)
        shell._prepare_for_commands()
        """
    for name in ("sched_getscheduler", "sched_setscheduler"):
        subprocess.run([sys.executable, "-c", script.format(name=name)], check=True, timeout=30)


@in_a_process_alone
def test_no_more_commands_run_at_once_than_there_are_slots(bench: Bench) -> None:
    log = bench.folder / "log"
    tickets = [bench.command(f"echo + >>{log}; sleep 0.1; echo - >>{log}") for _ in range(8)]
    assert [ran(ticket).exitcode for ticket in tickets] == [0] * 8
    running, most = 0, 0
    for line in log.read_text().split():
        running += 1 if line == "+" else -1
        most = max(most, running)
    assert most == COMPUTE_SLOTS
    for i in range(COMPUTE_SLOTS):
        bench.sleeping(f"600.9{i}")  # every slot is free again


@in_a_process_alone
def test_commands_that_wait_run_in_the_order_of_their_coming(bench: Bench) -> None:
    log = bench.folder / "log"
    blocking = [bench.sleeping("0.51"), bench.sleeping("600.11")]
    tickets = [bench.command(f"echo {i} >>{log}") for i in range(6)]
    for ticket in [blocking[0], *tickets]:
        assert ran(ticket).exitcode == 0
    assert log.read_text().split() == [str(i) for i in range(6)]


@in_a_process_alone
def test_after_a_failure_that_ends_its_group_no_further_command_of_it_starts(bench: Bench) -> None:
    log = bench.folder / "log"
    bench.sleeping("600.22")
    names = Destination("b/out/", 1, 0)
    ways: list[tuple[str, float | None, dict[str, Any]]] = [
        ("exit 3", None, {}),
        ("kill -9 $PPID; sleep 9", None, {}),
        ("sleep 600.23", 0.2, {}),
        ("echo what-is-not-there", None, {"collect": names}),
        ("is not run", None, {"stdin": str(bench.folder / "gone")}),
    ]
    for i, (line, limit, options) in enumerate(ways):
        group = f"job{i}"
        line = f"echo failing{i} >>{log}; {line}"
        failing = bench.command(line, limit, group=group, last_try=True, **options)
        rest = [bench.command(f"echo rest{i} >>{log}", group=group) for _ in range(3)]
        other = bench.command(f"echo other{i} >>{log}")
        assert ran(other).exitcode == 0
        assert failing.done
        assert not any(ticket.began_s for ticket in rest)
        for ticket in rest:
            bench.pool.cancel(ticket, CancelledError("a task before it failed"))
        again = bench.command(f"echo again{i} >>{log}", group=group)
        assert ran(again).exitcode == 0
    said = log.read_text().split()
    expected = [f"{what}{i}" for i in range(len(ways)) for what in ("failing", "other", "again")]
    assert said == [what for what in expected if what != "failing4"]


@in_a_process_alone
def test_groups_take_turns_and_the_one_with_fewest_running_is_first(bench: Bench) -> None:
    log = bench.folder / "log"
    bench.sleeping("600.21", group="large")
    first = bench.sleeping("0.52", group="large")
    tickets = [bench.command(f"echo large{i} >>{log}", group="large") for i in range(3)]
    tickets += [bench.command(f"echo request{i} >>{log}") for i in range(3)]
    tickets += [bench.command(f"echo small{i} >>{log}", group="small") for i in range(2)]
    for ticket in [first, *tickets]:
        assert ran(ticket).exitcode == 0
    said = log.read_text().split()
    assert said == ["request0", "small0", "request1", "small1", "request2", "large0", "large1", "large2"]


@in_a_process_alone
def test_the_death_of_a_busy_worker_costs_its_one_command(bench: Bench) -> None:
    doomed, other = bench.sleeping("601.31"), bench.sleeping("1.31")
    waiting = bench.command("echo waited")
    assert doomed.pid is not None
    os.kill(doomed.pid, signal.SIGKILL)
    with pytest.raises(WorkerDiedError) as died:
        doomed.result(10)
    assert died.value.pid == doomed.pid and died.value.exitcode == -signal.SIGKILL
    assert str(doomed.pid) in str(died.value) and "signal 9" in str(died.value)
    assert processes_of("601.31") == []
    assert output(ran(waiting)) == b"waited\n"
    assert ran(other).exitcode == 0


@in_a_process_alone
def test_what_a_dead_worker_left_is_ended_later_if_that_fails_at_first(bench: Bench) -> None:
    kill_children, failures = processes.kill_children, 3

    def fails(chosen: Callable[[int, int], bool]) -> None:
        nonlocal failures
        if failures:
            failures -= 1
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), "/proc")
        kill_children(chosen)

    doomed = bench.sleeping("601.32")
    assert doomed.pid is not None
    processes.kill_children = fails
    os.kill(doomed.pid, signal.SIGKILL)
    with pytest.raises(WorkerDiedError):
        doomed.result(10)
    assert [ran(bench.command("echo fine")).exitcode for _ in range(COMPUTE_SLOTS + 1)] == [0] * 3
    eventually(lambda: processes_of("601.32") == [], 10, "the command is ended")
    left = bench.folder / "run" / f"worker-{doomed.pid}"
    eventually(lambda: not left.exists(), 5, "the files are gone")


@in_a_process_alone
def test_a_bash_that_is_killed_while_it_is_idle_is_replaced(bench: Bench) -> None:
    for _ in range(2):
        tickets = [bench.sleeping(f"0.5{i}") for i in range(COMPUTE_SLOTS)]
        assert [ran(ticket).exitcode for ticket in tickets] == [0] * COMPUTE_SLOTS
        shells = [p.pid for p in procs.descendants(os.getpid()) if "bash\0--noprofile" in p.command]
        assert len(shells) == COMPUTE_SLOTS
        for pid in shells:
            procs.kill(pid)
        while any(map(procs.alive, shells)):
            time.sleep(0.01)
    assert output(bench.run("echo fine")) == b"fine\n"


@in_a_process_alone
def test_idle_workers_that_die_are_replaced_at_once(bench: Bench) -> None:
    before = eventually(lambda: len(found := bench.workers()) == 2 and found, 10)
    assert isinstance(before, set)
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: len(bench.workers() - before) == 2, 3, "two new workers")
    assert output(bench.run("echo fine")) == b"fine\n"


@in_a_process_alone
def test_the_socket_of_a_fork_server_that_died_goes_with_the_next(bench: Bench) -> None:
    assert bench.run("true").exitcode == 0
    workers = eventually(lambda: len(found := bench.workers()) == 2 and found, 10)
    assert isinstance(workers, set)
    [before] = (bench.folder / "run").glob("listener-*")
    servers = {process.parent for process in procs.descendants(os.getpid()) if process.pid in workers}
    for pid in [*servers, *workers]:
        procs.kill(pid)
    eventually(lambda: len(bench.workers() - workers) == 2, 10, "there are others")
    [after] = (bench.folder / "run").glob("listener-*")
    assert after != before
    assert bench.run("true").exitcode == 0


@in_a_process_alone
def test_after_a_burst_only_the_spare_workers_are_left(bench: Bench) -> None:
    bench.pool.stop()
    pool.IDLE_SECONDS = 0.2  # which a pool reads when it starts
    bench.start(6)
    marks = bench.folder / "marks"
    marks.mkdir()
    together = f"touch {marks}/$BASHPID; until [ $(ls {marks} | wc -l) = 6 ]; do sleep 0.01; done"
    burst = [bench.command(together) for _ in range(6)]
    assert [ran(ticket).exitcode for ticket in burst] == [0] * 6
    served = {ticket.pid for ticket in burst}
    assert len(served) == 6
    eventually(lambda: len(bench.workers()) == pool.SPARE_WORKERS, 10, "the others go")
    assert bench.workers() < served
    assert output(bench.run("echo fine")) == b"fine\n"


@in_a_process_alone
def test_a_command_that_takes_too_long_is_killed_with_all_its_children(bench: Bench) -> None:
    ticket = bench.command("setsid sleep 601.41 & (sleep 600.42 & sleep 600.43) | cat", 0.5)
    began = time.monotonic()
    with pytest.raises(TimeLimitError, match=r"0\.5 s"):
        ticket.result(10)
    assert time.monotonic() - began < 4
    assert [p for number in ("601.41", "600.42", "600.43") for p in processes_of(number)] == []
    assert output(bench.run("echo fine")) == b"fine\n"


@in_a_process_alone
def test_a_cancelled_command_is_ended_and_a_waiting_one_never_starts(bench: Bench) -> None:
    running = [bench.sleeping("601.51"), bench.sleeping("601.52")]
    waiting = bench.command(f"touch {bench.folder}/started")
    for ticket in (waiting, *running):
        bench.pool.cancel(ticket, CancelledError("not needed"))
        with pytest.raises(CancelledError, match="not needed"):
            ticket.result(10)
    assert processes_of("601.51") == processes_of("601.52") == []
    assert output(bench.run("echo fine")) == b"fine\n"
    assert not (bench.folder / "started").exists()
    bench.pool.cancel(waiting, CancelledError("again"))  # over: does nothing


@in_a_process_alone
def test_whatever_happens_wakes_the_pool(bench: Bench) -> None:
    bench.pool.stop()
    pool.IDLE_SECONDS = 1000.0  # it does not wake up by itself
    bench.start(3)
    eventually(lambda: len(bench.workers()) == pool.SPARE_WORKERS, 10)
    for i in range(3):  # the last needs another worker
        bench.sleeping(f"600.5{i}")
    waiting = bench.command("true")
    bench.pool.cancel(waiting, CancelledError("not needed"))
    with pytest.raises(CancelledError, match="not needed"):
        waiting.result(10)
    bench.pool.stop()
    bench.start(1)
    eventually(lambda: len(bench.workers()) == pool.SPARE_WORKERS, 10)
    with pytest.raises(TimeLimitError):
        bench.command("sleep 600.55", 0.1).result(10)


@in_a_process_alone
def test_what_never_starts_leaves_no_descriptor_open(bench: Bench) -> None:
    with socket.create_server((HOST, 0)) as listener:

        def receive() -> Ticket:
            task = Receive([str(bench.folder / "a")], [1], HOST)
            return Ticket(Kind.RECEIVE, task, [os.dup(listener.fileno())])

        def opened() -> int:
            listening = os.fstat(listener.fileno())
            fds = [int(fd) for fd in os.listdir("/proc/self/fd")]
            return sum(
                os.path.exists(f"/proc/self/fd/{fd}") and os.path.samestat(os.fstat(fd), listening)
                for fd in fds
            )

        running = bench.pool.submit(receive())
        assert running.wait_started(10)
        cancelled = bench.pool.submit(receive())
        assert opened() == 2
        bench.pool.cancel(cancelled, CancelledError("not needed"))
        with pytest.raises(CancelledError):
            cancelled.result(10)
        assert opened() == 1
        stopped = bench.pool.submit(receive())
        bench.pool.stop()
        with pytest.raises(StoppingError):
            stopped.result(10)
        with pytest.raises(StoppingError):
            bench.pool.submit(receive())
        assert opened() == 1


@in_a_process_alone
def test_what_a_command_leaves_behind_is_ended(bench: Bench) -> None:
    assert bench.run("sleep 600.61 & setsid sleep 600.62 & (setsid sleep 600.63 &) ; true").exitcode == 0
    numbers = ("600.61", "600.62", "600.63")
    eventually(lambda: not [p for number in numbers for p in processes_of(number)], 3, "they are ended")


@in_a_process_alone
def test_orphans_of_a_worker_that_dies_are_ended(bench: Bench) -> None:
    ticket = bench.command("setsid sleep 600.71 & sleep 600.72")
    eventually(lambda: processes_of("600.71") and processes_of("600.72"), 10)
    assert ticket.pid is not None
    os.kill(ticket.pid, signal.SIGKILL)
    with pytest.raises(WorkerDiedError):
        ticket.result(10)
    eventually(lambda: not processes_of("600.71") + processes_of("600.72"), 3, "they are ended")


@in_a_process_alone
def test_a_command_that_kills_its_own_shell_harms_nobody(bench: Bench) -> None:
    for line in ("kill -9 $$", "kill -9 $PPID", "kill -9 0", "exec 0<&- 1>&- 2>&-"):
        bench.command(line)
    assert output(bench.run("echo fine")) == b"fine\n"
    assert output(bench.run("echo fine")) == b"fine\n"


@in_a_process_alone
def test_stopping_ends_everything_and_refuses_more(bench: Bench) -> None:
    running = [bench.sleeping("600.81"), bench.sleeping("600.82")]
    waiting = bench.command("true")
    began = time.monotonic()
    bench.pool.stop()
    assert time.monotonic() - began < 3
    for ticket in (*running, waiting):
        with pytest.raises(StoppingError):
            ticket.result(0)
    with pytest.raises(StoppingError):
        bench.command("true")
    assert processes_of("600.81") == processes_of("600.82") == []


@in_a_process_alone
def test_a_raising_callback_does_not_stop_the_pool(bench: Bench) -> None:
    def raise_it(_ticket: Ticket) -> None:
        raise ValueError("from the test")

    bench.command("true", on_done=raise_it)
    assert output(bench.run("echo fine")) == b"fine\n"


@in_a_process_alone
def test_bytes_go_from_one_worker_to_another(bench: Bench) -> None:
    data = os.urandom(3_000_000)
    (bench.folder / "source").write_bytes(data)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        arriving = Receive(
            [str(bench.folder / "a"), str(bench.folder / "b")], [1_000_000, 2_000_000], "127.0.0.1"
        )
        received = bench.pool.submit(Ticket(Kind.RECEIVE, arriving, [os.dup(listener.fileno())]))
    source = os.open(bench.folder / "source", os.O_RDONLY)
    sent = bench.pool.submit(Ticket(Kind.SEND, Send([3_000_000], "127.0.0.1", port), [source]))
    assert sent.result(10) is None
    answer = received.result(10)
    assert isinstance(answer, Received)
    parts = [data[:1_000_000], data[1_000_000:]]
    assert [file.checksum for file in answer.files] == [checksum_of(part) for part in parts]
    assert [Path(file.file).read_bytes() for file in answer.files] == parts
    assert sent.fds == received.fds == []  # the pool has closed them


@in_a_process_alone
def test_a_transfer_that_breaks_off_leaves_no_file(bench: Bench) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        task = Receive([str(bench.folder / "a"), str(bench.folder / "b")], [5, 1000], "127.0.0.1")
        received = bench.pool.submit(Ticket(Kind.RECEIVE, task, [os.dup(listener.fileno())]))
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"whole" + b"too little")
    with pytest.raises(TransferError, match="10 of 1000"):
        received.result(10)
    assert not (bench.folder / "a").exists() and not (bench.folder / "b").exists()


@in_a_process_alone
def test_a_worker_whose_descriptors_do_not_reach_it_costs_its_one_task(bench: Bench) -> None:
    def fails(_socket: socket.socket, _fds: list[int]) -> None:
        raise OSError(errno.ETOOMANYREFS, os.strerror(errno.ETOOMANYREFS))

    source = bench.folder / "source"
    source.write_bytes(b"data")
    with socket.create_server((HOST, 0)) as listener:
        task = Send([4], HOST, listener.getsockname()[1])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pool, "sendfds", fails)
            lost = bench.pool.submit(Ticket(Kind.SEND, task, [os.open(source, os.O_RDONLY)]))
            with pytest.raises(S4Error, match="did not reach its worker: Too many references"):
                lost.result(10)
        assert lost.fds == []
        sent = bench.pool.submit(Ticket(Kind.SEND, task, [os.open(source, os.O_RDONLY)]))
        assert sent.result(10) is None  # its slot, the only one, is free


def _outbox(bench: Bench, servers: int) -> outbox.Outbox[int]:
    """For servers that are not there: what leaves fails, and stays to be looked at."""
    outbox.GATHER_SECONDS = 1000
    ring = Conf(tuple(Server(HOST, free_port()) for _ in range(servers)), "a test")
    return outbox.Outbox(ring, bench.pool, "job", lambda _ticket: None)


def _add(bench: Bench, box: outbox.Outbox[int], position: int, count: int, size: int) -> None:
    for i in range(count):
        bench.made += 1
        made = bench.folder / "files" / str(bench.made)
        made.touch()
        file = StoredFile(str(made), size, "")
        box.add(position, outbox.Sending(f"b/{bench.made}", file, i, bench.made))


def _batches(box: outbox.Outbox[int]) -> list[int]:
    """How many outputs each batch has that left."""
    return [len(ticket.task.entries) for ticket in box.tickets if isinstance(ticket.task, Push)]


@in_a_process_alone
def test_outputs_for_a_server_gather_until_they_are_large_or_many(bench: Bench) -> None:
    box = _outbox(bench, 3)
    _add(bench, box, 0, 31, MB)
    _add(bench, box, 1, 99, 1)
    _add(bench, box, 2, 1, 1)
    box.send(nothing_more=False)
    assert _batches(box) == [] and box.anything_waits
    _add(bench, box, 0, 1, MB)
    _add(bench, box, 1, 1, 1)
    box.send(nothing_more=False)
    assert _batches(box) == [32, 100]
    box.send(nothing_more=True)
    assert _batches(box) == [32, 100, 1] and not box.anything_waits
    outcome = []
    for ticket in box.tickets:
        with pytest.raises(S4Error):
            ticket.result(30)
        outcome += box.arrived(ticket, "here")
    assert sorted(sender for sender, _error in outcome) == list(range(1, 134)) and box.empty
    assert all(f"outputs for {HOST}" in str(error) for _sender, error in outcome)
    assert list((bench.folder / "files").iterdir()) == []


@in_a_process_alone
def test_before_commands_would_have_to_wait_for_room_all_outputs_leave(bench: Bench) -> None:
    box = _outbox(bench, 24)
    for position in range(24):
        _add(bench, box, position, 10, MB)
    box.send(nothing_more=False)
    assert _batches(box) == []
    for position in range(24):
        _add(bench, box, position, 1, MB)
    box.send(nothing_more=False)
    assert _batches(box) == [11] * 24 and not box.full
    # What is under way, to a slow server perhaps, is no reason to send others little by little.
    _add(bench, box, 0, 1, MB)
    box.send(nothing_more=False)
    assert _batches(box) == [11] * 24


@in_a_process_alone
def test_what_a_sender_drops_does_not_leave(bench: Bench) -> None:
    box = _outbox(bench, 2)
    _add(bench, box, 0, 3, MB)
    box.send(nothing_more=True)
    under_way = box.tickets
    for position in (0, 1, 1):  # senders 4, 5 and 6
        _add(bench, box, position, 1, MB)
    files = {int(path.name) for path in (bench.folder / "files").iterdir()}
    assert [box.drop(sender) for sender in (1, 5, 5, 4)] == [0, 1, 0, 1]
    assert {int(path.name) for path in (bench.folder / "files").iterdir()} == files - {4, 5}
    box.send(nothing_more=True)
    (left,) = set(box.tickets) - set(under_way)
    assert isinstance(left.task, Push) and [path for path, _file, _task in left.task.entries] == ["b/6"]
    for ticket in box.tickets:
        with pytest.raises(S4Error):
            ticket.result(30)
        box.arrived(ticket, "here")
    assert box.empty


@in_a_process_alone
def test_what_was_dropped_or_has_arrived_makes_room_for_more(bench: Bench) -> None:
    box = _outbox(bench, 1)
    _add(bench, box, 0, 512, MB)
    assert box.full
    assert [box.drop(sender) for sender in range(1, 257)] == [1] * 256 and not box.full
    while not box.empty:
        box.send(nothing_more=True)
        assert len(box.tickets) == outbox.PUSHES_PER_SERVER  # however much there is to send
        for ticket in box.tickets:
            with pytest.raises(S4Error):
                ticket.result(30)
            box.arrived(ticket, "here")
    _add(bench, box, 0, 511, MB)
    assert not box.full
    assert sum(box.drop(sender) for sender in range(513, 1024)) == 511 and box.empty
    _add(bench, box, 0, 1, MB)
    box.send(nothing_more=False)
    assert _batches(box) == []  # it gathers as at the beginning


@in_a_process_alone
def test_nothing_is_sent_to_a_worker_whose_pipe_is_closed(bench: Bench) -> None:
    """Its descriptor may be that of another file by then, such as node.db."""
    assert bench.run("true").exitcode == 0
    workers: Any = bench.pool
    idle = eventually(lambda: list(workers._idle), 10)
    reached: list[bool] = []
    for worker in idle:
        close = worker.connection.close

        def closing(worker: Any = worker, close: Callable[[], None] = close) -> None:
            reached.append(worker in workers._idle or worker.pid in workers._workers)
            close()

        worker.connection.close = closing
    for worker in idle:
        procs.kill(worker.pid)
    eventually(lambda: len(reached) == len(idle), 10)
    assert not any(reached)
    assert bench.run("true").exitcode == 0
