"""s4 cp: files, streams and folders, in and out; what it refuses; that nothing half-done is left."""

import contextlib
import errno
import os
import pty
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from cluster import S4, UNPRIVILEGED, Cluster, tree, write_tree
from procs import eventually, holds_open, peak_megabytes

from s4 import Client, S4Error, copying
from s4.copying import CopyError
from s4.errors import TransferError
from s4.exchange import get_batch
from s4.http import Caller
from s4.streams import Incoming

CONTENTS = {
    "empty": b"",
    "one byte": b"\0",
    "no final newline": b"a\nb",
    "percent": b"100% %s %d %(x)s\n",
    "binary": bytes(range(256)) * 10,
    "line ends": b"\r\n\n\r\0\n",
    "block": b"x" * (256 * 1024),
    "block and a byte": b"x" * (256 * 1024 + 1),
    "megabytes": random.Random(4).randbytes(5_000_000),
}
FILES = {
    "000": b"zero",
    "001_x.txt": b"",
    ".hidden": b"h",
    "sub/000": b"\0\xff",
    "sub/deep/er/a.txt": b"%",
    "sub/deep/$x;y": b"shell",
}


@pytest.mark.parametrize("data", CONTENTS.values(), ids=CONTENTS)
def test_data_comes_back_as_it_was(cluster: Cluster, bucket: str, folder: Path, data: bytes) -> None:
    (folder / "in").write_bytes(data)
    cluster.s4("cp", "in", f"{bucket}/file", cwd=folder)
    cluster.s4("cp", "-", f"{bucket}/stream", data=data)
    for key in ("file", "stream"):
        assert cluster.s4("cp", f"{bucket}/{key}", "-").out == data
        cluster.s4("cp", f"{bucket}/{key}", key, cwd=folder)
        assert (folder / key).read_bytes() == data


@pytest.mark.parametrize(
    ("destination", "key"),
    [
        ("{}/k", "k"),
        ("{}/dir/k", "dir/k"),
        ("{}/dir/", "dir/file"),
        ("{}/", "file"),
    ],
)
def test_a_file_goes_to_the_key_or_into_the_folder(
    cluster: Cluster, bucket: str, folder: Path, destination: str, key: str
) -> None:
    write_tree(folder, {"some/file": b"x"})
    cluster.s4("cp", "some/file", destination.format(bucket), cwd=folder)
    assert cluster.keys(bucket) == [f"{bucket}/{key}"]


@pytest.mark.parametrize(
    ("destination", "path"),
    [
        ("file", "file"),
        ("./file", "file"),
        ("old/file", "old/file"),
        ("old/", "old/000_k"),
        ("new/", "new/000_k"),
        ("new/er/", "new/er/000_k"),
        (".", "000_k"),
        ("./", "000_k"),
        ("nowhere/yet", "nowhere/yet"),
    ],
)
def test_a_key_goes_to_the_file_or_into_the_folder(
    cluster: Cluster, bucket: str, folder: Path, destination: str, path: str
) -> None:
    (folder / "old").mkdir()
    cluster.put(f"{bucket}/dir/000_k", b"x")
    cluster.s4("cp", f"{bucket}/dir/000_k", destination, cwd=folder)
    assert tree(folder) == {path: b"x"}


def test_a_download_replaces_a_file_and_follows_the_umask(
    cluster: Cluster, bucket: str, folder: Path
) -> None:
    cluster.put(f"{bucket}/000", b"new")
    (folder / "file").write_bytes(b"old")
    cluster.s4("cp", f"{bucket}/000", "file", cwd=folder)
    cluster.s4("cp", f"{bucket}/000", "fresh", cwd=folder)
    assert tree(folder) == {"file": b"new", "fresh": b"new"}
    os.umask(umask := os.umask(0))
    assert (folder / "fresh").stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_name_of_255_bytes_can_be_downloaded(cluster: Cluster, bucket: str, folder: Path) -> None:
    cluster.put(f"{bucket}/d/{'n' * 255}", b"x")
    cluster.s4("cp", f"{bucket}/d/{'n' * 255}", ".", cwd=folder)
    cluster.s4("cp", "-r", f"{bucket}/d/", "all/", cwd=folder)
    assert tree(folder) == {"n" * 255: b"x", f"all/{'n' * 255}": b"x"}


def test_a_download_into_a_named_pipe_does_not_replace_it(
    cluster: Cluster, bucket: str, folder: Path
) -> None:
    cluster.put(f"{bucket}/000", b"x" * 100)
    os.mkfifo(folder / "pipe")
    process = cluster.start_s4("cp", f"{bucket}/000", "pipe", cwd=folder)
    reader = os.open(folder / "pipe", os.O_RDWR)  # does not wait for a writer
    assert process.wait(20) == 0
    assert select.select([reader], [], [], 0)[0] and os.read(reader, 1000) == b"x" * 100
    os.close(reader)
    assert (folder / "pipe").is_fifo()


