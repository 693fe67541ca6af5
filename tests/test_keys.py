"""What a key may be, by the client and by the node; that it is made once; that it is whole or absent."""

import os
import re
import stat

import pytest
from cluster import Answer, Cluster, Node, walk
from procs import eventually
from reference import checksum_of

from s4 import Client
from s4.errors import S4Error

# Refused keys below a bucket `BUCKET`, and a word of the rule that the message has to name.
REFUSED = {
    "space": ("BUCKET/a b", "white space"),
    "trailing space": ("BUCKET/a ", "white space"),
    "space in the folder": ("BUCKET/a b/c", "white space"),
    "tab": ("BUCKET/a\tb", "white space"),
    "line feed": ("BUCKET/a\nb", "white space"),
    "carriage return": ("BUCKET/a\r", "white space"),
    "no-break space": ("BUCKET/a\u00a0b", "white space"),
    "line separator": ("BUCKET/a\u2028b", "white space"),
    "escape": ("BUCKET/a\x1bb", "control"),
    "delete": ("BUCKET/a\x7fb", "control"),
    "next line": ("BUCKET/a\x85b", "control"),
    "C1 control": ("BUCKET/a\x9bb", "control"),
    "empty segment": ("BUCKET/a//b", "empty"),
    "empty bucket": ("s4:///a", "empty"),
    "dot": ("BUCKET/./b", "'.'"),
    "dot as NAME": ("BUCKET/a/.", "'.'"),
    "dots": ("BUCKET/a/../b", "'..'"),
    "dots as NAME": ("BUCKET/..", "'..'"),
    "dots as bucket": ("s4://../b", "'..'"),
    "bucket of the node": ("s4://_index/node.db", "'_'"),
    "bucket with an underscore": ("s4://_tempfiles/x", "'_'"),
    "long NAME": ("BUCKET/" + "n" * 256, "255"),
    "long NAME in bytes": ("BUCKET/" + "é" * 128, "255"),
    "long folder": ("BUCKET/" + "n" * 256 + "/x", "255"),
    "long key": ("BUCKET/" + "/".join(["n" * 99] * 11), "1024"),
    "not UTF-8": ("BUCKET/a\udcff", "UTF-8"),
    "half a character": ("BUCKET/a\udcc3/b", "UTF-8"),
    "ends in /": ("BUCKET/a/", "'/'"),
    "only a bucket": ("BUCKET", ""),
    "only a bucket and /": ("BUCKET/", "'/'"),
    "nothing": ("s4://", ""),
}

# Legal, however odd they look to a shell, to Fire, to a URL or to a file system.
LEGAL = [
    "quote'd",
    'double"quoted',
    "$HOME",
    "$(touch${IFS}harm)",
    "`touch${IFS}harm`",
    ";touch${IFS}harm;",
    "a*b?c[d]",
    "{a,b}",
    "a&b|c<d>e",
    "back\\slash",
    "100%25",
    "a+b=c&d#e?f",
    "~",
    "~root",
    "!!",
    "...",
    "-",
    "--help",
    "-rf",
    "_leading",
    "None",
    "1e3",
    "grüße-日本-🙂",
    "n" * 255,
    "é" * 127,
]


@pytest.mark.parametrize(("key", "rule"), REFUSED.values(), ids=REFUSED)
def test_refused_keys_are_named_by_the_client_and_change_nothing(
    cluster: Cluster, bucket: str, key: str, rule: str
) -> None:
    key = key.replace("BUCKET", bucket)
    with cluster.nothing_changes():
        lines = [cluster.fails("eval", key, "cat")]
        copy = cluster.fails("cp", "-", key, data=b"x")
        if not key.endswith("/"):  # otherwise it is right to speak of a folder
            lines.append(copy)
        client = Client(str(cluster.conf))
        with pytest.raises(S4Error, match=re.escape(key[:9])):
            client.rm(key)
        with pytest.raises(S4Error, match=re.escape(key[:9])):
            client.cp(key, "-")
    for line in lines:
        assert rule in line and key[:9] in line


@pytest.mark.parametrize(("key", "rule"), REFUSED.values(), ids=REFUSED)
def test_refused_keys_are_named_by_the_node_and_change_nothing(
    cluster: Cluster, bucket: str, key: str, rule: str
) -> None:
    key = key.replace("BUCKET", bucket)
    with cluster.nothing_changes():
        for node in cluster.nodes:
            answers = [
                node.post("/prepare_put", key=key),
                node.post("/prepare_get", key=key),
                node.post("/eval", key=key, body=b"cat"),
                node.post("/delete", prefix=key),
            ]
            for answer in answers:
                assert answer.status == 400, answer
                assert rule in answer.text


