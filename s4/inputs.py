"""Which tasks a job has on one node: the inputs, where outputs go, and what exists already."""

from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

from s4.config import Conf
from s4.errors import ConflictError
from s4.index import UNKNOWN_JOB, JobIndex, JobRow, KeyIndex, Maker
from s4.keys import START_AGAIN, check_job_folders, group_name, matcher, name_of, prefix_of, url
from s4.outputs import Outputs
from s4.states import DONE, MAP, MAP_FROM_N, MAP_TO_N, RUNNING

CLOCK_SECONDS = 60  # how far the clocks of nodes may be apart


class Input(NamedTuple):
    """What one command works on: the path of a key (of a group its first), and how many keys and bytes."""

    path: str
    keys: int
    size: int


class Group(NamedTuple):
    """The keys of a merge that share a prefix: their paths in order, and their bytes."""

    paths: list[str]
    size: int


class _Made(NamedTuple):
    """A task that made keys, when it made the last of them, and its input and state if they are known."""

    maker: Maker
    created_s: int
    origin: str | None
    state: str | None


class Inputs:
    """The inputs of a job on the node at `position`. Raises BadRequestError for folders that are refused."""

    def __init__(self, job: JobRow, conf: Conf, position: int, keys: KeyIndex, jobs: JobIndex) -> None:
        self._job = job
        self._folder, self._pattern, self._target = check_job_folders(job.indir, job.outdir)
        self._keys = keys
        self._jobs = jobs
        self._groups: dict[str, Group] | None = None
        self.outputs = Outputs(conf, position, keys, self._target)
        self._makers: dict[str, dict[Maker, int]] | None = None

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

    def exists(self, path: str, besides: Maker | None = None) -> bool:
        """Whether the output for an input exists already.

        Of a shuffle: whether any node has keys that were made from it by a task that ended well or may yet,
        or of which nothing is known any more, unless they are older than it; what `besides` made does not
        count. Raises NodeError if a node does not answer, ConflictError if what was known of a maker was lost
        with an index, and no task made any of them well: they may be a part of what was to be made.
        """
        if self._job.kind != MAP_TO_N:
            return self._keys.exists(self.target(path))
        made = [found for found in self._made_from(path) if found.maker != besides]
        states = [found.state for found in made if found.origin == path]
        if DONE in states or RUNNING in states:
            return True
        if any(map(self._is_lost, made)):
            there = url(self.target(path))
            raise ConflictError(
                f"since a reindex it is not known whether what is in {there} is whole:"
                f" remove it (all such: s4 rm -r {self._job.outdir}) and {START_AGAIN}"
            )
        if states:
            return False
        unknown = [found.created_s for found in made if found.origin is None]
        [key] = self._keys.get_all([path])
        return bool(unknown) and (key is None or max(unknown) + CLOCK_SECONDS >= key.created_s)

    def _is_lost(self, found: _Made) -> bool:
        """Whether what is known of a maker was lost with an index, and not pruned."""
        if found.maker.job is None or found.origin is not None:
            return False
        return found.maker.job == UNKNOWN_JOB or found.created_s < self._kept_since

    @cached_property
    def _kept_since(self) -> float:
        return self._jobs.kept_since()

    def half_made(self, path: str) -> list[Maker]:
        """The tasks that made some of the outputs for an input of a shuffle, and did not end well. Raises
        NodeError if a node does not answer."""
        made = [found for found in self._made_from(path) if found.origin == path]
        return [found.maker for found in made if found.state not in (DONE, RUNNING)]

    def _made_from(self, path: str) -> list[_Made]:
        """What made keys in the folder for an input."""
        if self._makers is None:
            self._makers = self.outputs.makers()
        found = []
        for maker, created_s in self._makers.get(name_of(path), {}).items():
            _folder, job, task = maker
            known = None if job is None or task is None else self._jobs.made_from(job, task)
            found.append(_Made(maker, created_s, *(known or (None, None))))
        return found
