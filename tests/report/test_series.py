import dataclasses
import math

import numpy as np
import pytest

from laep_jax.laep.stability import moved
from laep_jax.report import series
from laep_jax.report.run_data import RunData, Transition, read_run

# one layer of 4 experts on 2 devices; experts 1 and 2 go after step 3, the others change places
TOKENS = [[50, 10, 20, 20], [40, 0, 20, 40], [60, 5, 5, 30], [70, 0, 0, 30], [60, 0, 0, 40]]
CUT = Transition(step=3, plan_step=3, before=((0, 1, 2, 3),), after=((3, 0),), alpha=(0.5,), beta=0.2)


def small_run(**changes):
    run = RunData(
        name="small",
        steps=np.arange(1, 6),
        tokens_NLE=np.array(TOKENS)[:, None],
        num_experts=(4,),
        expert_parallel=2,
        window=2,
        alpha=(0.5,),
        beta=0.2,
        max_moved=0.1,
        prunes=(CUT,),
        train=(),
        evals=(),
        targets={"a": 30, "b": 10, "c": 5},
        pruned_share={},
        events=(),
        config={},
        summary={},
    )
    return dataclasses.replace(run, **changes)


def test_every_expert_has_a_line_and_the_pruned_ones_end_at_the_prune():
    lines = series.expert_lines(small_run(), 0)
    assert [(line.expert, line.pruned) for line in lines] == [(0, False), (1, True), (2, True), (3, False)]
    assert [line.steps.tolist() for line in lines] == [[1, 2, 3, 4, 5], [1, 2, 3], [1, 2, 3], [1, 2, 3, 4, 5]]
    assert lines[1].tokens.tolist() == [10, 0, 5]
    assert lines[3].tokens.tolist() == [20, 40, 30, 30, 40]


def test_long_runs_are_binned_without_losing_tokens_or_crossing_the_prune(run_dir):
    run = read_run(run_dir)
    bins = series.step_bins(run, limit=40)
    assert len(bins) <= 42
    covered = np.concatenate([np.arange(300)[rows] for rows in bins])
    assert covered.tolist() == list(range(300))
    assert 180 in [rows.stop for rows in bins]
    for line in series.expert_lines(run, 2):
        assert line.steps[-1] == (180 if line.pruned else 300)


def test_the_mean_rises_as_experts_go():
    steps, mean = series.mean_line(small_run(), 0)
    assert steps.tolist() == [1, 2, 3, 4, 5]
    assert mean.tolist() == [25, 25, 25, 50, 50]


def test_loads_at_the_end_are_sorted_and_of_survivors_only():
    assert series.final_loads(small_run(), 0).tolist() == [35, 65]


def test_cumulative_load_of_the_window_before_the_prune():
    load = series.cumulative_load(small_run(), 0)  # means of steps 2 and 3: 50, 2.5, 12.5, 35
    assert load.experts.tolist() == [1, 2, 3, 0]
    np.testing.assert_allclose(load.share, [0, 0.025, 0.15, 0.5, 1])
    assert load.pruned.tolist() == [True, True, False, False]
    assert (load.below_alpha, load.below_mean, load.eligible) == (2, 2, 2)
    assert (load.alpha, load.beta) == (0.5, 0.2)


def test_a_prune_that_came_after_its_plan_shows_the_window_of_the_plan():
    load = series.cumulative_load(small_run(prunes=(dataclasses.replace(CUT, plan_step=2),)), 0)  # steps 1 and 2
    assert load.experts.tolist() == [1, 2, 3, 0]
    np.testing.assert_allclose(load.share, [0, 0.05, 0.25, 0.55, 1])
    assert load.pruned.tolist() == [True, True, False, False]


def test_either_bound_limits_what_is_eligible():
    def eligible(alpha, beta):
        transition = dataclasses.replace(CUT, alpha=(alpha,), beta=beta)
        return series.cumulative_load(small_run(prunes=(transition,)), 0).eligible

    assert eligible(math.inf, 0.2) == 2
    assert eligible(math.inf, 0.5) == 3
    assert eligible(0.4, 0.5) == 1
    assert eligible(0.5, 0.15) == 2  # both bounds are met with equality
    assert eligible(0.5, 0.02) == 0


def test_without_a_prune_the_last_window_and_the_settings_bounds():
    run = small_run(prunes=(), alpha=(math.inf,), beta=0.4)
    load = series.cumulative_load(run, 0)  # means of steps 4 and 5: 65, 0, 0, 35
    assert load.experts.tolist() == [1, 2, 3, 0]
    np.testing.assert_allclose(load.share, [0, 0, 0, 0.35, 1])
    assert not load.pruned.any()
    assert (load.below_alpha, load.eligible, load.beta) == (4, 3, 0.4)


def test_device_loads_around_the_prune():
    loads = series.device_loads(small_run())
    assert loads.before.tolist() == [[52.5, 47.5]]
    assert loads.in_order.tolist() == [[65, 35]]
    assert loads.placed.tolist() == [[35, 65]]


def test_device_loads_of_a_run_that_ends_with_its_prune():
    run = small_run()
    loads = series.device_loads(dataclasses.replace(run, steps=run.steps[:3], tokens_NLE=run.tokens_NLE[:3]))
    assert loads.placed.tolist() == [[35, 50]]


