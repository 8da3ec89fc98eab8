import dataclasses
import io
import json

import numpy as np
import pytest

from laep_jax.report import drawing, figures, loss_figures
from laep_jax.report.command import FIGURES
from laep_jax.report.run_data import read_run

DRAWN = list(FIGURES.values())


@pytest.fixture(scope="module")
def run(run_dir):
    return read_run(run_dir)


def lines_of(axes, color):
    return [line for line in axes.lines if line.get_color() == color and len(line.get_xdata()) > 1]


def legend_of(figure):
    return {text.get_text() for legend in figure.legends for text in legend.get_texts()}


def test_tokens_per_expert_has_a_line_each_and_a_bar_for_each_that_is_left(run):
    figure = figures.draw_tokens_per_expert(run)
    panels = {axes.get_title(): axes for axes in figure.axes}
    assert set(panels) == {f"layer {layer}{end}" for layer in range(4) for end in ("", ", end")}
    for layer in range(4):
        kept = len(run.present(layer, 300))
        trend, ranks = panels[f"layer {layer}"], panels[f"layer {layer}, end"]
        pruned = lines_of(trend, drawing.VERMILLION)
        assert (len(lines_of(trend, drawing.BLUE)), len(pruned)) == (kept, 16 - kept)
        assert {line.get_xdata()[-1] for line in pruned} == {180}
        heights = [bar.get_height() for bar in ranks.patches]
        assert len(heights) == kept
        assert heights == sorted(heights)
        assert trend.get_ylim() == panels["layer 0"].get_ylim()


def test_cumulative_load_marks_both_bounds_and_the_pruned(run):
    figure = figures.draw_cumulative_load(run)
    assert len(figure.axes) == 4
    for layer, axes in enumerate(figure.axes):
        (curve,) = lines_of(axes, drawing.BLUE)
        assert curve.get_ydata()[0] == 0
        assert curve.get_ydata()[-1] == pytest.approx(1)
        (beta,) = lines_of(axes, drawing.ORANGE)
        assert set(beta.get_ydata()) == {0.1}
        (alpha,) = lines_of(axes, drawing.PURPLE)
        loads = run.mean_loads(180)[layer]
        assert set(alpha.get_xdata()) == {(loads <= 0.4 * loads.mean()).sum()}
        (pruned,) = [line for line in axes.lines if line.get_color() == drawing.VERMILLION]
        count = 16 - len(run.present(layer, 300))
        assert len(pruned.get_xdata()) == count
        assert axes.get_title() == f"layer {layer}: α = 0.4, {count} of 16 pruned"


def test_device_loads_has_three_bars_a_device_and_every_layer_below(run):
    figure = figures.draw_device_loads(run)
    *panels, overview = figure.axes
    assert [len(axes.patches) for axes in panels] == [3 * 4] * 4
    placed = [line for line in overview.lines if line.get_color() == drawing.BLUE]
    heights = np.array([bar.get_height() for bar in panels[1].patches[8:]])
    assert placed[0].get_ydata()[1] == pytest.approx(heights.max() / heights.mean())
    assert len(placed[0].get_ydata()) == 4


def test_heatmap_hatches_exactly_the_pruned(run):
    figure = figures.draw_load_heatmap(run)
    before, after = figure.axes[:2]
    assert [axes.get_title() for axes in (before, after)] == ["before the prune after step 180", "at the end"]
    assert not before.images[0].get_array().mask.any()
    np.testing.assert_array_equal(after.images[0].get_array().mask, run.pruned_at_LE == 180)
    assert legend_of(figure) == {"pruned"}
    assert len(after.collections[0].get_paths()) == (run.pruned_at_LE == 180).sum()


def test_heatmap_leaves_empty_what_a_layer_never_had(make, tmp_path):
    run_dir = make(tmp_path / "run", num_steps=40, cut_step=None)
    experts = {"num_experts": [12, 16, 16, 16], "expert_parallel": 4}
    (run_dir / "loads" / "experts.json").write_text(json.dumps(experts))
    axes = figures.draw_load_heatmap(read_run(run_dir)).axes[0]
    assert axes.images[0].get_array().mask.sum() == 4
    assert axes.collections[0].get_paths() == []


def test_loss_shows_every_record_and_marks_the_prune(run):
    figure = loss_figures.draw_loss(run)
    axes, zoomed = figure.axes
    by_label = {line.get_label(): line for line in axes.lines}
    assert len(by_label["training"].get_xdata()) == 300
    assert by_label["validation"].get_xdata().tolist() == [50, 100, 150, 180, 200, 250, 300, 300]
    assert by_label["validation, the plan's experts masked"].get_xdata().tolist() == [180]
    kept = sum(len(ids) for ids in run.prunes[0].after)
    assert [text.get_text() for text in axes.texts] == [f"pruned after step 180: 64 to {kept} experts"]
    assert [line.get_xdata() for line in axes.lines if line.get_linestyle() == ":"] == [[180, 180]]
    assert zoomed.get_xlim() == (130, 230)


