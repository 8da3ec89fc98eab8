"""The training loop: step, record, stable?, plan, prune, rebuild (paper section 3).

Metrics leave the device one step late. Where something is decided or saved they are fetched first, so
that an interrupted and resumed run decides as an uninterrupted one.
"""

import json
import time

import jax
import numpy as np

from laep_jax.errors import StoppedError
from laep_jax.laep.plan import Plan
from laep_jax.sharding import put_batch
from laep_jax.state.tree import abstract_state, init_state
from laep_jax.tracking.anomalies import RECENT, is_spike
from laep_jax.tracking.step_record import train_record
from laep_jax.training.evaluate import by_layer
from laep_jax.training.preemption import Stops
from laep_jax.training.prune.decide import begin, carry_out, decide, save_and_cut
from laep_jax.training.trainer import Run


def train_to_end(run: Run, stops: Stops) -> dict:
    """Runs to the end; returns the summary. `StoppedError` where it was told to stop, and has saved."""
    _begin(run)
    pending = None
    run.clock = time.perf_counter()
    while (step := run.progress.step) < run.config.train.num_steps:
        if not run.compiles:
            stops.begin_step()
        batch = put_batch(run.dataset.train_batch(step), run.mesh)
        run.state, metrics = run.steps.train(run.state, batch)
        run.progress.step = step = step + 1
        if pending:
            record(run, *pending)
        pending = (step, metrics)
        stopping = stops.asked(step)
        if stopping or _is_boundary(run, step):
            record(run, *pending)
            pending = None
            stops.end_step()
            _boundary(run, step, stopping)
            if stopping and step < run.config.train.num_steps:
                run.checkpoints.wait()
                raise StoppedError(run.progress.step)
            run.clock = time.perf_counter()
    return _close(run)


def _begin(run: Run) -> None:
    """Gives the run its model: a new one, that of its checkpoint, or the one its checkpoint is to be cut into."""
    config, step, plan = run.config, run.progress.step, run.progress.pending_plan
    if not step:
        run.adopt(config, init_state(config, run.mesh), run.new_controller(config), run.steps)
        run.progress.summary["parameters_before"] = run.size.total
        return
    again = f"; steps {step + 1} to {run.log.last_step} are done again" if run.log.last_step > step else ""
    run.console.event(f"resuming from step {step}" + (", with a plan to apply" if plan else "") + again)
    run.controller = run.read_controller(config, step)
    if plan:
        begin(run, Plan.from_json(plan))
    if run.cut and step == run.progress.cut_step:
        carry_out(run, run.cut, None)
    else:
        state = run.checkpoints.restore(step, abstract_state(config, run.mesh))
        run.adopt(config, state, run.controller, run.steps)


def _is_boundary(run: Run, step: int) -> bool:
    settings = run.config.train
    due = step % settings.eval_every == 0 or step % settings.checkpoint_every == 0
    return due or step in (settings.num_steps, run.progress.cut_step) or _decides(run, step)


def _decides(run: Run, step: int) -> bool:
    """Not while something is decided and not applied."""
    return not run.cut and run.controller.is_due(step)


def record(run: Run, step: int, metrics: dict) -> None:
    """Fetches one step's metrics and hands them to the controller, the log and the console."""
    counts = by_layer(metrics.pop("tokens_per_expert"))
    metrics = jax.device_get(metrics)
    now = time.perf_counter()
    seconds, run.clock = now - run.clock, now
    compiled = run.compiles
    run.step_seconds.append(None if compiled else seconds)
    run.controller.record(step, counts)
    run.log.record_counts(step, counts, run.progress.lineage)
    tokens = int(counts[0].sum()) // run.config.model.top_k
    run.progress.summary["tokens"] += tokens
    fields = train_record(
        metrics,
        counts,
        seconds=run.step_seconds[-1],
        tokens=tokens,
        flops_per_token=run.size.flops_per_token,
        expert_parallel=run.controller.rule.expert_parallel,
    )
    run.log.write("train", step, **fields)
    run.console.train(step, fields)
    _watch(run, step, fields["loss"], fields["grad_norm"], bool(metrics["finite"]))


def _watch(run: Run, step: int, loss: float, grad_norm: float, finite: bool) -> None:
    """Reports a step that was skipped, or whose loss is a spike, and its data; stops what does not recover."""
    progress = run.progress
    progress.skipped = 0 if finite else progress.skipped + 1
    progress.summary["skipped_steps"] += not finite
    kind = "skipped" if not finite else "spike" if is_spike(loss, progress.recent_losses) else ""
    if kind:
        rows = run.dataset.batch_rows(step - 1)
        run.log.write(kind, step, loss=loss, grad_norm=grad_norm, recent=progress.recent_losses, rows=rows)
        what = "the update is skipped" if kind == "skipped" else "a spike"
        run.console.event(f"step {step}: loss {loss:.4g}, gradient {grad_norm:.4g}: {what}; rows {_few(rows)}")
    if finite:
        progress.recent_losses = (*progress.recent_losses, loss)[-RECENT:]
    if progress.skipped >= run.config.train.max_skipped_steps:
        raise FloatingPointError(f"{progress.skipped} steps in a row until step {step} were not finite, and skipped")


def _few(rows: np.ndarray) -> str:
    shown = ", ".join(map(str, rows[:4]))
    return f"{shown}, ... ({len(rows)})" if len(rows) > 4 else shown


def _boundary(run: Run, step: int, stopping: bool) -> None:
    """Everything that is not training: evaluation, the stability test, saving, cutting.

    What is due is done before the run stops, since it resumes behind it.
    """
    settings = run.config.train
    if step == settings.num_steps:  # the rest is for `_close`
        return
    if step % settings.eval_every == 0:
        run.evaluate(step, "periodic")
    if _decides(run, step):
        decide(run, step)
    if run.cut and step == run.progress.cut_step:
        save_and_cut(run, step, run.cut)
    elif stopping or step % settings.checkpoint_every == 0:
        run.save(step)


def _close(run: Run) -> dict:
    """The end of the run: last evaluation and checkpoint, summary.json, the closing table."""
    progress, summary = run.progress, run.progress.summary
    if summary["steps"] != progress.step:
        side = "after" if summary["prune_steps"] or summary["rearrange_steps"] else "before"
        summary["heldout_loss_end"] = run.evaluate(progress.step, "end")
        summary[f"device_imbalance_{side}"] = run.controller.device_imbalance()
        summary[f"step_seconds_{side}"] = run.median_step_seconds()
        summary["steps"] = progress.step
        summary["not_pruned"] = (
            summary["not_pruned"] or f"the run ends before LaepConfig.window={run.config.laep.window}"
        )
        run.save(progress.step, now=True)
    run.log.write_file("summary.json", json.dumps(summary, indent=1) + "\n")
    run.console.closing_table(summary)
    return summary
