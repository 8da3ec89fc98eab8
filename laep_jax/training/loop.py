"""The training loop: step, record, stable?, plan, prune, rebuild (paper section 3).

Metrics leave the device one step late. Where something is decided or saved they are fetched first, so
that an interrupted and resumed run decides as an uninterrupted one.

A plan is carried out `LaepConfig.cut_delay` steps after it was made, whether the smaller model's steps, which are
compiled meanwhile, are ready or waited for: so every process cuts after the same step, and a resumed run too. The cut
has two phases: the old model is saved together with the plan; then the survivors are restored into the smaller
model. Whatever stops the run between the two, starting again carries out the plan. A prune that does harm is undone
some steps later (`laep_jax.training.guard`).
"""

import dataclasses
import json
import time

import jax
import numpy as np

from laep_jax.config import Config
from laep_jax.data.dataset import Dataset
from laep_jax.errors import StoppedError
from laep_jax.hosts import require_same
from laep_jax.laep.load import LoadHistory
from laep_jax.laep.plan import Plan, apply_plan_to_lineage
from laep_jax.laep.stability import history_capacity
from laep_jax.model.accounting import model_size
from laep_jax.sharding import make_mesh, put_batch
from laep_jax.training.ahead import Steps
from laep_jax.training.anomalies import RECENT, is_spike
from laep_jax.training.checkpoint import Checkpoints
from laep_jax.training.console import RunConsole, stability_text
from laep_jax.training.controller import Controller
from laep_jax.training.cut import Cut, Pause
from laep_jax.training.evaluate import by_layer, heldout_loss, masked_loads
from laep_jax.training.guard import SOFTER, Guard, softened
from laep_jax.training.record import train_record
from laep_jax.training.resume import Progress
from laep_jax.training.runlog import NoLog, RunLog
from laep_jax.training.state import TrainState, abstract_state, init_state
from laep_jax.training.step import make_eval_step, make_train_step
from laep_jax.training.stops import Stops


def _few(rows: np.ndarray) -> str:
    shown = ", ".join(map(str, rows[:4]))
    return f"{shown}, ... ({len(rows)})" if len(rows) > 4 else shown


def _require_same_plan(step: int, plan: Plan | None) -> None:
    """Stops the run where processes would cut differently: their counts, NumPy or memory are not the same."""
    require_same({f"the plan after step {step}": plan.sha256() if plan else "no plan"})


