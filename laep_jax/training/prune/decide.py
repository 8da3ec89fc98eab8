"""Whether a run prunes now, and by which plan (paper sections 3.2, 3.3)."""

import math

from laep_jax.distributed import require_same
from laep_jax.errors import NoPlanError
from laep_jax.laep.budget import Domains
from laep_jax.laep.plan import Plan
from laep_jax.laep.stability import StabilityReport, status
from laep_jax.tracking.pause import Pause
from laep_jax.training.evaluate import by_layer, masked_loads, masked_loss, validation_loss
from laep_jax.training.prune.guard import rise
from laep_jax.training.prune.transition import schedule
from laep_jax.training.trainer import Trainer


def decide(trainer: Trainer, step: int) -> None:
    """Runs the stability test and schedules a prune where it asks for one."""
    report = trainer.controller.assess()
    if warning := trainer.controller.collapse():
        trainer.console.event(f"step {step}: {warning}")
    trainer.log.write("stability", step, **report.to_record())
    trainer.console.state(status(report, trainer.config.laep))
    prunes = trainer.controller.wants_prune(step, report)
    trainer.pause = Pause()
    due = step + trainer.config.laep.prune_delay
    try:
        plan = _checked_plan(trainer, step, due) if prunes else None
    except NoPlanError as error:
        trainer.run_state.summary.not_pruned = str(error)
        trainer.console.event(f"step {step}: no plan: {error}")
        return
    _require_same_plan(step, plan)
    if plan is None or not plan.prunes:
        trainer.run_state.summary.not_pruned = _why_not(trainer, report, plan)
        return
    trainer.console.event(f"step {step}: a plan for step {due}" + (f", {report.reason}" if report.stable else ""))
    trainer.console.event(plan.table())
    trainer.log.write_file(f"plans/{step}.json", plan.to_json())
    schedule(trainer, plan, step, due)


def _why_not(trainer: Trainer, report: StabilityReport, plan: Plan | None) -> str:
    """Why nothing is pruned after this step and what would change that, for the closing table."""
    laep = trainer.controller.laep
    if plan:
        chosen, devices = max(len(layer.eligible) for layer in plan.layers), trainer.controller.rule.expert_parallel
        return (
            f"the rule chose {chosen} experts of a layer at most, and none can go: what is kept is rounded up to "
            f"MeshConfig.expert={devices}, and LaepConfig.min_experts and domain_beta hold; raise LaepConfig.alpha or "
            "LaepConfig.beta"
        )
    if trainer.controller.prunes >= laep.max_prunes:
        if not trainer.run_state.retries:
            return f"LaepConfig.max_prunes={laep.max_prunes}"
        return (
            "every plan cost more than LaepConfig.guard_tolerance: lower LaepConfig.alpha or LaepConfig.beta, "
            "raise LaepConfig.target_experts or LaepConfig.max_experts where they are set, or raise the tolerance"
        )
    if laep.prune_at_step is not None:
        return f"LaepConfig.prune_at_step={laep.prune_at_step} was not reached"
    return (
        f"the loads are not stable, {report.reason}: train longer, raise LaepConfig.max_moved, max_regret or "
        "max_excess, lower stable_windows or min_step, or name a step by LaepConfig.prune_at_step"
    )


def _checked_plan(trainer: Trainer, step: int, due: int) -> Plan | None:
    """A plan to prune that does no harm; None where none is left to try, see `laep_jax.training.prune.guard`.

    What the prune costs is measured here, with its experts masked, and not when the plan is applied: that takes no time
    of the pause, and both losses are of the same parameters.
    """
    if not (plan := trainer.controller.prune_plan({})).prunes:  # nor would it with the bound of every domain
        return plan
    model, tolerance = trainer.model, trainer.config.laep.guard_tolerance
    with trainer.pause.part("evaluate"):
        before = validation_loss(model.evaluate, model.state, *trainer.measured_on)
    experts = trainer.run_state.num_experts
    domains = {name: by_layer(tokens_LW, experts) for name, tokens_LW in before.tokens_by_domain.items()}
    while (plan := _make_plan(trainer, step, domains)).prunes:
        with trainer.pause.part("evaluate"):
            after = masked_loss(model.evaluate, model.state, plan, *trainer.measured_on)
        harm = rise(before.loss, after.loss)
        stands = tolerance is None or not harm > tolerance
        shares = plan.pruned_shares(domains)
        trainer.log.write(
            "dry_run",
            step,
            stands=stands,
            validation_loss_before=before.loss,
            validation_loss=after.loss,
            pruned_share_by_domain=shares,
        )
        trainer.console.event(f"step {step}: {_verdict(before.loss, after.loss, tolerance, stands)}")
        if stands:
            if due < trainer.config.train.num_steps:
                trainer.log_validation(step, "before_prune", before)
                trainer.log_validation(step, "after_prune", after)
                trainer.run_state.summary.pruned_share_by_domain = shares
            return plan
        trainer.soften_rule()
        if not trainer.controller.laep.max_prunes:
            return None
    return plan


def _verdict(before: float, after: float, tolerance: float | None, stands: bool) -> str:
    """The measurement for people."""
    measured = f"validation loss {before:.4f}, without the experts to prune {after:.4f}"
    if tolerance is None or math.isnan(before):
        return measured
    bound = f"LaepConfig.guard_tolerance={tolerance:g}"
    return f"{measured}, within {bound}" if stands else f"{measured}, above {bound}: the plan is refused"


def _make_plan(trainer: Trainer, step: int, domains: Domains) -> Plan:
    with trainer.pause.part("plan"):
        plan = trainer.controller.prune_plan(domains)
        _require_same_plan(step, plan)  # all must measure the same model
        if trainer.config.laep.placement_loads == "recorded":
            return plan
        first = max(0, step - trainer.config.train.eval_batches)
        batches = [trainer.dataset.train_batch(i) for i in range(first, step)]
        loads = masked_loads(trainer.model.evaluate, trainer.model.state, plan, batches, trainer.model.mesh)
        return trainer.controller.prune_plan(domains, [loads_E / len(batches) for loads_E in loads])


def _require_same_plan(step: int, plan: Plan | None) -> None:
    """Stops the run where processes would prune differently: their counts, NumPy or memory are not the same."""
    require_same({f"the plan after step {step}": plan.sha256() if plan else "no plan"})
