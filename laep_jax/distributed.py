"""The processes of one run: how they connect, agree and exit. With one process nothing happens here.

Every process runs the same program on its own devices and its own rows of each batch. Computations over
the whole mesh, Orbax and `allgather_strings` wait until all processes reach them, so all processes must take
the same decisions; only process 0 writes logs.
"""

import contextlib
import hashlib
import itertools
import os
import re
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from laep_jax.errors import (
    EXPLAINED,
    StoppedError,
    UnavailableError,
    UnreachableError,
    UserError,
    explain,
    require,
    short,
)

ADDRESS, NUMBER, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
TPU_HOSTS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
HEARTBEAT_TIMEOUT = 30  # seconds until a silent process counts as dead and the others end; JAX waits 100
COORDINATOR_TIMEOUT = 300  # seconds, as JAX waits
MESSAGE = 1024  # bytes
SHARED_ERRORS = (
    UserError,
    UnreachableError,
    FloatingPointError,
    StoppedError,
)  # every process comes to them, at the same place


def num_processes() -> int:
    """What JAX_NUM_PROCESSES says beside an address, else 1. JAX can tell only after its devices are made."""
    number = _number(NUMBER, 1)
    require(number >= 1, NUMBER, number, "must be a positive number")
    alone = ADDRESS not in os.environ
    require(not alone or number == 1, NUMBER, number, f"needs {ADDRESS} beside it; unset it to train in one process")
    index = _number(INDEX, 0)
    require(not alone or index == 0, INDEX, index, f"needs {ADDRESS} beside it; unset it to train in one process")
    return number


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    require(bool(re.fullmatch("[0-9]{1,9}", text)), name, text, "must be a number")
    return int(text)


def connect() -> None:
    """Connects the processes of a run, if there are several; must come before JAX's first computation.

    There are several where JAX_COORDINATOR_ADDRESS is set (`laep-jax launch` sets it with
    JAX_NUM_PROCESSES and JAX_PROCESS_ID; without these two JAX asks Slurm, Open MPI or the TPU's
    metadata), and on TPU hosts of which GKE names several, or several slices. Plain Cloud TPU VMs name
    nobody in the environment: there set JAX_COORDINATOR_ADDRESS on every host.
    `UserError` where what the environment says does not make a place among processes, or names devices that are not
    there; `UnreachableError` where the coordinator does not answer.
    """
    number = num_processes()
    named = [name for name in TPU_HOSTS if "," in os.environ.get(name, "")]
    named += [name for name in (ADDRESS, "MEGASCALE_COORDINATOR_ADDRESS") if name in os.environ]
    if ADDRESS in os.environ and NUMBER in os.environ:
        require(INDEX in os.environ, INDEX, "", f"must be a number below {NUMBER}={number}")
        index = _number(INDEX, 0)
        require(index < number, INDEX, index, f"must be a number below {NUMBER}={number}")
        address = os.environ[ADDRESS]
        require(bool(re.fullmatch(r".+:[0-9]+", address)), ADDRESS, address, "must be HOST:PORT")
        if index > 0:
            await_coordinator(address)
        _initialize(named, address, number, index, cluster_detection_method="deactivate")
        if os.environ.get("JAX_PLATFORMS") == "cpu":
            _silence_gloo()
    elif named:
        _initialize(named)
    try:
        count = jax.process_count()
    except Exception as error:  # a platform may be unknown, without a driver, or without a plugin
        platforms = os.environ.get("JAX_PLATFORMS", "")
        raise UserError(f"JAX_PLATFORMS={platforms!r} has no devices here: {_first_line(error)}") from error
    connected = count == 1 or jax.distributed.is_initialized()
    require(connected, ADDRESS, os.environ.get(ADDRESS), f"must be set: there are {count} hosts")


