"""s4: a storage cluster with compute beside the data. The public Python face is `Client` and the errors."""

from typing import TYPE_CHECKING, Any

from s4.errors import S4Error

if TYPE_CHECKING:
    from s4.client import Client, Entry, Evaluation

__all__ = ["Client", "Entry", "Evaluation", "S4Error"]


def __getattr__(name: str) -> Any:
    # The command line imports this package first and runs in loops: what the client needs
    # (http.client above all, 30 ms) is imported when it is asked for.
    if name in __all__:
        import s4.client

        return getattr(s4.client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
