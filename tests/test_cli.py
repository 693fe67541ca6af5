"""The command line: every argument as typed, help, exit codes, one line for an error, quiet ends."""

import contextlib
import pickle
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from cluster import Cluster, tree, write_tree
from procs import eventually, running

from s4 import errors
from s4.copying import CopyError

COMMANDS = {
    "cp": ["SRC", "DST", "recursive"],
    "ls": ["PREFIX", "recursive"],
    "rm": ["PREFIX", "recursive"],
    "eval": ["KEY", "CMD"],
    "map": ["INDIR", "OUTDIR", "CMD", "--timeout", "--retries", "--keep-going", "--skip-existing", "--plan"],
    "map-to-n": ["INDIR", "OUTDIR", "CMD", "--no-overlap", "--detach", "--json", "--quiet"],
    "map-from-n": ["INDIR", "OUTDIR", "CMD", "--no-overlap"],
    "jobs": ["--limit", "--json"],
    "job": ["JOB", "--json"],
    "wait": ["JOB", "--json", "--quiet"],
    "cancel": ["JOB"],
    "retry": ["JOB", "--detach"],
    "joblog": ["JOB", "--json"],
    "stat": ["KEY", "--json"],
    "sql": ["QUERY", "--format", "--limit", "--schema"],
    "health": [],
    "servers": [],
    "config": [],
}
# Words that a generated command line is known to turn into something else.
WORDS = [
    "1",
    "00001",
    "1e3",
    "0x10",
    "1_000",
    "1.0",
    "True",
    "None",
    "{a,b}",
    "{'a':1}",
    "[x]",
    "(1,2)",
    "a,b",
    "'q'",
    '"q"',
    "a#b",
    "#",
    "a=b",
    "...",
    "$x",
    "\\n",
    "__class__",
    "é",
]
DASHED = ["-n5", "--foo=1", "-r", "--", "---", "--help", "-c", "-1", "--conf=x"]


@pytest.mark.parametrize("word", WORDS)
def test_words_arrive_as_typed(cluster: Cluster, bucket: str, folder: Path, word: str) -> None:
    write_tree(folder, {word: b"data"})
    cluster.s4("cp", word, f"{bucket}/", cwd=folder)
    assert cluster.keys(bucket) == [f"{bucket}/{word}"]
    cluster.s4("cp", f"{bucket}/{word}", f"{word}{word}", cwd=folder)
    assert tree(folder) == {word: b"data", f"{word}{word}": b"data"}
    assert cluster.s4("ls", f"{bucket.removeprefix('s4://')}/{word}").lines[0].split()[-1] == word
    cluster.s4("rm", f"{bucket}/{word}")


@pytest.mark.parametrize(
    "word", WORDS + [word for word in DASHED if word not in ("--", "--help", "-c", "--conf=x")]
)
def test_commands_arrive_as_typed(cluster: Cluster, bucket: str, word: str) -> None:
    cluster.put(f"{bucket}/000", b"x")
    straight = subprocess.run(
        ["bash", "-eou", "pipefail", "-c", "--", word], stdin=subprocess.DEVNULL, capture_output=True
    )
    result = cluster.run("eval", f"{bucket}/000", word)
    assert (result.code, result.out) == (straight.returncode, straight.stdout)
    assert cluster.s4("eval", f"{bucket}/000", f"cat <<'EOF'\n{word}\nEOF\n").out.decode() == f"{word}\n"


@pytest.mark.parametrize("word", DASHED)
def test_after_two_dashes_every_word_is_an_argument(
    cluster: Cluster, bucket: str, folder: Path, word: str
) -> None:
    write_tree(folder, {word: b"data"})
    cluster.s4("cp", "--", word, f"{bucket}/", cwd=folder)
    assert cluster.keys(bucket) == [f"{bucket}/{word}"]
    cluster.s4("cp", "-c", str(cluster.conf), "--", f"{bucket}/{word}", f"{word}x", cwd=folder)
    assert tree(folder) == {word: b"data", f"{word}x": b"data"}


