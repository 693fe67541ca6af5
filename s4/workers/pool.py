"""The pool: hands tasks to worker processes, in turn, within a limit for each kind.

One thread watches all workers. A worker that dies costs its one task and is replaced; whatever its command
left running is ended. The parent is the subreaper of the workers, so their orphans become its own children.
"""

import contextlib
import enum
import logging
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.process
import os
import selectors
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from multiprocessing.reduction import sendfds
from typing import Any

from s4 import errors
from s4.errors import S4Error, StoppingError, WorkerDiedError
from s4.workers import processes
from s4.workers.scratch import Scratch, read_tail
from s4.workers.tasks import Failure, Ran, Result, Task

SPARE_WORKERS = 2  # kept when idle; more are ended after IDLE_SECONDS
MAX_SERVED = 1000  # groups whose last turn is remembered
IDLE_SECONDS = 10.0
PAUSE_SECONDS = 0.5
MOST_PAUSE_SECONDS = 60.0

log = logging.getLogger("s4.pool")


class Kind(enum.Enum):
    """What a slot is for. Each kind has a limit of its own."""

    SEND = "send"
    RECEIVE = "receive"
    COMPUTE = "compute"


class Ticket:
    """A task in the pool: waiting for a slot, then running, then done. `fds` are its to close."""

    def __init__(
        self,
        kind: Kind,
        task: Task,
        fds: Sequence[int] = (),
        time_limit: float | None = None,
        on_done: Callable[["Ticket"], None] | None = None,
        group: str = "",
        last_try: bool = False,
    ) -> None:
        """`time_limit` in seconds from the start; `on_done(ticket)` runs in the pool's thread, or where it is
        submitted if the pool is stopping. `group` is the job; tickets for which a request waits are a group
        together. Groups share the slots, so that neither the thousands of a job nor a stream of requests
        keeps others waiting. `last_try`: when it fails, no further command of its group is to start."""
        self.kind = kind
        self.task = task
        self.fds = list(fds)
        self.time_limit = time_limit
        self.on_done = on_done
        self.group = group
        self.last_try = last_try
        self.pid: int | None = None
        self.stderr = b""  # the end of what a command wrote whose worker died or was killed
        self.started_s = 0.0  # seconds since 1970
        self.began_s = 0.0  # monotonic, like the next
        self.done_s = 0.0
        self._started = threading.Event()
        self._done = threading.Event()
        self._answer: Result = None
        self._error: S4Error | None = None

    def wait_started(self, seconds: float) -> bool:
        """Whether it got a slot, or failed, within so many seconds."""
        return self._started.wait(seconds)

    def wait_done(self, seconds: float | None = None) -> bool:
        """Whether it is over within so many seconds."""
        return self._done.wait(seconds)

    @property
    def done(self) -> bool:
        """Whether it is over."""
        return self._done.is_set()

    @property
    def succeeded(self) -> bool:
        """Whether it is over, and well."""
        return self.done and self._error is None

    @property
    def seconds(self) -> float:
        """How long it ran, 0 if it never did; of one that is over."""
        return self.done_s - self.began_s if self.began_s else 0.0

    def result(self, seconds: float | None = None) -> Result:
        """Wait for the end and return the answer, or raise the S4Error that it failed with.

        Raises TimeoutError if it is not over within `seconds`.
        """
        if not self.wait_done(seconds):
            raise TimeoutError
        if self._error is not None:
            raise self._error
        return self._answer

    def _close_fds(self) -> None:
        for fd in self.fds:
            os.close(fd)
        self.fds = []

    def _finish(self, answer: Result, error: S4Error | None) -> None:
        if isinstance(answer, Failure):
            error = errors.rebuilt(answer.error, answer.message)
        self._answer, self._error = answer, error
        self._close_fds()
        self.done_s = time.monotonic()
        self._started.set()
        self._done.set()
        if self.on_done is not None:
            self.on_done(self)


@dataclass(eq=False)
class _Worker:
    process: ForkServerProcess
    connection: "Connection[Any, Any]"
    descriptors: socket.socket
    pid: int
    ticket: Ticket | None = None
    deadline: float = float("inf")
    reason: S4Error | None = None  # why we killed it
    idle_since: float = field(default_factory=time.monotonic)


