"""Progress lines and status of a run, and the table at its end.

On a terminal one line that is renewed in place; elsewhere (a file, a pipe, a notebook) one plain line
every `log_every` steps. Whatever happens on the way (a prune, a checkpoint, a validation loss) is a line
that stays. The table compares the model before and after its prunes, as the paper's Tables 3 to 5 do.

Axes: L layers.
"""

import contextlib
import itertools
import sys
import textwrap
import typing
from collections.abc import Callable, Sequence

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.table import Table
from rich.text import Text

from laep_jax.tracking.summary import Summary

COUNTS_WIDTH = 26  # of the expert counts in the closing table
LOSS_AT_PRUNE = "validation loss at the prune"
AT_END = ("validation loss at the end", "  in bits per byte")
Row = tuple[str, str, str, str]


class RunConsole:
    """The progress of one run; a context manager that gives the terminal back on any exit.

    num_steps: where the run ends. log_every: rhythm of the plain lines. peak_gflops: of all devices
    together; with it the speed reads as a share of the peak (MFU). show: False on every process but
    the first. console: where to, by default standard output.
    """

    def __init__(
        self,
        num_steps: int,
        *,
        log_every: int,
        peak_gflops: float | None = None,
        show: bool = True,
        console: Console | None = None,
    ):
        self._num_steps = num_steps
        self._log_every = log_every
        self._peak_gflops = peak_gflops
        out = typing.cast(typing.IO[str], _Output())
        self._console = console or (Console(file=out) if show else Console(quiet=True, force_terminal=False))
        self._state = ""
        self._seconds: float | None = None
        self._live = None
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False)

    def __enter__(self) -> "RunConsole":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exception) -> None:
        if self._live:
            self._live.stop()

    def state(self, text: str) -> None:
        """Sets the text on the stability test that the next progress lines carry."""
        self._state = text

    def train(self, step: int, record: dict) -> None:
        """Shows one step. record: the fields of a `train` record of metrics.jsonl."""
        seconds = record["step_seconds"]
        if seconds is not None:  # smoothed over some ten steps
            self._seconds = seconds if self._seconds is None else 0.9 * self._seconds + 0.1 * seconds
        parts = progress_parts(step, self._num_steps, record, self._peak_gflops)
        left = [] if self._seconds is None else [f"{duration((self._num_steps - step) * self._seconds)} left"]
        parts += [part for part in (self._state, *left) if part]
        if self._live:
            self._live.update(_Parts(parts), refresh=True)
        elif step % self._log_every == 0 or step == self._num_steps:
            self.event("  ".join(parts))

    def event(self, text: str) -> None:
        """Prints one line that stays."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def closing_table(self, summary: Summary) -> None:
        """Ends the progress line and prints the table of a finished run, see `closing_table`."""
        self.__exit__()
        self._console.print(closing_table(summary))


class _Output:
    """Standard output as it is at each call. A disk that is full or a reader that is gone ends no run.

    What the encoding lacks is escaped, as a folder's name in other letters.
    """

    def write(self, text: str) -> int:
        encoding = sys.stdout.encoding or "utf-8"
        with contextlib.suppress(OSError, ValueError):  # ValueError: closed
            sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()

    def __getattr__(self, name: str) -> typing.Any:
        return getattr(sys.stdout, name)


class _Parts:
    """Short texts in as few lines as the terminal's width allows, broken between them only."""

    def __init__(self, parts: Sequence[str]):
        self._parts = parts

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        line = ""
        for part in self._parts:
            if line and len(line) + 2 + len(part) > options.max_width:
                yield Text(line)
                line = ""
            line = f"{line}  {part}" if line else part
        yield Text(line, no_wrap=True, overflow="ellipsis")


def progress_parts(step: int, num_steps: int, record: dict, peak_gflops: float | None = None) -> list[str]:
    """The texts of one progress line, from a `train` record of metrics.jsonl.

    Imbalance is max / mean of the loads, of the layer where that is worst.
    """
    gflops, speed = record["gflops_per_second"], record["tokens_per_second"]
    parts = [
        f"step {step:>{len(str(num_steps))}}/{num_steps}",
        f"epoch {_number(record['epochs'], '.2f')}",
        f"loss {_number(record['loss'], '.4f')}",
        f"{_number(speed, ',.0f')} tokens/s",
        f"MFU {_number(gflops and 100 * gflops / peak_gflops, '.1f')} %"
        if peak_gflops
        else f"{_number(gflops, ',.1f')} GFLOP/s",
    ]
    worst = {}
    for name in ("expert", "device"):
        imbalance = [value for value in record[f"{name}_imbalance"] if value is not None]
        worst[name] = _number(max(imbalance, default=None), ".2f")
    return [*parts, f"imbalance experts {worst['expert']}, devices {worst['device']} (worst layer)"]


def duration(seconds: float) -> str:
    """
    >>> duration(62.4), duration(3 * 3600 + 60)
    ('1:02', '3:01:00')
    """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def run_lengths(counts: Sequence[int]) -> str:
    """Expert counts layer by layer, equal neighbours together.

    >>> run_lengths([16, 16, 16, 16]), run_lengths([8, 12, 12, 4])
    ('16x4', '8,12x2,4')
    """
    runs = [(count, len(list(group))) for count, group in itertools.groupby(counts)]
    return ",".join(f"{count}x{length}" if length > 1 else str(count) for count, length in runs)


