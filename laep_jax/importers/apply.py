"""Applies a plan to a Hugging Face folder of safetensors, shard by shard, without torch.

What belongs to an expert has it in its name or as its first dimension, so that pruning is choosing bytes, whatever the
dtype. Shards are mapped into memory and written one by one: what is needed is less than the largest.
"""

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from laep_jax.errors import UserError, require
from laep_jax.files import new_folder, read_json
from laep_jax.importers.families import BIAS, COUNTS, FAMILIES, LAYER, NEVER, NUMBERED, ROUTER, TOGETHER, TOP_K
from laep_jax.importers.safetensors_file import INDEX, Tensor, read_shards, read_tensors, write_tensors
from laep_jax.laep.plan import Plan

LINEAGE = "laep_lineage.json"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", INDEX)  # not copied
BY_LAYER = "experts_per_layer"
BEST_OF_GROUP = 2  # experts by which a router judges a group


@dataclasses.dataclass(frozen=True)
class Prune:
    """kept: by layer number in the tensors' names, the old experts in new order. width: that layers are padded to.

    num_layers: of the model; layers behind, for multi-token prediction, are left out. scores: of FAMILIES.
    """

    kept: dict[int, tuple[int, ...]]
    width: int | None
    num_layers: int
    scores: str | None

    def size(self, layer: int) -> int:
        """Experts of a layer in the new folder, those that only fill it included."""
        return self.width or len(self.kept[layer])


def read_config(model: Path) -> dict[str, Any]:
    """The config.json of a folder. `UserError` where its family is unknown."""
    config = read_json(model / "config.json", str(model / "config.json"))
    kind = str(config.get("model_type"))
    there = f"there are {', '.join(FAMILIES)}; a run of laep_jax prunes by LaepConfig.plan before it is exported"
    require(kind in FAMILIES, f"{model}: model_type", kind, f"is unknown; {there}")
    for name in (*TOP_K, *COUNTS, "n_group", "topk_group", "num_hidden_layers"):
        require(type(config.get(name, 1)) in (int, type(None)), f"{model}: {name}", config.get(name), "is no number")
    return config


def experts_of(shards: Mapping[str, Mapping[str, Any]], num_layers: int) -> dict[int, int]:
    """How many experts each layer has that has any, by its number, of the first `num_layers`."""
    found: dict[int, int] = {}
    for name, of in ((name, of) for header in shards.values() for name, of in header.items()):
        if match := NUMBERED.fullmatch(name):
            count = int(match["expert"]) + 1
        elif match := TOGETHER.fullmatch(name) or ROUTER.fullmatch(name):
            count = of["shape"][0] if of["shape"] else 0
        else:
            continue
        if int(match["layer"]) < num_layers:
            found[int(match["layer"])] = max(found.get(int(match["layer"]), 0), count)
    return found


def plan_prune(plan: Plan, model: Path, config: Mapping[str, Any], shards: Mapping[str, Any], *, pad: bool) -> Prune:
    """What is to be done. `UserError` where the plan is for another model, or the result would not be that model."""
    num_layers = config.get("num_hidden_layers") or 2**31
    experts = experts_of(shards, num_layers)
    counts, kept = tuple(experts[layer] for layer in sorted(experts)), min(plan.num_experts_after)
    require(counts == plan.num_experts, "experts of the plan", plan.num_experts, f"are not those of {model}, {counts}")
    top_k = next((config[name] for name in TOP_K if name in config), 1)
    require(kept >= top_k, "experts kept", kept, f"are fewer than the {top_k} of a token")
    _check_groups(plan, config, counts, top_k, pad=pad)
    scores = FAMILIES[config["model_type"]]
    require(
        not pad or scores is not None,
        "--pad: model_type",
        config["model_type"],
        "chooses without a bias: it would not be exact",
    )
    width = max(plan.num_experts_after) if pad else None
    return Prune(dict(zip(sorted(experts), plan.kept, strict=True)), width, num_layers, scores)


def _check_groups(plan: Plan, config: Mapping[str, Any], counts: Sequence[int], top_k: int, *, pad: bool) -> None:
    """`UserError` where the router chooses groups of experts first and the plan would mix them, or leave too few."""
    groups = config.get("n_group") or 1
    chosen = config.get("topk_group") or groups
    if groups == 1:
        return
    require(not pad, "--pad: n_group", groups, "is the number of groups, which padding would change")
    even = all(count % groups == 0 for count in plan.num_experts_after)
    require(even, "experts kept", plan.num_experts_after, f"do not divide into n_group={groups} groups")
    in_group = min(plan.num_experts_after) // groups
    enough = in_group >= BEST_OF_GROUP and chosen * in_group >= top_k
    require(
        enough, "experts of a group", in_group, f"are too few for topk_group={chosen} and {top_k} experts of a token"
    )
    alike = all(_same_groups(of, count, groups) for of, count in zip(plan.kept, counts, strict=True))
    require(
        alike or chosen == groups, "n_group", groups, "limits the choice to groups of experts, which the plan would mix"
    )


