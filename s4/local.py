"""s4-server local: several nodes on loopback, in the foreground, for a laptop or a try-out."""

import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import time

from s4.config import CONF_ENVIRONMENT, read_conf
from s4.errors import EXIT_FAILED, S4Error
from s4.http import Caller
from s4.workers import processes

START_SECONDS = 20.0
STOP_SECONDS = 6.0
ANSWER_SECONDS = 1.0


def run_local(nodes: int, folder: str) -> int:
    """Run `nodes` nodes until Ctrl-C or SIGTERM; the exit code, 0 after a stop that was asked for.

    `folder` gets s4.conf, and per node nodeN/s4_data and nodeN.log. An s4.conf that is there already is used
    again, so that the data in the folder keeps its place. When a node ends, also at its start, the others are
    stopped, and the exit code is 1. Raises S4Error if one cannot be started or does not answer.
    """
    folder = os.path.abspath(folder)
    conf = os.path.join(folder, "s4.conf")
    ports = _ports(nodes, folder, conf)
    fingerprint = read_conf(conf).fingerprint
    for port in ports:
        if _healthy(port, fingerprint):
            raise S4Error(
                f"{folder} is in use: a node answers on 127.0.0.1:{port}; stop that s4-server first"
            )
    stopping: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _frame: stopping.append(received))
    running: dict[subprocess.Popen[bytes], str] = {}
    try:
        for i, port in enumerate(ports):
            running[_start(i, port, folder, conf)] = os.path.join(folder, f"node{i}.log")
        deadline = time.monotonic() + START_SECONDS
        unhealthy = list(ports)
        while unhealthy and not stopping:
            unhealthy = [port for port in unhealthy if not _healthy(port, fingerprint)]
            if _report_dead(running):
                return EXIT_FAILED
            if unhealthy and time.monotonic() > deadline:
                raise S4Error(f"node on port {unhealthy[0]} does not answer; see its log in {folder}")
            time.sleep(0.05)
        if not stopping:
            up = "1 node is up; stop it" if nodes == 1 else f"{nodes} nodes are up; stop them"
            print(f"{up} with Ctrl-C. To use {'it' if nodes == 1 else 'them'}:", flush=True)
            print(f"export {CONF_ENVIRONMENT}={shlex.quote(conf)}", flush=True)
        while not stopping:
            if _report_dead(running):
                return EXIT_FAILED
            time.sleep(0.1)
        return 0
    finally:
        _stop(running)


def _ports(nodes: int, folder: str, conf: str) -> list[int]:
    if os.path.exists(conf):
        ports = [server.port for server in read_conf(conf).servers]
        if len(ports) != nodes:
            raise S4Error(f"{conf} is for {len(ports)} nodes, not {nodes}: take another --dir")
        return ports
    ports = _free_ports(nodes)
    try:
        os.makedirs(folder, exist_ok=True)
        with open(conf, "w", encoding="utf-8") as f:
            f.writelines(f"127.0.0.1:{port}\n" for port in ports)
    except OSError as e:
        raise S4Error(f"{folder}: {e.strerror}") from e
    return ports


def _free_ports(count: int) -> list[int]:
    """Ports that are free now, below those that the kernel gives to connections."""
    found: list[int] = []
    for port in random.sample(range(10_000, 32_000), 1000):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise S4Error(f"there are no {count} free ports on 127.0.0.1")


def _start(number: int, port: int, folder: str, conf: str) -> "subprocess.Popen[bytes]":
    own = os.path.join(folder, f"node{number}")
    os.makedirs(own, exist_ok=True)
    with open(own + ".log", "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "s4.server", "--port", str(port), "--conf", conf],
            cwd=own,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C reaches us alone, and we stop them in order
            preexec_fn=processes.die_with_parent,
        )


def _healthy(port: int, fingerprint: str) -> bool:
    try:
        with Caller(f"127.0.0.1:{port}", fingerprint, ANSWER_SECONDS) as caller:
            caller.call("GET", "/health")
    except S4Error:
        return False
    return True


def _report_dead(running: "dict[subprocess.Popen[bytes], str]") -> bool:
    dead = [(process, log) for process, log in running.items() if process.poll() is not None]
    for process, log in dead:
        print(f"fatal: a node ended with exit code {process.returncode}; see {log}", file=sys.stderr)
    return bool(dead)


def _stop(running: "dict[subprocess.Popen[bytes], str]") -> None:
    for process in running:
        process.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    for process in running:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
