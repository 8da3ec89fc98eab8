"""Plans applied to small random models of each family, against Transformers: the pruned model is the masked one."""

import json
import struct

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file
from safetensors.torch import load_file as torch_load_file
from safetensors.torch import save_file as torch_save_file
from torch import nn

from laep_jax.config import LaepConfig
from laep_jax.errors import UserError
from laep_jax.importers.apply import LINEAGE
from laep_jax.importers.apply_command import main
from laep_jax.laep.plan import Plan, chosen_plan
from laep_jax.laep.rule import PruneRule
from laep_jax.training.initial import open_source, require_same_model
from tests.huggingface.test_export import config_of

LAYERS, EXPERTS, TOP_K = 3, 8, 2
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "num_experts_per_tok": TOP_K,
    "max_position_embeddings": 64,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
FAMILIES = {
    "mixtral": {"num_local_experts": EXPERTS},
    "olmoe": {"num_experts": EXPERTS},
    "qwen3_moe": {"num_experts": EXPERTS, "mlp_only_layers": [0], "norm_topk_prob": True},
    "deepseek_v2": {"n_routed_experts": EXPERTS, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, **LATENT},
    "deepseek_v3": {"n_routed_experts": EXPERTS, "first_k_dense_replace": 0, "n_group": 2, "topk_group": 2, **LATENT},
    "ernie4_5_moe": {
        "moe_num_experts": EXPERTS,
        "moe_k": TOP_K,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
    },
}
PRUNED = [(1, 6), (0, 7), (3, 4)]  # of each layer
UNEQUAL = [(1, 6), (0, 2, 3, 7), ()]
TOKENS = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(0))


def make_model(family: str) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **SIZES | FAMILIES[family])
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
            if "gate.weight" in name or "router" in name:
                parameter.normal_(0, 1)
            elif "e_score_correction_bias" in name:
                parameter.uniform_(0, 0.3)
            elif "experts" in name:
                parameter.normal_(0, 0.3)  # so that it matters which experts a token has
    return model


def gates(model) -> list[nn.Module]:
    """The routers of the layers that have experts."""
    return [module for name, module in model.named_modules() if name.endswith(".gate")]


def masked(model, pruned, monkeypatch) -> torch.Tensor:
    """Logits with the router's logits of the pruned experts at minus infinity, and the bias where there is one."""
    by_weight = {}
    for gate, experts in zip(gates(model), pruned, strict=True):
        by_weight[gate.weight.data_ptr()] = list(experts)
        for name, bias in [*gate.named_parameters(), *gate.named_buffers()]:
            if name.endswith("e_score_correction_bias"):
                bias.data[..., list(experts)] = -1e9
    plain = nn.functional.linear

    def linear(x, weight, *arguments):
        y = plain(x, weight, *arguments)
        if weight.data_ptr() in by_weight:
            y[..., by_weight[weight.data_ptr()]] = -torch.inf
        return y

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(nn.functional, "linear", linear)
        return model(TOKENS).logits


def saved(family: str, folder, pruned) -> tuple:
    """The model, its folder in shards, and the path of a plan for its layers with experts."""
    model = make_model(family)
    model.save_pretrained(folder / "whole", max_shard_size="40KB")
    (folder / "whole" / "tokenizer.json").write_text("{}")
    layers = len(gates(model))
    rule = PruneRule.from_settings(LaepConfig(), layers, top_k=TOP_K, expert_parallel=2)
    loads = [np.arange(EXPERTS, 0, -1)] * layers
    (folder / "plan.json").write_text(chosen_plan(loads, pruned[:layers], rule).to_json())
    return model, folder / "whole", folder / "plan.json"


def apply(folder, *options: str) -> int:
    return main([f"--plan={folder / 'plan.json'}", f"--model={folder / 'whole'}", f"--out={folder / 'cut'}", *options])


def logits_of(path) -> torch.Tensor:
    with torch.no_grad():
        return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()(TOKENS).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cut_model_has_the_logits_of_the_masked_one(family, tmp_path, monkeypatch, capsys):
    model, whole, plan = saved(family, tmp_path, PRUNED)
    assert len(list(whole.glob("*.safetensors"))) > 1
    assert apply(tmp_path) == 0
    layers = len(gates(model))
    assert (
        f"{layers * 6} of {layers * EXPERTS} experts in {layers} layers; all layers have as many"
        in capsys.readouterr().out
    )
    with torch.no_grad():
        before = model(TOKENS).logits
    expected = masked(model, PRUNED[:layers], monkeypatch)
    assert (expected - before).abs().max() > 1e-3
    torch.testing.assert_close(logits_of(tmp_path / "cut"), expected, rtol=0, atol=1e-5)
    assert (tmp_path / "cut" / "tokenizer.json").exists()
    lineage = json.loads((tmp_path / "cut" / LINEAGE).read_text())
    assert [*lineage["experts_by_layer"].values()] == [list(kept) for kept in Plan.from_json(plan.read_text()).kept]
    index = json.loads((tmp_path / "cut" / "model.safetensors.index.json").read_text())
    sizes = [array.nbytes for path in (tmp_path / "cut").glob("*.safetensors") for array in load_file(path).values()]
    assert index["metadata"]["total_size"] == sum(sizes)


