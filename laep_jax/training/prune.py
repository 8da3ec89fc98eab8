"""What a run does to its experts: decided, prepared, carried out, judged, undone (paper sections 3.2, 3.3).

A plan is carried out `LaepConfig.cut_delay` steps after it was made, whether the smaller model's steps, which are
compiled meanwhile, are ready or waited for: so every process cuts after the same step, and a resumed run too. The cut
has two phases: the old model is saved together with the plan; then the survivors are restored into the smaller
model. Whatever stops the run between the two, starting again carries out the plan. A prune that does harm is undone
some steps later (`laep_jax.training.guard`).
"""

import dataclasses

import jax

from laep_jax.hosts import require_same
from laep_jax.laep.plan import Plan, apply_plan_to_lineage
from laep_jax.training.console import stability_text
from laep_jax.training.cut import Cut, Pause
from laep_jax.training.evaluate import heldout_loss, masked_loads, masked_loss
from laep_jax.training.guard import SOFTER, Guard
from laep_jax.training.optimizer import without_moments
from laep_jax.training.resume import Progress
from laep_jax.training.run import Run
from laep_jax.training.state import TrainState, abstract_state


def decide(run: Run, step: int) -> None:
    """The stability test; announces what it asks for."""
    report = run.controller.assess()
    run.log.write("stability", step, **dataclasses.asdict(report))
    run.console.state(stability_text(dataclasses.asdict(report), run.config.laep))
    prunes = run.controller.wants_prune(step, report)
    run.pause = Pause()
    with run.pause.part("plan"):
        plan = _tried_plan(run, step) if prunes else None
        if plan is None or not plan.prunes:  # moving alone must be worth a pause
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


def _tried_plan(run: Run, step: int) -> Plan | None:
    """A plan to prune, softened until the dry run finds that it does no harm; None where the retries are used up."""
    plan, tolerance = _make_plan(run, step), run.config.laep.dry_run_tolerance
    if tolerance is None:
        return plan
    measured = (run.heldout, run.mesh, run.dataset.domains)
    before = heldout_loss(run.steps.evaluate, run.state, *measured).loss
    while True:
        pruned = [layer.pruned for layer in plan.layers]
        loss = masked_loss(run.steps.evaluate, run.state, pruned, *measured).loss
        stands = loss - before <= tolerance
        run.log.write("dry_run", step, stands=stands, heldout_loss_before=before, heldout_loss=loss)
        run.console.event(f"step {step}: held-out loss {loss:.4f} in a dry run, {loss - before:+.4f}")
        if stands:
            return plan
        run.progress.retries += 1
        run.controller = run.new_controller(run.config, run.controller.history)
        if run.progress.retries > run.config.laep.max_retries:
            return None
        plan = _make_plan(run, step)


def _make_plan(run: Run, step: int) -> Plan:
    plan = run.controller.prune_plan()
    if run.config.laep.placement_loads == "recorded":
        return plan
    _require_same_plan(step, plan)  # all must measure the same model
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
        run.console.event(f"the run ends before step {cut_step}; nothing is cut")
        run.progress.drop_plan()


def save_and_cut(run: Run, step: int, cut: Cut) -> None:
    """First phase: the old model and the plan on disk. Then the second."""
    summary = run.progress.summary
    with run.pause.part("evaluate"):
        summary["heldout_loss_before_prune"] = run.evaluate(step, "before_prune")
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
    guard_steps = run.config.laep.guard_steps
    if guard_steps and not cut.only_moves:
        loss_before = progress.summary["heldout_loss_before_prune"]
        progress.guard = Guard(progress.step, progress.step + guard_steps, loss_before)
        run.checkpoints.pin(progress.step)


def _report(run: Run, cut: Cut) -> None:
    step, summary = run.progress.step, run.progress.summary
    summary["prune_steps"].append(step)
    summary["parameters_after"] = run.size.total
    summary["experts_after"] = list(cut.plan.num_experts_after)
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


def judge(run: Run, step: int) -> bool:
    """Whether the prune stands, as it does where what was before it is damaged; else it is undone.

    To undo it, the pruned model is saved first. If what was before it turns out damaged only when it is read, the run
    begins again from that save and comes here again.
    """
    guard = run.progress.guard
    assert guard
    loss = run.evaluate(step, "guard")
    record = {"cut_step": guard.cut_step, "heldout_loss_before": guard.loss_before, "heldout_loss": loss}
    stands = loss - guard.loss_before <= run.config.laep.guard_tolerance
    if not stands and run.checkpoints.has(guard.cut_step):
        run.save(step, now=True)
        _undo(run, guard, record)
        return False
    if not stands:
        run.console.event(f"the prune of step {guard.cut_step} did harm, but what was before it is damaged: it stands")
    run.log.write("guard", step, stands=True, **record)
    run.progress.guard = None
    run.checkpoints.pin(None)
    return True


def _undo(run: Run, guard: Guard, record: dict) -> None:
    """The state before the cut again, saved as its step with a softer rule and no plan; later steps go.

    record: for the log. Whatever stops the run on the way, starting again comes here again, where the step may be
    saved like this already, or goes on from it.
    """
    step, path = guard.cut_step, run.checkpoints.directory / str(guard.cut_step)
    before = Progress.from_meta(run.checkpoints.read_meta(step), path)
    before.drop_plan()
    before.retries = run.progress.retries + 1
    before.summary["undone"] = sorted({*before.summary["undone"], step})
    before.summary["heldout_loss_before_prune"] = None
    run.progress = before
    config = before.current(run.base)
    jax.tree.map(lambda leaf: leaf.delete(), run.state)
    state = run.checkpoints.restore(step, abstract_state(config, run.mesh))
    steps = run.new_steps(config)
    run.adopt(config, state, run.read_controller(config, step), steps)
    rule = f"with alpha and beta x {SOFTER**before.retries}"
    rule = rule if before.retries <= config.laep.max_retries else "without a prune"
    run.console.event(f"the prune of step {step} did harm and is undone: going on from there, {rule}")
    run.log.rewind(step)
    run.log.write("guard", step, stands=False, **record)
    run.save(step, now=True)
    run.checkpoints.remove_after(step)
    run.checkpoints.pin(None)
