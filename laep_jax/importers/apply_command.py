"""`python -m laep_jax apply`: prunes the experts of a Hugging Face model by a plan. Needs NumPy only.

python -m laep_jax apply --plan plan.json --model folder --out smaller
"""

import argparse
from pathlib import Path

from laep_jax.commands import program
from laep_jax.files import MAX_JSON, read_bytes
from laep_jax.importers.apply import LINEAGE, apply_plan, loads_in, read_config
from laep_jax.importers.families import FAMILIES
from laep_jax.laep.plan import Plan


def main(argv: list[str]) -> int:
    """Writes the folder and says who loads it. `UserError` where the plan is for another model."""
    parser = argparse.ArgumentParser(
        prog=program("apply"),
        description="Prunes the experts of a Hugging Face folder of safetensors by a plan, shard by shard.",
        epilog=f"Families, by model_type: {', '.join(FAMILIES)}. {LINEAGE} says which experts are left.",
    )
    add = parser.add_argument
    add("--plan", type=Path, required=True, metavar="FILE", help="a plan.json of `plan`, or of a run")
    add("--model", type=Path, required=True, metavar="FOLDER", help="config.json and safetensors")
    add("--out", type=Path, required=True, metavar="FOLDER", help="a new folder")
    add("--pad", action="store_true", help="fill all layers up to the widest with experts that are never chosen")
    args = parser.parse_args(argv)
    plan = Plan.from_json(read_bytes(args.plan, str(args.plan), MAX_JSON).decode(errors="replace"))
    model_type = read_config(args.model)["model_type"]
    counts = apply_plan(plan, args.model, args.out, pad=args.pad)
    kept, loads = sum(plan.num_experts_after), loads_in(model_type, counts, padded=args.pad)
    print(f"{kept:,} of {sum(plan.num_experts):,} experts in {len(counts)} layers; {loads}")
    print(f"wrote {args.out}")
    return 0
