"""Metadata of a config field, at its definition: default, meaning, allowed values, and whether it may change.

`fixed` makes a field that is the same from a run's first step to its last, `free` one that may change on resuming.
`check_fields` refuses a value that the field does not allow; `laep_jax.settings` prints what the fields state.
"""

import dataclasses
import math
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from laep_jax.errors import require, require_type
from laep_jax.paths import require_path

_KEY = "setting"


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a field states beside its type and default.

    `low`, `high`: bounds of a number that include the bound; `above`, `below`: that do not. `choices`: the texts that
    have a meaning. `path`: a text that names a file or folder; an empty one names none where that is the default. Of a
    tuple every text keeps the rules of a path. `bucket`: a path that may be in a bucket of Cloud Storage.
    """

    meaning: str
    fixed: bool
    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    path: bool = False
    bucket: bool = False

    def check(self, name: str, value: object) -> None:
        """`UserError` unless the field called `name` may hold `value`, which has its type; None needs no bounds."""
        if isinstance(value, str):
            require(not self.choices or value in self.choices, name, value, f"must be {_one_of(self.choices)}")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            if isinstance(value, int):
                require(abs(value) < 2**31, name, value, "must be below 2**31")
            require(math.isfinite(value), name, value, "must be a finite number")
            require(self._holds(value), name, value, f"must {self._rule()}")

    def _holds(self, number: float) -> bool:
        return (
            (self.low is None or number >= self.low)
            and (self.high is None or number <= self.high)
            and (self.above is None or number > self.above)
            and (self.below is None or number < self.below)
        )

    def _rule(self) -> str:
        if self.low is not None and self.high is not None:
            return f"lie between {self.low} and {self.high}"
        if self.above == 0 and self.below is None:
            return "be positive"
        bounds = {"at least": self.low, "at most": self.high, "above": self.above, "below": self.below}
        return "be " + " and ".join(f"{word} {bound}" for word, bound in bounds.items() if bound is not None)

    @property
    def values(self) -> str:
        """The range and the choices in words, "" where any value of the type is allowed."""
        ranges = [self._rule().removeprefix("lie ").removeprefix("be ")]
        return ", or ".join(part for part in [*ranges, _one_of(self.choices) if self.choices else ""] if part)


def _one_of(choices: tuple[str, ...]) -> str:
    return f"one of {', '.join(choices)}"


def fixed(default: Any, meaning: str, **values: Any) -> Any:
    """A field that shapes, batches or every number of a run depend on. values: fields of `Setting`."""
    return dataclasses.field(default=default, metadata={_KEY: Setting(meaning, True, **values)})


def free(default: Any, meaning: str, **values: Any) -> Any:
    """A field that says how to go on, where files are, or what is decided in steps to come; otherwise as `fixed`."""
    return dataclasses.field(default=default, metadata={_KEY: Setting(meaning, False, **values)})


def settings_of(config: Any) -> Mapping[str, Setting]:
    """What each field of a config dataclass, or of an instance of one, states; by the field's name."""
    return {field.name: field.metadata[_KEY] for field in dataclasses.fields(config)}


def check_fields(config: Any) -> None:
    """Types as annotated (lists become tuples at any depth, an int serves as a float), then what each field allows."""
    hints = typing.get_type_hints(type(config))
    for field, setting in settings_of(config).items():
        name, value = f"{type(config).__name__}.{field}", tuples(getattr(config, field))
        object.__setattr__(config, field, value)
        require_type(name, value, hints[field])
        for item in _leaves(value):
            setting.check(name, item)
            if setting.path and isinstance(item, str) and value != getattr(type(config), field):
                require_path(name, item, bucket=setting.bucket)


def tuples(value: Any) -> Any:
    """JSON's lists as tuples, at any depth."""
    return tuple(map(tuples, value)) if isinstance(value, (list, tuple)) else value


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple):
        for item in value:
            yield from _leaves(item)
    else:
        yield value
