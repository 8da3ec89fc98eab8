"""Parameter counts: the paper's totals, and the shapes of the real parameters."""

import functools
import json
from pathlib import Path

import jax
import pytest

from laep_jax.config import AuxLossConfig, ModelConfig
from laep_jax.gin_config import load_config
from laep_jax.model.accounting import model_size
from laep_jax.model.command import main
from laep_jax.model.transformer import init_params

PAPER = Path(__file__).parents[2] / "configs" / "paper"


def paper_size(name: str, **changes):
    bindings = [f"ModelConfig.{field} = {value}" for field, value in changes.items()]
    return model_size(load_config([str(PAPER / f"{name}.gin")], bindings).model, sequence_length=4096)


@pytest.mark.parametrize(
    ("name", "field", "billions", "decimals"),
    [
        ("10b", "total_without_embeddings", 9.740, 3),
        ("10b", "total", 10.017, 3),
        ("20b", "total", 19.909198848, 9),
        ("20b", "total_without_embeddings", 19.6326, 4),
        ("20b", "active_without_embeddings", 0.909, 3),
        ("20b", "active", 1.186, 3),
        ("20b_128", "total_without_embeddings", 38.963, 3),
        ("20b_256", "total_without_embeddings", 77.624, 3),
        ("1515b", "total_without_embeddings", 1514.94, 2),
        ("1515b", "active_without_embeddings", 68.56, 2),
        ("1515b", "active", 69.8, 1),
        ("1142b", "total_without_embeddings", 1141.67, 2),
    ],
)
def test_totals_of_the_paper_page(name, field, billions, decimals):
    assert round(getattr(paper_size(name), field) / 1e9, decimals) == billions


@pytest.mark.parametrize(("removed", "billions"), [(115, 19.186), (339, 17.776), (550, 16.448), (840, 14.624)])
def test_pruned_totals_of_table_3(removed, billions):
    counts = [64 - removed // 48 - (layer < removed % 48) for layer in range(48)]
    assert round(paper_size("20b", num_experts=tuple(counts)).total / 1e9, 3) == billions


def test_the_pruned_model_of_the_paper():
    size = paper_size("1010b")
    assert round(size.total / 1e9) == 1011
    assert sum(size.experts_per_layer) == 4360
    assert set(size.experts_per_layer) == {8, 16, 24, 32, 40, 48}
    assert size.experts_per_layer[16:85] == (48,) * 69


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lfa": False},
        {"lfa_bias": True},
        {"num_experts": (16, 8, 8, 24)},
        {"num_kv_heads": 2, "qk_norm": "head", "tie_embeddings": True},
        {"num_kv_heads": 1, "qk_norm": "whole", "shared_ffn_size": 24},
    ],
    ids=str,
)
def test_total_is_that_of_the_real_parameters(changes):
    config = ModelConfig(**changes)
    shapes = jax.eval_shape(functools.partial(init_params, config, AuxLossConfig()), jax.random.key(0))
    assert model_size(config, sequence_length=8).total == sum(leaf.size for leaf in jax.tree.leaves(shapes))


def test_active_is_the_total_of_a_model_with_top_k_experts_but_its_whole_router():
    config, narrow = ModelConfig(num_experts=16), ModelConfig(num_experts=2)
    router_columns = config.num_layers * config.hidden_size * (16 - 2)
    active = model_size(config, sequence_length=8).active
    assert active == model_size(narrow, sequence_length=8).total + router_columns


def test_flops_are_three_forward_passes_of_two_a_weight():
    config = ModelConfig(num_layers=1, num_experts=2, top_k=2, lfa=False, hidden_size=64, num_heads=2, head_dim=32)
    length = 64
    size = model_size(config, sequence_length=length)
    weights = size.total - config.vocab_size * 64 - 3 * 64  # neither input table nor norms multiply
    scores = 2 * 2 * 2 * 32 * (length + 1) / 2  # queries by keys and weights by values, half of the square
    assert size.flops_per_token == 3 * (2 * weights + scores)


def test_describe_prints_json_and_a_table(capsys):
    arguments = [f"--gin_file={PAPER / '1010b.gin'}", "--gin.DataConfig.sequence_length=2048"]
    assert main([*arguments, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    size = paper_size("1010b")
    assert printed.keys() == {
        "total",
        "total_without_embeddings",
        "active",
        "active_without_embeddings",
        "experts_per_layer",
        "flops_per_token",
    }
    assert (printed["total"], printed["active"]) == (size.total, size.active)
    assert printed["flops_per_token"] < size.flops_per_token
    main(arguments)
    table = capsys.readouterr().out
    assert f"{size.total:,}" in table
    assert "48 x 69" in table
