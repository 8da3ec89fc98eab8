"""Results as Markdown: ours beside the paper's, means over the seeds with their standard deviation.

A run is compared with its base of the same seed: what the seed does to both is not in the difference.
"""

import statistics
from collections.abc import Iterable, Sequence

from laep_jax.experiments.catalogue import Entry, Experiment
from laep_jax.experiments.results import Result

MISSING = "–"
BySeed = dict[int, Result]
Table = dict[str, BySeed]  # by row


def by_row(results: Iterable[Result]) -> Table:
    """The last result of each row and seed."""
    table: Table = {}
    for result in results:
        table.setdefault(result["row"], {})[result["seed"]] = result
    return table


def losses_table(experiment: Experiment, table: Table) -> str:
    """Parameters and held-out losses of an experiment's rows."""
    head = ("", "paper: parameters", "paper: loss", "change", "parameters", "experts kept", "loss", "change", "seeds")
    return markdown(head, [_cells(entry, experiment, table) for entry in experiment.entries])


def _cells(entry: Entry, experiment: Experiment, table: Table) -> list[str]:
    paper_base = next(other for other in experiment.entries if other.row == entry.base)
    ours, base = table.get(entry.row, {}), table.get(entry.base, {})
    of_itself = entry.row == entry.base
    return [
        entry.label,
        _share(entry.parameters, paper_base.parameters, of_itself, " B"),
        f"{entry.loss:.3f}" if entry.loss else MISSING,
        f"{entry.loss - paper_base.loss:+.3f}" if entry.loss and paper_base.loss and not of_itself else MISSING,
        _share(_mean(ours, "parameters", 1e-6), _mean(base, "parameters", 1e-6), of_itself, " M"),
        f"{statistics.fmean(sum(r['num_experts']) for r in ours.values()):.0f}" if ours else MISSING,
        spread([r["heldout_loss"] for r in ours.values()], ".4f"),
        spread(changes(ours, base), "+.4f") if not of_itself else MISSING,
        str(len(ours)) if ours else "0",
    ]


def changes(ours: BySeed, base: BySeed) -> list[float]:
    """Differences of the held-out loss, by seed that both have."""
    return [ours[seed]["heldout_loss"] - base[seed]["heldout_loss"] for seed in sorted(ours.keys() & base.keys())]


def _mean(by_seed: BySeed, field: str, factor: float) -> float | None:
    return statistics.fmean(result[field] * factor for result in by_seed.values()) if by_seed else None


def _share(value: float | None, base: float | None, of_itself: bool, unit: str) -> str:
    """A base's number, else the change against it."""
    if value is None or base is None:
        return MISSING
    return f"{value:.2f}{unit}" if of_itself else f"{value / base - 1:+.1%}"


def spread(values: Sequence[float], form: str) -> str:
    """Mean and standard deviation; of one value no deviation.

    >>> spread([1.0, 2.0], ".1f"), spread([1.0], ".1f"), spread([], ".1f")
    ('1.5 ± 0.7', '1.0', '–')
    """
    if not values:
        return MISSING
    text = f"{statistics.fmean(values):{form}}"
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):{form.lstrip('+')}}"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; the first column stands left, the others right."""
    lines = [head, ["---"] + ["--:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
