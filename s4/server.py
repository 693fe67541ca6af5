"""s4-server: builds a node from its parts, serves it, and stops it. Only this file reads the command line.

Imports of the node and of falcon are inside functions: the workers' processes import this module as their
main one, and must stay slim (110 ms and 30 MB less for each).
"""

import argparse
import contextlib
import gc
import logging
import os
import resource
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from s4.config import (
    CONF_ENVIRONMENT,
    NO_CONF,
    Conf,
    Server,
    local_address,
    own_position,
    read_conf,
    timeout_setting,
)
from s4.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_MISUSE, S4Error, StoppingError

if TYPE_CHECKING:
    from s4.node import Node

_CPUS = len(os.sched_getaffinity(0))

HOUSEKEEPING_SECONDS = 1.0
PRUNE_SECONDS = 10.0
STOP_SECONDS = 4.0  # after a SIGTERM; what is not down by then is ended with the process
SPARE_THREADS = 8  # of waitress, beyond those that may wait
MAX_REQUEST_BYTES = 64 * 1024 * 1024
MAX_CONNECTIONS = 4000  # each costs a microsecond whenever something happens on any of them
IDLE_SECONDS = 20  # after which a connection without a request is closed
STALLED_SECONDS = 120  # the same, when there is an answer that is not read any further
SEND_BUFFER = 128 * 1024
OUTPUT_BUFFER = 4 * 1024 * 1024  # of an answer; what is sent of it is let go of by so much
UNREAD_SECONDS = 30.0  # that an answer which cannot be spooled waits for a reader who takes nothing

log = logging.getLogger("s4.server")


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < len(text) < 10 and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


def _days(text: str) -> float:
    try:
        days = float(text)
    except ValueError:
        days = -1
    if not 0 <= days < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of days, 0 or more")
    return days


def _port(text: str) -> int:
    number = _positive(text)
    if number > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, 1 to 65535")
    return number


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"fatal: {message}; see {self.prog} --help", file=sys.stderr)
        sys.exit(EXIT_MISUSE)


@dataclass(frozen=True)
class _Setting:
    name: str
    type: Callable[[str], Any]
    default: Any
    reason: str


