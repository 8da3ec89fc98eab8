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
VARIANTS = {"base", "pruned", "rearranged", "uniform"}


def drawn(num_experts: int, num_devices: int, num_tokens: int = 64, seed: int = 0) -> replay.Replay:
    rng = np.random.default_rng(seed)
    loads_LE = np.exp(2 * rng.standard_normal((3, num_experts)))
    logits_LTE = replay.draw_logits(loads_LE, num_tokens, rng)
    return replay.make_replay(logits_LTE, (0.5, 0.5, 0.5), num_devices)


def by_hand() -> replay.Replay:
    """One layer, six experts on two devices; each token's first choices, and the next one where it is needed."""
    choices = [(0, 1)] * 10 + [(0, 2)] * 8 + [(1, 3)] * 5 + [(0, 4, 2), (1, 5, 3)]
    logits_TE = np.zeros((len(choices), 6), np.float32)
    for token, order in enumerate(choices):
        logits_TE[token, list(order)] = [3, 2, 1][: len(order)]
    return replay.make_replay(logits_TE[None], alpha=(0.5,), expert_parallel=2)


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
        slack = len(sizes_LGS) if variant == "uniform" else 1e-6  # a row more here and there where rows do not divide
        assert fullest == pytest.approx(loads[variant], abs=slack), variant


def test_a_layer_by_hand():
    routing = by_hand()
    assert routing.tokens_LE.tolist() == [[19, 16, 8, 5, 1, 1]]
    assert routing.plan.layers[0].pruned == (4, 5)  # 3 as well would be 7 of 50 rows, more than a tenth
    assert replay.count(routing.masked_ids_LTK[0], 6).tolist() == [19, 16, 9, 6, 0, 0]
    loads = replay.largest_loads(routing)
    # 19 + 16 + 8; 19 + 16 beside 9 + 6; 19 + 6 beside 16 + 9; half of 50
    assert loads == {"base": 43, "pruned": 35, "rearranged": 25, "uniform": 25}
    assert replay.to_base(loads)["pruned"] == pytest.approx(35 / 43)


def test_slots_of_survivors_lie_at_the_front_of_each_device():
    slot_E = replay.slot_of_expert([5, 2, 4, 1], num_experts=6, num_devices=2)
    assert slot_E.tolist() == [-1, 4, 1, -1, 3, 0]


def test_synthetic_loads_are_pruned_as_the_paper_prunes():
    rng = np.random.default_rng(0)
    logits_LTE = replay.draw_logits(replay.synthetic_loads(64, rng), 1024, rng)
    alpha = replay.alpha_of_layers(replay.NUM_LAYERS, np.arange(replay.NUM_LAYERS))
    kept_L = np.array(replay.make_replay(logits_LTE, alpha, 8).plan.num_experts_after)
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
        assert set(result[field]) == VARIANTS, field
    assert set(result["rank_by_rank"]) == {"8", "16", "32", "64"}
    assert set(result["rank_by_rank"]["8"]) == VARIANTS
    assert set(result["rank_by_rank"]["64"]) == VARIANTS - {"uniform"}  # 48 do not divide by 64
    assert "rearranged" in straggler.table(result)


def test_connected_processes_wait_for_the_fullest(result):
    """CPU time. The short form pads its small groups of rows a lot, hence 20 % where the whole one stays in 10."""
    measured = result["measured"]
    assert measured["rearranged"] < 0.95 * measured["base"]
    assert measured["rearranged"] < 1.05 * measured["pruned"] < 1.15 * measured["base"]
    assert result["fixed"] < 0.5 * measured["uniform"]
    assert max(map(abs, result["error"].values())) < 0.2
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
    np.save(tmp_path / "counts.npy", np.ones((2, 3, 12), int))
    with pytest.raises(UserError, match="num_experts=12 is not divisible by expert_parallel=8"):
        straggler.run(["--counts", str(tmp_path / "counts.npy")])
    np.savez(tmp_path / "counts.npz", layer_0=np.ones(8, int), layer_1=np.ones(16, int))
    with pytest.raises(UserError, match=r"num_experts=\[8, 16\] must be the same in every layer"):
        straggler.run(["--counts", str(tmp_path / "counts.npz")])


def test_recorded_counts_are_sampled_by_layer(tmp_path):
    counts_NLE = np.ones((2, 3, 8), int)
    counts_NLE[:, 1, 5] = 1000
    np.save(tmp_path / "counts.npy", counts_NLE)
    loads_LE = straggler._recorded(tmp_path / "counts.npy")
    assert loads_LE[1].tolist() == [2, 2, 2, 2, 2, 2000, 2, 2]
    [routing] = straggler._replays(
        loads_LE, 8, [2], straggler.Scale(1, 1, rows_per_expert=25, num_layers=3, repetitions=1)
    )
    assert routing.tokens_LE.argmax(axis=1)[1] == 5
    assert routing.tokens_LE[1, 5] == pytest.approx(100, abs=10)  # of every token's two, one
