"""The cache holds each side's documents, is made once, and no damage to it is ever used."""

import dataclasses
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from laep_jax.data import cache
from laep_jax.data.cache import DIGEST, HEADER, open_tokens
from laep_jax.data.corpus import survey
from laep_jax.data.tokenizer import BYTES
from laep_jax.errors import UserError


def files(config):
    return sorted(Path(config.cache_dir).iterdir())


def counting(calls, **changes):
    def encode(texts):
        calls.append(len(texts))
        return BYTES.encode(texts)

    return dataclasses.replace(BYTES, encode=encode, **changes)


def test_holds_both_sides_in_order(config, texts):
    tokens = open_tokens(config(), survey(config()), BYTES)
    for stream, side in zip((tokens.train, tokens.heldout), texts, strict=True):
        assert stream.tolist() == [token for text in side for token in [*text, 256]]
        assert stream.dtype == np.uint16


def test_many_documents_keep_their_order(config, texts, monkeypatch):
    monkeypatch.setattr(cache, "DOCUMENTS_AT_ONCE", 7)
    tokens = open_tokens(config(), survey(config()), BYTES)
    assert tokens.train.tolist() == [token for text in texts[0] for token in [*text, 256]]


def test_a_second_opening_does_not_tokenize(config):
    calls, corpus = [], survey(config())
    first = open_tokens(config(), corpus, counting(calls))
    assert sum(calls) == 40
    assert len(files(config())) == 1
    second = open_tokens(config(sequence_length=4, batch_size=2), corpus, counting(calls))
    assert sum(calls) == 40
    assert second.sha256 == first.sha256
    np.testing.assert_array_equal(second.train, first.train)
    np.testing.assert_array_equal(second.heldout, first.heldout)


def test_another_corpus_split_tokenizer_or_version_is_another_cache(config, folder, monkeypatch):
    calls = []

    def tokenizes(tokenizer, **changes):
        calls.clear()
        open_tokens(config(**changes), survey(config(**changes)), tokenizer)
        return bool(calls)

    assert tokenizes(counting(calls))
    assert tokenizes(counting(calls), heldout_share=0.5)
    assert tokenizes(counting(calls, identity="other"))
    assert tokenizes(counting(calls, eod=300))
    (folder / "odd" / "new.txt").write_text("new")
    assert tokenizes(counting(calls))
    monkeypatch.setattr(cache, "VERSION", 0)
    assert tokenizes(counting(calls))
    assert not tokenizes(counting(calls))


@pytest.mark.parametrize(
    "place", [0, DIGEST - 1, DIGEST + 12, HEADER - 1, HEADER, HEADER + 5001, -1, "cut", "grown", ""]
)
def test_damage_is_found_and_repaired(config, caplog, place):
    corpus = survey(config())
    good = open_tokens(config(), corpus, BYTES)
    train, heldout = good.train.tolist(), good.heldout.tolist()
    (path,) = files(config())
    whole = path.read_bytes()
    damaged = {"cut": whole[:-2], "grown": whole + b"\0", "": b""}.get(place)
    if damaged is None:
        flipped = bytearray(whole)
        flipped[place] ^= 1
        damaged = bytes(flipped)
    path.write_bytes(damaged)
    calls = []
    with caplog.at_level(logging.WARNING):
        tokens = open_tokens(config(), corpus, counting(calls))
    assert sum(calls) == 40
    assert f"cache {path} is damaged" in caplog.text
    assert (tokens.train.tolist(), tokens.heldout.tolist()) == (train, heldout)
    assert path.read_bytes() == whole
    assert files(config()) == [path]


def test_processes_may_make_it_at_the_same_time(config):
    corpus = survey(config())
    with ThreadPoolExecutor(8) as pool:
        opened = list(pool.map(lambda _: open_tokens(config(), corpus, BYTES), range(8)))
    assert len({tokens.sha256 for tokens in opened}) == 1
    assert all(np.array_equal(tokens.train, opened[0].train) for tokens in opened)
    assert len(files(config())) == 1


def test_nothing_is_left_of_a_cache_that_could_not_be_finished(config, folder):
    corpus = survey(config())
    (folder / "odd" / "01.txt").write_text("changed since")
    with pytest.raises(UserError, match=r"DataConfig.path='.*' changed while it was read"):
        open_tokens(config(), corpus, BYTES)
    assert files(config()) == []


def test_a_folder_that_cannot_be_written_is_refused(config, tmp_path):
    (tmp_path / "file").write_text("")
    changed = config(cache_dir=str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=r"DataConfig.cache_dir='.*' cannot hold the cache: .*Not a directory"):
        open_tokens(changed, survey(changed), BYTES)
