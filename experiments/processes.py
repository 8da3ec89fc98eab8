"""Programs in processes of their own, to which signals are passed on."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path


def run(command: Sequence[str], variables: Mapping[str, str], cwd: Path | None = None) -> int:
    """The exit code of a program. variables: of its environment, where ours does not have them."""
    with _passing_signals_on() as children:
        children.append(subprocess.Popen(command, env={**variables, **os.environ}, cwd=cwd))
        code = children[0].wait()
    return 128 - code if code < 0 else code


@contextlib.contextmanager
def _passing_signals_on() -> Iterator[list[subprocess.Popen]]:
    """SIGTERM goes to the children; so does Ctrl-C, by the terminal itself. They save and end, and so do we."""
    children: list[subprocess.Popen] = []
    handlers = {signal.SIGINT: lambda *_: None, signal.SIGTERM: lambda *_: [child.terminate() for child in children]}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield children
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
