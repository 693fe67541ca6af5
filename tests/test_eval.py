"""s4 eval and POST /eval: what a command sees, what comes back, and how it may end.

The rules of commands are the same in jobs; those tests are here, the ones on jobs in test_map*.py.
"""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster import Answer, Cluster
from procs import eventually, running

from s4.api import MAX_JSON_OUTPUT

OUTPUTS = {
    "empty": b"",
    "no final newline": b"a\nb",
    "percent": b"%s %d 100%\n",
    "NUL bytes": b"\0a\0\0",
    "all bytes": bytes(range(256)),
    "carriage returns": b"a\r\n\n\rb",
    "megabytes": os.urandom(3_000_000),
}


@pytest.fixture(scope="module")
def key(cluster: Cluster) -> str:
    """A key that holds two lines."""
    made = f"{cluster.fresh_bucket()}/dir/000_two.txt"
    cluster.put(made, b"one\ntwo\n")
    return made


@pytest.mark.parametrize("data", OUTPUTS.values(), ids=OUTPUTS)
def test_output_is_exact(cluster: Cluster, bucket: str, data: bytes) -> None:
    cluster.put(f"{bucket}/000", data)
    result = cluster.s4("eval", f"{bucket}/000", "cat")
    assert (result.out, result.err) == (data, "")
    answer = cluster.nodes[0].post("/eval", key=f"{bucket}/000", body=b"cat")
    assert (answer.status, answer.body) == (200, data)


@pytest.mark.parametrize(
    ("command", "output"),
    [
        ("wc -l", "2\n"),
        ("cat | sort -r | head -n 1", "two\n"),
        ("read line; echo got $line; cat", "got one\ntwo\n"),
        ('while read line; do echo "<$line>"; done', "<one>\n<two>\n"),
        ("true; echo a\necho b", "a\nb\n"),
        ("echo ignores its input", "ignores its input\n"),
        ("echo $filename", "000_two.txt\n"),
        ("echo $LC_ALL", "C\n"),
        ("ls -A | wc -l", "0\n"),
        ("touch x; mkdir y; ls -A", "x\ny\n"),
        ("set -o | grep -cE '^(errexit|nounset|pipefail).*on'", "3\n"),
        ("if false; then echo no; fi; echo yes", "yes\n"),
        ("false || echo caught", "caught\n"),
        ("(exit 3) || echo $?", "3\n"),
        ("f() { echo function $1; }; f x", "function x\n"),
        ("cat <<< $'here\\tstring'", "here\tstring\n"),
        ("cat <<'END'\n$HOME\nEND\n", "$HOME\n"),
        ("# comment\necho hi # more", "hi\n"),
        ("echo $# $0 | cut -d' ' -f1", "0\n"),
        ("printf '%s|' {a,b}{1,2}", "a1|a2|b1|b2|"),
        ("echo grüße", "grüße\n"),
        ("yes | head -n 2", "y\ny\n"),
        ("readlink /proc/self/fd/0 | grep -c 000_two.txt", "1\n"),
        ('x=$(cat); echo "$x" | tail -n 1', "two\n"),
        ("exec cat", "one\ntwo\n"),
        ("setsid sh -c 'sleep 0.2; cat'", "one\ntwo\n"),
        ("nice setsid sort -r", "two\none\n"),
        ("exec setsid sort -r", "two\none\n"),
        ("trap 'echo bye' EXIT; cat", "one\ntwo\nbye\n"),
        ("exit 0; echo never", ""),
        ("echo 'q' \"d\" a,b [x] 1e3", "q d a,b [x] 1e3\n"),
    ],
)
def test_a_command_is_a_bash_line_beside_its_data(
    cluster: Cluster, key: str, command: str, output: str
) -> None:
    if "head" in command and "yes" in command:
        command = f"set +o pipefail; {command}"  # `yes` ends by SIGPIPE, which is a failure otherwise
    assert cluster.s4("eval", key, command).out.decode() == output


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("exit 1", 1),
        ("exit 3", 3),
        ("exit 130", 130),
        ("exit 255", 255),
        ("false", 1),
        ("false; echo not reached", 1),
        ("false | cat", 1),
        ("echo $not_set", 1),
        ("no-such-command", 127),
        ("setsid false", 1),
        ("/dev/null", 126),
        ("-v", 127),
        ("kill -9 $BASHPID", 137),
        ("kill -TERM $BASHPID; sleep 5", 143),
        ("if", 2),
        ("echo )", 2),
        ("cd /nowhere", 1),
        ("yes | head -n 1 > /dev/null", 141),
    ],
)
def test_the_exit_code_of_a_command_is_that_of_eval(
    cluster: Cluster, key: str, command: str, code: int
) -> None:
    result = cluster.run("eval", key, command)
    assert result.code == code, result
    assert b"not reached" not in result.out
    answer = cluster.owner(key).post("/eval", key=key, body=command.encode())
    assert answer.status == 400
    body = answer.json()
    assert body.keys() == {"exitcode", "stdout", "stderr"} and body["exitcode"] == code


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        ("kill -9 $BASHPID", 137, ""),
        ("kill -TERM 0; echo not reached", 143, ""),
        ("trap 'echo caught' TERM; kill -TERM 0; echo on", 0, "caught\non\n"),
        ("trap 'echo caught' USR1; kill -USR1 0; echo on", 0, "caught\non\n"),
    ],
)
def test_signals_are_for_a_command_with_setsid_as_for_others(
    cluster: Cluster, key: str, command: str, code: int, said: str
) -> None:
    for line in (command, f"setsid true; {command}"):
        result = cluster.run("eval", key, line)
        assert (result.code, result.out.decode(), result.err) == (code, said, ""), line


