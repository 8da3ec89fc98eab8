"""`laep-jax COMMAND`, in a checkout `python -m laep_jax COMMAND`: training and the tools around it.

Each command imports only what it needs.
"""

import sys
from collections.abc import Sequence

import laep_jax
from laep_jax.commands import chosen, program
from laep_jax.errors import run_main

COMMANDS = {
    "train": ("laep_jax.training.command", "pre-trains a model, pruning it on the way; the same as train.py"),
    "launch": ("laep_jax.launch", "the training of several hosts, tried with processes of one machine"),
    "plan": (
        "laep_jax.laep.command",
        "which experts to prune and where to place the rest, from counts of any framework",
    ),
    "counts": ("laep_jax.importers.command", "counts for `plan` from what Megatron-LM, SGLang, vLLM and others log"),
    "apply": ("laep_jax.importers.apply_command", "applies a plan to a Hugging Face model of safetensors"),
    "evaluate": ("laep_jax.evaluation.command", "the loss of a run's model on any text, by domain; also under a plan"),
    "generate": ("laep_jax.evaluation.generate_command", "text that a run's model writes after a prompt"),
    "export": ("laep_jax.export.command", "a run's model as a Hugging Face folder"),
    "settings": ("laep_jax.settings", "every setting of a config: type, default, values, meaning"),
    "describe": ("laep_jax.model.command", "parameters, experts and FLOPs of a config, from shapes alone"),
    "preflight": (
        "laep_jax.preflight.command",
        "a config compiled for a TPU slice: memory, bounds, collectives (minutes)",
    ),
    "report": ("laep_jax.report.command", "figures and an HTML page of a run directory"),
    "train-tokenizer": ("laep_jax.data.command", "a BPE tokenizer trained on a corpus"),
}
USAGE = "usage: {0} [--version] COMMAND ...\n\n{{}}\n\n`{0} COMMAND --help` tells more."


def dispatch(argv: Sequence[str]) -> int:
    """Runs the command that `argv` begins with."""
    if argv and argv[0] == "--version":
        print(f"laep_jax {laep_jax.__version__}")
        return 0
    command = chosen(argv, COMMANDS, "command", USAGE.format(program("").rstrip()))
    return command.main(argv[1:]) if command else 0


def main() -> int:
    """The console script `laep-jax`."""
    return run_main(dispatch, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
