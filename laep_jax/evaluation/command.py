"""`python -m laep_jax evaluate`: the loss of a run's model on its validation text or on any other.

python -m laep_jax evaluate RUN --data 'law/*.txt' --masked plan.json
"""

import argparse
import json
import os
from pathlib import Path

from laep_jax.checkpoint.saved import Saved
from laep_jax.commands import program
from laep_jax.config import DataConfig
from laep_jax.config_parts import SOURCES_WITH_PATH
from laep_jax.data.sources import read_documents
from laep_jax.errors import require
from laep_jax.evaluation.scoring import Score, read_text, score, total, validation_corpora
from laep_jax.files import MAX_JSON, read_bytes
from laep_jax.laep.plan import Plan
from laep_jax.sharding import make_cpu_devices
from laep_jax.switches import set_switches

WIDTH = 40  # characters of a domain's name


def main(argv: list[str]) -> int:
    """Prints loss and bits per byte by domain. `UserError` where the run or the text cannot be read."""
    args = _parser().parse_args(argv)
    for option, value in (("--source", args.source), ("--text-field", args.text_field)):
        require(args.data is not None or value is None, option, value, "needs --data")
    require(args.max_tokens > 0, "--max-tokens", args.max_tokens, "must be positive")
    set_switches()
    make_cpu_devices(args.cpu_devices)
    saved = Saved(args.run)
    plan = None
    if args.masked:
        plan = Plan.from_json(read_bytes(args.masked, str(args.masked), MAX_JSON).decode(errors="replace"))
        counts = saved.num_experts
        require(
            plan.num_experts == counts, f"experts of {args.masked}", plan.num_experts, f"are not the run's {counts}"
        )
    tokenizer = saved.tokenizer(args.tokenizer)
    if args.data is not None:
        corpora = [read_documents(DataConfig(args.source or "text", args.data, args.text_field or "text"))]
    else:
        corpora = validation_corpora(saved.config)
    text = read_text(corpora, tokenizer, args.max_tokens)
    scores = score(saved, text, tokenizer, plan)
    print(as_json(saved, scores) if args.json else table(saved, scores, bool(plan)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program("evaluate"),
        description="The loss of a run's model, by domain; without --data on the run's own validation text.",
    )
    add = parser.add_argument
    add("run", metavar="RUN", help="a run, by its directory or gs:// address, or one RUN/checkpoints/STEP of it")
    add("--data", metavar="PATH", help="a file, folder or glob, also gs://; a domain is a folder of it")
    add("--source", choices=SOURCES_WITH_PATH, help="what --data holds (text)")
    add("--text-field", metavar="NAME", help="the field or column of --data that holds the text (text)")
    add("--masked", type=Path, metavar="PLAN", help="a plan.json, whose pruned experts are masked")
    add(
        "--max-tokens",
        type=int,
        default=10**9,
        metavar="N",
        help="tokens after which no other document is read (%(default)s)",
    )
    add("--tokenizer", metavar="FILE", help="the run's tokenizer.json, where it is no longer where the run had it")
    add(
        "--cpu-devices",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="emulated devices, without accelerators (%(default)s)",
    )
    add("--json", action="store_true", help="print JSON")
    return parser


def table(saved: Saved, scores: dict[str, Score], masked: bool) -> str:
    """The scores for people."""
    lines = [
        f"{saved.run}, step {saved.step}" + (", with the experts of the plan masked" if masked else ""),
        f"{'domain':<{WIDTH}}{'tokens':>12}{'bytes':>12}{'nats/token':>12}{'bits/byte':>11}",
    ]
    rows = [*scores.items(), ("all", total(scores))] if len(scores) > 1 else [*scores.items()]
    for name, each in rows:
        numbers = f"{each.targets:>12,}{each.bytes:>12,}{each.loss:>12.4f}{each.bits_per_byte:>11.4f}"
        lines.append(f"{name[:WIDTH]:<{WIDTH}}{numbers}")
    return "\n".join(lines)


def as_json(saved: Saved, scores: dict[str, Score]) -> str:
    """The scores for programs."""

    def values(each: Score) -> dict[str, float]:
        return {"tokens": each.targets, "bytes": each.bytes, "loss": each.loss, "bits_per_byte": each.bits_per_byte}

    by_domain = {name: values(each) for name, each in scores.items()}
    return json.dumps({"run": saved.run, "step": saved.step} | values(total(scores)) | {"domains": by_domain})
