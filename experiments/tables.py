"""Results as Markdown: ours beside the paper's, means over the seeds with their standard deviation.

A run is compared with its base of the same seed: what the seed does to both is not in the difference.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence

from experiments import phases
from experiments.catalogue import Entry, Experiment
from experiments.results import PRUNED_SHARE, Result

MISSING = "–"
ACCURACIES, BITS = ("laep_next_line", "laep_identifier"), "laep_bits_per_byte"
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # by number of seeds
BySeed = dict[int, Result]
Table = dict[str, BySeed]  # by row


def by_row(results: Iterable[Result]) -> Table:
    """The last result of each row and seed."""
    table: Table = {}
    for result in results:
        table.setdefault(result["row"], {})[result["seed"]] = result
    return table


def losses_table(experiment: Experiment, table: Table) -> str:
    """Parameters and validation losses of an experiment's rows; of the paper's what it has."""
    head = ("", "paper: parameters", "paper: loss", "change", "parameters", "experts kept", "loss", "change")
    head = (*head, "by seed", "at the prune")
    rows = [_cells(entry, experiment, table) for entry in experiment.entries]
    empty = [column for column in (1, 2, 3, 9) if all(row[column] == MISSING for row in rows)]
    shown = [column for column in range(len(head)) if column not in empty]
    return markdown([head[column] for column in shown], [[row[column] for column in shown] for row in rows])


def _cells(entry: Entry, experiment: Experiment, table: Table) -> list[str]:
    paper_base = experiment.base(entry)
    ours, base = table.get(entry.row, {}), table.get(entry.base, {})
    of_itself = entry.row == entry.base
    in_paper = [(entry.parameters, paper_base.parameters)] if entry.parameters and paper_base.parameters else []
    losses = [result["validation_loss"] for _, result in sorted(ours.items())]
    parameters = [(mine["parameters"] / 1e6, theirs["parameters"] / 1e6) for mine, theirs in _pairs(ours, base)]
    return [
        entry.label,
        _share(in_paper, of_itself, " B"),
        f"{entry.loss:.3f}" if entry.loss else MISSING,
        f"{entry.loss - paper_base.loss:+.3f}" if entry.loss and paper_base.loss and not of_itself else MISSING,
        _share(parameters, of_itself, " M"),
        f"{statistics.fmean(sum(r['num_experts']) for r in ours.values()):.0f}" if ours else MISSING,
        spread(losses, ".4f"),
        spread(changes(ours, base), "+.4f") if not of_itself else MISSING,
        single(losses, ".3f") if of_itself else single(changes(ours, base), "+.3f"),
        spread(_at_the_prune(ours), "+.3f"),
    ]


def _at_the_prune(ours: BySeed) -> list[float]:
    """What a prune changes of the validation loss at once."""
    field = "validation_loss_{}_prune".format
    return [r[field("after")] - r[field("before")] for _, r in sorted(ours.items()) if r["cuts"]]


def scores_table(experiment: Experiment, table: Table, paper: Mapping[str, float]) -> str:
    """Accuracies in %, and bits per byte, of the rows that are scored. paper: its average over tasks by row, in %."""
    rows = [
        _score_cells(entry, table.get(entry.row, {}), table.get(entry.base, {}), paper) for entry in experiment.entries
    ]
    head = ("", "paper: average", "change", "next line", "identifier", "average", "change", "as in the paper?")
    return markdown((*head, "by seed", "bits per byte", "change"), rows)


def _score_cells(entry: Entry, ours: BySeed, base: BySeed, paper: Mapping[str, float]) -> list[str]:
    of_itself, theirs = entry.row == entry.base, paper[entry.row] - paper[entry.base]
    average = [accuracy(result) for _, result in sorted(ours.items())]
    change = [accuracy(result) - accuracy(other) for result, other in _pairs(ours, base)]
    bits = [result["scores"][BITS] - other["scores"][BITS] for result, other in _pairs(ours, base)]
    return [
        entry.label,
        f"{paper[entry.row]:.2f}",
        MISSING if of_itself else f"{theirs:+.2f}",
        *(spread([100 * result["scores"][task] for result in ours.values()], ".1f") for task in ACCURACIES),
        spread(average, ".1f"),
        MISSING if of_itself else spread(change, "+.1f"),
        MISSING if of_itself or not change else verdict(theirs, change),
        single(average, ".1f") if of_itself else single(change, "+.1f"),
        spread([result["scores"][BITS] for result in ours.values()], ".3f"),
        MISSING if of_itself else spread(bits, "+.3f"),
    ]


def accuracy(result: Result) -> float:
    """Mean over the tasks that have one, in %."""
    return 100 * statistics.fmean(result["scores"][task] for task in ACCURACIES)


def verdict(paper: float, ours: Sequence[float]) -> str:
    """Whether changes, by seed, have the sign of the paper's, where their mean differs from zero.

    That is by Student's t at 5 %, two-sided.

    >>> [verdict(0.2, ours) for ours in ([1.0, 1.1, 1.2], [-1.0, -1.1, -1.2], [1.0, -0.1, 1.2], [1.0])]
    ['agrees', 'disagrees', 'cannot tell', 'cannot tell']
    """
    number, mean = len(ours), statistics.fmean(ours)
    if number < 2 or abs(mean) <= T_95.get(number, min(T_95.values())) * statistics.stdev(ours) / number**0.5:
        return "cannot tell"
    return "agrees" if mean * paper > 0 else "disagrees"


def phases_table(experiment: Experiment, table: Table) -> str:
    """When the stability test fires, and how much the loads, and the set to prune, still change before and after."""
    head = ("", "test fires at step", "tokens moved at 100", "at 250", "at the end")
    head = (*head, "regret at 250", "rank correlation at 100", "at 250", "at the end")
    head = (*head, "overlap with the last set at 100", "at 250", "when the test fires")
    head = (*head, "largest load at 100", "at the end", "seeds")
    return markdown(head, [_phases_cells(entry, table.get(entry.row, {})) for entry in experiment.entries])


def _phases_cells(entry: Entry, by_seed: BySeed) -> list[str]:
    results = list(by_seed.values())
    fires = [phases.stable_step(result) for result in results]
    moved = [phases.largest_change(result, "moved") for result in results]
    regret = [phases.largest_change(result, "regret")[250] for result in results]
    correlations = [phases.correlations(result) for result in results]
    overlaps = [phases.overlaps_with_last(result) for result in results]
    largest = [phases.largest_load(result) for result in results]
    return [
        entry.label,
        _steps(fires),
        *(spread([by_step[step] for by_step in moved], ".2f") for step in (100, 250)),
        spread([by_step[max(by_step)] for by_step in moved], ".2f"),
        spread(regret, ".2f"),
        *(spread([by_step[step] for by_step in correlations], ".2f") for step in (100, 250)),
        spread([by_step[max(by_step)] for by_step in correlations], ".2f"),
        *(spread([by_step[step] for by_step in overlaps], ".2f") for step in (100, 250)),
        spread([by_step[step] for by_step, step in zip(overlaps, fires, strict=True) if step], ".2f"),
        spread([by_step[100] for by_step in largest], ".1f"),
        spread([by_step[max(by_step)] for by_step in largest], ".1f"),
        str(len(results)),
    ]


def _steps(steps: Sequence[int | None]) -> str:
    """Every run's step."""
    return ", ".join("never" if step is None else str(step) for step in steps) or MISSING


