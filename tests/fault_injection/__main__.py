"""`python -m tests.fault_injection NAME`, in a checkout: faults injected into a tiny run, which must survive them.

What is printed are counts. The exit code is 1 where those named in `MUST_BE_ZERO` are not 0.
"""

import json
import sys
from collections.abc import Sequence

from laep_jax.commands import chosen
from laep_jax.errors import run_main

FAULTS = {
    "damage": (
        "tests.fault_injection.damage",
        "every file of a checkpoint damaged in turn, and random bits of it flipped",
    ),
    "kill": (
        "tests.fault_injection.kill",
        "SIGKILL at random moments, half of them within a prune; one or two processes",
    ),
}
MUST_BE_ZERO = ("wrong ends", "lost saves", "undetected", "unnamed")
USAGE = (
    "usage: python -m tests.fault_injection NAME [--json] ...\n\n{}\n\n"
    "`python -m tests.fault_injection NAME --help` lists its options."
)


def main(argv: Sequence[str]) -> int:
    """Injects the fault that `argv` begins with. `UserError` where there is none of that name."""
    fault = chosen(argv, FAULTS, "fault", USAGE)
    if not fault:
        return 0
    result = fault.run([argument for argument in argv[1:] if argument != "--json"])
    print(json.dumps(result) if "--json" in argv else fault.table(result))
    return int(any(result.get(name) for name in MUST_BE_ZERO))


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
