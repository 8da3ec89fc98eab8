"""How a run ends before its last step: by a signal, or because a step hangs.

SIGTERM is what clusters and `laep_jax launch` send, SIGINT is Ctrl-C. Neither breaks anything off: the run
asks after every step whether to stop. Connected processes must all stop after the same step; there JAX catches
SIGTERM, informs the others and agrees with them on a step.

A step that never ends can neither be broken off nor raise anything: it waits inside XLA, perhaps for another
host. Then the process shows where every thread is, and ends.
"""

import faulthandler
import math
import os
import signal
import threading
import time

import jax
from jax.experimental import multihost_utils

STDERR = 2  # as a number: a notebook's sys.stderr is no file
HEAD_START = 2.0  # seconds between the line that explains the stacks and the stacks


class PreemptionGuard:
    """Whether a run is to stop; a context manager that leaves signals and timers as it found them.

    Signals are caught where Python can, in the main thread; one that is ignored stays so.

    step_timeout: seconds that a step may take, None for any time.
    """

    def __init__(self, step_timeout: float | None):
        self._step_timeout = step_timeout
        self._connected = jax.distributed.is_initialized()
        self._requested = False
        self._found: dict[int, object] = {}  # handlers, by signal
        self._deadline = math.inf
        self._over = threading.Event()
        self._reporter = threading.Thread(target=self._report_timeout, name="step timeout", daemon=True)

    def __enter__(self) -> "PreemptionGuard":
        self._reporter.start()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT,) if self._connected else (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) not in (None, signal.SIG_IGN):
                    self._found[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exception) -> None:
        self.end_step()
        for number, handler in self._found.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._over.set()
        self._reporter.join()

    def asked(self, step: int) -> bool:
        """Whether to save and end after this step. To be called once after every step; all processes agree."""
        return multihost_utils.reached_preemption_sync_point(step) if self._connected else self._requested

    def begin_step(self) -> None:
        """Arms the time limit for a step, waiting for it included; the step before has ended."""
        if self._step_timeout:
            self._deadline = time.monotonic() + self._step_timeout
            faulthandler.dump_traceback_later(self._step_timeout + HEAD_START, exit=True, file=STDERR)

    def end_step(self) -> None:
        """Disarms the time limit: what follows is not a step."""
        self._deadline = math.inf
        faulthandler.cancel_dump_traceback_later()

    def _on_signal(self, number: int, frame: object) -> None:
        self._requested = True
        more = ""
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, self._found.pop(signal.SIGINT))  # type: ignore[arg-type]
            more = "; once more ends it at once"
        if self._connected:
            os.kill(os.getpid(), signal.SIGTERM)
        # Not by `print`, which a signal may have interrupted.
        os.write(STDERR, f"\n{signal.Signals(number).name}: the run saves after this step and ends{more}\n".encode())

    def _report_timeout(self) -> None:
        """Explains the stacks that follow. The end itself needs neither this thread nor Python's lock."""
        while not self._over.wait(HEAD_START / 4):
            if time.monotonic() > self._deadline:
                text = (
                    f"a step takes longer than TrainConfig.step_timeout={self._step_timeout:g} s, so the process ends;"
                    " started again, the run resumes from its newest checkpoint. This is where it hangs:\n"
                )
                os.write(STDERR, text.encode())
                return
