"""The conf file: where it is looked for, what it may hold, and nodes and clients whose confs disagree."""

import os
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cluster import HOST, SERVER, Cluster, free_port
from procs import eventually

from s4 import Client
from s4.config import NO_CONF_HINT

BAD_CONFS = {
    "no port": ("host:1\nhost\n", ", line 2"),
    "no host": ("# servers\n\n:8080\n", ", line 3"),
    "no number": ("host:http\n", ", line 1"),
    "port 0": ("host:0\n", ", line 1"),
    "big port": ("host:65536\n", ", line 1"),
    "negative port": ("host:-1\n", ", line 1"),
    "two on a line": ("a:1 b:2\n", ", line 1"),
    "a URL": ("http://host:80\n", ", line 1"),
    "open bracket": ("[::1:8080\n", ", line 1"),
    "not an address": ("[::zz]:8080\n", ", line 1"),
    "v6 without brackets": ("fe80::1:8080\n", ", line 1"),
    "the same twice": ("a:1\nb:1\na:1\n", ", line 3"),
    "binary": ("a:1\n\x00\x01\x02\udcff\n", ", line 2"),
    "empty": ("", "empty"),
    "only comments": ("\n  \n# nothing\n", "empty"),
}


def test_servers_are_listed_in_order_without_comments_and_blank_lines(cluster: Cluster, folder: Path) -> None:
    conf = folder / "conf"
    conf.write_text("# the ring\n\n  b.example:81  # second\n\t\na.example:80\r\n[::1]:8080\n10.0.0.1:1")
    for command in ("servers", "config"):
        listed = cluster.s4(command, "-c", str(conf)).lines
        assert listed == ["b.example:81", "a.example:80", "[::1]:8080", "10.0.0.1:1"]


@pytest.mark.parametrize(("text", "says"), BAD_CONFS.values(), ids=BAD_CONFS)
def test_a_bad_conf_is_reported_with_file_and_line(
    cluster: Cluster, folder: Path, text: str, says: str
) -> None:
    conf = folder / "bad.conf"
    conf.write_bytes(os.fsencode(text))
    line = cluster.fails("servers", "-c", str(conf), says=str(conf))
    assert says in line
    server = cluster.run("-conf", str(conf), cwd=folder, program=[SERVER])
    assert says in server.fatal and str(conf) in server.fatal
    assert not (folder / "s4_data").exists()


def test_a_conf_that_is_missing_or_unreadable_is_reported(cluster: Cluster, folder: Path) -> None:
    locked = folder / "locked"
    locked.write_text("a:1\n")
    locked.chmod(0)
    for path in (folder / "nowhere", folder, locked):
        cluster.fails("servers", "-c", str(path), says=str(path), privileged=False)
        cluster.fails("servers", env={"S4_CONF_PATH": str(path)}, says=str(path), privileged=False)
    for path in (folder / "nowhere", folder):
        assert str(path) in cluster.run("-conf", str(path), cwd=folder, program=[SERVER]).fatal


def test_an_ipv6_address_is_the_same_however_it_is_spelled(cluster: Cluster, folder: Path) -> None:
    conf = folder / "conf"
    conf.write_text("[FD00:0::0:2]:80\n[::1]:80\n")
    assert cluster.s4("servers", "-c", str(conf)).lines == ["[fd00::2]:80", "[::1]:80"]
    conf.write_text("[::1]:80\n[0:0::1]:80\n")
    assert "[::1]:80 is listed twice" in cluster.fails("servers", "-c", str(conf))


@pytest.mark.parametrize(
    "arguments",
    [
        ["-c", "CONF", "servers"],
        ["servers", "-c", "CONF"],
        ["servers", "--conf", "CONF"],
        ["servers", "--conf=CONF"],
    ],
)
def test_the_option_chooses_the_conf_over_the_variable(
    cluster: Cluster, folder: Path, arguments: list[str]
) -> None:
    conf = folder / "1e3"  # a name that must not be taken for a number
    conf.write_text("chosen:1\n")
    spelled = [argument.replace("CONF", conf.name) for argument in arguments]
    assert cluster.s4(*spelled, cwd=folder).lines == ["chosen:1"]


