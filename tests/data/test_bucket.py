"""A corpus in a bucket is the corpus that it is on a disk."""

import gzip

import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from laep_jax.config import DataConfig
from laep_jax.data.listing import list_files
from laep_jax.data.sources import read_documents
from laep_jax.errors import UserError
from laep_jax.storage import open_storage
from tests.support.emulator import new_folder


@pytest.fixture
def corpus(emulator, tmp_path):
    """The same files on a disk and in a bucket: (path, address)."""
    disk, bucket = open_storage(tmp_path / "corpus"), open_storage(f"{new_folder()}/corpus")
    writer = ArrayRecordWriter(str(tmp_path / "made"), "group_size:1")
    for text in ("one", "two", "drei ü"):
        writer.write(text.encode())
    writer.close()
    files = {
        "a/x.txt": "eins zwei ü".encode(),
        "a/.hidden/y.txt": b"not read",
        "b/y.txt": b"\xef\xbb\xbfthree",
        "b/z.jsonl.gz": gzip.compress(b'{"text": "first"}\n\n{"text": "second"}\n'),
        "c/r.array_record": (tmp_path / "made").read_bytes(),
    }
    for name, content in files.items():
        disk.write(name, content)
        bucket.write(name, content)
    return str(disk.root), bucket.root


@pytest.mark.parametrize(
    ("source", "below"),
    [
        ("text", "a"),
        ("text", "a/x.txt"),
        ("text", "*/*.txt"),
        ("text", "**/.hidden/*.txt"),
        ("jsonl", "b/*.gz"),
        ("array_record", "c"),
    ],
)
def test_documents_and_their_names_are_the_same(corpus, source, below):
    found = []
    for root in corpus:
        config = DataConfig(source=source, path=f"{root}/{below}")
        found.append((list(read_documents(config)), [(file.name, file.size) for file in list_files(config).files]))
    assert found[0] == found[1]
    assert found[0][0]


def test_what_is_wrong_is_named_with_its_address(corpus, emulator):
    _, address = corpus
    bucket = open_storage(address)
    with pytest.raises(UserError, match=rf"^DataConfig\.path='{address}/d' is neither a file, a folder with files nor"):
        list_files(DataConfig(source="text", path=f"{address}/d"))
    bucket.write("b/z.jsonl", b"")
    with pytest.raises(UserError, match=rf"holds z\.jsonl twice: {address}/b/z\.jsonl and {address}/b/z\.jsonl\.gz"):
        list_files(DataConfig(source="jsonl", path=f"{address}/b/z*"))
    bucket.write("a/x.txt", b"PAR1")
    with pytest.raises(UserError, match=rf"{address}/a/x\.txt is a Parquet file"):
        list(read_documents(DataConfig(source="text", path=f"{address}/a")))
    with pytest.raises(UserError, match=r"^DataConfig\.path='gs://nowhere/x' cannot be read: FileNotFoundError"):
        list_files(DataConfig(source="text", path="gs://nowhere/x"))
