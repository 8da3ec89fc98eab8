"""`python -m laep_jax preflight`: compiles a config for a TPU slice without having one.

python -m laep_jax preflight --gin_file=configs/paper/1515b.gin --topology=v5p:8x8x16

Exit code 0 if the step and the prune fit into the chips' memory and the step multiplies no more than 1.5 times what the
model needs, 1 if not, 2 on bad input.
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

from laep_jax.chips import CHIPS, find_chip
from laep_jax.commands import program
from laep_jax.errors import require
from laep_jax.gin_config import add_config_arguments, load_config, or_default, parse_arguments


def main(argv: Sequence[str]) -> int:
    """Compiles, prints, says by its exit code whether that is sound. `UserError` on bad input."""
    gin_files, bindings, rest = parse_arguments(argv)
    args = _parser().parse_args(rest)
    chip = find_chip(args.topology)
    require(args.slices >= 1, "--slices", args.slices, "must be at least 1")
    config = load_config(or_default(gin_files), bindings)
    os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX looks for devices of its own
    from laep_jax.preflight.run import as_json, preflight, table

    flight = preflight(config, chip, args.topology, slices=args.slices, loads=args.loads, save=args.save)
    print(json.dumps(as_json(flight)) if args.json else table(flight))
    return 0 if flight.sound else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program("preflight"),
        allow_abbrev=False,
        description="Compiles the train step and the prune of a config for TPU, and says what they need: minutes.",
    )
    known = f"v5p:4x4x12 or v5p-384, v6e:2x4 or v6e-8; chips: {', '.join(CHIPS)}"
    parser.add_argument("--topology", required=True, metavar="CHIP:SLICE", help=f"for example {known}")
    parser.add_argument(
        "--loads",
        metavar="COUNTS",
        help="file or run, as `plan` takes them: adds stragglers and the prune",
    )
    parser.add_argument(
        "--slices",
        type=int,
        default=1,
        metavar="N",
        help="such slices; `data` goes across (%(default)s)",
    )
    parser.add_argument("--save", type=Path, metavar="FILE", help="the step's executable, for `train.py --executable`")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_config_arguments(parser)
    return parser
