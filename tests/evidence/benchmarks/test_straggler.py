"""Routing and prediction by hand, and the whole benchmark with real processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import replay, straggler
from benchmarks.__main__ import main
from laep_jax.errors import UserError

ROOT = Path(__file__).parents[3]
PLACED = {
    f"{name} + {slots} {shares}"
    for name, slots in (("base", 1), ("rearranged", 1), ("rearranged", 2))
    for shares in ("planned", "levelled")
}
VARIANTS = {"base", "pruned", "rearranged", "uniform", *PLACED}


def drawn(num_experts: int, num_devices: int, num_tokens: int = 64, seed: int = 0) -> replay.Replay:
    rng = np.random.default_rng(seed)
    loads_LE = np.exp(2 * rng.standard_normal((3, num_experts)))
    before_LTE, now_LTE = (replay.draw_logits(loads_LE, num_tokens, rng) for loads_LE in replay.drifted(loads_LE, rng))
    return replay.make_replay(before_LTE, now_LTE, (0.5, 0.5, 0.5), num_devices)


def by_hand() -> replay.Replay:
    """One layer, six experts on two devices; each token's first choices, and the next one where it is needed."""
    choices = [(0, 1)] * 10 + [(0, 2)] * 8 + [(1, 3)] * 5 + [(0, 4, 2), (1, 5, 3)]
    logits_TE = np.zeros((len(choices), 6), np.float32)
    for token, order in enumerate(choices):
        logits_TE[token, list(order)] = [3, 2, 1][: len(order)]
    return replay.make_replay(logits_TE[None], logits_TE[None], alpha=(0.5,), expert_parallel=2)


def test_the_next_choice_takes_the_pruned_experts_place():
    ids_TK = replay.choose(np.array([[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]]), pruned=(0,))
    assert [set(ids) for ids in ids_TK.tolist()] == [{1, 2}, {2, 3}]


@pytest.mark.parametrize("expert", range(4))
def test_routing_follows_the_loads(expert):
    loads_LE = np.array([[1.0, 2.0, 3.0, 4.0]])
    logits_LTE = replay.draw_logits(loads_LE, 40_000, np.random.default_rng(0))
    share = np.mean(logits_LTE[0].argmax(axis=1) == expert)
    assert share == pytest.approx(loads_LE[0, expert] / 10, abs=0.01)  # four standard errors


@settings(deadline=None, max_examples=25)
@given(st.sampled_from([(8, 2), (16, 4), (16, 16), (64, 8)]), st.integers(0, 2**16))
def test_pruning_keeps_every_tokens_rows_and_uses_survivors_only(sizes, seed):
    routing = drawn(*sizes, seed=seed)
    for layer, ids_TK, masked_TK in zip(routing.plan.layers, routing.ids_LTK, routing.masked_ids_LTK, strict=True):
        assert (masked_TK[:, 0] != masked_TK[:, 1]).all()
        assert not np.isin(masked_TK, layer.pruned).any()
        for before, after in zip(ids_TK.tolist(), masked_TK.tolist(), strict=True):
            assert set(before) - set(layer.pruned) <= set(after)


@settings(deadline=None, max_examples=25)
@given(st.sampled_from([(8, 2), (16, 4), (16, 16), (64, 8)]), st.integers(0, 2**16))
def test_group_sizes_are_the_routed_rows_and_agree_with_the_plan(sizes, seed):
    routing = drawn(*sizes, seed=seed)
    num_rows = routing.ids_LTK[0].size
    loads = replay.largest_loads(routing)
    for variant, sizes_LGS in replay.group_sizes(routing).items():
        assert (sizes_LGS.sum(axis=(1, 2)) == num_rows).all(), variant
        fullest = sizes_LGS.sum(axis=2).max(axis=1).sum()
        slack = sizes_LGS.size if variant in PLACED else 1e-6  # shares of a load are made whole rows
        assert fullest == pytest.approx(loads[variant], abs=slack), variant


@settings(deadline=None, max_examples=25)
@given(st.sampled_from([(8, 2), (16, 4), (16, 16), (10, 4)]), st.integers(0, 2**16))
def test_every_choice_goes_to_a_slot_of_its_expert_and_slots_get_their_rows(sizes, seed):
    routing = drawn(*sizes, seed=seed)
    by_variant = replay.group_sizes(routing)
    for variant, slots_LTK in replay.routes(routing).items():
        for layer, slot_map in enumerate(routing.maps[variant]):
            slots, ids = slots_LTK[layer].ravel(), routing.ids(variant)[layer].ravel()
            device, slot = slots // routing.num_slots, slots % routing.num_slots
            assert (slot_map.slots_PS[device, slot] == ids).all(), variant
            rows_PS = by_variant[variant][layer]
            assert replay.count(slots, rows_PS.size).reshape(rows_PS.shape).tolist() == rows_PS.tolist(), variant


def test_replicas_level_what_no_placement_does_even_after_drift():
    loads = {
        name: load
        for seed in range(3)
        for name, load in replay.to_base(replay.largest_loads(drawn(64, 8, num_tokens=4096, seed=seed))).items()
    }
    order = ["base", "rearranged", "rearranged + 1 planned", "rearranged + 1 levelled", "rearranged + 2 levelled"]
    assert [loads[name] for name in order] == sorted((loads[name] for name in order), reverse=True)
    assert loads["rearranged + 2 levelled"] < 1.01 * loads["uniform"]


