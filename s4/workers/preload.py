"""What the fork server loads before it forks workers: their code, and a silent end beside a killed node.

A node that is killed while it asks for a worker leaves the fork server of the standard library with half a
request, of which it would die with a traceback in the log of the node, as if the fault were its own.
"""

import sys
from types import TracebackType

import s4.workers.worker  # noqa: F401  (so that a worker starts at once)


def _report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if kind is not EOFError:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _report
