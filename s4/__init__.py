"""s4: a storage cluster with compute beside the data. The public Python face is `Client` and the errors."""

from s4.errors import S4Error

TYPE_CHECKING = False  # what only annotations need is not imported: typing takes 3 ms
if TYPE_CHECKING:
    from typing import Any

    from s4.client import Client
    from s4.jobcontrol import JobError
    from s4.results import Entry, Evaluation
    from s4.summary import JobSummary

__all__ = ["Client", "Entry", "Evaluation", "JobError", "JobSummary", "S4Error"]

_MODULES = {"Client": "s4.client", "JobError": "s4.jobcontrol", "JobSummary": "s4.summary"}


def __getattr__(name: str) -> "Any":
    # The command line imports this package first, and its start-up is what users wait for: the client is
    # imported when it is asked for.
    if name in __all__:
        from importlib import import_module

        return getattr(import_module(_MODULES.get(name, "s4.results")), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
