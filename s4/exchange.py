"""The conversations that move keys between a client, or a node, and a node. The client's half.

Put: prepare (the node names a port) → the bytes on a connection of their own → confirm with the checksums.
Get: prepare → the bytes → compare with the stored checksum, which the node gave beforehand for a batch and
is asked to compare at the end for a single key. Keys for one node travel as a batch: one round trip to
prepare, one stream, one to confirm, one transaction.
"""

import _socket  # for the reason in dial.py
import os
from collections.abc import Callable, Sequence

from s4.errors import MissingError, NonsenseError, S4Error, StalledError, TransferError
from s4.http import ERROR_OF_STATUS, Caller
from s4.keys import url
from s4.leanjson import dumps, read_answer
from s4.streams import Incoming, send_hashed, wait_for_bytes

TYPE_CHECKING = False  # what only annotations need is not imported: typing takes 3 ms
if TYPE_CHECKING:
    from typing import Any

MAX_BATCH_KEYS = 200  # a worker gets their descriptors in one message, and the kernel's limit is 253
MAX_BATCH_BYTES = 64 * 1024 * 1024  # so that large files spread over several connections


def put_one(caller: Caller, path: str, source: int, size: int | None, name: str) -> None:
    """Store what the descriptor `source` holds as a key. `size` in bytes, None for a pipe; `name` is for
    messages. Raises S4Error; nothing is stored then."""
    parameters = {"key": url(path)}
    if size is None:
        wait_for_bytes(source)  # once a transfer is prepared, it must not stand still
    else:
        parameters["size"] = str(size)
    uuid, port = _uuid_and_port(caller, caller.call("POST", "/prepare_put", parameters))
    checksum = ""
    broken: TransferError | None = None
    try:
        with caller.transfer(port) as sock:
            sent, checksum = send_hashed(sock, source, size)
            if size is not None and sent != size:
                raise S4Error(f"{name}: the file became shorter while it was sent")
    except TransferError as e:
        broken = type(e)(f"{name}: {e}")  # the node knows why it hung up, such as a full disk
    except OSError as e:
        raise S4Error(f"{name}: {e.strerror}") from e
    try:
        caller.call("POST", "/confirm_put", {"uuid": uuid, "checksum": checksum})
    except S4Error as e:
        if isinstance(broken, StalledError):  # then it was we who hung up
            raise broken from None
        if isinstance(e, MissingError):
            raise broken or TransferError(f"{url(path)}: {caller.server} gave up the transfer") from None
        raise
    if broken is not None:
        raise broken


def get_one(caller: Caller, path: str, target: int, *, reserve: bool) -> None:
    """Write a key to the descriptor `target`; `reserve` if it is a new file.

    Raises S4Error: what was written then is worth nothing.
    """
    uuid, port = _uuid_and_port(caller, caller.call("POST", "/prepare_get", {"key": url(path)}))
    try:
        with caller.transfer(port) as sock:
            _size, checksum = Incoming(sock).copy(target, None, reserve=reserve)
    except TransferError as e:
        raise TransferError(f"{url(path)}: {e}") from e
    caller.call("POST", "/confirm_get", {"uuid": uuid, "checksum": checksum})


def put_outputs(
    caller: Caller, job: str, entries: Sequence[tuple[str, str, int, int]]
) -> list[S4Error | None]:
    """Store outputs of a job, given as (path of the key, file, size, task), as one batch. A file is removed
    as soon as it is sent, so that what arrives finds room.

    Returns per entry None or why it was refused. Raises S4Error when the batch as a whole failed.
    """

    def send(sock: _socket.socket, index: int) -> str:
        _path, file, size, _task = entries[index]
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            sent, checksum = send_hashed(sock, fd, size)
        finally:
            os.close(fd)
        os.unlink(file)
        if sent != size:
            raise TransferError(f"{file} is shorter than expected: {sent} instead of {size} bytes")
        return checksum

    return put_batch(caller, [(path, size, task) for path, _file, size, task in entries], send, job)


