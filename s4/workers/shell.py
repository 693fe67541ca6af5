"""Bash for the commands of jobs: one kept bash a worker, started through sh, that runs each in a subshell.

A fresh bash started by sh costs 6 to 7 ms, a subshell of a kept one 0.7. What to run reaches it as data, in
a file of NUL-separated fields, never as part of a shell line. `set -m` puts each command into a process
group of its own, of which nothing is left when its status is reported.

A single program with plain arguments takes the place of its subshell, as it does with `bash -c`; that saves a
fork, a sixth of what `cat` takes. Builtins, functions and keywords do not.
"""

import contextlib
import os
import resource
import select
import signal
import time
from typing import Any, NamedTuple

import sh

from s4.errors import S4Error
from s4.workers import processes

# Stderr is appended to, so that a command's own `>> /dev/stderr` does not write over what was said before.
# Stdout, which is empty or not there, is not truncated: that would give back the space reserved for it.
# All in one line, for a command is read where `eval` stands: its own lines count from 1, as with `bash -c`.
# Where the fields of a command cannot be read, those of the one before must not be there any more.
# SECONDS would count from the start of this bash.
# The leader of a process group cannot begin a session: setsid(1) would go on as another process, for which
# nobody waits, and say that all is well. So its line gets one more subshell, which leads nothing. The one
# above it outlives signals to all of the group, which are for the command, and says nothing of its own.
# A command may be stopped, as by SIGSTOP, and go on; bash looks for that only while `set -m` holds. If it was
# stopped so soon, `wait` does not wait: `read`, for which nothing comes, is a pause, the last `wait` tells
# how it ended. (`wait -f` may spin for ever; seen with bash 5.2.)
_LOOP = r"""
while read -r; do
    s4_job=();
    mapfile -d '' -t s4_job <"$1";
    set -m;
    (
        exec 2>>"${s4_job[3]}" 1<>"${s4_job[2]}" <"${s4_job[1]}" || exit;
        cd -- "${s4_job[0]}" || exit;
        export "${s4_job[@]:5}";
        s4_command=${s4_job[4]};
        unset s4_job OLDPWD;
        set --;
        set +m;
        if [[ $s4_command == *setsid* ]]; then
            trap : HUP INT QUIT TERM USR1 USR2 ALRM;
            exec {s4_fd}>&2 2>/dev/null;
            (
                exec 2>&$s4_fd {s4_fd}>&-;
                unset s4_fd;
                SECONDS=0;
                set -euo pipefail;
                eval -- "$s4_command"
            );
            exit;
        fi;
        if [[ $s4_command =~ ^[A-Za-z0-9_./\ -]+$ && ! $s4_command =~ ^\ *(time|coproc)(\ |$) ]]; then
            set -- $s4_command;
            hash -- "$1" 2>/dev/null && [[ ${BASH_CMDS[$1]-} ]] && exec -- "$@";
            set --;
        fi;
        SECONDS=0;
        set -euo pipefail;
        eval -- "$s4_command"
    ) &
    set +m;
    while wait $!; s4_status=$?; ((s4_status > 128)) && kill -0 $!; do
        read -t 0.1;
    done;
    ((s4_status > 128)) && { wait $!; s4_status=$?; };
    kill -KILL -- -$!;
    echo "$s4_status";
done 2>/dev/null
""".replace("\n", " ")
_NOT_FOR_BASH = ("BASH_ENV", "SHELLOPTS", "BASHOPTS")  # they would change the loop: errexit ends it
_TICKS = os.sysconf("SC_CLK_TCK")  # of CPU time in /proc, a second
# How often memory is looked at: after half of the time that the command has run. A look costs 0.1 to 0.3 ms,
# and many commands may run at once.
_SAMPLE_SHARE = 0.5
_SAMPLE_SECONDS = 0.02, 1.0  # but not sooner or later


class Usage(NamedTuple):
    """What a command and all that it started used: CPU time in seconds, to the hundredth, and the most memory
    in bytes (processes.memory_below, looked at now and then)."""

    cpu_seconds: float
    peak_memory: int


