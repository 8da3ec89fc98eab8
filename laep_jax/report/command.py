"""`python -m laep_jax report RUN_DIR [--out DIR]`: draws a run's figures as PNG files."""

import argparse
from pathlib import Path

from matplotlib.figure import Figure

from laep_jax.errors import UserError
from laep_jax.files import refuse_links
from laep_jax.mirror import readable
from laep_jax.report import figures, loss_figures
from laep_jax.report.run_data import read_run

FIGURES = {
    "tokens_per_expert.png": figures.draw_tokens_per_expert,
    "cumulative_load.png": figures.draw_cumulative_load,
    "device_loads.png": figures.draw_device_loads,
    "load_heatmap.png": figures.draw_load_heatmap,
    "stability.png": figures.draw_stability,
    "loss.png": loss_figures.draw_loss,
    "domains.png": loss_figures.draw_domains,
}
DPI = 110


def main(argv: list[str]) -> int:
    """Draws all figures and prints their paths; `UserError` where the run directory does not read."""
    parser = argparse.ArgumentParser(prog="laep-jax report", description="Draws a run's figures as PNG files.")
    parser.add_argument("run_dir", help="directory of a training run, or its gs:// address")
    parser.add_argument("--out", type=Path, help="where the figures go (default: RUN_DIR/figures)")
    args = parser.parse_args(argv)
    with readable(args.run_dir) as folder:
        run = read_run(folder)
        if not args.out:
            refuse_links(folder)
        for name, draw in FIGURES.items():
            _save(draw(run), (args.out or folder / "figures") / name)
            print(f"{args.out or args.run_dir.rstrip('/') + '/figures'}/{name}")
    return 0


def _save(figure: Figure, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DPI)
    except OSError as error:
        raise UserError(f"--out={path.parent} cannot be written: {error.strerror}") from error
