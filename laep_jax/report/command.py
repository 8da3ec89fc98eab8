"""`python -m laep_jax report RUN [RUN] [--out DIR] [--follow]`: draws a run as PNG files and as one HTML page."""

import argparse
import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from laep_jax.commands import program
from laep_jax.errors import UserError, require
from laep_jax.files import refuse_links, replace_file
from laep_jax.mirror import readable
from laep_jax.report import facts, figures, loss_figures
from laep_jax.report.page import REFRESH_SECONDS, page
from laep_jax.report.run_data import RunData, read_run

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
REPORT, COMPARISON = "report.html", "comparison.html"


def main(argv: list[str]) -> int:
    """Draws and prints the paths of what it wrote; `UserError` where a run directory does not read."""
    parser = argparse.ArgumentParser(prog=program("report"), description="Draws a run as PNG files and an HTML page.")
    parser.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        help="a run's directory or gs:// address; two are compared",
    )
    parser.add_argument("--out", type=Path, help="where the files go (default: RUN/report.html and RUN/figures)")
    parser.add_argument(
        "--follow",
        action="store_true",
        help=f"renew the page every {REFRESH_SECONDS} s until the run is complete",
    )
    args = parser.parse_args(argv)
    require(len(args.runs) <= 2, "RUN", len(args.runs), "runs: one is drawn, or two side by side")
    if args.follow:
        return _follow(args.runs, args.out)
    with contextlib.ExitStack() as stack:
        folders = [stack.enter_context(readable(run)) for run in args.runs]
        if not args.out:
            refuse_links(folders[0])
        runs = _read(args.runs, folders)
        if len(runs) == 1:
            for name, draw in FIGURES.items():
                _save(draw(runs[0]), (args.out or folders[0] / "figures") / name)
                print(f"{args.out or args.runs[0].rstrip('/') + '/figures'}/{name}")
        _write_page(runs, args.out or folders[0], refresh=False)
        print(f"{args.out or args.runs[0].rstrip('/')}/{_page_name(runs)}")
    return 0


def _read(given: Sequence[str], folders: Sequence[Path]) -> list[RunData]:
    """Each run has the name of its folder, of two alike the whole path; what is read of a bucket is elsewhere."""
    names = [Path(run).resolve().name for run in given]
    names = names if len(set(names)) == len(names) else given
    return [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def _page_name(runs: Sequence[RunData]) -> str:
    return REPORT if len(runs) == 1 else COMPARISON


def _follow(names: Sequence[str], out: Path | None) -> int:
    """Renews the page until the runs are complete, or Ctrl-C. Reports once why one does not read yet."""
    folders = [Path(name) for name in names]
    for name, folder in zip(names, folders, strict=True):
        require(folder.is_dir(), "--follow", name, "is no directory on this machine")
    said = ""
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            try:
                if not out:
                    refuse_links(folders[0])
                runs = _read(names, folders)
            except UserError as error:  # before the first checkpoint
                text, complete = f"{error}; tried again", False
            else:
                complete = all(map(facts.is_complete, runs))
                _write_page(runs, out or folders[0], refresh=not complete)
                text = f"{out or folders[0]}/{_page_name(runs)}"
            if text != said:
                print(text, flush=True)
                said = text
            if complete:
                break
            time.sleep(REFRESH_SECONDS)
    return 0


def _write_page(runs: Sequence[RunData], folder: Path, *, refresh: bool) -> None:
    """Replaces the page at once, so that a browser never reads half of one."""
    text = page(runs, refresh=refresh).encode()
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / _page_name(runs), lambda file: file.write(text))


def _save(figure: Figure, path: Path) -> None:
    with _writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DPI)


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"--out={folder} cannot be written: {error.strerror}") from error