def put_batch(
    caller: Caller,
    keys: Sequence[tuple[str, int] | tuple[str, int, int]],
    send: Callable[[_socket.socket, int], str],
    job: str = "",
) -> list[S4Error | None]:
    """Store keys, given as (path, size), as one batch. `send(sock, i)` sends exactly the bytes of key i and
    returns their checksum, an empty one to have the key dropped. Outputs of a `job` are given as (path, size,
    task).

    Returns per key None or why it was refused. Raises S4Error when the batch as a whole failed.
    """
    body = dumps([[url(path), *rest] for path, *rest in keys])
    said = caller.call("POST", "/prepare_puts", {"job": job} if job else None, body)
    answer = read_answer(caller.server, said, dict)
    refused = _refusals(caller, answer, len(keys))
    wanted = [i for i, error in enumerate(refused) if error is None]
    if not wanted:
        return refused
    try:
        uuid, port = str(answer["uuid"]), _port(caller, answer["port"])
    except KeyError:
        raise NonsenseError(caller.server) from None
    checksums: list[str] = []
    broken: TransferError | None = None
    try:
        with caller.transfer(port) as sock:
            # Small files fill whole packets together.
            sock.setsockopt(_socket.IPPROTO_TCP, _socket.TCP_CORK, 1)
            checksums = [send(sock, i) for i in wanted]
            sock.setsockopt(_socket.IPPROTO_TCP, _socket.TCP_CORK, 0)
    except TransferError as e:
        broken = e
        checksums = [""] * len(wanted)
    try:
        confirmed = caller.call("POST", "/confirm_puts", {"uuid": uuid}, dumps(checksums))
    except MissingError:
        raise broken or TransferError(f"{caller.server} gave up a transfer") from None
    if broken is not None:
        raise broken
    answer = read_answer(caller.server, confirmed, dict)
    for i, error in zip(wanted, _refusals(caller, answer, len(wanted)), strict=True):
        refused[i] = error
    return refused


def get_batch(
    caller: Caller, paths: Sequence[str], receive: Callable[[Incoming, int, int, str], None]
) -> list[S4Error | None]:
    """Fetch keys as one batch. `receive(incoming, i, size, checksum)` takes exactly the bytes of key i.

    Returns per key None or why the node does not have it. Raises S4Error when the batch as a whole failed.
    """
    body = dumps([url(path) for path in paths])
    answer = read_answer(caller.server, caller.call("POST", "/prepare_gets", body=body), dict)
    refused = _refusals(caller, answer, len(paths))
    wanted = [i for i, error in enumerate(refused) if error is None]
    if not wanted:
        return refused
    try:
        port = _port(caller, answer["port"])
        expected = [(int(size), str(checksum)) for size, checksum in answer["files"]]
        pairs = list(zip(wanted, expected, strict=True))
    except (KeyError, TypeError, ValueError):
        raise NonsenseError(caller.server) from None
    with caller.transfer(port) as sock:
        incoming = Incoming(sock)
        for i, (size, checksum) in pairs:
            receive(incoming, i, size, checksum)
    return refused


def _uuid_and_port(caller: Caller, answer: bytes) -> tuple[str, int]:
    try:
        uuid, port = answer.decode().split()
    except ValueError:
        raise NonsenseError(caller.server) from None
    return uuid, _port(caller, port)


def _port(caller: Caller, text: object) -> int:
    try:
        port = int(str(text))
    except ValueError:
        port = 0
    if not 0 < port < 65536:
        raise NonsenseError(caller.server)
    return port


def _refusals(caller: Caller, answer: "dict[str, Any]", count: int) -> list[S4Error | None]:
    try:
        found = [
            None if refusal is None else ERROR_OF_STATUS.get(refusal[0], S4Error)(str(refusal[1]))
            for refusal in answer["refused"]
        ]
    except (KeyError, TypeError, IndexError):
        found = []
    if len(found) != count:
        raise NonsenseError(caller.server)
    return found
