"""The steps of a model compiled ahead, in a thread, from shapes alone, while another model is trained.

XLA compiles without Python's lock, but cannot be stopped. A process that ends by itself waits for the compilation,
since Python joins the thread: tearing down the interpreter during a compilation crashes. A program that must end at
once leaves by `os._exit`, see `laep_jax.distributed.exit_without_barrier`.
"""

import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import jax

from laep_jax.config import Config
from laep_jax.sharding import Mesh
from laep_jax.state.tree import TrainState, abstract_layout
from laep_jax.training.step import abstract_batch, make_eval_step, make_train_step

THREAD = "compiling ahead"
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class CompiledSteps:
    """What a model is trained and evaluated with: `make_train_step` and `make_eval_step`, compiled or not yet."""

    train: Callable
    evaluate: Callable


def compile_steps(config: Config, mesh: Mesh, abstract: TrainState, num_domains: int) -> CompiledSteps:
    """Both steps compiled. config: resolved. abstract: the model's `abstract_state`. num_domains: of the text."""
    validation = abstract_batch(config, mesh, validation=True)
    layout = abstract_layout(config, mesh)
    evaluate = make_eval_step(config, mesh, num_domains).lower(
        layout, abstract.params, abstract.router_bias, validation
    )
    train = make_train_step(config, mesh).lower(abstract, layout, abstract_batch(config, mesh))
    return CompiledSteps(train.compile(), evaluate.compile())


def make_steps(
    config: Config, mesh: Mesh, num_domains: int, train_step: jax.stages.Compiled | None = None
) -> CompiledSteps:
    """Both steps, compiled at their first call; train_step: one that is compiled already."""
    return CompiledSteps(train_step or make_train_step(config, mesh), make_eval_step(config, mesh, num_domains))


def ahead(compile_programs: Callable[[], T]) -> Future[T]:
    """Starts compiling; the result raises what went wrong."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(compile_programs())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, name=THREAD).start()
    return future


def is_compiling() -> bool:
    """Whether this process would have to wait for a compilation before it can end."""
    return any(thread.name == THREAD for thread in threading.enumerate())
