"""`laep-jax describe`: parameter and FLOP counts of a config, from shapes alone. Allocates nothing, needs no JAX."""

import argparse
import dataclasses
import itertools
import json
from collections.abc import Sequence

from laep_jax.commands import program
from laep_jax.gin_config import add_config_arguments, load_config, or_default, parse_arguments
from laep_jax.model.accounting import ModelSize, model_size


def main(argv: Sequence[str]) -> int:
    """Prints a table, or JSON with the fields of `ModelSize` as keys."""
    gin_files, bindings, rest = parse_arguments(argv)
    parser = argparse.ArgumentParser(
        prog=program("describe"),
        description="Counts the parameters, experts and FLOPs of a config's model.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_config_arguments(parser)
    as_json = parser.parse_args(rest).json
    config = load_config(or_default(gin_files), bindings)
    size = model_size(config.model, sequence_length=config.data.sequence_length)
    print(json.dumps(dataclasses.asdict(size)) if as_json else _table(size, config.data.sequence_length))
    return 0


def _table(size: ModelSize, sequence_length: int) -> str:
    runs = [(count, len(list(group))) for count, group in itertools.groupby(size.experts_per_layer)]
    rows = [
        ("parameters", f"{size.total:,}"),
        ("  without embeddings", f"{size.total_without_embeddings:,}"),
        ("active parameters", f"{size.active:,}"),
        ("  without embeddings", f"{size.active_without_embeddings:,}"),
        ("layers", f"{len(size.experts_per_layer):,}"),
        ("experts", f"{sum(size.experts_per_layer):,}"),
        ("experts per layer", ", ".join(f"{count} x {layers}" if layers > 1 else f"{count}" for count, layers in runs)),
        ("training FLOPs per token", f"{size.flops_per_token:,} at {sequence_length:,} tokens a sequence"),
    ]
    return "\n".join(f"{name:<26}{value}" for name, value in rows)