def _path(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("a path is needed")
    return text


_PLACE = [
    _Setting("port", _port, None, "port of this node's line in the conf, if several lines are this machine"),
    _Setting("conf", _path, None, "conf file, otherwise S4_CONF_PATH or ~/.s4.conf"),
    _Setting("data", _path, "./s4_data", "folder for the keys and the index"),
]
_LIMITS = [
    _Setting("max-io-jobs", _positive, 4 * _CPUS, "sends, and receives, at once"),
    _Setting("max-cpu-jobs", _positive, _CPUS + 2, "commands at once"),
    _Setting("keep-jobs", _count, 1000, "finished jobs whose records are kept at least"),
    _Setting("keep-days", _days, 7.0, "days that records of finished jobs are kept at least"),
]
_LOCAL = [
    _Setting("nodes", _positive, 3, "how many nodes to run"),
    _Setting("dir", _path, "./s4-local", "folder for their conf, data and logs"),
]


def main() -> None:
    """The command `s4-server`."""
    arguments = _parse(sys.argv[1:])
    try:
        match arguments.action:
            case "local":
                from s4.local import run_local

                sys.exit(run_local(arguments.nodes, arguments.dir))
            case "reindex":
                from s4.reindex import reindex

                conf = read_conf(arguments.conf)
                reindex(conf, own_position(conf, arguments.port), arguments.data)
            case _:
                _serve(arguments)
    except (S4Error, OSError) as e:
        print(f"fatal: {e}", file=sys.stderr)
        sys.exit(EXIT_FAILED)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(prog="s4-server", description="A node of an s4 cluster.", allow_abbrev=False)
    parser.set_defaults(action="serve")
    _add(parser, _PLACE + _LIMITS)
    actions = parser.add_subparsers(title="other actions", metavar="ACTION")
    for name, settings, text in (
        ("reindex", _PLACE, "rebuild the index from the files, while the node is down"),
        ("local", _LOCAL, "run several nodes on loopback, for a try-out"),
    ):
        action = actions.add_parser(name, help=text, description=text, allow_abbrev=False)
        action.set_defaults(action=name)
        _add(action, settings, suppress=name == "reindex")
    # argparse would take what follows an unknown option for an action, and complain of that.
    _check_options(parser, argv, _PLACE + _LIMITS + (_LOCAL if "local" in argv else []), "there is")
    arguments = parser.parse_args(argv)
    if arguments.action == "reindex":
        _check_options(parser, argv, _PLACE, "reindex has")
    elif arguments.action == "local":
        _check_options(parser, argv, _LOCAL, "local has")
    return arguments


def _check_options(parser: _Parser, argv: Sequence[str], settings: Sequence[_Setting], has: str) -> None:
    """Refuse options that are none of `settings`."""
    known = {"h", "help", *(setting.name for setting in settings)}
    for word in argv:
        name = word.lstrip("-").partition("=")[0]
        if word.startswith("-") and name[:1].isalpha() and name not in known:
            parser.error(f"{has} no option {word}")


def _add(parser: argparse.ArgumentParser, settings: Sequence[_Setting], *, suppress: bool = False) -> None:
    """Add options; `suppress` leaves the defaults to those that stood before the action."""
    for setting in settings:
        shown = f" (default {setting.default})" if setting.default is not None else ""
        parser.add_argument(
            f"-{setting.name}",
            f"--{setting.name}",
            type=setting.type,
            default=argparse.SUPPRESS if suppress else setting.default,
            metavar=setting.name.upper().rpartition("-")[2],
            help=setting.reason + shown,
        )


def _serve(arguments: argparse.Namespace) -> None:
    stopping = _Stopping()  # before the imports and all else that takes its time
    conf = read_conf(arguments.conf)
    position = own_position(conf, arguments.port)
    timeout = timeout_setting()
    _start_log()
    _raise_file_limit()

    from waitress import wasyncore
    from waitress.server import create_server

    from s4.api import make_app
    from s4.node import Limits, Node

    own = conf.servers[position]
    address = local_address(own.host)
    assert address is not None  # otherwise it would not be our line
    listener = _bind(own, address)  # before there is a data folder, which would be left behind
    limits = Limits(
        arguments.max_io_jobs, arguments.max_cpu_jobs, timeout, arguments.keep_jobs, arguments.keep_days
    )
    _prepare_environment(conf, own)
    node = Node(conf, position, address, arguments.data, limits)
    tempfile.tempdir = node.storage.temporary_file("")  # where waitress spools, on the disk of the data
    sockets: dict[int, Any] = {}
    try:
        server = create_server(
            make_app(node),
            map=sockets,
            sockets=[listener],
            threads=limits.waiting_requests + SPARE_THREADS,
            connection_limit=_connection_limit(),
            cleanup_interval=5,
            channel_request_lookahead=1,  # lets an eval notice that its caller is gone
            # A listing never waits for a slow reader, while the disk has room: waitress spools what it cannot
            # send to a file.
            outbuf_high_watermark=2**62,
            max_request_body_size=MAX_REQUEST_BYTES,
            ident="s4",
        )
    except OSError as e:
        node.stop()
        raise S4Error(f"cannot listen on {own}: {e.strerror}") from e
    server.channel_class = _channel_class()
    server.maintenance = lambda now: _end_idle(server.active_channels.values(), now)
    # Connections inherit it. waitress sends blocks as large as this, by default megabytes for each reader.
    server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    threading.Thread(target=_keep_house, args=(node,), name="housekeeping", daemon=True).start()
    log.info("node %s serves %s", own, node.storage.root)
    if address.startswith("127.") and any(other.host != own.host for other in conf.servers):
        log.warning("%s is %s here: other machines cannot reach this node; see /etc/hosts", own.host, address)
    gc.freeze()  # what a node is made of need not be looked at again
    stopping.wake = server.pull_trigger
    while not stopping.asked:
        wasyncore.loop(timeout=1, map=sockets, use_poll=True, count=1)
    log.info("%s: stopping", stopping.asked)
    _stop(node, server, sockets)


def _bind(own: Server, address: str) -> socket.socket:
    """A socket that has the port of this node, but does not listen yet. Raises S4Error if that is taken."""
    family, kind, proto, _name, place = socket.getaddrinfo(address, own.port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, proto)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    try:
        listener.bind(place)
    except OSError as e:
        raise S4Error(f"cannot listen on {own}: {e.strerror}") from e
    return listener


def _connection_limit() -> int:
    """How many connections are accepted, so that half of the descriptors are left for all else.

    If there is none, waitress tries to accept a connection again and again, with a traceback each time.
    """
    return min(MAX_CONNECTIONS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)


def _end_idle(channels: Iterable[Any], now: float) -> None:
    """Close connections on which nothing moves.

    waitress itself would be as impatient with who reads an answer, such as a pager.
    """
    for channel in channels:
        seconds = STALLED_SECONDS if channel.total_outbufs_len else IDLE_SECONDS
        if not channel.requests and channel.last_activity < now - seconds:
            channel.will_close = True


def _channel_class() -> type:
    """waitress's channel, but careful with memory and with the disk in long answers.

    waitress 3.0.2 keeps all that it ever put into a buffer until the buffer is done with. While a reader
    keeps up, that is memory, so the buffer is changed for a new one every few megabytes. When a reader does
    not, it is a file. On a full disk, where a part of the answer would be lost, it waits for its reader.
    """
    from waitress.buffers import FileBasedBuffer, OverflowableBuffer, TempfileBasedBuffer
    from waitress.channel import ClientDisconnected, HTTPChannel

    class Spool(TempfileBasedBuffer):  # type: ignore[misc]
        """A file, which is as it was when something does not fit into it (OSError)."""

        def __init__(self, memory: Any) -> None:
            size, position = len(memory.getfile().getbuffer()), memory.getfile().tell()
            file = self.newfile()
            try:
                os.posix_fallocate(file.fileno(), 0, max(size, 1))
                FileBasedBuffer.__init__(self, file, memory)
            except OSError:
                file.close()
                memory.getfile().seek(position)
                raise

        def append(self, data: Any) -> None:
            position, end = self.file.tell(), self.file.seek(0, os.SEEK_END)
            try:
                os.posix_fallocate(self.file.fileno(), end, len(data))
                self.file.seek(end)
                self.file.write(data)
                self.remain += len(data)
            finally:
                self.file.seek(position)

    class Buffer(OverflowableBuffer):  # type: ignore[misc]
        """Memory, and a file when it becomes large; `stuck` in memory when the disk is full."""

        buf: Any
        stuck = False

        def _set_large_buffer(self) -> None:
            try:
                self.buf = Spool(self.buf)
            except OSError:
                self.stuck = True
            else:
                self.overflowed = True

    class Channel(HTTPChannel):  # type: ignore[misc]
        current_outbuf_count: int

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.outbufs = [Buffer(self.adj.outbuf_overflow)]

        def write_soon(self, data: Any) -> Any:
            with self.outbuf_lock:
                last = self.outbufs[-1]
                if last.stuck:
                    self._wait_for_reader()
                # A file takes all that follows, up to the next answer, before which waitress sets this count.
                most = self.adj.outbuf_high_watermark if last.overflowed else OUTPUT_BUFFER
                if last.stuck or self.current_outbuf_count >= most:
                    self._change_buffer()
                try:
                    return super().write_soon(data)
                except OSError:  # the file cannot grow
                    self._wait_for_reader()
                    self._change_buffer()
                    return super().write_soon(data)

        def _wait_for_reader(self) -> None:
            """Wait until what is unread is little enough to be kept in memory."""
            while self.connected and self.total_outbufs_len >= self.adj.outbuf_overflow:
                self.server.pull_trigger()
                if not self.outbuf_lock.wait(UNREAD_SECONDS):  # which ends when some of it could be sent
                    self.will_close = True
                    # While nothing can be written, that alone would not be looked at.
                    with contextlib.suppress(OSError):
                        self.socket.shutdown(socket.SHUT_RDWR)
                    raise ClientDisconnected

        def _change_buffer(self) -> None:
            self.outbufs.append(Buffer(self.adj.outbuf_overflow))
            self.current_outbuf_count = 0

    return Channel


def _stop(node: "Node", server: Any, sockets: dict[int, Any]) -> None:
    """The order: no new connections; then jobs and workers, which lets waiting requests answer; then out."""
    from waitress import wasyncore

    began = time.monotonic()
    server.del_channel()
    server.socket.close()
    stopper = threading.Thread(target=node.stop, name="stop", daemon=True)
    stopper.start()
    while stopper.is_alive() and time.monotonic() < began + STOP_SECONDS:
        wasyncore.loop(timeout=0.05, map=sockets, use_poll=True, count=1)
    if stopper.is_alive():
        log.error("something did not stop in %g s and is left behind", STOP_SECONDS)
    log.info("stopped %.1fms", (time.monotonic() - began) * 1000)
    logging.shutdown()
    os._exit(0)  # threads of requests may still hold on to clients that are slow


class _Stopping:
    """Notes SIGTERM and Ctrl-C. An exception could be lost wherever the signal happens to arrive."""

    def __init__(self) -> None:
        self.asked = ""  # the name of the signal
        self.wake: Callable[[], None] = lambda: None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, _frame: object) -> None:
        self.asked = signal.Signals(number).name
        self.wake()


