"""The program: `python train.py --help` tells its use. The same as `laep-jax train`."""

import sys

from laep_jax.commands import load
from laep_jax.errors import run_main

if __name__ == "__main__":
    sys.exit(run_main(lambda argv: load("laep_jax.training.command").main(argv), sys.argv[1:]))
