"""The cache holds each side's documents, is made once, and what is damaged is made anew."""

import dataclasses
import fcntl
import json
import logging
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from laep_jax.data import cache
from laep_jax.data.cache import DIGEST, HEADER, open_tokens
from laep_jax.data.listing import list_files
from laep_jax.data.tokenizer import BYTES
from laep_jax.errors import UserError

opened: list[str] | None = None  # what is opened, while a test looks at it


def _note_opened(event, arguments):
    if event == "open" and opened is not None:
        opened.append(str(arguments[0]))


sys.addaudithook(_note_opened)


def opening(config, tokenizer=BYTES):
    return open_tokens(config, list_files(config), tokenizer)


def files(config, suffix=".tokens"):
    return sorted(path for path in Path(config.cache_dir).iterdir() if path.suffix == suffix)


def counting(calls, **changes):
    def encode(texts):
        calls.append(len(texts))
        return BYTES.encode(texts)

    return dataclasses.replace(BYTES, **{"encode": encode} | changes)


def test_holds_both_sides_in_order(config, texts):
    tokens = opening(config())
    for stream, side in zip((tokens.train, tokens.validation), texts, strict=True):
        assert stream.tolist() == [token for text in side for token in [*text, 256]]
        assert stream.dtype == np.uint16


def test_many_documents_keep_their_order(config, texts, monkeypatch):
    monkeypatch.setattr(cache, "DOCUMENTS_CHUNK", 7)
    tokens = opening(config())
    assert tokens.train.tolist() == [token for text in texts[0] for token in [*text, 256]]


def test_a_second_opening_reads_no_corpus_file_and_does_not_tokenize(config, folder):
    global opened
    calls, opened = [], []
    try:
        first = opening(config(), counting(calls))
        assert len([path for path in opened if path.startswith(str(folder))]) == 2 * 40  # to hash, and to tokenize
        opened.clear()
        second = opening(config(sequence_length=4, batch_size=2, path=os.path.relpath(folder)), counting(calls))
        assert {Path(path).suffix for path in opened if not path.isdecimal()} == {".json", ".tokens"}
    finally:
        opened = None
    assert sum(calls) == 40
    assert second.sha256 == first.sha256
    np.testing.assert_array_equal(second.train, first.train)
    np.testing.assert_array_equal(second.validation, first.validation)
    assert (second.corpus, second.run_ends.tolist()) == (first.corpus, first.run_ends.tolist())


@pytest.mark.parametrize("change", ["touched", "copied"])
def test_a_corpus_with_other_times_or_of_another_place_is_read_once_more_and_not_tokenized(
    config, folder, tmp_path, monkeypatch, change
):
    first, surveys = opening(config()), []
    monkeypatch.setattr(cache, "survey", lambda config, survey=cache.survey: surveys.append(1) or survey(config))
    if change == "touched":
        os.utime(folder / "odd" / "01.txt", ns=(0, 0))
        changed = config()
    else:
        changed = config(path=str(shutil.copytree(folder, tmp_path / "copy")))
    for _ in range(2):
        assert opening(changed, counting([], encode=None)).sha256 == first.sha256
    assert len(surveys) == 1
    assert len(files(changed)) == 1


def test_another_domain_field_reads_the_corpus_and_tokenizes_nothing(config, tmp_path):
    lines = [json.dumps({"text": f"text {i}", "a": "x", "b": "yz"[i % 2]}) for i in range(40)]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    calls, found = [], []
    for field in ("", "a", "b", "a"):
        changed = config(source="jsonl", path=str(tmp_path / "x.jsonl"), domain_field=field)
        found.append({name for name, *_ in opening(changed, counting(calls)).corpus.validation_runs})
    assert found == [{"x.jsonl"}, {"x"}, {"y", "z"}, {"x"}]
    assert sum(calls) == 40


def test_another_corpus_split_tokenizer_or_version_is_another_cache(config, folder, monkeypatch):
    calls = []

    def tokenizes(tokenizer, **changes):
        calls.clear()
        opening(config(**changes), tokenizer)
        return bool(calls)

    assert tokenizes(counting(calls))
    assert tokenizes(counting(calls), validation_fraction=0.5)
    assert tokenizes(counting(calls, identity="other"))
    assert tokenizes(counting(calls, eod=300))
    (folder / "odd" / "new.txt").write_text("new")
    assert tokenizes(counting(calls))
    monkeypatch.setattr(cache, "VERSION", 0)
    assert tokenizes(counting(calls))
    assert not tokenizes(counting(calls))


