"""s4: a storage cluster with compute beside the data. Here is what Python programs use: the client, what its
methods take and return, and the errors that carry more than a text."""

from s4.errors import S4Error

TYPE_CHECKING = False  # what only annotations need is not imported: typing takes 3 ms
if TYPE_CHECKING:
    from typing import Any

    from s4.client import Client
    from s4.copying import CopyError
    from s4.following import Watch
    from s4.jobcontrol import JobError
    from s4.results import Entry, Evaluation
    from s4.summary import JobSummary

__all__ = ["Client", "CopyError", "Entry", "Evaluation", "JobError", "JobSummary", "S4Error", "Watch"]

_MODULES = {
    "Client": "s4.client",
    "CopyError": "s4.copying",
    "Entry": "s4.results",
    "Evaluation": "s4.results",
    "JobError": "s4.jobcontrol",
    "JobSummary": "s4.summary",
    "Watch": "s4.following",
}


def __getattr__(name: str) -> "Any":
    # The command line imports this package first, and its start-up is what users wait for: the client is
    # imported when it is asked for.
    if name in _MODULES:
        from importlib import import_module

        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