def test_a_key_with_a_nul_is_refused_by_the_node(cluster: Cluster, bucket: str) -> None:
    for node in cluster.nodes:
        assert node.post("/prepare_put", key=f"{bucket}/a\0b").status == 400


@pytest.mark.parametrize("folder", ["{}/../", "{}//", "{}/a b/", "s4://_index/", "s4://../"])
@pytest.mark.parametrize("job", ["map", "map-to-n", "map-from-n"])
def test_jobs_refuse_folders_that_no_key_could_be_in(
    cluster: Cluster, bucket: str, job: str, folder: str
) -> None:
    bad = folder.format(bucket)
    cluster.put(f"{bucket}/in/000", b"x")
    with cluster.nothing_changes():
        cluster.fails(job, bad, f"{bucket}/out/", "cat")
        cluster.fails(job, f"{bucket}/in/", bad, "cat")
        for node in cluster.nodes:
            path = "/" + job.replace("-", "_")
            for indir, outdir in ((bad, f"{bucket}/out/"), (f"{bucket}/in/", bad)):
                body = {"cmd": "cat", "indir": indir, "outdir": outdir}
                assert node.post_json(path, body).status == 400


def test_odd_but_legal_keys_are_harmless_everywhere(cluster: Cluster, bucket: str) -> None:
    data = {name: b"data of " + name.encode() for name in LEGAL}
    for name in LEGAL:
        key = f"{bucket}/in/{name}"
        cluster.s4("cp", "-", key, data=data[name])
        assert cluster.s4("cp", key, "-").out == cluster.owner(key).path_of(key).read_bytes() == data[name]
        assert cluster.s4("eval", key, 'cat; printf "%s" "$filename"').out == data[name] + name.encode()
    assert [line.split()[-1] for line in cluster.s4("ls", f"{bucket}/in/").lines] == sorted(LEGAL)
    cluster.s4("map", f"{bucket}/in/", f"{bucket}/map/", "cat")
    cluster.s4("map-from-n", f"{bucket}/in/", f"{bucket}/from/", "xargs -d '\\n' cat")
    assert cluster.contents(f"{bucket}/map/") == cluster.contents(f"{bucket}/from/") == data
    cluster.s4("map-to-n", f"{bucket}/in/", f"{bucket}/to/", 'cat > "./$filename"; echo "./$filename"')
    assert cluster.contents(f"{bucket}/to/") == {f"{name}/{name}": data[name] for name in LEGAL}
    for name in LEGAL:
        cluster.s4("rm", f"{bucket}/in/{name}")
        cluster.s4("rm", "-r", f"{bucket}/to/{name}/")
    left = [f"{bucket}/{folder}/{name}" for folder in ("from", "map") for name in LEGAL]
    assert cluster.keys(bucket) == sorted(left)
    assert "harm" not in {path.name for path in walk(cluster.root)}


def test_odd_folders_and_buckets_are_harmless(cluster: Cluster, bucket: str) -> None:
    odd = "$(touch${IFS}harm);'\"*"
    key = f"{bucket}-{odd}/{odd}/{odd}/000"
    cluster.s4("cp", "-", key, data=b"x")
    assert cluster.s4("eval", key, "cat").out == b"x"
    assert cluster.s4("ls", "-r", f"{bucket}-{odd}").lines[0].split()[-1] == f"{odd}/{odd}/000"
    cluster.s4("rm", "-r", f"{bucket}-{odd}/{odd}")
    assert cluster.keys(f"{bucket}-{odd}") == []
    assert "harm" not in {path.name for path in walk(cluster.root)}


def test_the_scheme_may_not_be_left_out_of_cp_where_it_tells_keys_from_files(
    cluster: Cluster, bucket: str
) -> None:
    cluster.fails("cp", "-", f"{bucket.removeprefix('s4://')}/nowhere/000", data=b"x")


def test_a_key_is_a_read_only_file_whose_path_mirrors_it(cluster: Cluster, bucket: str) -> None:
    key = f"{bucket}/path/to/000_x"
    cluster.s4("cp", "-", key, data=b"hello")
    path = cluster.nodes[0].data / bucket.removeprefix("s4://") / "path" / "to" / "000_x"
    assert path.read_bytes() == b"hello"
    assert stat.S_IMODE(path.stat().st_mode) == 0o444


