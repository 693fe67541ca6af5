"""The conf file, which says what servers make up the ring in which order, and S4_TIMEOUT."""

import os

from s4.errors import ConfError

CONF_ENVIRONMENT = "S4_CONF_PATH"
DEFAULT_CONF = "~/.s4.conf"
DEFAULT_SERVER = "127.0.0.1:8080"
NO_CONF = "the built-in default"  # Conf.source where there is no conf file
NO_CONF_HINT = (
    f"there is no conf: {CONF_ENVIRONMENT} is not set, and no {DEFAULT_CONF};"
    " 's4-server local' starts a cluster to try"
)

MAX_TIMEOUT = 366 * 86400.0  # seconds
TIMEOUT_NEEDED = f"a number of seconds above 0 and at most {MAX_TIMEOUT:.0f} (366 days) is needed"
TIMEOUT_ENVIRONMENT = "S4_TIMEOUT"
DEFAULT_TIMEOUT = 300.0

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # some editors begin a file with it

# Not regular expressions: `re` takes 1.5 ms of each start of `s4`.
_DIGITS = frozenset("0123456789")
_HOST = _DIGITS | frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz._-")


class Server:
    """One server of the ring."""

    # No dataclass: that module, with what it makes of two classes, takes 2 ms of each start of `s4`.
    __slots__ = ("host", "port")

    def __init__(self, host: str, port: int) -> None:
        self.host = host
        self.port = port

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Server) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __repr__(self) -> str:
        return f"Server({self.host!r}, {self.port})"

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Conf:
    """The ring: its servers in the conf's order, and where they were read."""

    __slots__ = ("servers", "source")

    def __init__(self, servers: tuple[Server, ...], source: str) -> None:
        self.servers = servers
        self.source = source

    @property
    def fingerprint(self) -> str:
        """Equal for two confs that name the same servers, spelled alike, in the same order."""
        from s4.keys import name_hash

        return format(name_hash("\n".join(map(str, self.servers))), "016x")


def read_conf(path: str | None = None) -> Conf:
    """Read the conf file: `path`, else the one that S4_CONF_PATH names, else ~/.s4.conf, else the default.

    Raises ConfError, with file and line number, for a file that is missing though it was named, unreadable,
    empty, or has a bad or repeated line.
    """
    if path == "":
        raise ConfError("the path of the conf file is empty")
    named = path or os.environ.get(CONF_ENVIRONMENT)
    source = os.path.expanduser(named or DEFAULT_CONF)  # in a crontab or a unit no shell has done it
    try:
        with open(source, "rb") as f:
            lines = f.read().removeprefix(_BYTE_ORDER_MARK).split(b"\n")
    except FileNotFoundError:
        if named:
            raise ConfError(f"conf file {source} does not exist") from None
        return Conf((parse_server(DEFAULT_SERVER),), NO_CONF)
    except OSError as e:
        raise ConfError(f"conf file {source} cannot be read: {e.strerror}") from e
    servers: list[Server] = []
    for number, raw in enumerate(lines, 1):
        line = raw.split(b"#")[0].strip().decode("utf-8", "backslashreplace")
        if not line:
            continue
        try:
            server = parse_server(line)
        except ValueError as e:
            raise ConfError(f"conf file {source}, line {number}: {e}") from None
        if server in servers:
            raise ConfError(f"conf file {source}, line {number}: {server} is listed twice")
        servers.append(server)
    if not servers:
        raise ConfError(f"conf file {source} is empty: write one host:port a line")
    return Conf(tuple(servers), source)


def parse_server(text: str) -> Server:
    """Parse `host:port` or `[v6]:port`. Raises ValueError with the reason."""
    host, _colon, digits = text.rpartition(":")
    bracketed = host[:1] == "[" and host[-1:] == "]"
    if bracketed:
        host = host[1:-1]
    if (
        not host
        or not (bracketed or _HOST.issuperset(host))
        or not 1 <= len(digits) <= 5
        or not _DIGITS.issuperset(digits)
    ):
        raise ValueError(f"{text!r} is not host:port")
    port = int(digits)
    if bracketed:
        import socket  # most confs do without: 3 ms

        try:  # one spelling of an address, whatever the conf has
            host = socket.inet_ntop(socket.AF_INET6, socket.inet_pton(socket.AF_INET6, host))
        except OSError:
            raise ValueError(f"{text!r}: {host!r} is not an IPv6 address") from None
    if not 1 <= port <= 65535:
        raise ValueError(f"{text!r}: the port must be from 1 to 65535")
    return Server(host.lower(), port)


def own_position(conf: Conf, port: int | None) -> int:
    """The position in the ring of this machine: the line whose host is an address of it.

    `port` chooses among several local lines. Raises ConfError if no line or more than one fits.
    """
    local = [
        i
        for i, server in enumerate(conf.servers)
        if (port is None or server.port == port) and local_address(server.host)
    ]
    which = f" with port {port}" if port is not None else ""
    if not local:
        raise ConfError(f"{conf.source}: no line{which} is an address of this machine: add one")
    if len(local) > 1:
        names = ", ".join(str(conf.servers[i]) for i in local)
        hint = "choose one with --port" if port is None else "name each server once"
        raise ConfError(f"{conf.source}: {names} are all this machine: {hint}")
    return local[0]


def local_address(host: str) -> str | None:
    """The address of this machine that a host name stands for, None if it is no address of it."""
    import socket  # nodes only

    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
    except OSError:
        return None
    for family, kind, proto, _name, address in found:
        with socket.socket(family, kind, proto) as probe:
            try:
                probe.bind(address)  # only an address of this machine can be bound
            except OSError:
                continue
            return str(address[0])
    return None


def plain_number(text: str) -> float:
    """A number. Raises ValueError, also for blanks, underscores and other digits, which float() takes."""
    if "_" in text or text != text.strip() or not text.isascii():
        raise ValueError(text)
    return float(text)


def timeout_setting() -> float:
    """Seconds from S4_TIMEOUT, 300 without it. Raises ConfError if it is none up to MAX_TIMEOUT."""
    text = os.environ.get(TIMEOUT_ENVIRONMENT)
    if not text:
        return DEFAULT_TIMEOUT
    try:
        seconds = plain_number(text)
    except ValueError:
        seconds = -1
    if not 0 < seconds <= MAX_TIMEOUT:
        raise ConfError(f"{TIMEOUT_ENVIRONMENT}={text}: {TIMEOUT_NEEDED}")
    return seconds