def test_a_conf_is_found_below_the_home_folder_without_a_shell(
    start_cluster: Callable[..., Cluster], folder: Path
) -> None:
    (folder / "ring").write_text("mine:1\n")
    home = {"HOME": str(folder)}
    cluster = start_cluster(1, start=False)
    assert cluster.s4("servers", env={**home, "S4_CONF_PATH": "~/ring"}).lines == ["mine:1"]
    assert cluster.s4("servers", "-c", "~/ring", env=home).lines == ["mine:1"]
    cluster.fails("servers", "-c", "~/none", env=home, says=f"conf file {folder}/none does not exist")
    (node,) = cluster.nodes
    cluster.env |= {**home, "S4_CONF_PATH": "~/ring"}
    (folder / "ring").write_text(f"{node}\n")
    node.start(bare=True)
    cluster.put("s4://b/000")
    assert cluster.s4("eval", "s4://b/000", "echo $S4_CONF_PATH").out.decode() == f"{folder}/ring\n"


def test_a_conf_may_begin_with_a_byte_order_mark(cluster: Cluster, folder: Path) -> None:
    conf = folder / "conf"
    for text in ("a:1\nb:2\n", "# servers\r\na:1\r\nb:2\r\n"):
        conf.write_text(text, encoding="utf-8-sig")
        assert cluster.s4("servers", "-c", str(conf)).lines == ["a:1", "b:2"]


def test_an_empty_conf_option_is_not_the_other_conf(cluster: Cluster) -> None:
    for arguments in (["-c", "", "servers"], ["servers", "--conf="]):
        cluster.fails(*arguments, code=2, says="conf")


def test_the_option_works_between_positionals(cluster: Cluster, bucket: str) -> None:
    nowhere = {"S4_CONF_PATH": "/nowhere"}
    conf = str(cluster.conf)
    cluster.s4("cp", "-c", conf, "-", f"{bucket}/000", data=b"x", env=nowhere)
    assert cluster.s4("eval", f"{bucket}/000", "-c", conf, "cat", env=nowhere).out == b"x"
    assert cluster.s4("ls", f"{bucket}/", "--conf", conf, "-r", env=nowhere).lines[0].endswith(" 000")


def test_without_a_conf_it_is_the_one_node_of_the_default(cluster: Cluster, folder: Path) -> None:
    env = {"HOME": str(folder), "S4_CONF_PATH": ""}
    assert cluster.s4("servers", env=env).lines == ["127.0.0.1:8080"]
    line = cluster.fails("ls", env={**env, "S4_TIMEOUT": "1"}, code=1, says="127.0.0.1:8080")
    assert line.endswith(f"; {NO_CONF_HINT}")
    health = cluster.run("health", env=env)
    assert health.code == 1 and health.err.splitlines()[-1] == NO_CONF_HINT
    (folder / ".s4.conf").write_text("mine:1\n")
    assert cluster.s4("servers", env=env).lines == ["mine:1"]


def test_without_a_conf_a_server_is_the_one_node_of_the_default(cluster: Cluster, folder: Path) -> None:
    env = {"HOME": str(folder), "S4_CONF_PATH": ""}
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of others may linger there
        try:
            other.bind(("127.0.0.1", 8080))
            other.listen()
        except OSError:
            pass  # somebody has that port, which serves as well
        result = cluster.run(cwd=folder, env=env, program=[SERVER])
    assert "127.0.0.1:8080" in result.fatal and "in use" in result.fatal


def test_a_server_without_options_finds_its_line_and_listens_there_only(
    start_cluster: Callable[..., Cluster], folder: Path
) -> None:
    cluster = start_cluster(1, start=False)
    (node,) = cluster.nodes
    cluster.conf.write_text(f"203.0.113.1:{node.port}\n{node}\n203.0.113.2:{node.port}\n")
    node.start(bare=True)
    other = HOST.rsplit(".", 1)[0] + f".{(int(HOST.rsplit('.', 1)[1]) + 1) % 256}"
    for address in (other, "127.0.0.1"):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((address, node.port), timeout=5).close()
    assert node.post("/prepare_get", key="s4://b/001").status == 404  # the second of three
    assert node.post("/prepare_get", key="s4://b/000").status == 400