@pytest.mark.parametrize(
    ("suffix", "place"),
    [(".tokens", place) for place in (0, DIGEST - 1, DIGEST + 12, HEADER - 1, HEADER, HEADER + 5001, -1, "cut", "")]
    + [(".tokens", "grown"), (".json", 0), (".json", -1), (".json", "cut"), (".json", "")],
)
def test_damage_is_found_and_repaired(config, caplog, suffix, place):
    good = opening(config())
    train, validation = good.train.tolist(), good.validation.tolist()
    (path,) = files(config(), suffix)
    whole = path.read_bytes()
    damaged = {"cut": whole[:-2], "grown": whole + b"\0", "": b""}.get(place)
    if damaged is None:
        flipped = bytearray(whole)
        flipped[place] ^= 1
        damaged = bytes(flipped)
    path.write_bytes(damaged)
    calls = []
    with caplog.at_level(logging.WARNING):
        tokens = opening(config(), counting(calls))
    assert sum(calls) == (40 if suffix == ".tokens" else 0)
    assert f"cache {path} is damaged" in caplog.text
    assert (tokens.train.tolist(), tokens.validation.tolist()) == (train, validation)
    assert suffix == ".json" or path.read_bytes() == whole
    assert files(config(), suffix) == [path]
    assert {path.suffix for path in Path(config().cache_dir).iterdir()} == {".json", ".lock", ".tokens"}


def test_tokens_with_another_time_are_hashed_once_more(config, monkeypatch):
    opening(config())
    (path,) = files(config())
    os.utime(path, ns=(0, 0))
    hashed = []
    monkeypatch.setattr(cache, "_hash_rest", lambda file, f=cache._hash_rest: hashed.append(1) or f(file))
    opening(config())
    opening(config())
    assert len(hashed) == 1


def test_one_process_makes_it_and_the_others_wait(config):
    calls = []
    with ThreadPoolExecutor(8) as pool:
        tokens = list(pool.map(lambda _: opening(config(), counting(calls)), range(8)))
    assert sum(calls) == 40
    assert len({some.sha256 for some in tokens}) == 1
    assert all(np.array_equal(some.train, tokens[0].train) for some in tokens)


def test_a_process_that_waited_is_refused_as_the_one_it_waited_for(config, folder, caplog, monkeypatch):
    surveys = []
    monkeypatch.setattr(cache, "survey", lambda config, survey=cache.survey: surveys.append(1) or survey(config))
    (folder / "odd" / "01.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match="is not UTF-8"):
        opening(config())
    (lock,) = files(config(), ".lock")
    with ThreadPoolExecutor(1) as pool, caplog.at_level(logging.WARNING):
        with lock.open("r+") as other:
            fcntl.flock(other, fcntl.LOCK_EX)
            waiting = pool.submit(opening, config())
            while "waiting for the process" not in caplog.text:
                pass
        with pytest.raises(UserError, match="is not UTF-8"):
            waiting.result()
    assert len(surveys) == 1
    (folder / "odd" / "01.txt").write_text("mended")
    assert opening(config())


def test_without_locks_each_makes_its_own(config, monkeypatch):
    def flock(file, how):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert opening(config()).sha256 == opening(config()).sha256


def test_nothing_is_left_of_a_cache_that_could_not_be_finished(config, folder, monkeypatch):
    def survey(config, survey=cache.survey):
        corpus = survey(config)
        (folder / "odd" / "01.txt").write_text("changed since")
        return corpus

    monkeypatch.setattr(cache, "survey", survey)
    with pytest.raises(UserError, match=r"DataConfig.path='.*' changed while it was read"):
        opening(config())
    assert {path.suffix for path in Path(config().cache_dir).iterdir()} == {".lock"}


def test_a_folder_that_cannot_be_written_is_refused(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"DataConfig.cache_dir='.*' cannot hold the cache: .*Not a directory"):
        opening(config(cache_dir=str(tmp_path / "file" / "cache")))
