"""`laep-jax settings`: every setting with its type, default, values and meaning, as a text or as a JSON Schema."""

import argparse
import dataclasses
import json
import shutil
import textwrap
import types
import typing
from collections.abc import Sequence
from typing import Any

from laep_jax.commands import program
from laep_jax.config import Config
from laep_jax.errors import UserError, did_you_mean, type_name
from laep_jax.fields import Setting, settings_of

PARTS: dict[str, Any] = typing.get_type_hints(Config)
JSON_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null"}
DRAFT = "https://json-schema.org/draft/2020-12/schema"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=program("settings"),
        allow_abbrev=False,
        description="Lists every setting, of one class or of all: its type, default, values and meaning. `fixed` is"
        " what a run keeps from its first step to its last, `free` what may change when it is resumed.",
    )
    parser.add_argument("cls", nargs="?", metavar="CLASS", help=", ".join(part.__name__ for part in PARTS.values()))
    parser.add_argument(
        "--json-schema", action="store_true", help="print a JSON Schema of config.json, or of the class"
    )
    arguments = parser.parse_args(argv)
    classes = {part.__name__: part for part in PARTS.values()}
    if arguments.cls not in (None, *classes):
        raise UserError(f"there is no class {arguments.cls!r}; {did_you_mean(arguments.cls, classes)}")
    if arguments.json_schema:
        schema = _class_schema(classes[arguments.cls]) if arguments.cls else config_schema()
        print(json.dumps({"$schema": DRAFT} | schema, indent=1))
    else:
        if not arguments.cls:
            print("Defaults of a config file that names no other. Without a file `train` reads --config=tiny.\n")
        chosen = [classes[arguments.cls]] if arguments.cls else classes.values()
        print("\n\n".join(_text(part, shutil.get_terminal_size().columns) for part in chosen))
    return 0


def _text(part: type, width: int) -> str:
    hints = typing.get_type_hints(part)
    lines = [f"{part.__name__}: {(part.__doc__ or '').splitlines()[0]}"]
    for name, setting in settings_of(part).items():
        facts = [f"{type_name(hints[name])} = {getattr(part, name)!r}", setting.values]
        facts.append("fixed" if setting.fixed else "free")
        lines.append(f"  {name}: {'; '.join(fact for fact in facts if fact)}")
        lines += textwrap.wrap(setting.meaning, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def config_schema() -> dict[str, Any]:
    """The JSON Schema of `Config.to_dict()`; a part or a field that is left out has its default."""
    return {
        "title": "laep_jax.config.Config",
        "type": "object",
        "additionalProperties": False,
        "properties": {name: _class_schema(part) for name, part in PARTS.items()},
    }


def _class_schema(part: Any) -> dict[str, Any]:
    hints, settings, defaults = typing.get_type_hints(part), settings_of(part), dataclasses.asdict(part())
    fields = {
        name: _type_schema(hints[name], setting)
        | {"default": defaults[name], "description": f"{setting.meaning} ({'fixed' if setting.fixed else 'free'})"}
        for name, setting in settings.items()
    }
    return {
        "title": part.__name__,
        "description": part.__doc__,
        "type": "object",
        "additionalProperties": False,
        "properties": fields,
    }


def _type_schema(hint: Any, setting: Setting) -> dict[str, Any]:
    if isinstance(hint, types.UnionType):
        return {"anyOf": [_type_schema(part, setting) for part in typing.get_args(hint)]}
    if typing.get_origin(hint) is tuple:
        items = [_type_schema(part, setting) for part in typing.get_args(hint) if part is not ...]
        if ... in typing.get_args(hint):
            return {"type": "array", "items": items[0]}
        return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}
    schema: dict[str, Any] = {"type": JSON_TYPES[hint]}
    if hint is str and setting.choices:
        schema["enum"] = list(setting.choices)
    if hint in (int, float):
        bounds = {
            "minimum": setting.low,
            "maximum": setting.high,
            "exclusiveMinimum": setting.above,
            "exclusiveMaximum": setting.below,
        }
        schema |= {word: bound for word, bound in bounds.items() if bound is not None}
    return schema
