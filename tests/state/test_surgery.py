"""Prunes in device memory: plain slicing, on every mesh, without more memory than one leaf."""

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

OLD = (16, 16, 8, 8)
PLANS = {
    "layers become equal": (OLD, (8, 8, 8, 8)),
    "layers become unequal": ((16, 16, 16, 16), (16, 8, 8, 16)),
    "all differ": (OLD, (8, 16, 4, 5)),
    "nothing is pruned": (OLD, OLD),
}


@st.composite
def plans(draw):
    old = draw(st.lists(st.integers(1, 4), min_size=1, max_size=6))
    kept = [draw(st.permutations(range(count)))[: draw(st.integers(1, count))] for count in old]
    return tuple(old), kept


def abstract_of(state):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


def prune_state(state, num_experts, kept):
    rows_N = surgery.kept_rows(num_experts, kept)
    return surgery.prune_state(state, surgery.compile_gathers(abstract_of(state), len(rows_N)), rows_N)


@given(plans())
def test_rows_are_those_of_the_kept_experts_layer_by_layer(plan):
    old, kept = plan
    experts = [(layer, expert) for layer, count in enumerate(old) for expert in range(count)]
    rows_N = surgery.kept_rows(old, kept)
    assert [experts[row] for row in rows_N] == [(layer, expert) for layer, ids in enumerate(kept) for expert in ids]


@pytest.mark.parametrize(
    ("plan", "sizes"),
    [(plan, (1, 2, 4)) for plan in PLANS] + [("all differ", sizes) for sizes in [(2, 2, 2), (1, 1, 4), (1, 1, 1)]],
)
def test_prune_state_is_plain_slicing_per_layer(states, plan, sizes):
    old, new = PLANS[plan]
    kept, mesh = states.plan(old, new), states.mesh(*sizes)
    state = states.random(old, mesh)
    want = states.pruned_by_layer(state, old, kept)
    got = prune_state(state, old, kept)
    states.assert_equal(states.by_layer(got, new), want)
    assert jax.tree.map(lambda leaf: leaf.sharding, got) == tree_shardings(states.abstract(new, mesh), mesh)


def test_identity_plan_changes_no_bit(states):
    state = states.random(OLD, states.mesh())
    state.router_bias["bias_N"] *= jnp.float32(np.nan)
    want = [np.array(leaf).tobytes() for leaf in jax.tree.leaves(state)]
    got = prune_state(state, OLD, [range(count) for count in OLD])
    assert [np.array(leaf).tobytes() for leaf in jax.tree.leaves(got)] == want


def test_reordering_and_back_is_nothing(states):
    kept = states.plan(OLD, OLD)
    state = states.random(OLD, states.mesh())
    want = states.by_layer(state, OLD)
    moved = prune_state(state, OLD, kept)
    router = ".params['experts']['router_ND']"
    assert not np.array_equal(states.by_layer(moved, OLD)[router][0], want[router][0])
    back = prune_state(moved, OLD, [np.argsort(ids).tolist() for ids in kept])
    states.assert_equal(states.by_layer(back, OLD), want)


def test_old_leaves_go_as_soon_as_they_are_pruned(states):
    old, new = (16, 16, 16, 16), (16, 8, 8, 16)
    state = states.random(old, states.mesh())
    rows_N = surgery.kept_rows(old, states.plan(old, new))
    gathers = surgery.compile_gathers(abstract_of(state), len(rows_N))
    leaves, before = jax.tree.leaves(state), {id(leaf) for leaf in jax.live_arrays()}
    mine, peak = {id(x) for x in leaves}, []

    def measured(program):
        def call(*args):
            leaf = program(*args)
            live = [x for x in jax.live_arrays() if id(x) in mine or id(x) not in before]
            peak.append(sum(x.nbytes for x in live))
            return leaf

        return call

    total = sum(leaf.nbytes for leaf in leaves)
    of_experts = [state.params["experts"], state.router_bias]
    pruned = surgery.prune_state(state, {key: measured(program) for key, program in gathers.items()}, rows_N)
    assert len(peak) == 10  # three parameters with two moments each, and the bias
    assert max(peak) <= total + pruned.params["experts"]["gate_up_NDG"].nbytes
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(of_experts))
    assert not pruned.params["embedding_VD"].is_deleted()


def test_one_program_a_parameter_prunes_every_layer_without_a_collective(states):
    mesh = states.mesh()
    gathers = surgery.compile_gathers(states.abstract(OLD, mesh), 30)
    assert len(gathers) == 4
    for (shape, _), program in gathers.items():
        text = program.as_text()
        assert text is not None
        assert not any(word in text for word in ("all-gather", "all-to-all", "all-reduce", "collective-permute"))
        assert program.memory_analysis().temp_size_in_bytes <= 4 * np.prod(shape) / 8


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
        surgery.kept_rows((4, 4), kept)


def test_pruned_config_has_the_counts_and_keeps_the_rest(states):
    config = Config(model=states.config(OLD), mesh=MeshConfig(1, 2, 4))
    cut = surgery.pruned_config(config, states.plan(OLD, (8, 8, 8, 4)))
    assert cut == config.with_num_experts((8, 8, 8, 4))


@pytest.mark.parametrize(
    ("counts", "message"),
    [((16, 16, 8, 3), "=3 is below MeshConfig.expert=4"), ((16, 16, 1, 8), "is below top_k=2")],
)
def test_pruned_config_refuses_what_does_not_fit_the_mesh_or_top_k(states, counts, message):
    config = Config(model=states.config(OLD), mesh=MeshConfig(1, 2, 4))
    with pytest.raises(UserError, match=message):
        surgery.pruned_config(config, states.plan(OLD, counts))
