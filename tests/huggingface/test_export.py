"""Exported models in Hugging Face Transformers, against laep_jax itself: before a prune, after it, in every form."""

import dataclasses
import functools
import inspect
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from laep_jax.checkpoint.checkpointer import Checkpoints
from laep_jax.checkpoint.manifest import DamagedError
from laep_jax.config import Config, ModelConfig
from laep_jax.errors import UserError
from laep_jax.export import folder
from laep_jax.export.command import main
from laep_jax.huggingface.folder import Folder
from laep_jax.importers.safetensors_file import read_header
from laep_jax.model.transformer import logits
from laep_jax.sharding import make_mesh
from laep_jax.state.tree import TrainState, abstract_state, init_state, initial_layout
from laep_jax.storage import Disk
from laep_jax.training.run_state import RunState
from tests.fault_injection.damage import change_stored
from tests.support.tiny_run import change, tiny_config

EQUAL, UNEQUAL = (8, 8, 8), (8, 4, 6)
TOKENS = np.random.default_rng(0).integers(0, 257, (8, 24))
KINDS = {  # what a model has that makes a form necessary or possible
    "uniform": {"num_experts": EQUAL, "lfa": False},
    "hetero": {"num_experts": UNEQUAL, "lfa": False},
    "lfa": {"num_experts": UNEQUAL, "lfa": True, "lfa_bias": True},
    "top_1": {"num_experts": EQUAL, "lfa": False, "top_k": 1},
    "bias": {"num_experts": UNEQUAL, "lfa": False},
    "qwen3": {"num_experts": EQUAL, "lfa": False, "num_kv_heads": 2, "qk_norm": "head", "tie_embeddings": True},
    "olmoe": {"num_experts": EQUAL, "lfa": False, "qk_norm": "whole", "norm_topk_prob": False, "top_k": 4},
    "others": {
        "num_experts": UNEQUAL,
        "lfa": True,
        "num_kv_heads": 1,
        "qk_norm": "head",
        "router_score": "sigmoid",
        "shared_ffn_size": 12,
        "tie_embeddings": True,
    },
    "whole_norm": {"num_experts": UNEQUAL, "lfa": False, "num_kv_heads": 2, "qk_norm": "whole"},
}
EQUAL_BIAS = {"num_experts": EQUAL, "lfa": False}
CLASSES = {"uniform": "MixtralForCausalLM", "qwen3": "Qwen3MoeForCausalLM", "olmoe": "OlmoeForCausalLM"}
BIASED = ("bias", "others", "equal_bias")


class Run:
    """A run's only checkpoint: random weights, large enough that every part matters.

    common: how large the router's weights are that all experts have in common.
    """

    def __init__(self, root, kind: str, common: float = 0, **parts):
        self.root, self.kind = str(root), kind
        model = {"num_layers": 3, "router_init": 0.7, **(KINDS | {"equal_bias": EQUAL_BIAS})[kind]}
        config = tiny_config(str(root / "tokens"), model=model, **parts)
        self.config: Config = change(config, mesh={"fsdp": 4, "expert": 2})
        self.mesh = make_mesh(self.config.mesh)
        state = init_state(self.config, self.mesh)
        keys = iter(jax.random.split(jax.random.key(1), 99))
        noisy = jax.tree.map(lambda x: x + 0.15 * jax.random.normal(next(keys), x.shape), state.params)
        common_D = common * jax.random.normal(next(keys), (self.config.model.hidden_size,))
        noisy["experts"]["router_ND"] += common_D[None]
        noise_N = 0.4 * jax.random.normal(next(keys), (sum(self.counts),)) * (kind in BIASED)
        bias_N = state.router_bias["bias_N"] + noise_N
        self.state: TrainState = dataclasses.replace(state, params=noisy, router_bias={"bias_N": bias_N})
        run_state = RunState.fresh(self.config.resolve(8), "sha of the corpus")
        run_state.step = 3
        with Checkpoints(f"{root}/checkpoints", keep=1) as checkpoints:
            checkpoints.save(3, self.state, {}, run_state.to_meta(), self.counts, now=True)

    @property
    def counts(self) -> tuple[int, ...]:
        return self.config.model.experts_per_layer

    def logits(self, tokens: np.ndarray = TOKENS) -> np.ndarray:
        """Of rows of tokens, by laep_jax."""
        layout, shape = initial_layout(self.config), tokens.shape
        positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
        batch = {
            "tokens_BS": jnp.asarray(tokens, jnp.int32),
            "segments_BS": jnp.ones(shape, jnp.int32),
            "positions_BS": jnp.asarray(positions),
        }
        forward = functools.partial(logits, config=self.config.model, mesh=self.mesh)
        return np.asarray(jax.jit(forward)(self.state.params, self.state.router_bias, layout, batch))


