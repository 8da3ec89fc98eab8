"""gin at the edge: `.gin` files and `--gin.CLASS.FIELD=VALUE` become one checked `Config`.

The `gin-config` package parses files, includes and macros; the frozen dataclasses of `laep_jax.config`
check types and ranges themselves. Includes are relative to the file named on the command line.
"""

import ast
import contextlib
import dataclasses
import difflib
import importlib.util  # gin 0.5.0 uses it without importing it
import re
import typing
from collections.abc import Sequence
from pathlib import Path

import gin

from laep_jax.config import Config
from laep_jax.errors import UserError

assert importlib.util
PARTS: dict[str, type] = typing.get_type_hints(Config)
CLASSES = {part.__name__: part for part in PARTS.values()}
for _name, _part in CLASSES.items():
    gin.external_configurable(_part, _name, module="laep_jax")


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
    try:
        ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text if text.startswith(("%", "@")) else repr(text)
    return text


def load_config(gin_files: Sequence[str], bindings: Sequence[str] = ()) -> Config:
    """The config that files and bindings describe, later ones over earlier ones.

    `UserError` on a file that is missing or does not parse, an unknown class or field (with the
    nearest name), a binding without effect, and whatever the dataclasses refuse.
    """
    gin.clear_config()
    try:
        for file in gin_files:
            if not Path(file).is_file():
                raise UserError(f"--gin_file={file!r} is not a file")
            with contextlib.chdir(Path(file).absolute().parent):
                gin.parse_config_file(Path(file).name, print_includes_and_imports=False)
        gin.parse_config(list(bindings))
        _check_macros(gin.config_str())
        parts = {name: part(**gin.get_bindings(part.__name__)) for name, part in PARTS.items()}
    except UserError:
        raise
    except (ValueError, SyntaxError, OSError, ImportError) as error:
        raise UserError(_one_line(error)) from error
    finally:
        gin.clear_config()
    return Config(**parts)


def _check_macros(config_text: str) -> None:
    """A scope, or a macro that nothing uses, would be accepted in silence; one without value, with a traceback."""
    bound = re.findall(r"^([\w./]+) *=", config_text, re.MULTILINE)
    used = re.findall(r"(?<![\w'\"])%(\w+)", config_text)
    for name in used:
        if name not in bound:
            raise UserError(f"%{name} is used but never set")
    for name in bound:
        if "/" in name:
            raise UserError(f"{name}: scopes have no meaning here; write {name.rpartition('/')[2]}")
        if "." not in name and name not in used:  # by habit macros are capitals, and overriding may idle them
            fields = {field: cls for cls, part in CLASSES.items() for field in _fields(part)}
            if near := _nearest(name, fields):
                raise UserError(f"{name} is set but never used; did you mean {fields[near]}.{near}?")


def _fields(part: type) -> list[str]:
    return [field.name for field in dataclasses.fields(part)]


def _nearest(name: str, names: typing.Iterable[str]) -> str | None:
    found = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return found[0] if found else None


def _one_line(error: Exception) -> str:
    """gin's message in one line; names that do not exist come with the nearest that does."""
    text = " ".join(str(error).split())
    where = " ".join(re.findall(r"In (?:file|bindings string).*", text))
    if unknown := re.search(r"Configurable '(\S+)' doesn't have a parameter named '(\S+)'", text):
        part = CLASSES[unknown[1].rpartition(".")[2]]
        near = _nearest(unknown[2], _fields(part))
        fields = f"did you mean {near}?" if near else f"its fields are {', '.join(_fields(part))}"
        return f"{part.__name__} has no field {unknown[2]!r}; {fields} {where}".strip()
    if unknown := re.search(r"No configurable matching '(\S+?)'", text):
        near = _nearest(unknown[1].rpartition(".")[2], CLASSES)
        classes = f"did you mean {near}?" if near else f"there are {', '.join(CLASSES)}"
        return f"there is no class {unknown[1]!r}; {classes} {where}".strip()
    if unquoted := re.search(r"Failed to parse token '(\w+)'", text):
        return f"{unquoted[1]} is no Python literal; text stands in quotes {where}".strip()
    return f"config does not parse: {text}"


def operative_config(config: Config) -> str:
    """Every setting as gin text; `load_config` of a file with it gives an equal config."""
    lines = []
    for name, part in PARTS.items():
        values = getattr(config, name)
        lines += [f"{part.__name__}.{field} = {getattr(values, field)!r}" for field in _fields(part)]
    return "\n".join(lines) + "\n"
