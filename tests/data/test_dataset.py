"""Batches: the same however many processes there are, all rows each epoch, every validation token once."""

import dataclasses
import shutil
from collections import Counter

import numpy as np
import pytest

from laep_jax.config import DataConfig
from laep_jax.data import dataset as dataset_module
from laep_jax.data.corpus import is_validation
from laep_jax.data.dataset import make_dataset
from laep_jax.data.tokenizer import BYTES
from laep_jax.errors import UserError

FIELDS = {"tokens_BS", "targets_BS", "segments_BS", "positions_BS"}


def dataset(config, *, seed=0, process=(0, 1), vocab_size=384, eval_batches=99):
    return make_dataset(
        config,
        eval_batches=eval_batches,
        seed=seed,
        vocab_size=vocab_size,
        process_index=process[0],
        process_count=process[1],
    )


def same(a, b):
    return all(np.array_equal(a[name], b[name]) for name in FIELDS)


def joined(batches):
    return {name: np.concatenate([batch[name] for batch in batches]) for name in FIELDS}


def rows(batch):
    """Each row as something to count."""
    return [row.tobytes() for row in np.stack([batch[name] for name in sorted(FIELDS)], axis=1)]


def test_shapes_and_ranges(config):
    whole, last = dataset(config()), dataset(config(), process=(3, 4))
    for batches, number in ((whole, 8), (last, 2)):
        for batch in (batches.train_batch(5), batches.validation_batch(0)):
            assert batch.keys() - {"domains_BS"} == FIELDS
            assert all(x.shape == (number, 16) and x.dtype == np.int32 for x in batch.values())
            assert batch["tokens_BS"].min() >= 0
            assert batch["tokens_BS"].max() <= 256
            assert batch["targets_BS"].max() <= 256


@pytest.mark.parametrize("count", [2, 4, 8])
def test_processes_share_the_batch_of_one(config, count):
    whole = dataset(config())
    parts = [dataset(config(), process=(index, count)) for index in range(count)]
    for step in (0, 3, 1000):
        assert same(joined([part.train_batch(step) for part in parts]), whole.train_batch(step))
    for index in range(whole.num_validation_batches):
        batches = [part.validation_batch(index) for part in parts]
        assert same(joined(batches), whole.validation_batch(index))
        domains = np.concatenate([batch["domains_BS"] for batch in batches])
        np.testing.assert_array_equal(domains, whole.validation_batch(index)["domains_BS"])
    assert {part.fingerprint for part in parts} == {whole.fingerprint}


def test_a_batch_needs_none_before_it(config):
    walked = dataset(config())
    for step in range(8):
        batch = walked.train_batch(step)
    assert same(batch, dataset(config()).train_batch(7))
    assert same(batch, walked.train_batch(7))


