"""Fixtures: a cluster that ordinary tests share, others for tests that break things, and folders."""

import contextlib
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster import Cluster

# A shell starts what it runs in the background with SIGINT ignored, which what we start would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Three nodes, shared by all tests that leave them as they are; each test takes a bucket of its own."""
    with Cluster(3) as three:
        yield three


@pytest.fixture
def bucket(cluster: Cluster) -> str:
    """A fresh bucket in the shared cluster, as `s4://NAME`."""
    return cluster.fresh_bucket()


@pytest.fixture
def start_cluster() -> Iterator[Callable[..., Cluster]]:
    """Starts clusters for one test alone; takes the arguments of Cluster."""
    with contextlib.ExitStack() as stack:
        yield lambda *arguments, **options: stack.enter_context(Cluster(*arguments, **options))


@pytest.fixture
def folder() -> Iterator[Path]:
    """An empty folder that is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="s4-test-") as path:
        yield Path(path)
