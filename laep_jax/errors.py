"""The one exception for what a user can get wrong."""


class UserError(ValueError):
    """A bad setting, file or plan. The message is one line naming the field, the value and the rule.

    Entry points print it without a traceback and exit with code 2.
    """


def require(condition: bool, field: str, value: object, rule: str) -> None:
    """Raises `UserError("{field}={value} {rule}")` unless `condition` holds."""
    if not condition:
        raise UserError(f"{field}={value!r} {rule}")
