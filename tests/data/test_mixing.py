"""A mixture reads its sources by their weights, whatever the processes; each has its own cache, loss and epochs."""

import dataclasses
import shutil
from collections import Counter

import grain
import numpy as np
import pytest

from laep_jax.config import DataConfig
from laep_jax.data import cache
from laep_jax.data import dataset as dataset_module
from laep_jax.data.corpus import is_validation
from laep_jax.data.dataset import make_dataset
from laep_jax.data.mixing import shares, train_order, validation_order
from laep_jax.data.sources import read_documents
from laep_jax.data.tokenizer import BYTES
from laep_jax.errors import UserError

FRACTION, LENGTH, BATCH = 0.25, 16, 8


@pytest.fixture
def folders(tmp_path):
    """`web` has ten times the text of `code`, each its own letter, in two folders."""
    for name, count in (("web", 100), ("code", 10)):
        for i in range(count):
            path = tmp_path / name / "ab"[i % 2] / f"{i}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name[0] * 120)
    return tmp_path


@pytest.fixture
def config(folders):
    def make(*weights, **changes) -> DataConfig:
        mixture = [(name, str(folders / name), weight) for name, weight in weights]
        fields = {"sequence_length": LENGTH, "batch_size": BATCH, "validation_fraction": FRACTION}
        cache_dir = {"cache_dir": str(folders / "cache")}
        return DataConfig("text", mixture=mixture, **fields | cache_dir | changes)

    return make


def dataset(config, *, process=(0, 1), seed=0, eval_batches=99):
    return make_dataset(
        config,
        eval_batches=eval_batches,
        seed=seed,
        vocab_size=384,
        process_index=process[0],
        process_count=process[1],
    )


def letters(*batches) -> Counter:
    """Rows by the letter that their text is made of."""
    return Counter(chr(next(t for t in row if t < 256)) for batch in batches for row in batch["tokens_BS"])


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1, 3), (5, 1e-2), (1, 1)])
def test_every_stretch_of_rows_has_the_sources_in_their_fractions(weights):
    numbers = [range(1000), range(1000, 1700)]
    order = train_order(numbers, shares(weights), seed=3).batch(1000)
    of_first = np.concatenate([order[0], order[1], order[2]]) < 1000
    for first, last in ((0, 8), (0, 1000), (1000, 1100), (17, 3000)):
        want = (last - first) * weights[0] / sum(weights)
        assert abs(of_first[first:last].sum() - want) <= 1 + 0.005 * want


def test_a_mixture_of_one_is_the_corpus_itself():
    numbers = range(40)
    order = train_order([numbers], [100], seed=5)
    alone = grain.MapDataset.source(numbers).seed(5).shuffle().repeat()
    assert [order[place] for place in range(100)] == [alone[place] for place in range(100)]
    assert sorted(validation_order([numbers], [100], 0, 99)) == list(numbers)


def test_every_epoch_of_every_source_holds_each_of_its_rows_once():
    numbers = [range(10), range(10, 17), range(17, 30)]
    rows = train_order(numbers, shares([0.5, 0.3, 0.2]), seed=1).batch(300)[0].tolist()
    for own in numbers:
        of_source = [row for row in rows if row in own]
        epochs = [of_source[i : i + len(own)] for i in range(0, len(of_source) - len(own) + 1, len(own))]
        assert len(epochs) > 3
        assert all(sorted(epoch) == list(own) for epoch in epochs)
        assert epochs[0] != epochs[1]


def test_the_mixed_order_is_the_same_in_every_version_of_grain():
    """Another order means that a run begun before cannot be resumed: say so in CHANGELOG.md."""
    order = train_order([range(10), range(10, 17)], shares([0.7, 0.3]), seed=0)
    assert [order[place] for place in range(12)] == [1, 2, 4, 11, 5, 9, 12, 7, 8, 14, 6, 0]
    assert [order[place] for place in range(10**6, 10**6 + 5)] == [5, 3, 11, 4, 8]


def test_validation_rows_are_mixed_as_long_as_no_source_ends_and_each_comes_once():
    numbers = [range(1000), range(1000, 1020), range(1020, 1020)]
    rows = validation_order(numbers, shares([0.5, 0.4, 0.1]), 0, 10**6)
    assert sorted(rows) == list(range(1020))
    assert (rows[:36] >= 1000).sum() == 16
    np.testing.assert_array_equal(validation_order(numbers, shares([0.5, 0.4, 0.1]), 0, 50), rows[:50])


@pytest.mark.parametrize("count", [2, 4, 8])
def test_processes_share_the_batch_of_one(config, count):
    mixed = config(("web", 0.5), ("code", 0.5))
    whole = dataset(mixed)
    parts = [dataset(mixed, process=(index, count)) for index in range(count)]
    for step in (0, 7, 1000):
        together = [part.train_batch(step)["tokens_BS"] for part in parts]
        np.testing.assert_array_equal(np.concatenate(together), whole.train_batch(step)["tokens_BS"])
    for index in range(whole.num_validation_batches):
        for field, want in whole.validation_batch(index).items():
            together = np.concatenate([part.validation_batch(index)[field] for part in parts])
            np.testing.assert_array_equal(together, want)
    assert {part.fingerprint for part in parts} == {whole.fingerprint}