def speeds_table(experiment: Experiment, table: Table, num_devices: int, paper: Mapping[str, float]) -> str:
    """Speed of whole steps, and what it is of the base's. paper: its TFLOPS a device by row."""
    rows = []
    for entry in experiment.entries:
        ours, base = table.get(entry.row, {}), table.get(entry.base, {})
        ratios = [mine["tokens_per_second"] / theirs["tokens_per_second"] for mine, theirs in _pairs(ours, base)]
        speeds = (
            f"{paper[entry.row]:.2f}",
            f"{paper[entry.row] / paper[entry.base]:.2f}",
            spread([r["gflops_per_second"] / num_devices for r in ours.values()], ".2f"),
            spread([r["tokens_per_second"] for r in ours.values()], ".0f"),
        )
        rows.append([entry.label, *speeds, spread(ratios, ".2f")])
    head = ("", "paper: TFLOPS a device", "over base", "GFLOP/s a device", "tokens/s, all", "over base")
    return markdown(head, rows)


def measured_table(
    columns: Mapping[str, str], measured: BySeed, labels: Mapping[str, str], paper: Mapping[str, float]
) -> str:
    """What was measured of rows or placements, over the seeds it was measured for.

    columns: titles by field, of which the first is shown by seed too; labels: by name, as far as it has another; paper:
    numbers by name, of the first column.
    """
    first, *others = columns
    names = list(next(iter(measured.values()))[first]) if measured else []
    head = ["", *(["paper"] if paper else []), columns[first], "by seed", *(columns[field] for field in others)]
    rows = []
    for name in names:
        theirs = [f"{paper[name]:.3f}" if name in paper else MISSING] if paper else []
        ours = {field: [result[field][name] for _, result in sorted(measured.items())] for field in columns}
        of_first = [spread(ours[first], ".3f"), single(ours[first], ".2f")]
        rows.append([labels.get(name, name), *theirs, *of_first, *(spread(ours[field], ".3f") for field in others)])
    return markdown(head, rows)


