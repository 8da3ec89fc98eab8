"""`python -m laep_jax counts`: token counts for `plan` from what other programs log. Needs NumPy only.

python -m laep_jax counts --from megatron tokens_per_expert/rank*.jsonl --out counts.npz
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from laep_jax.commands import program
from laep_jax.errors import UserError, require
from laep_jax.importers.formats import FORMATS
from laep_jax.laep.load import FIELD, as_counts


def main(argv: list[str]) -> int:
    """Reads, prints what it read, writes. `UserError` on what is no log of that kind."""
    parser = argparse.ArgumentParser(
        prog=program("counts"),
        description="Token counts for `plan` from what other programs log.",
        epilog="\n".join(f"{name}: {read.__doc__}" for name, read in FORMATS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--from", dest="form", required=True, choices=FORMATS, help="the form of the files, see below")
    add("files", type=Path, nargs="+", metavar="FILE", help="in the order of the ranks, or of the iterations")
    add("--out", type=Path, required=True, metavar="FILE", help="the .npz file to write")
    add(
        "--num-experts",
        type=int,
        metavar="E",
        help="of a layer; by default as many as there are, or the highest id + 1",
    )
    add("--top-k", type=int, metavar="K", help="experts of a token, for router logits")
    args = parser.parse_args(argv)
    for name in ("num_experts", "top_k"):
        require(
            getattr(args, name) is None or getattr(args, name) > 0, f"--{name}", getattr(args, name), "must be positive"
        )
    counts_ids = args.form in ("megatron-trace", "vllm-ids", "csv")
    require(args.num_experts is None or counts_ids, "--num-experts", args.num_experts, f"is not for --from {args.form}")
    counts = FORMATS[args.form](args.files, args.num_experts, args.top_k)
    kept = {name: tokens_NE for name, tokens_NE in counts.items() if tokens_NE.any()}
    require(bool(kept), "layers with tokens", 0, "are too few")
    layers = as_counts([*kept.values()])
    widths = sorted({tokens_NE.shape[1] for tokens_NE in layers})
    print(f"{len(layers)} layers x {' to '.join(map(str, widths))} experts, {len(layers[0])} iterations")
    if idle := [name for name in counts if name not in kept]:
        print(f"left out, since they have no tokens: layers {', '.join(idle)}")
    _save(args.out, layers)
    print(f"wrote {args.out}")
    return 0


def _save(path: Path, layers: list[np.ndarray]) -> None:
    alike = len({tokens_NE.shape[1] for tokens_NE in layers}) == 1
    arrays: dict[str, Any] = (
        {FIELD: np.stack(layers, axis=1)} if alike else {f"layer_{i}": of for i, of in enumerate(layers)}
    )
    try:
        with path.open("wb") as file:
            np.savez(file, **arrays)
    except OSError as error:
        raise UserError(f"--out={path} cannot be written: {error.strerror}") from error
