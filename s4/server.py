"""s4-server: builds a node from its parts, serves it, and stops it. Only this file reads the command line.

Imports of the node and of falcon are inside functions: the workers' processes import this module as their
main one, and must stay slim (110 ms and 30 MB less for each).
"""

import argparse
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from s4.config import (
    CONF_ENVIRONMENT,
    NO_CONF,
    Conf,
    Server,
    local_address,
    own_position,
    plain_number,
    read_conf,
    timeout_setting,
)
from s4.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_MISUSE, S4Error, StoppingError

if TYPE_CHECKING:
    from s4.node import Node
    from s4.webserver import WebServer

_CPUS = len(os.sched_getaffinity(0))

HOUSEKEEPING_SECONDS = 1.0
PRUNE_SECONDS = 10.0
STOP_SECONDS = 4.0  # after a SIGTERM; what is not down by then is ended with the process
FEW_FILES = 1024  # a batch to be sent takes 200, and a node at work some hundred more

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
        days = plain_number(text)
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

                signal.signal(signal.SIGTERM, signal.default_int_handler)
                conf = read_conf(arguments.conf)
                position = own_position(conf, arguments.port)
                reindex(conf, position, _away_from_here(arguments.data))
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

    from s4.api import make_app
    from s4.node import Limits, Node
    from s4.webserver import WebServer

    own = conf.servers[position]
    address = local_address(own.host)
    assert address is not None  # otherwise it would not be our line
    listener = _bind(own, address)  # before there is a data folder, which would be left behind
    limits = Limits(
        arguments.max_io_jobs, arguments.max_cpu_jobs, timeout, arguments.keep_jobs, arguments.keep_days
    )
    _prepare_environment(conf, own)
    node = Node(conf, position, address, _away_from_here(arguments.data), limits)
    tempfile.tempdir = node.storage.temporary_file("")  # where waitress spools, on the disk of the data
    try:
        server = WebServer(make_app(node), listener, limits.waiting_requests)
    except (OSError, RuntimeError) as e:  # its threads cannot be started: a low `ulimit -u`
        node.stop()
        raise S4Error(f"cannot serve on {own}: {e}") from e
    for action, seconds in ((node.keep_house, HOUSEKEEPING_SECONDS), (node.prune, PRUNE_SECONDS)):
        threading.Thread(target=_repeat, args=(action, seconds), name=action.__name__, daemon=True).start()
    log.info("node %s serves %s", own, node.storage.root)
    if address.startswith("127.") and any(other.host != own.host for other in conf.servers):
        log.warning("%s is %s here: other machines cannot reach this node; see /etc/hosts", own.host, address)
    gc.freeze()  # what a node is made of need not be looked at again
    stopping.wake = server.wake
    while not stopping.asked:
        server.serve(1)
    log.info("%s: stopping", stopping.asked)
    _stop(node, server)


def _away_from_here(data: str) -> str:
    """The data folder as an absolute path. Workers are forked from a `python -c`, which would take a module
    such as random.py from the current folder, so that is left."""
    path = os.path.abspath(data)
    os.chdir("/")
    return path


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


def _stop(node: "Node", server: "WebServer") -> None:
    """The order: no new connections; then jobs and workers, which lets waiting requests answer; then out."""
    from s4.workers.processes import kill_children

    began = time.monotonic()
    server.refuse()
    stopper = threading.Thread(target=node.stop, name="stop", daemon=True)
    stopper.start()
    while stopper.is_alive() and time.monotonic() < began + STOP_SECONDS:
        server.serve(0.05)
    if stopper.is_alive():
        log.error("something did not stop in %g s and is left behind", STOP_SECONDS)
    # What starts the workers would go by itself, but a moment after us.
    kill_children(lambda _pid, _session: True)
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


def _repeat(action: Callable[[], None], seconds: float) -> None:
    """Do something again and again, with pauses of so many seconds, until the node stops."""
    while True:
        try:
            action()
        except StoppingError:
            return
        except S4Error as e:  # such as a damaged index, which stays so
            log.error("housekeeping failed; it goes on: %s", e)
        except Exception:
            log.exception("housekeeping failed; it goes on")
        time.sleep(seconds)


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


def _raise_file_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(65536, hard)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    if wanted < FEW_FILES:
        log.warning("only %d files may be open at once (ulimit -n): a node needs %d", wanted, FEW_FILES)


if __name__ == "__main__":
    main()
