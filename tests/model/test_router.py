import jax
import jax.numpy as jnp
import numpy as np
import pytest

from laep_jax.config import AuxLossConfig, ModelConfig
from laep_jax.laep.layout import windows
from laep_jax.model.router import balance_losses, balance_sums, count_by_domain, count_tokens, route, update_bias

ALL = AuxLossConfig(mixtral=1.0, mixtral_hf=1.0, deepseek_v3=1.0, router_z=1.0)


def router(num_experts=4, **settings):
    return ModelConfig(num_experts=num_experts, **settings)


def _losses(logits_BSE, valid_BS, top_k, is_own_E=None, score="softmax"):
    logits_BSE = jnp.float32(logits_BSE)
    is_own_E = np.ones(logits_BSE.shape[-1], bool) if is_own_E is None else is_own_E
    ids_BSK, _ = route(logits_BSE, jnp.where(is_own_E, 0, -jnp.inf), valid_BS, router(top_k=top_k))
    counts_E = count_tokens(ids_BSK, logits_BSE.shape[-1]).sum(0)
    sums = balance_sums(logits_BSE, is_own_E, ids_BSK, valid_BS, score, ALL)
    return counts_E, balance_losses(sums, counts_E, jnp.sum(is_own_E), top_k, ALL)


def test_worked_example_of_the_paper_page():
    logits = [[[2, 1, 0, -1], [0, 2, 1, -1], [2, -1, 1, 0]]]
    counts_E, losses = _losses(logits, jnp.ones((1, 3), bool), top_k=2)
    assert counts_E.tolist() == [2, 2, 2, 0]
    assert losses["mixtral"] == pytest.approx(1.266106, abs=1e-6)
    assert losses["mixtral_hf"] == pytest.approx(2.532212, abs=2e-6)
    assert losses["router_z"] == pytest.approx(5.954526, abs=2e-6)
    assert losses["deepseek_v3"] == pytest.approx(1.266106, abs=1e-6)  # one sequence: the same sum


def test_neighbours_in_the_window_change_no_loss_and_no_gradient():
    logits, valid_BS = np.random.default_rng(0).normal(size=(2, 5, 4)), jnp.ones((2, 5), bool)
    is_own_E = np.array([False, True, True, True, True, False])
    wide = np.pad(logits, ((0, 0), (0, 0), (1, 1)), constant_values=9)

    def total(logits_BSE, is_own_E=None):
        counts_E, losses = _losses(logits_BSE, valid_BS, 2, is_own_E)
        return sum(losses.values()), (counts_E, losses)

    gradient, (counts_E, losses) = jax.grad(total, has_aux=True)(jnp.float32(logits))
    wide_gradient, (wide_counts_E, wide_losses) = jax.grad(total, has_aux=True)(jnp.float32(wide), is_own_E)
    assert wide_counts_E.tolist() == [0, *counts_E.tolist(), 0]
    for name, value in losses.items():
        assert wide_losses[name] == pytest.approx(float(value), rel=1e-6), name
    np.testing.assert_allclose(wide_gradient, np.pad(gradient, ((0, 0), (0, 0), (1, 1))), rtol=1e-5, atol=1e-8)


def test_padding_changes_no_loss():
    logits = np.random.default_rng(0).normal(size=(2, 5, 4))
    valid_BS = jnp.array([[True] * 3 + [False] * 2] * 2)
    counts_E, losses = _losses(logits, valid_BS, top_k=2)
    short_counts_E, short_losses = _losses(logits[:, :3], jnp.ones((2, 3), bool), top_k=2)
    np.testing.assert_array_equal(counts_E, short_counts_E)
    for name, value in short_losses.items():
        assert losses[name] == pytest.approx(float(value), rel=1e-6), name


def test_weights_are_a_softmax_over_the_chosen_and_the_bias_only_chooses():
    logits_TE = jnp.array([[1.0, 3.0, 2.0, 0.0]])
    ids_TK, weights_TK = route(logits_TE, jnp.array([9.0, 0.0, 0.0, 0.0]), jnp.array([True]), router(top_k=2))
    assert sorted(ids_TK[0].tolist()) == [0, 1]
    by_id = dict(zip(ids_TK[0].tolist(), weights_TK[0].tolist(), strict=True))
    assert by_id[1] == pytest.approx(1 / (1 + np.exp(-2)))
    assert by_id[0] + by_id[1] == pytest.approx(1)