class Run:
    """One run in motion: the model as it is now, and everything that changes with it.

    base: config of the model that the run began with, on the mesh that it has now. first_step: the train
    step of the model that the run goes on with, where it need not be compiled.
    """

    def __init__(
        self,
        base: Config,
        dataset: Dataset,
        checkpoints: Checkpoints,
        log: RunLog | NoLog,
        console: RunConsole,
        progress: Progress,
        first_step: jax.stages.Compiled | None,
    ):
        self.base, self.dataset, self.checkpoints = base, dataset, checkpoints
        self.log, self.console, self.progress = log, console, progress
        self.config = config = progress.current(base)
        self.mesh = make_mesh(config.mesh)
        batches = min(config.train.eval_batches, dataset.num_heldout_batches)
        self.heldout = [dataset.heldout_batch(i) for i in range(batches)]
        self.cut: Cut | None = None  # the one that is announced
        self.pause = Pause()
        steps = self._new_steps(config, first_step)
        if progress.step == 0:
            self._adopt(config, init_state(config, self.mesh), self._new_controller(config), steps)
            progress.summary["parameters_before"] = self.size.total
        else:
            self._resume(steps)

    def _adopt(self, config: Config, state: TrainState, controller: Controller, steps: Steps) -> None:
        """Makes this model the run's; whatever was compiled before is let go."""
        self.config, self.state, self.controller, self.steps = config, state, controller, steps
        self.size = model_size(config.model, sequence_length=config.data.sequence_length)
        self.step_seconds: list[float | None] = []
        self.console.state("")

    def _new_steps(self, config: Config, train_step: jax.stages.Compiled | None = None) -> Steps:
        evaluate = make_eval_step(config, self.mesh, len(self.dataset.domains))
        return Steps(train_step or make_train_step(config, self.mesh), evaluate)

    def _new_controller(self, config: Config, history: LoadHistory | None = None) -> Controller:
        laep = softened(config.laep, self.progress.retries, config.model.num_layers)
        return Controller(dataclasses.replace(config, laep=laep), prunes=self.progress.prunes, history=history)

    def _read_controller(self, config: Config, step: int) -> Controller:
        """The controller of a checkpoint."""
        history = LoadHistory.from_arrays(self.checkpoints.read_history(step), history_capacity(config.laep))
        return self._new_controller(config, history)

    def _resume(self, steps: Steps) -> None:
        config, step, plan = self.config, self.progress.step, self.progress.pending_plan
        self.console.event(f"resuming from step {step}" + (", with a plan to apply" if plan else ""))
        self.controller = self._read_controller(config, step)
        if self.progress.guard:
            self.checkpoints.pin(self.progress.guard.cut_step)
        if plan:
            self._prepare(Plan.from_json(plan))
        if self.cut and step == self.progress.cut_step:
            self._carry_out(self.cut, None)
        else:
            state = self.checkpoints.restore(step, abstract_state(config, self.mesh))
            self._adopt(config, state, self.controller, steps)

    def train(self, stops: Stops) -> dict:
        """Runs to the end; returns the summary. `StoppedError` where it was told to stop, and has saved."""
        pending = None
        self.clock = time.perf_counter()
        while (step := self.progress.step) < self.config.train.num_steps:
            if not self._compiles:
                stops.begin_step()
            batch = put_batch(self.dataset.train_batch(step), self.mesh)
            self.state, metrics = self.steps.train(self.state, batch)
            self.progress.step = step = step + 1
            if pending:
                self._record(*pending)
            pending = (step, metrics)
            stopping = stops.asked(step)
            if stopping or self._is_boundary(step):
                self._record(*pending)
                pending = None
                stops.end_step()
                self._boundary(step, stopping)
                if stopping and step < self.config.train.num_steps:
                    self.checkpoints.wait()
                    raise StoppedError(self.progress.step)
                self.clock = time.perf_counter()
        return self._close()

    @property
    def _compiles(self) -> bool:
        """Whether the first step of this model, with its compilation in it, is still to be recorded."""
        return not self.step_seconds and not isinstance(self.steps.train, jax.stages.Compiled)

    def _is_boundary(self, step: int) -> bool:
        settings = self.config.train
        due = step % settings.eval_every == 0 or step % settings.checkpoint_every == 0
        return due or step in (settings.num_steps, self.progress.cut_step, self._judged_at) or self._decides(step)

    @property
    def _judged_at(self) -> int | None:
        return self.progress.guard.due if self.progress.guard else None

    def _decides(self, step: int) -> bool:
        """Not while something is decided and not carried out, or not judged."""
        return not self.cut and not self.progress.guard and self.controller.is_due(step)

    def _record(self, step: int, metrics: dict) -> None:
        """Fetches one step's metrics and hands them to the controller, the log and the console."""
        counts = by_layer(metrics.pop("tokens_per_expert"))
        metrics = jax.device_get(metrics)
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        compiled = self._compiles
        self.step_seconds.append(None if compiled else seconds)
        self.controller.record(step, counts)
        self.log.record_counts(step, counts, self.progress.lineage)
        tokens = int(counts[0].sum()) // self.config.model.top_k
        self.progress.summary["tokens"] += tokens
        record = train_record(
            metrics,
            counts,
            seconds=self.step_seconds[-1],
            tokens=tokens,
            flops_per_token=self.size.flops_per_token,
            expert_parallel=self.controller.expert_parallel,
        )
        self.log.write("train", step, **record)
        self.console.train(step, record)
        self._watch(step, record["loss"], record["grad_norm"], bool(metrics["finite"]))

    def _watch(self, step: int, loss: float, grad_norm: float, finite: bool) -> None:
        """Reports a step that was skipped, or whose loss is a spike, and its data; stops what does not recover."""
        progress = self.progress
        progress.skipped = 0 if finite else progress.skipped + 1
        progress.summary["skipped_steps"] += not finite
        kind = "skipped" if not finite else "spike" if is_spike(loss, progress.recent_losses) else ""
        if kind:
            rows = self.dataset.batch_rows(step - 1)
            self.log.write(kind, step, loss=loss, grad_norm=grad_norm, recent=progress.recent_losses, rows=rows)
            what = "the update is skipped" if kind == "skipped" else "a spike"
            self.console.event(f"step {step}: loss {loss:.4g}, gradient {grad_norm:.4g}: {what}; rows {_few(rows)}")
        if finite:
            progress.recent_losses = (*progress.recent_losses, loss)[-RECENT:]
        if progress.skipped >= self.config.train.max_skipped_steps:
            raise FloatingPointError(
                f"{progress.skipped} steps in a row until step {step} were not finite, and skipped"
            )

    def _boundary(self, step: int, stopping: bool) -> None:
        """Everything that is not training: evaluation, the stability test, saving, cutting.

        What is due is done before the run stops, since it resumes behind it.
        """
        settings = self.config.train
        if step == settings.num_steps:  # the rest is for `_close`
            return
        if step == self._judged_at and not self._judge(step):
            return
        if step % settings.eval_every == 0:
            self._evaluate(step, "periodic")
        if self._decides(step):
            self._decide(step)
        if self.cut and step == self.progress.cut_step:
            self._save_and_cut(step, self.cut)
        elif stopping or step % settings.checkpoint_every == 0:
            self._save(step)

    def _evaluate(self, step: int, when: str) -> float:
        heldout = heldout_loss(self.steps.evaluate, self.state, self.heldout, self.mesh, self.dataset.domains)
        loss, losses, targets = heldout.loss, heldout.loss_by_domain, heldout.targets_by_domain
        if self.progress.summary["heldout_targets_by_domain"] != targets:  # once, as long as the batches stay the same
            self.progress.summary["heldout_targets_by_domain"] = targets
            self.log.write("heldout", step, targets_by_domain=targets)
        self.log.write("eval", step, heldout_loss=loss, heldout_loss_by_domain=losses, when=when)
        self.progress.summary["heldout_loss_by_domain"][when] = losses
        self.console.event(f"step {step}: held-out loss {loss:.4f} ({when.replace('_', ' ')})")
        return loss

    def _decide(self, step: int) -> None:
        """The stability test; announces what it asks for."""
        report = self.controller.assess()
        self.log.write("stability", step, **dataclasses.asdict(report))
        self.console.state(stability_text(dataclasses.asdict(report), self.config.laep))
        prunes = self.controller.wants_prune(step, report)
        self.pause = Pause()
        with self.pause.part("plan"):
            plan = self._make_plan(step, prunes)
            if plan is None:
                return
            cut_step = step + self.config.laep.cut_delay
            self.console.event(f"step {step}: a plan for step {cut_step}" + (f", {report.reason}" if prunes else ""))
            self.console.event(plan.table())
            self.log.write_file(f"plans/{step}.json", plan.to_json())
            self.progress.announce(plan, cut_step)
            self._prepare(plan)

    def _make_plan(self, step: int, prunes: bool) -> Plan | None:
        plan = self.controller.prune_plan() if prunes else self.controller.rearrangement()
        _require_same_plan(step, plan)
        if plan is None or not prunes or self.config.laep.placement_loads == "recorded":
            return plan
        first = max(0, step - self.config.train.eval_batches)
        batches = [self.dataset.train_batch(i) for i in range(first, step)]
        pruned = [layer.pruned for layer in plan.layers]
        loads = masked_loads(self.steps.evaluate, self.state, pruned, batches, self.mesh)
        plan = self.controller.prune_plan([loads_E / len(batches) for loads_E in loads])
        _require_same_plan(step, plan)
        return plan

    def _prepare(self, plan: Plan) -> None:
        """Begins with a plan that is announced, unless the run ends before its step."""
        cut_step = self.progress.cut_step
        assert cut_step is not None
        if cut_step < self.config.train.num_steps:
            self.cut = Cut(plan, self.config, self.mesh, len(self.dataset.domains))
        else:
            self.console.event(f"the run ends before step {cut_step}; nothing is cut")
            self.progress.drop_plan()

    def _save(self, step: int, *, now: bool = False) -> None:
        """now: returns when it is on disk."""
        self.log.save_loads()
        save = self.checkpoints.save_now if now else self.checkpoints.save
        save(step, self.state, self.controller.history.to_arrays(), self.progress.to_meta())

    def _save_and_cut(self, step: int, cut: Cut) -> None:
        """First phase: the old model and the plan on disk. Then the second."""
        summary = self.progress.summary
        with self.pause.part("evaluate"):
            summary["heldout_loss_before_prune"] = self._evaluate(step, "before_prune")
        summary["device_imbalance_before"] = self.controller.device_imbalance()
        summary["step_seconds_before"] = self._median_step_seconds()
        with self.pause.part("save"):
            self._save(step, now=True)
        del self.steps
        self._carry_out(cut, self.state)

    def _carry_out(self, cut: Cut, state: TrainState | None) -> None:
        """Second phase: the survivors in their new places; releases the old state, None on resuming."""
        progress, plan = self.progress, cut.plan
        self.cut = None
        state, steps = cut.carry_out(state, self.checkpoints, progress.step, self.pause)
        for layer, (part, ids) in enumerate(zip(plan.layers, progress.lineage, strict=True)):
            self.log.mark_pruned(progress.step, layer, [ids[slot] for slot in part.pruned])
        progress.lineage = apply_plan_to_lineage(progress.lineage, plan)
        progress.num_experts = plan.num_experts_after
        progress.fitted_buffer = cut.config.model.receive_buffer
        progress.prunes += not cut.only_moves
        self._adopt(cut.config, state, self._new_controller(cut.config), steps)
        self._report(cut)
        progress.drop_plan()
        guard_steps = self.config.laep.guard_steps
        if guard_steps and not cut.only_moves:
            loss_before = progress.summary["heldout_loss_before_prune"]
            progress.guard = Guard(progress.step, progress.step + guard_steps, loss_before)
            self.checkpoints.pin(progress.step)

    def _judge(self, step: int) -> bool:
        """Whether the prune stands; where it does not, it is undone."""
        guard = self.progress.guard
        assert guard
        loss = self._evaluate(step, "guard")
        record = {"cut_step": guard.cut_step, "heldout_loss_before": guard.loss_before, "heldout_loss": loss}
        if not loss - guard.loss_before <= self.config.laep.guard_tolerance:
            self._undo(guard, record)
            return False
        self.log.write("guard", step, stands=True, **record)
        self.progress.guard = None
        self.checkpoints.pin(None)
        return True

    def _undo(self, guard: Guard, record: dict) -> None:
        """The state before the cut again, saved as its step with a softer rule and no plan; later steps go.

        record: for the log. Whatever stops the run on the way, starting again comes here again or goes on
        from the step that is saved.
        """
        step, path = guard.cut_step, self.checkpoints.directory / str(guard.cut_step)
        before = Progress.from_meta(self.checkpoints.read_meta(step), path)
        before.drop_plan()
        before.retries = self.progress.retries + 1
        before.summary["undone"].append(step)
        before.summary["heldout_loss_before_prune"] = None
        self.progress = before
        config = before.current(self.base)
        jax.tree.map(lambda leaf: leaf.delete(), self.state)
        state = self.checkpoints.restore(step, abstract_state(config, self.mesh))
        steps = self._new_steps(config)
        self._adopt(config, state, self._read_controller(config, step), steps)
        rule = f"with alpha and beta x {SOFTER**before.retries}"
        rule = rule if before.retries <= config.laep.max_retries else "without a prune"
        self.console.event(f"the prune of step {step} did harm and is undone: going on from there, {rule}")
        self.log.rewind(step)
        self.log.write("guard", step, stands=False, **record)
        self._save(step, now=True)
        self.checkpoints.remove_after(step)
        self.checkpoints.pin(None)

    def _report(self, cut: Cut) -> None:
        step, summary = self.progress.step, self.progress.summary
        summary["prune_steps"].append(step)
        summary["parameters_after"] = self.size.total
        summary["experts_after"] = list(cut.plan.num_experts_after)
        with self.pause.part("evaluate"):
            summary["heldout_loss_after_prune"] = self._evaluate(step, "after_prune")
        self.log.write(
            "prune",
            step,
            plan=f"plans/{self.progress.plan_step}.json",
            plan_step=self.progress.plan_step,
            lineage=self.progress.lineage,
            seconds=self.pause.seconds,
            **cut.record(),
        )
        self.console.event(f"step {step}: {self.pause}")

    def _median_step_seconds(self) -> float | None:
        measured = [seconds for seconds in self.step_seconds if seconds is not None]
        return float(np.median(measured)) if measured else None

    def _close(self) -> dict:
        """The end of the run: last evaluation and checkpoint, summary.json, the closing table."""
        progress, summary = self.progress, self.progress.summary
        if progress.guard:
            self.console.event(f"the run ends before step {progress.guard.due}: the last prune is not judged")
        if summary["steps"] != progress.step:
            side = "after" if summary["prune_steps"] else "before"
            summary["heldout_loss_end"] = self._evaluate(progress.step, "end")
            summary[f"device_imbalance_{side}"] = self.controller.device_imbalance()
            summary[f"step_seconds_{side}"] = self._median_step_seconds()
            summary["steps"] = progress.step
            self._save(progress.step, now=True)
        self.log.write_file("summary.json", json.dumps(summary, indent=1) + "\n")
        self.console.closing_table(summary)
        return summary
