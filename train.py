"""The program: `python train.py --help` tells its use. The same as `python -m laep_jax train`."""

import sys

from laep_jax.errors import run_main
from laep_jax.training.command import main

if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
