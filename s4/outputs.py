"""The outputs of shuffles in a folder, on all nodes: which tasks made them, and how they are removed.

The outputs of a task of map-to-n lie on other nodes than its record. A node that runs such a task again asks
them all what there is of it, and has them remove what an earlier attempt made.
"""

from collections import defaultdict
from collections.abc import Sequence

from s4.config import Conf
from s4.errors import NodeError, NonsenseError, S4Error, StoppingError, reason_of
from s4.http import Caller
from s4.index import KeyIndex, Maker
from s4.keys import url
from s4.leanjson import dumps, read_answer

REMOVED_AT_ONCE = 1000  # tasks whose outputs one request removes
_SECONDS = 60.0  # for the answer of another node


class Outputs:
    """The keys below `outdir`, a path that ends in '/', as the node at `position` sees the cluster."""

    def __init__(self, conf: Conf, position: int, keys: KeyIndex, outdir: str) -> None:
        self._conf = conf
        self._position = position
        self._keys = keys
        self._outdir = outdir
        self._caller: Caller | None = None  # of the request under way
        self._given_up: S4Error | None = None

    def abort(self, reason: S4Error) -> None:
        """Have what waits for another node, or would wait, fail with this reason; the first one counts.

        Where a connection is just being made, that takes some seconds.
        """
        self._given_up = self._given_up or reason
        caller = self._caller
        if caller is not None:
            caller.abort()

    def makers(self) -> dict[str, dict[Maker, int]]:
        """All that made keys there, by folder, and when the last of them, in seconds since 1970. Raises
        NodeError."""
        found: defaultdict[str, dict[Maker, int]] = defaultdict(dict)
        for position in range(len(self._conf.servers)):
            for maker, created_s in self._makers_on(position).items():
                known = found[maker.folder]
                known[maker] = max(created_s, known.get(maker, created_s))
        return found

    def own_makers(self) -> set[tuple[str, int]]:
        """The tasks of this node that made keys there: job and number. Raises NodeError."""
        makers = {maker[1:] for makers in self.makers().values() for maker in makers}
        tasks = {(job, task) for job, task in makers if job is not None and task is not None}
        return {(job, task) for job, task in tasks if task % len(self._conf.servers) == self._position}

    def _makers_on(self, position: int) -> dict[Maker, int]:
        if position == self._position:
            return self._keys.makers(self._outdir)
        server = str(self._conf.servers[position])
        answer = self._ask(server, "GET", "/outputs")
        try:
            return {Maker(*maker): int(created_s) for *maker, created_s in read_answer(server, answer, list)}
        except (ValueError, TypeError):
            raise NonsenseError(server) from None

    def remove(self, makers: Sequence[Maker]) -> None:
        """Remove what these tasks made, on all nodes. Raises S4Error."""
        for start in range(0, len(makers), REMOVED_AT_ONCE):
            some = makers[start : start + REMOVED_AT_ONCE]
            for position, server in enumerate(map(str, self._conf.servers)):
                if position == self._position:
                    self._keys.remove_made(self._outdir, some)
                else:
                    self._ask(server, "POST", "/remove_outputs", dumps(some))

    def _ask(self, server: str, method: str, path: str, body: bytes | None = None) -> bytes:
        with Caller(server, self._conf.fingerprint, _SECONDS) as caller:
            self._caller = caller
            try:
                if self._given_up is not None:
                    raise self._given_up
                return caller.call(method, path, {"prefix": url(self._outdir)}, body)
            except S4Error as e:
                if self._given_up is not None:
                    raise self._given_up from None
                if isinstance(e, StoppingError):  # it is not this node that stops
                    raise NodeError(server, reason_of(e, server)) from e
                raise
            finally:
                self._caller = None
