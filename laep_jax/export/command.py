"""`python -m laep_jax export`: a run as a Hugging Face folder.

python -m laep_jax export RUN --to folder
"""

import argparse
from pathlib import Path

import jax

from laep_jax.checkpoint.saved import Saved
from laep_jax.commands import program
from laep_jax.export.folder import DTYPES, FORMS, choose_form, loads_in, write_folder
from laep_jax.model.accounting import model_size
from laep_jax.paths import require_path


def main(argv: list[str]) -> int:
    """Writes the folder and says what loads it. `UserError` where the form cannot hold the model."""
    parser = argparse.ArgumentParser(
        prog=program("export"), description="Writes a run's model as a Hugging Face folder, tensor by tensor."
    )
    add = parser.add_argument
    add("run", metavar="RUN", help="a run, by its directory or gs:// address, or one RUN/checkpoints/STEP of it")
    add("--to", type=Path, required=True, metavar="FOLDER", help="a new folder")
    add(
        "--form",
        choices=FORMS,
        default="auto",
        help="auto: the plainest that is exact; hetero: layers of their own sizes, with a modelling file; padded: "
        "ERNIE-4.5-MoE, filled up to the widest layer; uniform: Mixtral, Qwen3-MoE or OLMoE",
    )
    add("--dtype", choices=DTYPES, default="float32", help="of the weights (%(default)s)")
    add("--tokenizer", metavar="FILE", help="the run's tokenizer.json, where it is no longer where the run had it")
    args = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")  # a run may hold the others
    require_path("--to", str(args.to))
    saved = Saved(args.run)
    form = choose_form(saved, args.form)
    write_folder(saved, args.to, form=form, dtype=args.dtype, tokenizer=args.tokenizer)
    total = model_size(saved.config.model, sequence_length=1).total
    print(f"step {saved.step:,}, {total:,} parameters, form {form}: {loads_in(saved, form)}")
    print(f"wrote {args.to}; its README.md says how to load it")
    return 0
