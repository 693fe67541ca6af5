"""What shuffles left in a folder on all nodes: which tasks made it, and how it is removed.

The outputs of a task of map-to-n lie on other nodes than its record. A node that runs such a task again asks
them all what there is of it, and has them remove what an earlier attempt made.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from s4.config import Conf
from s4.errors import NodeError
from s4.http import Caller
from s4.index import KeyIndex
from s4.keys import url

REMOVED_AT_ONCE = 1000  # tasks whose outputs one request removes
_SECONDS = 60.0  # for the answer of another node


class Maker(NamedTuple):
    """Who made keys in OUTDIR/`folder`/: a task of a job, None for what was not made by a job."""

    folder: str
    job: str | None
    task: int | None


class Remains:
    """The keys below `outdir`, a path that ends in '/', as the node at `position` sees the cluster."""

    def __init__(self, conf: Conf, position: int, keys: KeyIndex, outdir: str) -> None:
        self._conf = conf
        self._position = position
        self._keys = keys
        self._outdir = outdir

    def makers(self) -> dict[str, set[Maker]]:
        """All that made keys there, by folder. Raises NodeError."""
        found: defaultdict[str, set[Maker]] = defaultdict(set)
        for position in range(len(self._conf.servers)):
            for maker in self._makers_on(position):
                found[maker.folder].add(maker)
        return found

    def _makers_on(self, position: int) -> Iterable[Maker]:
        if position == self._position:
            return [Maker(*row) for row in self._keys.makers(self._outdir)]
        with self._caller(position) as caller:
            answer = caller.call("GET", "/outputs", {"prefix": url(self._outdir)})
            try:
                return [Maker(folder, job, task) for folder, job, task in json.loads(answer)]
            except (ValueError, TypeError):
                raise NodeError(caller.server, "its answer makes no sense") from None

    def remove(self, makers: Sequence[Maker], unlink: Callable[[Sequence[str]], None]) -> None:
        """Remove what these tasks made, on all nodes; `unlink` as in KeyIndex.remove. Raises S4Error."""
        for start in range(0, len(makers), REMOVED_AT_ONCE):
            some = makers[start : start + REMOVED_AT_ONCE]
            for position in range(len(self._conf.servers)):
                if position == self._position:
                    self._keys.remove_made(self._outdir, some, unlink)
                    continue
                with self._caller(position) as caller:
                    body = json.dumps(some).encode()
                    caller.call("POST", "/remove_outputs", {"prefix": url(self._outdir)}, body)

    def _caller(self, position: int) -> Caller:
        return Caller(str(self._conf.servers[position]), self._conf.fingerprint, _SECONDS)
