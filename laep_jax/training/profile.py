"""`train.py --profile-steps FIRST:LAST`: a trace of some steps, made by `jax.profiler`."""

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from laep_jax.errors import require
from laep_jax.training.watch import Watch

MAX_STEPS = 100  # a trace is in memory until its last step


def parse_steps(text: str, num_steps: int) -> range:
    """The steps of `--profile-steps`. `UserError` where they are none of a run of `num_steps` steps, or too many."""
    match = re.fullmatch(r"([0-9]{1,10}):([0-9]{1,10})", text)
    first, last = map(int, match.groups()) if match else (0, 0)
    require(1 <= first <= last, "--profile-steps", text, "must be FIRST:LAST, two steps counted from 1")
    require(last <= num_steps, "--profile-steps", text, f"ends after TrainConfig.num_steps={num_steps}")
    require(last - first < MAX_STEPS, "--profile-steps", text, f"must be at most {MAX_STEPS} steps")
    return range(first, last + 1)


@contextlib.contextmanager
def profiling(watch: Watch, steps: range, done: int, folder: Path, report: Callable[[str], None]) -> Iterator[Watch]:
    """`watch`, which also traces those of `steps` that come after step `done` into `folder`; none of an empty range.

    The trace ends when the metrics of the last step have left the device, or with the run. Where JAX cannot make or
    write it, a line says so and the run continues.
    """
    left = range(max(steps.start, done + 1), steps.stop)
    if len(left) < len(steps):
        rest = f"steps {left[0]} to {left[-1]} are traced" if left else "nothing is traced"
        report(f"--profile-steps: steps {steps[0]} to {min(done, steps[-1])} are done; {rest}")
    trace = _Trace(folder, report)

    @contextlib.contextmanager
    def traced(stage: str, step: int) -> Iterator[None]:
        if left and (stage, step) == ("step", left[0]):
            trace.start()
        with watch(stage, step), _named(stage, step) if trace.is_running else contextlib.nullcontext():
            yield
        if left and (stage, step) == ("record", left[-1]):
            trace.stop(f"steps {left[0]} to {left[-1]}")

    try:
        yield traced if left else watch
    finally:
        trace.stop("the steps until the run ended")


def _named(stage: str, step: int) -> contextlib.AbstractContextManager:
    """The stage under its name in the trace; steps as the trace's viewer counts them."""
    if stage == "step":
        return jax.profiler.StepTraceAnnotation("train", step_num=step)
    return jax.profiler.TraceAnnotation(stage)


class _Trace:
    def __init__(self, folder: Path, report: Callable[[str], None]):
        self._folder, self._report = folder, report
        self.is_running = False

    def start(self) -> None:
        self.is_running = self._attempt(lambda: jax.profiler.start_trace(self._folder))

    def stop(self, what: str) -> None:
        if self.is_running and self._attempt(jax.profiler.stop_trace):
            self._report(f"{self._folder} has a trace of {what}")
        self.is_running = False

    def _attempt(self, do: Callable[[], object]) -> bool:
        try:
            do()
        except (OSError, RuntimeError) as error:  # RuntimeError: JAX's own, also for a full disk or another trace
            self._report(f"no trace in {self._folder}: {str(error).partition(chr(10))[0]}")
            return False
        return True
