"""Files of keys, where no request is needed to see them: what happens while another thread is at them."""

import errno
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from cluster import UNPRIVILEGED

from s4 import storage as storage_module
from s4.errors import ConflictError, MissingError
from s4.index import Database, KeyIndex, KeyRow
from s4.recovery import recover
from s4.storage import Storage
from s4.workers import scratch


def test_a_key_that_is_removed_meanwhile_is_missing_and_nothing_else(folder: Path) -> None:
    storage = Storage(str(folder))
    (folder / "b").mkdir()
    done = threading.Event()

    def come_and_go() -> None:
        while not done.is_set():
            (folder / "b" / "key").touch()
            (folder / "b" / "key").unlink()

    other = threading.Thread(target=come_and_go)
    other.start()
    outcome: Counter[str] = Counter()
    try:
        deadline = time.monotonic() + 60
        while outcome["there"] < 2000 or outcome["missing"] < 2000:
            assert time.monotonic() < deadline, outcome
            try:
                assert storage.locate("b/key") == (f"{storage.root}/b/key", 0)
            except MissingError:
                outcome["missing"] += 1
            else:
                outcome["there"] += 1
    finally:
        done.set()
        other.join()
        storage.close()


def test_what_is_no_file_on_the_way_is_refused_and_waits_for_nobody(folder: Path) -> None:
    storage = Storage(str(folder))
    (folder / "b").mkdir()
    (folder / "elsewhere").mkdir()
    os.mkfifo(folder / "elsewhere" / "fifo")
    (folder / "b" / "far").symlink_to(folder / "elsewhere")
    (folder / "b" / "link").symlink_to(folder / "elsewhere" / "fifo")
    for path in ("b/far/fifo", "b/link"):
        with pytest.raises(ConflictError, match="symbolic link"):
            storage.locate(path)
    storage.close()


