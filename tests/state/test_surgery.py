import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from laep_jax.config import Config, MeshConfig
from laep_jax.errors import UserError
from laep_jax.sharding import tree_shardings
from laep_jax.state import surgery

PLANS = {
    "layers merge into one run": ((16, 16, 8, 8), (8, 8, 8, 8)),
    "a run splits in three": ((16, 16, 16, 16), (16, 8, 8, 16)),
    "runs shift": ((16, 16, 8, 8), (8, 16, 4, 8)),
    "nothing is pruned": ((16, 16, 8, 8), (16, 16, 8, 8)),
}


@st.composite
def plans(draw):
    old = draw(st.lists(st.integers(1, 4), min_size=1, max_size=6))
    kept = [draw(st.permutations(range(count)))[: draw(st.integers(1, count))] for count in old]
    return tuple(old), kept


def runs_of(counts):
    return [(len(list(group)), count) for count, group in itertools.groupby(counts)]


def prune_state(state, kept, model, abstract_new):
    abstract_old = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
    )
    gathers = surgery.compile_gathers(abstract_old, kept, model, abstract_new)
    return surgery.prune_state(state, gathers, kept, model, abstract_new)


@given(plans())
def test_pieces_name_every_layer_once_and_in_order(plan):
    old, kept = plan
    old_runs = runs_of(old)
    first_layer = [sum(n for n, _ in old_runs[:run]) for run in range(len(old_runs))]
    pieces = surgery.moved_pieces(old_runs, kept)
    layers = [
        (first_layer[piece.run] + piece.start + row, slots.tolist())
        for run in pieces
        for piece in run
        for row, slots in enumerate(piece.kept)
    ]
    assert layers == list(enumerate(kept))
    new_runs = [(sum(len(piece.kept) for piece in run), run[0].kept.shape[1]) for run in pieces]
    assert new_runs == runs_of([len(slots) for slots in kept])


@pytest.mark.parametrize(
    ("plan", "sizes"),
    [(plan, (1, 2, 4)) for plan in PLANS] + [("runs shift", sizes) for sizes in [(2, 2, 2), (1, 1, 4), (1, 1, 1)]],
)
def test_prune_state_is_plain_slicing_per_layer(states, plan, sizes):
    old, new = PLANS[plan]
    kept, mesh = states.plan(old, new), states.mesh(*sizes)
    state = states.random(old, mesh)
    want = states.pruned_by_layer(state, kept)
    abstract = states.abstract(new, mesh)
    got = prune_state(state, kept, states.config(old), abstract)
    states.assert_equal(states.by_layer(got), want)
    assert jax.tree.map(lambda leaf: leaf.sharding, got) == tree_shardings(abstract, mesh)


def test_identity_plan_changes_no_bit(states):
    counts, mesh = (16, 16, 8, 8), states.mesh()
    state = states.random(counts, mesh)
    state.router_bias["runs"][0]["bias_E"] *= jnp.float32(np.nan)
    want = [np.array(leaf).tobytes() for leaf in jax.tree.leaves(state)]
    identity = [range(count) for count in counts]
    got = prune_state(state, identity, states.config(counts), states.abstract(counts, mesh))
    assert [np.array(leaf).tobytes() for leaf in jax.tree.leaves(got)] == want


def test_rearranging_and_back_is_nothing(states):
    counts, mesh = (16, 16, 8, 8), states.mesh()
    model, abstract = states.config(counts), states.abstract(counts, mesh)
    kept = states.plan(counts, counts)
    state = states.random(counts, mesh)
    want = states.by_layer(state)
    moved = prune_state(state, kept, model, abstract)
    router = ".params['runs']['moe']['router_DE']"
    assert not np.array_equal(states.by_layer(moved)[router][0], want[router][0])
    back = prune_state(moved, [np.argsort(slots).tolist() for slots in kept], model, abstract)
    states.assert_equal(states.by_layer(back), want)


def test_old_leaves_go_as_soon_as_they_are_pruned(states, monkeypatch):
    old, new = (16, 16, 16, 16), (16, 8, 8, 16)
    mesh = states.mesh()
    state, abstract = states.random(old, mesh), states.abstract(new, mesh)
    leaves, before = jax.tree.leaves(state), {id(leaf) for leaf in jax.live_arrays()}
    cut_leaf, peak = surgery._gather_leaf, []

    def measured(*args):
        leaf = cut_leaf(*args)
        mine = {id(x) for x in leaves}
        live = [x for x in jax.live_arrays() if id(x) in mine or id(x) not in before]
        peak.append(sum(x.nbytes for x in live))
        return leaf

    monkeypatch.setattr(surgery, "_gather_leaf", measured)
    total = sum(leaf.nbytes for leaf in leaves)
    cut = prune_state(state, states.plan(old, new), states.config(old), abstract)
    largest = sum(run["moe"]["gate_up_EDG"].nbytes for run in cut.params["runs"])
    assert len(peak) > 20
    assert max(peak) <= total + largest
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params["runs"], state.router_bias)))
    assert not cut.params["embedding_VD"].is_deleted()


def test_gather_never_builds_the_whole_leaf_on_a_device(states):
    mesh = states.mesh(fsdp=1, expert=8)
    leaf = states.random((16, 16), mesh).params["runs"][0]["moe"]["gate_up_EDG"]
    kept = np.array(states.plan((16, 16), (8, 8)), np.int32)
    gather = surgery._make_gather(1, (surgery._whole_experts(leaf, 1),), leaf.sharding)
    memory = gather.lower([leaf], [np.int32(0)], [kept]).compile().memory_analysis()
    assert memory.temp_size_in_bytes < leaf.nbytes / 2  # of every expert's rows: an eighth in, a sixteenth out


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ([[0, 1]], "plan layers=1 does not fit a model of 2 layers"),
        ([[0, 1], [0, 4]], r"plan kept\[1\]=\[0, 4\] must name distinct slots from 0 to 3"),
        ([[0, -1], [0, 1]], r"plan kept\[0\]=\[0, -1\]"),
        ([[0, 1], [2, 2]], r"plan kept\[1\]=\[2, 2\]"),
        ([[0, 1], []], r"plan kept\[1\]=\[\]"),
    ],
)
def test_plan_that_does_not_fit_is_refused(kept, message):
    with pytest.raises(UserError, match=message):
        surgery.moved_pieces([(2, 4)], kept)


def test_pruned_config_has_the_counts_and_keeps_the_rest(states):
    config = Config(model=states.config((16, 16, 8, 8)), mesh=MeshConfig(1, 2, 4))
    cut = surgery.pruned_config(config, states.plan((16, 16, 8, 8), (8, 8, 8, 4)))
    assert cut == config.with_num_experts((8, 8, 8, 4))


@pytest.mark.parametrize(
    ("counts", "message"),
    [((16, 16, 8, 6), "not divisible by MeshConfig.expert=4"), ((16, 16, 1, 8), "is below top_k=2")],
)
def test_pruned_config_refuses_what_does_not_fit_the_mesh_or_top_k(states, counts, message):
    config = Config(model=states.config((16, 16, 8, 8)), mesh=MeshConfig(1, 2, 4))
    with pytest.raises(UserError, match=message):
        surgery.pruned_config(config, states.plan((16, 16, 8, 8), counts))