def test_a_download_through_a_symbolic_link_writes_its_target(
    cluster: Cluster, bucket: str, folder: Path
) -> None:
    cluster.put(f"{bucket}/000", b"new")
    (folder / "real").mkdir()
    (folder / "link").symlink_to("real")
    cluster.s4("cp", f"{bucket}/000", "link/file", cwd=folder)
    assert (folder / "real" / "file").read_bytes() == b"new"


def test_where_a_symbolic_link_leads_to_no_folders_are_made(
    cluster: Cluster, bucket: str, folder: Path
) -> None:
    cluster.put(f"{bucket}/000", b"new")
    (folder / "link").symlink_to("nowhere/file")
    cluster.fails("cp", f"{bucket}/000", "link", says="No such file or directory", code=1, cwd=folder)
    (folder / "way").symlink_to("nowhere")
    for words in (["way/new"], ["way/"], ["way/below/new"]):
        cluster.fails("cp", f"{bucket}/000", *words, says="No such file or directory", code=1, cwd=folder)
    cluster.fails("cp", "-r", f"{bucket}/", "way/", says="No such file or directory", code=1, cwd=folder)
    assert sorted(path.name for path in folder.iterdir()) == ["link", "way"]
    (folder / "nowhere").mkdir()
    cluster.s4("cp", f"{bucket}/000", "link", cwd=folder)
    assert (folder / "nowhere" / "file").read_bytes() == b"new"


def test_a_folder_that_cannot_be_looked_at_is_named_with_the_reason(
    cluster: Cluster, bucket: str, folder: Path
) -> None:
    folder.chmod(0)
    line = cluster.fails("cp", "-r", ".", f"{bucket}/d/", code=1, cwd=folder, privileged=False)
    assert line == "fatal: .: Permission denied"


def test_a_pipe_can_be_uploaded_while_it_is_written(cluster: Cluster, bucket: str) -> None:
    process = cluster.start_s4("cp", "-", f"{bucket}/000", stdin=subprocess.PIPE)
    assert process.stdin is not None
    for block in (b"first ", b"second"):
        process.stdin.write(block)
        process.stdin.flush()
    process.stdin.close()
    assert process.wait(20) == 0
    assert cluster.get(f"{bucket}/000") == b"first second"


@pytest.mark.parametrize(
    "arguments",
    [
        ["-r", "src", "{}/dst/"],
        ["src", "-r", "{}/dst/"],
        ["src", "{}/dst/", "-r"],
        ["--recursive", "src/", "{}/dst/"],
        ["src/", "{}/dst/", "--recursive"],
        ["-r", "./src", "{}/dst"],
    ],
    ids=" ".join,
)
def test_the_contents_of_a_folder_go_under_the_destination(
    cluster: Cluster, bucket: str, folder: Path, arguments: list[str]
) -> None:
    write_tree(folder / "src", FILES)
    (folder / "src" / "no files").mkdir()
    cluster.s4("cp", *(argument.format(bucket) for argument in arguments), cwd=folder)
    assert cluster.contents(f"{bucket}/dst/") == FILES


def test_the_current_folder_goes_to_a_whole_bucket_and_back(
    cluster: Cluster, bucket: str, folder: Path
) -> None:
    write_tree(folder / "src", FILES)
    cluster.s4("cp", "-r", ".", bucket, cwd=folder / "src")
    assert cluster.contents(f"{bucket}/") == FILES
    for number, prefix in enumerate((bucket, f"{bucket}/")):
        back = folder / f"back{number}"
        back.mkdir()
        cluster.s4("cp", "-r", prefix, ".", cwd=back)
        assert tree(back) == FILES


def test_symbolic_links_are_uploaded_as_what_they_name(cluster: Cluster, bucket: str, folder: Path) -> None:
    write_tree(folder, {"real": b"x", "src/000": b""})
    (folder / "src" / "link").symlink_to("../real")
    cluster.s4("cp", "-r", "src", f"{bucket}/dst/", cwd=folder)
    assert cluster.contents(f"{bucket}/dst/") == {"000": b"", "link": b"x"}


@pytest.mark.parametrize(
    ("destination", "below"),
    [("out/", "out"), ("out", "out"), ("new/er/", "new/er"), (".", "dst")],
)
def test_a_prefix_is_downloaded_without_itself_or_by_its_last_folder(
    cluster: Cluster, bucket: str, folder: Path, destination: str, below: str
) -> None:
    cluster.put_all({f"{bucket}/x/dst/{name}": data for name, data in FILES.items()})
    cluster.put(f"{bucket}/x/other/000", b"")
    cluster.s4("cp", "-r", f"{bucket}/x/dst/", destination, cwd=folder)
    assert tree(folder) == {f"{below}/{name}": data for name, data in FILES.items()}


def test_thousands_of_small_files_and_a_large_one_travel(cluster: Cluster, bucket: str, folder: Path) -> None:
    files = {f"{i % 7}/{i:04}_x": str(i).encode() * (i % 50) for i in range(2000)}
    files["0/large"] = random.Random(1).randbytes(20_000_000)
    write_tree(folder / "src", files)
    cluster.s4("cp", "-r", "src", f"{bucket}/dst/", cwd=folder)
    assert sorted(cluster.keys(bucket)) == sorted(f"{bucket}/dst/{name}" for name in files)
    cluster.s4("cp", "-r", f"{bucket}/dst/", "back/", cwd=folder)
    assert tree(folder / "back") == files


