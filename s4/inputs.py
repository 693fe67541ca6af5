"""Which tasks a job has on one node: the inputs, where outputs go, and what exists already."""

from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from s4.config import Conf
from s4.http import Caller
from s4.index import JobIndex, JobRow, KeyIndex
from s4.keys import check_job_folders, group_name, matcher, name_of, prefix_of, url
from s4.listing import rows

MAP, MAP_TO_N, MAP_FROM_N = "map", "map-to-n", "map-from-n"
EVAL = "eval"  # recorded as a job, but it has no folders


class Input(NamedTuple):
    """What one command works on: the path of a key (of a group its first), and how many keys and bytes."""

    path: str
    keys: int
    size: int


class Group(NamedTuple):
    """The keys of a merge that share a prefix: their paths in order, and their bytes."""

    paths: list[str]
    size: int


class Inputs:
    """The inputs of a job on the node at `position`. Raises BadRequestError for folders that are refused."""

    def __init__(self, job: JobRow, conf: Conf, position: int, keys: KeyIndex, jobs: JobIndex) -> None:
        self._job = job
        self._folder, self._pattern, self._target = check_job_folders(job.indir, job.outdir)
        self._conf = conf
        self._position = position
        self._keys = keys
        self._jobs = jobs
        self._groups: dict[str, Group] | None = None
        self._made: set[str] | None = None

    def all(self) -> Iterator[Input]:
        """Every input, in key order; groups in the order of their prefixes."""
        if self._job.kind == MAP_FROM_N:
            for _prefix, (paths, size) in sorted(self._grouped().items()):
                yield Input(paths[0], len(paths), size)
        else:
            for path, size in self._below():
                yield Input(path, 1, size)

    def _below(self) -> Iterator[tuple[str, int]]:
        matches, start = matcher(self._pattern), len(self._folder)
        for chunk in self._keys.list_keys(self._folder):
            for path, size, _created_s in chunk:
                if matches(path[start:]):
                    yield path, size or 0

    def _grouped(self) -> dict[str, Group]:
        if self._groups is None:
            paths: defaultdict[str, list[str]] = defaultdict(list)
            sizes: defaultdict[str, int] = defaultdict(int)
            for path, size in self._below():
                prefix = prefix_of(name_of(path))
                paths[prefix].append(path)
                sizes[prefix] += size
            self._groups = {prefix: Group(found, sizes[prefix]) for prefix, found in paths.items()}
        return self._groups

    def group(self, path: str) -> list[str]:
        """The paths of the group that a key belongs to, none if all are gone."""
        found = self._grouped().get(prefix_of(name_of(path)))
        return found.paths if found else []

    def target(self, path: str) -> str:
        """Where the output for an input goes; for map-to-n the folder of its outputs, with '/'."""
        if self._job.kind == MAP:
            return self._target + path[len(self._folder) :]
        if self._job.kind == MAP_TO_N:
            return self._target + name_of(path) + "/"
        return self._target + group_name(prefix_of(name_of(path)), map(name_of, self.group(path) or [path]))

    def exists(self, path: str) -> bool:
        """Whether the output for an input exists already.

        Of a shuffle: whether any node has outputs for it, unless attempts are known of which none ended well.
        """
        if self._job.kind != MAP_TO_N:
            return self._keys.exists(self.target(path))
        if self._made is None:
            self._made = set().union(*map(self._folders_on, range(len(self._conf.servers))))
            unfinished = self._jobs.unfinished_inputs(self._job.kind, self._job.outdir)
            self._made -= {name_of(path) for path in unfinished}
        return name_of(path) in self._made

    def _folders_on(self, position: int) -> set[str]:
        """The names of the folders in OUTDIR that a node has. Raises NodeError."""
        if position == self._position:
            chunks = self._keys.list_folder(self._target)
            return {name_of(row.path[:-1]) for chunk in chunks for row in chunk if row.size is None}
        with Caller(str(self._conf.servers[position]), self._conf.fingerprint, 60.0) as caller:
            answer = caller.open("GET", "/list", {"prefix": url(self._target), "recursive": "false"})
            return {
                entry.path[:-1] for chunk in rows(caller, answer) for entry in chunk if entry.size == "PRE"
            }