def _same_groups(kept: Sequence[int], num_experts: int, groups: int) -> bool:
    """Whether each group has experts of the same old group only, in the old order of groups."""
    return [slot * groups // num_experts for slot in kept] == [i * groups // len(kept) for i in range(len(kept))]


def apply_plan(plan: Plan, model: Path, out: Path, *, pad: bool = False) -> tuple[int, ...]:
    """Writes the pruned model into a new folder; returns its experts by layer. `UserError` where they do not fit."""
    with new_folder(out, "--out") as folder:
        config, shards = read_config(model), read_shards(model)
        prune = plan_prune(plan, model, config, shards, pad=pad)
        try:
            _write(plan, model, folder, prune, config, shards)
        except UserError:
            raise
        except (ValueError, LookupError, TypeError) as error:
            raise UserError(f"the tensors of {model} do not fit together: {error!r}") from error
    return tuple(prune.size(layer) for layer in sorted(prune.kept))


def _write(plan: Plan, model: Path, out: Path, prune: Prune, config: dict[str, Any], shards: Mapping[str, Any]) -> None:
    weight_map, total = {}, 0
    for file, header in shards.items():
        tensors = dict(_prune_shard(read_tensors(model / file, header), prune))
        total += write_tensors(out / file, tensors)
        weight_map |= dict.fromkeys(tensors, file)
    if (model / INDEX).exists():
        _write_json(out / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    counts = [prune.size(layer) for layer in sorted(prune.kept)]
    changed = {name: max(counts) for name in COUNTS if name in config}
    changed |= {"num_nextn_predict_layers": 0} if config.get("num_nextn_predict_layers") else {}
    config = {name: value for name, value in config.items() if name != BY_LAYER} | changed
    _write_json(out / "config.json", config | ({BY_LAYER: counts} if len({*counts}) > 1 else {}))
    _write_json(out / LINEAGE, {"plan_sha256": plan.sha256(), "experts_by_layer": _lineage(model, prune)})
    for path in model.iterdir():
        if path.is_file() and not path.name.endswith(WEIGHTS) and path.name not in ("config.json", LINEAGE):
            shutil.copyfile(path, out / path.name)


def _lineage(model: Path, prune: Prune) -> dict[str, list[int]]:
    """For each layer the experts of the model before any prune, in the new order."""
    before = read_json(model / LINEAGE, str(model / LINEAGE))["experts_by_layer"] if (model / LINEAGE).exists() else {}
    return {
        str(layer): [before[str(layer)][expert] if before else expert for expert in kept]
        for layer, kept in sorted(prune.kept.items())
    }


def _prune_shard(tensors: Mapping[str, Tensor], prune: Prune) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a shard that stay, by their new names. Layers are padded with copies of their last expert.

    Its router row comes along: a row of zeros can score so far above the others that the softmax leaves them nothing to
    renormalise.
    """
    for name, tensor in tensors.items():
        if (of_layer := LAYER.fullmatch(name)) and int(of_layer["layer"]) >= prune.num_layers:
            continue
        if match := NUMBERED.fullmatch(name):
            expert, kept = int(match["expert"]), prune.kept[int(match["layer"])]
            numbers = [kept.index(expert)] if expert in kept else []
            numbers += range(len(kept), prune.width or 0) if expert == kept[-1] else ()
            yield from ((f"{match['module']}.experts.{number}.{match['rest']}", tensor) for number in numbers)
        elif match := TOGETHER.fullmatch(name) or ROUTER.fullmatch(name):
            yield name, _chosen(tensor, prune, int(match["layer"]), 0)
        elif match := BIAS.fullmatch(name):
            yield name, _bias(tensor, prune, int(match["layer"]))
        else:
            yield name, tensor


def _chosen(tensor: Tensor, prune: Prune, layer: int, dim: int) -> Tensor:
    """The kept experts of a tensor that has them in dimension `dim`; filled up to the width."""
    kept = list(prune.kept[layer])
    kept += kept[-1:] * (prune.size(layer) - len(kept))
    chosen = np.take(tensor.data.reshape(*tensor.shape[: dim + 1], -1), kept, axis=dim)
    return Tensor(tensor.dtype, (*tensor.shape[:dim], len(kept), *tensor.shape[dim + 1 :]), chosen.reshape(-1))


def _bias(tensor: Tensor, prune: Prune, layer: int) -> Tensor:
    """That of the kept experts, and `NEVER` for the copies that pad the layer."""
    chosen, count = _chosen(tensor, prune, layer, len(tensor.shape) - 1), len(prune.kept[layer])
    if count == prune.size(layer):
        return chosen
    require(tensor.dtype == "F32", f"dtype of the bias of layer {layer}", tensor.dtype, "is not F32")
    bias_E = chosen.data.view(np.float32).reshape(-1)
    exact = prune.scores == "sigmoid" or np.ptp(bias_E[:count]) == 0
    rule = "differs between experts: the padding takes part in the softmax, beside which the bias would weigh more"
    require(bool(exact), f"--pad: the bias of layer {layer}", bias_E[:count].tolist(), rule)
    bias_E[count:] = NEVER
    return chosen


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def loads_in(model_type: str, counts: Sequence[int], *, padded: bool) -> str:
    """Which programs load the result, in words."""
    scores = FAMILIES[model_type]
    if len({*counts}) == 1:
        alike = "transformers, vLLM, SGLang and llama.cpp load it as any model of its kind"
        ignored = "; vLLM on CPU ignores the bias that keeps others from being chosen"
        return f"all layers have as many experts: {alike}" + (ignored if padded and scores == "softmax" else "")
    return (
        f"layers of {min(counts)} to {max(counts)} experts, and one number in config.json: none of transformers, vLLM, "
        "SGLang and llama.cpp loads it as it is; plan with --min-experts and --max-experts alike"
        + (", or use --pad" if scores == "sigmoid" else "")
    )
