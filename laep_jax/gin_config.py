"""gin at the edge: `.gin` files and `--gin.CLASS.FIELD=VALUE` become one checked `Config`.

The parser of the `gin-config` package reads statements and literals; nothing of its registry is used, so that a
config can neither import a module nor call anything: `import` and `@references` are refused. Macros hold
literals. The frozen dataclasses of `laep_jax.config` check types and ranges themselves. Includes are relative to
the file named on the command line, and lie in its folder or below.
"""

import argparse
import ast
import codecs
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from gin import config_parser

from laep_jax.commands import program
from laep_jax.config import Config
from laep_jax.errors import UserError, did_you_mean, nearest
from laep_jax.fields import settings_of
from laep_jax.files import read_bytes
from laep_jax.paths import expanded, require_path

MAX_TEXT = 2**15  # bytes of all files and bindings; the longest here has 2,000
PARTS: dict[str, type] = typing.get_type_hints(Config)
CLASSES = {part.__name__: part for part in PARTS.values()}
HERE = Path(__file__).parent
SHIPPED = HERE / "configs" if (HERE / "configs").is_dir() else HERE.parent / "configs"  # of a wheel, of a checkout
DEFAULT = "tiny"
COMMAND_LINE = "the command line"


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """What `parse_arguments` takes out of a command line, for the help of a command that reads a config."""
    group = parser.add_argument_group(
        "config", f"The defaults, then files, then settings. No file: --config={DEFAULT}."
    )
    group.add_argument("--config", metavar="NAME", help="a config that comes with laep_jax: tiny, paper/10b, ...")
    group.add_argument("--gin_file", metavar="FILE", help="a config of your own; may be given more than once")
    group.add_argument("--gin.CLASS.FIELD", metavar="VALUE", help=f"a setting; `{program('settings')}` lists them all")


def shipped(name: str) -> Path:
    """The file of a config that comes with laep_jax, by its path in `configs/` without `.gin`."""
    names = {path.relative_to(SHIPPED).with_suffix("").as_posix(): path for path in sorted(SHIPPED.rglob("*.gin"))}
    if name not in names:
        raise UserError(
            f"--config={name!r} does not come with laep_jax; {did_you_mean(name, names)} A file is --gin_file=FILE"
        )
    return names[name]


def or_default(files: Sequence[str]) -> Sequence[str]:
    """The files, or that of the config that every command takes where none is named."""
    return files or [str(shipped(DEFAULT))]


