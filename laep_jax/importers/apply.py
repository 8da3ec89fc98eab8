"""A plan carried out on a Hugging Face folder of safetensors, shard by shard, without torch.

What belongs to an expert has it in its name or as its first dimension, so that cutting is choosing bytes, whatever the
dtype. Shards are mapped into memory and written one by one: what is needed is less than the largest.
"""

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from laep_jax.errors import require
from laep_jax.files import read_json
from laep_jax.importers.families import BIAS, COUNTS, FAMILIES, NUMBERED, ROUTER, TOGETHER, TOP_K
from laep_jax.importers.safetensors_file import Tensor, read_header, read_tensors, write_tensors
from laep_jax.laep.plan import Plan

INDEX, SINGLE, LINEAGE = "model.safetensors.index.json", "model.safetensors", "laep_lineage.json"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", INDEX)  # not copied
NEVER = -1e9  # bias of an expert that is there to fill its layer


@dataclasses.dataclass(frozen=True)
class Cut:
    """kept: by layer number in the tensors' names, the old experts in new order. width: that layers are padded to."""

    kept: dict[int, tuple[int, ...]]
    width: int | None

    def size(self, layer: int) -> int:
        """Experts of a layer in the new folder, those that only fill it included."""
        return self.width or len(self.kept[layer])


def read_config(model: Path) -> dict[str, Any]:
    """The config.json of a folder. `UserError` where its family is unknown."""
    config = read_json(model / "config.json", str(model / "config.json"))
    kind = config.get("model_type")
    require(kind in FAMILIES, f"{model}: model_type", kind, f"is unknown; there are {', '.join(FAMILIES)}")
    return config


def read_shards(model: Path) -> dict[str, dict[str, Any]]:
    """The header of each shard by its file name."""
    if not (model / INDEX).exists():
        return {SINGLE: read_header(model / SINGLE)}
    weight_map = read_json(model / INDEX, str(model / INDEX)).get("weight_map", {})
    files = sorted({str(file) for file in weight_map.values()})
    outside = [file for file in files if Path(file).name != file]
    require(not outside, f"files of {model / INDEX}", outside, "lie outside the folder")
    return {file: read_header(model / file) for file in files}


def experts_of(shards: Mapping[str, Mapping[str, Any]]) -> dict[int, int]:
    """How many experts each layer has that has any, by its number."""
    found: dict[int, int] = {}
    for name, of in ((name, of) for header in shards.values() for name, of in header.items()):
        if match := NUMBERED.fullmatch(name):
            layer, count = int(match["layer"]), int(match["expert"]) + 1
        elif match := TOGETHER.fullmatch(name) or ROUTER.fullmatch(name):
            layer, count = int(match["layer"]), int(of["shape"][0])
        else:
            continue
        found[layer] = max(found.get(layer, 0), count)
    return found


def plan_cut(plan: Plan, model: Path, config: Mapping[str, Any], experts: Mapping[int, int], *, pad: bool) -> Cut:
    """What is to be done. `UserError` where the plan is for another model, or the result would not be that model."""
    counts, kept = tuple(experts[layer] for layer in sorted(experts)), min(plan.num_experts_after)
    require(counts == plan.num_experts, "experts of the plan", plan.num_experts, f"are not those of {model}, {counts}")
    top_k = next((config[name] for name in TOP_K if name in config), 1)
    require(kept >= top_k, "experts kept", kept, f"are fewer than the {top_k} of a token")
    groups = config.get("n_group") or 1
    if groups > (config.get("topk_group") or groups):
        alike = all(_same_groups(of, count, groups) for of, count in zip(plan.kept, counts, strict=True))
        require(
            alike and not pad, "n_group", groups, "limits the choice to groups of experts, which the plan would mix"
        )
    require(
        all(count % groups == 0 for count in plan.num_experts_after) and (groups == 1 or not pad),
        "n_group",
        groups,
        "does not divide the experts kept, or they are padded",
    )
    require(
        not pad or FAMILIES[config["model_type"]],
        "--pad: model_type",
        config["model_type"],
        "chooses without a bias: it would not be exact",
    )
    return Cut(dict(zip(sorted(experts), plan.kept, strict=True)), max(plan.num_experts_after) if pad else None)