def test_output_and_stderr_of_a_failure_arrive_too(cluster: Cluster, key: str) -> None:
    command = "cat; printf '\\0%%'; echo problem >&2; exit 7"
    result = cluster.run("eval", key, command)
    assert (result.code, result.out, result.err) == (7, b"one\ntwo\n\0%", "problem\n")
    body = cluster.owner(key).post("/eval", key=key, body=command.encode()).json()
    assert body == {"exitcode": 7, "stdout": "one\ntwo\n\0%", "stderr": "problem\n"}


def test_of_the_long_output_of_a_failure_json_has_the_end(cluster: Cluster, key: str) -> None:
    command = b"seq 300000; seq 400000 >&2; exit 7"
    body = cluster.owner(key).post("/eval", key=key, body=command).json()
    assert [len(body[name]) for name in ("stdout", "stderr")] == [MAX_JSON_OUTPUT] * 2
    assert body["stdout"].endswith("\n299999\n300000\n") and body["stderr"].endswith("\n400000\n")


def test_a_command_over_its_time_limit_names_its_key(cluster: Cluster, key: str) -> None:
    said = f"{key}: killed after its time limit of 0.5 s: one | two"
    command = "echo one >&2; echo two >&2; sleep 7303"
    cluster.fails("eval", key, command, env={"S4_TIMEOUT": "0.5"}, code=1, says=said)
    limit = {"key": key, "timeout": 0.5}
    answer = cluster.owner(key).request("POST", "/eval", limit, command.encode(), 60)
    assert (answer.status, answer.json()) == (400, {"exitcode": 137, "stdout": "", "stderr": said + "\n"})
    eventually(lambda: not running("sleep\x007303"), 5)


