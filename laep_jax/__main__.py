"""`python -m laep_jax COMMAND`: training and the tools around it. Each command imports only what it needs."""

import sys
from collections.abc import Sequence

from laep_jax.commands import chosen
from laep_jax.errors import run_main

COMMANDS = {
    "train": ("laep_jax.training.command", "pre-trains a model, pruning it on the way; the same as train.py"),
    "launch": ("laep_jax.launch", "the training of several hosts, tried with processes of one machine"),
    "plan": (
        "laep_jax.laep.command",
        "which experts to prune and where to place the rest, from counts of any framework",
    ),
    "describe": ("laep_jax.model.command", "parameters, experts and FLOPs of a config, from shapes alone"),
    "preflight": ("laep_jax.preflight.command", "a config compiled for a TPU slice: memory, bounds, collectives"),
    "bench": ("laep_jax.bench.command", "measurements on this machine: speed, memory, plans, the pause at a prune"),
    "faults": ("laep_jax.faults.command", "harm done to a tiny run, which must come out of it unharmed"),
    "experiment": ("laep_jax.experiments.command", "the paper's experiments, small: runs, tables, figures"),
    "report": ("laep_jax.report.command", "figures of a run directory"),
    "train-tokenizer": ("laep_jax.data.command", "a BPE tokenizer trained on a corpus"),
}
USAGE = "usage: python -m laep_jax COMMAND ...\n\n{}\n\nCOMMAND --help tells more."


def dispatch(argv: Sequence[str]) -> int:
    """Runs the command that `argv` begins with."""
    command = chosen(argv, COMMANDS, "command", USAGE)
    return command.main(argv[1:]) if command else 0


def main() -> int:
    """The console script `laep-jax`."""
    return run_main(dispatch, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
