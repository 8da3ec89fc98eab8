"""What other programs log of their routing, as counts.

A reader takes files and gives counts [N, E] for each layer by its name in the files; layers come in the files' order of
numbers. `UserError` names the file, and the line or array, that does not fit.

Axes: N iterations, L layers, E experts of a layer, T tokens, K experts of a token.
"""

import csv
import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from laep_jax.errors import UserError, require
from laep_jax.files import (
    MAX_ARRAY,
    MAX_LINE,
    array_names,
    open_regular,
    parse_json,
    read_array,
    read_arrays,
    read_bytes,
)
from laep_jax.importers.torch_file import read_torch
from laep_jax.laep.load import MAX_TOKENS

MAX_EXPERTS = 2**16  # of a layer: ids above are no ids
Counts = dict[str, np.ndarray]
Key = tuple[str, int]


def megatron(files: Sequence[Path], num_experts: int | None, top_k: int | None) -> Counts:
    """Megatron-LM's --save-tokens-per-experts-interval: a file for each rank, with the counts of its own experts."""
    ranks = [_megatron_rank(path) for path in files]
    for path, rank in zip(files, ranks, strict=True):
        require(
            rank.keys() == ranks[0].keys(),
            f"iterations and layers of {path}",
            len(rank),
            f"are not those of {files[0]}",
        )
    return _by_layer({key: np.concatenate([rank[key] for rank in ranks]) for key in ranks[0]})


def _megatron_rank(path: Path) -> dict[tuple[int, Key], np.ndarray]:
    found: dict[tuple[int, Key], np.ndarray] = {}
    for name, record in _json_lines(path):
        key = _integer(record, "iter", name), (str(record.get("block", "")), _integer(record, "layer", name))
        require(key not in found, name, key, "stands twice in the file")
        found[key] = _numbers(record.get("tpe"), 2, f"{name}: tpe").sum(axis=0)
    return found


def megatron_trace(files: Sequence[Path], num_experts: int | None, top_k: int | None) -> Counts:
    """Megatron-LM's --moe-routing-trace-path: the experts of every token, a file for each rank with its tokens."""
    ids: dict[tuple[int, Key], list[np.ndarray]] = {}
    for path in files:
        for name, record in _json_lines(path):
            key = _integer(record, "step", name), ("", _integer(record, "layer", name))
            ids.setdefault(key, []).append(_numbers(record.get("top_indices"), 2, f"{name}: top_indices"))
    return _by_layer(_count_ids({key: np.concatenate([*map(np.ravel, of)]) for key, of in ids.items()}, num_experts))


def sglang(files: Sequence[Path], num_experts: int | None, top_k: int | None) -> Counts:
    """SGLang's dumps of the expert distribution: .pt with `logical_count`, or the older csv."""
    if all(path.suffix == ".csv" for path in files):
        return table(files, num_experts, top_k)
    parts = []
    for path in files:
        values = read_torch(path, str(path))
        require("logical_count" in values, f"entries of {path}", sorted(map(str, values)), "lack logical_count")
        tokens = _numbers(values["logical_count"], None, f"{path}: logical_count")
        require(tokens.ndim in (2, 3), f"{path}: logical_count.shape", tokens.shape, "must be [steps, layers, experts]")
        parts.append(tokens if tokens.ndim == 3 else tokens[None])
    _require_alike({path: part.shape[1:] for path, part in zip(files, parts, strict=True)})
    tokens_NLE = np.concatenate(parts)
    return {str(layer): tokens_NLE[:, layer] for layer in range(tokens_NLE.shape[1])}


def table(files: Sequence[Path], num_experts: int | None, top_k: int | None) -> Counts:
    """csv with the columns layer, expert, count (or layer_id, expert_id, count): a file for each iteration."""
    found = {}
    for iteration, path in enumerate(files):
        text = read_bytes(path, str(path), MAX_LINE).decode("utf-8-sig", errors="replace")
        rows: dict[Key, dict[int, int]] = {}
        for number, row in enumerate(_csv_rows(text, path), 2):
            name = f"{path} line {number}"
            layer, expert, count = (
                _whole(row.get(key, row.get(f"{key}_id")), f"{name}: {key}") for key in ("layer", "expert", "count")
            )
            of_layer = rows.setdefault(("", layer), {})
            require(
                expert < MAX_EXPERTS and expert not in of_layer, f"{name}: expert", expert, "is none, or stands twice"
            )
            of_layer[expert] = count
        require(bool(rows), str(path), len(text), "has no rows of layer,expert,count")
        found |= {(iteration, key): counts for key, counts in rows.items()}
    highest = max(max(counts) for counts in found.values())
    width = num_experts or highest + 1
    require(highest < width, "the highest expert", highest, f"is not below {width}")
    return _by_layer({key: np.array([of.get(expert, 0) for expert in range(width)]) for key, of in found.items()})


def _csv_rows(text: str, path: Path) -> list[dict[str, str]]:
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
    except csv.Error as error:
        raise UserError(f"{path} does not read as csv: {error}") from error
    columns = [*rows[0]] if rows else []
    fits = {"layer", "expert", "count"} <= {str(column).removesuffix("_id") for column in columns}
    require(not rows or fits, f"columns of {path}", columns, "lack layer, expert or count")
    return rows


