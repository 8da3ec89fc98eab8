"""The tasks of `experiments/tasks/`: items of validation text only, and lm_eval's scores against laep_jax's own."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import task_data
from experiments.scores import METRICS, TASKS, score
from experiments.task_data import CHOICES, FOLDER, make_items, validation_documents, write_items
from laep_jax.checkpoint.saved import Saved
from laep_jax.data.corpus import is_validation
from laep_jax.data.sources import read_documents
from laep_jax.data.tokenizer import BYTES
from laep_jax.errors import UserError
from laep_jax.evaluation.scoring import read_text, total
from laep_jax.evaluation.scoring import score as laep_score
from tests.huggingface.test_export import Run, export

LENGTH, FRACTION = 160, 0.4
LIMIT = 8  # items of a task
PACKAGES = ("json", "http", "xml", "logging", "wsgiref", "email", "unittest")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """A model of bytes with random weights; its corpus are some packages of the standard library."""
    root = tmp_path_factory.mktemp("run")
    for package in PACKAGES:
        (root / "corpus" / package).parent.mkdir(exist_ok=True)
        os.symlink(Path(sysconfig.get_path("stdlib")) / package, root / "corpus" / package)
    data = {"source": "text", "path": f"{root}/corpus/*/*.py", "sequence_length": LENGTH}
    return Run(root, "lfa", data=data | {"validation_fraction": FRACTION})


@pytest.fixture(scope="module")
def items(run):
    return make_items(validation_documents(run.config), run.config)


def test_items_are_of_validation_text_only_and_always_the_same(run, items):
    documents = {document.name: document.text.decode() for document in read_documents(run.config.data)}
    assert {is_validation(name, FRACTION) for name in documents} == {True, False}
    assert items.keys() == METRICS.keys() == {path.stem for path in TASKS.glob("*.yaml")}
    assert items == make_items(validation_documents(run.config), run.config)
    for name, of_task in items.items():
        assert len(of_task) > (5 if name == "laep_bits_per_byte" else 200)
        for item in of_task:
            assert is_validation(item["document"], FRACTION)
            text = item["context"] + item["choices"][item["answer"]] if "choices" in item else item["text"]
            assert text in documents[item["document"]]


def test_one_of_four_choices_is_right_and_each_place_is_as_frequent(items):
    for name in ("laep_next_line", "laep_identifier"):
        right = [item["answer"] for item in items[name]]
        assert set(np.bincount(right)) <= {len(right) // CHOICES, len(right) // CHOICES + 1}
        for item in items[name]:
            assert len(set(item["choices"])) == CHOICES
            assert max(len((item["context"] + choice).encode()) for choice in item["choices"]) <= LENGTH
            above = [choice.strip() in item["context"] for choice in item["choices"]]
            assert not any(above[: item["answer"]] + above[item["answer"] + 1 :])
            if name == "laep_identifier":
                assert above[item["answer"]]
                assert len({len(choice) for choice in item["choices"]}) == 1
            else:
                assert len({len(choice) - len(choice.lstrip()) for choice in item["choices"]}) == 1


def logprobs(run: Run, items: list[dict]) -> np.ndarray:
    """By the logits of laep_jax, of each choice, [items, CHOICES]; as in lm_eval, with the space before it."""
    texts = [(item["context"] + choice).encode() for item in items for choice in item["choices"]]
    tokens = np.array([[*text, *[0] * (LENGTH - len(text))] for text in texts])
    shares = np.concatenate(
        [np.asarray(jax.nn.log_softmax(run.logits(part))) for part in np.split(tokens, len(tokens) // 16)]
    )
    contexts = [len(item["context"].rstrip().encode()) for item in items for _ in item["choices"]]
    sums = [
        shares[row, range(first - 1, len(text) - 1), list(text[first:])].sum()
        for row, (text, first) in enumerate(zip(texts, contexts, strict=True))
    ]
    return np.reshape(sums, (len(items), CHOICES))


@pytest.mark.slow
def test_lm_eval_scores_an_exported_model_as_laep_jax_does(run, items, monkeypatch):
    monkeypatch.setattr(task_data, "MAX_ITEMS", 100)
    monkeypatch.setattr(task_data, "MAX_BYTES", 2000)
    few = make_items(validation_documents(run.config), run.config)
    assert few["laep_next_line"] == items["laep_next_line"][:100]
    found = score(Path(run.root))
    for name in ("laep_next_line", "laep_identifier"):
        chosen = logprobs(run, few[name]).argmax(axis=1)
        accuracy = np.mean(chosen == [item["answer"] for item in few[name]])
        assert found[name] == pytest.approx(accuracy, abs=0.011)  # one near tie
        assert abs(found[name] - 1 / CHOICES) < 0.15  # chance, for random weights
    documents = [
        document._replace(text=item["text"].encode())
        for document, item in zip(validation_documents(run.config), items["laep_bits_per_byte"], strict=True)
    ]
    want = total(laep_score(Saved(run.root), read_text([documents], BYTES, 10**9), BYTES))
    assert found["laep_bits_per_byte"] == pytest.approx(want.bits_per_byte, rel=0.02)  # ends and rows lie elsewhere


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_command_of_the_documentation(run, items, tmp_path):
    """`python -m experiments.task_data RUN`, then lm_eval from the same folder: each choice has its probability."""
    export(run, tmp_path / "model")
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    paths = [str(TASKS.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | offline | {"PYTHONPATH": os.pathsep.join(paths)}

    def call(*command: str) -> str:
        options = {"env": environment, "cwd": tmp_path, "capture_output": True, "text": True, "timeout": 300}
        done = subprocess.run([sys.executable, "-m", *command], **options)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "runs/tasks/laep_next_line.jsonl: 400 items" in call("experiments.task_data", run.root)
    for name, of_task in items.items():
        assert read_lines(tmp_path / FOLDER / f"{name}.jsonl") == of_task
    told = call(
        "lm_eval",
        "--model=hf",
        "--model_args=pretrained=model,trust_remote_code=True",
        "--device=cpu",
        f"--limit={LIMIT}",
        "--log_samples",
        "--output_path=scores",
        "--tasks=laep_next_line,laep_identifier,laep_bits_per_byte",
        f"--include_path={TASKS}",
    )
    assert all(f"|{name}" in told for name in METRICS)
    for name in ("laep_next_line", "laep_identifier"):
        [path] = (tmp_path / "scores").rglob(f"samples_{name}_*.jsonl")
        samples = sorted(read_lines(path), key=lambda sample: sample["doc_id"])
        assert [sample["doc"] for sample in samples] == items[name][:LIMIT]
        found = [[float(response[0][0]) for response in sample["resps"]] for sample in samples]
        np.testing.assert_allclose(found, logprobs(run, items[name][:LIMIT]), rtol=1e-4)


def test_text_that_is_too_little_is_refused(run, tmp_path):
    config = run.config
    documents = list(validation_documents(config))[:1]
    with pytest.raises(UserError, match=r"^laep_next_line: no item in 1 validation documents; it needs"):
        make_items(documents, config)
    assert list(tmp_path.iterdir()) == []
    assert write_items(config, tmp_path)["laep_next_line"] == 400