def test_device_loads_without_a_prune():
    loads = series.device_loads(small_run(prunes=()))
    assert loads.before.tolist() == [[65, 35]]
    assert loads.in_order is loads.placed is None


def test_a_rearrangement_before_the_prune_sets_the_order_it_starts_from():
    moved = Transition(2, 2, ((0, 1, 2, 3),), ((2, 3, 0, 1),), (0.5,), 0.2)
    transition = dataclasses.replace(CUT, before=moved.after, after=((0, 3),))
    run = small_run(prunes=(moved, transition))
    assert series.survivors_in_order(transition) == [[3, 0]]
    loads = series.device_loads(run)
    assert loads.before.tolist() == [[35, 65]]  # step 3 alone: the model before it was another
    assert loads.in_order.tolist() == [[35, 65]]
    assert loads.placed.tolist() == [[65, 35]]
    assert series.device_loads(small_run(prunes=(moved, transition), window=1)).placed.tolist() == [[70, 30]]


def test_rearranging_conserves_tokens_and_levels_the_devices(run_dir):
    loads = series.device_loads(read_run(run_dir))
    np.testing.assert_allclose(loads.in_order.sum(1), loads.placed.sum(1))
    np.testing.assert_allclose(loads.before.sum(1), 2 * 4096)
    assert (loads.placed.max(1) < loads.in_order.max(1)).all()


def test_shares_add_up_and_are_undefined_where_no_expert_is(run_dir):
    run = read_run(run_dir)
    before, after = series.shares(run, 180), series.shares(run, 300)
    assert not np.isnan(before).any()
    np.testing.assert_array_equal(np.isnan(after), run.pruned_at_LE == 180)
    np.testing.assert_allclose(np.nansum(after, 1), 1)


def test_change_of_the_loads_is_measured_between_windows_without_a_prune_in_them(run_dir):
    run = read_run(run_dir)
    changes = series.stability(run)
    assert changes.steps.tolist() == [50, 75, 100, 125, 150, 175, 250, 275, 300]  # pruned after step 180
    assert changes.moved_NL.shape == changes.rank_correlation_NL.shape == (9, 4)
    assert (changes.moved_NL[0] > 4 * changes.moved_NL[5]).all()
    assert (changes.rank_correlation_NL[5] > 0.9).all()
    old, new = run.tokens_NLE[25:50, 0], run.tokens_NLE[50:75, 0]
    assert changes.moved_NL[1, 0] == moved(new, old)
    assert series.stability(small_run()).steps.tolist() == []


def evaluated(step, when, *losses):
    return {"step": step, "when": when, "validation_loss_by_domain": dict(zip("abc", losses, strict=False))}


def test_domains_are_measured_from_before_the_prune_and_the_worst_comes_first():
    evals = (
        evaluated(1, "periodic", 9.0, 9.0, 9.0),
        evaluated(3, "periodic", 9.0, 9.0, 9.0),
        evaluated(3, "before_prune", 3.0, 2.0, 4.0),
        evaluated(3, "after_prune", 3.25, 3.0, 3.5),
        evaluated(4, "periodic", 9.0, 9.0, 9.0),
        evaluated(5, "end", 2.5, 2.25, 4.0),
    )
    losses = series.domain_losses(small_run(evals=evals))
    assert losses.is_change
    assert losses.names == ("b", "a", "c")
    assert losses.targets_M.tolist() == [10, 30, 5]
    assert {label: loss_M.tolist() for label, loss_M in losses.rows.items()} == {
        "by the prune alone": [1.0, 0.25, -0.5],
        "step 5": [0.25, -0.5, 0.0],
    }
    at_the_cut = series.domain_losses(small_run(evals=evals[:4]))
    assert list(at_the_cut.rows) == ["by the prune alone"]


def test_domains_without_a_prune_are_as_they_are_and_those_no_longer_measured_are_left_out():
    run = small_run(prunes=(), evals=(evaluated(1, "periodic", 9.0, 9.0, 9.0), evaluated(2, "periodic", 1.0, 2.0)))
    losses = series.domain_losses(run)
    assert not losses.is_change
    assert losses.names == ("b", "a")
    assert {label: loss_M.tolist() for label, loss_M in losses.rows.items()} == {"step 2": [2.0, 1.0]}
    assert series.domain_losses(small_run()).names == ()


def test_smoothing_keeps_a_constant_and_leaves_out_what_is_not_known():
    np.testing.assert_allclose(series.smoothed(np.full(9, 2.5), 4), 2.5)
    np.testing.assert_allclose(series.smoothed(np.array([1.0, np.nan, 3.0]), 3), [1, 2, 3])
    assert len(series.smoothed(np.array([1.0, 2.0]), 7)) == 2


@pytest.mark.parametrize(("layers", "limit"), [(1, 8), (8, 8), (9, 8), (103, 8)])
def test_chosen_layers_keep_the_ends(layers, limit):
    chosen = series.chosen_layers(layers, limit)
    assert len(chosen) == min(layers, limit)
    assert (chosen[0], chosen[-1]) == (0, layers - 1)
    assert chosen == sorted(set(chosen))