def test_a_layer_by_hand():
    routing = by_hand()
    assert replay.count(routing.ids_LTK[0], 6).tolist() == [19, 16, 8, 5, 1, 1]
    assert routing.plan.layers[0].pruned == (4, 5)  # 3 as well would be 7 of 50 rows, more than a tenth
    assert replay.count(routing.masked_ids_LTK[0], 6).tolist() == [19, 16, 9, 6, 0, 0]
    loads = replay.largest_loads(routing)
    # 19 + 16 + 8; 19 + 16 beside 9 + 6; 19 + 6 beside 16 + 9; half of 50
    assert {name: loads[name] for name in loads.keys() - PLACED} == {
        "base": 43,
        "pruned": 35,
        "rearranged": 25,
        "uniform": 26,  # 50 rows in turn to 4 of 6 experts: 13, 13, 12, 12
    }
    assert loads["base + 1 levelled"] == pytest.approx(25)
    assert replay.to_base(loads)["pruned"] == pytest.approx(35 / 43)


def test_synthetic_loads_are_pruned_as_the_paper_prunes():
    rng = np.random.default_rng(0)
    logits_LTE = replay.draw_logits(replay.synthetic_loads(64, rng), 1024, rng)
    alpha = replay.alpha_of_layers(replay.NUM_LAYERS, np.arange(replay.NUM_LAYERS))
    kept_L = np.array(replay.make_replay(logits_LTE, logits_LTE, alpha, 8).plan.num_experts_after)
    assert kept_L.sum() == pytest.approx(4360, rel=0.03)  # of 6,592: what the released model has left
    assert kept_L[17:-17].mean() == pytest.approx(48, abs=1)


@pytest.fixture(scope="module")
def result() -> dict:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores")
    command_line = [sys.executable, "-m", "benchmarks", "straggler", "--short", "--json"]
    done = subprocess.run(command_line, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def test_json_has_every_figure(result):
    for field in ("measured", "elapsed", "predicted", "error"):
        assert set(result[field]) == VARIANTS | {"sliced"}, field
    assert set(result["rank_by_rank"]) == set(result["slices"]) == {"8", "16", "32", "64"}
    assert all(set(figures) == VARIANTS for figures in result["rank_by_rank"].values())
    assert "rearranged + 1 levelled" in straggler.table(result)


def test_connected_processes_wait_for_the_fullest(result):
    """CPU time. The short form pads its small groups of rows a lot, hence 20 % where the whole one stays in 10."""
    measured = result["measured"]
    assert measured["rearranged"] < 0.95 * measured["base"]
    assert measured["rearranged"] < 1.05 * measured["pruned"] < 1.15 * measured["base"]
    assert result["fixed"] < 0.5 * measured["uniform"]
    assert max(abs(result["error"][variant]) for variant in VARIANTS) < 0.2
    assert all(result["elapsed"][variant] > 0.9 * measured[variant] for variant in VARIANTS)


def test_rank_by_rank_follows_the_plan(result):
    for degree, figures in result["rank_by_rank"].items():
        for variant, figure in figures.items():
            assert abs(figure["error"]) < 0.25, (degree, variant)
    at_8 = {variant: figure["throughput"] for variant, figure in result["rank_by_rank"]["8"].items()}
    assert at_8["base"] < 0.8 * at_8["rearranged"] < at_8["uniform"]
    # one expert a device: nothing to prune, nothing to rearrange
    assert result["rank_by_rank"]["64"]["rearranged"]["throughput"] == 1


def test_bad_names_and_numbers_are_refused(tmp_path):
    with pytest.raises(UserError, match="no benchmark 'stragler'; did you mean straggler"):
        main(["stragler"])
    with pytest.raises(UserError, match="--num-processes=1 must be 2 to"):
        straggler.run(["--num-processes", "1"])
    np.save(tmp_path / "counts.npy", np.ones((2, 3, 7), int))
    with pytest.raises(UserError, match="num_experts=7 must be at least 8"):
        straggler.run(["--counts", str(tmp_path / "counts.npy")])
    np.savez(tmp_path / "counts.npz", layer_0=np.ones(8, int), layer_1=np.ones(16, int))
    with pytest.raises(UserError, match=r"num_experts=\[8, 16\] must be the same in every layer"):
        straggler.run(["--counts", str(tmp_path / "counts.npz")])


def test_recorded_counts_are_split_in_time_and_sampled_by_layer(tmp_path):
    counts_NLE = np.ones((2, 3, 8), int)
    counts_NLE[1, 1, 5] = 1000
    np.save(tmp_path / "counts.npy", counts_NLE)
    before_LE, now_LE = straggler._recorded(tmp_path / "counts.npy")
    assert before_LE.tolist() == [[1] * 8] * 3
    assert now_LE[1].tolist() == [1, 1, 1, 1, 1, 1000, 1, 1]
    scale = straggler.Scale(1, 1, rows_per_expert=25, num_layers=3, repetitions=1)
    [routing] = straggler._replays((before_LE, now_LE), 8, [2], scale)
    tokens_E = replay.count(routing.ids_LTK[1], 8)
    assert tokens_E.argmax() == 5
    assert tokens_E[5] == pytest.approx(100, abs=10)  # of every token's two, one
