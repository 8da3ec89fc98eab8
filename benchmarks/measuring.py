"""What benchmarks share: one option, processes of their own, and a batch of random tokens.

The number of emulated devices and malloc's pages are settled when a process begins, hence the processes.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

import numpy as np

from laep_jax.errors import require


def parse_repetitions(arguments: Sequence[str], benchmark: str, description: str, default: int) -> int:
    """`--repetitions` of each form, of a benchmark that has no other option. `UserError` where it is below 1."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks {benchmark}", description=description)
    parser.add_argument("--repetitions", type=int, default=default, metavar="N", help="of each form (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    repetitions = parser.parse_args(arguments).repetitions
    require(repetitions >= 1, "--repetitions", repetitions, "must be at least 1")
    return repetitions


def in_process(module: str, *arguments: object, environment: Mapping[str, str] | None = None) -> dict:
    """The JSON that a module prints as a program; what the caller's environment says goes before `environment`."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    variables = dict(environment or {}) | os.environ
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=variables).stdout)


def random_batch(rng: np.random.Generator, vocab_size: int, rows: int, length: int) -> dict[str, np.ndarray]:
    """Uniformly random tokens, int32 [rows, length], each row one document."""
    tokens = rng.integers(0, vocab_size, (rows, length + 1), dtype=np.int32)
    return {
        "tokens_BS": tokens[:, :-1],
        "targets_BS": tokens[:, 1:],
        "segments_BS": np.ones((rows, length), np.int32),
        "positions_BS": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
    }