def test_an_eval_is_waited_for_listed_and_cancelled_as_a_job_is(
    cluster: Cluster, key: str, folder: Path
) -> None:
    node = cluster.owner(key)
    answers: list[Answer] = []

    def ask(job: str, command: bytes) -> threading.Thread:
        params = {"key": key, "job": job}
        asking = threading.Thread(
            target=lambda: answers.append(node.request("POST", "/eval", params, command))
        )
        asking.start()
        eventually(lambda: node.get("/job", job=job).status == 200, 5)
        return asking

    hold = folder / "hold"
    hold.touch()
    asking = ask("eval-a", f"while [ -e {hold} ]; do sleep 0.02; done; cat".encode())
    assert [share["id"] for share in node.get("/jobs", state="running", prefix="eval-").json()] == ["eval-a"]
    assert node.get("/jobs", state="running", prefix="evil").json() == []
    assert node.get("/job", job="eval-a", wait="0.1").json()["state"] == "running"
    threading.Timer(0.2, hold.unlink).start()
    assert node.get("/job", job="eval-a", wait="30").json()["state"] == "done"
    asking.join()
    asking = ask("eval-b", b"sleep 7304")
    assert node.post("/cancel", job="eval-b").json()["state"] == "cancelled"
    asking.join()
    assert node.get("/jobs", state="running", prefix="eval-").json() == []
    assert [(answer.status, answer.body) for answer in answers[:1]] == [(200, b"one\ntwo\n")]
    said = "job eval-b was cancelled\n"
    assert answers[1].status == 400
    assert answers[1].json() == {"exitcode": 137, "stdout": "", "stderr": said}


def test_stderr_of_a_success_goes_to_stderr(cluster: Cluster, key: str) -> None:
    result = cluster.s4("eval", key, "echo out; echo err >&2")
    assert (result.out, result.err) == (b"out\n", "err\n")


def test_what_is_appended_to_stderr_by_its_name_stays(cluster: Cluster, key: str) -> None:
    command = "echo one >&2; echo two >> /dev/stderr; echo three | tee -a /dev/stderr; echo four >&2"
    result = cluster.s4("eval", key, command)
    assert (result.out, result.err) == (b"three\n", "one\ntwo\nthree\nfour\n")


def test_a_missing_key_is_exit_1_and_404(cluster: Cluster, bucket: str) -> None:
    cluster.fails("eval", f"{bucket}/000", "echo ran", says=f"{bucket}/000", code=1)
    assert cluster.nodes[0].post("/eval", key=f"{bucket}/000", body=b"echo").status == 404


@pytest.mark.parametrize("command", ["", "  ", "\n"])
def test_an_empty_command_is_refused(cluster: Cluster, key: str, command: str) -> None:
    cluster.fails("eval", key, command)
    assert cluster.owner(key).post("/eval", key=key, body=command.encode()).status == 400


def test_a_command_that_ignores_a_large_input_is_fine(cluster: Cluster, bucket: str) -> None:
    cluster.put(f"{bucket}/000", bytes(20 << 20))
    assert cluster.s4("eval", f"{bucket}/000", "echo done").out == b"done\n"
    assert cluster.s4("eval", f"{bucket}/000", "head -c 5").out == bytes(5)


def test_a_long_command_arrives_whole(cluster: Cluster, key: str) -> None:
    command = "echo start; " + "# " + "x" * 100_000 + "\necho end"
    assert cluster.s4("eval", key, command).out == b"start\nend\n"


def test_a_command_that_is_no_utf8_arrives_as_typed(cluster: Cluster, key: str) -> None:
    assert cluster.s4("eval", key, b"printf '\xff\xfe' | wc -c; echo \xc3").out == b"2\n\xc3\n"


def test_each_command_has_a_folder_of_its_own_that_is_removed(cluster: Cluster, key: str) -> None:
    command = "pwd; mkdir -p deep/er; echo x > deep/er/file; chmod 0 deep/er/file; chmod 0500 deep/er deep"
    folders = {cluster.s4("eval", key, command).lines[0] for _ in range(3)}
    assert len(folders) == 3
    eventually(lambda: not any(Path(folder).exists() for folder in folders), 10, "folders gone")
    eventually(lambda: not cluster.owner(key).temporary(), 10, "everything gone")


def test_the_data_of_a_key_cannot_be_changed_through_stdin(cluster: Cluster, key: str) -> None:
    assert cluster.run("eval", key, "echo changed >&0").code == 1
    assert cluster.get(key) == b"one\ntwo\n"