class Pool:
    """Worker processes for one node. `limits` are tasks at once; `scratch` is a folder for the workers."""

    def __init__(self, limits: dict[Kind, int], scratch: str) -> None:
        self._limits = limits
        self._scratch = scratch
        self._queues: dict[Kind, deque[Ticket]] = {kind: deque() for kind in Kind}
        self._running = dict.fromkeys(Kind, 0)
        self._served: dict[str, float] = {}  # by group: when, by the monotonic clock, it last got a slot
        self._held: set[str] = set()  # groups of which no command is to start, while some wait
        self._idle: list[_Worker] = []
        self._workers: dict[int, _Worker] = {}
        self._lock = threading.Lock()
        self._stopping = False
        self._retires_at = time.monotonic() + IDLE_SECONDS
        self._spawns_at = 0.0  # monotonic: no worker is started before
        self._wakes_at = 0.0  # monotonic: when the loop looks at the deadlines again
        self._dead: list[_Worker] = []  # of which something may be left
        self._buries_at = float("inf")  # monotonic: when that is looked after again
        self._bury_pause = PAUSE_SECONDS
        self._finished: list[tuple[Ticket, Result, S4Error | None]] = []
        self._selector = selectors.DefaultSelector()
        self._wake_receive, self._wake_send = os.pipe()
        os.set_blocking(self._wake_send, False)
        self._selector.register(self._wake_receive, selectors.EVENT_READ)
        processes.become_subreaper()
        # Where the fork server's socket lies: not in /tmp, where a killed node would leave it. The path of a
        # socket must be short, which that of a data folder may not be.
        self._socket_folder = os.open(scratch, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        config: dict[str, Any] = vars(multiprocessing.process.current_process())["_config"]
        config["tempdir"] = f"/proc/{os.getpid()}/fd/{self._socket_folder}"
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["s4.workers.preload"])
        self._server_socket = ""  # path of that of the fork server, once there is one
        # Workers see the other end close when the node dies.
        self._lifeline, self._lifeline_end = self._context.Pipe(duplex=False)
        self._thread = threading.Thread(target=self._loop, name="pool", daemon=True)
        self._thread.start()

    def submit(self, ticket: Ticket) -> Ticket:
        """Queue a ticket. Raises StoppingError (and closes its descriptors) when the pool is stopping."""
        with self._lock:
            if not self._stopping:
                self._queues[ticket.kind].append(ticket)
                if not self._dispatch():
                    self._wake()
                return ticket
        error = StoppingError()
        ticket._finish(None, error)
        raise error

    def cancel(self, ticket: Ticket, reason: S4Error) -> None:
        """End a ticket, with everything that its command started. Does nothing if it is over."""
        with self._lock:
            queue = self._queues[ticket.kind]
            if ticket in queue:
                queue.remove(ticket)
                if not self._has_commands(ticket.group):
                    self._held.discard(ticket.group)
                self._finished.append((ticket, None, reason))
                self._wake()
                return
            for worker in self._workers.values():
                if worker.ticket is ticket:
                    self._kill(worker, reason)

    def stop(self) -> None:
        """End all workers and what they run; everything unfinished fails with StoppingError."""
        with self._lock:
            self._stopping = True
            error = StoppingError()
            for queue in self._queues.values():
                self._finished += [(ticket, None, error) for ticket in queue]
                queue.clear()
            for worker in self._workers.values():
                self._kill(worker, error)
            self._wake()
        self._thread.join()

    def _kill(self, worker: _Worker, reason: S4Error) -> None:
        # Only SIGKILL is certain. Its connection then closes, and the loop does the rest.
        worker.reason = worker.reason or reason
        processes.kill(worker.pid)

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # full: it is awake anyway
            os.write(self._wake_send, b"\n")

    def _dispatch(self) -> bool:
        """Give tickets to idle workers; False if a ticket could run but needs a new worker."""
        for kind in Kind:
            queue = self._queues[kind]
            while self._running[kind] < self._limits[kind]:
                ready = [t for t in queue if t.group not in self._held] if self._held else queue
                if not ready:
                    break
                if not self._idle:
                    return False
                worker = self._idle.pop()
                ticket = self._next(ready)
                queue.remove(ticket)
                self._running[kind] += 1
                worker.ticket, ticket.pid = ticket, worker.pid
                ticket.started_s, ticket.began_s = time.time(), time.monotonic()
                if ticket.time_limit is not None:
                    worker.deadline = ticket.began_s + ticket.time_limit
                    if worker.deadline < self._wakes_at:
                        self._wakes_at = worker.deadline
                        self._wake()
                try:
                    worker.connection.send((ticket.task, len(ticket.fds)))
                    if ticket.fds:
                        sendfds(worker.descriptors, ticket.fds)
                except ConnectionError:
                    pass  # it died while idle: the loop notices, and fails the ticket
                except OSError as e:  # as ETOOMANYREFS: it lives, and would wait for the rest for ever
                    log.error("worker %d did not get its task, and is ended: %s", worker.pid, e)
                    self._kill(worker, S4Error(f"the task did not reach its worker: {e.strerror}; try again"))
                ticket._close_fds()  # the worker has its own now
                ticket._started.set()
        return True

    def _next(self, queue: Sequence[Ticket]) -> Ticket:
        """The ticket whose turn it is: of the group with the fewest running, among those of the one that
        was served longest ago; within a group first come, first served."""
        first = queue[0]
        if any(ticket.group != first.group for ticket in queue):
            tickets = [worker.ticket for worker in self._workers.values() if worker.ticket]
            running = Counter(ticket.group for ticket in tickets if ticket.kind is first.kind)
            first = min(
                queue, key=lambda ticket: (running[ticket.group], self._served.get(ticket.group, 0.0))
            )
        if len(self._served) > MAX_SERVED:
            self._served.clear()
        self._served[first.group] = time.monotonic()
        return first

    def _loop(self) -> None:
        while True:
            try:
                if self._watch():
                    return
            except Exception:  # the pool must live on
                log.exception("the pool stumbled; it goes on")
                time.sleep(PAUSE_SECONDS)

    def _watch(self) -> bool:
        """One round: deadlines, tickets that wait, news from workers. Whether all is over."""
        with self._lock:
            now = time.monotonic()
            for worker in self._workers.values():
                if worker.deadline <= now and worker.ticket is not None and worker.reason is None:
                    limit = worker.ticket.time_limit or 0
                    self._kill(worker, errors.TimeLimitError(f"killed after its time limit of {limit:g} s"))
            short = not self._dispatch() or len(self._workers) < SPARE_WORKERS
            stopping = self._stopping
            if now >= self._retires_at:
                self._retires_at = now + IDLE_SECONDS
                self._retire(now)
            deadlines = [w.deadline for w in self._workers.values() if w.reason is None]
            self._wakes_at = min([self._retires_at, self._buries_at, *deadlines])
            if short and not stopping:
                self._wakes_at = min(self._wakes_at, self._spawns_at)
            timeout = max(0.0, self._wakes_at - now)
            finished, self._finished = self._finished, []
        for ticket, answer, error in finished:
            self._finish(ticket, answer, error)
        if now >= self._buries_at:
            self._clear_up()
        if stopping and not self._workers:
            return True
        if short and not stopping and now >= self._spawns_at:
            try:
                self._spawn()
            except (OSError, EOFError) as e:  # no memory for another process, or the fork server is just gone
                log.error("no worker process could be started, it is tried again: %s", e or "no answer")
                self._spawns_at = now + PAUSE_SECONDS
            return False
        for key, _events in self._selector.select(timeout):
            if key.data is None:
                os.read(self._wake_receive, 4096)
            else:
                self._hear(key.data)
        return False

    def _spawn(self) -> None:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=_run_worker, args=(theirs, self._lifeline, self._scratch), daemon=True
        )
        process.start()
        theirs.close()
        server_socket = vars(multiprocessing.forkserver._forkserver)["_forkserver_address"]
        if self._server_socket not in ("", server_socket):  # the one before died, and could not remove it
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._server_socket)
        self._server_socket = server_socket
        pid = process.pid
        assert pid is not None
        worker = _Worker(process, ours, socket.socket(fileno=os.dup(ours.fileno())), pid)
        self._selector.register(ours, selectors.EVENT_READ, worker)
        with self._lock:
            self._workers[pid] = worker
            self._idle.append(worker)
            if self._stopping:
                self._kill(worker, StoppingError())

    def _hear(self, worker: _Worker) -> None:
        try:
            answer: Result = worker.connection.recv()
        except (EOFError, OSError):
            self._bury(worker)
            return
        with self._lock:
            ticket = self._free(worker)
            if ticket is not None and _failed(answer):
                self._hold(ticket)
            if worker.reason is None:
                worker.idle_since = time.monotonic()
                self._idle.append(worker)
            self._dispatch()
        if ticket is not None:
            self._finish(ticket, answer, None)

    def _free(self, worker: _Worker) -> Ticket | None:
        ticket, worker.ticket, worker.deadline = worker.ticket, None, float("inf")
        if ticket is not None:
            self._running[ticket.kind] -= 1
        return ticket

    def _hold(self, ticket: Ticket) -> None:
        """Start nothing more of the group of a ticket that has failed, if that is what its failure means. Who
        submitted the group cancels the rest of it, but would come too late for the next."""
        if ticket.last_try and self._has_commands(ticket.group):
            self._held.add(ticket.group)

    def _has_commands(self, group: str) -> bool:
        return any(ticket.group == group for ticket in self._queues[Kind.COMPUTE])

    def _bury(self, worker: _Worker) -> None:
        """A worker is gone, or its pipe is: make sure of it, of what it ran, and fail its one ticket."""
        self._selector.unregister(worker.connection)
        # Before anything is closed: who gave it a task now would write into whatever has its descriptor next.
        with self._lock:
            del self._workers[worker.pid]
            if worker in self._idle:
                self._idle.remove(worker)
        processes.kill(worker.pid)
        # Of a worker whose fork server is gone we are the parent.
        exitcode = processes.reap(worker.pid)
        if exitcode is None:
            worker.process.join(2)
            exitcode = worker.process.exitcode
        worker.connection.close()
        worker.descriptors.close()
        if worker.ticket is not None:
            worker.ticket.stderr = read_tail(Scratch(self._scratch, worker.pid).stderr)
        if worker.reason is None:
            log.warning("worker %d died, exit code %s", worker.pid, exitcode)
        self._dead.append(worker)
        self._clear_up()  # before its task is over: then nothing of it is left
        with self._lock:
            ticket = self._free(worker)
            if ticket is not None:
                self._hold(ticket)
        if ticket is not None:
            self._finish(ticket, None, worker.reason or WorkerDiedError(worker.pid, exitcode))

    def _clear_up(self) -> None:
        """End what dead workers left running, and remove their files; later, and ever more seldom, if that
        cannot be done now, as when the node has too many files open."""
        ours = os.getsid(0)
        left, self._dead = self._dead, []
        try:
            # Commands run in sessions of their own, the fork server in ours.
            processes.kill_children(lambda _pid, session: session != ours)
            while left:
                Scratch(self._scratch, left[-1].pid).remove()
                left.pop()
        except OSError as e:
            log.warning("what worker %d left is not cleared up yet: %s", left[-1].pid, e)
            self._dead = left[-1:] + left[:-1]  # the next time another is the first
            self._buries_at = time.monotonic() + self._bury_pause
            self._bury_pause = min(2 * self._bury_pause, MOST_PAUSE_SECONDS)
        else:
            self._bury_pause, self._buries_at = PAUSE_SECONDS, float("inf")

    def _finish(self, ticket: Ticket, answer: Result, error: S4Error | None) -> None:
        try:
            ticket._finish(answer, error)
        except Exception:
            log.exception("the end of a ticket was not handled")

    def _retire(self, now: float) -> None:
        """End workers that have been idle for long, beyond the spare ones."""
        surplus = len(self._idle) - SPARE_WORKERS
        for worker in list(self._idle):
            if surplus > 0 and now - worker.idle_since > IDLE_SECONDS:
                surplus -= 1
                self._idle.remove(worker)
                self._kill(worker, StoppingError("idle"))


def _failed(answer: Result) -> bool:
    """Whether a command, or what was to run it, has failed."""
    if isinstance(answer, Ran):
        return answer.exitcode != 0 or bool(answer.problem)
    return isinstance(answer, Failure)


def _run_worker(*args: Any) -> None:
    # Imported here: the fork server has it loaded, the node itself never needs it.
    from s4.workers.worker import main

    main(*args)
