"""`python -m laep_jax faults NAME`: this machine does harm to a tiny run, and the run must come out of it unharmed.

What is returned are counts. The exit code is 1 where those named in `MUST_BE_ZERO` are not 0.
"""

from collections.abc import Sequence

from laep_jax.commands import run_chosen

FAULTS = {
    "damage": ("laep_jax.faults.damage", "every file of a checkpoint damaged in turn, and random bits of it flipped"),
    "kill": ("laep_jax.faults.kill", "SIGKILL at random moments, half of them within a prune; one or two processes"),
}
MUST_BE_ZERO = ("wrong ends", "lost saves", "undetected", "unnamed")


def main(argv: Sequence[str]) -> int:
    """Runs what `argv` begins with. `UserError` where there is none of that name."""
    result = run_chosen(argv, FAULTS, "fault", "faults")
    return int(any(result.get(name) for name in MUST_BE_ZERO))
