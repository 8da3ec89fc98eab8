"""`laep-jax launch`: training on several hosts, emulated by processes on one machine.

    laep-jax launch --num-processes 2 --restarts 3 -- --gin_file=configs/tiny.gin --workdir=runs/x

Starts that many `laep-jax train` with the arguments after `--`, connected over the loopback interface; they share
`MeshConfig.cpu_devices` emulated devices. The standard output of process 0 is shown as it comes, other output at the
end: in full for the processes that fail first, in one line for those that fail because of them. The first to fail ends
all, and after a crash all are restarted. Real hosts need no launcher: each runs train.py itself.

SIGTERM and Ctrl-C are passed on; the processes save and end, however long that takes. A second signal ends them
at once.
"""

import argparse
import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import IO

from laep_jax.commands import program
from laep_jax.errors import INTERRUPTED, REFUSED, STOPPED, require

POLL = 0.1  # seconds
GRACE = 10.0  # seconds for the others to end by themselves after a failure
FINAL = (0, REFUSED, STOPPED, INTERRUPTED)  # exit codes after which starting again is useless or unwanted
# Has the kernel send SIGTERM to a process when the launcher is gone, be it by SIGKILL; then becomes that process.
ORPHANS_STOP = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execvp(sys.argv[1], sys.argv[1:])"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=program("launch"),
        description="Trains in several processes of this machine, as several hosts would.",
    )
    parser.add_argument("--num-processes", type=int, required=True, metavar="N", help="processes to start")
    parser.add_argument(
        "--restarts", type=int, default=0, metavar="N", help="how often to start all again after a crash (%(default)s)"
    )
    parser.add_argument("train_arguments", nargs="*", metavar="-- ARGUMENTS", help="of train.py")
    arguments = parser.parse_args(argv)
    require(arguments.num_processes >= 1, "--num-processes", arguments.num_processes, "must be at least 1")
    require(arguments.restarts >= 0, "--restarts", arguments.restarts, "must not be negative")
    command = [sys.executable, "-m", "laep_jax", "train", *arguments.train_arguments]
    return launch(command, arguments.num_processes, arguments.restarts)


def launch(command: Sequence[str], num_processes: int, restarts: int = 0) -> int:
    """Runs `command` as that many connected processes; no process is left when this returns or raises.

    restarts: how often they are all started again after a crash. Returns 0, or the exit code of the first that
    failed (128 + the signal that ended it), 75 where a signal stopped them, or 128 + the second signal.
    """
    with _caught_signals() as signals:
        index, code = _run(command, num_processes, signals)
        for restart in range(1, restarts + 1):
            if signals or code in FINAL:
                break
            print(f"process {index} ended with code {code}: restart {restart} of {restarts}", file=sys.stderr)
            index, code = _run(command, num_processes, signals)
    if len(signals) > 1:
        return 128 + signals[1]
    if signals and code == 128 + signal.SIGTERM:  # before it could save there was nothing to save
        return STOPPED
    return code


@contextlib.contextmanager
def _caught_signals() -> Iterator[list[int]]:
    """The list of the signals to stop, as they come; those that are ignored stay so."""
    signals: list[int] = []
    found = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    heard = [number for number, handler in found.items() if handler is not signal.SIG_IGN]
    try:
        for number in heard:
            signal.signal(number, lambda number, frame: signals.append(number))
        yield signals
    finally:
        for number in heard:
            signal.signal(number, found[number])


def _run(command: Sequence[str], num_processes: int, signals: Sequence[int]) -> tuple[int, int]:
    """Runs all processes once. The first that failed and its exit code, (0, 0) without one."""
    address = f"127.0.0.1:{_free_port()}"
    with contextlib.ExitStack() as stack:
        said = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(num_processes)]
        children: list[subprocess.Popen] = []
        stack.callback(_kill, children)
        for index in range(num_processes):
            children.append(_start(command, address, num_processes, index, said[index]))
        failed = _wait_for_failure(children, signals)
        if not failed:
            _print(said[0])
            return 0, 0
        first = max(failed, key=lambda index: children[index].returncode)  # signals are negative
        code = _exit_code(children[first].returncode)
        _wait(children, math.inf if code == STOPPED else GRACE, signals)
        _print_output(failed, children, said)
        return first, code


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _start(command: Sequence[str], address: str, num_processes: int, index: int, said: IO[bytes]) -> subprocess.Popen:
    """One process; `laep_jax.distributed.connect` and JAX read the variables. said: where all goes but 0's output."""
    environment = {
        "JAX_PLATFORMS": "cpu",  # several processes cannot share the machine's accelerators
        **{name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")},  # gRPC's way out
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_COORDINATOR_BIND_ADDRESS": address,  # not on every interface
        "JAX_NUM_PROCESSES": str(num_processes),
        "JAX_PROCESS_ID": str(index),
    }
    if sys.platform == "linux":
        command = [sys.executable, "-S", "-c", ORPHANS_STOP, *command]
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=said if index else None, stderr=said
    )


def _wait_for_failure(children: Sequence[subprocess.Popen], signals: Sequence[int]) -> list[int]:
    """The first to fail, with those who failed at the same time; nobody when all have ended well.

    Passes the first signal on, as the SIGTERM that any number of the processes may get any number of times: Ctrl-C
    has reached them already, a second one would break them off. Returns nobody after the second.
    """
    passed_on = False
    while len(signals) < 2:
        codes = [child.poll() for child in children]
        failed = [index for index, code in enumerate(codes) if code]
        if failed or None not in codes:
            return failed
        if signals and not passed_on:
            for child in children:
                child.terminate()
            passed_on = True
        time.sleep(POLL)
    return []


def _wait(children: Sequence[subprocess.Popen], seconds: float, signals: Sequence[int]) -> None:
    """Returns when all have ended, after that many seconds, or after the second signal."""
    deadline = time.monotonic() + seconds
    while any(child.poll() is None for child in children) and time.monotonic() < deadline and len(signals) < 2:
        time.sleep(POLL)


def _kill(children: Sequence[subprocess.Popen]) -> None:
    """SIGKILL, since JAX catches SIGTERM and a process may hang in a collective; a run survives it."""
    for child in children:
        child.kill()
    for child in children:
        child.wait()


def _print_output(failed: Sequence[int], children: Sequence[subprocess.Popen], said: Sequence[IO[bytes]]) -> None:
    """Prints what the processes said: survivors of the first failure in a line each, then in full those that failed.

    A refusal or a stop is the same in all of them, and is printed once.
    """
    codes = [child.returncode for child in children]
    if codes[0] in (REFUSED, STOPPED) and len(set(codes)) == 1:
        _print(said[0])
        return
    for index in set(range(len(children))) - set(failed):
        if lines := _lines(said[index]):
            print(f"[process {index}] {lines[-1]}", file=sys.stderr)
    for index in failed:
        for line in [*_lines(said[index]), f"exit code {_exit_code(codes[index])}"]:
            print(f"[process {index}] {line}", file=sys.stderr)


def _lines(said: IO[bytes]) -> list[str]:
    said.seek(0)
    return said.read().decode(errors="replace").splitlines()


def _print(said: IO[bytes]) -> None:
    for line in _lines(said):
        print(line, file=sys.stderr)


def _exit_code(code: int) -> int:
    return code if code >= 0 else 128 - code
