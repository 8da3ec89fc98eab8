"""A run that fails while the smaller model is being compiled, for ten minutes.

python -m tests.training.prune.leaving interrupt|disk ARGUMENTS OF TRAIN
"""

import contextlib
import functools
import sys
import time
from collections.abc import Iterator

from laep_jax.errors import run_main
from laep_jax.training import command

ERRORS = {"interrupt": KeyboardInterrupt(), "disk": OSError("no space left")}


@contextlib.contextmanager
def watch(stage: str, step: int) -> Iterator[None]:
    if stage == "compile":
        time.sleep(600)
    yield
    if (stage, step) == ("record", 5):
        raise ERRORS[sys.argv[1]]


if __name__ == "__main__":
    sys.exit(run_main(functools.partial(command.main, watch=watch), sys.argv[2:]))