def _same_groups(kept: Sequence[int], num_experts: int, groups: int) -> bool:
    """Whether each group has experts of the same old group only, in the old order of groups."""
    if len(kept) % groups:
        return False
    return [slot * groups // num_experts for slot in kept] == [i * groups // len(kept) for i in range(len(kept))]


def apply_plan(plan: Plan, model: Path, out: Path, *, pad: bool = False) -> tuple[int, ...]:
    """Writes the cut model into a new folder; returns the experts of each layer. `UserError` where it does not fit."""
    require(not out.exists(), "--out", str(out), "exists")
    config, shards = read_config(model), read_shards(model)
    cut = plan_cut(plan, model, config, experts_of(shards), pad=pad)
    out.mkdir(parents=True)
    weight_map, total = {}, 0
    for file, header in shards.items():
        tensors = dict(_cut_shard(read_tensors(model / file, header), cut))
        total += write_tensors(out / file, tensors)
        weight_map |= dict.fromkeys(tensors, file)
    if (model / INDEX).exists():
        _write_json(out / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    counts = tuple(cut.size(layer) for layer in sorted(cut.kept))
    by_layer = {"experts_per_layer": list(counts)} if len({*counts}) > 1 else {}
    _write_json(out / "config.json", config | {name: max(counts) for name in COUNTS if name in config} | by_layer)
    lineage = {str(layer): list(kept) for layer, kept in sorted(cut.kept.items())}
    _write_json(out / LINEAGE, {"plan_sha256": plan.sha256(), "experts_by_layer": lineage})
    for path in model.iterdir():
        if path.is_file() and not path.name.endswith(WEIGHTS) and path.name != "config.json":
            shutil.copyfile(path, out / path.name)
    return counts


def _cut_shard(tensors: Mapping[str, Tensor], cut: Cut) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a shard that stay, by their new names."""
    for name, tensor in tensors.items():
        if match := NUMBERED.fullmatch(name):
            expert, kept = int(match["expert"]), cut.kept[int(match["layer"])]
            numbers = [kept.index(expert)] if expert in kept else []
            yield from ((f"{match['module']}.experts.{number}.{match['rest']}", tensor) for number in numbers)
            if cut.width and expert == kept[0]:  # those that fill the layer are as large
                zeros = dataclasses.replace(tensor, data=np.zeros_like(tensor.data))
                numbers = range(len(kept), cut.width)
                yield from ((f"{match['module']}.experts.{number}.{match['rest']}", zeros) for number in numbers)
        elif match := TOGETHER.fullmatch(name) or ROUTER.fullmatch(name):
            yield name, _chosen(tensor, cut, int(match["layer"]), 0, 0.0)
        elif match := BIAS.fullmatch(name):
            yield name, _chosen(tensor, cut, int(match["layer"]), len(tensor.shape) - 1, NEVER)
        else:
            yield name, tensor


def _chosen(tensor: Tensor, cut: Cut, layer: int, dim: int, filling: float) -> Tensor:
    """The kept experts of a tensor that has them in dimension `dim`; filled up to the width."""
    kept = list(cut.kept[layer])
    chosen = np.take(tensor.data.reshape(*tensor.shape[: dim + 1], -1), kept, axis=dim)
    if missing := cut.size(layer) - len(kept):
        item = np.zeros(chosen.shape[dim + 1 :], np.uint8)
        if filling:
            require(tensor.dtype == "F32", f"dtype of the bias of layer {layer}", tensor.dtype, "is not F32")
            item = np.frombuffer(np.float32(filling).tobytes(), np.uint8)
        more = np.broadcast_to(item, (*chosen.shape[:dim], missing, *chosen.shape[dim + 1 :]))
        chosen = np.concatenate([chosen, more], axis=dim)
    shape = (*tensor.shape[:dim], cut.size(layer), *tensor.shape[dim + 1 :])
    return Tensor(tensor.dtype, shape, chosen.reshape(-1))


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def loads_in(model_type: str, counts: Sequence[int]) -> str:
    """Which programs load the result, in words."""
    if len({*counts}) == 1:
        return (
            "all layers have as many experts: transformers, vLLM, SGLang and llama.cpp load it as any model of its kind"
        )
    return (
        f"layers of {min(counts)} to {max(counts)} experts, and one number in config.json: none of transformers, vLLM, "
        "SGLang and llama.cpp loads it as it is; plan with --min-experts and --max-experts alike"
        + (", or use --pad" if FAMILIES[model_type] else "")
    )