def test_between_two_keys_there_is_no_copy(cluster: Cluster, bucket: str) -> None:
    cluster.put(f"{bucket}/000", b"x")
    with cluster.nothing_changes():
        for flags in ([], ["-r"]):
            cluster.fails(
                "cp",
                *flags,
                f"{bucket}/000",
                f"{bucket}/001",
                says="there is no move, there is only cp and rm",
            )


def test_every_file_that_failed_is_named_and_the_others_arrive(
    cluster: Cluster, bucket: str, folder: Path
) -> None:
    write_tree(folder / "src", FILES | {"taken": b"new", "also/taken": b"new"})
    cluster.put_all({f"{bucket}/dst/taken": b"old", f"{bucket}/dst/also/taken": b"old"})
    result = cluster.run("cp", "-r", "src", f"{bucket}/dst/", cwd=folder)
    assert result.code == 1
    assert "dst/taken" in result.err and "dst/also/taken" in result.err
    assert cluster.contents(f"{bucket}/dst/") == FILES | {"taken": b"old", "also/taken": b"old"}


def test_files_whose_names_are_no_keys_are_each_named(cluster: Cluster, bucket: str, folder: Path) -> None:
    write_tree(folder / "src", {"000": b"", "white space": b"", "tab\there": b"", "sub/new\nline": b""})
    result = cluster.run("cp", "-r", "src", f"{bucket}/dst/", cwd=folder)
    assert result.code == 1
    assert "white space" in result.err and "here" in result.err and "line" in result.err
    assert f"bad key '{bucket}/" in result.err
    assert "new\nline" not in result.err


@pytest.mark.parametrize(
    ("source", "destination", "says"),
    [
        ("missing", "{}/k", "missing"),
        ("src", "{}/k", "src"),
        ("src/", "{}/k", "src"),
        ("locked", "{}/k", "locked"),
        ("missing/file", "{}/k", "missing/file"),
        ("{}/missing", "out", "missing"),
        ("{}/missing", "-", "missing"),
        ("{}/missing", "dir/", "missing"),
        ("{}/000", "src", "src"),
        ("{}/000", "file/", "file"),
        ("{}/000", "file/below", "file"),
        ("{}/000", "readonly/out", "readonly"),
        ("{}/000", "readonly/", "readonly"),
        ("file", "{}/000/003", "000"),
        ("-", "{}/dir/", "/"),
        ("file", "elsewhere", "s4://"),
        ("-", "-", "s4://"),
        ("", "{}/k", "'' is no path"),
        ("{}/000", "", "'' is no path"),
    ],
)
def test_what_cannot_be_copied_is_one_clear_line(
    cluster: Cluster, bucket: str, folder: Path, source: str, destination: str, says: str
) -> None:
    write_tree(folder, {"src/000": b"x", "file": b"x", "locked": b"x"})
    (folder / "readonly").mkdir(mode=0o500)
    (folder / "locked").chmod(0)
    cluster.put(f"{bucket}/000", b"x")
    before = tree(folder)
    with cluster.nothing_changes():
        arguments = [source.format(bucket), destination.format(bucket)]
        cluster.fails("cp", *arguments, says=says, cwd=folder, data=b"", privileged=False)
    assert tree(folder) == before


@pytest.mark.parametrize(
    ("source", "destination", "says"),
    [
        ("missing", "{}/dst/", "missing"),
        ("missing/", "{}/dst/", "missing"),
        ("closed", "{}/dst/", "closed"),
        ("{}/missing/", "out/", "missing"),
        ("{}-missing", "out/", "missing"),
        ("{}/x/", "file", "file"),
        ("{}/x/", "readonly/", "readonly"),
        ("-", "{}/dst/", ""),
        ("{}/x/", "-", ""),
    ],
)
def test_what_cannot_be_copied_recursively_fails_clearly(
    cluster: Cluster, bucket: str, folder: Path, source: str, destination: str, says: str
) -> None:
    write_tree(folder, {"closed/000": b"x", "file": b"x"})
    (folder / "readonly").mkdir(mode=0o500)
    (folder / "closed").chmod(0)
    cluster.put(f"{bucket}/x/000", b"x")
    before = tree(folder)
    with cluster.nothing_changes():
        arguments = [source.format(bucket), destination.format(bucket)]
        cluster.fails("cp", "-r", *arguments, says=says, cwd=folder, data=b"", privileged=False)
    assert tree(folder) == before


