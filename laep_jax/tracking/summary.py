"""What a run comes to: the rows of its closing table, and summary.json."""

import dataclasses
from typing import Any

from laep_jax.tracking.run_log import plain


@dataclasses.dataclass
class Summary:
    """The rows so far; docs/run_directory.md describes each field. None is not known yet, or not finite."""

    experts_before: list[int]
    init_from: str = ""
    experts_after: list[int] | None = None
    parameters_before: int | None = None
    parameters_after: int | None = None
    device_imbalance_before: list[float] | None = None
    device_imbalance_after: list[float] | None = None
    levelled_imbalance_before: list[float] | None = None
    levelled_imbalance_after: list[float] | None = None
    step_seconds_before: float | None = None
    step_seconds_after: float | None = None
    validation_loss_before_prune: float | None = None
    validation_loss_after_prune: float | None = None
    validation_loss_end: float | None = None
    validation_bits_per_byte_end: float | None = None
    validation_loss_by_domain: dict[str, dict[str, float | None]] = dataclasses.field(default_factory=dict)
    validation_targets_by_domain: dict[str, int] = dataclasses.field(default_factory=dict)
    pruned_share_by_domain: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    prune_steps: list[int] = dataclasses.field(default_factory=list)
    not_pruned: str = ""
    steps: int = 0
    tokens: int = 0
    epochs_by_source: dict[str, float] = dataclasses.field(default_factory=dict)
    skipped_steps: int = 0

    def to_dict(self) -> dict[str, Any]:
        return plain(dataclasses.asdict(self))
