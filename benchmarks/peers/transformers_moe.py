"""Trains the model of `python -m benchmarks peers` in Hugging Face Transformers (Mixtral) on PyTorch.

Runs in the environment that install.sh makes. Takes the setting as JSON; the last line it prints is JSON.
"""

import json
import platform
import sys
import time

import torch
import transformers


def main(setting: dict) -> dict:
    torch.set_num_threads(setting["threads"])
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            vocab_size=setting["vocab_size"],
            num_hidden_layers=setting["num_layers"],
            hidden_size=setting["hidden_size"],
            num_attention_heads=setting["num_heads"],
            num_key_value_heads=setting["num_heads"],
            head_dim=setting["head_dim"],
            intermediate_size=setting["ffn_size"],
            num_local_experts=setting["num_experts"],
            num_experts_per_tok=setting["top_k"],
            max_position_embeddings=setting["sequence_length"],
            tie_word_embeddings=False,
            use_cache=False,
            attn_implementation="sdpa",
            experts_implementation="grouped_mm",
        )
    ).train()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=setting["learning_rate"],
        betas=(setting["b1"], setting["b2"]),
        eps=setting["eps"],
        weight_decay=setting["weight_decay"],
        fused=True,
    )
    seconds, loss = [], 0.0
    for _ in range(setting["num_steps"]):
        start = time.perf_counter()
        tokens = torch.randint(0, setting["vocab_size"], (setting["batch_size"], setting["sequence_length"]))
        output = model(input_ids=tokens, labels=tokens)  # shifts the labels itself
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), setting["clip_norm"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - start)
        loss = output.loss.item()
    return {
        "seconds": seconds,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "loss": loss,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
