"""`python -m laep_jax plan`: a plan from token counts that any framework has logged. Needs NumPy only.

python -m laep_jax plan --counts counts.npz --expert-parallel 8 --top-k 2 --alpha hybrid --beta 0.1 --out plan.json
"""

import argparse
import functools
from pathlib import Path

from laep_jax.config import LaepConfig
from laep_jax.errors import UserError
from laep_jax.laep.counts import FORMS, describe, read_counts
from laep_jax.laep.placement import METHODS
from laep_jax.laep.plan import make_plan
from laep_jax.laep.pruning import ESTIMATORS, INEQUALITIES, ROUNDINGS
from laep_jax.laep.recorded_loads import read_current_counts
from laep_jax.laep.runs import cost_of_merging


def main(argv: list[str]) -> int:
    """Reads counts, prints what they are and the plan as a table, writes it as JSON. `UserError` on bad input."""
    args = _parser().parse_args(argv)
    if args.counts.is_dir():
        counts, source = read_current_counts(args.counts)
        print(source)
    else:
        counts = read_counts(args.counts)
    print("\n".join(describe(counts, args.top_k)))
    make = functools.partial(
        make_plan,
        counts,
        expert_parallel=args.expert_parallel,
        top_k=args.top_k,
        alpha=_alpha(args.alpha),
        beta=args.beta,
        estimator=args.estimator,
        inequality=args.inequality,
        rounding=args.rounding,
        placement=args.placement,
    )
    plan = make(max_runs=args.max_runs)
    print(plan.table())
    if args.max_runs:
        print(cost_of_merging(make().num_experts_after, plan.num_experts_after, args.max_runs))
    if args.out:
        try:
            args.out.write_text(plan.to_json(), encoding="utf-8")
        except OSError as error:
            raise UserError(f"--out={args.out} cannot be written: {error.strerror}") from error
        print(f"wrote {args.out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="laep-jax plan",
        description="Which experts to prune and where to place the others, from recorded token counts.",
    )
    required = parser.add_argument_group("required")
    required.add_argument(
        "--counts",
        type=Path,
        required=True,
        metavar="FILE",
        help=f"{FORMS}; or the directory of a run, for a plan that fits its model as it now is",
    )
    required.add_argument("--expert-parallel", type=int, required=True, metavar="G", help="devices to spread over")
    required.add_argument("--top-k", type=int, required=True, metavar="K", help="experts chosen for each token")
    add = parser.add_argument
    add(
        "--alpha",
        default=LaepConfig.alpha,
        help="number, inf, hybrid, or one number a layer: 0.2,0.4,inf (%(default)s)",
    )
    add("--beta", type=float, default=LaepConfig.beta, help="largest share of a layer's tokens to prune (%(default)s)")
    for name, allowed, text in (
        ("estimator", ESTIMATORS, "decide in each iteration, or on the mean loads"),
        ("inequality", INEQUALITIES, "of both bounds"),
        ("rounding", ROUNDINGS, "where the survivors do not divide, keep more or fewer"),
        ("placement", METHODS, "of the survivors on the devices"),
    ):
        add(f"--{name}", choices=allowed, default=getattr(LaepConfig, name), help=f"{text} (%(default)s)")
    add(
        "--max-runs",
        type=int,
        metavar="R",
        help="keep more experts, so that neighbouring layers form at most R equal runs",
    )
    add(
        "--out", type=Path, metavar="FILE", help="where to write the plan as JSON; without it only the table is printed"
    )
    return parser


def _alpha(text: str) -> float | str | tuple[float, ...]:
    if text == "hybrid":
        return text
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(f"--alpha={text!r} must be a number, inf, hybrid or numbers with commas between") from error
    return numbers if len(numbers) > 1 else numbers[0]
