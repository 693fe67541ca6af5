"""Following a job to its end on all nodes: how far it is, which nodes are lost, and what failed."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping

from s4.asking import SILENCE_SECONDS, at_once
from s4.errors import BusyError, MissingError, S4Error, reason_of
from s4.jobcalls import cancel, tasks_of
from s4.leanjson import read_answer
from s4.record import replace
from s4.states import CANCELLED, FAILED, INTERRUPTED, LOST, MISSING, RUNNING
from s4.summary import JobSummary, Part, ShareStatus, Task, lost_part, newest, part_of, summarize
from s4.text import STDERR_SHOWN

TYPE_CHECKING = False  # what only annotations need is not imported: typing takes 3 ms of each start
if TYPE_CHECKING:
    from s4.client import Client
    from s4.http import Caller

POLL_SECONDS = 0.5  # how long a node may keep a question open
PAUSE_SECONDS = 0.2  # after an answer that came sooner although the share still runs
STRIKES = 2  # so often in a row a node does not answer before it is taken for lost
TICK_SECONDS = 0.1


class Watch:
    """What happens to a job that is followed. This one does nothing; the command line shows it."""

    def started(self, summary: JobSummary) -> None:
        """The job runs on all nodes, or is followed from here on."""

    def progress(self, summary: JobSummary) -> None:
        """Called every tenth of a second or so."""

    def lost(self, job: str, part: Part) -> None:
        """A node is lost, and the others go on."""

    def cancelling(self, job: str) -> None:
        """A Ctrl-C is about to cancel the job on all nodes."""

    def ended(self) -> None:
        """Nothing more comes."""


class Follower:
    """Follows a job: one thread a node asks how far it is."""

    def __init__(
        self,
        client: Client,
        known: Mapping[str, ShareStatus | None],
        watch: Watch,
        began: float | None = None,
    ) -> None:
        """`known` is what is known of each node's share, of one at least; `began` is when, by the monotonic
        clock, if it was here that the job began."""
        self._client = client
        self._share = newest(known.values())
        self._watch = watch
        self._shares = dict(known)
        self._lost: dict[str, Part] = {}
        self._changed = threading.Condition()
        self._cancelled = False
        self._began = began

    def wait(self) -> JobSummary:
        """Wait for the end on all nodes that can be reached; what failed is in the summary.

        Unless the job is to keep going, it is cancelled on the other nodes when one fails or is lost.
        """
        self._watch.started(self._summary())
        try:
            self._wait()
        finally:
            self._watch.ended()
        summary = self._summary()
        return replace(summary, failures=failures_of(self._client, summary))

    def _wait(self) -> None:
        for node in self._shares:
            threading.Thread(target=self._follow, args=(node,), daemon=True).start()
        told: set[str] = set()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: not self._open(), TICK_SECONDS)
                still_open = self._open()
                summary = self._summary()
            if not still_open:
                return
            for part in summary.nodes:
                if part.state in (LOST, MISSING) and self._share.keep_going and part.node not in told:
                    told.add(part.node)
                    self._watch.lost(self._share.id, part)
            if not self._share.keep_going and not self._cancelled:
                self._stop_others(summary, still_open)
            self._watch.progress(summary)

    def _open(self) -> list[str]:
        """The nodes that are not lost and whose share runs, as far as is known."""
        return [
            node
            for node, share in self._shares.items()
            if node not in self._lost and (share is None or share.state == RUNNING)
        ]

    def _stop_others(self, summary: JobSummary, others: list[str]) -> None:
        # One that is missing but never was there may yet come, from whoever submits the job.
        parts = [part for part in summary.nodes if part.state != MISSING or self._shares[part.node]]
        if any(part.state in (FAILED, CANCELLED, INTERRUPTED, LOST, MISSING) for part in parts):
            self._cancelled = True
            for node in others:
                # Not waited for: the share's end will be seen.
                arguments = (self._client, node, self._share.id, self._share.run)
                threading.Thread(target=_cancel_if_reachable, args=arguments, daemon=True).start()

    def _follow(self, node: str) -> None:
        strikes = 0
        with self._client.caller(node, SILENCE_SECONDS) as caller:
            while node in self._open():
                asked = time.monotonic()
                try:
                    share = self._ask(caller)
                except BusyError:
                    pass
                except S4Error as e:
                    strikes += 1
                    if strikes == STRIKES:
                        state = MISSING if isinstance(e, MissingError) else LOST
                        reason = reason_of(e, node)
                        with self._changed:
                            self._lost[node] = lost_part(node, reason, self._shares[node], state)
                            self._changed.notify()
                        return
                else:
                    strikes = 0
                    with self._changed:
                        self._shares[node] = share
                        if share.state == INTERRUPTED:  # it was open: the node has just been stopped
                            self._lost[node] = lost_part(node, share.error or "it stopped", share)
                        self._changed.notify()
                if time.monotonic() < asked + POLL_SECONDS and node in self._open():
                    time.sleep(PAUSE_SECONDS)

    def _ask(self, caller: Caller) -> ShareStatus:
        parameters = {"job": self._share.id, "wait": repr(POLL_SECONDS)}
        answer = caller.call("GET", "/job", parameters, silence=SILENCE_SECONDS)
        return ShareStatus.read(caller.server, read_answer(caller.server, answer, dict))

    def _summary(self) -> JobSummary:
        parts = []
        for node, share in self._shares.items():
            if node in self._lost:
                parts.append(self._lost[node])
            else:
                parts.append(Part(node, RUNNING, None) if share is None else part_of(share))
        return summarize(self._share, parts, time.monotonic() - self._began if self._began else None)


def failures_of(client: Client, summary: JobSummary) -> list[Task]:
    """The tasks of a job that failed, with the end of their stderr, from the nodes that can be reached."""
    found: list[Task] = []

    def ask(node: str) -> None:
        tasks = tasks_of(client, node, summary.job, state=FAILED, stderr=True)
        try:
            found.extend(replace(task, stderr=(task.stderr or "")[-STDERR_SHOWN:]) for task in tasks)
        except S4Error:
            pass  # such as that it went down since; its share says how many failed

    at_once(ask, [part.node for part in summary.nodes if part.failed and part.state != LOST])
    return sorted(found, key=lambda task: task.task)


def _cancel_if_reachable(client: Client, node: str, job: str, run: int) -> None:
    try:
        cancel(client, node, job, run)
    except S4Error:
        pass  # its end, or that it is down, will be seen by who follows it
