"""Puts, gets, removals and listings in any order do what they do to a dictionary."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule
from reference import owner_of

from s4 import Client
from s4.errors import S4Error

# Few segments, so that keys and folders meet; '.' and '-' sort before '/', '0' after it.
SEGMENTS = st.sampled_from(["0", "0_a", "1", "a", "a-", "a.", "a0", "é"])
PATHS = st.lists(SEGMENTS, min_size=1, max_size=3).map("/".join)
PREFIXES = st.one_of(st.just(""), PATHS, PATHS.map(lambda path: path + "/"))


@pytest.fixture(scope="module")
def shared(cluster: Cluster) -> Iterator[Cluster]:
    """The shared cluster, its state machine's way to it."""
    Store.cluster = cluster
    yield cluster


class Store(RuleBasedStateMachine):
    """One bucket, and the dictionary that it should equal."""

    cluster: Cluster

    def __init__(self) -> None:
        super().__init__()
        self.bucket = self.cluster.fresh_bucket()
        self.client = Client(str(self.cluster.conf))
        self.model: dict[str, bytes] = {}

    def _node(self, path: str) -> int:
        return owner_of(path.split("/")[-1], len(self.cluster.nodes))

    def _refused(self, path: str) -> bool:
        """Whether the key exists, or its node needs a folder where a key is or the other way round."""
        neighbours = [other for other in self.model if self._node(other) == self._node(path)]
        return any(
            other == path or other.startswith(path + "/") or path.startswith(other + "/")
            for other in neighbours
        )

    @rule(path=PATHS, data=st.binary(max_size=50))
    def put(self, path: str, data: bytes) -> None:
        answer = self.cluster.nodes[self._node(path)].put(f"{self.bucket}/{path}", data)
        assert answer.status == (409 if self._refused(path) else 200)
        if answer.status == 200:
            self.model[path] = data

    @rule(path=PATHS)
    def get(self, path: str) -> None:
        target = self.cluster.work / "model"
        try:
            self.client.cp(f"{self.bucket}/{path}", str(target))
        except S4Error:
            assert path not in self.model
        else:
            assert target.read_bytes() == self.model[path]

    @rule(path=PATHS)
    def remove(self, path: str) -> None:
        try:
            self.client.rm(f"{self.bucket}/{path}")
        except S4Error:
            assert path not in self.model
        else:
            del self.model[path]

    @rule(prefix=PREFIXES)
    def remove_below(self, prefix: str) -> None:
        self.client.rm(f"{self.bucket}/{prefix}", recursive=True)
        self.model = {path: data for path, data in self.model.items() if not path.startswith(prefix)}

    @rule(prefix=PREFIXES)
    def list_below(self, prefix: str) -> None:
        listed = [
            (entry[3], int(entry[2])) for entry in self.client.ls(f"{self.bucket}/{prefix}", recursive=True)
        ]
        expected = sorted(path for path in self.model if path.startswith(prefix))
        assert listed == [(path, len(self.model[path])) for path in expected]

    @rule(prefix=PREFIXES)
    def list_folder(self, prefix: str) -> None:
        folder = prefix[: prefix.rfind("/") + 1]
        below = [path.removeprefix(folder) for path in self.model if path.startswith(prefix)]
        expected = sorted({name.split("/")[0] + ("/" if "/" in name else "") for name in below})
        assert [entry[3] for entry in self.client.ls(f"{self.bucket}/{prefix}")] == expected

    def teardown(self) -> None:
        self.client.rm(f"{self.bucket}/", recursive=True)
        for node in self.cluster.nodes:
            path: Path = node.path_of(self.bucket)
            assert not path.exists()


Store.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


@pytest.mark.usefixtures("shared")
class TestStore(Store.TestCase):  # type: ignore[misc, valid-type]
    pass
