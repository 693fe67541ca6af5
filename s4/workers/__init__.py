"""The pool of worker processes that moves bytes and runs commands. It never touches the index."""

from s4.workers.pool import Kind, Pool, Ticket

__all__ = ["Kind", "Pool", "Ticket"]
