"""Token counts from a file that any framework has written, and a summary of them to read before planning.

Axes: N iterations, L layers, E experts of a layer.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from laep_jax.commands import program
from laep_jax.errors import UserError, require
from laep_jax.files import array_names, read_array, read_arrays
from laep_jax.laep.load import FIELD, as_counts

FORMS = (
    f".npy, or .npz with the array {FIELD}: integers [iterations, layers, experts] or [layers, experts]; "
    "or .npz with one array a layer, layer_0, layer_1, ...: [iterations, experts] or [experts]; "
    "or .npz with one array a domain: [iterations, layers, experts]"
)
MAX_IDLE_LINES = 4
MAX_ID, MIN_ROWS = 1024, 32  # what looks like ids of experts: numbers below, in so many rows


def read_counts(path: Path) -> list[np.ndarray]:
    """Checked counts [N, E] of each layer, from a file in one of FORMS. `UserError` on anything else."""
    name = f"counts {str(path)!r}"
    names = array_names(path, name)
    if names and FIELD not in names:
        names = _by_layer(names, name)
        arrays = read_arrays(path, name, names)
        return as_counts([arrays[key][None] if arrays[key].ndim == 1 else arrays[key] for key in names])
    tokens = read_array(path, name, FIELD)
    rule = "must be [iterations, layers, experts] or without the first"
    require(tokens.ndim in (2, 3), f"{FIELD}.shape", tokens.shape, rule)
    return as_counts(tokens if tokens.ndim == 3 else tokens[None])


def read_domains(path: Path) -> dict[str, list[np.ndarray]]:
    """Checked counts [N, E] of each layer by domain, from an .npz with one array a domain; empty of another file."""
    name = f"counts {str(path)!r}"
    names = array_names(path, name)
    if not names or FIELD in names:
        return {}
    arrays = read_arrays(path, name, names)
    if any(tokens.ndim != 3 for tokens in arrays.values()):
        return {}
    return {domain: as_counts(tokens_NLE) for domain, tokens_NLE in arrays.items()}


def _by_layer(names: list[str], name: str) -> list[str]:
    """The names in the order of their layers: the same but for one number, 0 to L - 1."""
    matches = [re.fullmatch(r"(\D*)(\d{1,6})(\D*)", key, re.ASCII) for key in names]
    by_layer = {int(match[2]): match[0] for match in matches if match}
    others = {(match[1], match[3]) if match else None for match in matches}
    fits = None not in others and len(others) == 1 and sorted(by_layer) == list(range(len(names)))
    require(
        fits,
        f"arrays in {name}",
        names,
        f"must include {FIELD}, or be layer_0, layer_1, ..., or a [iterations, layers, experts] for each domain",
    )
    return [by_layer[layer] for layer in range(len(names))]


def require_counts(counts: Sequence[np.ndarray]) -> None:
    """`UserError` on what has the shape of counts but is none: ids of experts, and the counts of one rank's experts.

    counts: [N, E] of each layer. Every layer routes the same tokens, but for some that are dropped; ids of a token's
    experts are small and different, and their sums mean nothing.
    """
    totals_LN = np.stack([tokens_NE.sum(axis=1) for tokens_NE in counts])
    how = f"`{program('counts')}` makes counts of what other programs log"
    rows = [np.sort(tokens_NE, axis=1) for tokens_NE in counts]
    different = all((row_NE[:, 1:] > row_NE[:, :-1]).all() and row_NE.max() < MAX_ID for row_NE in rows)
    if different and totals_LN.size >= MIN_ROWS and (totals_LN != totals_LN[0]).any():
        raise UserError(f"counts: rows of different numbers below {MAX_ID} look like ids of experts; {how}")
    tokens_L = totals_LN.sum(axis=1) / np.maximum(np.count_nonzero(totals_LN, axis=1), 1)  # idle iterations left out
    few = int(np.where(tokens_L, tokens_L, tokens_L.max()).argmin())
    if 4 * tokens_L[few] < tokens_L.max():
        share = tokens_L[few] / tokens_L.max()
        raise UserError(f"counts: layer {few} has {share:.0%} of the tokens of another: a part of the counts? {how}")


def describe(counts: Sequence[np.ndarray], top_k: int) -> list[str]:
    """Lines on the counts [N, E] of each layer: their sizes, and whatever looks odd, such as a transposed array's."""
    require(top_k >= 1, "top_k", top_k, "must be at least 1")
    widths = [tokens_NE.shape[1] for tokens_NE in counts]
    totals_LN = np.stack([tokens_NE.sum(axis=1) for tokens_NE in counts])
    return [
        f"{_number(len(counts), 'layer')} x {_range(np.array(widths))} experts, "
        f"{_number(len(counts[0]), 'iteration')} of {_tokens(totals_LN, top_k)}",
        *_differing(totals_LN),
        *_idle(totals_LN),
    ]


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"


def _tokens(totals_LN: np.ndarray, top_k: int) -> str:
    if (totals_LN % top_k).any():
        return f"{_range(totals_LN)} counts a layer, not a multiple of top_k={top_k}"
    return f"{_range(totals_LN // top_k)} tokens x top {top_k}"


def _range(values: np.ndarray) -> str:
    """
    >>> _range(np.array([1000, 0, 30])), _range(np.array([0, 64, 64]))
    ('30 to 1,000', '64')
    """
    values = values[values > 0]
    least, most = (values.min(), values.max()) if values.size else (0, 0)
    return f"{most:,}" if least == most else f"{least:,} to {most:,}"


def _differing(totals_LN: np.ndarray) -> list[str]:
    """Every layer routes the same tokens; where it had none, `_idle` says so."""
    highest_N = totals_LN.max(axis=0)
    if ((totals_LN == highest_N) | (totals_LN == 0)).all():
        return []
    missing_L = np.where(totals_LN, highest_N - totals_LN, 0).sum(axis=1)
    layer = int(missing_L.argmax())
    share = missing_L[layer] / highest_N.sum()
    return [f"the layers' tokens of an iteration differ: layer {layer} has {share:.1%} fewer than the layer with most"]


def _idle(totals_LN: np.ndarray) -> list[str]:
    """How many iterations of which layers have no tokens: one line where all layers agree, else a few."""
    idle_LN, iterations = totals_LN == 0, totals_LN.shape[1]
    numbers_L = idle_LN.sum(axis=1)
    layers = np.flatnonzero(numbers_L).tolist()
    ending = f"of {iterations} iterations have no tokens and are left out"
    if layers and (idle_LN == idle_LN[0]).all():
        return [f"every layer: {numbers_L[0]} {ending}"]
    if len(layers) <= MAX_IDLE_LINES:
        return [f"layer {layer}: {numbers_L[layer]} {ending}" for layer in layers]
    return [f"{len(layers)} layers: {_range(numbers_L)} {ending}, most in layer {numbers_L.argmax()}"]
