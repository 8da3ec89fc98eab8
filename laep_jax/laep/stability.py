"""Have the expert loads become stable? The paper prunes then (sections 3.1, 3.2) but never defines it.

What a decision needs is that a choice made a window of steps ago is still a good one. So neighbouring windows are
compared, in every layer: (a) few tokens have changed expert; (b) the experts chosen a window ago have hardly more of
today's tokens than those chosen today, and none of them is in use by now. Loads are stable when all this holds several
windows in a row, and not before a minimum step. The sets are taken before rounding to the devices. That the same set is
chosen is not asked for: where a layer loses three experts, one of them near the bound would decide. (c) The rank
correlation of the loads, by which the paper shows its two phases, is reported beside.

Axes: N steps of a window, L layers, E experts.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np

from laep_jax.config import LaepConfig
from laep_jax.laep.budget import choose
from laep_jax.laep.load import LoadHistory
from laep_jax.laep.rule import PruneRule


@dataclasses.dataclass(frozen=True)
class Window:
    """counts: [N, E] of each layer. chosen: the experts that the rule chooses in each, before rounding."""

    counts: list[np.ndarray]
    chosen: list[tuple[int, ...]]

    @classmethod
    def of(cls, counts: list[np.ndarray], rule: PruneRule) -> "Window":
        return cls(counts, [choice.eligible for choice in choose(counts, rule, {})])


@dataclasses.dataclass(frozen=True)
class Change:
    """What changed in each layer from one window to the next.

    moved: share of the tokens that changed expert, from 0 to 1. regret: share of the new window's tokens that go to the
    experts chosen in the old one, less the share of those chosen in the new one. excess: the largest load of an expert
    chosen in the old window by that in the new one, over its bound alpha; 0 where none was chosen or alpha is inf.
    rank_correlation: Spearman's coefficient of the loads.
    """

    moved: tuple[float, ...]
    regret: tuple[float, ...]
    excess: tuple[float, ...]
    rank_correlation: tuple[float, ...]


FIELDS = dataclasses.fields(Change)


@dataclasses.dataclass(frozen=True)
class StabilityReport:
    """Where the test stands after a window.

    change: since the window before; None where there is none. consecutive: windows that passed in a row, counted up to
    `LaepConfig.stable_windows`. reason: a sentence for people on what has or has not been reached.
    """

    change: Change | None
    consecutive: int
    stable: bool
    reason: str

    def to_record(self) -> dict:
        """Fields of the `stability` record."""
        since = dataclasses.asdict(self.change) if self.change else dict.fromkeys(field.name for field in FIELDS)
        return since | {"consecutive": self.consecutive, "stable": self.stable, "reason": self.reason}


def history_capacity(laep: LaepConfig) -> int:
    """Steps that a `LoadHistory` has to hold for `assess`."""
    return laep.window * (laep.stable_windows + 1)


def assess(history: LoadHistory, laep: LaepConfig) -> StabilityReport:
    """Tests the last recorded windows. Meant to be asked whenever a window of steps is complete."""
    num_windows = min(len(history) // laep.window, laep.stable_windows + 1)
    if num_windows < 2:
        reason = f"{len(history)} steps recorded, {2 * laep.window} needed to compare two windows"
        return StabilityReport(None, 0, False, reason)
    rule = PruneRule.from_settings(laep, len(history.num_experts), top_k=1, expert_parallel=1)
    windows = [Window.of(history.window(laep.window, back), rule) for back in range(num_windows)]
    changes = [change(new, old, rule.alpha) for new, old in itertools.pairwise(windows)]
    failures = [failure(one, laep) for one in changes]
    consecutive = next((i for i, failure in enumerate(failures) if failure), len(failures))
    reason = failures[0] or _waiting(consecutive, history.last_step, laep)
    stable = not reason
    reason = reason or f"every layer stable for {consecutive} windows of {laep.window} steps in a row"
    return StabilityReport(changes[0], consecutive, stable, reason)


def change(new: Window, old: Window, alpha: Sequence[float]) -> Change:
    """Compares two windows of equally many steps. alpha: the bound of each layer."""
    layers = [*zip(new.counts, old.counts, new.chosen, old.chosen, alpha, strict=True)]
    return Change(
        moved=tuple(moved(new_NE, old_NE) for new_NE, old_NE, *_ in layers),
        regret=tuple(_share(new_NE, before) - _share(new_NE, now) for new_NE, _, now, before, _ in layers),
        excess=tuple(_excess(new_NE, before, bound) for new_NE, _, _, before, bound in layers),
        rank_correlation=tuple(_load_correlation(new_NE, old_NE) for new_NE, old_NE, *_ in layers),
    )


def thresholds(laep: LaepConfig) -> dict[str, float]:
    """What each quantity of a `Change` may be at most, by its name; there is none for the rank correlation."""
    return {"moved": laep.max_moved, "regret": laep.max_regret, "excess": laep.max_excess}


def _worst(one: Change, laep: LaepConfig) -> tuple[float, int, str, float]:
    """What is furthest above its threshold, or nearest to it: value over threshold, layer, name, value."""
    return max(
        (value / threshold, layer, name, value)
        for name, threshold in thresholds(laep).items()
        for layer, value in enumerate(getattr(one, name))
    )


def failure(one: Change, laep: LaepConfig) -> str:
    """The layer and value furthest above its threshold, in words; empty where none is above."""
    over, layer, name, value = _worst(one, laep)
    return f"layer {layer}: {name} {value:.3f} > {thresholds(laep)[name]:g}" if over > 1 else ""


def status(report: StabilityReport, laep: LaepConfig) -> str:
    """For the progress line: windows in a row, and what is nearest to its threshold, or furthest above.

    >>> change = Change(moved=(0.02, 0.16), regret=(0.0, 0.03), excess=(0.5, 0.9), rank_correlation=(0.9, 0.8))
    >>> status(StabilityReport(change, 0, False, ""), LaepConfig())
    'loads: 0/2 windows stable (layer 1 moved 0.16)'
    """
    text = f"loads: {report.consecutive}/{laep.stable_windows} windows stable"
    if not report.change:
        return text
    _, layer, name, value = _worst(report.change, laep)
    return f"{text} (layer {layer} {name} {value:.2f})"


def _waiting(consecutive: int, step: int | None, laep: LaepConfig) -> str:
    """Why stable loads do not fire yet; empty where nothing is missing."""
    if consecutive < laep.stable_windows:
        return f"{consecutive} of {laep.stable_windows} stable windows in a row"
    if step is not None and step < laep.min_step:
        return f"step {step} is before min_step={laep.min_step}"
    return ""


def moved(new_NE: np.ndarray, old_NE: np.ndarray) -> float:
    """Share of the tokens that changed expert between two windows of equally many steps; 1.0 where one has no tokens.

    It is the total variation of the loads, without what differs by chance. That is known from the even and the odd
    steps of each window, halves between which nothing has moved: they differ by sqrt(2) times as much as two windows
    whose loads have the same mean.

    >>> moved(np.array([[25, 75], [25, 75]]), np.array([[50, 50], [50, 50]]))
    0.25
    """
    windows = new_NE, old_NE
    if not all(window_NE.any() for window_NE in windows):
        return 1.0
    noise = sum(_distance(window_NE[::2], window_NE[1::2]) ** 2 for window_NE in windows) / 4
    return math.sqrt(max(_distance(new_NE, old_NE) ** 2 - noise, 0.0))


def _distance(a_NE: np.ndarray, b_NE: np.ndarray) -> float:
    """Half the sum of the differences in share; 0 where one has no tokens."""
    a_E, b_E = a_NE.sum(axis=0), b_NE.sum(axis=0)
    if not a_E.any() or not b_E.any():
        return 0.0
    return float(np.abs(a_E / a_E.sum() - b_E / b_E.sum()).sum() / 2)


def _share(tokens_NE: np.ndarray, experts: Sequence[int]) -> float:
    totals_E = tokens_NE.sum(axis=0)
    return float(totals_E[list(experts)].sum() / max(totals_E.sum(), 1))


def _excess(tokens_NE: np.ndarray, experts: Sequence[int], alpha: float) -> float:
    totals_E = tokens_NE.sum(axis=0)
    most = int(totals_E[list(experts)].max(initial=0))
    if not most or math.isinf(alpha):
        return 0.0
    return most / (alpha * float(totals_E.mean())) if alpha else math.inf


def _load_correlation(new_NE: np.ndarray, old_NE: np.ndarray) -> float:
    """0.0 where a window has no tokens."""
    new_E, old_E = new_NE.sum(axis=0), old_NE.sum(axis=0)
    return rank_correlation(new_E, old_E) if new_E.any() and old_E.any() else 0.0


def rank_correlation(a_E: np.ndarray, b_E: np.ndarray) -> float:
    """Spearman's coefficient with average ranks for ties; 1.0 if both are constant, 0.0 if one is.

    >>> rank_correlation(np.array([1, 5, 9]), np.array([10, 30, 20]))
    0.5
    """
    a, b = _twice_ranks(a_E), _twice_ranks(b_E)
    n, sum_a, sum_b = len(a), int(a.sum()), int(b.sum())
    variance_a = n * int(a @ a) - sum_a**2  # integers, times n**2: equal ranks give exactly 1.0
    variance_b = n * int(b @ b) - sum_b**2
    if not variance_a or not variance_b:
        return float(variance_a == variance_b)
    return (n * int(a @ b) - sum_a * sum_b) / math.sqrt(variance_a * variance_b)


def _twice_ranks(values_E: np.ndarray) -> np.ndarray:
    """Ranks from 1, the mean of their places for ties, times two to stay integers."""
    _, group, sizes = np.unique(values_E, return_inverse=True, return_counts=True)
    return (2 * sizes.cumsum() - sizes + 1)[group]