def hottest_table(experiment: Experiment, table: Table, num_devices: int) -> str:
    """How many times the mean load of a device the most loaded expert of any layer has, at the end of each run.

    Above one, no placement of the experts, each in one place, gives all devices the same load.
    """
    rows = []
    for entry in experiment.entries:
        ratios = [phases.hottest_expert(result, num_devices) for _, result in sorted(table.get(entry.row, {}).items())]
        rows.append([entry.label, single(ratios, ".2f")])
    return markdown(("", "hottest expert over the mean device load, worst layer, by seed"), rows)


def domains_table(table: Table, of_base: str, rows: Sequence[str], fewest: int) -> str:
    """Changes of the validation loss against a base by domain, of the domains with at least so many targets.

    Where a row knows it, also which share of the domain's tokens went to the experts that it pruned.
    """
    base = table.get(of_base, {})
    targets = next(iter(base.values()))["validation_targets_by_domain"] if base else {}
    names = sorted((name for name in targets if targets[name] >= fewest), key=lambda name: -targets[name])
    field, cells = "validation_loss_by_domain", []
    for name in names:
        line = [name, f"{targets[name]:,}"]
        for row in rows:
            pairs = _pairs(table.get(row, {}), base)
            line.append(spread([mine[field][name] - theirs[field][name] for mine, theirs in pairs], "+.3f"))
        shares = [[r[PRUNED_SHARE][name] for r in table.get(row, {}).values() if PRUNED_SHARE in r] for row in rows]
        line += [spread(of_row, ".1%") for of_row in shares if of_row]
        cells.append(line)
    known = [row for row in rows if any(PRUNED_SHARE in result for result in table.get(row, {}).values())]
    lost = [f"{row}: tokens on pruned experts" for row in known]
    return markdown(("domain", "targets", *rows, *lost), cells)


def provenance(results: Sequence[Result]) -> str:
    """When and on what they were run."""
    dates = sorted({result["date"] for result in results})
    form = "{cores} cores ({device}), Python {python}, JAX {jax}"
    machines = sorted({form.format(**result["machine"]) for result in results})
    return f"Run on {'; '.join(machines)}; {' to '.join(dict.fromkeys((dates[0], dates[-1])))}.\n" if results else ""


def changes(ours: BySeed, base: BySeed) -> list[float]:
    """Differences of the validation loss, by seed that both have."""
    return [mine["validation_loss"] - theirs["validation_loss"] for mine, theirs in _pairs(ours, base)]


def _pairs(ours: BySeed, base: BySeed) -> list[tuple[Result, Result]]:
    return [(ours[seed], base[seed]) for seed in sorted(ours.keys() & base.keys())]


def _share(pairs: Sequence[tuple[float, float]], of_itself: bool, unit: str) -> str:
    """Of numbers and those of their bases: a base's own, else the change against it."""
    if not pairs:
        return MISSING
    if of_itself:
        return f"{statistics.fmean(mine for mine, _ in pairs):.2f}{unit}"
    return f"{statistics.fmean(mine / theirs for mine, theirs in pairs) - 1:+.1%}"


def spread(values: Sequence[float], form: str) -> str:
    """Mean and standard deviation; of one value no deviation.

    >>> spread([1.0, 2.0], ".1f"), spread([1.0], ".1f"), spread([], ".1f")
    ('1.5 ± 0.7', '1.0', '–')
    """
    if not values:
        return MISSING
    text = f"{statistics.fmean(values):{form}}"
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):{form.lstrip('+')}}"


def single(values: Sequence[float], form: str) -> str:
    """Each value.

    >>> single([1.0, -2.0], "+.1f"), single([], ".1f")
    ('+1.0, -2.0', '–')
    """
    return ", ".join(f"{value:{form}}" for value in values) or MISSING


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; the first column stands left, the others right."""
    lines = [head, ["---"] + ["--:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