def test_the_weight_of_a_single_expert_is_its_share_of_all_that_are_not_masked():
    """Over the chosen one alone the softmax is 1, and its router would never learn."""
    logits_TE, bias_E, valid_T = (
        jnp.array([[1.0, 3.0, 2.0, 0.0]]),
        jnp.array([0.0, 0.0, 9.0, -np.inf]),
        jnp.array([True]),
    )

    def weight(logits_TE):
        ids_TK, weights_TK = route(logits_TE, bias_E, valid_T, router(top_k=1))
        return weights_TK[0, 0], ids_TK[0, 0]

    (share, chosen), gradient_TE = jax.value_and_grad(weight, has_aux=True)(logits_TE)
    shares_E = np.exp([1, 3, 2]) / np.sum(np.exp([1, 3, 2]))
    assert chosen == 2
    assert share == pytest.approx(shares_E[2], rel=1e-6)
    np.testing.assert_allclose(gradient_TE[0], [*(shares_E[2] * (np.array([0, 0, 1]) - shares_E)), 0], rtol=1e-5)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_experts_are_chosen_by_score_and_bias_and_weighted_by_the_score(score, norm_topk_prob):
    logits_TE = np.random.default_rng(0).normal(size=(50, 6))
    bias_E = np.linspace(-0.2, 0.2, 6)
    score_TE = 1 / (1 + np.exp(-logits_TE)) if score == "sigmoid" else np.exp(logits_TE)
    score_TE /= score_TE.sum(1, keepdims=True) if score == "softmax" else 1
    config = router(6, top_k=3, router_score=score, norm_topk_prob=norm_topk_prob)
    ids_TK, weights_TK = route(jnp.float32(logits_TE), jnp.float32(bias_E), jnp.ones(50, bool), config)
    np.testing.assert_array_equal(ids_TK, np.argsort(-(score_TE + bias_E), axis=1)[:, :3])
    assert (np.asarray(ids_TK) != np.argsort(-(logits_TE + bias_E), axis=1)[:, :3]).any()
    want_TK = np.take_along_axis(score_TE, np.asarray(ids_TK), 1)
    want_TK /= want_TK.sum(1, keepdims=True) if norm_topk_prob else 1
    np.testing.assert_allclose(weights_TK, want_TK, rtol=1e-6)


def test_logits_whose_scores_are_equal_after_rounding_keep_their_order_without_a_bias():
    logits_TE = jnp.array([[-200.0, 0.0, -150.0, -190.0]])
    ids_TK, _ = route(logits_TE, jnp.zeros(4), jnp.array([True]), router(top_k=3))
    assert ids_TK[0].tolist() == [1, 2, 3]


def test_sigmoids_enter_the_losses_as_shares_of_their_sum():
    logits = [[[2, 1, 0, -1], [0, 2, 1, -1], [2, -1, 1, 0]]]
    _, losses = _losses(logits, jnp.ones((1, 3), bool), top_k=2, score="sigmoid")
    share_TE = 1 / (1 + np.exp(-np.array(logits[0], float)))
    share_TE /= share_TE.sum(1, keepdims=True)
    want = 4 * np.sum(np.array([2, 2, 2, 0]) / 6 * share_TE.mean(0))
    assert losses["mixtral"] == pytest.approx(want, rel=1e-6)
    assert losses["deepseek_v3"] == pytest.approx(want, rel=1e-6)


def test_padding_is_routed_to_no_expert():
    ids_TK, weights_TK = route(jnp.zeros((2, 4)), jnp.zeros(4), jnp.array([True, False]), router(top_k=2))
    assert ids_TK[1].tolist() == [4, 4]
    assert weights_TK[1].tolist() == [0, 0]
    assert count_tokens(ids_TK, 4).sum() == 2


def test_loss_free_bias_rises_for_the_starved_and_falls_for_the_busy():
    all_own_LW = np.ones((1, 4), bool)
    bias_E = update_bias(jnp.zeros(4), jnp.array([[10, 4, 4, 2]]), all_own_LW, 0.1)
    np.testing.assert_allclose(bias_E, [-0.1, 0.1, 0.1, 0.1])
    np.testing.assert_array_equal(update_bias(bias_E, jnp.array([[3, 3, 3, 3]]), all_own_LW, 0.1), bias_E)


def test_the_loss_free_bias_of_layers_of_unequal_size():
    counts_LW = jnp.array([[10, 4, 4, 2], [0, 6, 0, 0], [0, 1, 5, 6]])
    is_own_LW = windows((4, 2, 3))[1]
    bias_N = update_bias(jnp.zeros(9), counts_LW, is_own_LW, 0.1)
    np.testing.assert_allclose(bias_N, [-0.1, 0.1, 0.1, 0.1, 0.1, -0.1, 0.1, -0.1, -0.1])


def test_counts_of_domains_are_those_of_their_tokens_and_leave_out_padding():
    rng = np.random.default_rng(0)
    ids_BSK = np.argsort(rng.random((3, 10, 5)), axis=-1)[..., :2]
    ids_BSK[rng.random((3, 10)) < 0.3] = 5
    domain_BS = rng.integers(0, 4, (3, 10))
    found_ME = count_by_domain(jnp.asarray(ids_BSK), 5, jnp.asarray(domain_BS[..., None] == np.arange(4)))
    for domain, found_E in enumerate(found_ME):
        expected_E = np.bincount(ids_BSK[domain_BS == domain].ravel(), minlength=6)[:5]
        np.testing.assert_array_equal(found_E, expected_E)