def vllm_ids(files: Sequence[Path], num_experts: int | None, top_k: int | None) -> Counts:
    """vLLM's `routed_experts`, saved as .npy: the experts of every token, [tokens, layers, k]; a file an iteration."""
    ids = {}
    for iteration, path in enumerate(files):
        ids_TLK = _numbers(read_array(path, str(path), "routed_experts"), 3, str(path))
        ids |= {(iteration, ("", layer)): ids_TLK[:, layer].ravel() for layer in range(ids_TLK.shape[1])}
    return _by_layer(_count_ids(ids, num_experts))


def hf_router_logits(files: Sequence[Path], num_experts: int | None, top_k: int | None) -> Counts:
    """`output_router_logits` of Transformers, [tokens, experts] of each layer: .npz or .npy; a file an iteration."""
    require(top_k is not None, "--top-k", top_k, "is needed to count router logits")
    assert top_k
    found = {}
    for iteration, path in enumerate(files):
        names = sorted(array_names(path, str(path)), key=lambda name: [*map(int, re.findall(r"\d{1,9}", name))])
        by_name = read_arrays(path, str(path), names) if names else {}
        whole = None if names else read_array(path, str(path), "router_logits")
        require(whole is None or whole.ndim == 3, f"{path}: dimensions", whole, "must be [layers, tokens, experts]")
        arrays = [by_name[name] for name in names] if whole is None else list(whole)
        for layer, logits_TE in enumerate(arrays):
            name = f"{path} layer {layer}"
            require(
                logits_TE.ndim == 2 and logits_TE.shape[1] >= top_k,
                f"{name}: shape",
                logits_TE.shape,
                "must be [tokens, experts]",
            )
            require(bool(np.isfinite(logits_TE).all()), name, "nan or inf", "must be finite")
            ids_TK = np.argpartition(-logits_TE.astype(np.float64), top_k - 1, axis=1)[:, :top_k]
            found[iteration, ("", layer)] = np.bincount(ids_TK.ravel(), minlength=logits_TE.shape[1])
    return _by_layer(found)


FORMATS: Mapping[str, Callable[[Sequence[Path], int | None, int | None], Counts]] = {
    "megatron": megatron,
    "megatron-trace": megatron_trace,
    "sglang": sglang,
    "vllm-ids": vllm_ids,
    "csv": table,
    "hf-router-logits": hf_router_logits,
}


def _by_layer(found: Mapping[tuple[int, Key], np.ndarray]) -> Counts:
    """Counts [E] by iteration and layer as [N, E] by layer."""
    iterations, layers = sorted({iteration for iteration, _ in found}), sorted({key for _, key in found})
    counts = {}
    for block, number in layers:
        name = f"layer {' '.join(filter(None, (block, str(number))))}"
        rows = {i: found[i, (block, number)] for i in iterations if (i, (block, number)) in found}
        require(
            len(rows) == len(iterations), f"iterations of {name}", len(rows), f"are not the {len(iterations)} of others"
        )
        widths = {row.size for row in rows.values()}
        require(len(widths) == 1, f"experts of {name}", sorted(widths), "differ; give --num-experts")
        counts[name.removeprefix("layer ")] = np.stack([*rows.values()])
    return counts


def _count_ids(ids: Mapping[tuple[int, Key], np.ndarray], num_experts: int | None) -> dict[tuple[int, Key], np.ndarray]:
    """ids: of the experts chosen, in any order; negative ones are padding."""
    highest = max((int(of.max(initial=-1)) for of in ids.values()), default=-1)
    width = num_experts or highest + 1
    require(
        0 <= highest < min(width, MAX_EXPERTS), "the highest expert", highest, f"is not below {min(width, MAX_EXPERTS)}"
    )
    return {key: np.bincount(of[of >= 0].astype(np.int64), minlength=width) for key, of in ids.items()}


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    with open_regular(path, str(path)) as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), 1):
            name = f"{path} line {number}"
            require(len(line) <= MAX_LINE, f"length of {name}", len(line), f"is above {MAX_LINE} bytes")
            if line.strip():
                record = parse_json(line, name)
                require(isinstance(record, dict), name, record, "must be a JSON object")
                yield name, record
    require(number > 0, str(path), 0, "has no lines")


def _numbers(value: Any, ndim: int | None, name: str) -> np.ndarray:
    """An array of integers, or of floats that are whole; of so many dimensions."""
    try:
        array = np.asarray(value)
    except ValueError as error:  # ragged
        raise UserError(f"{name} is no array of numbers: {error}") from error
    fits = array.dtype.kind in "iuf" and array.nbytes <= MAX_ARRAY and array.ndim == (ndim or array.ndim)
    require(
        fits, name, f"{array.dtype}{list(array.shape)}", f"must be numbers{f' of {ndim} dimensions' if ndim else ''}"
    )
    whole = array.dtype.kind != "f" or bool(np.isfinite(array).all() and (array == np.rint(array)).all())
    require(whole, name, "some", "are no whole numbers")
    require(bool((np.abs(array.astype(np.float64)) < MAX_TOKENS).all()), name, "some", "are not below 2**48")
    return array.astype(np.int64)


def _integer(record: Mapping[str, Any], field: str, name: str) -> int:
    value = record.get(field, -1)
    require(type(value) is int and 0 <= value < 2**31, f"{name}: {field}", value, "must be a number from 0 on")
    return value


def _whole(text: str | None, name: str) -> int:
    require(
        text is not None and text.strip().isdecimal() and len(text) < 19, name, text, "must be a whole number from 0 on"
    )
    return int(text or 0)


def _require_alike(shapes: Mapping[Path, Iterable[int]]) -> None:
    require(
        len({*map(tuple, shapes.values())}) == 1, "layers and experts", {str(p): s for p, s in shapes.items()}, "differ"
    )
