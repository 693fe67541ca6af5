"""s4: a storage cluster with compute beside the data. Here is what Python programs use: the client, what its
methods take and return, and the errors that carry more than a text (the others are in s4.errors)."""

from s4.errors import S4Error

TYPE_CHECKING = False  # what only annotations need is not imported: typing takes 3 ms
if TYPE_CHECKING:
    from s4.client import Client
    from s4.copying import CopyError
    from s4.following import Watch
    from s4.jobcontrol import JobError, Request
    from s4.queries import KeyInfo, Result
    from s4.results import Entry, Evaluation
    from s4.summary import JobSummary, Part, PlanPart, Task

__all__ = [
    "Client",
    "CopyError",
    "Entry",
    "Evaluation",
    "JobError",
    "JobSummary",
    "KeyInfo",
    "Part",
    "PlanPart",
    "Request",
    "Result",
    "S4Error",
    "Task",
    "Watch",
]

_MODULES = {
    "Client": "s4.client",
    "CopyError": "s4.copying",
    "Entry": "s4.results",
    "Evaluation": "s4.results",
    "JobError": "s4.jobcontrol",
    "JobSummary": "s4.summary",
    "KeyInfo": "s4.queries",
    "Part": "s4.summary",
    "PlanPart": "s4.summary",
    "Request": "s4.jobcontrol",
    "Result": "s4.queries",
    "Task": "s4.summary",
    "Watch": "s4.following",
}


# The command line imports this package first, and its start-up is what users wait for: the client is imported
# when it is asked for. Type checkers know the names from above, and should not take any other for one.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name in _MODULES:
            from importlib import import_module

            return getattr(import_module(_MODULES[name]), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