class Shell:
    """A kept bash. `job_file`, which is not there before, is where the fields of the next command go."""

    def __init__(self, job_file: str) -> None:
        self._job_file = job_file
        self._process: Any = None
        self._stdin = self._status = -1
        self._ready = select.poll()
        self._stat = -1  # /proc/PID/stat of the shell
        self._ticks = 0  # CPU time of all its commands until now
        self._own_memory = 0  # of the shell, which its copy for a command has at least

    def run(
        self, command: str, folder: str, stdin: str, stdout: str, stderr: str, environment: dict[str, str]
    ) -> tuple[int, Usage]:
        """Run a command; its exit code as bash reports it, 128 + N when signal N ended it, and its usage.

        Raises S4Error if the command answers in the place of the shell, OSError.
        """
        variables = [f"{name}={value}" for name, value in {"LC_ALL": "C", **environment}.items()]
        fields = [folder, stdin, stdout, stderr, command, *variables]
        with open(self._job_file, "wb") as f:
            f.write(os.fsencode("\0".join(fields) + "\0"))
        try:
            exitcode, usage = self._run_job_file()
        except BaseException:
            self._stop()  # out of step, it would answer the next command with the end of this one
            raise
        finally:
            orphans_seconds = self._end_orphans()
        return exitcode, usage._replace(cpu_seconds=usage.cpu_seconds + orphans_seconds)

    def _begin(self) -> None:
        """Have the shell run what is in the job file; a new one if somebody has killed it meanwhile."""
        if self._process is None:
            self._start()
        try:
            os.write(self._stdin, b"\n")
        except BrokenPipeError:
            self._stop()
            self._start()
            os.write(self._stdin, b"\n")

    def _run_job_file(self) -> tuple[int, Usage]:
        self._begin()
        answer, peak_memory = self._answer()
        if not answer:
            exitcode = self._stop()  # the command ended the shell itself, such as with kill -9 $$
            return exitcode, Usage(0.0, max(peak_memory, self._own_memory))
        if not answer.strip().isdigit():
            raise S4Error(
                f"the command wrote {answer!r} where its shell reports how it ended; that is not for it"
            )
        exitcode = int(answer)
        self._own_memory = self._own_memory or processes.memory_of(self._process.pid)
        return exitcode, Usage(self._cpu_since(), max(peak_memory, self._own_memory))

    def _answer(self) -> tuple[bytes, int]:
        """What the loop says at the end of a command, nothing if the shell is gone; and the memory seen."""
        soonest, latest = _SAMPLE_SECONDS
        peak, pause = 0, soonest
        began = time.monotonic()
        while not self._ready.poll(1000 * pause):
            shell: int = self._process.pid
            peak = max(peak, processes.memory_below(shell) + processes.memory_besides(shell))
            pause = min(max(soonest, _SAMPLE_SHARE * (time.monotonic() - began)), latest)
        return os.read(self._status, 16), peak

    def _cpu_since(self) -> float:
        """CPU seconds of the commands of this shell since the last call."""
        fields = os.pread(self._stat, 1024, 0).rpartition(b")")[2].split()
        so_far = int(fields[13]) + int(fields[14])  # cutime and cstime, proc(5)
        ticks, self._ticks = so_far - self._ticks, so_far
        return ticks / _TICKS

    def _end_orphans(self) -> float:
        """End what a command left running, in whatever session: we are its parent now, as a subreaper. The
        CPU seconds that all that took, also what ended by itself."""
        kept = self._process.pid if self._process is not None else -1
        if not processes.has_children_besides(kept):
            return 0.0
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        processes.kill_children(lambda pid, _session: pid != kept)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    def _start(self) -> None:
        try:
            bash: Any = sh.bash  # its types know lists of exit codes, not ranges
        except sh.CommandNotFound:
            raise S4Error("there is no bash in the PATH of this node") from None
        environment = {name: value for name, value in os.environ.items() if name not in _NOT_FOR_BASH}
        with contextlib.ExitStack() as given, contextlib.ExitStack() as on_error:
            stdin, self._stdin = os.pipe()
            r = given.enter_context(os.fdopen(stdin, "rb"))
            on_error.callback(os.close, self._stdin)
            self._status, stdout = os.pipe()
            w = given.enter_context(os.fdopen(stdout, "wb"))
            on_error.callback(os.close, self._status)
            self._process = bash(
                *("--noprofile", "--norc", "-c", _LOOP, "bash", self._job_file),
                _in=r,
                _out=w,
                _err=given.enter_context(open(os.devnull, "wb")),
                _env=environment,
                _cwd="/",
                _new_session=True,
                _bg=True,
                _bg_exc=False,
                _return_cmd=True,
                _close_fds=False,
                _ok_code=range(-64, 256),
                _preexec_fn=_prepare_for_commands,
            )
            on_error.pop_all()
        self._ready = select.poll()
        self._ready.register(self._status, select.POLLIN)
        self._stat = os.open(f"/proc/{self._process.pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
        self._ticks = self._own_memory = 0

    def _stop(self) -> int:
        """End the shell, unless that is done; its exit code."""
        if self._process is None:
            return 0
        os.close(self._stdin)
        os.close(self._status)
        if self._stat >= 0:
            os.close(self._stat)
            self._stat = -1
        process, self._process = self._process, None
        processes.kill(process.pid)
        exitcode: int = process.wait().exit_code
        return exitcode if exitcode >= 0 else 128 - exitcode


def _prepare_for_commands() -> None:
    """Set what commands inherit from their bash, in the process that becomes it."""
    # Two programs joined by a pipe interrupt each other for every 4 KB otherwise, a tenth of the time of
    # `… | sort | …` (sched(7)). An administrator's choice stays; a sandbox may refuse, or know no such call.
    with contextlib.suppress(OSError):
        if os.sched_getscheduler(0) == os.SCHED_OTHER:
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    # Python ignores SIGPIPE, sh SIGHUP, and a script what it starts with `&` others; bash could not undo it.
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_DFL)
