"""The training loop: step, record, decide; apply, evaluate and save when due (paper section 3).

Metrics leave the device one step late. Where something is decided or saved they are fetched first, so
that an interrupted and resumed run decides as an uninterrupted one.
"""

import json
import time

import jax
import numpy as np

from laep_jax.errors import StoppedError
from laep_jax.sharding import put_batch
from laep_jax.tracking.anomalies import RECENT, is_spike
from laep_jax.tracking.memory import peak_memory_bytes
from laep_jax.tracking.step_record import train_record
from laep_jax.training.evaluate import by_layer
from laep_jax.training.preemption import PreemptionGuard
from laep_jax.training.prune.decide import decide
from laep_jax.training.prune.transition import apply
from laep_jax.training.trainer import Trainer


def train_to_end(trainer: Trainer, preemption: PreemptionGuard) -> dict:
    """Trains to the end; returns the summary. `StoppedError` after a signal, once the state is saved."""
    unrecorded = None
    trainer.clock = time.perf_counter()
    while (step := trainer.run_state.step) < trainer.config.train.num_steps:
        if not trainer.model.compiles:
            preemption.begin_step()
        with trainer.watch("step", step + 1):
            batch = put_batch(trainer.dataset.train_batch(step), trainer.model.mesh)
            metrics = trainer.model.train(batch)
        trainer.run_state.step = step = step + 1
        if unrecorded:
            record(trainer, *unrecorded)
        unrecorded = (step, metrics)
        stopping = preemption.asked(step)
        if stopping or _is_boundary(trainer, step):
            record(trainer, *unrecorded)
            unrecorded = None
            preemption.end_step()
            _boundary(trainer, step, stopping)
            if stopping and step < trainer.config.train.num_steps:
                trainer.checkpoints.wait()
                raise StoppedError(step)
            trainer.clock = time.perf_counter()
    return _close(trainer)


def _is_boundary(trainer: Trainer, step: int) -> bool:
    settings = trainer.config.train
    due = step % settings.eval_every == 0 or step % settings.checkpoint_every == 0 or _samples(trainer, step)
    due = due or trainer.is_due(step) or _decides(trainer, step) or trainer.controller.rebalances(step)
    return due or step == settings.num_steps


def _samples(trainer: Trainer, step: int) -> bool:
    every = trainer.config.train.sample_every
    return every is not None and step % every == 0


def _decides(trainer: Trainer, step: int) -> bool:
    """Not while something is decided and not applied."""
    return trainer.pending is None and trainer.controller.is_due(step)


def record(trainer: Trainer, step: int, metrics: dict) -> None:
    """Fetches one step's metrics and hands them to the controller, the log and the console."""
    with trainer.watch("record", step):
        finite, fields = _fetch(trainer, step, metrics)
        trainer.log.write("train", step, **fields)
        trainer.console.train(step, fields)
        _check_loss(trainer, step, fields["loss"], fields["grad_norm"], finite)


def _fetch(trainer: Trainer, step: int, metrics: dict) -> tuple[bool, dict]:
    """Whether the step was finite, and the fields of its record; the counts go to the controller and the log."""
    counts = by_layer(metrics.pop("tokens_per_expert"), trainer.run_state.num_experts)
    metrics = jax.device_get(metrics)
    now = time.perf_counter()
    seconds, trainer.clock = now - trainer.clock, now
    compiled = trainer.model.compiles
    trainer.model.step_seconds.append(None if compiled else seconds)
    trainer.controller.record(step, counts)
    trainer.log.record_counts(step, counts, trainer.run_state.lineage)
    tokens = int(counts[0].sum()) // trainer.config.model.top_k
    trainer.run_state.summary.tokens += tokens
    fields = train_record(
        metrics,
        counts,
        seconds=trainer.model.step_seconds[-1],
        tokens=tokens,
        epochs=max(trainer.dataset.epochs(step).values()),
        flops_per_token=trainer.model.size.flops_per_token,
        peak_memory_bytes=peak_memory_bytes(jax.local_devices()[0]),
    )
    return bool(metrics["finite"]), fields


def _check_loss(trainer: Trainer, step: int, loss: float, grad_norm: float, finite: bool) -> None:
    """Reports a step that was skipped, or whose loss is a spike, and its data; stops what does not recover."""
    run_state = trainer.run_state
    run_state.skipped = 0 if finite else run_state.skipped + 1
    run_state.summary.skipped_steps += not finite
    kind = "skipped" if not finite else "spike" if is_spike(loss, run_state.recent_losses) else ""
    if kind:
        rows = trainer.dataset.batch_rows(step - 1)
        trainer.log.write(kind, step, loss=loss, grad_norm=grad_norm, recent=run_state.recent_losses, rows=rows)
        what = "the update is skipped" if kind == "skipped" else "a spike"
        trainer.console.event(f"step {step}: loss {loss:.4g}, gradient {grad_norm:.4g}: {what}; rows {_few(rows)}")
    if finite:
        run_state.recent_losses = (*run_state.recent_losses, loss)[-RECENT:]
    if run_state.skipped >= trainer.config.train.max_skipped_steps:
        raise FloatingPointError(f"{run_state.skipped} steps in a row until step {step} were not finite, and skipped")


def _few(rows: dict[str, np.ndarray]) -> str:
    """The first rows of each source, and how many there are.

    >>> _few({"web": np.arange(6), "code": np.array([7])})
    'of web 0, 1, 2, 3, ... (6), of code 7'
    """
    shown = {name: ", ".join(map(str, some[:4])) for name, some in rows.items()}
    more = {name: f", ... ({len(some)})" if len(some) > 4 else "" for name, some in rows.items()}
    return ", ".join(f"of {name} {shown[name]}{more[name]}" for name in rows)


def _boundary(trainer: Trainer, step: int, stopping: bool) -> None:
    """Everything that is not training: evaluation, a sample, the stability test, rebalancing, saving, pruning.

    What is due is done before the run stops, since it resumes behind it.
    """
    settings = trainer.config.train
    if step == settings.num_steps:  # the rest is for `_close`
        return
    if step % settings.eval_every == 0:
        trainer.evaluate(step, "periodic")
    if _samples(trainer, step):
        trainer.sample(step)
    if _decides(trainer, step):
        with trainer.watch("decide", step):
            decide(trainer, step)
    if trainer.controller.rebalances(step):
        trainer.rebalance(step)
    if trainer.pending and trainer.is_due(step):
        with trainer.watch("apply", step):
            apply(trainer, trainer.pending)
    elif stopping or step % settings.checkpoint_every == 0:
        trainer.save(step)


def _close(trainer: Trainer) -> dict:
    """The end of the run: last evaluation and checkpoint, summary.json, the closing table."""
    step, summary = trainer.run_state.step, trainer.run_state.summary
    if summary.steps != step:
        trainer.evaluate(step, "end")
        if _samples(trainer, step):
            trainer.sample(step)
        trainer.measure("after" if summary.prune_steps else "before")
        summary.steps = step
        summary.epochs_by_source = trainer.dataset.epochs(step)
        window = trainer.config.laep.window
        summary.not_pruned = summary.not_pruned or f"the run ends before LaepConfig.window={window}"
        trainer.save(step, now=True)
    trainer.log.write_file("summary.json", json.dumps(summary.to_dict(), indent=1) + "\n")
    trainer.console.closing_table(summary)
    return summary.to_dict()