def test_a_key_is_made_once_until_it_is_removed(cluster: Cluster, bucket: str) -> None:
    key = f"{bucket}/dir/once"
    node = cluster.owner(key)
    cluster.s4("cp", "-", key, data=b"first")
    assert "exists" in cluster.fails("cp", "-", key, data=b"second", code=1)
    assert node.post("/prepare_put", key=key).status == 409
    assert cluster.get(key) == b"first"
    cluster.s4("rm", key)
    cluster.s4("cp", "-", key, data=b"second")
    assert cluster.get(key) == b"second"


@pytest.mark.parametrize(
    ("first", "second"), [("000", "000/000_x"), ("000/000_x", "000"), ("000", "000/a/b/000")]
)
def test_a_key_where_a_folder_is_and_a_folder_where_a_key_is_are_conflicts(
    cluster: Cluster, bucket: str, first: str, second: str
) -> None:
    cluster.put(f"{bucket}/{first}", b"first")
    with cluster.nothing_changes():
        assert cluster.nodes[0].post("/prepare_put", key=f"{bucket}/{second}").status == 409
        assert "000" in cluster.fails("cp", "-", f"{bucket}/{second}", data=b"x", code=1)
    cluster.s4("rm", f"{bucket}/{first}")
    cluster.put(f"{bucket}/{second}", b"second")


def test_a_folder_made_while_a_key_of_its_name_was_under_way_is_a_conflict(
    cluster: Cluster, bucket: str
) -> None:
    node = cluster.nodes[0]
    uuid, port = node.prepare_put(f"{bucket}/000")
    node.send(port, b"late")
    cluster.put(f"{bucket}/000/000_x", b"early")
    assert node.confirm_put(uuid, b"late").status == 409
    assert cluster.keys(bucket) == [f"{bucket}/000/000_x"]


def test_of_two_puts_of_one_key_the_first_confirmed_wins(cluster: Cluster, bucket: str) -> None:
    key = f"{bucket}/000"
    node = cluster.nodes[0]
    puts = [(node.prepare_put(key), data) for data in (b"slow", b"quick")]
    for (_uuid, port), data in puts:
        node.send(port, data)
    (slow, _), (quick, _) = (prepared for prepared, _data in puts)
    assert node.confirm_put(quick, b"quick").status == 200
    assert node.confirm_put(slow, b"slow").status == 409
    assert node.fetch(key) == b"quick"


def _not_there(node: Node, key: str) -> bool:
    bucket, _slash, path = key.removeprefix("s4://").partition("/")
    answers: list[Answer] = [node.post("/prepare_get", key=key), node.post("/eval", key=key, body=b"cat")]
    listed = [row[3] for row in node.listing(f"s4://{bucket}")]
    return (
        all(answer.status == 404 for answer in answers)
        and path not in listed
        and not node.path_of(key).exists()
    )


def test_a_key_is_invisible_until_it_is_confirmed(cluster: Cluster, bucket: str) -> None:
    key = f"{bucket}/dir/000"
    node = cluster.nodes[0]
    uuid, port = node.prepare_put(key)
    assert _not_there(node, key)
    with node.dial(port) as connection:
        connection.sendall(b"some")
        assert _not_there(node, key)
        connection.sendall(b"thing")
    assert _not_there(node, key)
    assert node.confirm_put(uuid, b"something").status == 200
    assert node.fetch(key) == b"something"


@pytest.mark.parametrize(
    "checksum",
    [checksum_of(b"other"), "", "0", "xyz", "ffffffffffffffffff", checksum_of(b"data").upper() + "0"],
)
def test_a_put_with_another_checksum_stores_nothing(cluster: Cluster, bucket: str, checksum: str) -> None:
    key = f"{bucket}/000"
    node = cluster.nodes[0]
    uuid, port = node.prepare_put(key)
    node.send(port, b"data")
    answer = node.post("/confirm_put", uuid=uuid, checksum=checksum)
    assert 400 <= answer.status < 600, answer
    assert _not_there(node, key)
    eventually(lambda: not node.temporary(), 15, "its bytes are gone")
    assert node.put(key, b"again").status == 200


def test_a_checksum_is_written_without_leading_zeros(cluster: Cluster, bucket: str) -> None:
    data = next(data for data in (os.urandom(9) for _ in range(10_000)) if len(checksum_of(data)) < 16)
    assert cluster.nodes[0].put(f"{bucket}/000", data).status == 200
    assert cluster.nodes[0].fetch(f"{bucket}/000") == data
    assert cluster.nodes[0].rows("select checksum from keys where path like ?", f"{bucket[5:]}/%") == [
        (checksum_of(data),)
    ]
