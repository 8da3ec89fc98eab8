"""What a run does to its experts: decided, checked, prepared, applied (paper sections 3.2, 3.3).

A plan is applied `LaepConfig.cut_delay` steps after it was made, whether the smaller model's steps, which are
compiled meanwhile, are ready or waited for: so every process cuts after the same step, and a resumed run too. The cut
has two phases: the old model is saved together with the plan; then the survivors are restored into the smaller
model. Whatever stops the run between the two, starting again applies the plan.
"""

import dataclasses
import math

from laep_jax.distributed import require_same
from laep_jax.laep.plan import Plan, apply_plan_to_lineage
from laep_jax.laep.stability import StabilityReport
from laep_jax.state.optimizer import without_moments
from laep_jax.state.tree import TrainState
from laep_jax.tracking.console import stability_text
from laep_jax.training.evaluate import heldout_loss, masked_loads, masked_loss
from laep_jax.training.prune.guard import rise
from laep_jax.training.prune.transition import Cut, Pause
from laep_jax.training.trainer import Run


def decide(run: Run, step: int) -> None:
    """The stability test; announces what it asks for."""
    report = run.controller.assess()
    if warning := run.controller.collapse():
        run.console.event(f"step {step}: {warning}")
    run.log.write("stability", step, **dataclasses.asdict(report))
    run.console.state(stability_text(dataclasses.asdict(report), run.config.laep))
    prunes = run.controller.wants_prune(step, report)
    run.pause = Pause()
    with run.pause.part("plan"):
        plan = _checked_plan(run, step) if prunes else None
        if plan is None or not plan.prunes:  # moving alone must be worth a pause
            run.progress.summary["not_pruned"] = _why_not(run, report, plan)
            plan = run.controller.rearrangement()
        _require_same_plan(step, plan)
        if plan is None:
            return
        cut_step = step + run.config.laep.cut_delay
        run.console.event(f"step {step}: a plan for step {cut_step}" + (f", {report.reason}" if prunes else ""))
        run.console.event(plan.table())
        run.log.write_file(f"plans/{step}.json", plan.to_json())
        run.progress.announce(plan, cut_step)
        begin(run, plan)


def _why_not(run: Run, report: StabilityReport, plan: Plan | None) -> str:
    """Why nothing is pruned after this step and what would change that, for the closing table."""
    laep = run.controller.laep
    if plan:
        chosen = max(len(layer.eligible) for layer in plan.layers)
        return (
            f"the rule chose at most {chosen} experts of a layer, which go by {run.controller.rule.expert_parallel} "
            "(MeshConfig.expert): raise LaepConfig.alpha or LaepConfig.beta"
        )
    if run.controller.prunes >= laep.max_prunes:
        if not run.progress.retries:
            return f"LaepConfig.max_prunes={laep.max_prunes}"
        return (
            "every plan cost more than LaepConfig.guard_tolerance: lower LaepConfig.alpha or LaepConfig.beta, "
            "or raise the tolerance"
        )
    if laep.prune_at_step is not None:
        return f"LaepConfig.prune_at_step={laep.prune_at_step} was not reached"
    return (
        f"the loads are not stable, {report.reason}: train longer, lower LaepConfig.rank_correlation, overlap, "
        "stable_windows or min_step, or name a step by LaepConfig.prune_at_step"
    )


def _checked_plan(run: Run, step: int) -> Plan | None:
    """A plan to prune that does no harm; None where none is left to try, see `laep_jax.training.prune.guard`."""
    plan, tolerance = _make_plan(run, step), run.config.laep.guard_tolerance
    if tolerance is None or not plan.prunes:
        return plan
    measured = (run.heldout, run.mesh, run.dataset.domains)
    before = heldout_loss(run.steps.evaluate, run.state, *measured).loss
    while True:
        pruned = [layer.pruned for layer in plan.layers]
        loss = masked_loss(run.steps.evaluate, run.state, pruned, *measured).loss
        harm = rise(before, loss)
        stands = not harm > tolerance
        run.log.write("dry_run", step, stands=stands, heldout_loss_before=before, heldout_loss=loss)
        run.console.event(f"step {step}: {_verdict(harm, tolerance, stands)}")
        if stands:
            return plan
        run.progress.retries += 1
        run.controller = run.new_controller(run.config, run.controller.history)
        if not run.controller.laep.max_prunes:
            return None
        plan = _make_plan(run, step)