def test_what_is_no_file_is_called_what_it_is(cluster: Cluster, bucket: str, folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    for name, target in (("device", "/dev/null"), ("link", "pipe"), ("broken", "missing")):
        (folder / name).symlink_to(target)
    said = cluster.fails("cp", "-r", ".", f"{bucket}/dst/", cwd=folder, code=1)
    for name in ("pipe", "device", "link"):
        assert f"{name}: not a file" in said
    assert "broken: a broken symbolic link" in said


def test_files_that_claim_to_be_empty_are_copied_too(cluster: Cluster, bucket: str, folder: Path) -> None:
    write_tree(folder, {"empty": b"", "full": b"x"})
    (folder / "version").symlink_to("/proc/version")
    cluster.s4("cp", "-r", ".", f"{bucket}/dst/", cwd=folder)
    version = Path("/proc/version").read_bytes()
    assert cluster.contents(f"{bucket}/dst/") == {"empty": b"", "full": b"x", "version": version}


@pytest.mark.parametrize("arguments", [["{}/x/000", "."], ["-r", "{}/x/", "out/"]])
def test_a_current_folder_that_is_gone_is_one_clear_line(
    cluster: Cluster, bucket: str, folder: Path, arguments: list[str]
) -> None:
    cluster.put(f"{bucket}/x/000", b"x")
    spelled = " ".join(argument.format(bucket) for argument in arguments)
    script = f'd=$(mktemp -d -p "$1") && cd "$d" && rmdir "$d" && s4 cp {spelled}'
    done = subprocess.run(
        ["bash", "-c", script, "bash", folder], env=cluster.env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and "000: No such file" in done.stderr and "S4_DEBUG" not in done.stderr


def test_the_client_takes_paths_of_any_kind(cluster: Cluster, bucket: str, folder: Path) -> None:
    client = Client(str(cluster.conf))
    (folder / "file").write_bytes(b"x")
    client.cp(folder / "file", f"{bucket}/000")
    client.cp(f"{bucket}/000", folder / "copy")
    assert (folder / "copy").read_bytes() == b"x"
    for source, destination in (("a\0", f"{bucket}/001"), (f"{bucket}/000", "a\0"), ("", f"{bucket}/001")):
        with pytest.raises(S4Error, match=r"is no path"):
            client.cp(source, destination)


def test_an_unreadable_file_among_others_is_named(cluster: Cluster, bucket: str, folder: Path) -> None:
    write_tree(folder / "src", FILES | {"locked": b"x"})
    (folder / "src" / "locked").chmod(0)
    cluster.fails("cp", "-r", "src", f"{bucket}/dst/", says="locked", cwd=folder, code=1, privileged=False)
    assert cluster.contents(f"{bucket}/dst/") == FILES


def test_a_file_that_cannot_be_read_to_its_end_costs_only_itself(
    cluster: Cluster, bucket: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {f"{i:03}_x": bytes([i]) * 400_000 for i in range(9)}  # of two blocks
    write_tree(folder / "src", files)
    read = os.readv

    def broken(fd: int, buffers: Sequence[memoryview]) -> int:
        if os.readlink(f"/proc/self/fd/{fd}").endswith("/001_x") and os.lseek(fd, 0, os.SEEK_CUR):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(fd, buffers)

    monkeypatch.setattr(os, "readv", broken)  # a disk that fails cannot be had
    with pytest.raises(CopyError) as caught:
        Client(str(cluster.conf)).cp(str(folder / "src"), f"{bucket}/dst/", recursive=True)
    assert caught.value.failures == [f"{folder}/src/001_x: Input/output error"]
    del files["001_x"]
    assert cluster.contents(f"{bucket}/dst/") == files


def _file_limit() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))


def test_a_closed_stdin_is_no_empty_key(cluster: Cluster, bucket: str) -> None:
    with cluster.nothing_changes():
        for words in (f"cp - {bucket}/closed <&-", f"cp {bucket}/000 - >&-"):
            done = subprocess.run(["bash", "-c", f"s4 {words}"], env=cluster.env, capture_output=True)
            assert done.returncode == 1 and done.stderr.startswith(b"fatal: "), words
    assert cluster.keys(f"{bucket}/") == []


def test_stdin_may_be_silent_before_its_first_byte(cluster: Cluster, bucket: str) -> None:
    process = cluster.start_s4("cp", "-", f"{bucket}/late", stdin=subprocess.PIPE)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(6)  # longer than a transfer may stand still
    assert process.communicate(b"here")[1] == b"" and process.returncode == 0
    assert cluster.get(f"{bucket}/late") == b"here"


def test_a_reader_that_stands_still_is_told_so(cluster: Cluster, bucket: str, folder: Path) -> None:
    (folder / "large").write_bytes(bytes(30_000_000))
    cluster.s4("cp", "large", f"{bucket}/large", cwd=folder)
    process = cluster.start_s4("cp", f"{bucket}/large", "-")
    assert process.stdout is not None and process.stderr is not None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(7)
    process.stdout.read()
    said = process.stderr.read().decode()
    assert process.wait(10) == 1 and "no bytes moved for 5 seconds" in said and "checksum" not in said, said


def test_a_download_goes_into_a_pipe_that_has_a_path(cluster: Cluster, bucket: str) -> None:
    cluster.put(f"{bucket}/000", b"one\ntwo\n")
    script = f"s4 cp {bucket}/000 >(wc -l >&2; echo) | cat; s4 cp {bucket}/000 /dev/stdout | cat"
    done = subprocess.run(["bash", "-c", script], env=cluster.env, capture_output=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == (b"one\ntwo", b"2\n")


@pytest.mark.parametrize(
    "place", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "/proc/thread-self/fd/1", "link"]
)
def test_a_download_goes_on_behind_what_a_redirected_stdout_has(
    cluster: Cluster, bucket: str, folder: Path, place: str
) -> None:
    cluster.put(f"{bucket}/000", b"new\n")
    (folder / "link").symlink_to("/dev/stdout")
    log = folder / "log"
    copy = f"s4 cp {bucket}/000 {place}"
    for redirect, before in ((">>", b"old\n"), (">", b"")):
        log.write_bytes(b"old\n")
        script = f"{{ echo first; {copy}; {copy}; echo last; }} {redirect} log"
        command = ["bash", "-ec", script]
        done = subprocess.run(command, cwd=folder, env=cluster.env, capture_output=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, b"")
        assert log.read_bytes() == before + b"first\nnew\nnew\nlast\n"
    assert sorted(os.listdir(folder)) == ["link", "log"]


def test_a_download_goes_into_an_open_file_whatever_its_number_and_name(
    cluster: Cluster, bucket: str, folder: Path
) -> None:
    cluster.put(f"{bucket}/000", b"new\n")
    with open(folder / "gone", "w+b") as gone, open(folder / "said", "w+b") as said:
        (folder / "gone").unlink()
        process = cluster.start_s4("cp", f"{bucket}/000", "/dev/stdout", stdout=gone)
        assert process.wait(20) == 0
        process = cluster.start_s4("cp", f"{bucket}/000", "/dev/stderr", stderr=said)
        assert process.wait(20) == 0
        gone.seek(0)
        said.seek(0)
        assert (gone.read(), said.read()) == (b"new\n", b"new\n")
    assert os.listdir(folder) == ["said"]
    with open(folder / "file", "w+b") as file:
        file.write(b"from Python\n")
        file.flush()
        Client(str(cluster.conf)).cp(f"{bucket}/000", f"/dev/fd/{file.fileno()}")
        file.write(b"goes on\n")
    assert (folder / "file").read_bytes() == b"from Python\nnew\ngoes on\n"
    cluster.fails("cp", f"{bucket}/000", "/dev/fd/99", says="/dev/fd/99: No such file", code=1)


@pytest.mark.parametrize("arguments", [["{}/d/000", "out"], ["{}/d/000", "dir/"], ["-r", "{}/d/", "dir/"]])
def test_a_disk_that_is_full_is_one_clear_line_and_leaves_nothing(
    cluster: Cluster, bucket: str, folder: Path, arguments: list[str]
) -> None:
    cluster.put(f"{bucket}/d/000", bytes(3 << 20))
    cluster.fails("cp", *(argument.format(bucket) for argument in arguments), cwd=folder, before=_file_limit)
    assert tree(folder) == {}


def test_two_keys_do_not_become_one_file(cluster: Cluster, bucket: str, folder: Path) -> None:
    cluster.put_all({f"{bucket}/x/dst-2/a": b"one", f"{bucket}/x/dst/dst-2/a": b"two"})
    line = cluster.fails("cp", "-r", f"{bucket}/x/dst", f"{folder}/out", says="would both become", code=1)
    assert f"{bucket}/x/dst-2/a" in line and f"{bucket}/x/dst/dst-2/a" in line
    assert list(folder.iterdir()) == []


def test_a_download_interrupted_at_its_start_leaves_nothing(
    cluster: Cluster, bucket: str, folder: Path
) -> None:
    cluster.put_all({f"{bucket}/{i:03}": b"x" * 100_000 for i in range(20)})
    for i in range(15):
        target = folder / str(i)
        process = cluster.start_s4("cp", "-r", f"{bucket}/", f"{target}/")
        while not target.exists() and process.poll() is None:
            time.sleep(0.0005)  # it is a matter of milliseconds
        process.send_signal(signal.SIGINT)
        assert process.wait(10) in (0, 130)
        assert [path.name for path in target.glob(".s4-*")] == []


@pytest.mark.parametrize(("call", "left"), [("open", {}), ("rename", {"new/file": b"x"})])
def test_ctrl_c_just_as_a_file_appears_or_gets_its_name_leaves_no_other(
    cluster: Cluster,
    bucket: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    left: dict[str, bytes],
) -> None:
    cluster.put(f"{bucket}/000", b"x")
    really = getattr(os, call)

    def interrupted(path: str, *arguments: Any) -> Any:
        result = really(path, *arguments)
        if "/.s4-" in path:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(os, call, interrupted)
    with pytest.raises(KeyboardInterrupt):
        Client(str(cluster.conf)).cp(f"{bucket}/000", f"{folder}/new/file")
    monkeypatch.undo()
    assert tree(folder) == left and (folder / "new").exists() == bool(left)


def test_folders_that_were_made_for_a_download_go_when_it_fails(
    cluster: Cluster, bucket: str, folder: Path
) -> None:
    cluster.put(f"{bucket}/000", b"x")
    for place in (f"new/a/{'x' * 300}/file", f"new/a/{'x' * 300}"):
        assert "name too long" in cluster.fails("cp", f"{bucket}/000", f"{folder}/{place}", code=1)
        assert list(folder.iterdir()) == []


def test_only_files_that_did_not_arrive_count_as_not_copied(
    start_cluster: Callable[..., Cluster], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = start_cluster(1)
    cluster.put_all({f"s4://b/in/{i:03}": b"x" for i in range(10)})

    def breaks(caller: Caller, paths: list[str], receive: Callable[..., None]) -> list[S4Error | None]:
        def first_five(incoming: Incoming, index: int, size: int, checksum: str) -> None:
            if index == 5:
                raise TransferError("the connection broke")
            receive(incoming, index, size, checksum)

        return get_batch(caller, paths, first_five)

    monkeypatch.setattr(copying, "get_batch", breaks)
    with pytest.raises(CopyError, match="5 of 10 files were not copied") as e:
        Client(str(cluster.conf)).cp("s4://b/in/", f"{folder}/", recursive=True)
    assert len(e.value.failures) == 5 and "005: the connection broke" in e.value.failures[0]
    assert sorted(os.listdir(folder)) == [f"{i:03}" for i in range(5)]


def test_what_a_client_in_python_cannot_do_is_an_error_of_ours(cluster: Cluster, bucket: str) -> None:
    cluster.put(f"{bucket}/000", b"x" * 100_000)
    client = Client(str(cluster.conf))
    with pytest.raises(S4Error, match="the command is not valid UTF-8"):
        client.eval(f"{bucket}/000", "echo \ud800")
    with pytest.raises(S4Error, match="the query is not valid UTF-8"):
        client.sql("select '\ud800'")
    script = """if True:
        import s4, sys
        try:
            s4.Client(sys.argv[1]).cp(sys.argv[2], "-")
        except s4.S4Error as e:
            sys.exit(str(e))
        """
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-c", script, str(cluster.conf), f"{bucket}/000"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, timeout=20)
    assert (done.returncode, done.stderr) == (1, b"stdout: No space left on device\n")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_an_output_that_cannot_be_written_is_one_clear_line(
    cluster: Cluster, bucket: str, unbuffered: str
) -> None:
    cluster.put(f"{bucket}/000", b"x" * 100_000)
    for arguments in (
        ["cp", f"{bucket}/000", "-"],
        ["ls", "-r", bucket],
        ["eval", f"{bucket}/000", "cat"],
        ["servers"],
    ):
        with open("/dev/full", "wb") as full:
            process = cluster.start_s4(*arguments, stdout=full, env={"PYTHONUNBUFFERED": unbuffered})
            _out, err = process.communicate(timeout=20)
        assert process.returncode == 1
        assert err.startswith(b"fatal: ") and b"No space left" in err and err.count(b"\n") == 1, err


def test_a_file_that_changed_on_the_nodes_disk_is_not_handed_out(
    start_cluster: Callable[..., Cluster],
) -> None:
    cluster = start_cluster(1, check=False)
    (node,) = cluster.nodes
    cluster.put_all({f"s4://b/d/00{i}": b"right" for i in range(3)})
    path = node.path_of("s4://b/d/000")
    path.chmod(0o644)
    path.write_bytes(b"wrong")
    assert "checksum" in cluster.fails("cp", "s4://b/d/000", "out", says="s4://b/d/000", code=1)
    assert "checksum" in cluster.fails("cp", "-r", "s4://b/d/", "all/", says="000", code=1)
    assert tree(cluster.work) == {"all/001": b"right", "all/002": b"right"}


@contextlib.contextmanager
def _terminal() -> Iterator[tuple[int, Callable[[], bytes]]]:
    """A terminal, and all that was shown on it."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    shown: list[bytes] = []

    def read() -> bytes:
        while select.select([ours], [], [], 0.2)[0]:
            try:
                shown.append(os.read(ours, 65536))
            except OSError:
                break
        return b"".join(shown)

    try:
        yield theirs, read
    finally:
        os.close(ours)
        os.close(theirs)


def test_progress_is_shown_on_a_terminal_only(cluster: Cluster, bucket: str, folder: Path) -> None:
    write_tree(folder / "src", {f"{i:03}": b"x" for i in range(50)})
    quiet = cluster.s4("cp", "-r", "src", f"{bucket}/quiet/", cwd=folder)
    assert (quiet.out, quiet.err) == (b"", "")
    with _terminal() as (terminal, shown):
        process = cluster.start_s4("cp", "-r", "src", f"{bucket}/loud/", cwd=folder, stderr=terminal)
        assert process.wait(20) == 0
        assert b"%" in shown()
        process = cluster.start_s4("cp", "-r", f"{bucket}/loud/", "back/", cwd=folder, stderr=terminal)
        assert process.wait(20) == 0
    assert tree(folder / "back") == tree(folder / "src")


def _zeros(megabytes: int, process: "subprocess.Popen[bytes]") -> None:
    assert process.stdin is not None
    with process.stdin as pipe:
        for _ in range(megabytes):
            pipe.write(bytes(1 << 20))


def test_a_large_key_moves_in_constant_memory_on_both_sides(start_cluster: Callable[..., Cluster]) -> None:
    cluster = start_cluster(1)
    (node,) = cluster.nodes
    megabytes, peaks = 300, {"client": 0.0}

    def watch(process: "subprocess.Popen[bytes]") -> None:
        while process.poll() is None:
            peaks["client"] = max(peaks["client"], peak_megabytes(process.pid))
            for worker in node.workers():
                peaks[f"worker {worker.pid}"] = peak_megabytes(worker.pid)
            time.sleep(0.05)
        assert process.returncode == 0

    process = cluster.start_s4("cp", "-", "s4://b/000", stdin=subprocess.PIPE)
    feeder = threading.Thread(target=_zeros, args=(megabytes, process))
    feeder.start()
    watch(process)
    feeder.join()
    watch(cluster.start_s4("cp", "s4://b/000", "copy"))
    watch(cluster.start_s4("cp", "copy", "s4://b/001"))
    peaks["node"] = peak_megabytes(node.pid)
    assert (cluster.work / "copy").stat().st_size == megabytes << 20
    assert len(peaks) > 2 and max(peaks.values()) < 64, peaks


def _interrupt(process: "subprocess.Popen[bytes]") -> None:
    os.killpg(process.pid, signal.SIGINT)
    _interrupted(process)


def _interrupted(process: "subprocess.Popen[bytes]") -> None:
    _out, err = process.communicate(timeout=10)
    assert process.returncode == 130
    assert b"Traceback" not in err and err.count(b"\n") <= 1, err


def test_ctrl_c_during_an_upload_leaves_no_key(cluster: Cluster, bucket: str) -> None:
    node = cluster.nodes[0]
    process = cluster.start_s4("cp", "-", f"{bucket}/000", stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(b"x" * 1_000_000)
    process.stdin.flush()
    eventually(node.temporary, 10, "bytes on the node")
    _interrupt(process)
    eventually(lambda: not node.temporary(), 15, "its bytes are gone")
    assert cluster.keys(bucket) == []


def test_a_file_that_does_not_have_the_size_it_claims_is_copied_whole(
    cluster: Cluster, bucket: str, folder: Path
) -> None:
    with open(folder / "sparse", "wb") as f:
        f.truncate(3_000_000)
    sources = ["sparse", "/proc/version"]
    sources += [path for path in ("/sys/kernel/mm/transparent_hugepage/enabled",) if os.path.exists(path)]
    for i, source in enumerate(sources):
        cluster.s4("cp", source, f"{bucket}/{i}", cwd=folder)
        assert cluster.get(f"{bucket}/{i}") == (folder / source).read_bytes()


def test_stdin_is_no_folder_of_that_name(cluster: Cluster, bucket: str, folder: Path) -> None:
    (folder / "-").mkdir()
    cluster.s4("cp", "-", f"{bucket}/000", data=b"x", cwd=folder)
    assert cluster.get(f"{bucket}/000") == b"x"
    for source in ("./-", "."):
        line = cluster.fails("cp", source, f"{bucket}/d/", cwd=folder, code=1)
        assert f"{source} is a folder: use cp -r" in line


def test_a_failed_download_leaves_no_folder_where_not_even_its_file_can_be_looked_for(
    cluster: Cluster, bucket: str, folder: Path
) -> None:
    cluster.put(f"{bucket}/000", b"x")
    deep = "/".join(["d" * 250] * 20)[: 4080 - len(str(folder))].rstrip("/")
    assert "too long" in cluster.fails("cp", f"{bucket}/000", f"{deep}/x", cwd=folder, code=1)
    assert list(folder.iterdir()) == []


def test_ctrl_c_during_a_recursive_upload_leaves_only_whole_keys(
    cluster: Cluster, bucket: str, folder: Path
) -> None:
    files = {f"{i:04}": os.urandom(20_000) for i in range(10)}
    write_tree(folder, files)
    for i in range(10, 6000):
        os.link(folder / f"{i % 10:04}", folder / f"{i:04}")
        files[f"{i:04}"] = files[f"{i % 10:04}"]
    for _ in range(50):
        process = cluster.start_s4("cp", "-r", ".", f"{bucket}/d/", cwd=folder)
        eventually(lambda: cluster.keys(bucket), 20, "some keys")
        process.send_signal(signal.SIGSTOP)
        state = eventually(lambda: (found := _state(process.pid)) in "TZ" and found, 5, "it stands still")  # noqa: B023
        if state == "T" and len(cluster.keys(bucket)) < 1500:  # six batches of 200 may be on their way
            break
        process.send_signal(signal.SIGCONT)  # it is nearly done: once more
        assert process.wait(10) == 0
        cluster.s4("rm", "-r", f"{bucket}/")
    os.killpg(process.pid, signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    _interrupted(process)
    eventually(lambda: _stands_still(lambda: cluster.keys(bucket)), 20, "what was on its way has arrived")
    with cluster.nothing_changes():
        arrived = cluster.contents(f"{bucket}/d/")
    assert 0 < len(arrived) < len(files)
    assert arrived.items() <= files.items()


@pytest.fixture(scope="module")
def large_keys(cluster: Cluster) -> Iterator[str]:
    """A folder of three large keys in the shared cluster."""
    prefix = f"{cluster.fresh_bucket()}/large/"
    cluster.put_all({f"{prefix}00{i}": bytes(100 << 20) for i in range(3)})
    yield prefix
    cluster.s4("rm", "-r", prefix)


@pytest.mark.parametrize("recursive", [False, True])
def test_ctrl_c_during_a_download_leaves_no_part_of_a_file(
    cluster: Cluster, folder: Path, large_keys: str, recursive: bool
) -> None:
    arguments = ["-r", large_keys, "out/"] if recursive else [f"{large_keys}000", "file"]
    for _ in range(50):
        process = cluster.start_s4("cp", *arguments, cwd=folder)
        eventually(lambda: holds_open(process.pid, folder), 10, "a file is being written")  # noqa: B023
        process.send_signal(signal.SIGSTOP)
        # Signals arrive a little later: by then it may be over.
        state = eventually(lambda: (found := _state(process.pid)) in "TZ" and found, 5, "it stands still")  # noqa: B023
        if state == "T" and (recursive or _written(process.pid, folder) < 90 << 20):
            break
        process.send_signal(signal.SIGCONT)  # it is nearly done: once more
        assert process.wait(10) == 0
        (folder / "file").unlink(missing_ok=True)
        shutil.rmtree(folder / "out", ignore_errors=True)
    os.killpg(process.pid, signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    _interrupted(process)
    left = {path.name: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    assert all(
        recursive and name in ("000", "001", "002") and size == 100 << 20 for name, size in left.items()
    ), left


def _stands_still(look: Callable[[], object]) -> bool:
    before = look()
    time.sleep(1)
    return look() == before


def _state(pid: int) -> str:
    """The letter that proc(5) has for the state of a process."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def _written(pid: int, folder: Path) -> int:
    """How many bytes a process has written to the file below a folder that it has open."""
    for link in Path(f"/proc/{pid}/fd").iterdir():
        if os.readlink(link).startswith(f"{folder}/"):
            return int(Path(f"/proc/{pid}/fdinfo/{link.name}").read_text().split()[1])
    return 1 << 40  # it is closed by now


def test_a_file_that_may_not_be_written_is_not_replaced(cluster: Cluster, bucket: str, folder: Path) -> None:
    cluster.put_all({f"{bucket}/000": b"new", f"{bucket}/in/000": b"new"})
    target = folder / "000"
    target.write_bytes(b"old")
    target.chmod(0o444)
    for words in (("cp", f"{bucket}/000", str(target)), ("cp", "-r", f"{bucket}/in/", str(folder))):
        result = cluster.run(*words, program=(*UNPRIVILEGED, S4))
        assert result.code == 1 and f"{target}: Permission denied" in result.err
    assert target.read_bytes() == b"old" and [path.name for path in folder.iterdir()] == ["000"]


def test_a_file_that_cannot_be_written_costs_only_itself(cluster: Cluster, bucket: str, folder: Path) -> None:
    keys = {f"{i:03}": b"%d" % i * 1000 for i in range(0, 30, 3)}  # one batch of one node
    cluster.put_all({f"{bucket}/in/{name}": data for name, data in keys.items()})
    (folder / "006").mkdir()
    line = cluster.fails(
        "cp", "-r", f"{bucket}/in/", f"{folder}/", code=1, says="1 of 10 files were not copied"
    )
    assert f"{folder}/006: Is a directory" in line
    assert tree(folder) == {name: data for name, data in keys.items() if name != "006"}


def test_a_file_that_is_shorter_on_the_nodes_disk_is_soon_told(start_cluster: Callable[..., Cluster]) -> None:
    cluster = start_cluster(1, check=False)
    (node,) = cluster.nodes
    cluster.put_all({f"s4://b/d/00{i}": bytes(1000) for i in range(3)})
    path = node.path_of("s4://b/d/001")
    path.chmod(0o644)
    os.truncate(path, 10)
    line = cluster.fails("cp", "s4://b/d/001", "out", says="s4://b/d/001", code=1)
    assert "was not sent whole" in line and "shorter than expected: 10 instead of 1000 bytes" in line
    line = cluster.fails("cp", "-r", "s4://b/d/", "all/", says="2 of 3 files were not copied", code=1)
    assert "s4://b/d/001: only 10 of 1000 bytes came" in line
    assert tree(cluster.work) == {"all/000": bytes(1000)}


def test_a_folder_that_is_a_link_to_one_above_it_is_told_and_the_rest_copied(
    cluster: Cluster, bucket: str, folder: Path
) -> None:
    write_tree(folder, {"src/below/file": b"x", "other/file": b"y"})
    (folder / "src" / "below" / "loop").symlink_to("..")
    for name in ("one", "two"):  # the same folder twice is no loop
        (folder / "src" / name).symlink_to(folder / "other")
    said = cluster.fails("cp", "-r", f"{folder}/src", f"{bucket}/d/", says="1 of 4 files were not copied")
    assert f"{folder}/src/below/loop: a symbolic link to a folder above it" in said
    assert cluster.contents(f"{bucket}/d/") == {"below/file": b"x", "one/file": b"y", "two/file": b"y"}
