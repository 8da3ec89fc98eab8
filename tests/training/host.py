"""One of several processes that train together, in which something goes wrong.

python -m tests.training.host TROUBLE FOLDER ARGUMENTS OF TRAIN

TROUBLE is a name of `TROUBLES` and its own arguments, divided by commas. FOLDER gets the process id and the exit code.
"""

import contextlib
import functools
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from laep_jax import distributed
from laep_jax.checkpoint import checkpointer
from laep_jax.errors import run_main
from laep_jax.training import command
from laep_jax.training.watch import Watch, unwatched
from tests.support.watching import before

INDEX = os.environ.get("JAX_PROCESS_ID", "0")
# Each makes a watch of the folder, the arguments of train, which it may change, and its own arguments.


def bad_sector(folder: Path, arguments: list[str]) -> Watch:
    """The first read of a checkpoint fails, on process 1."""

    def read_leaves(*args, read=checkpointer.read_leaves):
        checkpointer.read_leaves = read
        raise ValueError("DATA_LOSS: a bad sector")

    if INDEX == "1":
        checkpointer.read_leaves = read_leaves
    return unwatched


def own_setting(folder: Path, arguments: list[str], setting: str, *values: str) -> Watch:
    """A setting of which each process has its own value."""
    arguments.append(f"--gin.{setting}={values[int(INDEX)]}")
    return unwatched


def no_corpus(folder: Path, arguments: list[str]) -> Watch:
    """A path that is not there, on process 1."""
    if INDEX == "1":
        arguments += ["--gin.DataConfig.source=text", "--gin.DataConfig.path=nowhere"]
    return unwatched


def own_folder(folder: Path, arguments: list[str]) -> Watch:
    arguments[0] += INDEX
    return unwatched


def full_disk(folder: Path, arguments: list[str]) -> Watch:
    """Process 1 fails."""

    def fail() -> None:
        (folder / "failed").write_text(str(time.time()))
        raise OSError("no space left")

    return before("record", 2, fail) if INDEX == "1" else unwatched


def freeze(folder: Path, arguments: list[str], heartbeat: str, step: str, told: str, sent: str) -> Watch:
    """Process 1 freezes before a step, once; started again, it alone is sent a signal behind another step."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored behind a shell's &
    distributed.HEARTBEAT_TIMEOUT = int(heartbeat)
    again = (folder / "frozen").exists()

    @contextlib.contextmanager
    def watch(stage: str, at: int) -> Iterator[None]:
        if INDEX == "1" and not again and (stage, at) == ("step", int(step)):
            (folder / "frozen").touch()
            os.kill(os.getpid(), signal.SIGSTOP)
        yield
        if again and stage == "record":
            if INDEX == "1" and at == int(told):
                os.kill(os.getpid(), signal.Signals[sent])
            time.sleep(1)  # JAX looks for a signal once a second

    return watch


TROUBLES = {
    trouble.__name__: trouble for trouble in (bad_sector, own_setting, no_corpus, own_folder, full_disk, freeze)
}


def main(trouble: str, folder: Path, arguments: list[str]) -> int:
    def leave(code: int, leave=os._exit) -> None:
        (folder / f"{INDEX}.code").write_text(str(code))
        leave(code)

    os._exit = leave
    (folder / f"{INDEX}.pid").write_text(str(os.getpid()))
    name, *own = trouble.split(",")
    watch = TROUBLES[name](folder, arguments, *own)
    code = run_main(functools.partial(command.main, watch=watch), arguments)
    (folder / f"{INDEX}.code").write_text(str(code))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:]))
