"""The losses that vLLM gives to exported models, against laep_jax's. Not a test: vLLM's packages differ from ours.

python -m tests.huggingface.vllm_losses make FOLDER    # with what the tests need
for model in FOLDER/*; do python tests/huggingface/vllm_losses.py compare $model; done    # with vLLM's environment
"""

import sys
from pathlib import Path

import numpy as np

WIDE = {"hidden_size": 128, "num_heads": 4, "head_dim": 32, "ffn_size": 64}  # sizes that vLLM's CPU kernels have


def make(folder: Path) -> None:
    """Exports a model of each kind of the tests, and its logits; also padded ones."""
    from laep_jax.sharding import make_cpu_devices

    make_cpu_devices(8)
    from tests.huggingface.test_export import KINDS, TOKENS, Run, export

    KINDS["others_without_lfa"] = KINDS["others"] | {"lfa": False}
    KINDS["olmoe_1e-5"] = KINDS["olmoe"] | {"norm_eps": 1e-5}
    KINDS.update({kind: parts | WIDE for kind, parts in KINDS.items()})
    for kind, form in [*((kind, "auto") for kind in KINDS), ("hetero", "padded")]:
        out = folder / f"{kind}_{form}"
        (out / "run").mkdir(parents=True)
        run = Run(out / "run", kind)
        export(run, out / "model", f"--form={form}")
        np.savez(out / "logits.npz", tokens=TOKENS, logits=run.logits())


def compare(folder: Path) -> None:
    """Prints the largest difference of a token's loss, and how many texts get the same next token."""
    from vllm import LLM, SamplingParams, TokensPrompt

    kept = np.load(folder / "logits.npz")
    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 32, "gpu_memory_utilization": 0.2}
    model = LLM(str(folder / "model"), trust_remote_code=True, **options)
    prompts = [TokensPrompt(prompt_token_ids=row.tolist()) for row in kept["tokens"]]
    answers = model.generate(prompts, SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0))
    shares = kept["logits"] - np.log(np.exp(kept["logits"]).sum(-1, keepdims=True))
    worst, alike = 0.0, 0
    for row, answer, share_SV in zip(kept["tokens"], answers, shares, strict=True):
        got = [found[token].logprob for found, token in zip(answer.prompt_logprobs[1:], row[1:].tolist(), strict=True)]
        worst = max(worst, np.abs(got - share_SV[range(len(got)), row[1:]]).max())
        alike += answer.outputs[0].token_ids[0] == share_SV[-1].argmax()
    print(f"{folder.name}: {worst:.1e}, {alike} of {len(answers)} get the same next token")


STEPS = {"make": make, "compare": compare}
if __name__ == "__main__":
    STEPS[sys.argv[1]](Path(sys.argv[2]))
