"""`python -m benchmarks NAME`, in a checkout: a measurement on this machine, printed as a table or as JSON.

Each benchmark is a module with `run(arguments) -> dict`, which takes what follows its name and returns figures that
JSON can hold, and `table(result) -> str`, which shows them to people.
"""

import json
import signal
import sys
from collections.abc import Sequence

from laep_jax.commands import chosen
from laep_jax.errors import run_main

BENCHMARKS = {
    "memory": ("benchmarks.memory", "temporaries of the step by the size of its receive buffer, before and after"),
    "moe": ("benchmarks.moe", "the expert block against a dense SwiGLU on as many rows"),
    "peers": ("benchmarks.peers.throughput", "training throughput beside Hugging Face Transformers and MaxText"),
    "plan": ("benchmarks.plan", "the time of a plan, and its placement against EPLB and the lower bound"),
    "prune": ("benchmarks.prune", "the pause at a prune, part by part, and the rate of restoring"),
    "step": ("benchmarks.step", "a train step against the cores' matmul rate, by part; what the counts cost"),
    "straggler": (
        "benchmarks.straggler",
        "waiting for the most loaded device, before LAEP and after, against the plan",
    ),
}
USAGE = "usage: python -m benchmarks NAME [--json] ...\n\n{}\n\n`python -m benchmarks NAME --help` lists its options."


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark that `argv` begins with. `UserError` where there is none of that name."""
    benchmark = chosen(argv, BENCHMARKS, "benchmark", USAGE)
    if benchmark:
        result = benchmark.run([argument for argument in argv[1:] if argument != "--json"])
        print(json.dumps(result) if "--json" in argv else benchmark.table(result))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # a benchmark may have processes to end
    sys.exit(run_main(main, sys.argv[1:]))
