"""The one protocol behind which the records of a run go, and the numbers that trackers with charts take from them."""

from typing import Any, Protocol

import numpy as np

MAX_ENTRIES = 20  # of a field that has one number for each domain


class Tracker(Protocol):
    """Where the records of a run go: metrics.jsonl, TensorBoard, and the services of `tracking/services.py`."""

    def log(self, step: int, record: dict[str, Any]) -> None:
        """Takes a record: its `kind` and its fields, as JSON has them. Steps do not descend. No failure is raised."""
        ...

    def close(self) -> None: ...


def scalars(record: dict[str, Any]) -> dict[str, float]:
    """The numbers of a record by their tags, KIND/FIELD; numbers by layer as least, mean and largest.

    Of a dictionary with more than MAX_ENTRIES entries the first ones only.

    >>> scalars({"kind": "train", "loss": 2.5, "device_imbalance": [1.0, 2.0]})
    {'train/loss': 2.5, 'train/device_imbalance/min': 1.0, 'train/device_imbalance/mean': 1.5, \
'train/device_imbalance/max': 2.0}
    """
    fields = {name: value for name, value in record.items() if name != "kind"}
    return dict(pair for name, value in fields.items() for pair in _scalars(f"{record['kind']}/{name}", value))


def _scalars(tag: str, value: Any) -> list[tuple[str, float]]:
    if isinstance(value, dict):
        shown = list(value.items())[:MAX_ENTRIES]
        return [scalar for name, item in shown for scalar in _scalars(f"{tag}/{name}", item)]
    if isinstance(value, list):
        numbers = [item for item in value if isinstance(item, (int, float))]
        if not numbers:
            return []
        return [(f"{tag}/{name}", float(of(numbers))) for name, of in (("min", min), ("mean", np.mean), ("max", max))]
    if isinstance(value, (int, float)):
        return [(tag.encode(errors="backslashreplace").decode(), float(value))]
    return []