def test_a_lone_dash_is_stdin_and_stdout(cluster: Cluster, bucket: str, folder: Path) -> None:
    write_tree(folder, {"-": b"a file"})
    cluster.s4("cp", "-", f"{bucket}/000", data=b"typed", cwd=folder)
    assert cluster.s4("cp", f"{bucket}/000", "-", cwd=folder).out == b"typed"
    cluster.s4("cp", "./-", f"{bucket}/001", cwd=folder)
    assert cluster.get(f"{bucket}/001") == b"a file"


@pytest.mark.parametrize(
    "arguments",
    [["-r", "SRC", "DST"], ["SRC", "-r", "DST"], ["SRC", "DST", "-r"], ["SRC", "DST", "--recursive"]],
)
def test_a_flag_swallows_no_argument(
    cluster: Cluster, bucket: str, folder: Path, arguments: list[str]
) -> None:
    write_tree(folder, {"True/000": b"x"})
    words = {"SRC": "True", "DST": f"{bucket}/dst/"}
    cluster.s4("cp", *(words.get(argument, argument) for argument in arguments), cwd=folder)
    assert cluster.keys(bucket) == [f"{bucket}/dst/000"]


@pytest.mark.parametrize(("command", "words"), COMMANDS.items())
def test_help_works_on_every_command(cluster: Cluster, command: str, words: list[str]) -> None:
    for arguments in ([command, "--help"], ["--help", command]):
        result = cluster.s4(*arguments, env={"S4_CONF_PATH": "/nowhere"})
        text = result.out.decode()
        assert command in text and all(word in text for word in words), text
        assert "STDOUT" not in text and "\0" not in text and result.err == ""