def test_commands_do_not_see_what_earlier_ones_set(cluster: Cluster, key: str) -> None:
    cluster.s4(
        "eval", key, "export leak=1; leak2=2; cd /; set +eu; umask 0; alias x=y; ulimit -n 100; f() { :; }"
    )
    probe = "echo ${leak-none} ${leak2-none} $(declare -F | wc -l) $PWD"
    for _ in range(5):
        *values, folder = cluster.s4("eval", key, probe).lines[0].split()
        assert values == ["none", "none", "0"] and folder != "/"


@pytest.mark.parametrize(
    "command",
    [
        "declare t=5; trap 'echo t=$t' EXIT; echo body",
        "return 3",
        "echo ${FUNCNAME-none} $#; f() { echo ${FUNCNAME[*]} $1; }; f x",
        "echo $((1/0))",
        "local x=1",
        "exit 3",
        "set -- a b; echo $#; false; echo not this",
    ],
)
def test_a_command_is_read_as_by_bash_itself(cluster: Cluster, key: str, command: str) -> None:
    wanted = subprocess.run(["bash", "-c", f"set -euo pipefail; {command}"], capture_output=True, check=False)
    for _ in range(2):  # the second may come to a bash that has run one before
        result = cluster.run("eval", key, command)
        assert (result.code, result.out) == (wanted.returncode, wanted.stdout)
        assert result.err.replace("bash: line 1:", "bash:") == wanted.stderr.decode().replace(
            "bash: line 1:", "bash:"
        )


def test_seconds_count_from_the_start_of_the_command(start_cluster: Callable[..., Cluster]) -> None:
    cluster = start_cluster(1, ["--max-cpu-jobs", "1"])
    cluster.put("s4://b/000")
    cluster.s4("eval", "s4://b/000", "sleep 3")  # so old is the bash of that worker by then
    assert int(cluster.s4("eval", "s4://b/000", "echo $SECONDS").out) < 3


def test_the_lines_of_a_command_count_from_one(cluster: Cluster, key: str) -> None:
    assert cluster.s4("eval", key, "echo $LINENO\n\necho $LINENO").lines == ["1", "3"]
    for command, says in {
        "true\nno-such-command": "line 2: no-such-command: command not found",
        "true\n\nif true; fi": "line 3: syntax error near unexpected token `fi'",
        "true\necho $unset": "line 2: unset: unbound variable",
        "f() {\n  no-such-command\n}\nf": "line 2: no-such-command",
    }.items():
        result = cluster.run("eval", key, command)
        assert result.code != 0 and says in result.err, result.err


def test_a_large_stderr_neither_hangs_nor_hurts(cluster: Cluster, key: str) -> None:
    result = cluster.run("eval", key, "head -c 5000000 /dev/zero >&2; echo out")
    assert (result.code, result.out) == (0, b"out\n")


def test_a_command_over_its_time_limit_is_killed_with_all_its_children(cluster: Cluster, key: str) -> None:
    command = (
        "sleep 7001 & (setsid sleep 7002 &) ; nohup sleep 7003 > /dev/null & echo begun; sleep 7004; wait"
    )
    began = time.monotonic()
    assert "time" in cluster.fails("eval", key, command, env={"S4_TIMEOUT": "1"}, code=1)
    assert 1 <= time.monotonic() - began < 10
    eventually(lambda: not running("sleep\x00700"), 5, "children gone")


def test_a_bad_time_limit_is_refused(cluster: Cluster, key: str) -> None:
    for limit in ("0", "-1", "soon", "nan", "inf"):
        cluster.fails("eval", key, "cat", env={"S4_TIMEOUT": limit}, says="S4_TIMEOUT")


def test_children_left_behind_by_a_command_that_ended_are_killed(cluster: Cluster, key: str) -> None:
    result = cluster.s4(
        "eval", key, "sleep 7011 > /dev/null 2>&1 & setsid sleep 7012 > /dev/null 2>&1 & echo done"
    )
    assert result.out == b"done\n"
    eventually(lambda: not running("sleep\x00701"), 5, "children gone")