@pytest.fixture(scope="module", params=KINDS)
def run(request, tmp_path_factory) -> Run:
    return Run(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return functools.cache(lambda kind: Run(tmp_path_factory.mktemp(kind), kind))


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """The folder of `--form=auto`."""
    return export(run, tmp_path_factory.mktemp("exported") / "out")


def config_of(source, **parts) -> Config:
    """Of the model of a source, on eight devices."""
    config = dataclasses.replace(tiny_config("x"), model=ModelConfig(**source.settings))
    return change(config, mesh={"fsdp": 4, "expert": 2}, **parts)


def read(folder) -> tuple[Config, dict]:
    """The config of a folder's model, and the model."""
    source = Folder(folder)
    config = config_of(source)
    source.require_fits(config)
    abstract = abstract_state(config, make_mesh(config.mesh))
    return config, source.read(config.model, {"params": abstract.params, "router_bias": abstract.router_bias})


def assert_same(folder, run: Run) -> None:
    """The folder has the run's model, bit for bit."""
    config, model = read(folder)
    same = {"router_init": 1.0, "num_kv_heads": run.config.model.kv_heads}
    assert dataclasses.replace(config.model, **same) == dataclasses.replace(run.config.model, **same)
    jax.tree.map(np.testing.assert_array_equal, model["params"], run.state.params)
    np.testing.assert_array_equal(model["router_bias"]["bias_N"], run.state.router_bias["bias_N"])


def load(path):
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=True)
    return model.eval()