def test_an_epoch_holds_every_token_once_and_the_next_in_another_order(config, texts):
    data = dataset(config(batch_size=1))
    number = sum(len(text) + 1 for text in texts[0])
    rows_an_epoch = -(-number // 16)
    epochs = [joined([data.train_batch(e * rows_an_epoch + i) for i in range(rows_an_epoch)]) for e in range(3)]
    stream = Counter(byte for text in texts[0] for byte in [*text, 256])
    for epoch in epochs:
        assert Counter(epoch["tokens_BS"][epoch["segments_BS"] > 0].tolist()) == stream
        assert Counter(rows(epoch)) == Counter(rows(epochs[0]))
    orders = [rows(epoch) for epoch in epochs]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_other_numbers_of_processes_within_an_epoch_neither_repeat_nor_skip_a_row(config, texts):
    parts = {count: [dataset(config(), process=(index, count)) for index in range(count)] for count in (1, 2, 4)}
    rows_an_epoch = -(-sum(len(text) + 1 for text in texts[0]) // 16)
    steps = -(-rows_an_epoch // 8)  # the last batch of 8 reaches into the next epoch
    read = []
    for step in range(steps):
        count = (2, 4, 1)[3 * step // steps]
        read += [row for p in parts[count] for row in p.train_order[step * count + p.process_index].tolist()]
    assert sorted(read[:rows_an_epoch]) == list(range(rows_an_epoch))


def test_the_order_is_the_same_in_every_version_of_grain(config):
    """Another order means that a run begun before cannot be resumed: say so in CHANGELOG.md."""
    data = dataset(config(batch_size=4))
    assert len(data.train_order[0]) == 4
    assert [data.train_order[step].tolist() for step in (0, 1000)] == [[297, 371, 234, 141], [8, 340, 328, 66]]
    assert [data.validation_order[i] for i in range(4)] == [96, 77, 31, 109]


def test_batches_go_through_the_epochs_without_a_gap(config):
    one, eight = dataset(config(batch_size=1)), dataset(config())
    for step in (0, 1, 40, 41):
        assert same(joined([one.train_batch(8 * step + i) for i in range(8)]), eight.train_batch(step))


def test_seeds_differ_in_the_order_of_training_only(config):
    first, again, other = dataset(config(), seed=1), dataset(config(), seed=1), dataset(config(), seed=2)
    assert same(first.train_batch(0), again.train_batch(0))
    assert not same(first.train_batch(0), other.train_batch(0))
    assert same(first.validation_batch(0), other.validation_batch(0))
    assert first.fingerprint == other.fingerprint


def test_every_validation_token_is_counted_once(config, texts):
    data = dataset(config())
    batches = [data.validation_batch(index) for index in range(data.num_validation_batches)]
    targets = Counter(int(t) for batch in batches for t in batch["targets_BS"].ravel() if t >= 0)
    assert targets == Counter(byte for text in texts[1] for byte in [*text, 256][1:])
    number = sum(len(text) + 1 for text in texts[1])
    assert sum(int((batch["segments_BS"] > 0).sum()) for batch in batches) == number
    assert data.num_validation_batches == -(-number // (8 * 16))
    assert (batches[-1]["segments_BS"] == 0).any(), "the corpus no longer tests the padding of the last batch"


def test_the_prompt_is_the_beginning_of_the_first_validation_document(config, texts):
    data = dataset(config())
    first = texts[1][0]
    for number in (1, 3, 10**6):
        assert data.prompt(number).tolist() == [*first[:number]]
        assert data.text(data.prompt(number)) == first[:number].decode(errors="replace")
    assert data.text(np.array([*b"ab", 256, *b"cd"])) == "ab"


def test_every_validation_target_has_the_domain_of_its_document(config, folder):
    data = dataset(config())
    assert data.domains == ("even", "odd")
    counts = [Counter(), Counter()]
    for index in range(data.num_validation_batches):
        batch = data.validation_batch(index)
        assert batch["domains_BS"].dtype == np.int32
        for target, domain in zip(batch["targets_BS"].ravel(), batch["domains_BS"].ravel(), strict=True):
            counts[domain][int(target)] += target >= 0
    for domain, name in enumerate(data.domains):
        paths = [path for path in (folder / name).iterdir() if is_validation(f"{name}/{path.name}", 0.25)]
        assert paths
        assert +counts[domain] == Counter(byte for path in paths for byte in [*path.read_bytes(), 256][1:])
    assert "domains_BS" not in data.train_batch(0)


def test_a_tokenizer_that_ends_a_document_inside_it_is_refused(config, monkeypatch):
    odd = dataclasses.replace(BYTES, identity="odd", eod=ord("d"))  # as one with </s> among its words would
    monkeypatch.setattr(dataset_module, "load_tokenizer", lambda name: odd)
    with pytest.raises(UserError, match=r"DataConfig.tokenizer='bytes' writes the end of a document, token 100, also"):
        dataset(config())


def test_small_domains_are_pooled_and_those_without_validation_text_named(config, folder):
    for i in range(40):
        (folder / f"small {i}").mkdir()
        (folder / f"small {i}" / "x.txt").write_text("x" * (i + 1))
    data = dataset(config())
    assert data.domains == ("(other)", "even", "odd")
    held = sorted(name for i in range(40) if is_validation(f"{(name := f'small {i}')}/x.txt", 0.25))
    unheld = sorted({f"small {i}" for i in range(40)}.difference(held))
    assert data.notes == [
        f"no validation text is measured for the domains {', '.join(unheld[:8])}, ... ({len(unheld)})",
        f"(other) pools, for fewer than 100 validation targets each, the domains {', '.join(held)}",
    ]


@pytest.mark.parametrize("eval_batches", [1, 3])
def test_domains_are_those_of_the_batches_that_are_measured(config, folder, monkeypatch, eval_batches):
    monkeypatch.setattr(dataset_module, "MIN_TARGETS", 0)
    for i in range(40):
        (folder / f"{i}").mkdir()
        (folder / f"{i}" / "x.txt").write_text("x" * 20)
    parts = [dataset(config(), eval_batches=eval_batches, process=(index, 2)) for index in range(2)]
    batches = [part.validation_batch(index) for part in parts for index in range(part.num_validation_batches)]
    measured = {index for batch in batches for index in batch["domains_BS"][batch["targets_BS"] >= 0].tolist()}
    assert len(batches) == 2 * eval_batches
    assert [part.domains for part in parts] == 2 * [parts[0].domains]
    assert measured == set(range(len(parts[0].domains)))


def test_one_small_domain_keeps_its_name(config, folder):
    name = next(f"few/{i}.txt" for i in range(99) if is_validation(f"few/{i}.txt", 0.25))
    (folder / "few").mkdir()
    (folder / name).write_text("few")
    data = dataset(config())
    assert (data.domains, data.notes) == (("even", "few", "odd"), [])


def test_what_is_read_once_is_named(config, folder):
    (folder / "latest").symlink_to("odd")
    data = dataset(config())
    assert data.notes == ["read once, under another name: latest"]
    assert data.domains == ("even", "odd")


@pytest.mark.parametrize(
    ("side", "message"),
    [
        (1, r"DataConfig.validation_fraction=0.25 leaves nothing to predict in the validation text of \d+ batches"),
        (0, "DataConfig.tokenizer='bytes' makes no training document longer than one token, so that"),
    ],
)
def test_text_without_a_target_is_refused(config, texts, monkeypatch, side, message):
    def encode(some):  # as a tokenizer that drops what it does not know
        return [np.frombuffer(b"" if text in texts[side] else text, np.uint8) for text in some]

    monkeypatch.setattr(dataset_module, "load_tokenizer", lambda name: dataclasses.replace(BYTES, encode=encode))
    with pytest.raises(UserError, match=message):
        dataset(config())


def test_a_few_validation_batches_come_from_many_documents(config, texts):
    data = dataset(config(validation_fraction=0.5))
    first = data.validation_batch(0)["tokens_BS"]
    in_order = data.sources[0].tokens.validation[: 8 * 16].reshape(8, 16)
    assert not np.array_equal(first, in_order)


def test_fewer_rows_than_a_batch_are_repeated(tmp_path):
    for name in "abcd":
        (tmp_path / name).write_text(name * 3)
    config = DataConfig(
        "text", str(tmp_path), validation_fraction=0.3, sequence_length=8, batch_size=8, cache_dir=str(tmp_path / ".c")
    )
    batch = dataset(config).train_batch(0)
    assert len(set(rows(batch))) < 8
    assert (batch["targets_BS"] >= 0).any(axis=1).all()


def test_fingerprint_follows_text_and_tokenizer(config, folder):
    before = dataset(config())
    assert dataset(config(batch_size=4)).fingerprint == before.fingerprint
    copied = config(path=str(shutil.copytree(folder, folder.parent / "copy")), cache_dir=str(folder.parent / "new"))
    assert dataset(copied).fingerprint == before.fingerprint
    path = folder / "odd" / "01.txt"
    path.write_text(path.read_text().swapcase())
    assert dataset(config()).fingerprint != before.fingerprint


def test_description_is_one_line_that_says_what_was_read(config, texts, folder):
    text = dataset(config()).description
    assert text.startswith(f"{folder}: {len(texts[0])} + {len(texts[1])} validation documents, 0.0 MB, ")
    assert "tokens (bytes), sha256 " in text
    assert "\n" not in text


def test_standard_library_is_the_default(tmp_path):
    data = dataset(DataConfig(cache_dir=str(tmp_path)))
    assert data.description.startswith("Python 3.")
    assert data.train_batch(0)["tokens_BS"].shape == (32, 128)
    assert data.num_validation_batches >= 8


def test_refusals(config):
    message = "=1e-09 leaves no validation document: DataConfig.path='.*texts' holds 40, since a text file is one$"
    with pytest.raises(UserError, match=message):
        dataset(config(validation_fraction=1e-9))
    with pytest.raises(UserError, match=r"ModelConfig.vocab_size=256 is below the tokenizer's 257"):
        dataset(config(), vocab_size=256)
    with pytest.raises(UserError, match=r"DataConfig.batch_size=8 is not divisible by 3 processes"):
        dataset(config(), process=(0, 3))
