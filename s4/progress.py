"""Showing on stderr how far a job is: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import os
import sys
import time

from s4.following import Watch
from s4.report import beginning, lost, over, underway
from s4.summary import JobSummary, Part
from s4.text import say, shortened, size

TYPE_CHECKING = False  # what only annotations need is not imported: typing takes 3 ms of each start
if TYPE_CHECKING:
    from typing import Any, TextIO

    from tqdm import tqdm

LINE_SECONDS = 30.0
_ROWS = 24  # any number will do for a single bar, but tqdm draws nothing on a terminal of unknown height
_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} tasks [{elapsed}<{remaining}{postfix}]"


def watch_for(*, quiet: bool) -> Watch:
    """What shows a job here."""
    if quiet:
        return Losses()
    return Bar() if sys.stderr.isatty() else Lines()


def columns(terminal: TextIO) -> int:
    """The width of a terminal, also of one that does not know it."""
    return os.get_terminal_size(terminal.fileno()).columns or 80


class Losses(Watch):
    """Only which nodes are lost, as soon as that is known."""

    def lost(self, job: str, part: Part) -> None:
        """Say it."""
        self._say(f"job {job}: {lost(part)}; the others go on")

    def _say(self, line: str) -> None:
        say(line)


class _Shown(Losses):
    def cancelling(self, job: str) -> None:
        self._say(f"cancelling job {job} on all nodes … (Ctrl-C again leaves at once)")


class Lines(_Shown):
    """A line at the start and then one every half a minute."""

    def started(self, summary: JobSummary) -> None:
        """Say what begins."""
        self._began = self._said = time.monotonic()
        self._before = summary
        self._say(beginning(summary))

    def progress(self, summary: JobSummary) -> None:
        """Say how far it is, if it is time."""
        now = time.monotonic()
        if now < self._said + LINE_SECONDS:
            return
        self._said = now
        passed = now - self._began
        done = over(summary) - over(self._before)
        left = None
        if summary.tasks is not None and done:
            left = (summary.tasks - summary.ended - summary.lost) * passed / done
        rate = (summary.bytes_in - self._before.bytes_in) / passed
        self._say(underway(summary, left, rate))


class Bar(_Shown):
    """One live bar for the whole cluster. Where the terminal is gone, nothing."""

    _bar: tqdm[Any] | None = None

    def started(self, summary: JobSummary) -> None:
        """Draw the bar."""
        try:
            self._draw(summary)
        except OSError:
            self._bar = None

    def _draw(self, summary: JobSummary) -> None:
        from tqdm import tqdm

        tqdm.monitor_interval = 0  # no thread that looks after bars
        self._began = time.monotonic()
        self._bytes_before = summary.bytes_in
        self._bar = tqdm(
            desc=f"job {summary.job} {shortened(summary.kind, 10)}",
            initial=over(summary),
            total=summary.tasks,
            bar_format=_BAR,
            leave=False,
            ncols=columns(sys.stderr),
            nrows=_ROWS,
            smoothing=0,  # time left from the speed since the start
        )

    def progress(self, summary: JobSummary) -> None:
        """Move the bar."""
        try:
            if self._bar is not None:
                self._move(self._bar, summary)
        except OSError:
            self._bar = None

    def _move(self, bar: tqdm[Any], summary: JobSummary) -> None:
        bar.total, bar.ncols = summary.tasks, columns(sys.stderr)
        rate = (summary.bytes_in - self._bytes_before) / max(0.001, time.monotonic() - self._began)
        bar.set_postfix_str(f"{summary.failed} failed, {size(rate)}/s", refresh=False)
        bar.update(over(summary) - bar.n)
        bar.refresh()

    def ended(self) -> None:
        """Remove the bar."""
        bar, self._bar = self._bar, None
        if bar is not None:
            try:
                bar.close()
            except OSError:
                pass

    def _say(self, line: str) -> None:
        try:
            if self._bar is not None:
                self._bar.clear()
        except OSError:
            self._bar = None
        super()._say(line)