@pytest.mark.parametrize("family", ["deepseek_v3", "ernie4_5_moe"])
def test_layers_of_different_widths_are_padded_exactly_where_there_is_a_bias(family, tmp_path, monkeypatch):
    """Also where all scores are low. Of a softmax the others have a part, beside which a bias must weigh nothing."""
    groups = {"n_group": 1, "topk_group": 1} if "deepseek" in family else {}
    monkeypatch.setitem(FAMILIES, family, FAMILIES[family] | groups)
    model, whole, _ = saved(family, tmp_path, UNEQUAL)
    if not groups:
        with pytest.raises(UserError, match=r"^--pad: the bias of layer \d=\[0\..* would weigh more$"):
            apply(tmp_path, "--pad")
        with torch.no_grad():
            for gate in gates(model):
                gate.weight += 20 * torch.randn(32)  # of each token the same for all experts
                gate.moe_statics.e_score_correction_bias.fill_(0.25)
        model.save_pretrained(whole, max_shard_size="40KB")
    assert apply(tmp_path, "--pad") == 0
    expected = masked(model, UNEQUAL[: len(gates(model))], monkeypatch)
    torch.testing.assert_close(logits_of(tmp_path / "cut"), expected, rtol=0, atol=1e-5)


def test_layers_of_different_widths_are_written_and_it_says_who_loads_them(tmp_path, capsys):
    saved("olmoe", tmp_path, UNEQUAL)
    assert apply(tmp_path) == 0
    assert "layers of 4 to 8 experts, and one number in config.json: none of transformers" in capsys.readouterr().out
    config = json.loads((tmp_path / "cut" / "config.json").read_text())
    assert config["experts_per_layer"] == [6, 4, 8]
    tensors = {
        name: array for path in (tmp_path / "cut").glob("*.safetensors") for name, array in load_file(path).items()
    }
    for layer, count in enumerate((6, 4, 8)):
        assert len(tensors[f"model.layers.{layer}.mlp.gate.weight"]) == count
        assert sum(f"layers.{layer}.mlp.experts" in name for name in tensors) == 3 * count
    source = open_source(str(tmp_path / "cut"))  # a run of laep_jax begins with it
    config = config_of(source)
    assert config.model.experts_per_layer == (6, 4, 8)
    require_same_model(source, config)


@pytest.mark.parametrize(("family", "options"), [("qwen3_moe", ()), ("deepseek_v3", ("--pad",))])
def test_fused_experts_are_cut_as_numbered_ones(tmp_path, family, options):
    """As newer checkpoints have them: all experts of a layer in one tensor, here in bfloat16."""
    whole = tmp_path / "whole"
    whole.mkdir()
    config = {"model_type": family, "num_experts": EXPERTS, "num_experts_per_tok": 2}
    (whole / "config.json").write_text(json.dumps(config))
    names = {"experts.gate_up_proj": (EXPERTS, 6, 4), "experts.down_proj": (EXPERTS, 4, 3), "gate.weight": (EXPERTS, 4)}
    tensors = {
        f"model.layers.{layer}.mlp.{name}": torch.randn(shape).bfloat16()
        for layer in (0, 1)
        for name, shape in names.items()
    }
    tensors["lm_head.weight"] = torch.randn(5, 4).bfloat16()
    torch_save_file(tensors, whole / "model.safetensors")
    rule = PruneRule.from_settings(LaepConfig(), 2, top_k=TOP_K, expert_parallel=2)
    plan = chosen_plan([np.arange(EXPERTS)] * 2, [(0, 5), ()], rule)
    (tmp_path / "plan.json").write_text(plan.to_json())
    assert apply(tmp_path, *options) == 0
    cut = torch_load_file(tmp_path / "cut" / "model.safetensors")
    assert cut.keys() == tensors.keys()
    assert torch.equal(cut["lm_head.weight"], tensors["lm_head.weight"])
    for layer, kept in enumerate(plan.kept):
        rows = [*kept, *[kept[-1]] * (EXPERTS - len(kept))] if options else list(kept)
        for name in (f"model.layers.{layer}.mlp.{name}" for name in names):
            assert torch.equal(cut[name], tensors[name][rows])


