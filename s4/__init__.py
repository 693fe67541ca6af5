"""s4: a storage cluster with compute beside the data. The public Python face is `Client` and the errors."""

from s4.errors import S4Error

TYPE_CHECKING = False  # what only annotations need is not imported: typing takes 3 ms
if TYPE_CHECKING:
    from typing import Any

    from s4.client import Client
    from s4.results import Entry, Evaluation

__all__ = ["Client", "Entry", "Evaluation", "S4Error"]


def __getattr__(name: str) -> "Any":
    # The command line imports this package first, and its start-up is what users wait for: the client is
    # imported when it is asked for.
    if name in __all__:
        from s4 import client, results

        return getattr(client if name == "Client" else results, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
