"""`python -m experiments NAME`: one of the paper's experiments, run small.

    python -m experiments table1 --seeds 0,1,2

Its rows are training runs of `experiments/configs/`, which are run one after the other as far as their results are not
kept yet: three to eight minutes a row and seed on two cores. Started again after an interruption it resumes. Then it
draws tables and figures; a README.md beside the results has its tables filled in. `NAME` may be `tables`: everything is
drawn again, and nothing is run.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.catalogue import EXPERIMENTS, Experiment
from experiments.drawing import draw, filled
from experiments.measured import measure
from experiments.results import FILE, FOLDER, read_results
from experiments.rows import load_row
from experiments.runner import RunFailedError, Runner
from experiments.tables import by_row
from laep_jax.errors import UserError, run_main
from laep_jax.gin_config import parse_arguments


def main(argv: Sequence[str]) -> int:
    """Runs what is missing and draws. `UserError` on a name or an option that there is not."""
    gin_files, bindings, rest = parse_arguments(argv)
    args = _parser().parse_args(rest)
    if args.list or not args.name:
        print("\n".join(_listed(name, experiment) for name, experiment in EXPERIMENTS.items()))
        return 0
    if gin_files:
        raise UserError("--gin_file: the rows have files of their own; --gin.CLASS.FIELD=VALUE changes all of them")
    if args.name == "tables":
        if not (args.out / FILE).is_file():
            raise UserError(f"--out={str(args.out)!r} holds no {FILE}")
        chosen = list(EXPERIMENTS)
    elif args.name in EXPERIMENTS:
        chosen = [args.name]
        entries = [e for e in EXPERIMENTS[args.name].entries if args.only in (None, e.row)]
        if not entries:
            known = ", ".join(entry.row for entry in EXPERIMENTS[args.name].entries)
            raise UserError(f"--only={args.only!r} is no row of {args.name}; there are {known}")
        rows = [load_row(entry.row, seed, args.scale, bindings) for seed in args.seeds for entry in entries]
        try:
            Runner(args.out).run(rows)
        except RunFailedError as error:
            print(error, file=sys.stderr)
            return error.code
        measure(args.name, EXPERIMENTS[args.name], args.out)
    else:
        raise UserError(f"there is no experiment {args.name!r}; there are {', '.join(EXPERIMENTS)}, tables")
    table, document = by_row(read_results(args.out)), args.out / "README.md"
    for name in chosen:
        text = draw(name, table, args.out)
        print(f"{EXPERIMENTS[name].title}\n\n{text}")
        if document.is_file():
            document.write_text(filled(document.read_text(encoding="utf-8"), name, f"\n{text}"), encoding="utf-8")
    return 0


def _seeds(text: str) -> list[int]:
    return [int(seed) for seed in text.split(",")]


def _listed(name: str, experiment: Experiment) -> str:
    return f"{name:<12}{experiment.title}\n{'':<12}{', '.join(entry.row for entry in experiment.entries)}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments",
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("name", nargs="?", metavar="NAME", help="an experiment, or `tables`")
    add("--list", action="store_true", help="the experiments and their rows")
    add("--seeds", type=_seeds, default=[0, 1, 2], metavar="A,B", help="seeds to run, one after the other (0,1,2)")
    add("--only", metavar="ROW", help="this row, and what it branches from")
    add("--out", type=Path, default=FOLDER, metavar="DIR", help="results, tables, figures, runs (experiments/results)")
    add(
        "--scale", default="", metavar="NAME", help="settings for another machine: a file of experiments/configs/scales"
    )
    add("--gin.CLASS.FIELD", metavar="VALUE", help="a setting of every row, over what its file says")
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