def test_help_without_a_command_lists_them(cluster: Cluster) -> None:
    text = cluster.s4("--help").out.decode()
    assert all(command in text for command in COMMANDS)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["no-such-command"],
        ["map_to_n", "s4://b/in/", "s4://b/out/", "cat"],
        ["__class__"],
        ["_conf"],
        ["__init__"],
        ["caller"],
        ["cp"],
        ["cp", "a"],
        ["cp", "a", "s4://b/k", "c"],
        ["cp", "-x", "a", "s4://b/k"],
        ["cp", "--recursiv", "a", "s4://b/k"],
        ["cp", "--recursive=maybe", "a", "s4://b/k"],
        ["ls", "a", "b"],
        ["ls", "--foo"],
        ["ls", "-rf", "s4://b"],
        ["ls", "-c"],
        ["ls", "s4://b", "-", "upper"],
        ["rm"],
        ["rm", "s4://b/1", "s4://b/2"],
        ["eval", "s4://b/k"],
        ["eval", "s4://b/k", "cat", "more"],
        ["eval", "-r", "s4://b/k", "cat"],
        ["map", "s4://b/in/", "s4://b/out/"],
        ["map", "s4://b/in/", "s4://b/out/", "cat", "more"],
        *(
            ["map", "s4://b/in/", "s4://b/out/", "cat", *options]
            for options in (
                ["-n5"],
                ["--keep-goin"],
                ["--recursive"],
                ["--limit", "5"],
                ["--timeout"],
                ["--timeout", "0"],
                ["--timeout", "-1"],
                ["--timeout", "nan"],
                ["--timeout", "inf"],
                ["--timeout=1e300"],
                ["--timeout", "1_0"],
                ["--timeout", "5s"],
                ["--retries", "-1"],
                ["--retries", "1.5"],
                ["--retries", "1e3"],
                ["--retries=9999999999"],
                ["--keep-going=maybe"],
                ["--detach", "--quiet"],
                ["--plan", "--detach"],
                ["--plan", "--quiet"],
            )
        ),
        ["map", "--keep-goin", "s4://b/in/", "s4://b/out/", "cat"],
        ["map", "s4://b/in/", "s4://b/out/", "--keep-goin", "cat"],
        ["jobs", "--limit", "0"],
        ["jobs", "--limit", "-3"],
        ["jobs", "some"],
        ["job"],
        ["job", ""],
        ["cancel", "--json", "x"],
        ["ls", "--timeout", "5"],
        ["stat"],
        ["sql"],
        ["sql", ""],
        ["sql", "--schema", "select 1"],
        ["sql", "select 1", "--format", "xml"],
        ["sql", "select 1", "--format", ""],
        ["sql", "select 1", "--format", "csv", "--json"],
        ["sql", "select 1", "--limit", "0"],
        ["health", "now"],
        ["health", "-r"],
        ["servers", "upper"],
        ["servers", "-", "upper"],
    ],
    ids=" ".join,
)
def test_misuse_is_exit_2_and_changes_nothing(cluster: Cluster, folder: Path, arguments: list[str]) -> None:
    write_tree(folder, {"a": b"x"})
    with cluster.nothing_changes():
        result = cluster.run(*arguments, cwd=folder)
    assert (result.code, result.out) == (2, b"")
    if arguments:
        assert result.fatal
    else:
        assert "cp" in result.err  # the usage


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["map", "s4://b/in/", "s4://b/out/", "wc", "-l"],
            "'-l'; see s4 map --help, or put quotes around all of CMD",
        ),
        (
            ["map", "s4://b/in/", "s4://b/out/", "cut", "x"],
            "4 arguments, but .* CMD; put quotes around all of CMD",
        ),
        (["eval", "s4://b/k", "wc", "-l"], "put quotes around all of CMD"),
        (["sql", "select", "1"], "put quotes around all of QUERY"),
        (
            ["cp", "-x", "a", "s4://b/k"],
            "'-x'; see s4 cp --help, or write -- before arguments that start with '-'",
        ),
        (["map", "s4://b/in/"], "1 argument, but the usage is: s4 map [^;]*$"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_misuse_says_what_to_do(cluster: Cluster, arguments: list[str], says: str) -> None:
    assert re.search(says, cluster.fails(*arguments, code=2))


def test_errors_have_a_traceback_only_when_asked_for(cluster: Cluster) -> None:
    arguments = ["cp", "s4://no-such-bucket/000", "-"]
    assert cluster.fails(*arguments, code=1).startswith("fatal: ")
    assert cluster.fails(*arguments, code=1, env={"S4_DEBUG": "0"})
    debugged = cluster.run(*arguments, env={"S4_DEBUG": "1"})
    assert debugged.code == 1 and "Traceback" in debugged.err
    assert cluster.run("no-such-command", env={"S4_DEBUG": "1"}).code == 2


def test_a_signal_that_comes_while_the_client_stands_still_ends_it_when_it_goes_on(
    cluster: Cluster, folder: Path
) -> None:
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(8)]
        (folder / "conf").write_text("".join(f"127.0.0.1:{s.getsockname()[1]}\n" for s in silent))
        for _ in range(5):  # which thread takes the signal is a matter of chance
            client = cluster.start_s4("rm", "-r", "s4://b/", env={"S4_CONF_PATH": str(folder / "conf")})
            for listener in silent:
                stack.enter_context(listener.accept()[0])
            client.send_signal(signal.SIGSTOP)
            stat = Path(f"/proc/{client.pid}/stat")
            eventually(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", 5)  # noqa: B023
            client.send_signal(signal.SIGTERM)  # as by `kill %1` of a shell
            client.send_signal(signal.SIGCONT)
            assert client.wait(5) == 130


def test_errors_that_are_debugged_say_all_that_they_say_otherwise(cluster: Cluster, bucket: str) -> None:
    cluster.put(f"{bucket}/in/000", b"x")
    arguments = ["map", f"{bucket}/in/", f"{bucket}/out/", "echo no >&2; exit 3"]
    debugged = cluster.run(*arguments, env={"S4_DEBUG": "1"})
    assert debugged.code == 1 and "Traceback" in debugged.err
    assert f"\nfailed: {bucket}/in/000 on " in debugged.err and "\nfatal: job " in debugged.err


def test_odd_characters_in_an_error_do_not_break_its_line(cluster: Cluster, folder: Path) -> None:
    for word in ("a\nb", "a\rb", "a\x1b[31mb", b"a\xffb", "%s %d {}"):
        line = cluster.fails("cp", word, "s4://b/k", cwd=folder, code=1)
        assert "\r" not in line and "\x1b" not in line


def test_success_says_nothing(cluster: Cluster, bucket: str, folder: Path) -> None:
    write_tree(folder, {"000": b"x"})
    for arguments in (
        ["cp", "000", f"{bucket}/in/000"],
        ["cp", "-r", ".", f"{bucket}/in/more/"],
        ["cp", "-r", f"{bucket}/in/", "back/"],
        ["map", f"{bucket}/in/", f"{bucket}/out/", "cat", "--quiet"],
        ["map-to-n", "--quiet", f"{bucket}/in/", f"{bucket}/to/", "true"],
        ["rm", f"{bucket}/in/000"],
        ["rm", "-r", f"{bucket}/in/"],
        ["rm", "-r", f"{bucket}/in/"],
    ):
        result = cluster.s4(*arguments, cwd=folder)
        assert (result.out, result.err) == (b"", ""), arguments


def test_health_is_a_line_a_server(cluster: Cluster) -> None:
    result = cluster.s4("health")
    assert result.lines == [f"healthy:   {node}" for node in cluster.nodes]
    assert result.err == ""


def test_a_stdout_that_cannot_be_written_is_one_clear_line(cluster: Cluster, bucket: str) -> None:
    cluster.put(f"{bucket}/000")
    for command in ("s4 servers", "s4 health", "s4 --help", "s4 cp --help", "s4 ls"):
        done = subprocess.run(
            ["bash", "-c", f"{command} > >(exec true)"], env=cluster.env, capture_output=True, timeout=30
        )
        assert done.stderr == b""
        closed = subprocess.run(
            ["bash", "-c", f"{command} >&-"], env=cluster.env, capture_output=True, timeout=30
        )
        assert closed.returncode == 1, command
        assert closed.stderr == b"fatal: stdout: Bad file descriptor\n"
    full = subprocess.run(["bash", "-c", "s4 servers > /dev/full"], env=cluster.env, capture_output=True)
    assert (full.returncode, full.stderr) == (1, b"fatal: stdout: No space left on device\n")


def test_a_stderr_that_cannot_be_written_changes_no_exit_code(cluster: Cluster, bucket: str) -> None:
    cluster.put_all({f"{bucket}/in/{i:03}": b"x" for i in range(3)})
    for arguments, code in (
        (["no-such-command"], 2),
        (["cp", f"{bucket}/none", "-"], 1),
        (["map", f"{bucket}/in/", f"{bucket}/out/", "sleep 0.3; cat"], 0),
        (["map", f"{bucket}/in/", f"{bucket}/out/", "cat"], 1),
        (["eval", f"{bucket}/in/000", "echo said >&2; exit 7"], 7),
    ):
        with open("/dev/full", "wb") as full:
            assert cluster.start_s4(*arguments, stderr=full).wait(20) == code
    assert len(cluster.keys(f"{bucket}/out/")) == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_is_ignored_stays_ignored(
    cluster: Cluster, bucket: str, number: signal.Signals
) -> None:
    def ignore() -> None:
        signal.signal(number, signal.SIG_IGN)

    cluster.put(f"{bucket}/in/000", b"x")
    seconds = f"0.{700 + number}"
    process = cluster.start_s4(
        "map", f"{bucket}/in/", f"{bucket}/out/", f"sleep {seconds}; cat", before=ignore
    )
    eventually(lambda: running(f"sleep\x00{seconds}"), 10)
    process.send_signal(number)
    assert process.wait(10) == 0


# Runs `s4` and sends it a Ctrl-C as soon as it is about to import a module.
INTERRUPTED = """if True:
    import os, signal, sys

    class Finder:
        def find_spec(name, path=None, target=None):
            if name == sys.argv[1]:
                os.kill(os.getpid(), signal.SIGINT)

    sys.meta_path.insert(0, Finder)
    from s4.cli import main
    main()
    """


@pytest.mark.parametrize("module", ["s4.config", "s4.lean", "inspect", "fire", "s4.words"])
def test_ctrl_c_at_the_very_start_is_no_traceback(cluster: Cluster, module: str) -> None:
    command = [sys.executable, "-c", INTERRUPTED, module]
    done = subprocess.run(command, env=cluster.env, capture_output=True, timeout=20)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, b"", b"")


def test_errors_survive_the_way_between_processes() -> None:
    for error in (
        errors.S4Error("text"),
        errors.NodeError("host:1", "reason"),
        errors.NonsenseError("host:1"),
        errors.BadKeyError("key", "rule"),
        errors.WorkerDiedError(7, -9),
        CopyError("1 of 2 files were not copied", ["a: why"]),
    ):
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))
