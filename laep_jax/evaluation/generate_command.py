"""`python -m laep_jax generate`: text that a run's model writes after a prompt."""

import argparse
import sys

from laep_jax.checkpoint.saved import Saved
from laep_jax.commands import program
from laep_jax.errors import require
from laep_jax.evaluation.decoding import generate
from laep_jax.evaluation.scoring import here, load_model
from laep_jax.sharding import make_cpu_devices, make_mesh
from laep_jax.switches import set_switches


def main(argv: list[str]) -> int:
    """Prints the prompt and what follows it, as it is made. `UserError` where the run or a number does not fit."""
    args = _parser().parse_args(argv)
    require(args.max_tokens >= 1, "--max-tokens", args.max_tokens, "must be at least 1")
    set_switches()
    make_cpu_devices(args.cpu_devices)
    saved = Saved(args.run)
    tokenizer = saved.tokenizer(args.tokenizer)
    [prompt] = tokenizer.encode([args.prompt.encode(errors="surrogateescape")])
    require(len(prompt) > 0, "--prompt", args.prompt, "has no tokens")
    config = here(saved.config)
    model = load_model(saved, config, make_mesh(config.mesh))
    tokens, shown = [int(token) for token in prompt], ""
    for token in generate(
        model["params"],
        model["router_bias"]["bias_N"],
        tokens,
        config.model,
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
    ):
        if token == tokenizer.eod:
            break
        tokens.append(token)
        shown = _show(tokenizer.decode(tokens), shown)
    print(_rest(tokenizer.decode(tokens), shown))
    return 0


def _show(text: str, shown: str) -> str:
    """Prints what is new in a text, but for an end that the next token may change; returns what is shown."""
    stable = text.rstrip("\ufffd")
    sys.stdout.write(_rest(stable, shown))
    sys.stdout.flush()
    return stable


def _rest(text: str, shown: str) -> str:
    """What follows what is shown; where the tokenizer has changed that, the whole text on a new line."""
    return text[len(shown) :] if text.startswith(shown) else f"\n{text}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program("generate"), description="Text that a run's model writes after a prompt, until a document ends."
    )
    add = parser.add_argument
    add("run", metavar="RUN", help="a run, by its directory or gs:// address, or one RUN/checkpoints/STEP of it")
    add("--prompt", required=True, metavar="TEXT", help="what the text begins with; a token at least")
    add("--max-tokens", type=int, default=100, metavar="N", help="the most that are added (%(default)s)")
    add("--temperature", type=float, default=0.0, help="0 takes the most probable token each time (%(default)s)")
    add(
        "--top-p",
        type=float,
        default=1.0,
        help="draw from the most probable tokens that together have this probability (%(default)s)",
    )
    add("--seed", type=int, default=0, help="of the random draws (%(default)s)")
    add("--tokenizer", metavar="FILE", help="the run's tokenizer.json, where it is no longer where the run had it")
    add("--cpu-devices", type=int, default=1, metavar="N", help="emulated devices, without accelerators (%(default)s)")
    return parser
