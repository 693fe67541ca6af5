"""Where keys live: the law against a plain reference, and real nodes that keep to it."""

import pytest
from cluster import Cluster
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reference import hash_of, name_of, owner_of

from s4.keys import name_hash, owner

# What may stand in a NAME: no white space, control characters, surrogates or '/'.
CHARACTERS = st.characters(exclude_categories=["Cc", "Cf", "Cs", "Z"], exclude_characters="/")
NAMES = st.text(CHARACTERS, min_size=1, max_size=40).filter(lambda name: name not in (".", ".."))
NUMBERED = st.builds(
    lambda zeros, number, rest: "0" * zeros + str(number) + rest,
    st.integers(0, 5),
    st.one_of(st.integers(0, 1000), st.integers(2**63 - 3, 2**63 + 3)),
    st.one_of(st.just(""), st.just("_"), NAMES.map(lambda name: "_" + name), NAMES),
)


@pytest.mark.parametrize(
    ("name", "value"),
    [("asdf", 8348297608100219689), ("123", 10211175311721367273), ("hello", 7921424674728911129)],
)
def test_hash_has_the_fixed_points_of_the_specification(name: str, value: int) -> None:
    assert name_hash(name) == hash_of(name) == value


@settings(deadline=None)
@given(
    name=st.one_of(NAMES, NUMBERED),
    servers=st.integers(1, 50),
    folder=st.sampled_from(["b/", "b/x/", "000/1_/y/"]),
)
@example(name="²_x", servers=7, folder="b/")  # a digit for Python, not an ASCII one
@example(name="٣_x", servers=7, folder="b/")
@example(name="_1", servers=7, folder="b/")
@example(name="+1_x", servers=7, folder="b/")
@example(name="1.0_x", servers=7, folder="b/")
@example(name="1__2_3", servers=7, folder="b/")
@example(name=f"{2**63 - 1}_x", servers=7, folder="b/")
@example(name=f"{2**63}_x", servers=7, folder="b/")
@example(name=f"{2**63}", servers=7, folder="b/")
@example(name="9" * 200, servers=7, folder="b/")
def test_owner_agrees_with_a_plain_reference(name: str, servers: int, folder: str) -> None:
    assert owner(folder + name, servers) == owner_of(name, servers)


@pytest.mark.parametrize(("name", "server"), [("a.txt", 0), ("d.txt", 2), ("f.txt", 1)])
def test_names_go_to_the_servers_of_the_specification(
    cluster: Cluster, bucket: str, name: str, server: int
) -> None:
    cluster.s4("cp", "-", f"{bucket}/some/where/{name}", data=b"x")
    holders = [i for i, node in enumerate(cluster.nodes) if node.listing(bucket)]
    assert holders == [server]


def test_keys_with_one_number_share_a_server_and_consecutive_numbers_go_round(
    cluster: Cluster, bucket: str
) -> None:
    for number in range(5):
        names = [f"{number:03}", f"{number:03}_part.txt", f"x/y/{number:03}", f"{number}_x", f"{number:09}_y"]
        for name in names:
            cluster.s4("cp", "-", f"{bucket}/{name}", data=b"")
        for i, node in enumerate(cluster.nodes):
            held = {row[3] for row in node.listing(bucket)} & set(names)
            assert held == (set(names) if i == number % 3 else set())


@settings(deadline=None, max_examples=60)
@given(name=st.one_of(NAMES, NUMBERED))
def test_only_the_owner_of_a_key_answers_for_it(cluster: Cluster, name: str) -> None:
    key = f"s4://no-such-bucket/dir/{name}"
    statuses = [node.post("/prepare_get", key=key).status for node in cluster.nodes]
    assert statuses == [404 if i == owner_of(name, 3) else 400 for i in range(3)]


@pytest.mark.parametrize("name", ["000", "1_x", "a.txt", "f.txt"])
def test_a_key_of_another_node_is_refused_and_never_stored(cluster: Cluster, bucket: str, name: str) -> None:
    key = f"{bucket}/{name}"
    wrong = [node for node in cluster.nodes if node is not cluster.owner(key)]
    with cluster.nothing_changes():
        for node in wrong:
            for answer in (
                node.post("/prepare_put", key=key),
                node.post("/prepare_get", key=key),
                node.post("/eval", key=key, body=b"cat"),
                node.post("/delete", prefix=key),
            ):
                assert answer.status == 400, answer
                assert name_of(key) in answer.text
