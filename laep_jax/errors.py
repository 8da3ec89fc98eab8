"""The one exception for what a user can get wrong, and how a program ends with it."""

import os
import reprlib
import signal
import sys
import types
import typing
from collections.abc import Callable, Sequence

LONGEST = 2_000  # characters of a message


class UserError(ValueError):
    """A bad setting, file or plan. The message is one line naming the field, the value and the rule.

    Whatever a file or a name brings into it: what does not print is escaped, and what is too long cut. Entry points
    print it without a traceback and exit with code 2.
    """

    def __init__(self, message: str):
        text = message if len(message) <= LONGEST else f"{message[: LONGEST // 2]}...{message[-LONGEST // 2 :]}"
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in text))


def require(condition: bool, field: str, value: object, rule: str) -> None:
    """Raises `UserError("{field}={value} {rule}")` unless `condition` holds."""
    if not condition:
        raise UserError(f"{field}={short(value)} {rule}")


def require_type(field: str, value: object, hint: object) -> None:
    """Raises `UserError` unless `value` is what an annotation says: plain types, unions, tuples of one type."""
    text = hint.__name__ if isinstance(hint, type) else str(hint).replace("NoneType", "None")
    require(_has_type(value, hint), field, value, f"must be of type {text}")


def _has_type(value: object, hint: object) -> bool:
    if isinstance(hint, types.UnionType):
        return any(_has_type(value, part) for part in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        return isinstance(value, tuple) and all(_has_type(v, item) for v in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)  # type: ignore[arg-type]


class _Short(reprlib.Repr):
    def __init__(self):
        super().__init__()
        self.maxlevel, self.maxtuple, self.maxlist, self.maxdict = 3, 64, 64, 64
        self.maxstring = self.maxother = self.maxlong = 300

    def repr_int(self, x: int, level: int) -> str:
        return super().repr_int(x, level) if x.bit_length() < 10_000 else f"<{x.bit_length()} bits>"


def short(value: object) -> str:
    """`repr(value)`, cut where it is deep or long, without making the whole of it first.

    >>> short("x" * 1000)[-4:], short([[[[0]]]])
    ("xxx'", '[[[[...]]]]')
    """
    return _Short().repr(value)


def run_main(main: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """The exit code of `main(argv)`: 2 after a `UserError`, 130 after Ctrl-C, each told in one line.

    Where nobody reads what is printed any more, as behind `| head`, it ends like a program that SIGPIPE ends.
    """
    try:
        code = main(argv)
        sys.stdout.flush()
    except (UserError, KeyboardInterrupt) as error:
        return explain(error)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's own flush at the end complains
        return 128 + signal.SIGPIPE
    return code


def explain(error: BaseException) -> int:
    """Prints the line of a `UserError` or of Ctrl-C; returns its exit code."""
    interrupted = isinstance(error, KeyboardInterrupt)
    text = "interrupted; a run started again goes on from its newest checkpoint" if interrupted else f"error: {error}"
    print(
        "".join(c if c.isprintable() else repr(c)[1:-1] for c in text), file=sys.stderr
    )  # files write names and texts
    return 130 if interrupted else 2