def test_weights_are_fractions_of_the_training_rows_whatever_the_sizes(config):
    data = dataset(config(("web", 3), ("code", 1)))
    counted = letters(*(data.train_batch(step) for step in range(50)))
    assert counted == {"w": 300, "c": 100}
    rows = data.batch_rows(3)
    assert {name: len(some) for name, some in rows.items()} == {"web": 6, "code": 2}
    code = data.sources[1].tokens.train
    batch = data.train_batch(3)["tokens_BS"]
    is_code = (batch == ord("c")).any(axis=1)
    for number, row in zip(rows["code"], batch[is_code], strict=True):
        stream = code[number * LENGTH : (number + 1) * LENGTH]
        np.testing.assert_array_equal(row[: len(stream)], stream)
    web, code = (-(-len(source.tokens.train) // LENGTH) for source in data.sources)
    assert data.epochs(50) == pytest.approx({"web": 300 / web, "code": 100 / code})


def test_each_source_is_a_domain_whose_validation_text_is_its_own(config, folders):
    data = dataset(config(("web", 0.9), ("code", 0.1)))
    assert data.domains == ("code", "web")
    targets = Counter()
    for index in range(data.num_validation_batches):
        batch = data.validation_batch(index)
        for target, domain in zip(batch["targets_BS"].ravel(), batch["domains_BS"].ravel(), strict=True):
            if 0 <= target < 256:
                targets[data.domains[domain], chr(target)] += 1
    held = {
        name: sum(is_validation(str(path.relative_to(folders / name)), FRACTION) for path in paths)
        for name in ("web", "code")
        if (paths := list((folders / name).rglob("*.txt")))
    }
    assert targets == {("web", "w"): 119 * held["web"], ("code", "c"): 119 * held["code"]}
    assert [document.domain for document in read_documents(config(("web", 0.9), ("code", 0.1)))] == (
        100 * ["web"] + 10 * ["code"]
    )


def test_few_validation_batches_have_both_sources(config):
    data = dataset(config(("web", 0.5), ("code", 0.5)), eval_batches=1)
    assert letters(data.validation_batch(0)) == {"w": 4, "c": 4}


@pytest.mark.parametrize("eval_batches", [1, 99])
def test_bytes_per_target_are_those_of_each_source(config, monkeypatch, eval_batches):
    """With tokens of two bytes for `web` and of four for `code`, and the end of a document."""

    def encode(texts):
        return [np.full(len(text) // {b"w": 2, b"c": 4}[text[:1]], text[0], np.uint8) for text in texts]

    monkeypatch.setattr(dataset_module, "load_tokenizer", lambda name: dataclasses.replace(BYTES, encode=encode))
    monkeypatch.setattr(dataset_module, "MIN_TARGETS", 0)
    data = dataset(config(("web", 0.5), ("code", 0.5)), eval_batches=eval_batches)
    batches = [data.validation_batch(index) for index in range(data.num_validation_batches)]
    targets = Counter(
        data.domains[domain] for batch in batches for domain in batch["domains_BS"][batch["targets_BS"] >= 0].tolist()
    )
    want = targets["web"] * 120 / 60 + targets["code"] * 120 / 30  # as many targets as tokens
    assert data.bytes_per_target == pytest.approx(want / sum(targets.values()), rel=1e-12)
    assert 2 < data.bytes_per_target < 4


def test_a_source_without_validation_text_is_named_and_all_without_are_refused(config, folders):
    name = next(f"{i}.txt" for i in range(99) if not is_validation(f"{i}.txt", FRACTION))
    (folders / "book").mkdir()
    (folders / "book" / name).write_text("b" * 500)
    data = dataset(config(("web", 0.9), ("book", 0.1)))
    assert data.domains == ("web",)
    assert data.notes[-1] == "no validation text is measured for the domains book"
    assert letters(*(data.train_batch(step) for step in range(10)))["b"] == 8
    message = r"validation_fraction=0.25 leaves no validation document: DataConfig.mixture='book' holds 1$"
    with pytest.raises(UserError, match=message):
        dataset(config(("book", 0.1)))


def test_another_weight_or_source_tokenizes_no_other_source(config, folders, monkeypatch):
    read = []
    survey, streams = cache.survey, cache._write_streams
    monkeypatch.setattr(cache, "survey", lambda part: read.append(part.path) or survey(part))
    monkeypatch.setattr(
        cache, "_write_streams", lambda file, part, *rest: read.append("t") or streams(file, part, *rest)
    )
    dataset(config(("web", 0.5), ("code", 0.5)))
    web, code = str(folders / "web"), str(folders / "code")
    assert read == [web, "t", code, "t"]
    read.clear()
    dataset(config(("code", 0.1), ("web", 9)))
    assert read == []
    (folders / "code" / "new.txt").write_text("c" * 50)
    dataset(config(("web", 0.5), ("code", 0.5)))
    assert read == [code, "t"]
    alone = DataConfig("text", web, validation_fraction=FRACTION, cache_dir=str(folders / "cache"))
    read.clear()
    dataset(alone)
    assert read == []


def test_the_fingerprint_covers_every_source_its_name_and_the_weights(config, folders):
    first = dataset(config(("web", 0.7), ("code", 0.3))).fingerprint
    assert dataset(config(("web", 7), ("code", 3))).fingerprint == first  # the same batches
    others = [
        config(("web", 0.6), ("code", 0.4)),
        config(("code", 0.3), ("web", 0.7)),
        config(("web", 0.7)),
        DataConfig(
            "text",
            mixture=(("net", str(folders / "web"), 0.7), ("code", str(folders / "code"), 0.3)),
            validation_fraction=FRACTION,
            cache_dir=str(folders / "cache"),
        ),
    ]
    prints = {first, *(dataset(other).fingerprint for other in others)}
    assert len(prints) == 5
    moved = shutil.move(folders / "web", folders / "elsewhere")
    mixture = (("web", str(moved), 0.7), ("code", str(folders / "code"), 0.3))
    again = DataConfig("text", mixture=mixture, validation_fraction=FRACTION, cache_dir=str(folders / "cache"))
    assert dataset(again).fingerprint == first
    (folders / "code" / "a" / "0.txt").write_text("other")
    assert dataset(again).fingerprint not in prints
