"""One run in motion: the model as it is now, and everything that changes with it."""

import dataclasses

import jax
import numpy as np

from laep_jax.checkpoint.checkpointer import Checkpoints
from laep_jax.config import Config
from laep_jax.data.dataset import Dataset
from laep_jax.gin_config import operative_config
from laep_jax.laep.load import LoadHistory
from laep_jax.laep.stability import history_capacity
from laep_jax.model.accounting import model_size
from laep_jax.sharding import make_mesh
from laep_jax.state.tree import TrainState
from laep_jax.tracking.console import RunConsole
from laep_jax.tracking.run_log import NoLog, RunLog
from laep_jax.training.evaluate import heldout_loss
from laep_jax.training.prune.compile_ahead import Steps
from laep_jax.training.prune.controller import Controller
from laep_jax.training.prune.guard import softened
from laep_jax.training.prune.transition import Cut, Pause
from laep_jax.training.run_state import Progress
from laep_jax.training.step import make_eval_step, make_train_step


class Run:
    """Without a model at first; `adopt` gives it one, again and again.

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
        self.heldout = [dataset.heldout_batch(i) for i in range(dataset.num_heldout_batches)]
        self.cut: Cut | None = None  # the one that is announced
        self.pause = Pause()
        self.steps = self.new_steps(config, first_step)
        self.state: TrainState
        self.controller: Controller
        self.step_seconds: list[float | None] = []
        self.clock = 0.0

    def adopt(self, config: Config, state: TrainState, controller: Controller, steps: Steps) -> None:
        """Makes this model the run's; whatever was compiled before is let go."""
        self.config, self.state, self.controller, self.steps = config, state, controller, steps
        self.size = model_size(config.model, sequence_length=config.data.sequence_length)
        self.step_seconds: list[float | None] = []
        self.console.state("")
        lines = [line for line in operative_config(config).splitlines() if line.startswith("ModelConfig.")]
        self.log.write_file("model.gin", "\n".join([f"# the model after step {self.progress.step}", *lines, ""]))

    @property
    def compiles(self) -> bool:
        """Whether the first step of this model, with its compilation in it, is still to be recorded."""
        return not self.step_seconds and not isinstance(self.steps.train, jax.stages.Compiled)

    def new_steps(self, config: Config, train_step: jax.stages.Compiled | None = None) -> Steps:
        evaluate = make_eval_step(config, self.mesh, len(self.dataset.domains))
        return Steps(train_step or make_train_step(config, self.mesh), evaluate)

    def new_controller(self, config: Config, history: LoadHistory | None = None) -> Controller:
        laep = softened(config.laep, self.progress.retries, config.model.num_layers)
        return Controller(dataclasses.replace(config, laep=laep), prunes=self.progress.prunes, history=history)

    def read_controller(self, config: Config, step: int) -> Controller:
        """The controller of a checkpoint."""
        history = LoadHistory.from_arrays(self.checkpoints.read_history(step), history_capacity(config.laep))
        return self.new_controller(config, history)

    def evaluate(self, step: int, when: str) -> float:
        """The held-out loss; told, and logged by domain."""
        heldout = heldout_loss(self.steps.evaluate, self.state, self.heldout, self.mesh, self.dataset.domains)
        loss, losses, targets = heldout.loss, heldout.loss_by_domain, heldout.targets_by_domain
        if self.progress.summary["heldout_targets_by_domain"] != targets:  # once, as long as the batches stay the same
            self.progress.summary["heldout_targets_by_domain"] = targets
            self.log.write("heldout", step, targets_by_domain=targets)
        self.log.write("eval", step, heldout_loss=loss, heldout_loss_by_domain=losses, when=when)
        self.progress.summary["heldout_loss_by_domain"][when] = losses
        self.console.event(f"step {step}: held-out loss {loss:.4f} ({when.replace('_', ' ')})")
        return loss

    def save(self, step: int, *, now: bool = False) -> None:
        """Saves everything, or begins to. now: returns when it is on disk."""
        self.log.save()
        save = self.checkpoints.save_now if now else self.checkpoints.save
        save(step, self.state, self.controller.history.to_arrays(), self.progress.to_meta())

    def median_step_seconds(self) -> float | None:
        measured = [seconds for seconds in self.step_seconds if seconds is not None]
        return float(np.median(measured)) if measured else None