@pytest.mark.parametrize("shot", ["kill -9 $PPID", "kill -9 $$", "kill -9 0", "kill -9 -- -$$"])
def test_a_command_that_kills_its_shell_costs_only_itself(cluster: Cluster, key: str, shot: str) -> None:
    result = cluster.run("eval", key, f"{shot}; sleep 5; echo survived")
    assert result.code not in (0, 2) and b"survived" not in result.out
    for _ in range(6):
        assert cluster.s4("eval", key, "echo fine").out == b"fine\n"


def test_ctrl_c_ends_the_command_too(cluster: Cluster, key: str) -> None:
    process = cluster.start_s4("eval", key, "sleep 7021 & sleep 7022")
    eventually(lambda: len(running("sleep\x00702")) == 2, 10, "command runs")
    os.killpg(process.pid, signal.SIGINT)
    _out, err = process.communicate(timeout=10)
    assert process.returncode == 130 and err.count(b"\n") <= 1, err
    eventually(lambda: not running("sleep\x00702"), 5, "command gone")


def test_a_closed_pipe_ends_it_quietly(cluster: Cluster, bucket: str) -> None:
    cluster.put(f"{bucket}/000", bytes(10 << 20))
    for command in (f"s4 eval {bucket}/000 cat", f"s4 cp {bucket}/000 -"):
        done = subprocess.run(
            ["bash", "-c", f"{command} | head -c 3 | wc -c; exit ${{PIPESTATUS[0]}}"],
            env=cluster.env,
            capture_output=True,
            timeout=30,
            check=False,
        )
        assert done.returncode == 128 + signal.SIGPIPE
        assert (done.stdout.strip(), done.stderr) == (b"3", b"")


def test_no_signal_is_ignored_in_a_command(start_cluster: Callable[..., Cluster]) -> None:
    cluster = start_cluster(1)
    cluster.put("s4://b/000", b"x")
    ignored = cluster.s4("eval", "s4://b/000", "grep SigIgn /proc/self/status").out
    of_the_c_library = 0b11 << 31  # 32 and 33, which posix_spawn ignores and nobody else can change
    assert int(ignored.split()[1], 16) & ~of_the_c_library == 0
    command = "trap 'echo heard' HUP QUIT; kill -HUP $BASHPID; kill -QUIT $BASHPID"
    assert cluster.s4("eval", "s4://b/000", command).out == b"heard\nheard\n"


def test_the_word_time_alone_is_that_of_bash(cluster: Cluster, key: str) -> None:
    result = cluster.run("eval", key, "time")
    assert result.code == 0 and "real" in result.err


def test_temporary_files_of_a_command_go_with_it(start_cluster: Callable[..., Cluster]) -> None:
    cluster = start_cluster(1, start=False)
    cluster.env.pop("TMPDIR", None)
    (node,) = cluster.nodes
    node.start()
    cluster.put("s4://b/000")
    made = cluster.s4(
        "eval", "s4://b/000", "mktemp; mktemp -d; echo x > $(mktemp); ls -A $TMPDIR | wc -l"
    ).lines
    assert all(line.startswith(f"{node.data}/_run/") for line in made[:2]) and made[2] == "3"
    killed = "map", "s4://b/", "s4://out/", "mktemp >&2; touch going; sleep 600.77", "--timeout", "0.5"
    assert f"{node.data}/_run/" in cluster.fails(*killed, code=1, says="time limit")
    assert cluster.s4("eval", "s4://b/000", "ls -A $TMPDIR").out == b""
    eventually(lambda: not list(node.data.glob("_run/*/tmp/*")), 5, "all are gone")
    node.terminate()
    cluster.env["TMPDIR"] = str(cluster.work)
    node.start()
    assert cluster.s4("eval", "s4://b/000", "echo $TMPDIR").lines == [str(cluster.work)]
