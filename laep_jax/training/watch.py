"""The named stages of a run, for a program that times them or interrupts the run in one.

A stage is entered and left as a context manager, on every process: `step` (its batch and its program), `record` (its
metrics have left the device), `evaluate`, `sample`, `save`, and those of a plan in their order: `decide`, `compile` (in
a thread), `apply`, and within it `restore` and `finish`, which come alone where a run resumes with a plan to apply.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

Watch = Callable[[str, int], AbstractContextManager[object]]


def unwatched(stage: str, step: int) -> AbstractContextManager[object]:
    """The default: no stage does anything."""
    return nullcontext()
