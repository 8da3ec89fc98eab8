"""gin at the edge: `.gin` files and `--gin.CLASS.FIELD=VALUE` become one checked `Config`.

The parser of the `gin-config` package reads statements and literals; nothing of its registry is used, so that a
config can neither import a module nor call anything: `import` and `@references` are refused. Macros hold
literals. The frozen dataclasses of `laep_jax.config` check types and ranges themselves. Includes are relative to
the file named on the command line, and lie in its folder or below.
"""

import ast
import dataclasses
import difflib
import re
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gin import config_parser

from laep_jax.config import Config
from laep_jax.errors import UserError
from laep_jax.files import read_bytes

MOST_TEXT = 2**15  # bytes of all files and bindings; the longest here has 2,000
PARTS: dict[str, type] = typing.get_type_hints(Config)
CLASSES = {part.__name__: part for part in PARTS.values()}


def parse_arguments(argv: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Splits a command line into `--gin_file` values, gin bindings and everything else, in order.

    >>> parse_arguments(["--gin_file=a.gin", "--gin.LaepConfig.alpha=hybrid", "--workdir", "x"])
    (['a.gin'], ["LaepConfig.alpha = 'hybrid'"], ['--workdir', 'x'])
    """
    files, bindings, rest = [], [], []
    waiting = list(argv)
    while waiting:
        argument = waiting.pop(0)
        name, equals, value = argument.partition("=")
        if name != "--gin_file" and not name.startswith("--gin."):
            rest.append(argument)
            continue
        if not equals:
            if not waiting:
                raise UserError(f"{name} needs a value: {name}=VALUE")
            value = waiting.pop(0)
        if name == "--gin_file":
            files.append(value)
        else:
            bindings.append(f"{name.removeprefix('--gin.')} = {_as_literal(value)}")
    return files, bindings, rest


def _as_literal(text: str) -> str:
    """A value as gin reads it: what is no Python literal, macro or reference is a string."""
    if len(text) > MOST_TEXT:
        raise UserError(f"a setting of {len(text)} characters is above {MOST_TEXT}")
    try:
        ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text if text.startswith(("%", "@")) else repr(text)
    return text


def load_config(gin_files: Sequence[str], bindings: Sequence[str] = ()) -> Config:
    """The config that files and bindings describe, later ones over earlier ones.

    `UserError` on a file that is missing or does not parse, on files and bindings of more than MOST_TEXT bytes, on
    an unknown class or field (with the nearest name), a binding without effect, and whatever the dataclasses refuse.
    """
    statements = _Statements()
    for file in gin_files:
        statements.read_file(Path(file).absolute(), f"--gin_file={file!r}", ())
    statements.read("\n".join(bindings), "the command line", ())
    return Config(**{name: part(**statements.fields(part.__name__)) for name, part in PARTS.items()})


class _Macro(typing.NamedTuple):
    name: str


class _Statements(config_parser.ParserDelegate):
    """What was read so far: values by class and field, and macros, which take effect at the end."""

    def __init__(self):
        self._bound: dict[str, dict[str, Any]] = {name: {} for name in CLASSES}
        self._macros: dict[str, Any] = {}
        self._left = MOST_TEXT

    def configurable_reference(self, scoped_configurable_name, evaluate):
        raise ValueError(f"@{scoped_configurable_name} is a reference; a config holds values only")

    def macro(self, macro_name):  # type: ignore[override]
        return _Macro(macro_name)

    def read_file(self, path: Path, name: str, including: tuple[Path, ...]) -> None:
        """including: the files that led here, the one of the command line first."""
        if path in including:
            raise UserError(f"{name} includes itself")
        try:
            text = read_bytes(path, name, MOST_TEXT).decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{name} is not UTF-8: byte {error.start}") from error
        self.read(text, path.name, (*including, path))

    def read(self, text: str, where: str, including: tuple[Path, ...]) -> None:
        self._left -= len(text)
        if self._left < 0:
            raise UserError(f"{where}: the config as a whole is above {MOST_TEXT} characters")
        try:
            parser = config_parser.ConfigParser(text, self)
            while statement := parser.parse_statement():  # iterating would take an unexpected end for the end
                self._take(statement, including)
        except UserError:
            raise
        except Exception as error:  # tokenize, gin and Python's literals have many for what does not parse
            raise UserError(f"{where}: {_one_line(error)}") from error

    def _take(self, statement: Any, including: tuple[Path, ...]) -> None:
        if isinstance(statement, config_parser.ImportStatement):
            raise UserError(f"import {statement.module}: a config imports nothing")
        if isinstance(statement, config_parser.IncludeStatement):
            self._include(statement.filename, including)
        elif isinstance(statement, config_parser.BindingStatement):
            scope, selector, field, value, _ = statement
            self._bind(scope, selector.removeprefix("laep_jax."), field, value)

    def _include(self, file: str, including: tuple[Path, ...]) -> None:
        name = f"include {file!r}"
        if not including:
            raise UserError(f"{name}: only a file can include another")
        folder = including[0].parent
        path = folder / file
        if "\0" in file or not path.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{name} leads out of the folder of {including[0].name}")
        self.read_file(path, name, including)

    def _bind(self, scope: str, selector: str, field: str, value: Any) -> None:
        key = f"{selector}.{field}" if field else selector
        if scope:
            raise UserError(f"{scope}/{key}: scopes have no meaning here; write {key}")
        if not field:
            if any(_macros_in(value)):
                raise UserError(f"{selector} is a macro, and holds another one")
            self._macros[selector] = value
            return
        if selector not in CLASSES:
            near = _nearest(selector, CLASSES)
            classes = f"did you mean {near}?" if near else f"there are {', '.join(CLASSES)}"
            raise UserError(f"there is no class {selector!r}; {classes}")
        fields = _fields(CLASSES[selector])
        if field not in fields:
            near = _nearest(field, fields)
            known = f"did you mean {near}?" if near else f"its fields are {', '.join(fields)}"
            raise UserError(f"{selector} has no field {field!r}; {known}")
        self._bound[selector][field] = value

    def fields(self, selector: str) -> dict[str, Any]:
        """The values of a class, macros replaced. `UserError` where a macro was meant to be a field."""
        used = {name for bound in self._bound.values() for value in bound.values() for name in _macros_in(value)}
        for name in used - self._macros.keys():
            raise UserError(f"%{name} is used but never set")
        for name in self._macros.keys() - used:  # by habit macros are capitals, and overriding may idle them
            fields = {field: cls for cls, part in CLASSES.items() for field in _fields(part)}
            if near := _nearest(name, fields):
                raise UserError(f"{name} is set but never used; did you mean {fields[near]}.{near}?")
        return {field: self._resolve(value) for field, value in self._bound[selector].items()}

    def _resolve(self, value: Any) -> Any:
        if isinstance(value, _Macro):
            return self._macros[value.name]
        return type(value)(map(self._resolve, value)) if isinstance(value, (list, tuple)) else value


def _macros_in(value: Any) -> Iterator[str]:
    if isinstance(value, _Macro):
        yield value.name
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _macros_in(item)


def _fields(part: type) -> list[str]:
    return [field.name for field in dataclasses.fields(part)]


def _nearest(name: str, names: typing.Iterable[str]) -> str | None:
    found = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return found[0] if found else None


def _one_line(error: Exception) -> str:
    """The parser's message in one line."""
    text = " ".join(str(error).split())
    if unquoted := re.search(r"Failed to parse token '([^\W\d]\w*)'", text):
        return f"{unquoted[1]} is no Python literal; text stands in quotes"
    return f"config does not parse: {text}"


def operative_config(config: Config) -> str:
    """Every setting as gin text; `load_config` of a file with it gives an equal config."""
    lines = []
    for name, part in PARTS.items():
        values = getattr(config, name)
        lines += [f"{part.__name__}.{field} = {getattr(values, field)!r}" for field in _fields(part)]
    return "\n".join(lines) + "\n"
