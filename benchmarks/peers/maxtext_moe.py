"""Trains the model of `python -m benchmarks peers` with MaxText's own training program.

Runs in the environment that install.sh makes. Takes the setting as JSON; the last line it prints is JSON.
`capacity_factor` null is its dropless default, `ragged_dot`; a number is the room of an expert in units of the mean
load, beyond which tokens are dropped. Its synthetic data are one batch of uniformly random tokens, again and again.
"""

import importlib.metadata
import json
import os
import platform
import sys
import tempfile
from pathlib import Path

os.environ["DECOUPLE_GCLOUD"] = "TRUE"

from maxtext.trainers.pre_train import train
from maxtext.utils import max_utils


def options(setting: dict, folder: Path) -> dict:
    """MaxText's names for the setting, and what gave it the most tokens per second here."""
    capacity = setting["capacity_factor"]
    experts = {"sparse_matmul": True} if capacity is None else {"sparse_matmul": False, "capacity_factor": capacity}
    return experts | {
        "run_name": "peer",
        "hardware": "cpu",
        "skip_jax_distributed_system": True,
        "base_output_directory": folder,
        "metrics_file": folder / "metrics.jsonl",
        "enable_checkpointing": False,
        "enable_goodput_recording": False,
        "dataset_type": "synthetic",
        "decoder_block": "mixtral",
        "megablox": False,
        "attention": "dot_product",
        "scan_layers": False,
        "remat_policy": "minimal",
        "dtype": "float32",
        "weight_dtype": "float32",
        "vocab_size": setting["vocab_size"],
        "base_num_decoder_layers": setting["num_layers"],
        "base_emb_dim": setting["hidden_size"],
        "base_num_query_heads": setting["num_heads"],
        "base_num_kv_heads": setting["num_heads"],
        "head_dim": setting["head_dim"],
        "base_mlp_dim": setting["ffn_size"],
        "base_moe_mlp_dim": setting["ffn_size"],
        "num_experts": setting["num_experts"],
        "num_experts_per_tok": setting["top_k"],
        "max_target_length": setting["sequence_length"],
        "per_device_batch_size": setting["batch_size"],
        "opt_type": "adamw",
        "learning_rate": setting["learning_rate"],
        "adam_b1": setting["b1"],
        "adam_b2": setting["b2"],
        "adam_eps": setting["eps"],
        "adam_weight_decay": setting["weight_decay"],
        "gradient_clipping_threshold": setting["clip_norm"],
        "steps": setting["num_steps"],
    }


def main(setting: dict) -> dict:
    parameters, count = [], max_utils.calculate_num_params_from_pytree

    def counted(params):
        parameters.append(int(count(params)))
        return parameters[-1]

    max_utils.calculate_num_params_from_pytree = counted  # its log has three digits of it
    with tempfile.TemporaryDirectory() as folder:
        settings = options(setting, Path(folder))
        train.main([train.__file__, *(f"{name}={value}" for name, value in settings.items())])
        steps = [json.loads(line) for line in settings["metrics_file"].read_text().splitlines()]
    return {
        "seconds": [step["perf/step_time_seconds"] for step in steps],
        "parameters": parameters[0],
        "loss": steps[-1]["learning/loss"],
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("maxtext", "jax", "flax")},
    }


if __name__ == "__main__":
    report = main(json.loads(sys.argv[1]))
    print(json.dumps(report))
