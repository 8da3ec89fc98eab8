"""Exceptions that are not bugs, a user's mistake and a request to stop, and how the process exits after them."""

import difflib
import io
import os
import reprlib
import signal
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterable, Sequence

MAX_MESSAGE = 2_000  # characters of a message
FAILED, REFUSED, STOPPED, INTERRUPTED = 1, 2, os.EX_TEMPFAIL, 128 + signal.SIGINT  # exit codes


class UserError(ValueError):
    """A bad setting, file or plan. The message is one line naming the field, the value and the rule.

    Whatever a file or a name brings into it: what does not print is escaped, and what is too long cut. Entry points
    print it without a traceback and exit with `exit_code`: 2, or 1 where starting again may help.
    """

    exit_code = REFUSED

    def __init__(self, message: str):
        text = (
            message
            if len(message) <= MAX_MESSAGE
            else f"{message[: MAX_MESSAGE // 2]}...{message[-MAX_MESSAGE // 2 :]}"
        )
        super().__init__(printable(text))


class UnavailableError(UserError):
    """A bucket that does not answer or refuses; it says nothing about what is stored there."""

    exit_code = FAILED


class NoPlanError(UserError):
    """The settings of a plan ask for what these loads do not allow."""


def printable(text: str) -> str:
    r"""The text with everything escaped that does not print, as halves of surrogate pairs and line ends.

    >>> printable("a\udcffb\n")
    'a\\udcffb\\n'
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class StoppedError(Exception):
    """A run was stopped by a signal; everything up to `step` is saved. Entry points exit with code 75 (retry)."""

    def __init__(self, step: int):
        super().__init__(f"stopped and saved after step {step}; started again, the run resumes from there")


class UnreachableError(Exception):
    """The coordinator of several processes does not answer, yet may do so later. Entry points exit with code 1."""


def require(condition: bool, field: str, value: object, rule: str) -> None:
    """Raises `UserError("{field}={value} {rule}")` unless `condition` holds."""
    if not condition:
        raise UserError(f"{field}={short(value)} {rule}")


def require_type(field: str, value: object, hint: object) -> None:
    """Raises `UserError` unless `value` is what an annotation says: plain types, unions, collections, fixed tuples."""
    require(_has_type(value, hint), field, value, f"must be of type {type_name(hint)}{_remedy(value, hint)}")


def type_name(hint: object) -> str:
    """An annotation as it is written."""
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("NoneType", "None")


def _remedy(value: object, hint: object) -> str:
    """What to write instead, where a value of another type says what was meant."""
    parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if isinstance(value, float) and value.is_integer() and int in parts:
        return f"; write {short(int(value))}"
    if isinstance(value, (int, float)) and str in parts:
        return f"; write {str(value)!r}, in quotes"
    words = {"true": True, "false": False, "none": None, "null": None}
    if isinstance(value, str) and value.lower() in words and _has_type(words[value.lower()], hint):
        return f"; write {words[value.lower()]}"
    return ""


def _has_type(value: object, hint: object) -> bool:
    if isinstance(hint, types.UnionType):
        return any(_has_type(value, part) for part in typing.get_args(hint))
    origin = typing.get_origin(hint)
    if origin is tuple and ... not in typing.get_args(hint):
        hints = typing.get_args(hint)
        return isinstance(value, tuple) and len(value) == len(hints) and all(map(_has_type, value, hints))
    if origin in (tuple, list):
        return isinstance(value, origin) and all(_has_type(v, typing.get_args(hint)[0]) for v in value)
    if origin is dict:
        key, item = typing.get_args(hint)
        return isinstance(value, dict) and all(_has_type(k, key) and _has_type(v, item) for k, v in value.items())
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)  # type: ignore[arg-type]


def nearest(name: str, names: Iterable[str]) -> str | None:
    """Which of the names was probably meant."""
    found = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return found[0] if found else None


def did_you_mean(name: str, names: Iterable[str], listing: str = "there are") -> str:
    """The nearest of the names as a question, or all of them.

    >>> did_you_mean("trian", ["train", "plan"]), did_you_mean("x", ["train", "plan"])
    ('did you mean train?', 'there are train, plan')
    """
    names = list(names)
    near = nearest(name, names)
    return f"did you mean {near}?" if near else f"{listing} {', '.join(names)}"


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


EXPLAINED = (UserError, StoppedError, UnreachableError, KeyboardInterrupt)  # by one line instead of a traceback


def run_main(main: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """The exit code of `main(argv)`: of a `UserError` its own, of a `StoppedError` 75, else 1; 130 after Ctrl-C.

    Each is reported in one line; characters that the terminal cannot print are escaped. If standard output is closed,
    as behind `| head`, the program ends as after SIGPIPE.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = main(argv)
        sys.stdout.flush()
    except EXPLAINED as error:
        return explain(error)
    except ValueError as error:
        if _raised_by(error) != "jax._src.config":
            raise
        return explain(UserError(f"an environment variable that JAX reads: {error}"))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's own flush at the end complains
        return 128 + signal.SIGPIPE
    return code


def _raised_by(error: BaseException) -> str:
    """The module of the innermost frame."""
    frames = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return frames[-1]


def explain(error: BaseException) -> int:
    """Prints the line of one of EXPLAINED; returns its exit code."""
    if isinstance(error, KeyboardInterrupt):
        text, code = "interrupted; started again, the run resumes from its newest checkpoint", INTERRUPTED
    elif isinstance(error, StoppedError):
        text, code = str(error), STOPPED
    else:
        text, code = f"error: {error}", error.exit_code if isinstance(error, UserError) else FAILED
    print(text, file=sys.stderr)
    return code
