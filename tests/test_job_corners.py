"""Corners of eval and jobs: shell characters in keys, odd commands and outputs, bad requests, leftovers."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from cluster import Cluster
from procs import eventually

SHELL_NAMES = [
    "$HOME",
    "a;b",
    "`id`",
    "$(id)",
    "it's",
    'q"q',
    "x*?[y]",
    "a&b|c",
    "<>",
    "\\n",
    "%s",
    "!x",
    "~",
    "-n",
]
JOBS = ["map", "map_to_n", "map_from_n"]


@pytest.mark.parametrize("name", SHELL_NAMES)
def test_shell_characters_in_a_key_are_harmless(cluster: Cluster, bucket: str, name: str) -> None:
    key = f"{bucket}/in/{name}"
    cluster.put(key, b"data\n")
    assert cluster.s4("eval", key, 'printf "%s\\n" "$filename"; cat').out.decode() == f"{name}\ndata\n"
    cluster.s4("map", f"{bucket}/in/", f"{bucket}/out/", 'printf "%s" "$filename"')
    assert cluster.contents(f"{bucket}/out/") == {name: name.encode()}
    cluster.s4(
        "map-to-n", f"{bucket}/in/", f"{bucket}/n/", 'cat > "./$filename"; printf "%s\\n" "./$filename"'
    )
    assert cluster.contents(f"{bucket}/n/") == {f"{name}/{name}": b"data\n"}
    cluster.s4("map-from-n", f"{bucket}/in/", f"{bucket}/from/", 'while IFS= read -r p; do cat "$p"; done')
    assert list(cluster.contents(f"{bucket}/from/").values()) == [b"data\n"]


@pytest.mark.parametrize("command", ["", " \n", "echo a\0b"])
def test_an_empty_command_or_one_with_nul_is_400(cluster: Cluster, bucket: str, command: str) -> None:
    cluster.put(f"{bucket}/in/000")
    with cluster.nothing_changes():
        node = cluster.owner("000")
        assert node.post("/eval", key=f"{bucket}/in/000", body=command.encode()).status == 400
        for job in JOBS:
            body = {"cmd": command, "indir": f"{bucket}/in/", "outdir": f"{bucket}/out/"}
            assert node.post_json(f"/{job}", body).status == 400


def test_raw_eval_answers_stdout_then_stderr_whatever_the_exit_code(cluster: Cluster, bucket: str) -> None:
    cluster.put(f"{bucket}/000", b"\0\xff")
    command = b"cat; printf problem >&2; exit 7"
    answer = cluster.nodes[0].post("/eval", key=f"{bucket}/000", raw="true", body=command)
    assert (answer.status, answer.body) == (400, b"\0\xffproblem")
    answer = cluster.nodes[0].post("/eval", key=f"{bucket}/000", raw="true", body=b"cat; echo e >&2")
    assert (answer.status, answer.body) == (200, b"\0\xffe\n")


@pytest.mark.parametrize(
    "command",
    [
        "echo x > 0; echo 0; echo 0",
        "mkdir a; echo x > a/0; echo y > 0; echo 0; echo a/0",
        "echo x > 0; ln -s 0 1; ls",
    ],
)
def test_two_printed_paths_of_one_name_or_file_fail_the_job(
    cluster: Cluster, bucket: str, command: str
) -> None:
    cluster.put(f"{bucket}/in/000")
    line = cluster.fails("map-to-n", f"{bucket}/in/", f"{bucket}/out/", command, code=1)
    assert f"{bucket}/in/000" in line and str(cluster.nodes[0]) in line
    assert cluster.keys(f"{bucket}/out/") == []


def test_commands_of_jobs_arrive_as_typed(cluster: Cluster, bucket: str) -> None:
    cluster.put(f"{bucket}/in/000")
    quotes = b"echo \"it's\" '\"' \\\\\nprintf '\xff\xfe' # " + b"x" * 60_000
    cluster.s4("map", f"{bucket}/in/".encode(), f"{bucket}/out/".encode(), quotes)
    assert cluster.contents(f"{bucket}/out/") == {"000": b"it's \" \\\n\xff\xfe"}


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("folders", [("in", "out/"), ("in/", "out"), ("in/", "in/x/")])
def test_a_node_refuses_folders_by_itself(
    cluster: Cluster, bucket: str, job: str, folders: tuple[str, str]
) -> None:
    cluster.put(f"{bucket}/in/000")
    indir, outdir = folders
    with cluster.nothing_changes():
        for name in ("outdir", "outidr"):
            body = {"cmd": "cat", "indir": f"{bucket}/{indir}", name: f"{bucket}/{outdir}"}
            answer = cluster.nodes[0].post(f"/{job}", body=json.dumps(body).encode())
            assert answer.status == 400, answer


def test_nothing_temporary_is_left_after_successes_and_failures(cluster: Cluster, bucket: str) -> None:
    cluster.put_all({f"{bucket}/in/{i:03}": b"x" for i in range(6)})
    for command in ("mkdir d; echo x > d/f; ls -d d > l", "echo x > f; exit 3", "no-such-command"):
        cluster.run("eval", f"{bucket}/in/000", command)
        for i, job in enumerate(("map", "map-to-n", "map-from-n")):
            cluster.run(job, f"{bucket}/in/", f"{bucket}/out{i}/", command)
    for node in cluster.nodes:
        node.check()


def test_a_command_that_puts_a_link_in_the_place_of_its_folder_harms_nothing(
    cluster: Cluster, bucket: str
) -> None:
    precious = cluster.work / f"precious-{bucket[5:]}"
    precious.mkdir()
    (precious / "file").write_text("stays")
    cluster.put_all({f"{bucket}/in/{i:03}": b"" for i in range(12)})
    command = f'here=$PWD; cd ..; rmdir "$here"; ln -s {precious} "$here"'
    cluster.s4("map", f"{bucket}/in/", f"{bucket}/out/", command)
    assert (precious / "file").read_text() == "stays"
    cluster.s4("map", f"{bucket}/in/", f"{bucket}/again/", '[ -z "$(ls -A)" ] && pwd -P && touch left')
    assert not [path for path in precious.iterdir() if path.name != "file"]


@pytest.mark.parametrize("kind", ["map", "map-to-n", "map-from-n"])
def test_a_command_that_closes_its_standard_files_spoils_none_for_the_next(
    start_cluster: Callable[..., Cluster], kind: str
) -> None:
    cluster = start_cluster(1, ["--max-cpu-jobs", "1"])
    cluster.put_all({f"s4://b/in/{i:03}": b"" for i in range(4)})
    command = "echo noise >&2; echo x > file; chmod 0 /dev/stderr"
    if kind != "map":
        command += '; rm -f "$(readlink /proc/$BASHPID/fd/2)"'
    cluster.s4(kind, "s4://b/in/", "s4://b/out/", command)
    cluster.s4(kind, "s4://b/in/", "s4://b/again/", "xargs -r cat; ls")


def test_a_command_that_removes_the_folder_of_its_worker_costs_only_itself(
    start_cluster: Callable[..., Cluster],
) -> None:
    cluster = start_cluster(1, ["--max-cpu-jobs", "1"])
    cluster.put("s4://b/000", b"data")
    cluster.fails("eval", "s4://b/000", 'rm -r "$(dirname "$(readlink /proc/self/fd/2)")"; echo x', code=1)
    for i in range(8):  # whichever worker it is
        assert cluster.s4("eval", "s4://b/000", "cat; echo noise >&2").out == b"data"
        cluster.put(f"s4://b/more/{i:03}", b"more")
    cluster.nodes[0].check()


def test_an_input_that_goes_while_its_command_waits_fails_that_task_alone(
    start_cluster: Callable[..., Cluster],
) -> None:
    cluster = start_cluster(1, ["--max-cpu-jobs", "1"])
    keys = {f"s4://b/in/{i:03}": f"data{i}".encode() for i in range(4)}
    cluster.put_all(keys)
    started = cluster.work / "started"
    command = f"touch {started}; while [ $filename = 000 ] && [ -e {started} ]; do sleep 0.01; done; cat"
    client = cluster.start_s4("map", "s4://b/in/", "s4://b/out/", command, "--keep-going")
    eventually(started.exists, 10)
    cluster.nodes[0].path_of("s4://b/in/001").unlink()
    started.unlink()
    _out, err = client.communicate(timeout=20)
    assert client.returncode == 1 and b"s4://b/in/001" in err and b"No such file" in err, err
    # What it left in the shell must not be taken for the end of a later command.
    left = {key: data for key, data in keys.items() if key != "s4://b/in/001"}
    cluster.s4("rm", "s4://b/in/001")
    for again in ("x", "y"):
        cluster.s4("map", "s4://b/in/", f"s4://b/{again}/", "cat")
        assert cluster.contents(f"s4://b/{again}/") == {key[-3:]: data for key, data in left.items()}
    assert "no such key" in cluster.fails("eval", "s4://b/in/001", "cat", code=1)


def test_of_two_evals_with_one_id_one_runs(start_cluster: Callable[..., Cluster]) -> None:
    cluster = start_cluster(1, ["--max-cpu-jobs", "1"])
    cluster.put("s4://b/000", b"x")
    node = cluster.nodes[0]
    go = cluster.work / "go"
    blocker = cluster.start_s4("eval", "s4://b/000", f"while [ ! -e {go} ]; do sleep 0.01; done")
    eventually(lambda: node.get("/jobs").json(), 10)
    with ThreadPoolExecutor() as pool:
        ask = partial(node.post, "/eval", key="s4://b/000", job="one0one0one0", body=b"cat")
        both = [pool.submit(ask) for _ in range(2)]
        assert eventually(lambda: [f for f in both if f.done()], 10)
        go.touch()
        statuses = sorted(future.result().status for future in both)
    assert statuses == [200, 409] and blocker.wait(10) == 0
    assert {share["state"] for share in node.get("/jobs").json()} == {"done"}
    assert "Traceback" not in node.log
