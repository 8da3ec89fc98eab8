"""The model card of an exported model: what the run was, and how to load what came of it."""

import json
import re
from typing import Any

import laep_jax
from laep_jax.checkpoint.saved import Saved
from laep_jax.config import Config
from laep_jax.fields import settings_of
from laep_jax.model.accounting import model_size

_PRUNED = "Experts were pruned by Layer-Adaptive Expert Pruning (arXiv 2601.14327). "


def model_card(saved: Saved, form: str, loads: str) -> str:
    """README.md of the folder. loads: which programs load it."""
    base, summary = Config.from_dict(saved.meta["config"]), saved.meta["summary"]
    length = base.data.sequence_length
    before, after = (model_size(config.model, sequence_length=length).total for config in (base, saved.config))
    rows = {
        "parameters began as": _origin(summary),
        "step, tokens": f"{saved.step:,}, {summary['tokens']:,}",
        "parameters": f"{after:,}" + (f", {before:,} before {_prunes(summary)}" if before != after else ""),
        "experts by layer": _short(saved.num_experts),
        "experts by layer before": _short(base.model.experts_per_layer),
        "validation loss (nats a token)": _losses(summary),
        "text and tokenizer, SHA-256": saved.meta["fingerprint"][:12],
    }
    trust = ", trust_remote_code=True" if form == "hetero" else ""
    settings = json.dumps({part: _differences(base, part) for part in ("model", "laep", "optimizer", "data")}, indent=1)
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""---
library_name: transformers
tags: [mixture-of-experts, laep]
---

# A mixture of experts trained by laep_jax

Form `{form}`: {loads}.

```python
# pip install torch "transformers>=5.19"
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER"{trust})
tokenizer = AutoTokenizer.from_pretrained("FOLDER"{trust})
prompt = tokenizer("def main(", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=40)[0]))
```

| | |
|---|---|
{table}

{_PRUNED if summary["prune_steps"] else ""}The experts of each layer, by their ids in the model that the run began with:

```
{chr(10).join(f"{layer}: {' '.join(map(str, ids))}" for layer, ids in enumerate(saved.meta["lineage"]))}
```

Settings that differ from the defaults of laep_jax {laep_jax.__version__}:

```json
{settings}
```
"""


def _origin(summary: dict[str, Any]) -> str:
    """The last name of the path only, as in `_differences`."""
    return re.sub(r"^(step \d+ of )?.*/", r"\1", summary.get("init_from") or "random ones")


def _prunes(summary: dict[str, Any]) -> str:
    return "the prune after step " + " and ".join(f"{step:,}" for step in summary["prune_steps"])


def _short(counts: tuple[int, ...]) -> str:
    return str(counts[0]) if len({*counts}) == 1 else ", ".join(map(str, counts))


def _losses(summary: dict[str, Any]) -> str:
    named = {
        "before the prune": summary["validation_loss_before_prune"],
        "after it": summary["validation_loss_after_prune"],
        "at the end": summary["validation_loss_end"],
    }
    return ", ".join(f"{loss:.4f} {when}" for when, loss in named.items() if loss is not None) or "not measured"


def _differences(config: Config, part: str) -> dict[str, Any]:
    """Paths are of the machine that trained, and left out."""
    default, own = getattr(Config(), part), getattr(config, part)
    names = [name for name, setting in settings_of(own).items() if not setting.path]
    return {name: getattr(own, name) for name in names if getattr(own, name) != getattr(default, name)}
