"""Watches for `train`, see `laep_jax.training.watch`: something happens before or after a stage of a run."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator

from laep_jax.training.watch import Watch


class InterruptError(Exception):
    """What `interrupt` raises."""


def interrupt() -> None:
    raise InterruptError


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def before(stage: str, step: int, act: Callable[[], object]) -> Watch:
    @contextlib.contextmanager
    def watch(name: str, at: int) -> Iterator[None]:
        if (name, at) == (stage, step):
            act()
        yield

    return watch


def after(stage: str, step: int, act: Callable[[], object]) -> Watch:
    @contextlib.contextmanager
    def watch(name: str, at: int) -> Iterator[None]:
        yield
        if (name, at) == (stage, step):
            act()

    return watch
