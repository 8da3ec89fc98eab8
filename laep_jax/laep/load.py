"""Recorded expert loads (paper section 3.1): tokens per layer and expert, step by step.

`as_counts` checks counts from anywhere; `LoadHistory` keeps the last steps of a run. After a prune
the layers differ in their number of experts, so counts are handed out as one array a layer.

Axes: N steps or iterations, L layers, E experts, of one layer where the layers differ.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from laep_jax.errors import require

FIELD = "tokens_per_expert"
MAX_TOKENS = 2**48  # of a layer's counts in all, so that sums and products of ranks fit int64


def as_counts(tokens: np.ndarray | Sequence[np.ndarray]) -> list[np.ndarray]:
    """Checked counts, one int64 array [N, E] a layer.

    tokens: [N, L, E], or [N, E] of each layer in turn. Floats pass if they are whole numbers.
    `UserError` on another shape, on what is no count, and where a layer's sum does not fit int64.
    """
    if isinstance(tokens, np.ndarray):
        require(tokens.ndim == 3, f"{FIELD}.shape", tokens.shape, "must be [iterations, layers, experts]")
        tokens = list(np.moveaxis(tokens, 1, 0))
    require(len(tokens) > 0, FIELD, list(tokens), "has no layers")
    counts = [_layer_counts(np.asarray(tokens_NE), layer) for layer, tokens_NE in enumerate(tokens)]
    for layer, tokens_NE in enumerate(counts):
        iterations = len(tokens_NE)
        require(iterations == len(counts[0]), f"iterations of layer {layer}", iterations, f"is not {len(counts[0])}")
    return counts


def _layer_counts(tokens_NE: np.ndarray, layer: int) -> np.ndarray:
    name = f"{FIELD} of layer {layer}"
    require(tokens_NE.dtype.kind in "iuf", f"dtype of {name}", str(tokens_NE.dtype), "must be integer")
    require(
        tokens_NE.ndim == 2 and tokens_NE.size > 0,
        f"shape of {name}",
        tokens_NE.shape,
        "must be [iterations, experts], neither of them 0",
    )
    if tokens_NE.dtype.kind == "f":
        _require_all(np.isfinite(tokens_NE), tokens_NE, layer, "must be finite")
        _require_all(tokens_NE == np.rint(tokens_NE), tokens_NE, layer, "must be an integer")
    _require_all(tokens_NE >= 0, tokens_NE, layer, "must not be negative")
    with np.errstate(over="ignore"):
        total = float(tokens_NE.sum(dtype=np.float64))
    require(total < MAX_TOKENS, f"sum of {name}", total, "must be below 2**48")
    return tokens_NE.astype(np.int64)


def _require_all(good_NE: np.ndarray, tokens_NE: np.ndarray, layer: int, rule: str) -> None:
    if not good_NE.all():
        iteration, expert = np.argwhere(~good_NE)[0].tolist()
        require(False, f"{FIELD}[{iteration}, {layer}, {expert}]", tokens_NE[iteration, expert].item(), rule)


def num_with_tokens(tokens_NE: np.ndarray) -> int:
    """Iterations in which the layer got any token."""
    return int(np.count_nonzero(tokens_NE.any(axis=1)))


class LoadHistory:
    """The counts of the last `capacity` steps of one model; begin a new one after a prune.

    num_experts: per layer. All counts are int64, the layers side by side in one row a step.
    """

    def __init__(self, num_experts: Sequence[int], capacity: int):
        assert capacity >= 1, capacity
        self.num_experts = tuple(num_experts)
        self.capacity = capacity
        self._steps: list[int] = []
        self._rows: list[np.ndarray] = []

    def __len__(self) -> int:
        """Steps recorded, at most `capacity`."""
        return len(self._steps)

    @property
    def last_step(self) -> int | None:
        """The newest recorded step."""
        return self._steps[-1] if self._steps else None

    def record(self, step: int, tokens_per_expert: Sequence[np.ndarray]) -> None:
        """Adds the counts of one step, [E] of each layer. Steps ascend; the oldest beyond `capacity` go."""
        shapes = tuple(np.shape(tokens_E) for tokens_E in tokens_per_expert)
        assert shapes == tuple((count,) for count in self.num_experts), (shapes, self.num_experts)
        assert self.last_step is None or step > self.last_step, (step, self.last_step)
        self._steps.append(int(step))
        self._rows.append(np.concatenate([np.asarray(tokens_E).astype(np.int64) for tokens_E in tokens_per_expert]))
        del self._steps[: -self.capacity], self._rows[: -self.capacity]

    def window(self, length: int, back: int = 0) -> list[np.ndarray]:
        """The counts [length, E] of each layer in the last `length` steps, or `back` such windows earlier.

        >>> history = LoadHistory(num_experts=(2, 1), capacity=4)
        >>> for step in range(4):
        ...     history.record(step, [np.array([step, 0]), np.array([9])])
        >>> history.window(2, back=1)[0].tolist()
        [[0, 0], [1, 0]]
        """
        stop = len(self) - back * length
        assert 0 < length <= stop, f"{len(self)} steps do not hold {back + 1} windows of {length}"
        return np.split(np.stack(self._rows[stop - length : stop]), np.cumsum(self.num_experts)[:-1], axis=1)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The full history, for a checkpoint: `num_experts` [L], `steps` [N], `tokens` [N, all experts]."""
        tokens = np.array(self._rows, np.int64).reshape(len(self), sum(self.num_experts))
        return {
            "num_experts": np.array(self.num_experts, np.int64),
            "steps": np.array(self._steps, np.int64),
            "tokens": tokens,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], capacity: int) -> "LoadHistory":
        """The history that `to_arrays` wrote, truncated to its last `capacity` steps. `UserError` on anything else."""
        missing = {"num_experts", "steps", "tokens"} - arrays.keys()
        require(not missing, "arrays of the history", sorted(arrays), f"lack {sorted(missing)}")
        num_experts, steps, tokens = arrays["num_experts"], arrays["steps"], arrays["tokens"]
        integers = all(array.dtype.kind == "i" for array in (num_experts, steps, tokens))
        shape = (*steps.shape, int(num_experts.sum())) if integers else ()
        require(
            num_experts.ndim == steps.ndim == 1 and tokens.shape == shape, "history", tokens.shape, f"is not {shape}"
        )
        require(bool((np.diff(steps) > 0).all()), "steps of the history", steps.tolist(), "must ascend")
        history = cls(num_experts.tolist(), capacity)
        history._steps = steps.tolist()[-capacity:]
        history._rows = list(tokens.astype(np.int64))[-capacity:]
        return history
