"""The laws of the specification once more, as plainly as possible, for the tests to compare with."""

import hashlib
import struct

import xxhash


def name_of(key: str) -> str:
    return key.split("/")[-1]


def hash_of(name: str) -> int:
    value: int = struct.unpack("<Q", hashlib.blake2s(name.encode()).digest()[:8])[0]
    return value


def prefix_of(name: str) -> str:
    head = name.split("_")[0]
    if head and all(c in "0123456789" for c in head) and int(head) < 2**63:
        return head
    return name


def owner_of(name: str, servers: int) -> int:
    prefix = prefix_of(name)
    if all(c in "0123456789" for c in prefix) and int(prefix) < 2**63:
        return int(prefix) % servers
    return hash_of(name) % servers


def checksum_of(data: bytes) -> str:
    return format(xxhash.xxh64(data).intdigest(), "x")