def await_coordinator(address: str) -> None:
    """Returns once something listens at HOST:PORT; `UnreachableError` where nothing does for COORDINATOR_TIMEOUT.

    JAX itself would abort the process in C++, with a stack trace.
    """
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + COORDINATOR_TIMEOUT
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
            return
        except (OSError, OverflowError) as error:
            if time.monotonic() > deadline:
                raise UnreachableError(f"{ADDRESS}={short(address)} does not answer: {error}") from error
        time.sleep(1)


def _initialize(named: Sequence[str], *arguments: Any, **options: Any) -> None:
    """named: the variables that say that there are several processes."""
    try:
        jax.distributed.initialize(*arguments, heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT, **options)
    except Exception as error:  # JAX has many for variables that it cannot use
        said = ", ".join(f"{name}={short(os.environ[name])}" for name in named)
        rule = "unset it to train in one process, or set all of " + ", ".join((ADDRESS, NUMBER, INDEX))
        raise UserError(f"{said}: {_first_line(error)}; {rule}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _silence_gloo() -> None:
    """gloo tells of every connection on C++'s standard output, in the middle of Python's lines."""
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", buffering=1, encoding=sys.stdout.encoding, errors=sys.stdout.errors)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)


def allgather_strings(text: str) -> list[str]:
    """What each process says, by its index, no more than MESSAGE bytes of it. Waits for all of them."""
    said = np.frombuffer(text.encode(errors="backslashreplace")[:MESSAGE].ljust(MESSAGE, b"\0"), np.uint8)
    return [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in multihost_utils.process_allgather(said)]


def require_same(values: Mapping[str, object]) -> None:
    """`UserError` on every process, naming the first value that differs and who has which, if one does.

    values: by name; the same names everywhere.
    """
    texts = {name: str(value) for name, value in values.items()}
    digests = np.array(
        [list(hashlib.sha256(text.encode(errors="backslashreplace")).digest()) for text in texts.values()], np.uint8
    )
    differs = np.any(np.ptp(multihost_utils.process_allgather(digests), axis=0), axis=1)
    for name in itertools.compress(texts, differs):
        of_all = allgather_strings(texts[name])
        holders = {text: [str(index) for index, other in enumerate(of_all) if other == text] for text in of_all}
        found = "; ".join(f"{text} on {', '.join(indices)}" for text, indices in holders.items())
        raise UserError(f"{name} differs between the processes: {found}")


@contextlib.contextmanager
def raise_on_all_processes(*kinds: type[UserError]) -> Iterator[None]:
    """An error of one of these kinds, by default any `UserError`, of one process inside becomes one of all.

    The first kind that it is. Nothing inside may wait for the others.
    """
    kinds = kinds or (UnavailableError, UserError)
    refusal = None
    try:
        yield
    except kinds as error:
        refusal = error
    number = next(index for index, kind in enumerate(kinds) if isinstance(refusal, kind)) if refusal else 0
    refusals = allgather_strings(f"{number} {refusal or ''}")
    if refusal:
        raise refusal
    for index, said in enumerate(refusals):
        number, _, text = said.partition(" ")
        if text:
            raise kinds[int(number)](f"process {index}: {text}")


def is_local_error(error: BaseException | None) -> bool:
    """Whether the other processes know nothing of this error and would be waited for in vain."""
    return error is not None and not isinstance(error, SHARED_ERRORS) and jax.process_count() > 1


@contextlib.contextmanager
def exit_without_barrier(is_busy: Callable[[], bool]) -> Iterator[None]:
    """Ends this process where an error is its own, without JAX's goodbye to the others; or where it is busy.

    That goodbye waits minutes for processes that themselves hang in a collective with this one. Its
    death is what lets them go: the connection breaks, or the heartbeat stops. is_busy: whether threads of
    this process run for minutes, which Python would wait for as well.
    """
    try:
        yield
    except BaseException as error:
        if not is_local_error(error):
            if not is_busy():
                raise
            if jax.process_count() > 1:
                jax.distributed.shutdown()
        code = 1
        if isinstance(error, EXPLAINED):
            code = explain(error)
        else:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
