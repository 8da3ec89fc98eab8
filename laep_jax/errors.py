"""The exceptions that are no faults of the program: what a user got wrong, and being told to stop. How it ends then."""

import os
import signal
import sys
from collections.abc import Callable, Sequence

REFUSED, STOPPED, INTERRUPTED = 2, os.EX_TEMPFAIL, 128 + signal.SIGINT  # exit codes


class UserError(ValueError):
    """A bad setting, file or plan. The message is one line naming the field, the value and the rule.

    Entry points print it without a traceback and exit with code 2.
    """


class StoppedError(Exception):
    """A run was told to stop; everything up to `step` is saved. Entry points exit with code 75: start it again."""

    def __init__(self, step: int):
        super().__init__(f"stopped and saved after step {step}; a run started again goes on from there")


def require(condition: bool, field: str, value: object, rule: str) -> None:
    """Raises `UserError("{field}={value} {rule}")` unless `condition` holds."""
    if not condition:
        raise UserError(f"{field}={value!r} {rule}")


EXPLAINED = (UserError, StoppedError, KeyboardInterrupt)  # by one line instead of a traceback


def run_main(main: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """The exit code of `main(argv)`: after a `UserError` 2, a `StoppedError` 75, Ctrl-C 130, each told in one line.

    Where nobody reads what is printed any more, as behind `| head`, it ends like a program that SIGPIPE ends.
    """
    try:
        code = main(argv)
        sys.stdout.flush()
    except EXPLAINED as error:
        return explain(error)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's own flush at the end complains
        return 128 + signal.SIGPIPE
    return code


def explain(error: BaseException) -> int:
    """Prints the line of one of EXPLAINED; returns its exit code."""
    if isinstance(error, KeyboardInterrupt):
        text, code = "interrupted; a run started again goes on from its newest checkpoint", INTERRUPTED
    elif isinstance(error, StoppedError):
        text, code = str(error), STOPPED
    else:
        text, code = f"error: {error}", REFUSED
    print(text, file=sys.stderr)
    return code