def test_what_does_not_fit_is_refused_and_nothing_is_written(tmp_path):
    _, whole, plan = saved("mixtral", tmp_path, UNEQUAL)
    config = json.loads((whole / "config.json").read_text())
    rule, rule3 = (PruneRule.from_settings(LaepConfig(), n, top_k=TOP_K, expert_parallel=2) for n in (2, 3))

    def refused(message: str, *options: str, **changes) -> None:
        (whole / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(UserError, match=message):
            apply(tmp_path, *options)
        assert not (tmp_path / "cut").exists()

    refused("--pad: model_type='mixtral' chooses without a bias", "--pad")
    refused("model_type='gpt_oss' is unknown; there are mixtral, olmoe", model_type="gpt_oss")
    refused("experts kept=4 are fewer than the 5 of a token", num_experts_per_tok=5)
    refused(r"experts kept=\(6, 4, 8\) do not divide into n_group=4", n_group=4, topk_group=4)
    refused("n_group=2 limits the choice to groups", n_group=2, topk_group=1)
    plan.write_text(chosen_plan([np.ones(EXPERTS)] * 3, [range(4)] * 3, rule3).to_json())
    refused("experts of a group=1 are too few for topk_group=4", n_group=4, topk_group=4)
    plan.write_text(chosen_plan([np.ones(EXPERTS)] * 2, [(), ()], rule).to_json())
    refused(r"experts of the plan=\(8, 8\) are not those of .*whole, \(8, 8, 8\)")
    (tmp_path / "cut").mkdir()
    with pytest.raises(UserError, match="exists"):
        apply(tmp_path)


def test_a_second_cut_tells_of_the_model_before_the_first(tmp_path):
    _, _, plan = saved("olmoe", tmp_path, UNEQUAL)
    assert apply(tmp_path) == 0
    first = Plan.from_json(plan.read_text())
    rule = PruneRule.from_settings(LaepConfig(), 3, top_k=TOP_K, expert_parallel=2)
    second = chosen_plan([np.arange(n) for n in first.num_experts_after], [(0, 1), (), (0, 1, 2, 3)], rule)
    plan.write_text(second.to_json())
    assert main([f"--plan={plan}", f"--model={tmp_path / 'cut'}", f"--out={tmp_path / 'again'}"]) == 0
    lineage = json.loads((tmp_path / "again" / LINEAGE).read_text())
    assert lineage["experts_by_layer"] == {
        str(layer): [before[slot] for slot in kept]
        for layer, (before, kept) in enumerate(zip(first.kept, second.kept, strict=True))
    }
    assert "experts_per_layer" not in json.loads((tmp_path / "again" / "config.json").read_text())


def test_layers_for_multi_token_prediction_are_left_out(tmp_path):
    whole = tmp_path / "whole"
    whole.mkdir()
    config = {"model_type": "deepseek_v3", "n_routed_experts": 8, "num_hidden_layers": 1, "num_nextn_predict_layers": 1}
    (whole / "config.json").write_text(json.dumps(config))
    names = [f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight" for layer in (0, 1) for expert in range(8)]
    tensors = {name: torch.randn(2, 3) for name in [*names, "model.layers.1.eh_proj.weight", "lm_head.weight"]}
    torch_save_file(tensors, whole / "model.safetensors")
    rule = PruneRule.from_settings(LaepConfig(), 1, top_k=TOP_K, expert_parallel=2)
    (tmp_path / "plan.json").write_text(chosen_plan([np.ones(8)], [(0, 5)], rule).to_json())
    assert apply(tmp_path) == 0
    cut = torch_load_file(tmp_path / "cut" / "model.safetensors")
    assert cut.keys() == {*names[:6], "lm_head.weight"}
    changed = json.loads((tmp_path / "cut" / "config.json").read_text())
    assert changed == config | {"n_routed_experts": 6, "num_nextn_predict_layers": 0}


@pytest.mark.parametrize(
    "header",
    [
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 80]}},
        {"x": {"shape": [2], "data_offsets": [0, 8]}},
        {"model.layers.0.mlp.gate.weight": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}},
        {"model.layers.0.mlp.gate.weight": {"dtype": "F32", "shape": [3, 1], "data_offsets": [0, 8]}},
        {"model.layers.0.mlp.gate.e_score_correction_bias": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}},
        {f"model.layers.{'9' * 5000}.mlp.gate.weight": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}},
        [],
    ],
)
def test_a_hostile_shard_is_one_line_and_leaves_nothing(header, tmp_path):
    whole = tmp_path / "whole"
    whole.mkdir()
    (whole / "config.json").write_text('{"model_type": "olmoe", "num_experts": 3}')
    text = json.dumps(header).encode()
    (whole / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    rule = PruneRule.from_settings(LaepConfig(), 1, top_k=1, expert_parallel=1)
    (tmp_path / "plan.json").write_text(chosen_plan([np.ones(3)], [(0,)], rule).to_json())
    with pytest.raises(UserError):
        apply(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json", "whole"]
