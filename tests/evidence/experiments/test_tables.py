"""What is told of results: tables, the document they stand in, the numbers behind phases, placement, throughput."""

import itertools

import numpy as np
import pytest

from experiments import measured, placements, throughput
from experiments.__main__ import main
from experiments.catalogue import EXPERIMENTS
from experiments.drawing import figures_of, filled, text
from experiments.phases import correlations, largest_change, overlap, overlaps_with_last, stable_step
from experiments.results import FOLDER, append, read_results
from experiments.tables import by_row
from laep_jax.errors import UserError
from laep_jax.laep.balance import device_loads, lower_bound


def result(row: str, seed: int, loss: float, **fields) -> dict:
    rng = np.random.default_rng(seed)
    loads = rng.integers(1, 100, (2, 16))
    order = [list(range(16))] * 2
    made = {
        "row": row,
        "seed": seed,
        "digest": f"{row}{seed}",
        "date": f"2026-11-2{seed}",
        "machine": {"device": "x86", "cores": 2, "python": "3.11", "jax": "0.10"},
        "parameters": 2_000_000,
        "num_experts": [16, 16],
        "validation_loss": loss,
        "validation_loss_by_domain": {"xml": loss, "rare": 2 * loss},
        "validation_targets_by_domain": {"xml": 5000, "rare": 10},
        "cuts": [],
        "order": order,
        "tokens_per_second": 100.0 + seed,
        "gflops_per_second": 1.0,
        "loads": {str(step): (loads + step // 100).tolist() for step in (50, 100, 250, 500)},
    }
    return made | fields


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_document_shows_the_results_that_are_kept(name):
    table, document = by_row(read_results(FOLDER)), (FOLDER / "README.md").read_text()
    assert filled(document, name, f"\n{text(name, table)}") == document, "python -m experiments tables"


def test_a_row_is_compared_with_its_base_of_the_same_seed():
    rows = [result("base", 0, 4.0), result("base", 1, 5.0), result("alpha_0.4", 0, 4.1), result("alpha_0.4", 1, 5.2)]
    rows[2] |= {"parameters": 1_500_000, "num_experts": [8, 16], "cuts": [260]}
    rows[2] |= {"validation_loss_before_prune": 4.5, "validation_loss_after_prune": 4.75}
    lines = text("table1", by_row(rows)).splitlines()
    [base] = [line for line in lines if line.startswith("| base |")]
    [pruned] = [line for line in lines if line.startswith("| α = 0.4, β = 0.1 |")]
    assert base == "| base | 9.78 B | 1.661 | – | 2.00 M | 32 | 4.5000 ± 0.7071 | – | 4.000, 5.000 | – |"
    ours = "-12.5% | 28 | 4.6500 ± 0.7778 | +0.1500 ± 0.0707 | +0.100, +0.200 | +0.250 |"
    assert pruned == f"| α = 0.4, β = 0.1 | -24.5% | 1.653 | -0.008 | {ours}"


def scored(row: str, seed: int, next_line: float, identifier: float, bits: float) -> dict:
    scores = {"laep_next_line": next_line, "laep_identifier": identifier, "laep_bits_per_byte": bits}
    return result(row, seed, 4.0, scores=scores)


def test_scores_are_compared_with_the_base_of_the_same_seed_and_their_change_with_the_papers():
    rows = [scored("tasks", seed, 0.4 + 0.1 * seed, 0.5, 2.0 + seed) for seed in range(3)]
    rows += [scored("tasks_alpha_0.2", seed, 0.41 + 0.1 * seed, 0.51, 1.9 + seed) for seed in range(3)]
    rows += [scored("tasks_alpha_0.4", seed, 0.38 + 0.1 * seed, 0.5, 2.0) for seed in range(3)]
    rows += [scored("tasks_alpha_0.6", seed, 0.4 + 0.1 * seed, 0.4 + 0.1 * seed, 2.0) for seed in range(3)]
    rows += [scored("tasks_alpha_hybrid", 0, 0.6, 0.6, 2.0)]
    lines = text("table3", by_row(rows)).split("\n\n")[1].splitlines()
    of_row = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:] for line in lines}
    assert of_row["base"] == [
        "11.13",
        "–",
        "50.0 ± 10.0",
        "50.0 ± 0.0",
        "50.0 ± 5.0",
        "–",
        "–",
        "45.0, 50.0, 55.0",
        "3.000 ± 1.000",
        "–",
    ]
    assert of_row["α = 0.2"][1] == "+1.23"
    assert of_row["α = 0.2"][4:] == [
        "51.0 ± 5.0",
        "+1.0 ± 0.0",
        "agrees",
        "+1.0, +1.0, +1.0",
        "2.900 ± 1.000",
        "-0.100 ± 0.000",
    ]
    assert of_row["α = 0.4"][5:7] == ["-1.0 ± 0.0", "disagrees"]
    assert of_row["α = 0.6"][5:7] == ["+0.0 ± 5.0", "cannot tell"]
    assert of_row["α hybrid"][5:7] == ["+15.0", "cannot tell"]
    assert of_row["DeepSeek-V3 loss 0.0001"][2:] == ["–"] * 8


