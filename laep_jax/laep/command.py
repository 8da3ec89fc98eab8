"""`python -m laep_jax plan`: a plan from token counts that any framework has logged. Needs NumPy only.

python -m laep_jax plan --counts counts.npz --expert-parallel 8 --top-k 2 --alpha hybrid --beta 0.1 --out plan.json
"""

import argparse
import os.path
import typing
from pathlib import Path

import numpy as np

from laep_jax.commands import program
from laep_jax.config import LaepConfig
from laep_jax.errors import UserError, require
from laep_jax.fields import settings_of
from laep_jax.laep.counts import FORMS, describe, read_domains, require_counts
from laep_jax.laep.plan import make_plan
from laep_jax.laep.recorded_loads import read_counts_or_run
from laep_jax.laep.rule import SETTINGS, PruneRule
from laep_jax.paths import is_bucket

TYPES = {float: float, float | None: float, int | None: int}


def main(argv: list[str]) -> int:
    """Reads counts, prints what they are and the plan as a table, writes it as JSON. `UserError` on bad input."""
    args = _parser().parse_args(argv)
    counts, domains, told = _read(args.counts)
    print("\n".join([*told, *describe(counts, args.top_k)]))
    require_counts(counts)
    args.alpha = _alpha(args.alpha)
    rule = PruneRule.from_settings(args, len(counts), top_k=args.top_k, expert_parallel=args.expert_parallel)
    require(
        rule.domain_beta is None or bool(domains), "--domain-beta", rule.domain_beta, "needs counts of several domains"
    )
    if args.target_experts is not None:
        settings_of(LaepConfig)["target_experts"].check("--target-experts", args.target_experts)
    plan = make_plan(counts, rule, replica_slots=args.replica_slots, domains=domains, target=args.target_experts)
    print(plan.table())
    if args.out:
        try:
            args.out.write_text(plan.to_json(), encoding="utf-8")
        except OSError as error:
            raise UserError(f"--out={args.out} cannot be written: {error.strerror}") from error
        print(f"wrote {args.out}")
    return 0


def _read(files: list[str]) -> tuple[list[np.ndarray], dict[str, list[np.ndarray]], list[str]]:
    """Counts [N, E] of each layer, their sums [E] by domain, and words on where they are from."""
    named = [_named(text) for text in files]
    names = [name for name, _ in named]
    require(len(names) == 1 or "" not in names, "--counts", files, "must be NAME=FILE where there are several")
    require(len({*names}) == len(names), "--counts", files, "names a domain twice")
    if names == [""]:
        path = named[0][1]
        by_domain = {} if is_bucket(path) or os.path.isdir(path) else read_domains(Path(path))  # a name may be too long
        if not by_domain:
            counts, source = read_counts_or_run(path)
            return counts, {}, [source] if source else []
    else:
        by_domain = {name: read_counts_or_run(path)[0] for name, path in named}
    widths = {name: tuple(tokens_NE.shape[1] for tokens_NE in counts) for name, counts in by_domain.items()}
    require(len({*widths.values()}) == 1, "experts by layer of the domains", widths, "are not the same")
    domains = {name: [tokens_NE.sum(axis=0) for tokens_NE in counts] for name, counts in by_domain.items()}
    told = f"{len(by_domain)} domains, added up: {', '.join(by_domain)}"
    if len({len(counts[0]) for counts in by_domain.values()}) > 1:
        told += "; as one iteration, since they have different numbers of them"
        by_domain = {name: [tokens_E[None] for tokens_E in tokens] for name, tokens in domains.items()}
    return [np.sum(layer, axis=0) for layer in zip(*by_domain.values(), strict=True)], domains, [told]


def _named(text: str) -> tuple[str, str]:
    """("law", "law.npz") of "law=law.npz"; without a name where the text is a file, or has no "="."""
    name, separator, file = text.partition("=")
    return ("", text) if not separator or os.path.exists(text) else (name, file)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program("plan"),
        description="Which experts to prune and where to place the others, from recorded token counts.",
        epilog="--alpha takes one number a layer as 0.2,0.4,inf.",
    )
    required = parser.add_argument_group("required")
    required.add_argument(
        "--counts",
        action="append",
        required=True,
        metavar="[NAME=]FILE",
        help=f"{FORMS}; or a run, by its directory or gs:// address, for a plan that fits its model as it now is. "
        "NAME=FILE, repeated: of several domains",
    )
    required.add_argument("--expert-parallel", type=int, required=True, metavar="G", help="devices to spread over")
    required.add_argument("--top-k", type=int, required=True, metavar="K", help="experts chosen for each token")
    _add_settings(parser)
    add = parser.add_argument
    add(
        "--replica-slots",
        type=int,
        default=0,
        metavar="R",
        help="slots of each device for replicas of hot experts; 0 is the paper (%(default)s)",
    )
    add("--target-experts", type=float, metavar="N", help=settings_of(LaepConfig)["target_experts"].meaning)
    add(
        "--out", type=Path, metavar="FILE", help="where to write the plan as JSON; without it only the table is printed"
    )
    return parser


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """An option for each setting of the rule, as `LaepConfig` states it."""
    hints, stated = typing.get_type_hints(LaepConfig), settings_of(LaepConfig)
    for name in SETTINGS:
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=TYPES.get(hints[name], str),
            choices=stated[name].choices if hints[name] is str else None,  # alpha may be a number as well
            default=getattr(LaepConfig, name),
            help=f"{stated[name].meaning} (%(default)s)",
        )


def _alpha(text: str) -> float | str | tuple[float, ...]:
    if text == "hybrid":
        return text
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(f"--alpha={text!r} must be a number, inf, hybrid or numbers with commas between") from error
    return numbers if len(numbers) > 1 else numbers[0]
