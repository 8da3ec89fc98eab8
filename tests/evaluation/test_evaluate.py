"""The loss of a checkpoint on any text: against what the run itself logged, and against the sum over its logits."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from laep_jax.checkpoint.saved import Saved
from laep_jax.errors import UserError
from laep_jax.evaluation.command import main
from laep_jax.evaluation.scoring import here, load_model
from laep_jax.export.tokenizer import _bytes_tokenizer
from laep_jax.model.transformer import logits
from laep_jax.sharding import make_mesh
from laep_jax.state.tree import initial_layout
from laep_jax.training.start import train
from tests.support.tiny_run import change, records, tiny_config

PLAN_STEP, NUM_STEPS = 6, 10


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Pruned in between, with all of its validation text measured; files of four domains."""
    root = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(0)
    for index in range(120):
        path = root / "text" / "abcd"[index % 4] / f"{index}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        letters = rng.integers(97 + 4 * (index % 4), 103 + 4 * (index % 4), size=150)
        path.write_bytes(bytes(letters.tolist()))
    config = tiny_config(
        str(root / "tokens"),
        laep={"prune_at_step": PLAN_STEP, "prune_delay": 0},
        train={"num_steps": NUM_STEPS, "eval_batches": 99, "checkpoint_every": 3},
    )
    data = {"source": "text", "path": str(root / "text"), "validation_fraction": 0.3}
    train(change(config, data=data), root / "run")
    return root / "run"


def evaluated(capsys, *arguments: str) -> dict:
    assert main([*map(str, arguments), "--json", "--cpu-devices=8"]) == 0
    return json.loads(capsys.readouterr().out)


def test_on_its_validation_text_a_run_has_the_loss_that_it_logged(run, capsys):
    found = evaluated(capsys, run)
    [*_, logged] = records(run, "eval")
    assert (found["step"], logged["step"]) == (NUM_STEPS, NUM_STEPS)
    np.testing.assert_allclose(found["loss"], logged["validation_loss"], rtol=1e-6)
    np.testing.assert_allclose(found["bits_per_byte"], logged["validation_bits_per_byte"], rtol=1e-6)
    by_domain = {name: each["loss"] for name, each in found["domains"].items()}
    assert by_domain.keys() == set("abcd")
    for name, loss in logged["validation_loss_by_domain"].items():
        np.testing.assert_allclose(by_domain[name], loss, rtol=1e-5)


def test_masked_by_a_plan_an_earlier_checkpoint_has_the_loss_of_the_dry_run(run, capsys):
    """The checkpoint at the prune is of the old model."""
    [prune] = records(run, "prune")
    whole = evaluated(capsys, run / "checkpoints" / str(PLAN_STEP))
    masked = evaluated(capsys, run / "checkpoints" / str(PLAN_STEP), f"--masked={run / prune['plan']}")
    logged = {record["when"]: record["validation_loss"] for record in records(run, "eval")}
    np.testing.assert_allclose(whole["loss"], logged["before_prune"], rtol=1e-6)
    np.testing.assert_allclose(masked["loss"], logged["after_prune"], rtol=1e-6)
    assert masked["loss"] != whole["loss"]
    with pytest.raises(UserError, match=rf"^experts of .*/{PLAN_STEP}\.json=\(8, 8\) are not the run's \("):
        main([str(run), f"--masked={run / prune['plan']}", "--cpu-devices=8"])


def test_bits_per_byte_are_the_sum_over_the_logits(run, tmp_path, capsys):
    texts = {"x/one.txt": b"abcabcabc hello", "x/two.txt": b"dddd", "y/three.txt": "wörld".encode()}
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text)
    found = evaluated(capsys, run, f"--data={tmp_path}")
    saved = Saved(str(run))
    config = here(saved.config)
    mesh = make_mesh(config.mesh)
    model, layout = load_model(saved, config, mesh), initial_layout(config)
    forward = jax.jit(functools.partial(logits, config=config.model, mesh=mesh))
    nats = dict.fromkeys("xy", 0.0)
    for name, text in texts.items():
        row = np.zeros((8, 32), np.int32)
        row[:, : len(text)] = list(text)
        batch = {
            "tokens_BS": jnp.asarray(row),
            "segments_BS": jnp.asarray((np.arange(32) < len(text)).astype(np.int32) * np.ones_like(row)),
            "positions_BS": jnp.broadcast_to(jnp.arange(32, dtype=jnp.int32), row.shape),
        }
        shares = jax.nn.log_softmax(forward(model["params"], model["router_bias"], layout, batch)[0])
        targets = [*text[1:], 256]
        nats[name[0]] -= float(sum(shares[place, target] for place, target in enumerate(targets)))
    for name, number in (("x", 19), ("y", 6)):
        each = found["domains"][name]
        assert (each["bytes"], each["tokens"]) == (number, number)
        np.testing.assert_allclose(each["bits_per_byte"], nats[name] / math.log(2) / number, rtol=1e-5)
    np.testing.assert_allclose(found["loss"], sum(nats.values()) / 25, rtol=1e-5)


def test_the_table_names_every_domain_and_all(run, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"body": "abc"}\n{"body": "bcd"}\n')
    (tmp_path / "b.jsonl").write_text('{"body": "xyz"}\n')
    main([str(run), f"--data={tmp_path}", "--source=jsonl", "--text-field=body", "--cpu-devices=8"])
    head, titles, *rows = capsys.readouterr().out.splitlines()
    assert head == f"{run}, step {NUM_STEPS}"
    assert titles.split() == ["domain", "tokens", "bytes", "nats/token", "bits/byte"]
    assert [row.split()[:3] for row in rows] == [["a.jsonl", "6", "6"], ["b.jsonl", "3", "3"], ["all", "9", "9"]]


def test_no_document_is_read_after_the_last_token(run, tmp_path, capsys):
    (tmp_path / "text").mkdir()
    for name in "abcde":
        (tmp_path / "text" / f"{name}.txt").write_text("abcdefghi")  # ten tokens with its end
    for most, documents in ((1, 1), (10, 1), (11, 2), (49, 5), (99, 5)):
        main([str(run), f"--data={tmp_path / 'text'}", f"--max-tokens={most}", "--json", "--cpu-devices=8"])
        assert json.loads(capsys.readouterr().out)["bytes"] == 9 * documents


def test_what_cannot_be_read_is_refused(run, tmp_path):
    other = tmp_path / "other.json"
    other.write_bytes(_bytes_tokenizer())
    for arguments, message in (
        ([str(tmp_path / "none")], "^there is no .*/none$"),
        ([str(run / "checkpoints")], r"^.*/checkpoints is no run: it has no metrics\.jsonl$"),
        ([str(run), f"--tokenizer={other}"], "^--tokenizer='.*/other.json' is not the tokenizer of .*/run$"),
        ([str(run), "--tokenizer=none"], "^--tokenizer='none' is not a file$"),
        ([str(run), f"--data={tmp_path / 'none'}"], "^DataConfig.path='.*/none' is neither a file"),
        ([str(run), "--source=jsonl"], "^--source='jsonl' needs --data$"),
        ([str(run), "--data="], "^DataConfig.path='' "),
        ([str(run), "--max-tokens=0"], "^--max-tokens=0 must be positive$"),
        ([str(run), "--cpu-devices=0"], "^emulated devices=0 must be at least 1$"),
    ):
        with pytest.raises(UserError, match=message):
            main(["--cpu-devices=8", *arguments])
