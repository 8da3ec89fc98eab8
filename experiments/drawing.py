"""What each experiment shows: its tables as Markdown, its figures as PNG."""

from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.straggler import PAPER
from experiments import figures, tables
from experiments.catalogue import EXPERIMENTS, TABLE1
from experiments.measured import DEVICES, row_name
from experiments.tables import Table
from experiments.throughput import NOT_REARRANGED

DPI = 110
FEWEST_TARGETS = 1000  # of a domain that is told of
TABLE3 = {  # average over five benchmarks, %
    "tasks": 11.127,
    "tasks_deepseek_0.0001": 11.426,
    "tasks_alpha_0.2": 12.362,
    "tasks_alpha_hybrid": 11.813,
    "tasks_alpha_0.4": 11.361,
    "tasks_alpha_0.6": 11.153,
}
TABLE4 = {  # TFLOPS a device
    "base": 73.54,
    "alpha_hybrid": 76.07,
    "experts_128": 69.82,
    "experts_128_hybrid": 74.25,
    "experts_256": 68.98,
    "experts_256_hybrid": 74.73,
}
TABLE5 = {  # the same
    "base": PAPER["base"],
    "mixtral_0.01": 80.36,
    "deepseek_0.01": 80.82,
    "uniform_48_deepseek_0.01": PAPER["uniform"],
    NOT_REARRANGED: PAPER["pruned"],
    "alpha_hybrid": PAPER["rearranged"],
}
PAPER_THROUGHPUT = {row: tflops / TABLE5["base"] for row, tflops in TABLE5.items()}


def text(name: str, table: Table) -> str:
    """The tables of an experiment."""
    experiment, measured = EXPERIMENTS[name], table.get(row_name(name), {})
    parts = [tables.phases_table(experiment, table) if name == "phases" else tables.losses_table(experiment, table)]
    if name == "table3":
        parts.append(tables.scores_table(experiment, table, TABLE3))
    if name == "table4":
        parts.append(tables.speeds_table(experiment, table, DEVICES, TABLE4))
    if name == "table5":
        columns = {"throughput": "throughput over base, EP 8", "device_load": "largest over mean device load"}
        parts.append(tables.measured_table(columns, measured, _labels(name), PAPER_THROUGHPUT))
        parts.append(tables.hottest_table(experiment, table, DEVICES))
    if name == "open":
        columns = {"device_load": "largest over mean device load at the end, by placement"}
        parts.append(tables.measured_table(columns, measured, {}, {}))
        parts.append(tables.domains_table(table, "base", ("alpha_hybrid", "early", "late"), FEWEST_TARGETS))
    if name == "domains":
        parts.append(tables.domains_table(table, "domains", ("domains_pruned", "domains_spared"), FEWEST_TARGETS))
    parts.append(tables.provenance([r for entry in experiment.entries for r in table.get(entry.row, {}).values()]))
    return "\n".join(parts)


def _labels(name: str) -> dict[str, str]:
    labels = {entry.row: entry.label for entry in EXPERIMENTS[name].entries} | {NOT_REARRANGED: "LAEP, not rearranged"}
    placed = {
        f"{row} + {slots} {shares}": f"{label} + {slots} slot{'s' * (slots > 1)}, {shares}"
        for row, label in labels.items()
        for slots in (1, 2)
        for shares in ("planned", "levelled")
    }
    return labels | placed


def figures_of(name: str, table: Table) -> dict[str, Figure]:
    """By file name."""
    if name == "phases":
        return {"phases.png": figures.draw_phases(EXPERIMENTS[name], table)}
    drawn = {f"{name}.png": figures.draw_losses(EXPERIMENTS[name], table)}
    if name == "table5":
        measured = table.get(row_name(name), {})
        drawn["table5_throughput.png"] = figures.draw_throughput(measured, _labels(name), PAPER_THROUGHPUT)
    if name == "table1":
        rows = [(entry.row, entry.label) for entry in TABLE1[:9]]
        drawn["table1_loads.png"] = figures.draw_distributions(rows, table)
    return drawn


def filled(document: str, name: str, content: str) -> str:
    """A Markdown document with the block between `<!-- NAME -->` and `<!-- end of NAME -->` replaced.

    >>> filled("a <!-- x -->old<!-- end of x --> b", "x", "new")
    'a <!-- x -->new<!-- end of x --> b'
    """
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, found, rest = document.partition(begin)
    _, closed, after = rest.partition(end)
    assert found, f"{begin} is missing"
    assert closed, f"{end} is missing"
    return before + begin + content + end + after


def draw(name: str, table: Table, out: Path) -> str:
    """Writes both into a folder; returns the text."""
    content = text(name, table)
    (out / f"{name}.md").write_text(content, encoding="utf-8")
    for file, figure in figures_of(name, table).items():
        figure.savefig(out / file, dpi=DPI)
    return content
