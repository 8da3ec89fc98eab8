"""The training loop: step, record, stable?, plan, prune, rebuild (paper section 3).

Metrics leave the device one step late. Where something is decided or saved they are fetched first, so
that an interrupted and resumed run decides as an uninterrupted one.

A plan is carried out `LaepConfig.cut_delay` steps after it was made, whether the smaller model's steps, which are
compiled meanwhile, are ready or waited for: so every process cuts after the same step, and a resumed run too. The cut
has two phases: the old model is saved together with the plan; then the survivors are restored into the smaller
model. Whatever stops the run between the two, starting again carries out the plan.
"""

import dataclasses
import json
import math
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
from laep_jax.training.checkpoint import Checkpoints
from laep_jax.training.console import RunConsole, stability_text
from laep_jax.training.controller import Controller, imbalance
from laep_jax.training.cut import Cut, Pause
from laep_jax.training.evaluate import by_layer, heldout_loss, masked_loads
from laep_jax.training.resume import Progress
from laep_jax.training.runlog import NoLog, RunLog
from laep_jax.training.state import TrainState, abstract_state, init_state
from laep_jax.training.step import make_eval_step, make_train_step
from laep_jax.training.stops import Stops


def _require_same_plan(step: int, plan: Plan | None) -> None:
    """Stops the run where processes would cut differently: their counts, NumPy or memory are not the same."""
    require_same({f"the plan after step {step}": plan.sha256() if plan else "no plan"})


