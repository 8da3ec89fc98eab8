"""preflight from end to end: real TPU programs of a small model, compiled for slices that are not here."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from laep_jax.errors import UserError
from laep_jax.preflight.command import main

ROOT = Path(__file__).parents[2]
SMALL = {
    "ModelConfig.num_layers": 2,
    "ModelConfig.hidden_size": 256,
    "ModelConfig.num_heads": 4,
    "ModelConfig.head_dim": 64,  # padded for splash attention
    "ModelConfig.ffn_size": 256,
    "ModelConfig.num_experts": 8,
    "ModelConfig.dtype": "bfloat16",
    "ModelConfig.remat": "full",
    "ModelConfig.dispatch": "ragged_all_to_all",
    "ModelConfig.receive_buffer": 1.5,
    "MeshConfig.expert": 2,
    "DataConfig.sequence_length": 1024,
    "DataConfig.batch_size": 4,
}


def run(*arguments: str, **changes) -> subprocess.CompletedProcess:
    """In a process of its own: the tests' one has taken CPU devices already."""
    pytest.importorskip("libtpu", reason='the TPU compiler is not installed: pip install "jax[tpu]"')
    overrides = [f"--gin.{name}={value}" for name, value in (SMALL | changes).items()]
    command = [sys.executable, "-m", "laep_jax", "preflight", "--topology=v5e:2x2", *overrides, *arguments]
    of_tests = ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS")
    environment = {name: value for name, value in os.environ.items() if name not in of_tests}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)


def test_a_small_model_compiles_and_fits_before_and_after_a_prune(tmp_path):
    counts_NLE = np.ones((4, 2, 8), np.int64) * 100
    counts_NLE[:, :, :4] = [1000, 900, 5, 5]
    np.savez(tmp_path / "counts.npz", tokens_per_expert=counts_NLE)
    result = run(
        f"--loads={tmp_path / 'counts.npz'}", "--json", **{"LaepConfig.alpha": 0.4, "LaepConfig.replica_slots": 0}
    )
    assert result.returncode == 0, result.stderr
    step = json.loads(result.stdout)
    after = step["after"]
    assert step["fits"]
    assert step["hbm_bytes"] == 16 * 2**30
    assert step["argument_bytes"] > sum(leaf["bytes"] for leaf in step["state"])  # the batch comes along
    assert step["kernels"]["splash attention"] == 4  # forward, again for the backward pass, and its two halves
    assert step["kernels"]["ragged-all-to-all"] == 12  # six of each way: there and back, twice, and the gradients
    assert step["kernels"]["gmm"] == 3 * step["kernels"]["tgmm"]  # each product forward, again, and for dx; dw
    assert not any(name.startswith("ragged-dot") for name in step["kernels"])  # whose dw is a dense product
    assert step["collectives"]["ragged-all-to-all"]["count"] == 6 * 2  # in each layer, the usual way only
    assert 4 / 3 < step["flops_ratio"]["model"] < 2  # recomputation, and attention's heads of 64 padded to 128
    assert step["flops_ratio"]["with recomputation"] == pytest.approx(0.75 * step["flops_ratio"]["model"])
    assert step["bound"]["links exposed"] > step["bound"]["links hidden"]
    assert after["parameters"] < step["parameters"]
    assert after["argument_bytes"] < step["argument_bytes"]
    assert after["temporary_bytes"] < step["temporary_bytes"]  # less skew, smaller buffer
    assert 1 <= after["straggler"] < step["straggler"] == pytest.approx(1910 * 2 / 2310)
    assert step["prune_bytes"] > step["argument_bytes"]


def test_dense_products_for_sparse_ones_are_exit_code_1_and_named():
    """The weight gradient of `ragged_dot` has no kernel: every row is multiplied for every expert of a device."""
    result = run(**{"ModelConfig.grouped_matmul": "ragged_dot"})
    assert result.returncode == 1, result.stderr
    assert "DOES NOT FIT" not in result.stdout
    wasteful = result.stdout.partition("WASTEFUL")[2].splitlines()
    assert re.search(r"bf16\[\d,256,512\]", wasteful[1]), wasteful


@pytest.mark.slow
def test_gathers_of_experts_run_beside_products():
    """That is what the options of v5p and v6e are for; by default every transfer is waited for."""
    result = run("--topology=v5p:2x2x1", "--json", **{"ModelConfig.num_heads": 2, "ModelConfig.head_dim": 128})
    assert result.returncode == 0, result.stderr
    step = json.loads(result.stdout)
    gathers = step["collectives"]["all-gather"]
    assert gathers["asynchronous_link_bytes"] > 0.25 * gathers["link_bytes"]  # more in a larger model
    bound = step["bound"]
    assert bound["links hidden"] <= bound["as compiled"] < bound["links exposed"]


@pytest.mark.slow
def test_two_slices_and_the_executable_of_unequal_layers(tmp_path):
    changes = {"MeshConfig.data": 2, "DataConfig.batch_size": 8, "ModelConfig.num_experts": (8, 4)}
    result = run("--slices=2", f"--save={tmp_path / 'step'}", **changes)
    assert result.returncode == 0, result.stderr
    assert "2 slices v5e:2x2: 8 devices" in result.stdout
    assert "\n  between slices  " in result.stdout  # gradients
    made_for = json.loads((tmp_path / "step").read_bytes().partition(b"\n")[0])
    assert made_for["devices"] == "8 TPU v5 lite"
    assert made_for["model.num_experts"] == [8, 4]


def test_slices_that_the_data_axis_does_not_fill_are_refused():
    result = run("--slices=2", **{"DataConfig.batch_size": 8})
    assert result.returncode == 2
    assert "MeshConfig.data=1 is not divisible by 2 slices" in result.stderr


def test_what_does_not_fit_is_exit_code_1_with_the_largest_named():
    result = run(**{"ModelConfig.ffn_size": 65536, "ModelConfig.hidden_size": 4096})
    assert result.returncode == 1, result.stderr
    assert "DOES NOT FIT" in result.stdout
    assert "the largest contributors: temporaries" in result.stdout
    assert "gate_up_NDG with its moments" in result.stdout


def test_an_unknown_topology_lists_the_known_ones():
    with pytest.raises(UserError, match="is no slice of v5e; there are v5e:1x1"):
        main(["--topology=v5e:3x3"])


def test_without_the_compiler_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "jax\[tpu\]"'):
        main(["--topology=v5e:2x2"])
