"""One run in motion: the model that it trains now, and everything that goes with it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from laep_jax.checkpoint.checkpointer import Checkpoints
from laep_jax.config import Config
from laep_jax.data.dataset import Dataset
from laep_jax.gin_config import operative_config
from laep_jax.laep.layout import to_arrays
from laep_jax.laep.load import LoadHistory
from laep_jax.laep.slots import SlotMap
from laep_jax.model.accounting import ModelSize, model_size
from laep_jax.sharding import Mesh, replicated
from laep_jax.state.tree import TrainState, layout_of
from laep_jax.tracking.console import RunConsole
from laep_jax.tracking.pause import Pause
from laep_jax.tracking.run_log import NoLog, RunLog
from laep_jax.training.evaluate import ValidationLoss, bits_per_byte, validation_loss
from laep_jax.training.prune.compile_ahead import CompiledSteps
from laep_jax.training.prune.controller import Controller
from laep_jax.training.prune.guard import softened
from laep_jax.training.prune.smaller_model import SmallerModel
from laep_jax.training.run_state import RunState
from laep_jax.training.sample import lengths, make_sampler
from laep_jax.training.step import Batch, Metrics
from laep_jax.training.watch import Watch


@dataclasses.dataclass
class Model:
    """What is trained, replaced as a whole by a prune.

    config: resolved. maps: where the experts of each layer are. step_seconds: None where a step compiled.
    """

    config: Config
    mesh: Mesh
    state: TrainState
    maps: tuple[SlotMap, ...]
    steps: CompiledSteps
    step_seconds: list[float | None] = dataclasses.field(default_factory=list)

    @functools.cached_property
    def size(self) -> ModelSize:
        return model_size(self.config.model, sequence_length=self.config.data.sequence_length)

    def __post_init__(self) -> None:
        self.place(self.maps)

    def place(self, maps: tuple[SlotMap, ...]) -> None:
        """From the next step on the experts are where `maps` says; nothing is moved or compiled for it."""
        self.maps = maps
        self.layout = jax.device_put(layout_of(maps, self.config), replicated(self.mesh))

    def train(self, batch: Batch) -> Metrics:
        """One optimizer step."""
        self.state, metrics = self.steps.train(self.state, self.layout, batch)
        return metrics

    @property
    def evaluate(self) -> Callable:
        """The eval step with the layout that is in use."""
        return functools.partial(self.steps.evaluate, self.layout)

    @functools.cached_property
    def sampler(self) -> Callable:
        """`make_sampler` of this model, compiled at its first call."""
        return make_sampler(self.config, self.mesh)

    def sample(self, prompt: np.ndarray) -> np.ndarray:
        """The most probable tokens after a prompt, which is the same on every process."""
        prompt_P = jax.device_put(prompt, replicated(self.mesh))
        return np.asarray(self.sampler(self.layout, self.state.params, self.state.router_bias, prompt_P))

    @property
    def compiles(self) -> bool:
        """Whether the first step of this model, with its compilation in it, is still to be recorded."""
        return not self.step_seconds and not isinstance(self.steps.train, jax.stages.Compiled)

    def median_step_seconds(self) -> float | None:
        measured = [seconds for seconds in self.step_seconds if seconds is not None]
        return float(np.median(measured)) if measured else None


class Trainer:
    """A run that can continue from where it stands.

    model: as `run_state` describes it. history: of the loads of that model, None where it is new. watch: enters the
    stages. pending: the model that a scheduled plan leads to.
    """

    def __init__(
        self,
        model: Model,
        history: LoadHistory | None,
        dataset: Dataset,
        checkpoints: Checkpoints,
        log: RunLog | NoLog,
        console: RunConsole,
        run_state: RunState,
        watch: Watch,
    ):
        self.watch = watch
        self.dataset, self.checkpoints = dataset, checkpoints
        self.log, self.console, self.run_state = log, console, run_state
        self.validation = [dataset.validation_batch(i) for i in range(dataset.num_validation_batches)]
        self.pending: SmallerModel | None = None
        self.pause = Pause()
        self.clock = 0.0
        self.model, self.controller = model, make_controller(model.config, run_state, history)
        self._write_model()

    @property
    def config(self) -> Config:
        """Of the model as it is now."""
        return self.model.config

    def is_due(self, step: int) -> bool:
        """Whether a scheduled plan is to be applied after this step."""
        return self.run_state.pending is not None and self.run_state.pending.due == step

    def install_model(self, model: Model) -> None:
        """Trains another model from now on; releases what was compiled for the one before."""
        self.model, self.controller = model, make_controller(model.config, self.run_state, None)
        self.console.state("")
        self._write_model()

    def _write_model(self) -> None:
        lines = [line for line in operative_config(self.config).splitlines() if line.startswith("ModelConfig.")]
        self.log.write_file("model.gin", "\n".join([f"# the model after step {self.run_state.step}", *lines, ""]))

    def rebalance(self, step: int) -> None:
        """Places the experts anew, and logs how even the devices were by the maps so far."""
        imbalances = self.controller.imbalances(self.model.maps)
        self.model.place(self.controller.new_maps())
        self.log.write("rebalance", step, **{f"{kind}_imbalance": by_layer for kind, by_layer in imbalances.items()})

    def measure(self, when: str) -> None:
        """For the summary, `before` the first prune or `after` the last: imbalance over the last window, step time."""
        summary, imbalances = self.run_state.summary, self.controller.imbalances(self.model.maps)
        setattr(summary, f"device_imbalance_{when}", imbalances["device"])
        setattr(summary, f"levelled_imbalance_{when}", imbalances["levelled"])
        setattr(summary, f"step_seconds_{when}", self.model.median_step_seconds())

    def soften_rule(self) -> None:
        """After a plan that was refused: the next one is made with a softer rule."""
        self.run_state.retries += 1
        self.controller = make_controller(self.config, self.run_state, self.controller.history)

    def evaluate(self, step: int, when: str) -> None:
        """The validation loss; shown, and logged by domain."""
        with self.watch("evaluate", step):
            validation = validation_loss(self.model.evaluate, self.model.state, *self.measured_on)
        self.log_validation(step, when, validation)
        bits = self.bits_per_byte(validation)
        self.console.event(f"step {step}: validation loss {validation.loss:.4f}, {bits:.4f} bits per byte ({when})")

    def bits_per_byte(self, validation: ValidationLoss) -> float:
        """Of the measured validation text, whose bytes are known (see `Dataset`)."""
        return bits_per_byte(validation.loss, self.dataset.bytes_per_target)

    def log_validation(self, step: int, when: str, validation: ValidationLoss) -> None:
        """Writes a measurement to the log and the summary."""
        loss, losses, targets = validation.loss, validation.loss_by_domain, validation.targets_by_domain
        summary, bits = self.run_state.summary, self.bits_per_byte(validation)
        if summary.validation_targets_by_domain != targets:  # once, as long as the batches stay the same
            summary.validation_targets_by_domain = targets
            self.log.write("validation", step, targets_by_domain=targets)
        self.log.write(
            "eval",
            step,
            validation_loss=loss,
            validation_bits_per_byte=bits,
            validation_loss_by_domain=losses,
            epochs_by_source=self.dataset.epochs(step),
            when=when,
        )
        summary.validation_loss_by_domain[when] = dict(losses)
        if when != "periodic":
            setattr(summary, f"validation_loss_{when}", loss)
        if when == "end":
            summary.validation_bits_per_byte_end = bits

    def sample(self, step: int) -> None:
        """Shows and logs what the model writes, greedily, after the start of the validation text."""
        prompt = self.dataset.prompt(lengths(self.config.data.sequence_length)[0])
        with self.watch("sample", step):
            written = self.model.sample(prompt)
        before, text = self.dataset.text(prompt), self.dataset.text(written)
        self.log.write("sample", step, prompt=before, text=text)
        self.console.event(f"step {step}: after {before!r} the model writes {text!r}")

    @property
    def measured_on(self) -> tuple[list[dict[str, np.ndarray]], Mesh, tuple[str, ...]]:
        """The last arguments of `evaluate.validation_loss`."""
        return self.validation, self.model.mesh, self.dataset.domains

    def save(self, step: int, *, now: bool = False) -> None:
        """Saves everything, or starts to. now: returns when it is on disk."""
        self.log.save()
        meta: dict[str, Any] = self.run_state.to_meta()
        with self.watch("save", step):
            history = self.controller.history.to_arrays() | to_arrays(self.model.maps)
            self.checkpoints.save(step, self.model.state, history, meta, self.run_state.num_experts, now=now)


def make_controller(config: Config, run_state: RunState, history: LoadHistory | None) -> Controller:
    """The controller of a model. `UserError` where `LaepConfig.plan` is none for it."""
    laep = softened(config.laep, run_state.retries, config.model.num_layers)
    if run_state.pending:  # a plan from a file is in the checkpoint now
        laep = dataclasses.replace(laep, plan="")
    return Controller(dataclasses.replace(config, laep=laep), prunes=run_state.prunes, history=history)
