"""s4: a storage cluster with compute beside the data. The public Python face is `Client` and the errors."""

from typing import TYPE_CHECKING, Any

from s4.errors import S4Error

if TYPE_CHECKING:
    from s4.client import Client, Entry, Evaluation
    from s4.jobcontrol import JobError
    from s4.summary import JobSummary

__all__ = ["Client", "Entry", "Evaluation", "JobError", "JobSummary", "S4Error"]


def __getattr__(name: str) -> Any:
    # The command line imports this package first and runs in loops: what the client needs
    # (http.client above all, 30 ms) is imported when it is asked for.
    if name in __all__:
        import importlib

        module = {"JobError": "s4.jobcontrol", "JobSummary": "s4.summary"}.get(name, "s4.client")
        return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
