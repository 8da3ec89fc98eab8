"""`python -m laep_jax bench NAME`: a measurement on this machine, printed as a table or as JSON."""

import signal
import sys
from collections.abc import Sequence

from laep_jax.commands import run_chosen

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


def main(argv: Sequence[str]) -> int:
    """Runs the bench that `argv` begins with. `UserError` where there is none of that name."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # a bench may have processes to end
    run_chosen(argv, BENCHES, "bench", "bench")
    return 0