def test_a_folder_that_cannot_be_read_is_left_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    storage = Storage(str(folder))
    for name in ("b", "closed"):
        (folder / name).mkdir()
        (folder / name / "key").touch()
    scandir = os.scandir

    def refuse(path: str) -> object:  # root may read everything
        if path.endswith("/closed"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert list(storage.walk()) == ["b/key"]
    assert "left alone: 'closed': Permission denied" in caplog.text
    storage.close()


def test_what_cannot_be_removed_is_told_and_keeps_no_node_from_starting(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    storage = Storage(str(folder))
    for name in ("_tempdirs/stuck", "_tempdirs/other", "_tempfiles/other"):
        (folder / name).mkdir()
    really = storage_module.remove_tree

    def remove(path: str) -> None:
        if path.endswith("stuck"):  # as by `chattr +i`, or of another user
            raise PermissionError(errno.EPERM, "Operation not permitted", path)
        really(path)

    monkeypatch.setattr(storage_module, "remove_tree", remove)
    storage.empty_temporary()
    assert "_tempdirs/stuck stays until the next start" in caplog.text
    assert [path.name for path in folder.glob("_temp*/*")] == ["stuck"]
    storage.close()


def test_empty_folders_go_and_what_cannot_be_looked_into_stays(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(str(folder))
    for name in ("b/x/empty/deep", "b/x/full", "b/closed/empty", "c/empty"):
        (folder / name).mkdir(parents=True)
    (folder / "b" / "x" / "full" / "key").touch()
    (folder / "b" / "x" / "link").symlink_to(folder / "b" / "closed")
    really = storage._open_folder

    def open_folder(path: str, *, create: bool = False) -> int:
        if path == "b/closed":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return really(path, create=create)

    monkeypatch.setattr(storage, "_open_folder", open_folder)
    for prefix in ("b/x/", "b/closed/", "b/missing/", "c/"):
        storage.remove_empty_folders(prefix)
    left = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.parts[-2][0] != "_")
    assert [path for path in left if path[0] != "_"] == [
        *("b", "b/closed", "b/closed/empty", "b/x", "b/x/full", "b/x/full/key", "b/x/link"),
    ]
    storage.close()


def test_a_sweep_looks_only_where_keys_of_its_prefix_may_be(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(str(folder))
    for name in ("b/other", "b/01/full", "b/02/empty", "b/other/empty"):
        (folder / name).mkdir(parents=True)
    for name in ("b/000", "b/01/full/key", "b/other/key", "b/1"):
        (folder / name).touch()
    scandir, seen = os.scandir, list[str]()

    def spy(place: str | int) -> object:
        path = place if isinstance(place, str) else os.readlink(f"/proc/self/fd/{place}")
        seen.append(os.path.relpath(path, folder))
        return scandir(place)

    monkeypatch.setattr(os, "scandir", spy)
    assert sorted(storage.walk("b/0")) == ["b/000", "b/01/full/key"]
    storage.remove_empty_folders("b/0")
    assert set(seen) == {"b", "b/01", "b/01/full", "b/02", "b/02/empty"}
    assert sorted(path.name for path in (folder / "b").iterdir()) == ["000", "01", "1", "other"]
    assert (folder / "b" / "other" / "empty").exists()
    storage.close()


def test_after_a_crash_the_index_is_asked_for_many_files_at_once(folder: Path) -> None:
    storage = Storage(str(folder))
    database = Database(storage.index_path)
    keys = [f"b/in/{i:04}" for i in range(0, 2500, 2)]
    (folder / "b" / "in").mkdir(parents=True)
    for i in range(2500):
        (folder / "b" / "in" / f"{i:04}").touch()
    KeyIndex(database, storage.unlink).restore([KeyRow(key, 0, "0", 0) for key in keys])
    with database.write() as db:
        db.execute("INSERT INTO removals (prefix) VALUES ('b/in/')")
    statements: list[str] = []
    with database.read() as reader:
        reader.set_trace_callback(statements.append)
    assert recover(storage, database) == []
    assert len([sql for sql in statements if "FROM keys" in sql]) <= 5
    assert sorted(storage.walk()) == keys
    database.close()
    storage.close()


def test_a_file_that_a_crash_left_makes_way_for_a_folder(folder: Path) -> None:
    storage = Storage(str(folder))
    (folder / "b").mkdir()
    (folder / "b" / "x").write_bytes(b"left")
    made = Path(storage.temporary_file("made"))
    made.write_bytes(b"new")
    with storage.placing() as place:
        place(str(made), "b/x/y/000")
    assert (folder / "b" / "x" / "y" / "000").read_bytes() == b"new"
    storage.close()


def test_no_space_is_reserved_where_little_is_free(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = os.statvfs(folder)
    size = 8 << 20
    for free_times, reserves in ((1, True), (disk.f_blocks * disk.f_frsize // size + 1, False)):
        monkeypatch.setattr(scratch, "FREE_TIMES", free_times)
        asked: list[int] = []
        monkeypatch.setattr(scratch, "_reserve", lambda _fd, size, asked=asked: asked.append(size))
        with scratch.reserved(str(folder / "output"), size):
            assert asked == [size] * reserves


def test_folders_in_each_other_are_removed_however_long_their_path_is(folder: Path) -> None:
    (folder / "top").mkdir()
    fd = os.open(folder / "top", os.O_RDONLY)
    for _ in range(3000):  # a path has no more than 4096 bytes
        os.mkdir("d", dir_fd=fd)
        below = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    storage_module.remove_tree(str(folder / "top"))
    assert list(folder.iterdir()) == []


def test_a_closed_folder_keeps_no_other_from_being_removed(folder: Path) -> None:
    for name in ("closed", *"abcdef"):
        (folder / "b" / "x" / name / "below").mkdir(parents=True)
    (folder / "b" / "x" / "closed").chmod(0)
    program = "import sys; from s4.storage import Storage; Storage(sys.argv[1]).remove_empty_folders('b/x/')"
    subprocess.run([*UNPRIVILEGED, sys.executable, "-c", program, str(folder)], check=True)
    assert [path.name for path in (folder / "b" / "x").iterdir()] == ["closed"]
    (folder / "b" / "x" / "closed").chmod(0o755)
