"""A plan that does harm is refused before anything is cut; what comes of it is a softer rule, or none."""

import math

import pytest

from laep_jax.config import Config, LaepConfig
from laep_jax.laep.plan import Plan
from laep_jax.training.evaluate import ValidationLoss
from laep_jax.training.prune import controller, decide
from laep_jax.training.prune.guard import softened
from laep_jax.training.start import train
from tests.support.tiny_run import change, differences, records, tiny_config

PLAN_STEP, PRUNE_STEP, NUM_STEPS = 40, 42, 46
BETA, TOLERANCE = 0.8, 0.02


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    return tiny_config(
        str(tmp_path_factory.mktemp("tokens")),
        model={"hidden_size": 32, "head_dim": 8, "ffn_size": 32, "top_k": 1},
        aux_loss={"mixtral": 0.05},
        laep={
            "alpha": 4.0,
            "beta": BETA,
            "prune_at_step": PLAN_STEP,
            "prune_delay": PRUNE_STEP - PLAN_STEP,
            "guard_tolerance": TOLERANCE,
        },
        optimizer={"learning_rate": 2e-2},
        train={"num_steps": NUM_STEPS, "eval_every": 100, "eval_batches": 2, "checkpoint_every": 50},
    )


def harmful_plan(tokens, rule, make_plan=controller.make_plan, **settings):
    """With the rule as it is, not softened, the experts that are used most are pruned."""
    if rule.beta == BETA:
        tokens = [layer_NE.max() - layer_NE for layer_NE in tokens]
    return make_plan(tokens, rule, **settings)


def test_a_harmful_plan_is_refused_and_a_softer_one_applied(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(controller, "make_plan", harmful_plan)
    summary = train(config, tmp_path)
    first, second = records(tmp_path, "dry_run")
    assert (first["step"], first["stands"], second["stands"]) == (PLAN_STEP, False, True)
    assert first["validation_loss"] > first["validation_loss_before"] + TOLERANCE >= second["validation_loss"]
    losses = [(eval["step"], eval["when"], eval["validation_loss"]) for eval in records(tmp_path, "eval")[:2]]
    assert losses == [
        (PLAN_STEP, "before_prune", second["validation_loss_before"]),
        (PLAN_STEP, "after_prune", second["validation_loss"]),
    ]
    assert summary["validation_loss_after_prune"] == second["validation_loss"]
    [cut] = records(tmp_path, "prune")
    assert Plan.from_json((tmp_path / cut["plan"]).read_text()).rule.beta == BETA / 2
    assert summary["prune_steps"] == [PRUNE_STEP]
    told = " ".join(capsys.readouterr().out.split())
    assert "above LaepConfig.guard_tolerance=0.02: the plan is refused" in told


def test_no_domain_loses_more_than_its_bound(config, tmp_path):
    """Of the validation text, measured when the plan is made; without the bound one does."""
    most = {}
    for bound in (None, 0.1):
        run_dir = tmp_path / str(bound)
        uneven = change(config, aux_loss={"mixtral": 0.0, "loss_free_bias": 0.05})
        summary = train(change(uneven, laep={"domain_beta": bound, "guard_tolerance": None}), run_dir)
        [checked] = records(run_dir, "dry_run")
        assert len(checked["pruned_share_by_domain"]) > 3
        assert summary["pruned_share_by_domain"] == checked["pruned_share_by_domain"]
        assert summary["prune_steps"] == [PRUNE_STEP]
        most[bound] = max(max(shares) for shares in checked["pruned_share_by_domain"].values())
    assert most[0.1] <= 0.1 < most[None]


def test_a_run_whose_loads_do_not_allow_its_settings_says_so_and_goes_on(config, tmp_path):
    laep = {"alpha": 0.01, "target_experts": 0.5, "prune_at_step": 4, "prune_delay": 1}
    summary = train(change(config, laep=laep, train={"num_steps": 6}), tmp_path)
    assert summary["steps"] == 6
    assert summary["not_pruned"].startswith("target_experts=0.5 is below ")


def test_after_the_last_retry_it_is_a_run_that_never_prunes(config, tmp_path, monkeypatch):
    train(change(config, laep={"max_prunes": 0}), tmp_path / "never")
    monkeypatch.setattr(controller, "make_plan", harmful_plan)
    summary = train(change(config, laep={"max_retries": 0}), tmp_path / "given up")
    assert summary["not_pruned"].startswith("every plan cost more than LaepConfig.guard_tolerance: lower")
    different = differences(tmp_path / "given up", tmp_path / "never")
    assert different == ["dry_run records", "retries", "summary"]


@pytest.mark.parametrize(
    ("losses", "verdicts"),
    [((math.nan, 2.0), [True]), ((2.0, math.nan, math.inf, 2.0), [False, False, True]), ((2.0, 2.0), [True])],
)
def test_a_loss_that_is_not_a_number_decides_nothing_or_is_harm(config, tmp_path, monkeypatch, losses, verdicts):
    """Without the one before there is nothing to compare with; where only the masked model's is none, that is harm."""
    measured = iter(losses)
    for name in ("validation_loss", "masked_loss"):
        monkeypatch.setattr(decide, name, lambda *arguments: ValidationLoss(next(measured), {}, {}, {}))
    early = {"prune_at_step": 4, "prune_delay": 9, "placement_loads": "recorded"}
    train(change(config, laep=early, train={"num_steps": 5}), tmp_path)
    assert [record["stands"] for record in records(tmp_path, "dry_run")] == verdicts


def test_the_rule_softens_by_halves_and_then_prunes_no_more():
    laep = LaepConfig(alpha="hybrid", beta=0.1, max_retries=2)
    assert softened(laep, 0, 6) == laep
    assert softened(laep, 2, 6).alpha == (0.05, 0.1, 0.1, 0.1, 0.1, 0.05)
    assert softened(laep, 2, 6).beta == pytest.approx(0.025)
    assert softened(laep, 3, 6).max_prunes == 0
    unbounded = softened(LaepConfig(alpha="inf", beta=0.4), 1, 2)
    assert (unbounded.alpha, unbounded.beta) == ("inf", 0.2)
