"""s4 map-to-n, the shuffle: which files become which keys, on which nodes."""

import random

import pytest
from cluster import Cluster
from procs import eventually
from reference import name_of, owner_of


def test_each_printed_file_becomes_a_key_below_the_name_of_the_input(cluster: Cluster, bucket: str) -> None:
    cluster.put_all({f"{bucket}/in/000": b"a\nb\na\n", f"{bucket}/in/sub/001_x": b"b\nc\n"})
    cluster.s4("map-to-n", f"{bucket}/in/", f"{bucket}/out/", "while read w; do echo $w >> $w; done; ls")
    assert cluster.contents(f"{bucket}/out/") == {
        "000/a": b"a\na\n",
        "000/b": b"b\n",
        "001_x/b": b"b\n",
        "001_x/c": b"c\n",
    }


def test_every_output_is_on_the_node_that_owns_it(cluster: Cluster, bucket: str) -> None:
    cluster.put_all({f"{bucket}/in/{i:03}": b"" for i in range(6)})
    command = 'for i in $(seq -w 0 49); do echo "$filename" > $i; echo $i; done; echo x > a.txt; echo a.txt'
    cluster.s4("map-to-n", f"{bucket}/in/", f"{bucket}/out/", command)
    keys = cluster.keys(f"{bucket}/out/")
    assert len(keys) == 6 * 51
    for i, node in enumerate(cluster.nodes):
        held = [row[3] for row in node.listing(f"{bucket}/out/")]
        assert held and all(owner_of(name_of(path), 3) == i for path in held)
    assert cluster.get(f"{bucket}/out/004/17") == b"004\n"


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("true", []),
        ("echo; echo '  '; echo", []),
        ("echo x > 0; echo; echo 0; echo", ["0"]),
        ("echo x > 0; printf 0", ["0"]),
        ("echo x > 0; echo ./0", ["0"]),
        ('echo x > 0; echo "$PWD/0"', ["0"]),
        ("mkdir -p a/b; echo x > a/b/0; echo a/b/0", ["0"]),
        ("mkdir a; echo x > a/0; echo a/../a/0", ["0"]),
        ("echo x > 0; echo 0/", ["0"]),
        ("echo x > 0; echo missing/../0", ["0"]),
        ("echo x > 0; ln -s 0 1; echo 1", ["1"]),
        ("mkdir a; echo x > a/0; ln -s a l; ln -s ../l a/m; echo a/m/0", ["0"]),
        ("echo x > 0; echo x > 1; echo 1", ["1"]),
        ("touch -- -n '$x;y' \"'q\\\"\"; ls", ["$x;y", "'q\"", "-n"]),
        ("echo x > é; echo é", ["é"]),
        ("echo x > 0; chmod 0 0; echo 0", ["0"]),
        ('cat > "$filename"; echo "$filename"', ["000"]),
    ],
)
def test_what_is_printed_decides(cluster: Cluster, bucket: str, command: str, expected: list[str]) -> None:
    cluster.put(f"{bucket}/in/000", b"data")
    cluster.s4("map-to-n", f"{bucket}/in/", f"{bucket}/out/", command)
    assert cluster.keys(f"{bucket}/out/") == [f"{bucket}/out/000/{name}" for name in expected]


@pytest.mark.parametrize(
    "command",
    [
        "echo missing",
        "echo x > 0; echo 0; echo missing",
        "echo /etc/hostname",
        "echo ../x",
        "echo x > ../stray-$$; echo ../stray-$$",
        "ln -s /etc/hostname link; echo link",
        "mkdir out; ln -s / out/root; echo out/root/etc/hostname",
        "mkdir dir; echo dir",
        "echo .",
        "echo /",
        "mkfifo pipe; echo pipe",
        "echo /dev/null",
        "echo x > 'a b'; echo 'a b'",
        "echo x > $'\\xff'; echo $'\\xff'",
        "echo x > 0; echo 0; exit 3",
    ],
)
def test_a_bad_path_fails_the_job_and_makes_no_key(cluster: Cluster, bucket: str, command: str) -> None:
    cluster.put(f"{bucket}/in/000", b"data")
    line = cluster.fails("map-to-n", f"{bucket}/in/", f"{bucket}/out/", command, code=1)
    assert f"{bucket}/in/000" in line and str(cluster.nodes[0]) in line
    assert cluster.keys(f"{bucket}/out/") == []
    for node in cluster.nodes:
        eventually(lambda node=node: all("stray" in path.name for path in node.temporary()), 5)  # type: ignore[misc]
        for stray in node.temporary():
            stray.unlink()


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("echo missing", "'missing': No such file or directory"),
        ("echo ../missing", "'../missing', which leaves its folder"),
        ("echo /missing/too", "'/missing/too', which leaves its folder"),
        ("ln -s /missing link; echo link", "'link', which leaves its folder"),
        ("mkdir d; ln -s /etc/hostname d/link; echo d/link", "'d/link', which leaves its folder"),
        (
            "mkdir d; ln -s /etc/hostname link; printf 'd/../%.0s' {1..790}; echo link",
            "which leaves its folder",
        ),
        ("d=$PWD; cd ..; rmdir $d; ln -s /etc $d; echo hostname", "is no folder any more"),
        ("mkdir d; echo d", "'d', which is not a file"),
        ("echo .", "'.', which is not a file"),
        ("ln -s loop loop; echo loop", "'loop': Too many levels of symbolic links"),
        (
            "mkdir d; touch x d/x; echo x; echo d/x",
            "its NAME 'x', which its key would have, was printed before",
        ),
        ("touch x; ln -s x y; echo x; echo y", "which is another name of a file that it printed before"),
    ],
)
def test_what_is_wrong_with_a_path_is_told(cluster: Cluster, bucket: str, command: str, says: str) -> None:
    cluster.put(f"{bucket}/in/000")
    assert says in cluster.fails("map-to-n", f"{bucket}/in/", f"{bucket}/out/", command, code=1)


def test_binary_empty_and_large_files_are_shuffled_whole(cluster: Cluster, bucket: str) -> None:
    data = random.Random(2).randbytes(30_000_000)
    cluster.put_all(
        {f"{bucket}/in/000": data, f"{bucket}/in/001": b"", f"{bucket}/in/002": bytes(range(256))}
    )
    cluster.s4("map-to-n", f"{bucket}/in/", f"{bucket}/out/", "tee 000 001 > 002; ls")
    expected = {"000": data, "001": b"", "002": bytes(range(256))}
    assert cluster.contents(f"{bucket}/out/") == {
        f"{name}/{copy:03}": content for name, content in expected.items() for copy in range(3)
    }


def test_a_shuffle_of_many_small_files_arrives_whole(cluster: Cluster, bucket: str) -> None:
    cluster.put_all({f"{bucket}/in/{i:03}": f"{i}\n".encode() for i in range(3)})
    command = "read n; for i in {0..299}; do echo $n.$i > $i; done; ls"
    cluster.s4("map-to-n", f"{bucket}/in/", f"{bucket}/out/", command)
    cluster.s4("map-from-n", f"{bucket}/out/", f"{bucket}/merged/", "xargs cat")
    assert len(cluster.keys(f"{bucket}/out/")) == 900
    merged = cluster.contents(f"{bucket}/merged/")
    assert merged == {str(i): f"0.{i}\n1.{i}\n2.{i}\n".encode() for i in range(300)}
