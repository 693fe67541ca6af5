"""s4 map-from-n, the merge: which keys are a group, what the command reads, and the name of the output."""

import os
from collections import defaultdict

import pytest
from cluster import Cluster
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import name_of, owner_of, prefix_of

from s4.keys import group_name


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["000"], {"000": ["000"]}),
        (["a/000", "b/000"], {"000": ["a/000", "b/000"]}),
        (["a/000_x", "b/000_x"], {"000_x": ["a/000_x", "b/000_x"]}),
        (["a/000_x", "b/000_y"], {"000": ["a/000_x", "b/000_y"]}),
        (["a/000", "b/000_x"], {"000": ["a/000", "b/000_x"]}),
        (["a/000_x_y", "b/000_x_y", "000_x_y"], {"000_x_y": ["000_x_y", "a/000_x_y", "b/000_x_y"]}),
        (["a/name", "b/name", "b/deep/er/name"], {"name": ["a/name", "b/deep/er/name", "b/name"]}),
        (["a/name_x", "b/name_y"], {"name_x": ["a/name_x"], "name_y": ["b/name_y"]}),
        (["a/000.txt", "b/000.txt"], {"000.txt": ["a/000.txt", "b/000.txt"]}),
        (["a/3_", "b/3_"], {"3_": ["a/3_", "b/3_"]}),
        (["x/0", "x/1", "y/0", "y/1"], {"0": ["x/0", "y/0"], "1": ["x/1", "y/1"]}),
    ],
)
def test_groups_share_a_prefix_and_keep_a_common_suffix(
    cluster: Cluster, bucket: str, names: list[str], expected: dict[str, list[str]]
) -> None:
    cluster.put_all({f"{bucket}/in/{name}": f"{name}\n".encode() for name in names})
    cluster.s4("map-from-n", f"{bucket}/in/", f"{bucket}/out/", "xargs cat")
    merged = {name: data.decode().split() for name, data in cluster.contents(f"{bucket}/out/").items()}
    assert merged == expected


def test_the_command_reads_absolute_paths_in_key_order(cluster: Cluster, bucket: str) -> None:
    names = ["b/000_x", "a-b/000", "a/000", "a/b/000", "Z/000", "000_é", "10/000_1", "9/000"]
    cluster.put_all({f"{bucket}/in/{name}": b"" for name in names})
    cluster.s4("map-from-n", f"{bucket}/in/", f"{bucket}/out/", "cat")
    node = cluster.owner("000")
    paths = [str(node.path_of(f"{bucket}/in/{name}")) for name in sorted(names)]
    assert cluster.contents(f"{bucket}/out/") == {"000": "".join(f"{path}\n" for path in paths).encode()}
    assert all(os.path.isabs(path) for path in paths)


def test_outputs_stay_on_the_node_of_their_group_and_are_exact(cluster: Cluster, bucket: str) -> None:
    cluster.put_all({f"{bucket}/in/{part}/{i:03}_x": bytes(range(256)) for part in "ab" for i in range(6)})
    cluster.s4("map-from-n", f"{bucket}/in/", f"{bucket}/out/", "xargs cat; printf '%%\\0'")
    expected = bytes(range(256)) * 2 + b"%\0"
    assert cluster.contents(f"{bucket}/out/") == {f"{i:03}_x": expected for i in range(6)}
    for i, node in enumerate(cluster.nodes):
        assert all(owner_of(name_of(row[3]), 3) == i for row in node.listing(f"{bucket}/out/"))


def test_a_glob_chooses_which_keys_are_merged(cluster: Cluster, bucket: str) -> None:
    names = [f"{folder}/{i:03}_{kind}" for folder in "ab" for i in range(3) for kind in "xy"]
    cluster.put_all({f"{bucket}/in/{name}": f"{name}\n".encode() for name in names})
    cluster.s4("map-from-n", f"{bucket}/in/*/*_y", f"{bucket}/out/", "xargs cat")
    assert cluster.contents(f"{bucket}/out/") == {
        f"{i:03}_y": f"a/{i:03}_y\nb/{i:03}_y\n".encode() for i in range(3)
    }


def test_a_command_may_ignore_its_input(cluster: Cluster, bucket: str) -> None:
    cluster.put_all({f"{bucket}/in/{'d' * 200}/{i}/{'d' * 200}/000": b"" for i in range(300)})
    cluster.s4("map-from-n", f"{bucket}/in/", f"{bucket}/out/", "echo done")
    assert cluster.contents(f"{bucket}/out/") == {"000": b"done\n"}


def test_a_failure_names_the_group(cluster: Cluster, bucket: str) -> None:
    cluster.put_all({f"{bucket}/in/a/001_x": b"", f"{bucket}/in/b/001_y": b""})
    line = cluster.fails("map-from-n", f"{bucket}/in/", f"{bucket}/out/", "echo why >&2; exit 4", code=1)
    for part in (f"{bucket}/in/a/001_x", str(cluster.nodes[1]), "4", "why"):
        assert part in line


def test_a_group_that_is_gone_at_the_retry_is_no_empty_one(cluster: Cluster, bucket: str) -> None:
    cluster.put_all({f"{bucket}/in/{name}": b"x" for name in ("a/000", "b/000", "a/001", "b/001")})
    may = cluster.work / f"may-{bucket[5:]}"
    command = f"[ -e {may} ]; wc -l"
    cluster.fails("map-from-n", f"{bucket}/in/", f"{bucket}/out/", command, "--keep-going", code=1)
    for key in ("a/000", "b/000", "a/001"):
        cluster.s4("rm", f"{bucket}/in/{key}")
    may.touch()
    job = cluster.nodes[0].get("/jobs", limit="1").json()[0]["id"]
    said = cluster.fails("retry", job, code=1)
    assert f"no such key: {bucket}/in/a/000" in said and "1/2 tasks done, 1 failed" in said
    assert cluster.contents(f"{bucket}/out/") == {"001": b"1\n"}


NAMES = st.builds(
    lambda number, rest: f"{number}{rest}",
    st.sampled_from(["", "0", "00", "1", "x", "1x"]),
    st.sampled_from(["", "_", "_a", "_a_b", "a", "_0"]),
)


@settings(deadline=None)
@given(st.lists(NAMES.filter(bool), min_size=1, max_size=8))
def test_the_names_of_outputs_agree_with_a_plain_reference(names: list[str]) -> None:
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[prefix_of(name)].append(name)
    for prefix, members in groups.items():
        suffixes = {member[len(prefix) :] for member in members}
        assert group_name(prefix, members) == prefix + (suffixes.pop() if len(suffixes) == 1 else "")