def test_the_loss_around_the_prune_is_not_smoothed_across_it_and_fills_its_panel(run):
    train = tuple(record | {"loss": 2.0 if record["step"] <= 180 else 2.1} for record in run.train)
    evals = ({"step": 180, "when": "before_prune", "validation_loss": 2.02},)
    zoomed = loss_figures.draw_loss(dataclasses.replace(run, train=train, evals=evals)).axes[1]
    before, after = (line for line in zoomed.lines if line.get_linewidth() == 1.8 and len(line.get_xdata()) > 2)
    assert (before.get_xdata()[-1], after.get_xdata()[0]) == (180, 181)
    assert {*before.get_ydata().round(9)} == {2.0}
    assert {*after.get_ydata().round(9)} == {2.1}
    low, high = zoomed.get_ylim()
    assert 1.95 < low < 2.0 < 2.1 < high < 2.15


def test_a_domain_is_shown_as_it_is_called(run):
    name = "$\\frac{$<b>&\n"
    targets = dict.fromkeys([name], 7)
    evals = [dict(record) | {"validation_loss_by_domain": {name: 2.0}} for record in run.evals]
    figure = loss_figures.draw_domains(dataclasses.replace(run, evals=tuple(evals), targets=targets, pruned_share={}))
    figure.savefig(io.BytesIO(), format="svg")  # where a formula that is none would fail
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [r"\$\frac{\$<b>&\n (7)"]
    assert figure.axes[0].get_xlabel() == "validation loss minus that before the prune (nats)"
    assert [line.get_xdata()[0] for line in figure.axes[0].lines if line.get_color() == drawing.GREY] == [0]


def test_domains_are_lines_with_the_worst_on_top_and_marks_as_large_as_their_targets(run):
    panels = loss_figures.draw_domains(run).axes
    assert [axes.get_title() for axes in panels] == ["by the prune alone", "step 300", "tokens on the experts to prune"]
    labels = [label.get_text() for label in panels[0].get_yticklabels()]
    assert labels == ["forms (40)", "books (9,000)", "web (2,960)"]
    assert panels[0].get_ylim()[0] > panels[0].get_ylim()[1] == panels[1].get_ylim()[1]
    [at_prune], [newest] = (axes.collections for axes in panels[:2])
    np.testing.assert_allclose(at_prune.get_offsets()[:, 0], [0.56, 0.06, 0.01])
    np.testing.assert_allclose(np.ptp(newest.get_offsets()[:, 0]), 0, atol=1e-9)
    assert [bar.get_width() for bar in panels[2].patches] == pytest.approx([0.4, 0.05, 0.1])
    assert at_prune.get_sizes().argsort().tolist() == [0, 2, 1]
    mean = panels[0].lines[0].get_xdata()[0]  # of all targets, not of the domains
    assert mean == pytest.approx((0.56 * 40 + 0.06 * 9000 + 0.01 * 2960) / 12000)


def test_many_domains_show_as_forty_and_the_title_says_so(run):
    names = [f"domain {i}" for i in range(100)]
    record = dict(run.evals[-1]) | {"validation_loss_by_domain": {name: float(i) for i, name in enumerate(names)}}
    figure = loss_figures.draw_domains(
        dataclasses.replace(run, prunes=(), evals=(record,), targets=dict.fromkeys(names, 7))
    )
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert (len(labels), labels[0], labels[-1]) == (40, "domain 99 (7)", "domain 60 (7)")
    assert "40 of 100 domains" in figure.get_suptitle()


@pytest.mark.parametrize("draw", [loss_figures.draw_loss, loss_figures.draw_domains])
def test_losses_of_a_run_that_has_logged_nothing_yet(unpruned_dir, draw):
    draw(dataclasses.replace(read_run(unpruned_dir), train=(), evals=(), targets={}))


@pytest.mark.parametrize("draw", DRAWN)
def test_every_axis_is_labelled_and_the_legend_names_what_is_there(run, unpruned_dir, draw):
    assert draw(run).get_suptitle().startswith("small: ")
    for axes in draw(run).axes:
        assert axes.get_ylabel()
        assert axes.get_xlabel() or axes.get_label() == "<colorbar>"
    assert not any("prune" in text or "cut" in text for text in legend_of(draw(read_run(unpruned_dir))))


@pytest.mark.parametrize("name", ["draw_tokens_per_expert", "draw_cumulative_load", "draw_device_loads"])
def test_many_layers_show_as_eight_and_the_title_says_which(make, tmp_path, name):
    run = read_run(make(tmp_path / "run", num_layers=11, num_experts=4, num_steps=30, cut_step=None, devices=2))
    figure = getattr(figures, name)(run)
    titles = [axes.get_title().split(":")[0].removeprefix("layer ") for axes in figure.axes]
    assert [int(title) for title in titles if title.isdecimal()] == [0, 1, 3, 4, 6, 7, 9, 10]
    assert figure.get_suptitle().endswith("(layers 0, 1, 3, 4, 6, 7, 9, 10 of 11)")
