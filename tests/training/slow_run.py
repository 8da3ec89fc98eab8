"""A run in which everything that is no step takes longer than a step may, once, and then a step hangs.

python -m tests.training.slow_run FILE ARGUMENTS OF TRAIN; FILE gets the time at which it hangs.
"""

import contextlib
import functools
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from laep_jax.errors import run_main
from laep_jax.training import command, preemption

HANGS = 5
seen = {"record", "apply", "finish"}  # the latter two consist of others


@contextlib.contextmanager
def watch(stage: str, step: int) -> Iterator[None]:
    if stage not in seen:  # of the steps the first, which compiles
        seen.add(stage)
        time.sleep(3)
    yield
    if (stage, step) == ("record", HANGS):
        Path(sys.argv[1]).write_text(str(time.time()))
        time.sleep(600)


if __name__ == "__main__":
    preemption.HEAD_START = 0.5
    sys.exit(run_main(functools.partial(command.main, watch=watch), sys.argv[2:]))
