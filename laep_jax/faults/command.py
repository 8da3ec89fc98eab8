"""`python -m laep_jax faults NAME`: this machine does harm to a tiny run, and the run must come out of it unharmed.

A module here has `run(arguments) -> dict`, counts that JSON can hold, and `table(result) -> str`. The exit code is 1
where the counts named in `MUST_BE_ZERO` are not 0.
"""

import importlib
import json
from collections.abc import Sequence

from laep_jax.errors import UserError

FAULTS = {
    "damage": ("laep_jax.faults.damage", "every file of a checkpoint damaged in turn, and random bits of it flipped"),
    "kill": ("laep_jax.faults.kill", "SIGKILL at random moments, half of them within a prune; one or two processes"),
}
MUST_BE_ZERO = ("wrong ends", "lost saves", "undetected", "unnamed")


def usage() -> str:
    lines = [f"  {name:<16} {text}" for name, (_, text) in FAULTS.items()]
    return "\n".join(["usage: python -m laep_jax faults NAME [--json] ...", "", *lines, "", "NAME --help tells more."])


def main(argv: Sequence[str]) -> int:
    """Runs what `argv` begins with. `UserError` where there is none of that name."""
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    if argv[0] not in FAULTS:
        raise UserError(f"there is no fault {argv[0]!r}; there are {', '.join(FAULTS)}")
    fault = importlib.import_module(FAULTS[argv[0]][0])
    result = fault.run([argument for argument in argv[1:] if argument != "--json"])
    print(json.dumps(result) if "--json" in argv else fault.table(result))
    return int(any(result.get(name) for name in MUST_BE_ZERO))
