"""`python -m laep_jax launch`: the training of several hosts, tried with processes of one machine.

    python -m laep_jax launch --num-processes 2 -- --gin_file=configs/tiny.gin --workdir=runs/x

Starts that many `python -m laep_jax train` with the arguments behind `--`, connected over the loopback
interface; they share `MeshConfig.cpu_devices` emulated devices. Process 0 writes to the terminal, what
others say is shown where they fail. The first to fail ends all. On real hosts nothing is launched: each
runs train.py itself.
"""

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import IO

from laep_jax.errors import require

POLL = 0.1  # seconds
GRACE = 5.0  # seconds for the others to end by themselves after a failure or Ctrl-C


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m laep_jax launch",
        description="Trains in several processes of this machine, as several hosts would.",
    )
    parser.add_argument("--num-processes", type=int, required=True, metavar="N", help="processes to start")
    parser.add_argument("train_arguments", nargs="*", metavar="-- ARGUMENTS", help="of train.py")
    arguments = parser.parse_args(argv)
    require(arguments.num_processes >= 1, "--num-processes", arguments.num_processes, "must be at least 1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    return launch([sys.executable, "-m", "laep_jax", "train", *arguments.train_arguments], arguments.num_processes)


def launch(command: Sequence[str], num_processes: int) -> int:
    """Runs `command` as that many connected processes; no process is left when this returns or raises.

    Returns 0, or the exit code of the first that failed (128 + the signal that ended it), or 130
    after Ctrl-C.
    """
    address = f"127.0.0.1:{_free_port()}"
    with contextlib.ExitStack() as stack:
        said = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(num_processes)]
        children: list[subprocess.Popen] = []
        stack.callback(_kill, children)
        try:
            for index in range(num_processes):
                output = None if index == 0 else said[index]
                children.append(_start(command, address, num_processes, index, output))
            failed = _wait_for_failure(children)
            if not failed:
                return 0
            _wait(children, GRACE)
        except KeyboardInterrupt:  # a terminal sends it to the processes as well
            _wait(children, GRACE)
            return 128 + signal.SIGINT
        _tell(failed, children, said)
        return _exit_code(max(children[index].returncode for index in failed))  # signals are negative


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _start(
    command: Sequence[str], address: str, num_processes: int, index: int, output: IO[bytes] | None
) -> subprocess.Popen:
    """One process; `laep_jax.hosts.connect` and JAX read the variables. output: None is the terminal."""
    environment = {
        "JAX_PLATFORMS": "cpu",  # several processes cannot share the machine's accelerators
        **{name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")},  # gRPC's way out
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_COORDINATOR_BIND_ADDRESS": address,  # not on every interface
        "JAX_NUM_PROCESSES": str(num_processes),
        "JAX_PROCESS_ID": str(index),
    }
    error = None if output is None else subprocess.STDOUT
    return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=error)


def _wait_for_failure(children: Sequence[subprocess.Popen]) -> list[int]:
    """The first to fail, with those who failed at the same time; nobody when all have ended well."""
    while True:
        codes = [child.poll() for child in children]
        failed = [index for index, code in enumerate(codes) if code]
        if failed or None not in codes:
            return failed
        time.sleep(POLL)


def _wait(children: Sequence[subprocess.Popen], seconds: float) -> None:
    """Returns when all have ended, or after that many seconds."""
    deadline = time.monotonic() + seconds
    while any(child.poll() is None for child in children) and time.monotonic() < deadline:
        time.sleep(POLL)


def _kill(children: Sequence[subprocess.Popen]) -> None:
    """SIGKILL, since JAX catches SIGTERM and a process may hang in a collective; a run survives it."""
    for child in children:
        child.kill()
    for child in children:
        child.wait()


def _tell(failed: Sequence[int], children: Sequence[subprocess.Popen], said: Sequence[IO[bytes]]) -> None:
    """Prints what the processes that failed said; the first, which writes to the terminal, has told already.

    A refusal (code 2) is the same in all of them. Who fails later does so because of these.
    """
    for index in failed:
        code = children[index].returncode
        if index and not (code == children[0].returncode == 2):
            said[index].seek(0)
            for line in said[index].read().decode(errors="replace").splitlines():
                print(f"[process {index}] {line}", file=sys.stderr)
            print(f"[process {index}] exit code {_exit_code(code)}", file=sys.stderr)


def _exit_code(code: int) -> int:
    return code if code >= 0 else 128 - code