def test_parameters_are_compared_by_seed_too():
    bases = [result("base", seed, 4.0, parameters=(seed + 1) * 1_000_000) for seed in range(3)]
    shown = text("baselines", by_row([*bases, result("alpha_hybrid", 0, 4.0, parameters=900_000)]))
    assert "| base | 2.00 M |" in shown
    assert "| LAEP (α hybrid, β = 0.1) | -10.0% |" in shown


def test_the_last_result_of_a_row_counts():
    lines = text("table5", by_row([result("base", 0, 4.0), result("base", 0, 3.0)]))
    assert "| 3.0000 |" in lines
    assert "4.0000" not in lines


def test_when_and_on_what_rows_were_run():
    shown = text("table5", by_row([result("base", 0, 4.0), result("alpha_hybrid", 2, 4.0), result("late", 5, 4.0)]))
    assert shown.endswith("\nRun on 2 cores (x86), Python 3.11, JAX 0.10; 2026-11-20 to 2026-11-22.\n")


def test_domains_that_are_too_small_to_tell_are_left_out():
    shown = text("open", by_row([result("base", 0, 4.0), result("late", 0, 4.5)]))
    assert "| xml | 5,000 | – | – | +0.500 |" in shown
    assert "rare" not in shown


@pytest.mark.parametrize("name", EXPERIMENTS)
@pytest.mark.parametrize("rows", [[], ["base", "alpha_hybrid", "mixtral_0.01"]])
def test_figures_are_drawn_of_whatever_is_there(name, rows, tmp_path):
    table = by_row(result(row, seed, 4.0 + seed) for row in rows for seed in (0, 1))
    for file, figure in figures_of(name, table).items():
        figure.savefig(tmp_path / file)
        assert (tmp_path / file).stat().st_size > 5_000


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [((), (), 1.0), ((1,), (), 0.0), ((1, 2), (3,), 0.0), ((1, 2, 3, 4), (4, 3, 5), 0.4), ((2, 1), (1, 2), 1.0)],
)
def test_overlap_is_intersection_over_union(a, b, expected):
    assert overlap(a, b) == overlap(b, a) == expected


def test_the_stability_test_fires_in_every_recorded_run_without_a_prune_and_in_none_before_step_200():
    unpruned = [result for result in read_results(FOLDER) if "cuts" in result and not result["cuts"]]
    assert len(unpruned) >= 57
    assert all(200 <= (stable_step(result) or 0) < 500 for result in unpruned)


def test_stable_steps_and_overlaps():
    loads = np.arange(1, 21)
    shuffled = np.random.default_rng(0).permutation(loads)
    steps = {50: loads, 100: shuffled, 150: loads, 200: loads, 250: loads}
    run = {"loads": {str(step): [loads_E.tolist()] for step, loads_E in steps.items()}}
    assert correlations(run)[200] == 1.0
    assert correlations(run)[100] < 0.9
    assert largest_change(run, "moved")[100] > 0.1
    assert largest_change(run, "moved")[200] == 0
    assert stable_step(run) == 250
    assert overlaps_with_last(run)[200] == 1.0
    assert overlaps_with_last(run)[100] < 1.0


