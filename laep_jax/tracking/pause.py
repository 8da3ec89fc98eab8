"""The time in which a run does not train because of a plan."""

import contextlib
import time
from collections.abc import Iterator


class Pause:
    """seconds: by part, added up."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Adds the time inside."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in self.seconds.items())
        return f"a pause of {sum(self.seconds.values()):.2f} s ({parts})"
