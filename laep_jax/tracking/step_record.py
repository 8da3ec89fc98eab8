"""The fields of a `train` record of metrics.jsonl."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from laep_jax.laep.balance import imbalance


def train_record(
    metrics: dict[str, Any],
    counts: Sequence[np.ndarray],
    *,
    seconds: float | None,
    tokens: int,
    epochs: float,
    flops_per_token: float,
    peak_memory_bytes: int,
) -> dict[str, Any]:
    """One step's numbers.

    metrics: of `step.train_step`, on the host. counts: [E] of each layer. seconds: None where the step was compiled in
    them. epochs: of the training text so far.
    """
    speed = None if seconds is None else tokens / seconds
    return {
        "loss": float(metrics["loss"]),
        "epochs": epochs,
        "grad_norm": float(metrics["grad_norm"]),
        "learning_rate": float(metrics["learning_rate"]),
        "tokens_per_second": speed,
        "gflops_per_second": speed and speed * flops_per_token / 1e9,
        "step_seconds": seconds,
        "peak_memory_bytes": peak_memory_bytes,
        "expert_imbalance": [imbalance(loads_E) for loads_E in counts],
        "device_imbalance": [imbalance(load_P) for load_P in metrics["tokens_per_device"]],
        **{f"aux_{name}": float(value) for name, value in metrics["aux"].items()},
    }
