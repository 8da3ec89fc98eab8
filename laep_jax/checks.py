"""What the dataclasses of `laep_jax.config` check of their fields; a refusal is a `UserError` that names the field."""

import math
import typing

from laep_jax.errors import require, require_type


def one_of(field: str, value: str, allowed: tuple[str, ...]) -> None:
    """Whether a text is one of those that have a meaning."""
    require(value in allowed, field, value, f"must be one of {', '.join(allowed)}")


def check_fields(config: object) -> None:
    """Types as annotated (lists become tuples, an int serves as a float), then finite numbers only."""
    name = type(config).__name__
    for field, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, field)
        if isinstance(value, list):
            value = tuple(value)
            object.__setattr__(config, field, value)
        require_type(f"{name}.{field}", value, hint)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and field != "alpha":
                require(math.isfinite(number), f"{name}.{field}", value, "must be a finite number")
            if isinstance(number, int):
                require(abs(number) < 2**31, f"{name}.{field}", value, "must be below 2**31")


def at_least(config: object, bound: float, *fields: str) -> None:
    """Of those that are not None."""
    for field in fields:
        value = getattr(config, field)
        if value is not None:
            require(value >= bound, f"{type(config).__name__}.{field}", value, f"must be at least {bound}")


def in_range(config: object, low: float, high: float, *fields: str) -> None:
    """Of those that are not None."""
    for field in fields:
        value = getattr(config, field)
        require(
            value is None or low <= value <= high,
            f"{type(config).__name__}.{field}",
            value,
            f"must lie between {low} and {high}",
        )