def parse_arguments(argv: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Splits a command line into files (`--gin_file`, `--config`), gin bindings and everything else, in order.

    >>> parse_arguments(["--gin_file=a.gin", "--gin.LaepConfig.alpha=hybrid", "--workdir", "x"])
    (['a.gin'], ["LaepConfig.alpha = 'hybrid'"], ['--workdir', 'x'])
    """
    files, bindings, rest = [], [], []
    waiting = list(argv)
    while waiting:
        argument = waiting.pop(0)
        name, equals, value = argument.partition("=")
        if name not in ("--gin_file", "--config") and not name.startswith("--gin."):
            owner = next((cls for cls in CLASSES if _hint(f"{cls}.{name[2:]}")), None)
            if owner and name.startswith("--"):
                raise UserError(f"{name} is a setting: --gin.{owner}.{name[2:]}=VALUE")
            rest.append(argument)
            continue
        if not equals:
            if not waiting:
                raise UserError(f"{name} needs a value: {name}=VALUE")
            value = waiting.pop(0)
        if name == "--gin_file":
            files.append(expanded(value))
        elif name == "--config":
            files.append(str(shipped(value)))
        else:
            selector = name.removeprefix("--gin.")
            bindings.append(f"{selector} = {_as_literal(value, is_text=_hint(selector) is str)}")
    return files, bindings, rest


def _hint(selector: str) -> Any:
    """The type of a field `CLASS.FIELD`, None where there is no such field."""
    part, _, field = selector.partition(".")
    return typing.get_type_hints(CLASSES.get(part, object)).get(field)


def _as_literal(text: str, *, is_text: bool) -> str:
    """A value as gin reads it: what is no Python literal, macro or reference is a string, as are numbers of a text."""
    if len(text) > MAX_TEXT:
        raise UserError(f"a setting of {len(text)} characters is above {MAX_TEXT}")
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text if text.startswith(("%", "@")) else repr(text)
    return repr(text) if is_text and not isinstance(value, str) else text


def load_config(
    gin_files: Sequence[str],
    bindings: Sequence[str] = (),
    defaults: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> Config:
    """The config that files and bindings describe, later ones over earlier ones.

    defaults: by class and field, in the place of those of the dataclasses.
    `UserError` on a file that is missing or does not parse, on files and bindings of more than MAX_TEXT bytes, on
    unknown classes and fields (with the nearest names), a binding without effect, and whatever the dataclasses refuse.
    """
    statements = _Statements()
    for file in gin_files:
        require_path("--gin_file", file)
        statements.read_file(Path(file).absolute(), f"--gin_file={file!r}", ())
    statements.read("\n".join(bindings), COMMAND_LINE, ())
    statements.require_effect()
    fields = {part: {**defaults.get(part, {}), **statements.fields(part)} for part in CLASSES}
    return Config(**{name: part(**fields[part.__name__]) for name, part in PARTS.items()})


class _Macro(typing.NamedTuple):
    name: str


class _Statements(config_parser.ParserDelegate):
    """What was read so far: values by class and field, and macros, which take effect at the end."""

    def __init__(self):
        self._bound: dict[str, dict[str, Any]] = {name: {} for name in CLASSES}
        self._macros: dict[str, Any] = {}
        self._idle: set[str] = set()  # macros of the command line, which are there to have an effect
        self._unknown: list[str] = []
        self._left = MAX_TEXT

    def configurable_reference(self, scoped_configurable_name, evaluate):
        raise ValueError(f"@{scoped_configurable_name} is a reference; a config holds values only")

    def macro(self, macro_name):  # type: ignore[override]
        return _Macro(macro_name)

    def read_file(self, path: Path, name: str, including: tuple[Path, ...]) -> None:
        """including: the files that led here, the one of the command line first."""
        if path in including:
            raise UserError(f"{name} includes itself")
        data = read_bytes(path, name, MAX_TEXT)
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in data:
            raise UserError(f"{name} is UTF-16, or no text; save it as UTF-8")
        try:
            text = data.decode("utf-8-sig")  # Windows begins UTF-8 with a mark
        except UnicodeDecodeError as error:
            raise UserError(f"{name} is not UTF-8: byte {error.start}; save it as UTF-8") from error
        self.read(re.sub("\r\n?", "\n", text), path.name, (*including, path))

    def read(self, text: str, where: str, including: tuple[Path, ...]) -> None:
        self._left -= len(text)
        if self._left < 0:
            raise UserError(f"{where}: the config as a whole is above {MAX_TEXT} characters")
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
            self._bind(scope, selector.removeprefix("laep_jax."), field, value, including)

    def _include(self, file: str, including: tuple[Path, ...]) -> None:
        name = f"include {file!r}"
        if not including:
            raise UserError(f"{name}: only a file can include another")
        folder = including[0].parent
        path = folder / file
        if "\0" in file or not path.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{name} leads out of the folder of {including[0].name}")
        self.read_file(path, name, including)

    def _bind(self, scope: str, selector: str, field: str, value: Any, including: tuple[Path, ...]) -> None:
        key = f"{selector}.{field}" if field else selector
        if scope:
            raise UserError(f"{scope}/{key}: scopes have no meaning here; write {key}")
        if not field:
            self._set_macro(selector, value, from_command_line=not including)
        elif selector not in CLASSES:
            self._unknown.append(f"there is no class {selector!r}; {did_you_mean(selector, CLASSES)}")
        elif field not in (fields := settings_of(CLASSES[selector])):
            near = did_you_mean(field, fields, "its fields are")
            self._unknown.append(f"{selector} has no field {field!r}; {near}")
        else:
            self._bound[selector][field] = value

    def _set_macro(self, name: str, value: Any, *, from_command_line: bool) -> None:
        if name in CLASSES:
            raise UserError(f"{name} is a class: write {name}.FIELD, FIELD being one of {', '.join(_fields(name))}")
        if any(_macros_in(value)):
            raise UserError(f"{name} is a macro, and holds another one")
        self._macros[name] = value
        if from_command_line:
            self._idle.add(name)

    def require_effect(self) -> None:
        """`UserError` naming everything unknown, a macro that is used but not set, or one meant to be a field."""
        fields = {field: f"{name}.{field}" for name in CLASSES for field in _fields(name)}
        used = {name for bound in self._bound.values() for value in bound.values() for name in _macros_in(value)}
        unused = self._macros.keys() - used  # by habit macros are capitals, and in a file overriding may idle them
        for name in sorted(unused):
            near = nearest(name, fields)
            if near or name in self._idle:
                question = f"did you mean {fields[near]}?" if near else "a setting is CLASS.FIELD"
                self._unknown.append(f"{name} is set but never used; {question}")
        self._unknown += [f"%{name} is used but never set" for name in sorted(used - self._macros.keys())]
        if self._unknown:
            raise UserError("; ".join(self._unknown))

    def fields(self, selector: str) -> dict[str, Any]:
        """The values of a class, macros replaced and paths expanded."""
        settings = settings_of(CLASSES[selector])
        values = {field: self._resolve(value) for field, value in self._bound[selector].items()}
        return {field: _expanded(value) if settings[field].path else value for field, value in values.items()}

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


def _expanded(value: Any) -> Any:
    """Every text in a value as a path."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_expanded, value))
    return expanded(value) if isinstance(value, str) else value


def _fields(name: str) -> list[str]:
    return list(settings_of(CLASSES[name]))


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
        lines += [f"{part.__name__}.{field} = {getattr(values, field)!r}" for field in settings_of(part)]
    return "\n".join(lines) + "\n"