def closing_table(summary: Summary) -> Group:
    """The table at the end of a run, as a `rich` renderable.

    `_before` is before the first change of the experts, `_after` at the end of the run, `validation_loss_*_prune` of
    the last plan; a dash is what was not measured.
    """
    changed = bool(summary.prune_steps)
    table = Table("", "before", "after", "change") if changed else Table("", "model")
    for name, before, after, change in _rows(summary):
        if changed:
            table.add_row(name, before, after, change)
        else:
            table.add_row(name, after if name in AT_END else before)
    return Group(Text(_history(summary)), table)


def _history(summary: Summary) -> str:
    """What the run did to its experts, and why where it pruned none."""
    text = f"{summary.steps:,} steps, {summary.tokens:,} tokens{_epochs(summary.epochs_by_source)}"
    if not summary.prune_steps:
        return f"{text}; nothing was pruned\nnot pruned, since {summary.not_pruned}"
    return f"{text}; pruned after step " + ", ".join(f"{step:,}" for step in summary.prune_steps)


def _epochs(by_source: dict[str, float]) -> str:
    """How often the training text was read, source by source where there are several."""
    if len(by_source) < 2:
        return "".join(f", {epochs:.2f} epochs" for epochs in by_source.values())
    return f" (epochs: {', '.join(f'{name} {epochs:.2f}' for name, epochs in by_source.items())})"


def _rows(summary: Summary) -> list[Row]:
    """(quantity, before, after, change), each as text."""

    def pair(name: str) -> tuple:
        return getattr(summary, f"{name}_before"), getattr(summary, f"{name}_after")

    def mean(name: str) -> tuple:
        return tuple(values and sum(values) / len(values) for values in pair(name))

    def worst(name: str) -> tuple:
        return tuple(values and max(values) for values in pair(name))

    return [
        _row("parameters", pair("parameters"), _size, _percent),
        _row("experts per layer", pair("experts"), _counts, lambda before, after: _percent(sum(before), sum(after))),
        ("device imbalance, max / mean:", "", "", ""),
        _row("  mean over layers", mean("device_imbalance"), "{:.3f}".format, _difference),
        _row("  worst layer", worst("device_imbalance"), "{:.3f}".format, _difference),
        _row("  as rebalanced, mean", mean("levelled_imbalance"), "{:.3f}".format, _difference),
        _row("  as rebalanced, worst", worst("levelled_imbalance"), "{:.3f}".format, _difference),
        *(_loss_at_prune(summary) if summary.prune_steps else []),
        # Without a change: steps of training lie between, and no run without the prune is there to compare with.
        (AT_END[0], "", _number(summary.validation_loss_end, ".4f"), ""),
        (AT_END[1], "", _number(summary.validation_bits_per_byte_end, ".4f"), ""),
        _row("step time", pair("step_seconds"), "{:.3f} s".format, lambda before, after: f"x {after / before:.3f}"),
    ]


def _loss_at_prune(summary: Summary) -> list[Row]:
    """The last prune's effect on the same model at the same step, and the domain that it cost most."""
    losses = summary.validation_loss_before_prune, summary.validation_loss_after_prune
    steps = summary.prune_steps
    label = LOSS_AT_PRUNE if len(steps) == 1 else f"{LOSS_AT_PRUNE} of step {steps[-1]:,}"
    by_domain = _worst_domain(summary.validation_loss_by_domain, summary.validation_targets_by_domain)
    return [_row(label, losses, "{:.4f}".format, _difference), *by_domain, *_most_lost(summary)]


def _most_lost(summary: Summary) -> list[Row]:
    """The domain of which most tokens went to the pruned experts, mean over the layers."""
    shares = {name: sum(of) / len(of) for name, of in summary.pruned_share_by_domain.items()}
    if not shares:
        return []
    name = max(shares, key=lambda name: shares[name])
    return [(f"  tokens on pruned experts, most in {name}", f"{shares[name]:.1%}", "", "")]


def _worst_domain(losses: dict[str, dict[str, float | None]], targets: dict[str, int]) -> list[Row]:
    """The domain whose validation loss rose most at the prune, if there was one."""
    before, after = losses.get("before_prune", {}), losses.get("after_prune", {})
    rises = {
        name: (then, now)
        for name, then in before.items()  # other batches since may have other domains
        if then is not None and (now := after.get(name)) is not None and name in targets
    }
    if not rises:
        return []
    name = max(rises, key=lambda name: rises[name][1] - rises[name][0])
    return [_row(f"  most in {name} ({targets[name]:,} targets)", rises[name], "{:.4f}".format, _difference)]


def _row(name: str, values: tuple, show: Callable[..., str], change: Callable[..., str]) -> Row:
    """One row from the values before and after, a dash for one that is None."""
    before, after = values
    known = before is not None and after is not None
    texts = ["-" if value is None else show(value) for value in values]
    return name, texts[0], texts[1], change(before, after) if known else ""


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _size(value: int) -> str:
    for scale, unit in ((1e9, "B"), (1e6, "M")):
        if value >= scale:
            return f"{value / scale:,.3f} {unit}"
    return f"{value:,}"


def _counts(counts: Sequence[int]) -> str:
    """`run_lengths`, in lines that end behind a comma."""
    return "\n".join(textwrap.wrap(run_lengths(counts).replace(",", ", "), COUNTS_WIDTH)).replace(", ", ",")


def _percent(before: float, after: float) -> str:
    return f"{100 * (after / before - 1):+.1f} %"


def _difference(before: float, after: float) -> str:
    return f"{after - before:+.4f}"
