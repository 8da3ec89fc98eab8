"""A run on a mixture, with a tokenizer whose tokens are not bytes: resumed, measured, and held against `evaluate`."""

import json

import numpy as np
import pytest

from laep_jax.data.command import main as train_tokenizer
from laep_jax.data.dataset import make_dataset
from laep_jax.errors import UserError
from laep_jax.evaluation.command import main as evaluate
from laep_jax.training import loop
from laep_jax.training.start import train
from tests.support.tiny_run import change, differences, records, tiny_config
from tests.support.watching import InterruptError, after, interrupt

NUM_STEPS = 8


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("mixture"), np.random.default_rng(0)
    for name, count in (("web", 60), ("code", 30)):
        (root / name).mkdir()
        for index in range(count):
            words = rng.choice([f"{name}{i}{'x' * (i % 3)}" for i in range(20)], size=40)
            (root / name / f"{index}.txt").write_text(" ".join(words))
    arguments = ["--source=text", f"--path={root}", "--vocab-size=384", f"--out={root / 'tok.json'}"]
    assert train_tokenizer(arguments) == 0
    return tiny_config(
        str(root / "tokens"),
        model={"num_layers": 1, "num_experts": 8},
        laep={"max_prunes": 0},
        data={
            "source": "text",
            "mixture": (("web", str(root / "web"), 0.25), ("code", str(root / "code"), 0.75)),
            "tokenizer": str(root / "tok.json"),
            "validation_fraction": 0.2,
        },
        train={"num_steps": NUM_STEPS, "eval_every": 4, "eval_batches": 99, "checkpoint_every": 3, "seed": 4},
    )


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    """Uninterrupted; every loss counts as a spike."""
    run_dir = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "is_spike", lambda loss, recent: True)
        train(config, run_dir)
    return run_dir


def dataset(config):
    train = config.train
    return make_dataset(
        config.data,
        eval_batches=train.eval_batches,
        seed=train.seed,
        vocab_size=384,
        process_index=0,
        process_count=1,
    )


def test_resumed_it_ends_as_if_it_had_not_been_interrupted(config, run, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "is_spike", lambda loss, recent: True)
    for step in (5, 7):
        with pytest.raises(InterruptError):
            train(config, tmp_path, watch=after("record", step, interrupt))
    train(config, tmp_path)
    assert not differences(tmp_path, run)


def test_other_weights_are_another_run(config, run):
    mixture = [(name, path, weight + 0.5) for name, path, weight in config.data.mixture]
    changed = change(config, data={"mixture": mixture}, train={"num_steps": NUM_STEPS + 1})
    message = r": the corpus: other text; DataConfig\.mixture \(\('web', .* use another workdir$"
    with pytest.raises(UserError, match=message):
        train(changed, run)


def test_rows_and_epochs_are_logged_by_source(config, run):
    data, spikes, trained = dataset(config), records(run, "spike"), records(run, "train")
    assert len(spikes) == len(trained) == NUM_STEPS
    for step, (spike, record) in enumerate(zip(spikes, trained, strict=True)):
        assert spike["rows"] == {name: rows.tolist() for name, rows in data.batch_rows(step).items()}
        assert {name: len(rows) for name, rows in spike["rows"].items()} == {"web": 4, "code": 12}
        assert record["epochs"] == pytest.approx(12 * (step + 1) / -(-len(data.sources[1].tokens.train) // 32))
    for record in records(run, "eval"):
        assert record["epochs_by_source"] == data.epochs(record["step"])
        assert record["validation_loss_by_domain"].keys() == {"web", "code"}
    assert json.loads((run / "summary.json").read_text())["epochs_by_source"] == data.epochs(NUM_STEPS)


def test_bits_per_byte_are_those_of_evaluate(run, capsys):
    """All validation text is measured; a token has about three bytes."""
    assert evaluate([str(run), "--json", "--cpu-devices=8"]) == 0
    found, logged = json.loads(capsys.readouterr().out), records(run, "eval")[-1]
    assert logged["when"] == "end"
    assert found["domains"].keys() == {"web", "code"}
    np.testing.assert_allclose(found["loss"], logged["validation_loss"], rtol=1e-6)
    np.testing.assert_allclose(found["bits_per_byte"], logged["validation_bits_per_byte"], rtol=1e-6)
    assert found["bytes"] > 2 * found["tokens"]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["validation_bits_per_byte_end"] == logged["validation_bits_per_byte"]
