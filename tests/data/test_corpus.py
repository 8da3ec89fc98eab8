"""The split depends on names alone; the hash on everything; a side without documents is refused."""

import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from laep_jax.config import DataConfig
from laep_jax.data.corpus import is_validation, survey
from laep_jax.data.domains import domain
from laep_jax.data.sources import read_documents
from laep_jax.errors import UserError


def validation(config):
    return {name for name, *_ in read_documents(config) if is_validation(name, config.validation_fraction)}


@given(st.floats(0, 1), st.floats(0, 1), st.text())
def test_a_larger_share_holds_out_more(low, high, name):
    low, high = sorted((low, high))
    assert is_validation(name, low) <= is_validation(name, high)
    assert is_validation(name, 1.0)
    assert not is_validation(name, 0.0)


@pytest.mark.parametrize("share", [0.01, 0.05, 0.5, 0.9])
def test_share_is_that_of_the_names(share):
    number = sum(is_validation(f"{i}.txt", share) for i in range(20_000))
    assert abs(number - 20_000 * share) < 4 * (20_000 * share * (1 - share)) ** 0.5  # 4 standard deviations


def test_split_ignores_neighbours_and_where_the_corpus_lies(folder, config, tmp_path):
    whole, names = validation(config()), {name for name, *_ in read_documents(config())}
    assert 0 < len(whole) < len(names)
    moved = tmp_path / "elsewhere"
    shutil.copytree(folder, moved)
    shutil.rmtree(moved / "even")
    assert validation(config(path=str(moved))) == {name for name in whole if name.startswith("odd")}
    assert validation(config(path=f"{folder}/**/*.txt")) == whole


def test_survey_counts_and_its_hash_covers_names_and_texts(folder, config, texts):
    first = survey(config())
    assert (first.num_train, first.num_validation) == tuple(len(side) for side in texts)
    assert first.num_bytes == sum(len(text) for side in texts for text in side)
    assert survey(config()) == first
    hashes = {first.sha256}
    (folder / "odd" / "01.txt").rename(folder / "odd" / "02.txt")
    hashes.add(survey(config()).sha256)
    (folder / "odd" / "02.txt").write_text("other")
    hashes.add(survey(config()).sha256)
    assert len(hashes) == 3


@pytest.mark.parametrize(
    ("name", "source", "expected"),
    [
        ("json/decoder.py", "stdlib", "json"),
        ("xml/dom/minidom.py", "stdlib", "xml"),
        ("abc.py", "stdlib", "(modules)"),
        ("books/a.txt", "text", "books"),
        ("a.txt", "text", "."),
        ("web/de/a.jsonl#12", "jsonl", "web"),
        ("a#b.jsonl#12", "jsonl", "a#b.jsonl"),
        ("a#b/c.jsonl#12", "jsonl", "a#b"),
        ("a.array_record#0", "array_record", "a.array_record"),
        ("topic-03/0007", "synthetic", "topic-03"),
        ("b\udcffd/a.txt", "text", r"b\udcffd"),
        ("a\n\x1b[31m/b.txt", "text", r"a\n\x1b[31m"),
        ("книги/a.txt", "text", "книги"),
        ("\udcff.jsonl#1", "jsonl", r"\udcff.jsonl"),
        ("(other)/a.txt", "text", "./(other)"),  # the pool of small domains has that name
        ("#1#7", "jsonl", "#*"),
        ("part-00001-of-01024.jsonl#7", "jsonl", "part-*-of-*.jsonl"),
        ("c4.00017.json#7", "jsonl", "c*.*.json"),
        ("p-00003-1f0e8a7c-0b1d-4cde-9a2b-aabbccddeeff-c000.json#7", "jsonl", "p-*-*-c*.json"),
        ("web-9f86d081.jsonl#7", "jsonl", "web-*.jsonl"),
        ("data-2/part-00001.jsonl#7", "jsonl", "data-2"),
    ],
)
def test_a_domain_is_the_first_folder_or_the_file(name, source, expected):
    assert domain(name, source) == expected


def test_survey_names_the_domains_of_validation_documents_in_order_and_those_without_any(config, folder):
    (folder / "rare").mkdir()
    name = next(f"rare/{i}.txt" for i in range(100) if not is_validation(f"rare/{i}.txt", 0.25))
    (folder / name).write_text("training text only")
    names = [name for name, *_ in read_documents(config()) if is_validation(name, 0.25)]
    corpus = survey(config())
    assert corpus.validation_runs == tuple(
        (k, names_k, sum(len((folder / name).read_bytes()) for name in names if name.startswith(k)))
        for k in ("even", "odd")
        if (names_k := sum(n.startswith(k) for n in names))
    )
    assert corpus.unheld_domains == ("rare",)


@pytest.mark.parametrize(("source", "text"), [("text", ""), ("jsonl", "\n\n")])
def test_a_corpus_without_text_is_refused(tmp_path, source, text):
    (tmp_path / "x").write_text(text)
    with pytest.raises(UserError, match=r"DataConfig.path='.*' holds no text"):
        survey(DataConfig(source, str(tmp_path)))


def test_a_corpus_without_training_documents_is_refused(config):
    message = r"DataConfig.validation_fraction=0.999.* leaves no training document: DataConfig.path='.*texts' holds 40$"
    with pytest.raises(UserError, match=message):
        survey(config(validation_fraction=1 - 1e-9))
