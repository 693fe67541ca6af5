"""Connections to servers, at the least cost: every command of the client makes one."""

import _socket  # not socket, whose enumerations and files take 2.4 ms to import


def dial(host: str, port: int, timeout: float) -> _socket.socket:
    """A TCP connection, with a time limit in seconds for this and every further call. Raises OSError."""
    # As bytes: Python would encode text for the resolver as international names have it, which names in a
    # conf do not need, and importing that takes 2 ms.
    found = _socket.getaddrinfo(host.encode("ascii"), port, 0, _socket.SOCK_STREAM)
    failure = OSError(f"{host} has no address")
    for family, kind, protocol, _name, address in found:
        sock = _socket.socket(family, kind, protocol)
        sock.settimeout(timeout)
        try:
            sock.connect(address)
        except OSError as e:
            sock.close()
            failure = e
        else:
            return sock
    raise failure