def _verdict(harm: float, tolerance: float, stands: bool) -> str:
    """The guard's measurement for people."""
    if math.isnan(harm):
        return "the validation loss is not a number, so that the plan is not checked"
    bound = f"LaepConfig.guard_tolerance={tolerance:g}"
    cost = f"without the experts to prune the validation loss is {harm:+.4f} nats"
    return f"{cost}, within {bound}" if stands else f"{cost}, above {bound}: the plan is refused"


def _make_plan(run: Run, step: int) -> Plan:
    plan = run.controller.prune_plan()
    _require_same_plan(step, plan)  # all must measure the same model
    if run.config.laep.placement_loads == "recorded":
        return plan
    first = max(0, step - run.config.train.eval_batches)
    batches = [run.dataset.train_batch(i) for i in range(first, step)]
    pruned = [layer.pruned for layer in plan.layers]
    loads = masked_loads(run.steps.evaluate, run.state, pruned, batches, run.mesh)
    return run.controller.prune_plan([loads_E / len(batches) for loads_E in loads])


def _require_same_plan(step: int, plan: Plan | None) -> None:
    """Stops the run where processes would cut differently: their counts, NumPy or memory are not the same."""
    require_same({f"the plan after step {step}": plan.sha256() if plan else "no plan"})


def begin(run: Run, plan: Plan) -> None:
    """Begins with a plan that is announced, unless the run ends before its step."""
    cut_step = run.progress.cut_step
    assert cut_step is not None
    if cut_step < run.config.train.num_steps:
        run.cut = Cut(plan, run.config, run.mesh, len(run.dataset.domains))
    else:
        why = f"the run ends before step {cut_step}, where the plan of step {run.progress.plan_step} was due"
        run.progress.summary["not_pruned"] = why
        run.console.event(why)
        run.progress.drop_plan()


def save_and_cut(run: Run, step: int, cut: Cut) -> None:
    """First phase: the old model and the plan on disk. Then the second."""
    summary = run.progress.summary
    if not cut.only_moves:
        with run.pause.part("evaluate"):
            summary["heldout_loss_before_prune"] = run.evaluate(step, "before_prune")
    if not (summary["prune_steps"] or summary["rearrange_steps"]):  # "before" is before the first of them
        summary["device_imbalance_before"] = run.controller.device_imbalance()
        summary["step_seconds_before"] = run.median_step_seconds()
    with run.pause.part("save"):
        run.save(step, now=True)
    del run.steps
    carry_out(run, cut, run.state)


def carry_out(run: Run, cut: Cut, state: TrainState | None) -> None:
    """Second phase: the survivors in their new places; releases the old state, None on resuming."""
    progress, plan = run.progress, cut.plan
    run.cut = None
    state, steps = cut.carry_out(state, run.checkpoints, progress.step, run.pause)
    if run.config.laep.reset_moments:
        state = dataclasses.replace(state, opt_state=without_moments(state.opt_state))
    progress.lineage = apply_plan_to_lineage(progress.lineage, plan)
    progress.num_experts = plan.num_experts_after
    progress.fitted_buffer = cut.config.model.receive_buffer
    progress.prunes += not cut.only_moves
    run.adopt(cut.config, state, run.new_controller(cut.config), steps)
    _report(run, cut)
    progress.drop_plan()


def _report(run: Run, cut: Cut) -> None:
    step, summary = run.progress.step, run.progress.summary
    summary["rearrange_steps" if cut.only_moves else "prune_steps"].append(step)
    summary["parameters_after"] = run.size.total
    summary["experts_after"] = list(cut.plan.num_experts_after)
    if not cut.only_moves:
        with run.pause.part("evaluate"):
            summary["heldout_loss_after_prune"] = run.evaluate(step, "after_prune")
    run.log.write(
        "prune",
        step,
        plan=f"plans/{run.progress.plan_step}.json",
        plan_step=run.progress.plan_step,
        lineage=run.progress.lineage,
        seconds=run.pause.seconds,
        **cut.record(),
    )
    run.console.event(f"step {step}: {run.pause}")
