"""`python -m laep_jax bench NAME`: a measurement on this machine, printed as a table or as JSON.

A bench is a module with `run(arguments) -> dict`, which takes what stands behind NAME and returns figures
that JSON can hold, and `table(result) -> str`, which shows them to people.
"""

import importlib
import json
import signal
import sys
from collections.abc import Sequence

from laep_jax.errors import UserError

BENCHES = {
    "memory": ("laep_jax.bench.memory", "temporaries of the step by the size of its receive buffer, before and after"),
    "moe": ("laep_jax.bench.moe", "the expert block against a dense SwiGLU on as many rows"),
    "peers": ("laep_jax.bench.peers", "training throughput beside Hugging Face Transformers and MaxText"),
    "plan": ("laep_jax.bench.plan", "the time of a plan, and its placement against EPLB and the lower bound"),
    "prune": ("laep_jax.bench.prune", "the pause at a prune, part by part, and the rate of restoring"),
    "step": ("laep_jax.bench.step", "a train step against the cores' matmul rate, by part; what the counts cost"),
    "straggler": (
        "laep_jax.bench.straggler",
        "waiting for the fullest device, before LAEP and after, against the plan",
    ),
}


def usage() -> str:
    lines = [f"  {name:<16} {text}" for name, (_, text) in BENCHES.items()]
    return "\n".join(["usage: python -m laep_jax bench NAME [--json] ...", "", *lines, "", "NAME --help tells more."])


def main(argv: Sequence[str]) -> int:
    """Runs the bench that `argv` begins with. `UserError` where there is none of that name."""
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    if argv[0] not in BENCHES:
        raise UserError(f"there is no bench {argv[0]!r}; there are {', '.join(BENCHES)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # a bench may have processes to end
    bench = importlib.import_module(BENCHES[argv[0]][0])
    result = bench.run([argument for argument in argv[1:] if argument != "--json"])
    print(json.dumps(result) if "--json" in argv else bench.table(result))
    return 0