def _keep_house(node: "Node") -> None:
    prune_at = 0.0
    while True:
        time.sleep(HOUSEKEEPING_SECONDS)
        try:
            node.keep_house()
            if time.monotonic() > prune_at:
                prune_at = time.monotonic() + PRUNE_SECONDS
                node.prune()
        except StoppingError:
            return
        except S4Error as e:  # such as a damaged index, which stays so
            log.error("housekeeping failed; it goes on: %s", e)
        except Exception:
            log.exception("housekeeping failed; it goes on")


def _prepare_environment(conf: Conf, own: Server) -> None:
    """What commands inherit: who runs them, and what they need to call `s4` themselves."""
    os.environ["S4_NODE"] = str(own)
    # Empty for the built-in default, as which the client takes it.
    os.environ[CONF_ENVIRONMENT] = "" if conf.source == NO_CONF else os.path.abspath(conf.source)
    path = os.environ.get("PATH", os.defpath)
    for program in (sys.argv[0], sys.executable):  # of a node of `local`, argv[0] is this file
        folder = os.path.dirname(os.path.abspath(program))
        if shutil.which("s4", path=path) is None and shutil.which("s4", path=folder) is not None:
            path = os.environ["PATH"] = f"{path}:{folder}"


def _start_log() -> None:
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO,
        format="%(asctime)s.%(msecs)03d %(levelname)s %(name)s %(message)s",
        datefmt="%Y-%m-%dT%H:%M:%S",
    )
    for chatty in ("sh", "waitress"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    logging.getLogger("waitress").addFilter(_is_no_lost_client)


def _is_no_lost_client(record: logging.LogRecord) -> bool:
    """False where waitress 3.0.2 trips over its own note that the sender of a malformed request left."""
    from waitress.channel import ClientDisconnected

    error = record.exc_info[1] if record.exc_info else None
    return error is None or not isinstance(error.__context__, ClientDisconnected)


def _raise_file_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(65536, hard)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


if __name__ == "__main__":
    main()