def test_the_set_chosen_when_the_test_fires_is_compared_with_the_last():
    early, late = [[*range(20, 0, -1)]], [[*range(1, 21)]]
    loads = {"50": early, "100": late, "150": early, "200": late, "250": late, "300": late, "500": late}
    run = result("base", 0, 4.0, loads=loads)
    [line] = [line for line in text("phases", by_row([run])).splitlines() if line.startswith("| 64 experts, BPE |")]
    cells = line.strip("| ").split(" | ")
    assert cells[1] == "300"
    assert cells[9:12] == ["1.00", "1.00", "1.00"]


def test_the_optimal_placement_is_no_worse_than_any():
    loads_E = np.array([31, 17, 11, 7, 5, 3, 2, 1])
    best = min(
        max(device_loads(loads_E[[*half, *sorted({*range(8)} - {*half})]], 2))
        for half in itertools.combinations(range(8), 4)
    )
    order = placements.optimal(loads_E, 2)
    assert sorted(order) == list(range(8))
    assert max(device_loads(loads_E[order], 2)) == best >= lower_bound(loads_E, 2)


def test_placements_are_judged_by_the_last_window():
    even, skewed = [[4, 4, 4, 4]], [[8, 8, 1, 1]]
    run = result("alpha_hybrid", 0, 4.0, order=[[0, 2, 1, 3]], loads={"10": even, "20": skewed, "30": skewed})
    found = placements.measure({"alpha_hybrid": run}, 2)["device_load"]
    assert found["as before"] == pytest.approx(16 / 9)
    assert found["greedy, pruned model"] == found["optimal, pruned model"] == found["of the run"] == 1.0


def test_rows_of_the_devices_by_recorded_loads(monkeypatch):
    monkeypatch.setattr(throughput, "ROWS", 1000)
    run = result("alpha_hybrid", 0, 4.0, order=[[3, 0], [0, 1, 2, 3]], loads={"10": [[3, 0, 0, 1], [1, 1, 1, 1]]})
    rows_LPS = throughput.device_rows(run, throughput._in_order(run["order"], 2))
    assert rows_LPS.tolist() == [[[250, 0], [750, 0]], [[250, 250], [250, 250]]]


def test_replicas_are_planned_by_a_window_after_the_prune_and_judged_by_the_last(monkeypatch):
    """With time in proportion to rows. A plan by the last window is exact, levelled or not."""
    monkeypatch.setattr(
        throughput,
        "rank_seconds",
        lambda ranks, _: {tuple(sizes): float(sum(sizes)) for sizes_XS in ranks for sizes in sizes_XS.tolist()},
    )
    early, even, last = [[9, 1, 1, 1]], [[1, 1, 1, 1]], [[6, 2, 1, 1]]
    base = result("base", 0, 4.0, order=[[0, 1, 2, 3]], loads={"50": early, "300": even, "500": last})
    laep = result("alpha_hybrid", 0, 4.0, order=[[0, 1, 2, 3]], loads={"260": early, "310": last, "500": last})
    found = throughput.measure({"base": base, "alpha_hybrid": laep}, 2)
    assert found["device_load"]["base"] == pytest.approx(1.6, rel=1e-3)
    assert found["device_load"]["base + 1 planned"] > found["device_load"]["base + 1 levelled"]
    for name in ("alpha_hybrid + 1 planned", "alpha_hybrid + 1 levelled", "alpha_hybrid + 2 levelled"):
        assert found["device_load"][name] == pytest.approx(1, abs=1e-4)
        assert found["throughput"][name] == pytest.approx(1.6, abs=1e-3)


def test_what_is_measured_is_measured_once_for_each_seed_that_is_complete(tmp_path, monkeypatch):
    called = []
    monkeypatch.setitem(
        measured.MEASURES, "table5", lambda results, _: called.append(sorted(results)) or {"throughput": {}}
    )
    rows = [entry.row for entry in EXPERIMENTS["table5"].entries]
    for seed, names in ((0, rows), (1, rows[:2])):
        for row in names:
            append(tmp_path, result(row, seed, 4.0))
    for _ in range(2):
        measured.measure("table5", EXPERIMENTS["table5"], tmp_path)
    assert called == [sorted(rows)]
    append(tmp_path, result("base", 0, 4.0, digest="another"))
    measured.measure("table5", EXPERIMENTS["table5"], tmp_path)
    assert len(called) == 2


def test_nothing_to_draw(tmp_path):
    with pytest.raises(UserError, match=r"holds no results\.jsonl"):
        main(["tables", f"--out={tmp_path}"])