def logits_of(model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def export(run: Run, out, *options: str):
    assert main([run.root, f"--to={out}", *options]) == 0
    return out


def test_transformers_has_the_logits_of_laep_jax(run, exported):
    model = load(exported)
    want = run.logits()
    assert want.std() > 0.3
    np.testing.assert_allclose(logits_of(model), want, rtol=0, atol=1e-4)
    assert type(model).__name__ == CLASSES.get(run.kind, "LaepMixtralForCausalLM")
    card, stock = (exported / "README.md").read_text(), run.kind not in ("lfa", "others", "olmoe")
    assert ("and vLLM with its" in card or "vLLM, SGLang and" in card) == stock


def test_vllm_finds_what_it_looks_for_but_not_where_it_would_lose_a_state(runs, tmp_path):
    """`vllm_losses` runs it."""
    model = load(export(runs("whole_norm"), tmp_path / "out")).model
    code = sys.modules[type(model).__module__]
    found = [
        "= ALL_ATTENTION_FUNCTIONS." in inspect.getsource(of.forward) for of in (code.Attention, code.FilteredAttention)
    ]
    assert found == [True, False]
    assert "inputs_embeds" in inspect.signature(type(model).forward).parameters


def test_an_exported_model_comes_back_bit_for_bit(run, exported):
    assert_same(exported, run)


@pytest.mark.parametrize(("kind", "common"), [("uniform", 0), ("hetero", 0), ("hetero", 20), ("equal_bias", 0)])
def test_a_padded_model_is_exact_too(runs, tmp_path, kind, common):
    """Also where a token's scores are all high or all low, which makes no difference to a softmax."""
    run = Run(tmp_path / "run", kind, common=common) if common else runs(kind)
    model = load(export(run, tmp_path / "out", "--form=padded"))
    assert type(model).__name__ == "Ernie4_5_MoeForCausalLM"
    np.testing.assert_allclose(logits_of(model), run.logits(), rtol=0, atol=1e-4)
    assert_same(tmp_path / "out", run)


def test_greedy_tokens_are_those_of_laep_jax_with_a_cache_and_with_padding(run, exported):
    """Rows of different lengths, filled up on the left, as programs that generate in batches do."""
    model = load(exported)
    want = run.logits()
    lengths = range(TOKENS.shape[1] - 8, TOKENS.shape[1])
    padded, mask = np.zeros_like(TOKENS), np.zeros_like(TOKENS)
    for row, length in enumerate(lengths):
        padded[row, -length:], mask[row, -length:] = TOKENS[row, :length], 1
    with torch.no_grad():
        plain = model(torch.tensor(padded), attention_mask=torch.tensor(mask)).logits.numpy()
        for row, length in enumerate(lengths):
            np.testing.assert_allclose(plain[row, -length:], want[row, :length], rtol=0, atol=1e-4)
        options = {"attention_mask": torch.tensor(mask), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        together = model.generate(torch.tensor(padded), **options, eos_token_id=None)[:, TOKENS.shape[1] :]
        for row, length in enumerate(lengths):
            prompt = torch.tensor(TOKENS[row : row + 1, :length])
            assert together[row, 0] == want[row, length - 1].argmax()
            for _ in range(6):  # without a cache
                prompt = torch.cat([prompt, model(prompt, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
            assert together[row].tolist() == prompt[0, length:].tolist()


def test_beams_reorder_what_the_filters_keep(runs, tmp_path):
    """With a cache as without one."""
    model = load(export(runs("lfa"), tmp_path / "out"))
    prompt = torch.tensor(TOKENS[:2, :9])
    options = {"num_beams": 4, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad():
        found = [model.generate(prompt, **options, use_cache=cached).tolist() for cached in (True, False)]
    assert found[0] == found[1]


TASK = """
task: laep_local
dataset_path: json
dataset_kwargs: {data_files: DATA}
test_split: train
output_type: loglikelihood
doc_to_text: "{{text}}"
doc_to_target: "{{target}}"
target_delimiter: ""
metric_list: [{metric: perplexity}]
"""


@pytest.mark.slow
def test_lm_eval_gives_the_losses_of_laep_jax(runs, tmp_path):
    """Each row of TOKENS in two parts, of which it scores the second."""
    rows = [bytes((row % 64 + 32).tolist()).decode() for row in TOKENS]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": r[:9], "target": r[9:]}) + "\n" for r in rows))
    (tmp_path / "local.yaml").write_text(TASK.replace("DATA", str(tmp_path / "data.jsonl")))
    out = export(runs("lfa"), tmp_path / "out")
    model = f"pretrained={out},trust_remote_code=True,dtype=float32"
    options = ["--tasks=laep_local", f"--include_path={tmp_path}", "--device=cpu", f"--output_path={tmp_path}/results"]
    command = [sys.executable, "-m", "lm_eval", "--model=hf", f"--model_args={model}", *options]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, env=os.environ | offline, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    [path] = (tmp_path / "results").rglob("results_*.json")
    found = json.loads(path.read_text())["results"]["laep_local"]["perplexity,none"]
    tokens = np.array([list(row.encode()) for row in rows])
    shares = jax.nn.log_softmax(runs("lfa").logits(tokens))[:, 8:-1]
    want = -np.take_along_axis(np.asarray(shares), tokens[:, 9:, None], axis=-1).sum(axis=(1, 2)).mean()
    np.testing.assert_allclose(np.log(found), want, rtol=1e-5)


def test_shards_have_an_index_and_the_same_tensors(runs, tmp_path, monkeypatch):
    whole = load_file(export(runs("hetero"), tmp_path / "one") / "model.safetensors")
    monkeypatch.setattr(folder, "SHARD_BYTES", 20_000)
    out = export(runs("hetero"), tmp_path / "several")
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    parts = {name: array for file in files for name, array in load_file(out / file).items()}
    assert parts.keys() == whole.keys()
    assert all(np.array_equal(parts[name], whole[name]) for name in whole)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in whole.values())
    assert index["weight_map"].keys() == whole.keys()
    np.testing.assert_allclose(logits_of(load(out)), runs("hetero").logits(), rtol=0, atol=1e-4)


def test_bfloat16_weights_are_the_rounded_ones_but_for_what_chooses_experts(runs, tmp_path):
    model = load(export(runs("uniform"), tmp_path / "out", "--dtype=bfloat16"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    want = torch.tensor(np.asarray(runs("uniform").state.params["embedding_VD"])).bfloat16().float()
    assert torch.equal(model.get_input_embeddings().weight, want)
    header = read_header((biased := export(runs("bias"), tmp_path / "bias", "--dtype=bfloat16")) / "model.safetensors")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(biased, trust_remote_code=True)
    inner = transformers.AutoModel.from_pretrained(biased, trust_remote_code=True)
    assert inner.layers[0].mlp.gate.bias.dtype == torch.float32
    router = loaded.model.layers[0].mlp.gate
    assert (loaded.dtype, router.weight.dtype, router.bias.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    bias_N = np.asarray(runs("bias").state.router_bias["bias_N"])
    assert torch.equal(router.bias, torch.tensor(bias_N[: UNEQUAL[0]]))
    dtypes = {name.rpartition(".mlp.")[2]: of["dtype"] for name, of in header.items() if ".mlp." in name}
    assert dtypes == {
        "gate.weight": "BF16",
        "gate.bias": "F32",
        "experts.gate_up_proj": "BF16",
        "experts.down_proj": "BF16",
    }


def test_the_card_says_what_the_run_was(runs, tmp_path):
    card = (export(runs("lfa"), tmp_path / "out") / "README.md").read_text()
    assert "Form `hetero`: a modelling file of its own: Transformers 5, with trust_remote_code=True." in card
    assert "| experts by layer | 8, 4, 6 |" in card
    assert '"lfa_bias": true' in card
    assert "\n1: 0 1 2 3\n" in card
    assert "pruned" not in card  # by this run
    assert runs("lfa").root not in card  # nor where it was


def test_an_export_that_fails_leaves_nothing(runs, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder, "write_one_by_one", full)
    (tmp_path / "out.part").mkdir()  # not ours
    with pytest.raises(UserError, match=r"^--to=.*/out cannot be written: No space left on device$"):
        export(runs("lfa"), tmp_path / "out")
    with pytest.raises(UserError, match=r"^--to='\.' exists; name a new folder$"):
        export(runs("lfa"), ".")
    with pytest.raises(UserError, match=r"^--to=.* cannot be written: File name too long$"):
        export(runs("lfa"), tmp_path / ("x" * 300))
    assert list(tmp_path.iterdir()) == [tmp_path / "out.part"]


def test_the_balancing_loss_of_transformers_is_refused_where_layers_differ(runs, tmp_path):
    out = export(runs("lfa"), tmp_path / "out")
    with pytest.raises(ValueError, match="needs layers of equal size"):
        transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, output_router_logits=True)


@pytest.mark.parametrize(
    ("kind", "form", "message"),
    [
        ("hetero", "uniform", "cannot hold layers of 4 to 8 experts; use hetero"),
        ("lfa", "uniform", r"localized filtering \(ModelConfig\.lfa\) and layers of 4 to 8 experts"),
        ("lfa", "padded", r"cannot hold localized filtering \(ModelConfig\.lfa\); use hetero"),
        ("bias", "uniform", "cannot hold a bias of the loss-free balancing and layers of 4 to 8 experts; use hetero"),
        ("bias", "padded", "cannot hold a bias of the loss-free balancing in layers of unequal size; use hetero"),
        ("whole_norm", "padded", r"cannot hold ModelConfig\.qk_norm='whole' with norm_topk_prob=True; use hetero"),
        ("others", "padded", r"the router's sigmoid \(ModelConfig\.router_score\) and a shared expert"),
        ("top_1", "uniform", r"cannot hold the router's weights with ModelConfig\.top_k=1; use hetero"),
    ],
)
def test_a_form_that_cannot_hold_a_model_is_refused(runs, tmp_path, kind, form, message):
    with pytest.raises(UserError, match=rf"^--form='{form}' {message}" if "cannot" in message else message):
        main([runs(kind).root, f"--to={tmp_path / 'out'}", f"--form={form}"])
    assert not (tmp_path / "out").exists()


def test_damage_a_run_without_checkpoints_and_a_folder_in_the_way_are_refused(tmp_path):
    run = Run(tmp_path / "run", "hetero")
    change_stored(Disk(f"{run.root}/checkpoints"), 3, "params.experts.down_NFD", (9, 1, 2))
    with pytest.raises(DamagedError, match=r"3 is damaged: params\.experts\.down_NFD is not what was saved"):
        main([run.root, f"--to={tmp_path / 'a'}"])
    with pytest.raises(UserError, match=r"^there is no .*/none$"):
        main([f"{tmp_path}/none", f"--to={tmp_path / 'b'}"])
    assert not (tmp_path / "a").exists()
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match=r"^--to='.*/a' exists; name a new folder$"):
        main([f"{run.root}/checkpoints/3", f"--to={tmp_path / 'a'}"])
