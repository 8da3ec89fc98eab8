"""A plan from its making to the smaller model: scheduled, then applied (paper sections 3.2, 3.3).

A plan is applied `LaepConfig.prune_delay` steps after it was made, whether the smaller model's steps, which are
compiled meanwhile, are ready or waited for: so every process prunes after the same step, and a resumed run too. There
are two phases: the old model is saved together with the plan; then the survivors are restored into the smaller model.
Whatever stops the run between the two, starting again applies the plan.

In memory the survivors are gathered while the old model is still being written. A run that stops before that is
complete begins at the checkpoint before and comes to the same plan and prune, since both follow from counts, settings
and the step. No checkpoint of the smaller model is begun until then.
"""

import dataclasses

from laep_jax.checkpoint.checkpointer import Checkpoints
from laep_jax.laep.plan import Plan, apply_plan_to_lineage
from laep_jax.state.optimizer import without_moments
from laep_jax.state.tree import TrainState
from laep_jax.tracking.pause import Pause
from laep_jax.training.prune.smaller_model import SmallerModel
from laep_jax.training.run_state import PendingPrune, RunState
from laep_jax.training.trainer import Model, Trainer


def schedule(trainer: Trainer, plan: Plan, made: int, due: int) -> None:
    """Schedules a plan that was made after step `made`, unless the run ends before step `due`."""
    if due < trainer.config.train.num_steps:
        trainer.run_state.pending = PendingPrune(plan, made, due)
        domains = len(trainer.dataset.domains)
        trainer.pending = SmallerModel(plan, due, trainer.config, trainer.model.mesh, domains, trainer.watch)
    else:
        why = f"the run ends before step {due}, where the plan of step {made} was due"
        trainer.run_state.pending = None
        trainer.run_state.summary.not_pruned = why
        trainer.console.event(why)


def apply(trainer: Trainer, smaller: SmallerModel) -> None:
    """Both phases: the old model and the plan on disk or on the way there, then the survivors in their new places."""
    run_state, step = trainer.run_state, trainer.run_state.step
    if not run_state.summary.prune_steps:
        trainer.measure("before")
    with trainer.pause.part("save"):
        trainer.save(step, now=trainer.config.laep.prune_via == "checkpoint")
    model = restore_survivors(smaller, trainer.model.state, trainer.checkpoints, run_state, trainer.pause)
    finish(trainer, smaller, model)


def restore_survivors(
    smaller: SmallerModel,
    state: TrainState | None,
    checkpoints: Checkpoints,
    run_state: RunState,
    pause: Pause,
) -> Model:
    """The second phase; releases the old state, None on resuming. `run_state` then describes the smaller model."""
    restored, steps = smaller.restore(state, checkpoints, pause)
    if smaller.config.laep.reset_moments:
        restored = dataclasses.replace(restored, opt_state=without_moments(restored.opt_state))
    run_state.lineage = apply_plan_to_lineage(run_state.lineage, smaller.plan)
    run_state.num_experts = smaller.plan.num_experts_after
    run_state.fitted_buffer = smaller.config.model.receive_buffer
    run_state.prunes += 1
    return Model(smaller.config, smaller.mesh, restored, smaller.maps, steps)


def finish(trainer: Trainer, smaller: SmallerModel, model: Model) -> None:
    """Installs the smaller model and records it."""
    run_state = trainer.run_state
    step, summary, pending = run_state.step, run_state.summary, run_state.pending
    assert pending
    with trainer.watch("finish", step):
        if trainer.model is not model:
            trainer.install_model(model)
        summary.prune_steps.append(step)
        summary.parameters_after = model.size.total
        summary.experts_after = list(run_state.num_experts)
        trainer.log.write(
            "prune",
            step,
            plan=f"plans/{pending.made}.json",
            plan_step=pending.made,
            lineage=run_state.lineage,
            seconds=trainer.pause.seconds,
            **smaller.record(),
        )
    trainer.console.event(f"step {step}: {trainer.pause}")
    trainer.pending = run_state.pending = None
