"""Folders in the form that `datasets` writes: an Arrow stream for each shard, named by state.json."""

import json

import numpy as np
import pyarrow
import pytest

from laep_jax.config import DataConfig
from laep_jax.data.dataset import make_dataset
from laep_jax.data.sources import read_documents
from laep_jax.errors import UserError
from laep_jax.storage import open_storage
from tests.support.emulator import new_folder


def save(folder, *shards, columns=None, **state):
    """What `Dataset.save_to_disk` leaves: each shard a list of texts; columns: beside `text`, of all shards."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"data-{i:05d}-of-{len(shards):05d}.arrow" for i in range(len(shards))]
    for name, texts in zip(names, shards, strict=True):
        table = pyarrow.table({"text": pyarrow.array(texts, pyarrow.string()), **(columns or {})})
        with pyarrow.OSFile(str(folder / name), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table, max_chunksize=2)
    files = {"_data_files": [{"filename": name} for name in names]}
    fixed = {"_fingerprint": "9d2e", "_format_columns": None, "_format_kwargs": {}, "_format_type": None}
    (folder / "state.json").write_text(
        json.dumps(files | fixed | {"_output_all_columns": False, "_split": None} | state)
    )
    (folder / "dataset_info.json").write_text(json.dumps({"features": {"text": {"_type": "Value"}}}))
    return folder


def save_splits(folder, **splits):
    for name, texts in splits.items():
        save(folder / name, texts)
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))
    return folder


def documents(path, **changes):
    return [tuple(document) for document in read_documents(DataConfig("datasets", str(path), **changes))]


def test_a_saved_dataset_is_read_in_the_order_of_its_state(tmp_path):
    save(tmp_path / "ds", ["eins", "", "drei ü", "vier"], ["fünf"])
    (tmp_path / "ds" / "cache-1a2b.arrow").write_bytes(b"of a map")
    shards = ("data-00000-of-00002.arrow", "data-00001-of-00002.arrow")
    rows = [(0, 0, "eins"), (0, 2, "drei ü"), (0, 3, "vier"), (1, 0, "fünf")]
    assert documents(tmp_path / "ds") == [(f"{shards[shard]}#{row}", text.encode(), ".") for shard, row, text in rows]
    found = documents(save(tmp_path / "more", ["a", "b"], columns={"topic": ["x/y", "(other)"]}), domain_field="topic")
    assert [(text, domain) for _, text, domain in found] == [(b"a", "x/y"), (b"b", "./(other)")]


def test_of_a_dict_the_split_train_is_read_and_the_others_are_named(tmp_path):
    texts = [f"text {i} of many" * 5 for i in range(60)]
    save_splits(tmp_path / "ds", train=texts, test=["secret"], validation=["secret"])
    found = documents(tmp_path / "ds")
    assert [text.decode() for _, text, _ in found] == texts
    assert {(name.partition("#")[0], domain) for name, _, domain in found} == {
        ("train/data-00000-of-00001.arrow", "train")
    }
    config = DataConfig("datasets", str(tmp_path / "ds"), cache_dir=str(tmp_path / "cache"), sequence_length=16)
    data = make_dataset(config, eval_batches=9, seed=0, vocab_size=384, process_index=0, process_count=1)
    assert data.notes == ["not read, as splits beside train: test, validation"]
    assert documents(tmp_path / "ds" / "test") == [("data-00000-of-00001.arrow#0", b"secret", ".")]


def test_folders_side_by_side_are_domains(tmp_path):
    save(tmp_path / "a", ["eins"])
    save_splits(tmp_path / "b", train=["zwei"], test=["nicht"])
    assert [(text, domain) for _, text, domain in documents(tmp_path)] == [(b"eins", "a"), (b"zwei", "b")]


@pytest.mark.parametrize("key", ["_indices_data_files", "_indices_files"])
def test_rows_by_an_index_are_refused(tmp_path, key):
    save(tmp_path, ["a"], **{key: [{"filename": "indices.arrow"}]})
    with pytest.raises(UserError, match=r"state\.json selects rows by an index; save it again after .*flatten_indices"):
        documents(tmp_path)
    save(tmp_path, ["a"], **{key: None})
    assert len(documents(tmp_path)) == 1


def test_what_is_no_saved_dataset_is_refused(tmp_path):
    (tmp_path / "x").write_text("x")
    (tmp_path / "none").mkdir()
    save_splits(tmp_path / "dict", test=["a"], other=["b"])
    save(tmp_path / "lacking", ["a"], _data_files=[{"filename": "../x"}])
    save(tmp_path / "odd", ["a"], _data_files="x")
    save(tmp_path / "null", ["a", None])
    save(tmp_path / "column", ["a"])
    for name, rule in (
        ("x", r"holds no state\.json, so it is no folder that Dataset\.save_to_disk wrote"),
        ("dict", r"has no split train; name the folder of one split: other, test"),
        ("lacking", r"lacks \['\.\./x'\], which .*state\.json names"),
        ("odd", r"state\.json names no files: it is not from Dataset\.save_to_disk"),
        ("null", r"text_field='text' holds no string in row 1 of data-00000-of-00001\.arrow"),
    ):
        with pytest.raises(UserError, match=rf"^DataConfig\..*{rule}$"):
            documents(tmp_path / name)
    with pytest.raises(UserError, match=r"text_field='body' is not in .*, which has the columns \['text'\]$"):
        documents(tmp_path / "column", text_field="body")


@pytest.mark.parametrize("keep", [0, 3, 100, -20])
def test_a_damaged_stream_is_refused(tmp_path, keep):
    save(tmp_path, ["a" * 50, "b" * 50, "c" * 50])
    [path] = tmp_path.glob("*.arrow")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"(no Arrow stream or a damaged one|cannot be read): .*\.arrow"):
        documents(tmp_path)
    path.write_bytes(b"x" * 1000)
    with pytest.raises(UserError, match=r"no Arrow stream or a damaged one: .*\.arrow"):
        documents(tmp_path)


def test_with_flipped_bits_it_is_read_or_refused(tmp_path):
    """Some flips change a text, and nothing shows it; none reads outside the file's own bytes."""
    texts = ["a" * 50, "b" * 50, "c" * 50]
    save(tmp_path, texts)
    [path] = tmp_path.glob("*.arrow")
    whole, refused = path.read_bytes(), 0
    ends = b"".join(int(50 * i).to_bytes(4, "little") for i in range(3))  # of the texts of the first batch
    places = [whole.index(ends) + 4 * i + 3 for i in (1, 2)]
    for place in [*places, *np.random.default_rng(0).integers(0, len(whole), 200).tolist()]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        try:
            assert sum(len(text) for _, text, _ in documents(tmp_path)) < len(whole)
            assert place not in places
        except UserError:
            refused += 1
    assert refused > 20


def test_in_a_bucket_it_is_the_same(emulator, tmp_path):
    save_splits(tmp_path / "ds", train=["one", "two"], test=["three"])
    bucket = open_storage(f"{new_folder()}/ds")
    for path in (tmp_path / "ds").rglob("*.*"):
        bucket.write(path.relative_to(tmp_path / "ds").as_posix(), path.read_bytes())
    assert documents(bucket.root) == documents(tmp_path / "ds")