class Run:
    """One run in motion: the model as it is now, and everything that changes with it.

    first_step: the train step of the model that the run goes on with, where it need not be compiled.
    """

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        checkpoints: Checkpoints,
        log: RunLog | NoLog,
        console: RunConsole,
        progress: Progress,
        first_step: jax.stages.Compiled | None,
    ):
        self.config, self.dataset, self.checkpoints = config, dataset, checkpoints
        self.log, self.console, self.progress = log, console, progress
        self.mesh = make_mesh(config.mesh)
        batches = min(config.train.eval_batches, dataset.num_heldout_batches)
        self.heldout = [dataset.heldout_batch(i) for i in range(batches)]
        self.cut: Cut | None = None  # the one that is announced
        self.pause = Pause()
        steps = Steps(first_step or make_train_step(config, self.mesh), make_eval_step(config, self.mesh))
        if progress.step == 0:
            self._adopt(config, init_state(config, self.mesh), Controller(config), steps)
            progress.summary["parameters_before"] = self.size.total
        else:
            self._resume(steps)

    def _adopt(self, config: Config, state: TrainState, controller: Controller, steps: Steps) -> None:
        """Makes this model the run's; whatever was compiled before is let go."""
        self.config, self.state, self.controller, self.steps = config, state, controller, steps
        self.size = model_size(config.model, sequence_length=config.data.sequence_length)
        self.step_seconds: list[float | None] = []
        self.console.state("")

    def _resume(self, steps: Steps) -> None:
        config, step, plan = self.config, self.progress.step, self.progress.pending_plan
        self.console.event(f"resuming from step {step}" + (", with a plan to apply" if plan else ""))
        history = LoadHistory.from_arrays(self.checkpoints.read_history(step), history_capacity(config.laep))
        self.controller = Controller(config, prunes=self.progress.prunes, history=history)
        if plan:
            self._prepare(Plan.from_json(plan))
        if self.cut and step == self.progress.cut_step:
            self._carry_out(self.cut, None)
        else:
            state = self.checkpoints.restore(step, abstract_state(config, self.mesh))
            self._adopt(config, state, self.controller, steps)

    def train(self, stops: Stops) -> dict:
        """Runs to the end; returns the summary. `StoppedError` where it was told to stop, and has saved."""
        settings, progress = self.config.train, self.progress
        pending = None
        self.clock = time.perf_counter()
        while progress.step < settings.num_steps:
            if not self._compiles:
                stops.begin_step()
            batch = put_batch(self.dataset.train_batch(progress.step), self.mesh)
            self.state, metrics = self.steps.train(self.state, batch)
            progress.step += 1
            if pending:
                self._record(*pending)
            pending = (progress.step, metrics)
            stopping = stops.asked(progress.step)
            if stopping or self._is_boundary(progress.step):
                self._record(*pending)
                pending = None
                stops.end_step()
                self._boundary(progress.step, stopping)
                if stopping and progress.step < settings.num_steps:
                    self.checkpoints.wait()
                    raise StoppedError(progress.step)
                self.clock = time.perf_counter()
        return self._close()

    @property
    def _compiles(self) -> bool:
        """Whether the first step of this model, with its compilation in it, is still to be recorded."""
        return not self.step_seconds and not isinstance(self.steps.train, jax.stages.Compiled)

    def _is_boundary(self, step: int) -> bool:
        settings = self.config.train
        due = step % settings.eval_every == 0 or step % settings.checkpoint_every == 0
        return due or step in (settings.num_steps, self.progress.cut_step) or self.controller.is_due(step)

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
        devices = self.controller.expert_parallel
        loss = float(metrics["loss"])
        record = {
            "loss": loss,
            "grad_norm": float(metrics["grad_norm"]),
            "learning_rate": float(metrics["learning_rate"]),
            "tokens_per_second": None if compiled else tokens / seconds,
            "gflops_per_second": None if compiled else tokens / seconds * self.size.flops_per_token / 1e9,
            "step_seconds": None if compiled else seconds,
            "expert_imbalance": [imbalance(loads_E, len(loads_E)) for loads_E in counts],
            "device_imbalance": [imbalance(loads_E, devices) for loads_E in counts],
            **{f"aux_{name}": float(value) for name, value in metrics["aux"].items()},
        }
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss at step {step} is {loss}; the newest checkpoint is before it")
        self.log.write("train", step, **record)
        self.console.train(step, record)

    def _boundary(self, step: int, stopping: bool) -> None:
        """Everything that is not training: evaluation, the stability test, saving, cutting.

        What is due is done before the run stops, since it resumes behind it.
        """
        settings = self.config.train
        if step == settings.num_steps:  # the rest is for `_close`
            return
        if step % settings.eval_every == 0:
            self._evaluate(step, "periodic")
        if not self.cut and self.controller.is_due(step):
            self._decide(step)
        if self.cut and step == self.progress.cut_step:
            self._save_and_cut(step, self.cut)
        elif stopping or step % settings.checkpoint_every == 0:
            self._save(step)

    def _evaluate(self, step: int, when: str) -> float:
        loss = heldout_loss(self.steps.evaluate, self.state, self.heldout, self.mesh)
        self.log.write("eval", step, heldout_loss=loss, when=when)
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
            self.cut = Cut(plan, self.config, self.mesh)
        else:
            self.console.event(f"the run ends before step {cut_step}; nothing is cut")
            self.progress.drop_plan()

    def _save(self, step: int) -> None:
        self.log.save_loads()
        self.checkpoints.save(step, self.state, self.controller.history.to_arrays(), self.progress.to_meta())

    def _save_and_cut(self, step: int, cut: Cut) -> None:
        """First phase: the old model and the plan on disk. Then the second."""
        summary = self.progress.summary
        with self.pause.part("evaluate"):
            summary["heldout_loss_before_prune"] = self._evaluate(step, "before_prune")
        summary["device_imbalance_before"] = self.controller.device_imbalance()
        summary["step_seconds_before"] = self._median_step_seconds()
        with self.pause.part("save"):
            self._save(step)
            self.checkpoints.wait()
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
        self._adopt(cut.config, state, Controller(cut.config, prunes=progress.prunes), steps)
        self._report(cut)
        progress.drop_plan()

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
        if summary["steps"] != progress.step:
            side = "after" if summary["prune_steps"] else "before"
            summary["heldout_loss_end"] = self._evaluate(progress.step, "end")
            summary[f"device_imbalance_{side}"] = self.controller.device_imbalance()
            summary[f"step_seconds_{side}"] = self._median_step_seconds()
            summary["steps"] = progress.step
            self._save(progress.step)
            self.checkpoints.wait()
        self.log.write_file("summary.json", json.dumps(summary, indent=1) + "\n")
        self.console.closing_table(summary)
        return summary
