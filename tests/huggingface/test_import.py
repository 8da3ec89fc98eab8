"""Models of Hugging Face Transformers read into laep_jax: their logits, round trips, and a second stage of training."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from laep_jax.checkpoint.saved import Saved
from laep_jax.config import Config, ModelConfig
from laep_jax.errors import UserError
from laep_jax.export.command import main as export
from laep_jax.gin_config import load_config
from laep_jax.importers.safetensors_file import read_header
from laep_jax.model.router import route
from laep_jax.model.transformer import logits
from laep_jax.sharding import make_mesh
from laep_jax.state.tree import abstract_state, initial_layout
from laep_jax.training.check import check
from laep_jax.training.command import main
from laep_jax.training.initial import defaults, open_source, read_state, require_same_model
from laep_jax.training.start import train
from tests.huggingface.test_export import TOKENS, Run, config_of, read
from tests.support.tiny_run import change, records, tiny_config

SIZES = {
    "vocab_size": 384,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "num_experts_per_tok": 2,
    "initializer_range": 0.2,
    "eos_token_id": 256,
}
FAMILIES = {
    "mixtral": ("Mixtral", {"num_local_experts": 8}),
    "qwen3_moe": (
        "Qwen3Moe",
        {"num_local_experts": 8, "moe_intermediate_size": 24, "head_dim": 16, "norm_topk_prob": True},
    ),
    "qwen3_moe_tied": (
        "Qwen3Moe",
        {"num_local_experts": 8, "moe_intermediate_size": 24, "head_dim": 8, "tie_word_embeddings": True},
    ),
    "olmoe": ("Olmoe", {"num_experts": 8, "num_experts_per_tok": 4}),
}


def transformers_model(name: str, dtype=torch.float32):
    """With random weights, those of the norms too."""
    family, own = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES | own)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.to(dtype)


@pytest.fixture
def published(tmp_path):
    """A folder as a hub has it: a small random Qwen3-MoE and its tokenizer."""
    folder = tmp_path / "published"
    transformers_model("qwen3_moe").save_pretrained(folder)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: id for id, character in enumerate(alphabet)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def logits_of(config: Config, model: dict) -> np.ndarray:
    mesh = make_mesh(config.mesh)
    positions = np.broadcast_to(np.arange(TOKENS.shape[1], dtype=np.int32), TOKENS.shape)
    batch = {
        "tokens_BS": jnp.asarray(TOKENS, jnp.int32),
        "segments_BS": jnp.ones(TOKENS.shape, jnp.int32),
        "positions_BS": jnp.asarray(positions),
    }
    forward = jax.jit(functools.partial(logits, config=config.model, mesh=mesh))
    return np.asarray(forward(model["params"], model["router_bias"], initial_layout(config), batch))


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float32) for name in FAMILIES), ("qwen3_moe", torch.bfloat16)], ids=str
)
def test_logits_are_those_of_transformers(name, dtype, tmp_path):
    transformers_model(name, dtype).save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        want = model(torch.tensor(TOKENS)).logits.numpy()
    assert want.std() > 0.5
    got = logits_of(*read(tmp_path))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * max(1, np.abs(want).max()))


def test_the_router_of_deepseek_v3():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_local_experts": 8, "num_experts_per_tok": 3, "n_group": 1, "topk_group": 1}
    config = transformers.DeepseekV3Config(**sizes, routed_scaling_factor=1.0, norm_topk_prob=True)
    router = DeepseekV3TopkRouter(config)
    x_TD = torch.randn(200, 16)
    with torch.no_grad():
        router.weight += torch.randn_like(router.weight)
        router.e_score_correction_bias += 0.3 * torch.randn(8)
        logits_TE, weights, ids = router(x_TD)
    ours = ModelConfig(num_experts=8, top_k=3, router_score="sigmoid")
    bias_E = jnp.asarray(router.e_score_correction_bias.numpy())
    ids_TK, weights_TK = route(jnp.asarray(logits_TE.numpy()), bias_E, jnp.ones(200, bool), ours)
    order = np.argsort(ids.numpy(), axis=1), np.argsort(ids_TK, axis=1)
    np.testing.assert_array_equal(np.take_along_axis(np.asarray(ids_TK), order[1], 1), np.sort(ids.numpy(), axis=1))
    weights, weights_TK = weights.numpy(), np.asarray(weights_TK)
    pairs = (np.take_along_axis(w, o, 1) for w, o in zip((weights, weights_TK), order, strict=True))
    np.testing.assert_allclose(*pairs, rtol=1e-6)
    assert (ids.numpy() != logits_TE.topk(3).indices.numpy()).any()  # the bias matters


def test_a_published_model_is_trained_on_pruned_and_exported(published, tmp_path, capsys):
    """The whole way, as docs/second_stage.md has it."""
    run_dir, out = tmp_path / "run", tmp_path / "out"
    settings = defaults(str(published), str(run_dir))
    bindings = [
        "MeshConfig.fsdp = 2",
        "MeshConfig.expert = 4",
        "DataConfig.source = 'synthetic'",
        "DataConfig.sequence_length = 32",
        "DataConfig.batch_size = 16",
        f"DataConfig.cache_dir = '{tmp_path / 'tokens'}'",
        "LaepConfig.prune_at_step = 4",
        "LaepConfig.prune_delay = 2",
        "LaepConfig.alpha = 1.2",
        "LaepConfig.beta = 0.6",
        "LaepConfig.window = 2",
        "OptimizerConfig.learning_rate = 1e-4",
        "TrainConfig.num_steps = 8",
        "TrainConfig.eval_every = 8",
        "TrainConfig.checkpoint_every = 8",
    ]
    config = load_config([], bindings, settings)
    assert f"parameters from {published} (qwen3_moe)" in check(config, run_dir, init_from=str(published))
    summary = train(config, run_dir, init_from=str(published))
    assert f"parameters from {published} (qwen3_moe)" in capsys.readouterr().out
    assert summary["init_from"] == f"{published} (qwen3_moe)"
    assert summary["prune_steps"] == [6]
    saved = Saved(str(run_dir))
    assert max(saved.num_experts) < 8 or min(saved.num_experts) < 8
    assert export([str(run_dir), f"--to={out}"]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True).eval()
    assert "| parameters began as | published (qwen3_moe) |" in (out / "README.md").read_text()
    config, restored = read(out)
    with torch.no_grad():
        want = model(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(logits_of(config, restored), want, rtol=0, atol=1e-4)
    ids = transformers.AutoTokenizer.from_pretrained(out)("def f():").input_ids
    assert ids == tokenizers.Tokenizer.from_file(str(published / "tokenizer.json")).encode("def f():").ids
    published.rename(tmp_path / "gone")  # a run that is resumed needs the weights no more
    again = load_config([], [*bindings, f"DataConfig.tokenizer = '{tmp_path / 'gone' / 'tokenizer.json'}'"])
    again = dataclasses.replace(again, model=ModelConfig(**defaults(str(published), str(run_dir))["ModelConfig"]))
    assert train(again, run_dir, init_from=str(published))["init_from"] == f"{published} (qwen3_moe)"
    assert f"parameters from {published} (qwen3_moe)" in check(again, run_dir, init_from=str(published))


def test_the_first_loss_is_that_of_the_model_it_began_with(published, tmp_path):
    settings = defaults(str(published), str(tmp_path / "run"))
    bindings = ["DataConfig.source = 'synthetic'", "DataConfig.sequence_length = 32", "TrainConfig.num_steps = 1"]
    config = load_config([], [*bindings, f"DataConfig.cache_dir = '{tmp_path / 'tokens'}'"], settings)
    train(config, tmp_path / "run", init_from=str(published))
    from_source = records(tmp_path / "run", "train")[0]["loss"]
    train(config, tmp_path / "random")
    with pytest.raises(UserError, match=r"^--init-from='.*' comes too late: the run has random parameters"):
        train(config, tmp_path / "random", init_from=str(published))
    assert from_source > 6  # of noise; a fresh model begins with the logarithm of its vocabulary
    assert records(tmp_path / "random", "train")[0]["loss"] == pytest.approx(np.log(384), abs=0.1)


def test_a_run_begins_with_the_parameters_of_another(tmp_path):
    run = Run(tmp_path / "run", "bias")
    source = open_source(f"{run.root}/checkpoints/3")
    config = change(config_of(source), mesh={"fsdp": 2, "expert": 4})
    require_same_model(source, config)
    state = read_state(source, config, make_mesh(config.mesh))
    jax.tree.map(np.testing.assert_array_equal, state.params, run.state.params)
    np.testing.assert_array_equal(state.router_bias["bias_N"], run.state.router_bias["bias_N"])
    assert int(state.step) == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(state.opt_state))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, make_mesh(config.mesh)))
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == shardings


def test_what_does_not_fit_is_refused_by_name(published, tmp_path):
    path, original = published / "config.json", json.loads((published / "config.json").read_text())
    source = open_source(str(published))

    def altered(**fields) -> Config:
        return dataclasses.replace(config_of(source), model=ModelConfig(**source.settings | fields))

    refusals = {
        "model_type": ("llama", "is unknown; there are mixtral, qwen3_moe, olmoe"),
        "rope_parameters": ({"type": "yarn", "rope_theta": 1e4}, "rope_type='yarn' is not supported"),
        "mlp_only_layers": ([0], r"mlp_only_layers=\[0\] is not supported"),
        "attention_bias": (True, "attention_bias=True is not supported"),
        "num_attention_heads": (None, "num_attention_heads=None is no positive number"),
        "num_key_value_heads": (0, "num_key_value_heads=0 is no positive number"),
        "num_hidden_layers": (3.0, r"num_hidden_layers=3\.0 is no positive number"),
        "rms_norm_eps": ("small", "rms_norm_eps='small' is no number"),
        "experts_per_layer": (8, "experts_per_layer=8 is not a number for each layer"),
        "num_experts_per_tok": (1, "leaves the router without a gradient"),
    }
    for name, (value, message) in refusals.items():
        path.write_text(json.dumps(original | {name: value}))
        with pytest.raises(UserError, match=message):
            open_source(str(published))
    path.write_text(json.dumps(original))
    with pytest.raises(UserError, match=r"^ModelConfig\.top_k=3 is not the 2 of .* \(qwen3_moe\)$"):
        require_same_model(source, altered(top_k=3))
    path.write_text(json.dumps(original | {"num_hidden_layers": 4}))
    with pytest.raises(UserError, match=r"'model\.layers\.3\.input_layernorm\.weight' is not among its tensors"):
        require_same_model(open_source(str(published)), altered(num_layers=4))
    path.write_text(json.dumps(original | {"num_hidden_layers": 2}))
    with pytest.raises(UserError, match=r"that are no parameters of this model: \['model\.layers\.2\."):
        require_same_model(open_source(str(published)), altered(num_layers=2))
    path.write_text(json.dumps(original | {"vocab_size": 128}))
    with pytest.raises(UserError, match=r"embed_tokens\.weight=\(384, 32\) must have shape \(128, 32\)"):
        require_same_model(open_source(str(published)), altered(vocab_size=128))
    header = read_header(weights := published / "model.safetensors")
    doubled = {name: of | {"shape": [2 * of["shape"][0], *of["shape"][1:]]} for name, of in header.items()}
    text = json.dumps(doubled).encode()
    weights.write_bytes(len(text).to_bytes(8, "little") + text + bytes(10**6))
    path.write_text(json.dumps(original))
    with pytest.raises(UserError, match=r"published: .*=\d+ must have \d+ bytes$"):
        open_source(str(published))
    with pytest.raises(UserError, match=r"'Qwen/Qwen3-30B-A3B' is no folder; a model of the hub has to be downloaded"):
        open_source("Qwen/Qwen3-30B-A3B")
    with pytest.raises(UserError, match=r"is neither a run nor a Hugging Face folder, which has a config\.json$"):
        open_source(str(tmp_path))


def test_parameters_come_with_their_tokenizer(published, tmp_path, capsys):
    data = [f"--workdir={tmp_path / 'run'}", "--check", "--gin.DataConfig.source=synthetic"]
    data += [f"--gin.DataConfig.cache_dir={tmp_path / 'tokens'}", "--gin.DataConfig.sequence_length=32"]
    own = published / "tokenizer.json"
    assert main([f"--init-from={published}", *data]) == 0
    own.rename(moved := tmp_path / "moved.json")  # a model that was saved without one
    with pytest.raises(UserError, match=r"^DataConfig\.tokenizer='.*/published/tokenizer\.json' is neither"):
        main([f"--init-from={published}", *data])
    assert main([f"--init-from={published}", *data, f"--gin.DataConfig.tokenizer={moved}"]) == 0
    settings = {"tokenizer": str(moved), "cache_dir": str(tmp_path / "tokens"), "sequence_length": 32}
    first = change(tiny_config("x"), model={"vocab_size": 384}, data=settings, train={"num_steps": 1})
    train(first, tmp_path / "first")
    moved.write_text(moved.read_text().replace("<|endoftext|>", "</s>"))
    with pytest.raises(UserError, match=r"^DataConfig\.tokenizer='.*/moved\.json' is not the tokenizer of .*/first$"):
        main([f"--init-from={tmp_path / 'first'}", *data])
