"""The dry run of a prune: what masking predicts is what the pruned model then has."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from laep_jax.config import Config, DataConfig, MeshConfig, ModelConfig
from laep_jax.laep.plan import chosen_plan
from laep_jax.laep.rule import PruneRule
from laep_jax.sharding import make_mesh
from laep_jax.state.surgery import compile_gathers, kept_rows, prune_state, pruned_config
from laep_jax.state.tree import abstract_state, init_state, initial_layout
from laep_jax.training.evaluate import ValidationLoss, masked_loss, validation_loss
from laep_jax.training.step import make_eval_step

KEPT = ((6, 1, 3, 0), (7, 6, 5, 4, 3, 2, 1, 0), (2, 5, 7, 4))  # of 8 each, in new places
PRUNED = ((2, 4, 5, 7), (), (0, 1, 3, 6))
DOMAINS = ("books", "nothing", "web")


def model_and_state(dispatch: str):
    sizes = {"vocab_size": 128, "num_layers": 3, "hidden_size": 16, "num_heads": 4, "head_dim": 4, "ffn_size": 8}
    config = Config(
        model=ModelConfig(**sizes, num_experts=8, router_init=1.0, dispatch=dispatch),
        mesh=MeshConfig(fsdp=2, expert=4),
        data=DataConfig(batch_size=16, sequence_length=24),
    )
    state = init_state(config, make_mesh(config.mesh))
    params = jax.tree.map(lambda leaf: 5 * leaf if leaf.ndim > 2 else leaf, state.params)  # so that experts matter
    return config, dataclasses.replace(state, params=params)


def batches() -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(2):
        tokens_BS = rng.integers(0, 128, (16, 24)).astype(np.int32)
        segments_BS = np.where(np.arange(24) < rng.integers(4, 25, (16, 1)), 1, 0).astype(np.int32)
        found.append(
            {
                "tokens_BS": tokens_BS,
                "targets_BS": np.where(segments_BS > 0, np.roll(tokens_BS, -1, axis=1), -1).astype(np.int32),
                "segments_BS": segments_BS,
                "positions_BS": np.tile(np.arange(24, dtype=np.int32), (16, 1)),
                "domains_BS": 2 * rng.integers(0, 2, (16, 24)).astype(np.int32),
            }
        )
    return found


def eval_step(config, mesh):
    return functools.partial(make_eval_step(config, mesh, len(DOMAINS)), initial_layout(config))


def predicted_and_cut(dispatch: str) -> tuple[ValidationLoss, ValidationLoss, ValidationLoss]:
    """The validation loss before the prune, as masking predicts it, and of the pruned model."""
    config, state = model_and_state(dispatch)
    mesh = make_mesh(config.mesh)
    step = eval_step(config, mesh)
    rule = PruneRule.from_settings(config.laep, 3, top_k=2, expert_parallel=4)
    plan = chosen_plan([np.ones(8)] * 3, PRUNED, rule)
    before = validation_loss(step, state, batches(), mesh, DOMAINS)
    predicted = masked_loss(step, state, plan, batches(), mesh, DOMAINS)
    smaller = pruned_config(config, KEPT)
    rows_N = kept_rows(config.model.experts_per_layer, KEPT)
    cut = prune_state(state, compile_gathers(abstract_state(config, mesh), len(rows_N)), rows_N)
    return (
        before,
        predicted,
        validation_loss(eval_step(smaller, mesh), cut, batches(), mesh, DOMAINS),
    )


def test_where_every_token_adds_up_its_own_experts_the_prediction_is_exact():
    """Then a sum's order does not depend on where experts are, if the router is as narrow as here.

    XLA:CPU multiplies with up to some twenty experts column by column; a wider router's logits are sums in another
    order, and differ in the last bit from those of a narrower one.
    """
    before, predicted, after = predicted_and_cut("ragged_all_to_all")
    assert predicted == after
    assert abs(after.loss - before.loss) > 1e-4
    assert after.targets_by_domain.keys() == after.loss_by_domain.keys() == {"books", "web"}


def test_where_devices_add_up_their_experts_it_is_exact_but_for_the_order_of_sums():
    before, predicted, after = predicted_and_cut("all_gather")
    assert predicted.loss == pytest.approx(after.loss, rel=1e-6)
    assert predicted.loss_by_domain == pytest.approx(after.loss_by_domain, rel=1e-6)
    assert predicted.targets_by_domain == after.targets_by_domain == before.targets_by_domain


def test_the_loss_is_the_mean_over_targets_not_over_domains_or_batches():
    def step(params, router_bias, batch):
        return params * np.float32([3, 0, 8]), np.int32([1, 0, 4]), np.arange(24).reshape(2, 3, 4)

    config, state = model_and_state("all_gather")
    state = dataclasses.replace(state, params=np.float32(2))
    loss = validation_loss(step, state, [{}, {}], make_mesh(config.mesh), DOMAINS)
    assert loss == ValidationLoss(22 / 5, {"books": 6.0, "web": 4.0}, {"books": 2, "web": 8}, {})
    assert loss.tokens_by_domain.keys() == {"books", "web"}
    assert loss.tokens_by_domain["web"].tolist() == [[16, 18, 20, 22], [40, 42, 44, 46]]


@pytest.mark.parametrize("dispatch", ["all_gather", "ragged_all_to_all"])
def test_tokens_are_counted_by_domain(dispatch):
    """In every layer, each of a domain's tokens as often as it has experts."""
    config, state = model_and_state(dispatch)
    mesh = make_mesh(config.mesh)
    step = eval_step(config, mesh)
    counted = validation_loss(step, state, batches(), mesh, DOMAINS).tokens_by_domain
    total_LE = sum(counted.values())
    assert total_LE.sum(axis=1).tolist() == [2 * sum(int((b["segments_BS"] > 0).sum()) for b in batches())] * 3
    for number, name in ((0, "books"), (2, "web")):
        tokens = sum(int(((b["segments_BS"] > 0) & (b["domains_BS"] == number)).sum()) for b in batches())
        assert counted[name].sum(axis=1).tolist() == [2 * tokens] * 3
    one = [b | {"domains_BS": np.zeros_like(b["domains_BS"])} for b in batches()]
    np.testing.assert_array_equal(validation_loss(step, state, one, mesh, DOMAINS).tokens_by_domain["books"], total_LE)