@pytest.mark.parametrize(
    ("lines", "options", "says"),
    [
        (["203.0.113.1:{port}"], [], "address of this machine"),
        (["{host}:{port}", "{host}:{other}"], [], "port"),
        (["{host}:{port}", "203.0.113.1:{other}"], ["-port", "{other}"], "{other}"),
    ],
    ids=["no line is local", "several are", "none with that port"],
)
def test_a_server_that_cannot_find_its_line_says_why(
    cluster: Cluster, folder: Path, lines: list[str], options: list[str], says: str
) -> None:
    values = {"host": HOST, "port": free_port(), "other": free_port()}
    conf = folder / "conf"
    conf.write_text("".join(line.format(**values) + "\n" for line in lines))
    arguments = [option.format(**values) for option in options]
    result = cluster.run("-conf", str(conf), *arguments, cwd=folder, program=[SERVER])
    assert says.format(**values) in result.fatal
    assert not (folder / "s4_data").exists()


def test_a_cluster_of_v6_addresses_works(start_cluster: Callable[..., Cluster]) -> None:
    cluster = start_cluster(hosts=["::1", "::1"])
    assert cluster.conf.read_text().startswith("[::1]:")
    assert cluster.s4("health").lines == [f"healthy:   {node}" for node in cluster.nodes]
    for name in ("000", "001"):
        cluster.s4("cp", "-", f"s4://b/in/{name}", data=name.encode())
    cluster.s4("map-to-n", "s4://b/in/", "s4://b/out/", "cat > 0; cat 0 0 > 1; echo 0; echo 1")
    assert cluster.s4("cp", "s4://b/out/001/1", "-").out == b"001001"
    assert len(cluster.keys("s4://b/out/")) == 4


@pytest.fixture
def disagreeing(cluster: Cluster, folder: Path) -> str:
    """A conf with the servers of the shared cluster in another order."""
    conf = folder / "conf"
    conf.write_text("".join(f"{node}\n" for node in reversed(cluster.nodes)))
    return str(conf)


def test_health_reports_nodes_whose_conf_disagrees(cluster: Cluster, disagreeing: str) -> None:
    result = cluster.run("health", "-c", disagreeing)
    assert result.code == 1
    assert result.lines == [f"unhealthy: {node}" for node in reversed(cluster.nodes)]
    assert "conf" in result.err


def test_health_reports_the_one_node_of_a_cluster_whose_conf_disagrees(
    start_cluster: Callable[..., Cluster],
) -> None:
    cluster = start_cluster(2)
    one, two = cluster.nodes
    two.terminate()
    cluster.conf.write_text(f"{two}\n{one}\n")
    two.start()
    cluster.conf.write_text(f"{one}\n{two}\n")
    result = cluster.run("health")
    assert result.code == 1
    assert result.lines == [f"healthy:   {one}", f"unhealthy: {two}"]


def test_with_a_disagreeing_conf_nothing_is_stored_anywhere(
    cluster: Cluster, bucket: str, disagreeing: str
) -> None:
    cluster.put(f"{bucket}/in/000", b"x")
    with cluster.nothing_changes():
        for name in ("000", "002", "a.txt", "d.txt"):
            cluster.fails("cp", "-", f"{bucket}/{name}", "-c", disagreeing, data=b"x", code=1)
        cluster.fails("cp", f"{bucket}/in/000", "-", "-c", disagreeing, code=1)
        cluster.fails("rm", f"{bucket}/in/000", "-c", disagreeing, code=1)
        for job in ("map", "map-to-n", "map-from-n"):
            cluster.fails(job, f"{bucket}/in/", f"{bucket}/out/", "cat", "-c", disagreeing, code=1)


def test_health_waits_for_all_host_names_together(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()

    def look_up(*_arguments: object) -> None:
        assert over.wait(60)
        raise OSError("no such host")

    monkeypatch.setattr("s4.http.dial", look_up)
    hosts = [f"host{i}:8080" for i in range(10)]
    conf = folder / "conf"
    conf.write_text("\n".join(hosts))
    client = Client(str(conf))
    try:
        with ThreadPoolExecutor(1) as pool:
            # 2 s, where one host after the other would take 20.
            assert pool.submit(client.health).result(10) == dict.fromkeys(hosts, "no answer in time")
            over.set()
    finally:
        over.set()


def test_health_with_a_server_down_says_which_and_answers_soon(start_cluster: Callable[..., Cluster]) -> None:
    cluster = start_cluster(3)
    cluster.nodes[1].kill()
    eventually(lambda: not cluster.nodes[1].workers(), 5)
    result = cluster.run("health", timeout=4)
    states = ["healthy:   ", "unhealthy: ", "healthy:   "]
    assert result.code == 1
    assert result.lines == [f"{state}{node}" for state, node in zip(states, cluster.nodes, strict=True)]
